"""Statistics of outputs: accuracy with its interval, agreement with FP32, error. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; beyond them a series is exact enough.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
Z95 = 1.959963984540054
# Values that are converted to float64 at once: output maps of a whole set would take eight times their memory.
CHUNK = 2**22


def t95(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval, to 3 digits."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    # Abramowitz and Stegun 26.7.5
    z = Z95
    series = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / float(freedom) ** i for i, term in enumerate(series))


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of at least two values (Student's t)."""
    half = t95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def ratio_interval(
    numerators: Sequence[float] | NDArray[np.float64], denominators: Sequence[float] | NDArray[np.float64]
) -> tuple[float, float, float]:
    """Geometric mean of the ratios of positive values and its 95 % interval.

    Pairing cancels what both share: the drift of a round, or how hard an image is.
    """
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    low, high = mean_interval(logs)
    return math.exp(float(np.mean(logs))), math.exp(low), math.exp(high)


def wilson_interval(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """95 % interval of an accuracy, as fractions.

    Stays inside [0, 1] and keeps its coverage for small samples and rates near 1, where the normal interval
    does not (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212).
    """
    if total <= 0:
        raise ValueError(f"An interval needs at least one item, not {total}.")
    rate = correct / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # Rounding must not push a bound past the rate itself at 0 and 1.
    return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))


def paired_drop(before: NDArray[np.bool_], after: NDArray[np.bool_], z: float = Z95) -> tuple[float, float, float]:
    """The drop in accuracy between two models on the same items, and its 95 % interval, as fractions.

    before, after   bool [N], whether each item was right
    Only the items on which the models differ carry information. Half an item is added to each of the four cells
    (Agresti & Min 2005, Stat. Med. 24, 729-740), so that no discordant item does not mean no uncertainty.
    """
    n = len(before)
    lost, won = int(np.sum(before & ~after)), int(np.sum(~before & after))
    drop = (lost - won) / n
    b, c, m = lost + 0.5, won + 0.5, n + 2.0
    centre = (b - c) / m
    half = z * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return drop, centre - half, centre + half


def hits(values: NDArray[np.float32], labels: NDArray[np.int64], k: int = 1) -> NDArray[np.bool_]:
    """Whether the label of each item is among its k largest logits, bool [N]; NaN logits are never right."""
    own = values[np.arange(len(labels)), labels]
    with np.errstate(invalid="ignore"):
        # Ties count against the model, as a constant output must not be right about everything.
        larger = (values >= own[:, None]).sum(1) - 1
    return np.asarray((larger < k) & np.isfinite(own))


def same_class(reference: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether both models name the same class for each item, bool [N]; a non-finite output agrees with nothing."""
    finite = np.isfinite(values).all(1) & np.isfinite(reference).all(1)
    return np.asarray((reference.argmax(1) == values.argmax(1)) & finite)


def probabilities(outputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """The softmax of logits, float64 [N, K]; outputs that are probabilities already stay as they are."""
    scores = outputs.astype(np.float64)
    if scores.min() < 0 or np.abs(scores.sum(1) - 1).max() > 1e-3:
        scores = np.exp(scores - scores.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    return scores


def expected_hits(reference: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The probability that FP32 gives to the class that a model names for each item, float64 [N].

    Its mean is the top-1 accuracy to expect without labels if the probabilities are calibrated; of FP32 itself it is
    the average confidence (Hendrycks & Gimpel, ICLR 2017; Guillory et al., ICCV 2021). Where an image lies between two
    classes it costs little to name the other, so the drop is at most the share of items on which the models disagree,
    and mostly far below it.
    reference   outputs of FP32, float32 [N, K]: logits, or probabilities
    values      outputs of the model; one that is not finite expects 0
    """
    scores = probabilities(reference)
    named = scores[np.arange(len(scores)), values.argmax(1)]
    return np.asarray(np.where(np.isfinite(values).all(1), named, 0.0))


def nmse(reference: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    """Normalised mean squared error of outputs: sum |reference - values|^2 / sum |reference|^2, over all items."""
    return float(nmse_by_item(reference, values).mean())


def nmse_by_item(reference: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The squared error of each item over the mean square of the reference, float64 [N]; their mean is the NMSE.

    It is infinite where an output is not finite.
    """
    step = max(1, CHUNK // max(1, reference[:1].size))
    errors, powers = np.empty(len(reference)), np.empty(len(reference))
    for i in range(0, len(reference), step):
        expected = reference[i : i + step].astype(np.float64).reshape(len(reference[i : i + step]), -1)
        errors[i : i + step] = ((expected - values[i : i + step].reshape(expected.shape)) ** 2).sum(1)
        powers[i : i + step] = (expected**2).sum(1)
    found = errors / max(float(powers.mean()), float(np.finfo(np.float64).tiny))
    return np.where(np.isfinite(found), found, np.inf)


def same_pixels(reference: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    """The share of pixels of all items of which both models name the same class; a non-finite one agrees with nothing.

    reference, values   [N, K, H, W], a score for each class
    """
    same = 0
    for expected, found in zip(reference, values, strict=True):
        finite = np.isfinite(expected).all(0) & np.isfinite(found).all(0)
        same += int(((expected.argmax(0) == found.argmax(0)) & finite).sum())
    return same / max(1, reference[:, 0].size)
