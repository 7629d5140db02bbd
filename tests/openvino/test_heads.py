"""The raw heads of detectors, found in the graph; boxes, their agreement and their precision."""

import itertools

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib.data.boxes import Boxes
from ovcalib.evaluation.detection import (
    box_agreement,
    boxes_of,
    graph_decoder,
    iou,
    matches,
    mean_precision,
)
from ovcalib.graph.heads import raw_heads, split_detector

SIDE = 8


def conv(x, channels, seed, kernel=3, bias=True):
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 0.3, (channels, x.output(0).get_shape()[1], kernel, kernel)).astype(np.float32)
    pad = [kernel // 2] * 2
    out = ops.convolution(x, ops.constant(weights), [1, 1], pad, pad, [1, 1])
    return ops.add(out, ops.constant(rng.normal(0, 1, (1, channels, 1, 1)).astype(np.float32))) if bias else out


def trunk():
    image = ops.parameter([1, 3, SIDE, SIDE], np.float32, name="image")
    image.output(0).get_tensor().set_names({"image"})
    return image, ops.relu(conv(image, 6, 0))


def flat(x, width):
    """[1, width, H, W] as [1, H * W, width]."""
    moved = ops.transpose(x, ops.constant([0, 2, 3, 1]))
    return ops.reshape(moved, ops.constant([1, SIDE * SIDE, width]), special_zero=False)


def grid():
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    return ops.constant(np.stack([x, y], -1).reshape(1, -1, 2))


def model(outputs, image, names=None):
    graph = ov.Model([ops.result(value) for value in outputs], [image], "net")
    for i, port in enumerate(graph.outputs):
        port.get_tensor().set_names({names[i] if names else f"out{i}"})
    return graph


def suppressing(classes=2):
    """A detector that ends in non-maximum suppression: centres on a grid, sides by an exponential."""
    image, features = trunk()
    boxes, scores = flat(conv(features, 4, 1), 4), flat(conv(features, classes, 2, bias=False), classes)
    halves = ops.split(boxes, ops.constant(2), 2)
    centre, side = ops.add(halves.output(0), grid()), ops.exp(halves.output(1))
    corners = ops.concat([ops.subtract(centre, side), ops.add(centre, side)], 2)
    likely = ops.transpose(ops.sigmoid(scores), ops.constant([0, 2, 1]))
    kept = ops.multiclass_nms(corners, likely, score_threshold=0.3, iou_threshold=0.5, output_type="i32")
    rows = kept.output(0)  # class, score, corners
    split = ops.variadic_split(rows, ops.constant(1), ops.constant([1, 1, 4]))
    label = ops.convert(ops.squeeze(split.output(0), ops.constant([1])), "i64")
    return model([split.output(2), label, ops.squeeze(split.output(1), ops.constant([1]))], image, ["b", "l", "s"])


def run(graph, x):
    return list(ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x).values())


