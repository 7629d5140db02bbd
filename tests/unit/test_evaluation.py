import math

import numpy as np
import pytest

from ovcalib.data.sets import ArrayData, Reader
from ovcalib.errors import DataError
from ovcalib.evaluation import classification, metrics, outputs
from ovcalib.evaluation.classification import compare
from ovcalib.evaluation.outputs import Item, Items, Outputs, collect, items_of
from tests.unit.test_data import spec


class FakeRunner:
    """Says that the class is the value of the first pixel."""

    def run(self, inputs):
        for x in inputs:
            logits = np.zeros(3, np.float32)
            logits[round(float(x[0, 0, 0, 0])) % 3] = 1
            yield logits


def item(value, label):
    return Item(np.full((1, 3, 8, 8), value, np.float32), label, bytes([value, label or 0]))


def test_wilson_interval_has_its_closed_form() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416, half 1.96 / 1.38416 * sqrt(0.016 + 0.009604).
    low, high = metrics.wilson_interval(8, 10, z=1.96)
    assert low == pytest.approx(0.716738 - 0.226578, abs=1e-4)
    assert high == pytest.approx(0.716738 + 0.226578, abs=1e-4)


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 1000), (1000, 1000), (500, 1000)])
def test_wilson_interval_stays_inside_and_holds_the_rate(correct, total) -> None:
    low, high = metrics.wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high


def test_wilson_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        low, high = metrics.wilson_interval(int(rng.binomial(50, 0.93)), 50)
        covered += low <= 0.93 <= high
    assert 0.93 <= covered / 2000 <= 0.98


def test_paired_drop_counts_only_items_on_which_the_models_differ() -> None:
    before = np.array([True] * 90 + [False] * 10)
    after = before.copy()
    after[:5] = False  # five lost
    after[95:98] = True  # three won
    drop, low, high = metrics.paired_drop(before, after)
    assert drop == pytest.approx(0.02)
    b, c, m = 5.5, 3.5, 102
    half = metrics.Z95 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    assert (low, high) == pytest.approx((2 / m - half, 2 / m + half))


def test_equal_models_still_have_an_uncertain_drop() -> None:
    right = np.ones(1000, bool)
    drop, low, high = metrics.paired_drop(right, right)
    assert drop == 0
    assert low < 0 < high


def test_the_paired_interval_covers_the_true_drop() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        before = rng.random(400) < 0.8
        after = np.where(rng.random(400) < 0.05, ~before, before)
        truth = 0.05 * (0.8 - 0.2)
        _, low, high = metrics.paired_drop(before, after)
        covered += low <= truth <= high
    assert 0.92 <= covered / 1000 <= 0.99


def test_hits_by_rank() -> None:
    values = np.array([[3, 2, 1, 0], [0, 1, 2, 3]], np.float32)
    labels = np.array([1, 1])
    assert metrics.hits(values, labels, 1).tolist() == [False, False]
    assert metrics.hits(values, labels, 2).tolist() == [True, False]
    assert metrics.hits(values, labels, 3).tolist() == [True, True]


def test_a_constant_or_broken_output_is_never_right() -> None:
    labels = np.array([0, 1])
    assert not metrics.hits(np.zeros((2, 3), np.float32), labels).any()
    assert not metrics.hits(np.full((2, 3), np.nan, np.float32), labels).any()
    assert not metrics.same_class(np.eye(2, 3, dtype=np.float32), np.full((2, 3), np.nan, np.float32)).any()


def test_expected_hits_have_their_closed_form() -> None:
    odds = np.array([[1, 2, 5], [6, 3, 1]])
    reference = np.log(odds).astype(np.float32) + np.array([[7], [-900]], np.float32)
    values = np.array([[0, 1, 0], [5, 0, 0]], np.float32)
    assert metrics.expected_hits(reference, reference) == pytest.approx([5 / 8, 6 / 10], abs=1e-4)
    assert metrics.expected_hits(reference, values) == pytest.approx([2 / 8, 6 / 10], abs=1e-4)
    # A network that ends in softmax.
    probabilities = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    assert metrics.expected_hits(probabilities, values) == pytest.approx([2 / 8, 6 / 10])
    assert metrics.expected_hits(reference, np.full((2, 3), np.nan, np.float32)).tolist() == [0, 0]


def test_expected_top1_is_that_of_labels_drawn_from_the_probabilities(rng) -> None:
    """And its drop lies between 0 and the share of items on which the models disagree."""
    reference = rng.normal(0, 2, (20_000, 5)).astype(np.float32)
    probabilities = np.exp(reference) / np.exp(reference).sum(1, keepdims=True)
    labels = (probabilities.cumsum(1) < rng.uniform(size=(len(reference), 1))).sum(1).clip(max=4)
    other = reference + rng.normal(0, 1, reference.shape).astype(np.float32)
    for values in (reference, other):
        expected = metrics.expected_hits(reference, values).mean()
        assert metrics.hits(values, labels).mean() == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(len(labels)))
    drop = metrics.expected_hits(reference, reference).mean() - metrics.expected_hits(reference, other).mean()
    assert 0 < drop < 1 - metrics.same_class(reference, other).mean()


