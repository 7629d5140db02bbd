"""Detectors as users have them: torchvision's by reference or as a module, and their boxes against COCO files."""

import json
from typing import Any

import numpy as np
import openvino as ov
import PIL.Image
import pytest
import torch
from openvino import opset13 as ops
from torchvision.models import detection

import ovcalib
from ovcalib.data.boxes import Boxes
from ovcalib.data.sets import box_classes, open_data
from ovcalib.errors import DataError, ModelError
from ovcalib.evaluation import sanity
from ovcalib.graph.files import write_ir
from ovcalib.models.load import load_model
from ovcalib.records.options import ModelOptions
from ovcalib.reports.markdown import markdown_report, summary
from ovcalib.reports.result import result_page
from ovcalib.reports.verdict import result_verdict
from tests.openvino.test_heads import SIDE, conv, flat, run, suppressing, trunk
from tests.toy import with_statistics_of

SHAPE = (3, 96, 96)
QUICK: Any = {"input_shape": SHAPE, "calib": "noise", "num_samples": 4, "benchmark_time": 0, "guard": False,
         "rounding": "nearest", "bias_correction": "layerwise", "activation_ranges": "min-max",
         "deploy_isa": "host", "overflow_fix": "enable"}  # fmt: skip


@pytest.fixture(scope="module")
def detector():
    """An SSDLite with random weights that finds different boxes in different images."""
    torch.manual_seed(0)
    net = detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, detections_per_img=12
    )
    with_statistics_of(net, lambda net: net.head(list(net.backbone(torch.randn(4, *SHAPE)).values())))
    with torch.no_grad():
        for head in net.head.classification_head.module_list:
            head[1].weight.mul_(20)
    return net


@pytest.fixture(scope="module")
def model(detector):
    return load_model(ModelOptions(reference="net", input_shape=SHAPE), detector)


@pytest.fixture(scope="module")
def coco(model, tmp_path_factory):
    """Images of other sizes than the network's, with what the network itself finds in them as the truth."""
    root = tmp_path_factory.mktemp("coco")
    return root, write_coco(model, root)


def write_coco(model, root, ids=(1, 2, 3)) -> int:
    """The number of boxes that were written; `ids` are the categories of the detector's classes."""
    rng = np.random.default_rng(0)
    images, truth = [], []
    for width, height in [(192, 96), (100, 150), (96, 96)]:
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        images.append(coarse.resize((width, height)))
        x = model.spec.preprocessing.normalise(model.spec.preprocessing.fit(images[-1]))[None]
        with torch.no_grad():
            found = model.module.boxes([head.numpy() for head in model.module(torch.from_numpy(x))])
        labels = np.array([ids[label - 1] for label in found.labels])
        truth.append(Boxes(found.scaled(width / 96, height / 96).corners, labels))
    return coco_folder(root, images, truth, ids)


def coco_folder(root, images, truth, ids) -> int:
    """Images with boxes as a set in COCO's format; `ids` are all categories."""
    (root / "images" / "val").mkdir(parents=True)
    (root / "annotations").mkdir()
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for n, (image, boxes) in enumerate(zip(images, truth, strict=True), 1):
        image.save(root / "images" / "val" / f"{n}.png")
        listed.append({"id": n, "file_name": f"{n}.png", "width": image.width, "height": image.height})
        for (left, top, right, bottom), label in zip(boxes.corners.tolist(), boxes.labels.tolist(), strict=True):
            size = [left, top, right - left, bottom - top]
            annotations.append({"id": len(annotations) + 1, "image_id": n, "category_id": label,
                                "bbox": size, "area": size[2] * size[3], "iscrowd": 0})  # fmt: skip
    names = [{"id": number, "name": f"kind{i}"} for i, number in enumerate(ids)]
    (root / "annotations" / "instances_val.json").write_text(
        json.dumps({"images": listed, "annotations": annotations, "categories": names})
    )
    return len(annotations)


def test_the_raw_heads_decode_to_what_the_detector_finds(detector, model) -> None:
    image = torch.rand(3, 96, 96)
    detector.transform.fixed_size, kept = (96, 96), detector.transform.fixed_size
    try:
        with torch.no_grad():
            (expected,) = detector([image])
            x = (image - 0.5) / 0.5
            found = model.module.boxes([head.numpy() for head in model.module(x[None])])
    finally:
        detector.transform.fixed_size = kept
    assert len(found) == 12
    np.testing.assert_allclose(found.corners, expected["boxes"].numpy(), atol=1e-3)
    np.testing.assert_array_equal(found.labels, expected["labels"].numpy())
    assert model.spec.preprocessing.mean == (0.5, 0.5, 0.5)
    assert model.spec.preprocessing.short_side is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def test_anchors_of_all_levels_find_their_place(name) -> None:
    torch.manual_seed(0)
    net: Any = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    net.score_thresh = 0.0
    net.eval()
    heads: Any = load_model(ModelOptions(reference="net", input_shape=(3, 64, 64)), net).module
    image = torch.rand(3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (net.transform.image_mean, net.transform.image_std))
    with torch.no_grad():
        (expected,) = net([image])
        found = heads.boxes([head.numpy() for head in heads(((image - mean) / std)[None])])
    assert len(found) > 10
    np.testing.assert_allclose(found.corners, expected["boxes"].numpy(), atol=1e-2)