def test_a_detector_is_cut_where_its_last_layers_end(rng) -> None:
    graph, x = suppressing(), rng.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    found = split_detector(graph)
    assert sorted(tuple(port.get_shape()) for port in found.body.outputs) == [(1, 2, SIDE, SIDE), (1, 4, SIDE, SIDE)]
    kinds = {op.get_type_name() for op in found.body.get_ops()}
    assert not kinds & {"Exp", "Sigmoid", "MulticlassNms", "Reshape"}
    # The bias belongs to its layer: the body ends in the sum, where there is one.
    ends = {
        tuple(r.output(0).get_shape()): r.input_value(0).get_node().get_type_name() for r in found.body.get_results()
    }
    assert ends == {(1, 4, SIDE, SIDE): "Add", (1, 2, SIDE, SIDE): "Convolution"}
    expected, joined = run(graph, x), run(found.join(found.body), x)
    assert len(expected[0]) > 3
    for a, b in zip(expected, joined, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_another_body_gives_other_boxes(rng) -> None:
    graph, x = suppressing(), rng.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    found = split_detector(graph)
    other = found.body.clone()
    for result in other.get_results():
        source = result.input_value(0)
        result.input(0).replace_source_output(ops.multiply(source, ops.constant(np.float32(0.1))).output(0))
    joined = found.join(other)
    assert run(joined, x)[0].shape != run(graph, x)[0].shape or not np.allclose(run(joined, x)[0], run(graph, x)[0])
    decode = graph_decoder(found, (SIDE, SIDE))
    boxes = decode(run(found.body, x))
    np.testing.assert_allclose(boxes.corners, run(graph, x)[0], atol=1e-5)
    np.testing.assert_array_equal(boxes.labels, run(graph, x)[1])


def test_boxes_that_are_decoded_without_suppression_are_found_by_their_grid() -> None:
    image, features = trunk()
    found = split_detector(model([ops.add(flat(conv(features, 2, 1), 2), grid())], image))
    assert [tuple(port.get_shape()) for port in found.body.outputs] == [(1, 2, SIDE, SIDE)]
    assert any("Add" in name for name in found.operations)


def test_the_expected_side_over_bins_is_arithmetic_of_boxes() -> None:
    """A softmax over bins and a convolution with 0, 1, 2, ... is a mean, not a layer (Li et al. 2020, eq. 4)."""
    image, features = trunk()
    bins = ops.softmax(conv(features, 5, 1), 1)
    weights = ops.constant(np.arange(5, dtype=np.float32).reshape(1, 5, 1, 1))
    side = ops.convolution(bins, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    found = split_detector(model([ops.exp(side)], image))
    assert [tuple(port.get_shape()) for port in found.body.outputs] == [(1, 5, SIDE, SIDE)]


@pytest.mark.parametrize(
    "end",
    [
        lambda x: ops.sigmoid(conv(x, 3, 1)),
        lambda x: ops.multiply(conv(x, 3, 1), ops.constant(np.arange(1, 4, dtype=np.float32).reshape(1, 3, 1, 1))),
        lambda x: ops.softmax(conv(x, 3, 1), 1),
        lambda x: ops.exp(ops.reduce_mean(conv(x, 3, 1), ops.constant([2, 3]))),
    ],
)
def test_maps_and_classifiers_are_no_detectors(end) -> None:
    image, features = trunk()
    graph = model([end(features)], image)
    assert split_detector(graph) is None
    assert raw_heads(graph) is graph


# Boxes ----------------------------------------------------------------------------------------


def random_boxes(rng, count, classes=2, scores=True):
    low = rng.uniform(0, 20, (count, 2))
    corners = np.concatenate([low, low + rng.uniform(1, 12, (count, 2))], 1)
    return Boxes(corners, rng.integers(0, classes, count), rng.uniform(0.3, 1, count) if scores else None)


def area_by_counting(a, b):
    """IoU of whole-numbered boxes, pixel by pixel."""
    grid = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a.tolist(), b.tolist())]
    return len(grid[0] & grid[1]) / len(grid[0] | grid[1])


def test_iou_counts_pixels(rng) -> None:
    low = rng.integers(0, 6, (2, 5, 2))
    a, b = np.concatenate([low, low + rng.integers(1, 6, (2, 5, 2))], 2)
    expected = [[area_by_counting(x, y) for y in b] for x in a]
    np.testing.assert_allclose(iou(a.astype(float), b.astype(float)), expected)


