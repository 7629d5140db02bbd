"""Boxes of detectors: mean average precision with labels, agreement of INT8 with FP32 without."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.boxes import Boxes
from ovcalib.errors import require
from ovcalib.evaluation.outputs import Outputs
from ovcalib.graph.heads import Detector
from ovcalib.models.load import Model
from ovcalib.records.result import BoxAgreement, DetectionAccuracy, MeanPrecision
from ovcalib.runtime import MultiInference, Port

# Two boxes of one class are the same object from this intersection over union on.
SAME_IOU = 0.5
# Boxes below this score are not shown to anybody; detectors find hundreds of them.
SHOWN_SCORE = 0.3
# Of values in 0..1, which is what normalised corners are.
NORMALISED = 1.5

# From the raw heads of one image, [1, ...] each, to its boxes.
Decoder = Callable[[Sequence[NDArray[np.float32]]], Boxes]


def iou(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Intersection over union of boxes [n, 4] and [m, 4], float64 [n, m]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(1) for box in (a, b)]
    union = areas[0][:, None] + areas[1][None] - both
    return np.asarray(both / np.maximum(union, np.finfo(np.float64).tiny))


def matches(reference: Boxes, other: Boxes) -> list[tuple[int, int]]:
    """Pairs of boxes with the same class and an IoU of SAME_IOU or more, each box in one pair at most.

    Boxes of `other` choose in the order of their scores, each the free box with the largest IoU, as in COCO.
    """
    overlap = iou(other.corners, reference.corners)
    overlap[other.labels[:, None] != reference.labels[None]] = 0
    assert other.scores is not None
    pairs = []
    for i in np.argsort(-other.scores, kind="stable"):
        if not overlap.shape[1]:
            break
        best = int(overlap[i].argmax())
        if overlap[i, best] >= SAME_IOU:
            pairs.append((best, int(i)))
            overlap[:, best] = 0
    return pairs


def box_agreement(reference: Sequence[Boxes], other: Sequence[Boxes]) -> BoxAgreement:
    """How many boxes with a score of SHOWN_SCORE or more two detectors have in common."""
    matched = found = expected = 0
    for before, after in zip(reference, other, strict=True):
        before, after = before.above(SHOWN_SCORE), after.above(SHOWN_SCORE)
        matched += len(matches(before, after))
        expected, found = expected + len(before), found + len(after)
    both = expected + found
    return BoxAgreement(
        iou=SAME_IOU, score=SHOWN_SCORE, fp32=expected, int8=found, matched=matched,
        share=2 * matched / both if both else None,
    )  # fmt: skip


def mean_precision(truth: Sequence[Boxes], found: Sequence[Boxes]) -> MeanPrecision:
    """COCO's mean average precision over IoU 0.50 to 0.95, and at 0.50, by pycocotools.

    raises   MissingDependencyError
    """
    coco = require("pycocotools.coco", "quantize", "Mean average precision")
    evaluation = require("pycocotools.cocoeval", "quantize", "Mean average precision")
    annotations: list[dict[str, object]] = [
        {"id": 0, "image_id": i, "category_id": int(label), "bbox": _corner_and_size(corners), "iscrowd": int(crowd),
         "area": float((corners[2] - corners[0]) * (corners[3] - corners[1]))}
        for i, boxes in enumerate(truth)
        for corners, label, crowd in zip(
            boxes.corners, boxes.labels, np.zeros(len(boxes)) if boxes.crowd is None else boxes.crowd, strict=True
        )
    ]  # fmt: skip
    for number, annotation in enumerate(annotations, 1):  # 0 stands for no match
        annotation["id"] = number
    results = [
        {"image_id": i, "category_id": int(label), "bbox": _corner_and_size(corners), "score": float(score)}
        for i, boxes in enumerate(found)
        for corners, label, score in zip(boxes.corners, boxes.labels, _scores(boxes), strict=True)
    ]
    if not results:
        return MeanPrecision(map=0.0, map50=0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO()
        known.dataset = {
            "info": {}, "images": [{"id": i} for i in range(len(truth))], "annotations": annotations,
            "categories": [{"id": label} for label in sorted({int(v) for boxes in truth for v in boxes.labels})],
        }  # fmt: skip
        known.createIndex()
        run = evaluation.COCOeval(known, known.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return MeanPrecision(map=float(run.stats[0]), map50=float(run.stats[1]))


def _scores(boxes: Boxes) -> NDArray[np.floating]:
    assert boxes.scores is not None
    return boxes.scores


def _corner_and_size(corners: NDArray[np.floating]) -> list[float]:
    left, top, right, bottom = (float(v) for v in corners)
    return [left, top, right - left, bottom - top]


def detection_accuracy(
    truth: Sequence[Boxes], reference: Sequence[Boxes], other: Sequence[Boxes], protocol: str, digest: str
) -> DetectionAccuracy:
    """Mean average precision of FP32 and INT8 on the same labelled images."""
    fp32, int8 = mean_precision(truth, reference), mean_precision(truth, other)
    return DetectionAccuracy(
        protocol=protocol, count=len(truth), boxes=sum(map(len, truth)), data_sha256=digest, fp32=fp32, int8=int8,
        drop_points=100 * (fp32.map - int8.map),
    )  # fmt: skip


def decoder_of(model: Model, detector: Detector | None) -> Decoder | None:
    """From raw heads to boxes; None for what is no detector, or has boxes in an unknown layout, or only outside.

    detector   the parts of a graph with boxes
    """
    if detector is not None:
        _, height, width = model.spec.input_shape
        return graph_decoder(detector, (height, width))
    return getattr(model.module, "boxes", None) if model.spec.task == "detection" else None


def decoded(outputs: Outputs, ports: Sequence[Port], decode: Decoder) -> list[Boxes]:
    """The boxes of every image."""
    heads = list(outputs.by_name(ports).values())
    return [decode([head[i : i + 1] for head in heads]) for i in range(len(outputs))]


# Boxes that a graph returns -------------------------------------------------------------------


def graph_decoder(detector: Detector, size: tuple[int, int]) -> Decoder | None:
    """What the part of a graph after the raw heads makes of them; None where its outputs are no boxes that we know.

    size   (height, width) of the network's input
    """
    run = MultiInference(detector.tail)
    shapes = [tuple(parameter.output(0).get_shape()) for parameter in detector.tail.get_parameters()]

    def decode(heads: Sequence[NDArray[np.float32]]) -> Boxes:
        found = boxes_of(run([head.reshape(shape) for head, shape in zip(heads, shapes, strict=True)]), size)
        assert found is not None
        return found

    zeros = run([np.zeros(shape, np.float32) for shape in shapes])
    return None if boxes_of(zeros, size) is None else decode


def boxes_of(outputs: Mapping[str, NDArray[np.generic]], size: tuple[int, int]) -> Boxes | None:
    """Boxes in the layouts that detectors return them in; None for any other outputs.

    [1, 1, n, 7]             OpenVINO's DetectionOutput: image, class, score, corners in 0..1
    [1, n, 6] or [n, 6]      corners, score, class
    [n, 4], [n] and [n]      corners, and scores and classes in any order; a batch of 1 may stand in front. With
                             "detection_boxes" in the name corners are top, left, bottom, right, as in TensorFlow
    """
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    if len(arrays) == 1:
        (only,) = arrays.values()
        if only.ndim == 4 and only.shape[:2] == (1, 1) and only.shape[3] == 7:
            rows = only[0, 0].astype(np.float64)
            ends = np.flatnonzero(rows[:, 0] < 0)
            rows = rows[: ends[0]] if len(ends) else rows
            return _in_pixels(Boxes(rows[:, 3:], rows[:, 1].astype(np.int64), rows[:, 2]), size)
        if only.ndim in (2, 3) and only.shape[-1] == 6 and (only.ndim == 2 or only.shape[0] == 1):
            rows = only.reshape(-1, 6).astype(np.float64)
            return _in_pixels(Boxes(rows[:, :4], rows[:, 5].astype(np.int64), rows[:, 4]), size)
        return None
    corners = [name for name, value in arrays.items() if value.ndim in (2, 3) and value.shape[-1] == 4]
    if len(corners) != 1:
        return None
    boxes = arrays[corners[0]].reshape(-1, 4).astype(np.float64)
    vectors = {
        name: value.reshape(-1) for name, value in arrays.items()
        if name != corners[0] and value.shape[-1:] == (len(boxes),) and value.size == len(boxes)
    }  # fmt: skip
    labels = [name for name, value in vectors.items() if value.dtype.kind in "iu"] or [
        name for name in vectors if "class" in name.lower() or "label" in name.lower()
    ]
    scores = [name for name in vectors if name not in labels]
    if len(labels) != 1 or len(scores) != 1:
        return None
    if "detection_boxes" in corners[0]:
        boxes = boxes[:, [1, 0, 3, 2]]
    found = Boxes(boxes, vectors[labels[0]].astype(np.int64), vectors[scores[0]].astype(np.float64))
    return _in_pixels(found, size)


def _in_pixels(boxes: Boxes, size: tuple[int, int]) -> Boxes:
    normalised = len(boxes) > 0 and float(np.abs(boxes.corners).max()) <= NORMALISED
    return boxes.scaled(size[1], size[0]) if normalised else boxes