def test_a_detector_is_judged_by_its_boxes(detector, coco, tmp_path) -> None:
    root, count = coco
    result = ovcalib.quantize(detector, tmp_path / "out", eval=f"datumaro:coco:{root}", **QUICK)
    record = result.record
    assert record.model.task == "detection"
    assert record.detection.boxes == count
    assert record.fp32_fault is None
    assert record.detection.fp32.map > 0.95  # the truth is what it finds, in the pixels of the images
    assert record.detection.int8.map <= record.detection.fp32.map
    found = record.agreement.boxes
    assert 0 < found.matched <= min(found.fp32, found.int8)
    assert found.share == pytest.approx(2 * found.matched / (found.fp32 + found.int8))
    assert record.agreement.top1 is None
    assert {len(output.shape) for output in record.agreement.outputs} == {2}
    # Boxes are not in the graph, so nothing of their arithmetic is quantized.
    assert not {"Exp", "NonMaxSuppression"} & {op.get_type_name() for op in result.int8.get_ops()}
    assert summary(record)["mAP"].endswith("%")
    for text in (markdown_report(record), result_page(record)):
        assert "Box agreement" in text
        assert "that is agreement, not mean average precision" in text
        assert "mAP" in text
        assert "top-1" not in text
    alone = ovcalib.evaluate(detector, f"datumaro:coco:{root}", input_shape=SHAPE)
    assert alone.detection == record.detection.fp32
    assert (alone.boxes, alone.accuracy, alone.fault) == (count, None, None)
    assert alone.data_sha256 == record.detection.data_sha256
    with pytest.raises(ModelError, match="holds the raw heads of SSD, and torchvision makes boxes of them outside"):
        ovcalib.evaluate(str(tmp_path / "out/int8/model.xml"), f"datumaro:coco:{root}")


@pytest.mark.slow
def test_a_detector_with_its_classes_in_another_order_is_found_out(detector, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sanity, "ENOUGH_OBJECTS", 20)
    write_coco(model, tmp_path, ids=(30, 10, 20))
    record = ovcalib.quantize(detector, eval=f"datumaro:coco:{tmp_path}", **QUICK).record
    assert record.detection.fp32.map < 0.01
    assert "FP32 itself is at 0.33% mAP on 36 objects" in record.fp32_fault
    assert "The classes are in another order: 100% of the objects" in record.fp32_fault
    assert result_verdict(record)["text"].startswith(record.fp32_fault)


def graph_with_truth(root, classes):
    """A file with boxes in the graph, and what it finds in some images: classes from 0."""
    net = suppressing(classes)
    write_ir(net, root / "net.xml")
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(10)]
    truth = []
    for image in images:
        corners, labels, _ = run(net, np.moveaxis(np.asarray(image, np.float32) / 255, -1, 0)[None])
        truth.append(Boxes(corners, labels))
    return str(root / "net.xml"), images, truth


AS_BYTES: Any = {"mean": (0, 0, 0), "std": (1, 1, 1), "short_side": 0}


def test_a_detector_in_a_file_is_evaluated(tmp_path) -> None:
    file, images, truth = graph_with_truth(tmp_path, 2)
    count = coco_folder(tmp_path, images, [Boxes(b.corners, b.labels + 1) for b in truth], (1, 2))
    found = ovcalib.evaluate(file, f"datumaro:coco:{tmp_path}", **AS_BYTES)
    assert found.boxes == count > 100
    assert found.detection.map > 0.95
    assert found.fault is None
    assert found.accuracy is None


def test_a_detector_in_a_file_that_counts_otherwise_is_found_out(tmp_path) -> None:
    file, images, truth = graph_with_truth(tmp_path, 1)
    coco_folder(tmp_path, images, [Boxes(b.corners, b.labels + 2) for b in truth], (1, 2))
    found = ovcalib.evaluate(file, f"datumaro:coco:{tmp_path}", **AS_BYTES)
    assert found.detection.map == 0
    assert found.fault.startswith("net is at 0.00% mAP")
    assert "The labels are off by one: the model names class -1 for 100%" in found.fault


def test_boxes_without_a_category_are_refused(tmp_path) -> None:
    coco_folder(tmp_path, [PIL.Image.new("RGB", (8, 8))], [Boxes(np.array([[0, 0, 2, 2]]), np.array([0]))], (0, 1))
    with pytest.raises(DataError, match="'1' of .* has a box without a category. Number the categories from 1."):
        open_data(f"datumaro:coco:{tmp_path}").boxes(0)