def test_matches_are_one_to_one_of_one_class_and_as_many_as_a_search_finds(rng) -> None:
    for _ in range(30):
        a, b = random_boxes(rng, 4), random_boxes(rng, 4)
        b = Boxes(
            np.where(rng.random((4, 1)) < 0.7, a.corners + rng.normal(0, 0.3, (4, 4)), b.corners), a.labels, b.scores
        )
        pairs, overlap = matches(a, b), iou(a.corners, b.corners)
        fits = lambda i, j: overlap[i, j] >= 0.5 and a.labels[i] == b.labels[j]  # noqa: E731, B023
        assert all(fits(i, j) for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        best = max(sum(fits(i, j) for i, j in enumerate(order)) for order in itertools.permutations(range(4)))
        assert len(pairs) == best


def test_box_agreement_counts_shown_boxes_alone() -> None:
    box = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    fp32 = Boxes(box, np.array([1, 1, 2]), np.array([0.9, 0.8, 0.2]))
    int8 = Boxes(box + 0.5, np.array([1, 2, 2]), np.array([0.9, 0.8, 0.9]))
    found = box_agreement([fp32], [int8])
    assert (found.fp32, found.int8, found.matched, found.share) == (2, 3, 1, 2 / 5)
    nothing = box_agreement([fp32.above(0.95)], [int8.above(0.95)])
    assert nothing.share is None


def average_precision(truth, found, threshold):
    """COCO's 101-point average precision of one class, from its definition."""
    ranked = sorted(((s, i, j) for i, b in enumerate(found) for j, s in enumerate(b.scores)), reverse=True)
    taken, right = set(), []
    for _, i, j in ranked:
        overlap = iou(found[i].corners[j : j + 1], truth[i].corners)[0]
        free = [(o, k) for k, o in enumerate(overlap) if (i, k) not in taken and o >= threshold]
        right.append(bool(free))
        if free:
            taken.add((i, max(free)[1]))
    hits = np.cumsum(right)
    recall, precision = hits / sum(map(len, truth)), hits / np.arange(1, len(hits) + 1)
    return np.mean([precision[recall >= level - 1e-12].max(initial=0) for level in np.linspace(0, 1, 101)])


def test_mean_precision_is_that_of_its_definition(rng) -> None:
    truth = [random_boxes(rng, n, 1, scores=False) for n in (3, 4, 2)]
    found = [
        Boxes(np.concatenate([t.corners + rng.normal(0, 0.6, t.corners.shape), random_boxes(rng, 2).corners]),
              np.zeros(len(t) + 2, np.int64), rng.random(len(t) + 2))
        for t in truth
    ]  # fmt: skip
    measured = mean_precision(truth, found)
    levels = [average_precision(truth, found, level) for level in np.arange(0.5, 1, 0.05)]
    assert measured.map50 == pytest.approx(levels[0], abs=1e-6)
    assert measured.map == pytest.approx(np.mean(levels), abs=1e-6)
    assert 0.1 < measured.map < measured.map50
    perfect = [Boxes(t.corners, t.labels, np.ones(len(t))) for t in truth]
    assert mean_precision(truth, perfect).map == pytest.approx(1)
    wrong = [Boxes(t.corners, t.labels + 1, np.ones(len(t))) for t in truth]
    assert mean_precision(truth, wrong).map == 0
    assert mean_precision(truth, [b.above(2) for b in found]).map == 0


def test_boxes_are_known_in_the_layouts_of_detectors() -> None:
    corners = np.array([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.8]], np.float32)
    size = (100, 200)  # height, width
    pixels = corners * [200, 100, 200, 100]
    rows = np.concatenate([[[0, 3, 0.9], [0, 1, 0.7]], corners], 1)
    detection = np.concatenate([rows, [[-1, *[0] * 6]]])[None, None].astype(np.float32)
    scores, labels = np.array([0.9, 0.7], np.float32), np.array([3, 1])
    end2end = np.concatenate([pixels, scores[:, None], labels[:, None]], 1)[None]
    layouts = [
        {"out": detection},
        {"out": end2end},
        {"boxes": pixels, "labels": labels, "scores": scores},
        {"detection_boxes": corners[None][..., [1, 0, 3, 2]], "detection_classes": labels[None].astype(np.float32),
         "detection_scores": scores[None], "num_detections": np.array([2.0])},
    ]  # fmt: skip
    for layout in layouts:
        found = boxes_of(layout, size)
        np.testing.assert_allclose(found.corners, pixels, rtol=1e-5)
        np.testing.assert_array_equal(found.labels, labels)
        np.testing.assert_allclose(found.scores, scores)
    assert boxes_of({"heat": np.zeros((1, 1, 8, 8))}, size) is None
    assert boxes_of({"a": np.zeros((1, 4, 8, 8)), "b": np.zeros((1, 2, 8, 8))}, size) is None
