"""An FP32 model that answers at random is found out, with the cause."""

import numpy as np
import pytest

from ovcalib.data.boxes import Boxes
from ovcalib.data.sets import ArrayData
from ovcalib.evaluation.dataset import DataSet
from ovcalib.evaluation.outputs import Outputs, collect
from ovcalib.evaluation.sanity import box_fault, fp32_fault, one_class_warning, works_from
from ovcalib.progress import Progress
from ovcalib.records.model import ModelSpec, Weights
from ovcalib.records.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from ovcalib.reports.verdict import result_verdict
from tests.unit.test_verdict import result as result  # a fixture

CLASSES = ("red", "yellow", "green", "cyan", "blue", "pink", "black", "white")
COLOURS = np.array([(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1)])


def spec(top1=None, num_classes=8, **preprocessing):
    return ModelSpec(
        name="net", input_shape=(3, 8, 8), num_classes=num_classes, classes=CLASSES if num_classes == 8 else None,
        preprocessing=Preprocessing(height=8, width=8, **preprocessing), weights=Weights(origin="file", top1=top1),
    )  # fmt: skip


def dataset(spec, count=160, used=160):
    labels = np.arange(count) // (count // 8)  # in the order of the classes
    noise = np.random.default_rng(0).integers(-30, 30, (count, 8, 8, 3))
    pixels = np.clip(40 + 175 * COLOURS[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
    return DataSet(ArrayData("npz:x", pixels, labels, CLASSES), spec, labels, range(used))


class Network:
    """Names the nearest colour, if its inputs are normalised as it expects; `order` renumbers its outputs."""

    def __init__(self, mean, std, bgr=False, order=range(8)):
        self.mean, self.std, self.bgr, self.order = np.array(mean), np.array(std), bgr, list(order)

    def run(self, inputs):
        for x in inputs:
            colour = x[0].mean((1, 2)) * self.std + self.mean
            colour = colour[::-1] if self.bgr else colour
            distance = np.linalg.norm((40 + 175 * COLOURS) / 255 - colour, axis=1)
            logits = -distance if distance.min() < 0.1 else np.arange(8.0) == 6
            yield np.asarray(logits, np.float32)[self.order]


def fault(network, given, used=160):
    data = dataset(given, used=used)
    return fp32_fault(lambda: network, data, collect(network, data.images().items), Progress())


HALF, ZERO, ONE = (0.5,) * 3, (0.0,) * 3, (1.0,) * 3


@pytest.mark.parametrize(("others", "count", "classes", "said"),
                         [(0, 20, 8, True), (1, 20, 8, False), (0, 19, 8, False), (0, 20, None, False),
                          (0, 20, 1, False)])  # fmt: skip
def test_a_model_that_names_one_class_for_all_images_is_found_out(others, count, classes, said):
    values = np.tile(np.eye(8)[3], (count, 1)).astype(np.float32)
    values[:others] = np.eye(8)[5]
    found = one_class_warning(Outputs(values, None, ""), spec(num_classes=classes), "some set")
    assert (found is not None) == said
    if found:
        assert "class 3 for all 20 images of some set" in found


def test_a_model_that_works_has_no_fault():
    assert fault(Network(HALF, HALF), spec(mean=HALF, std=HALF)) is None


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Network(HALF, HALF), "`mean=0.5,0.5,0.5` `std=0.5,0.5,0.5`"),
        (Network(ZERO, (1 / 255,) * 3), "`mean=0,0,0` `std=0.003921569,0.003921569,0.003921569`"),
        (Network(ZERO, ONE), "`mean=0,0,0` `std=1,1,1`"),
        (Network(HALF, HALF, bgr=True), "`mean=0.5,0.5,0.5` `std=0.5,0.5,0.5` `channel_order=BGR`"),
    ],
)
def test_the_normalisation_that_works_is_found(network, options):
    found = fault(network, spec(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    assert "FP32 itself is at" in found
    assert "preprocessing or classes are wrong" in found
    assert f"With {options}, 64 of 64 images come out right" in found
    assert f"pass {options}." in found


def test_another_order_of_the_classes_is_found():
    found = fault(Network(HALF, HALF, order=[3, 4, 5, 6, 7, 0, 1, 2]), spec(mean=HALF, std=HALF))
    assert "The classes are in another order: 100% of the images come out right if they are renumbered" in found
    assert "'red' as 'pink'" in found
    found = fault(Network(HALF, HALF, order=[7, 0, 1, 2, 3, 4, 5, 6]), spec(mean=HALF, std=HALF), used=140)
    assert (
        "The labels are off by one: the model names class +1 for 100% of the images" in found
    )  # all but the last class


def test_a_model_that_nothing_helps_is_said_to_be_so():
    class Constant:
        def run(self, inputs):
            return (np.eye(8, dtype=np.float32)[0] for _ in inputs)

    found = fault(Constant(), spec())
    assert "at 12.50% top-1 (chance is 12.50%)" in found
    assert "None of the usual normalisations, channel orders and sizes helps" in found


@pytest.mark.parametrize(
    ("num_classes", "top1", "expected"),
    [(1000, None, 0.003), (10, None, 0.3), (2, None, 0.625), (1000, 0.75, 0.25), (10, 0.3, 0.3)],
)
def test_what_a_model_that_works_reaches(num_classes, top1, expected):
    assert works_from(spec(top1, num_classes)) == pytest.approx(expected)


def objects(images=60, each=2):
    rng = np.random.default_rng(0)
    low = rng.integers(0, 30, (images, each, 2)) + 50 * np.arange(each)[:, None]
    return [Boxes(np.concatenate([a, a + 20], 1).astype(float), rng.integers(1, 4, each)) for a in low]


def found_as(truth, label, score=0.9, shift=0.0):
    return [Boxes(b.corners + shift, label(b.labels), np.full(len(b), score)) for b in truth]


ROLLED = np.array([0, 2, 3, 1])


@pytest.mark.parametrize(
    ("label", "shift", "cause"),
    [
        (lambda labels: labels + 1, 0, "the model names class +1 for 100% of the objects that it finds"),
        (lambda labels: labels - 1, 2, "the model names class -1 for 100% of the objects that it finds"),
        (lambda labels: ROLLED[labels], 0, "classes are in another order: 100% of the objects that it finds"),
        (lambda labels: labels * 0 + 9, 0, "It finds 120 of them, but as other classes"),
        (lambda labels: labels, 200, "It finds 0 of them as any class: are images normalised"),
    ],
)
def test_a_detector_that_finds_nothing_or_names_it_otherwise_is_found_out(label, shift, cause):
    truth = objects()
    fault = box_fault(truth, found_as(truth, label, shift=shift), spec(num_classes=None))
    assert fault.startswith("FP32 itself is at 0.00% mAP on 120 objects: preprocessing or classes are wrong. ")
    assert cause in fault
    assert ("a first category `background` moves them" in fault) == ("of the objects" in cause)


def test_a_detector_that_works_has_no_fault():
    truth = objects()
    assert box_fault(truth, found_as(truth, lambda labels: labels, shift=2), spec(num_classes=None)) is None
    few = objects(images=49)
    assert box_fault(few, found_as(few, lambda labels: labels + 1), spec(num_classes=None)) is None


def test_the_verdict_begins_with_the_fault(result):
    found = result_verdict(
        result.model_copy(update={"fp32_fault": "FP32 itself is at 6.00% top-1.", "outcome": "done"})
    )
    assert found["text"].startswith("FP32 itself is at 6.00% top-1. ")
    assert found["css"] == "bad"