def test_what_cannot_be_evaluated_says_why(tmp_path) -> None:
    file, _, _ = graph_with_truth(tmp_path, 2)
    np.savez(tmp_path / "x.npz", images=np.zeros((4, SIDE, SIDE, 3), np.uint8), labels=np.arange(4))
    np.savez(tmp_path / "y.npz", images=np.zeros((4, SIDE, SIDE, 3), np.uint8))
    with pytest.raises(DataError, match="has no boxes, and net is a detector"):
        ovcalib.evaluate(file, f"npz:{tmp_path / 'x.npz'}", **AS_BYTES)
    dense = torch.nn.Conv2d(3, 2, 1)
    with pytest.raises(ModelError, match="no class logits .`task=dense`."):
        ovcalib.evaluate(dense, f"npz:{tmp_path / 'x.npz'}", input_shape=(3, SIDE, SIDE), **AS_BYTES)
    logits = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 4))
    with pytest.raises(DataError, match="has no labels"):
        ovcalib.evaluate(logits, f"npz:{tmp_path / 'y.npz'}", input_shape=(3, SIDE, SIDE), **AS_BYTES)
    image, features = trunk()
    halves = ops.split(flat(conv(features, 4, 1), 4), ops.constant(2), 2)
    write_ir(ov.Model([ops.result(ops.exp(half)) for half in halves.outputs()], [image], "odd"), tmp_path / "odd.xml")
    with pytest.raises(ModelError, match="are in no known layout"):
        ovcalib.evaluate(str(tmp_path / "odd.xml"), f"datumaro:coco:{set_of_one(tmp_path / 'set')}", **AS_BYTES)


def set_of_one(root):
    coco_folder(root, [PIL.Image.new("RGB", (SIDE, SIDE))], [Boxes(np.array([[0, 0, 2, 2]]), np.array([1]))], [1])
    return root


def test_without_labels_there_is_agreement_and_no_precision(detector) -> None:
    record = ovcalib.quantize(detector, **QUICK).record
    assert record.detection is None
    assert record.agreement.boxes is not None
    assert "mAP" not in markdown_report(record)


def test_classes_that_the_detector_does_not_know_are_refused(detector, coco) -> None:
    data = open_data(f"datumaro:coco:{coco[0]}")
    spec = load_model(ModelOptions(reference="net", input_shape=SHAPE), detector).spec
    named = spec.model_copy(update={"classes": ("background", "KIND2", "kind0")})
    assert box_classes(data, named).tolist() == [2, -1, 1]
    with pytest.raises(DataError, match="none of which net knows: cat, dog"):
        box_classes(data, spec.model_copy(update={"classes": ("cat", "dog")}))
    cropped = spec.preprocessing.model_copy(update={"short_side": 120})
    with pytest.raises(DataError, match="cuts boxes off"):
        box_classes(data, spec.model_copy(update={"preprocessing": cropped}))


class Categories:
    """Of a set with boxes."""

    reference = "datumaro:coco:x"

    def __init__(self, *names):
        self.class_names = names

    def __len__(self):
        return 1

    def boxes(self, index):
        return Boxes(np.zeros((0, 4)), np.zeros(0, np.int64))


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ((1, 3), ("cat", "dog", "cow"), [1, 2, 3]),  # SSD, whose 0 is the background
        ((1, 3), ("background", "cat", "dog", "cow"), [-1, 1, 2, 3]),
        ((1, 3), ("cat", "dog", "cow", "__background__"), [1, 2, 3, -1]),
        ((0, 3), ("cat", "dog", "cow"), [1, 2, 3]),  # RetinaNet and FCOS, trained as torchvision trains them
        ((0, 2), ("cat", "dog", "cow"), [0, 1, 2]),
        (None, ("background", "cat", "dog"), [0, 1, 2]),  # boxes of a graph
    ],
)
def test_categories_without_names_are_those_of_the_detector_in_order(model, labels, names, expected) -> None:
    spec = model.spec.model_copy(update={"box_labels": labels})
    data: Any = Categories(*names)
    assert box_classes(data, spec).tolist() == expected


@pytest.mark.parametrize(("labels", "names"), [((1, 3), "ab"), ((1, 3), "abcd"), ((0, 3), "ab"), ((0, 3), "abcde")])
def test_other_numbers_of_categories_are_refused(model, labels, names) -> None:
    spec = model.spec.model_copy(update={"box_labels": labels})
    data: Any = Categories(*names)
    with pytest.raises(DataError, match=f"has {len(names)} categories of objects, but net tells [34] apart"):
        box_classes(data, spec)


def test_the_numbers_of_boxes_are_known(model) -> None:
    assert model.spec.box_labels == (1, 3)
    net = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    assert load_model(ModelOptions(reference="net", input_shape=(3, 64, 64)), net).spec.box_labels == (0, 2)


def test_torchvisions_detectors_need_no_download_for_random_weights() -> None:
    asked = ModelOptions(reference="torchvision:ssdlite320_mobilenet_v3_large", weights="random")
    model = load_model(asked)
    assert model.spec.input_shape == (3, 320, 320)
    assert model.spec.task == "detection"
    assert model.spec.classes[1] == "person"


def test_two_stages_are_refused() -> None:
    asked = ModelOptions(reference="torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", weights="random")
    with pytest.raises(ModelError, match="second stage reads boxes"):
        load_model(asked)