def test_nmse_has_its_closed_form() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)
    assert metrics.nmse(reference, reference) == 0
    assert metrics.nmse(reference, np.zeros_like(reference)) == pytest.approx(1)
    assert metrics.nmse(reference, reference + 1) == pytest.approx(4 / 50)


def test_an_output_that_is_not_finite_is_an_infinite_error_of_its_item() -> None:
    reference = np.ones((3, 2), np.float32)
    values = np.array([[1, 1], [np.nan, 1], [1, np.inf]], np.float32)
    np.testing.assert_array_equal(metrics.nmse_by_item(reference, values), [0, np.inf, np.inf])
    assert np.isinf(metrics.nmse_by_item(values, reference)).all()


def test_compare_gives_accuracy_of_both_and_the_drop_in_points() -> None:
    labels = np.array([0, 1, 2, 0])
    good = Outputs(np.eye(3, dtype=np.float32)[labels], labels, "d")
    bad = Outputs(np.eye(3, dtype=np.float32)[[0, 1, 2, 1]], labels, "d")
    found = compare(good, bad, "protocol")
    assert found is not None
    assert (found.fp32.top1, found.int8.top1, found.drop_points) == (1.0, 0.75, 25.0)
    assert found.fp32.top5 is None
    assert compare(Outputs(good.values, None, "d"), bad, "p") is None


def test_agreement_is_not_accuracy() -> None:
    values = np.eye(3, dtype=np.float32)
    found = classification.agreement(Outputs(values, None, ""), Outputs(values, None, ""), "where")
    assert (found.top1, found.nmse, found.on, found.count) == (1.0, 0.0, "where", 3)
    broken = classification.agreement(Outputs(values, None, ""), Outputs(values * np.nan, None, ""), "where")
    assert (broken.top1, broken.nmse) == (0.0, None)


def test_collect_keeps_labels_and_order() -> None:
    outputs = collect(FakeRunner(), [item(2, 2), item(0, 1), item(1, 0)])
    assert outputs.values.argmax(1).tolist() == [2, 0, 1]
    assert outputs.labels is not None
    assert outputs.labels.tolist() == [2, 1, 0]


def test_the_data_digest_depends_on_content_labels_and_order() -> None:
    items = [item(2, 2), item(0, 1)]
    same = collect(FakeRunner(), items).digest
    assert collect(FakeRunner(), items).digest == same
    assert collect(FakeRunner(), items[::-1]).digest != same
    assert collect(FakeRunner(), [item(2, 1), item(0, 1)]).digest != same


def test_one_missing_label_means_no_labels() -> None:
    assert collect(FakeRunner(), [item(1, 1), item(0, None)]).labels is None


def test_no_items_are_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        collect(FakeRunner(), [])


def test_items_can_be_gone_through_again_without_making_them_again(monkeypatch) -> None:
    made = []

    def make():
        made.append(1)
        yield from (item(1, 1), item(2, 2))

    items = Items(make)
    assert len(list(items)) == len(list(items)) == 2
    assert len(made) == 1
    monkeypatch.setattr(outputs, "MAX_KEPT_BYTES", 1)
    items = Items(make)
    assert len(list(items)) == len(list(items)) == 2
    assert len(made) == 3


def test_an_interrupted_pass_keeps_nothing() -> None:
    items = Items(lambda: iter([item(1, 1), item(2, 2)]))
    next(iter(items))
    assert len(list(items)) == 2


def test_calibration_images_are_refused_in_the_evaluation_set(rng) -> None:
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    data = ArrayData("memory", images, None)
    forbidden = frozenset({outputs.pixel_hash(images[3])})
    with pytest.raises(DataError, match="in the calibration set and in the evaluation set"):
        list(items_of(Reader(data, spec()), forbidden))
    assert len(list(items_of(Reader(data, spec())))) == 5


def test_the_output_error_does_not_depend_on_how_much_is_converted_at_once(rng, monkeypatch) -> None:
    reference, values = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    whole = np.square(reference.astype(float) - values).sum() / np.square(reference.astype(float)).sum()
    for chunk in (1, 11, 10**6):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        assert metrics.nmse(reference, values) == pytest.approx(whole, rel=1e-12)


def test_pixels_agree_where_the_largest_channel_is_the_same(rng) -> None:
    reference, values = (
        rng.normal(size=(2, 3, 4, 5)).astype(np.float32),
        rng.normal(size=(2, 3, 4, 5)).astype(np.float32),
    )
    values[1, 2, 0, 0] = np.nan
    reference[1, :, 0, 0] = values[1, :, 0, 0]  # the same position is largest, but not a number
    same = sum(
        np.argmax(reference[n, :, y, x]) == np.argmax(values[n, :, y, x])
        for n in range(2) for y in range(4) for x in range(5)
        if (n, y, x) != (1, 0, 0)
    )  # fmt: skip
    assert metrics.same_pixels(reference, values) == pytest.approx(same / 40)
