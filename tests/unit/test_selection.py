"""Which candidate is chosen by given output errors."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest
import scipy.stats
from openvino import opset13 as ops

from ovcalib.errors import ModelError
from ovcalib.progress import Progress
from ovcalib.quantization import selection
from ovcalib.quantization.expected_noise import Expected
from ovcalib.quantization.selection import (
    SATURATED_SHARE,
    SUSPECT_NMSE,
    Fitted,
    OutputError,
    QuantizedCandidate,
    guard_warning,
    select_activation_ranges,
    select_bias_correction,
    select_rounding,
    select_settings,
    select_smooth_quant,
    select_weight_range,
)
from ovcalib.quantization.settings import Settings

SETTINGS = Settings()
CORRECTIONS: Any = SimpleNamespace(inputs=list)
PARTS: Any = SimpleNamespace(corrections=CORRECTIONS, fresh=False)


class GivenError(OutputError):
    """Output errors by the name of a model, on kernels that do not saturate and on those of AVX2."""

    def __init__(self, exact, avx2=None) -> None:
        self.fp32, self.exact, self.avx2 = "fp32", exact, avx2 or {}

    def by_image(self, int8):
        return np.broadcast_to(self.exact[int8], np.shape(self.exact[int8]) or 4)

    def on(self, kernels, int8):
        return {"vnni": self.exact, "avx2": self.avx2}[kernels][int8]


@pytest.fixture(autouse=True)
def models_are_names(monkeypatch) -> None:
    monkeypatch.setattr(selection, "compensated", lambda fp32, int8s, images, tick: ["compensated"] * len(int8s))
    monkeypatch.setattr(selection, "restore_biases", lambda int8, fp32: "uncorrected")


def candidate(name, errors, **settings):
    return QuantizedCandidate(name, replace(SETTINGS, **settings), errors)


def not_tried(settings):
    pytest.fail("there was no need to try")


def test_the_mean_of_extremes_is_tried_where_the_error_is_large_and_kept_where_it_is_smaller() -> None:
    found = select_activation_ranges(candidate("first", GivenError({"first": SUSPECT_NMSE})), not_tried, None)
    assert (found[0].int8, found[1]) == ("first", None)
    for mean, chosen in ((0.2, "first"), (0.05, "mean")):
        errors = GivenError({"first": 0.1, "mean": mean})
        best, compared = select_activation_ranges(
            candidate("first", errors), partial(QuantizedCandidate, "mean", output=errors), None
        )
        assert (best.int8, compared.nmse) == (chosen, (0.1, mean))
        assert compared.ratio == pytest.approx((mean / 0.1,) * 3)
        assert best.settings.activation_ranges == ("mean-min-max" if chosen == "mean" else "min-max")


@pytest.mark.parametrize(
    ("mean", "chosen"),
    [
        # Better on every image, whatever the loudest one does.
        ((0.02, 0.04, 0.03, 0.4), "mean"),
        # Much better on one image alone, and on average.
        ((0.1, 0.2, 0.11, 0.1), "first"),
        ((math.nan, 0.1, 0.05, 0.5), "first"),
        ((math.inf, 0.1, 0.05, 0.5), "first"),
        ((0.0, 0.0, 0.0, 0.0), "mean"),
    ],
)
def test_the_mean_of_extremes_has_to_be_better_image_by_image(mean, chosen) -> None:
    errors = GivenError({"first": (0.1, 0.2, 0.1, 1.0), "mean": mean})
    make = partial(QuantizedCandidate, "mean", output=errors)
    assert select_activation_ranges(candidate("first", errors), make, None)[0].int8 == chosen


@pytest.mark.parametrize(("mean", "chosen"), [(0.3, "mean"), (math.inf, "first")])
def test_ranges_without_finite_outputs_are_not_taken_where_others_have_them(mean, chosen) -> None:
    errors = GivenError({"first": (0.1, 0.2, 0.1, math.inf), "mean": (0.3, 0.3, 0.3, mean)})
    first, other = (candidate(name, errors) for name in ("first", "mean"))
    best, compared = select_activation_ranges(first, lambda settings: other, None)
    assert best.int8 == chosen
    assert np.isfinite(compared.ratio).all()


def logarithm():
    """A network that is finite where all pixels are positive, and what rounding to multiples of 0.5 makes of it."""
    x = ops.parameter([1, 2], np.float32)
    rounded = ops.multiply(ops.round(ops.multiply(x, ops.constant(np.float32(2)))), ops.constant(np.float32(0.5)))
    return (ov.Model([ops.log(value)], [x], "log") for value in (x, rounded))


def test_outputs_that_are_not_finite_are_an_infinite_error() -> None:
    fp32, int8 = logarithm()
    images = [np.array([values], np.float32) for values in ((0.5, 1), (0.1, 1))]
    output = OutputError(fp32, images)
    np.testing.assert_array_equal(output.by_image(int8), [0, math.inf])
    assert output.nmse(int8) == math.inf


def test_a_float_network_that_is_not_finite_is_refused() -> None:
    fp32, int8 = logarithm()
    output = OutputError(fp32, [np.array([values], np.float32) for values in ((0.5, 1), (1, -1), (0, 1))])
    with pytest.raises(ModelError, match="FP32 gives NaN or infinite outputs for 2 of 3 calibration images"):
        output.nmse(int8)


def test_the_loudest_image_does_not_choose_the_ranges() -> None:
    errors = GivenError({"first": (0.1,) * 15 + (1.0,), "mean": (0.05,) * 15 + (3.0,)})
    first, mean = (candidate(name, errors) for name in ("first", "mean"))
    assert mean.error > first.error
    assert select_activation_ranges(first, lambda settings: mean, None)[0].int8 == "mean"


@pytest.mark.parametrize(("seen", "chosen"), [(0.05, "mean"), (0.4, "first")])
def test_images_that_ranges_were_taken_from_count_as_well(seen, chosen) -> None:
    """Four held-out images leave the choice open; twelve others settle it."""
    held_out = GivenError({"first": 0.1, "mean": (0.02, 0.06, 0.15, 0.09)})
    others = GivenError({"first": (0.1,) * 12, "mean": (seen,) * 12})
    first, mean = (candidate(name, held_out) for name in ("first", "mean"))
    assert select_activation_ranges(first, lambda settings: mean, None)[0].int8 == "first"
    best, compared = select_activation_ranges(first, lambda settings: mean, others)
    assert best.int8 == chosen
    ratios = np.append(mean.errors, others.by_image("mean")) / 0.1
    assert compared.ratio[0] == pytest.approx(scipy.stats.gmean(ratios))
    assert compared.nmse == pytest.approx((0.1, 0.08))


@pytest.mark.filterwarnings("error")
def test_one_image_does_not_show_which_ranges_are_better() -> None:
    first = candidate("first", GivenError({"first": (0.9,)}))
    assert select_activation_ranges(first, not_tried, None) == (first, None)


def test_the_mean_is_chosen_by_a_paired_t_test_of_logarithms() -> None:
    rng = np.random.default_rng(0)
    found = set()
    for shift in np.linspace(-1.5, 0.5, 41):
        mean, extremes = np.exp(rng.standard_normal((2, 12)) + np.array([[shift], [0]]))
        test = scipy.stats.ttest_rel(np.log(mean), np.log(extremes))
        errors = GivenError({"first": extremes, "mean": mean})
        first = candidate("first", errors)
        chosen = select_activation_ranges(first, partial(QuantizedCandidate, "mean", output=errors), None)[0].int8
        assert (chosen == "mean") == (test.statistic < 0 and test.pvalue < 0.05)
        found.add(chosen)
    assert found == {"first", "mean"}


def test_smooth_quant_has_to_be_better_and_may_fail() -> None:
    for smooth, chosen in ((0.2, "plain"), (0.1, "plain"), (0.05, "smooth")):
        errors = GivenError({"plain": 0.1, "smooth": smooth})
        best, tried = select_smooth_quant(
            candidate("plain", errors), partial(QuantizedCandidate, "smooth", output=errors)
        )
        assert (best.int8, tried) == (chosen, (0.1, smooth))
        assert best.settings.smooth_quant == (chosen == "smooth")

    def fails(settings):
        raise ModelError("shared weights")

    best, tried = select_smooth_quant(candidate("plain", GivenError({})), fails)
    assert (best.int8, tried) == ("plain", None)


def test_half_the_range_is_tried_where_products_saturate_and_kept_where_the_error_is_smaller() -> None:
    for avx2, saturates in ((0.1 * (1 + SATURATED_SHARE / 2), False), (0.1 * (1 + 2 * SATURATED_SHARE), True)):
        errors = GivenError({"full": 0.1, "half": 0.05}, {"full": avx2, "half": 0.05})
        full, half = (Fitted(candidate(name, errors)) for name in ("full", "half"))
        assert full.best.saturates(SATURATED_SHARE) == saturates
        found, saturation = select_weight_range(full, None)
        assert (found, saturation.halved, saturation.avoided) == (full, None, False)
        # A difference that is no saturation is no reason for half the range.
        found, saturation = select_weight_range(full, half)
        assert (found, saturation.avoided) == ((half, True) if saturates else (full, False))
    for error, chosen in ((0.6, "full"), (0.5, "full"), (0.2, "half")):
        errors = GivenError({"full": 0.1, "half": 0.1}, {"full": 0.5, "half": error})
        full, half = (Fitted(candidate(name, errors)) for name in ("full", "half"))
        found, saturation = select_weight_range(full, half)
        assert found is {"full": full, "half": half}[chosen]
        assert saturation.avoided == (chosen == "half")
        assert (saturation.vnni, saturation.avx2, saturation.halved) == (0.1, 0.5, error)


@pytest.mark.parametrize(
    ("saturated", "compensated", "chosen"),
    [(0.9, 0.7, ("enable", "compensated")), (0.9, 0.95, ("enable", "nearest")), (0.5, 0.7, ("first-layer", "nearest"))],
)
def test_weight_ranges_are_compared_after_rounding(monkeypatch, saturated, compensated, chosen) -> None:
    """Rounded to the nearest, half the range has 0.8."""
    monkeypatch.setattr(
        selection, "compensated", lambda fp32, int8s, images, tick: [f"{int8}, compensated" for int8 in int8s]
    )
    errors = GivenError(
        {"full": 0.1, "full, compensated": 0.2, "half": 0.8, "half, compensated": compensated},
        {"full": saturated, "full, compensated": 0.9, "half": 0.8, "half, compensated": compensated},
    )
    made = {"first-layer": "full", "enable": "half"}
    found = select_settings(
        lambda settings: made[settings.overflow_fix],
        SETTINGS,
        {"overflow_fix", "rounding"},
        errors,
        PARTS,
        Progress(),
    )
    assert (found.settings.overflow_fix, found.settings.rounding) == chosen
    assert found.rounding_nmse == ((0.8, compensated) if chosen[0] == "enable" else (0.1, 0.2))
    assert found.saturation.halved == min(0.8, compensated)


@pytest.mark.parametrize(("other", "chosen"), [(0.2, "first"), (0.1, "first"), (0.05, "compensated")])
def test_compensated_rounding_has_to_be_better(other, chosen) -> None:
    (found,) = select_rounding(
        [candidate("first", GivenError({"first": 0.1, "compensated": other}))], CORRECTIONS, Progress()
    )
    assert (found.best.int8, found.rounding_nmse) == (chosen, (0.1, other))
    assert found.best.settings.rounding == ("compensated" if chosen == "compensated" else "nearest")


def test_rounding_shows_how_far_it_is(monkeypatch) -> None:
    class Shown(Progress):
        def _update(self, task, done, note) -> None:
            seen.append((task.name, done, task.total))

    seen: list[tuple[str, float, int]] = []
    monkeypatch.setattr(
        selection, "compensated", lambda fp32, int8s, images, tick: [tick(0.25) or tick(1.0) or "compensated"]
    )
    select_rounding([candidate("first", GivenError({"first": 0.1, "compensated": 0.2}))], CORRECTIONS, Shown())
    assert seen == [("rounding weights", 25, 100), ("rounding weights", 100, 100)]


@pytest.mark.parametrize(("other", "chosen"), [(0.2, "first"), (0.1, "first"), (0.05, "uncorrected")])
def test_leaving_bias_correction_out_has_to_be_better(other, chosen) -> None:
    found = select_bias_correction(Fitted(candidate("first", GivenError({"first": 0.1, "uncorrected": other}))))
    assert (found.best.int8, found.bias_nmse) == (chosen, (0.1, other))
    assert found.best.settings.bias_correction == ("none" if chosen == "uncorrected" else "layerwise")


@pytest.mark.parametrize(
    ("compensated", "uncorrected", "chosen"), [(0.05, 0.01, "compensated"), (0.2, 0.05, "uncorrected")]
)
def test_compensated_rounding_solves_biases_so_they_are_not_chosen(compensated, uncorrected, chosen) -> None:
    errors = GivenError({"first": 0.1, "compensated": compensated, "uncorrected": uncorrected})
    found = select_settings(
        lambda settings: "first", SETTINGS, {"rounding", "bias_correction"}, errors, PARTS, Progress()
    )
    assert found.int8 == chosen
    assert found.rounding_nmse == (0.1, compensated)
    assert (found.bias_nmse is None) == (chosen == "compensated")
    assert (found.ranges, found.saturation) == (None, None)


@pytest.mark.parametrize(("share", "made"), [(0.0, ["full"]), (0.03, ["full"]), (0.07, ["full", "half"])])
def test_half_the_range_is_made_where_rounding_may_bring_saturation_out(monkeypatch, share, made) -> None:
    """An error of 0.107 on AVX2 beside 0.1 becomes 0.057 beside 0.05, when rounding takes half of it away."""
    monkeypatch.setattr(
        selection, "compensated", lambda fp32, int8s, images, tick: [f"{int8}, compensated" for int8 in int8s]
    )
    errors = GivenError(
        {"full": 0.1, "full, compensated": 0.05, "half": 0.2, "half, compensated": 0.052},
        {"full": 0.1 * (1 + share), "full, compensated": 0.05 + 0.1 * share, "half, compensated": 0.052},
    )
    asked = []

    def make(settings):
        asked.append("half" if settings.overflow_fix == "enable" else "full")
        return asked[-1]

    found = select_settings(make, SETTINGS, {"overflow_fix", "rounding"}, errors, PARTS, Progress())
    assert asked == made
    assert found.int8 == f"{made[-1]}, compensated"


def test_what_was_given_is_not_chosen() -> None:
    found = select_settings(lambda settings: "first", SETTINGS, frozenset(), GivenError({}), PARTS, Progress())
    assert (found.int8, found.settings) == ("first", SETTINGS)


def test_the_warning_says_whether_weights_or_activations_are_spread() -> None:
    text = guard_warning([Expected("conv/WithoutBiases", 1.4, 0.9), Expected("fc", 2.6, 0.1)])
    assert "conv (1 dB, weights), fc (3 dB, activations). " in text
    five = guard_warning([Expected(f"op{i}", i, 0.9) for i in range(5)])
    assert "op3 (3 dB, weights) and 1 more. " in five
