"""Compensated rounding of the weights of one layer (GPTQ): arrays in, arrays out.

A layer computes W x + b of quantized inputs x. Integers Q, a scale s near NNCF's for each output channel, and a shift
of the bias are chosen to minimise the output error over calibration images:

    E|W x - (s Q x + shift)|^2

The best shift is (W - s Q) E[x], which is bias correction. What is left is e H e^T for each row e of W - s Q, where H
is the covariance of x. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, after their "Optimal Brain Compression", NeurIPS 2022: columns are rounded one after the
other, and the error of each is compensated by those that follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Scales that are tried for an output channel, in those that NNCF chose. Smaller ones clip the largest weights.
SCALES = tuple(1 + k / 40 for k in range(-8, 5))
# Columns whose errors are added to all later ones by one matrix product.
BLOCK = 128
# Weights, each counted as often as it has scales, that are rounded at once: a few times their 8 bytes are held.
VALUES_AT_ONCE = 2**23
# Samples of the inputs of a layer, as a share of their number, up to which they are kept in place of H: factoring it
# takes the cube of the number of inputs, and the samples its product with their square.
FEW_SAMPLES = 1 / 4


# The inputs of a layer --------------------------------------------------------------------------


class Covariance(Protocol):
    """The covariance H of the inputs of a layer, float64 [G, I, I]: groups, inputs of one output position."""

    def matrix(self) -> NDArray[np.float64]:
        """H itself."""

    def energy(self, errors: NDArray[np.float64]) -> float:
        """The sum of e H e^T over the rows e of errors, [G, O, I]."""

    def feedback(self, damping: float) -> Feedback:
        """How errors act on later columns. Damping is a share of the mean diagonal of H that is added to the diagonal;
        1 stands in for inputs that never change."""


@dataclass(frozen=True)
class FullCovariance:
    """values: H, float64 [..., I, I]."""

    values: NDArray[np.float64]

    def matrix(self) -> NDArray[np.float64]:
        return self.values

    def energy(self, errors: NDArray[np.float64]) -> float:
        return float(np.sum((errors @ self.values) * errors))

    def feedback(self, damping: float) -> Feedback:
        variances = np.diagonal(self.values, axis1=-2, axis2=-1)
        order = rounding_order(variances)
        # An upper triangular factor is the lower one of the matrix from its end.
        end_first = order[..., ::-1]
        turned = np.empty(self.values.shape)
        for i in np.ndindex(self.values.shape[:-2]):
            turned[i] = self.values[i][end_first[i]][:, end_first[i]]
        np.einsum("...ii->...i", turned)[...] += added_to_diagonal(variances, damping)[..., None]
        unit, cost = unit_upper(turned)
        return Feedback(order, cost, unit.swapaxes(-1, -2))


@dataclass(frozen=True)
class SampledCovariance:
    """H from fewer samples than inputs, as H = root^T root.

    root   float64 [..., S, I]: the samples less their mean, over the root of their number
    """

    root: NDArray[np.float64]

    def matrix(self) -> NDArray[np.float64]:
        return self.root.swapaxes(-1, -2) @ self.root

    def energy(self, errors: NDArray[np.float64]) -> float:
        return float(np.sum((errors @ self.root.swapaxes(-1, -2)) ** 2))

    def feedback(self, damping: float) -> Feedback:
        """The same as of the matrix, without it.

        With x_j the columns of the root and d what is added to the diagonal, P_j = (1 + sum_{k>j} x_k x_k^T / d)^-1
        leaves of x_j what later columns cannot compensate: D_j = d + x_j^T P_j x_j, and R_ij = x_i^T P_j x_j / D_j
        (Woodbury). P_j is updated from the last column to the first, a block at a time.
        """
        variances = np.square(self.root).sum(-2)
        order, added = rounding_order(variances), added_to_diagonal(variances, damping)[..., None, None]
        rows = np.take_along_axis(self.root, order[..., None, :], -1)
        left = np.broadcast_to(np.eye(rows.shape[-2]), (*rows.shape[:-1], rows.shape[-2])).copy()
        back, cost = np.empty(rows.swapaxes(-1, -2).shape), np.empty(variances.shape)
        for start, stop in reversed(list(blocks(rows.shape[-1]))):
            block = rows[..., start:stop]
            seen = left @ block
            damped = block.swapaxes(-1, -2) @ seen + added * np.eye(stop - start)
            unit, own = unit_upper(damped[..., ::-1, ::-1])
            freed = np.linalg.solve(unit, seen.swapaxes(-1, -2))
            cost[..., start:stop], back[..., start:stop, :] = own, freed / own[..., None]
            left -= freed.swapaxes(-1, -2) @ back[..., start:stop, :]
        return Feedback(order, cost, back, rows)


def rounding_order(variances: NDArray[np.float64]) -> NDArray[np.intp]:
    """Columns of large variance, whose errors cost most, come first, when many others are left to compensate."""
    return np.argsort(-variances, axis=-1, kind="stable")


def added_to_diagonal(variances: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    mean = variances.mean(-1)
    return np.where(mean > 0, damping * mean, 1.0)


def unit_upper(turned: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """R [..., I, I], upper triangular with ones on its diagonal, and D [..., I] of a matrix R D R^T.

    turned   the matrix with its rows and columns in reverse
    """
    factor = np.linalg.cholesky(turned)[..., ::-1, ::-1]
    diagonal = np.diagonal(factor, axis1=-2, axis2=-1)
    return factor / diagonal[..., None, :], diagonal**2


def blocks(count: int) -> Iterator[tuple[int, int]]:
    """Where each block of columns starts and stops."""
    return ((start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


@dataclass(frozen=True)
class Moments:
    """First two moments of the inputs of a layer.

    mean   float64 [G, I]: groups, inputs of one output position
    """

    mean: NDArray[np.float64]
    covariance: Covariance


class MomentSums:
    """Moments of rows that are added image by image, float32 [G, P, I] each."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: NDArray[np.float32]) -> None:
        # Products are summed in float32, which is faster; the errors are far below any damping. That takes inputs
        # without the mean of the first image: where inputs hardly vary, their mean would leave nothing of the
        # differences.
        if not self.count:
            groups, _, inputs = rows.shape
            self.origin = rows.mean(1, keepdims=True)
            self.total, self.product = np.zeros((groups, inputs)), np.zeros((groups, inputs, inputs), np.float32)
        rows = rows - self.origin
        self.count += rows.shape[1]
        self.total += rows.sum(1, dtype=np.float64)
        self.product += rows.transpose(0, 2, 1) @ rows

    def moments(self) -> Moments:
        mean = self.total / self.count
        covariance = self.product.astype(np.float64) / self.count - mean[..., :, None] * mean[..., None, :]
        return Moments(mean + self.origin[:, 0], FullCovariance(covariance))


class Samples:
    """The same of few rows, which are kept."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.float32]] = []

    def add(self, rows: NDArray[np.float32]) -> None:
        self.rows.append(rows)

    def moments(self) -> Moments:
        rows = np.concatenate(self.rows, 1).astype(np.float64)
        mean = rows.mean(1)
        return Moments(mean, SampledCovariance((rows - mean[:, None]) / math.sqrt(rows.shape[1])))


def moments_of(samples: int, inputs: int) -> MomentSums | Samples:
    """What collects the moments of so many samples of so many inputs."""
    return Samples() if samples <= FEW_SAMPLES * inputs else MomentSums()


# Rounding ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feedback:
    """H plus damping as R D R^T: how the error of a column acts on those that are rounded after it.

    order   int [..., I], of the columns
    cost    the diagonal of D, float64 [..., I]
    back    R^T, float64 [..., I, I]: R is upper triangular with ones on its diagonal. Or, with rows, [..., I, S]
    rows    float64 [..., S, I]: below its diagonal, R^T is back @ rows
    """

    order: NDArray[np.intp]
    cost: NDArray[np.float64]
    back: NDArray[np.float64]
    rows: NDArray[np.float64] | None = None


def compensated_rounding(
    weights: NDArray[np.float64], scale: NDArray[np.float64], feedback: Feedback, limit: int
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Integers Q with little e H e^T for each row e = weights - scale * Q.

    weights   [..., O, I]; leading axes are problems of their own, such as the channels of a depthwise convolution
    scale     [..., O]
    limit     largest absolute integer
    returns   int8 [..., O, I], and e H e^T of the damped H, float64 [..., O]

    With H = R D R^T, e H e^T is the sum over columns j of D_j (e_j + sum_{i<j} e_i R_ij)^2, and column j is rounded to
    minimise its term: GPTQ without the inverse of H (Chee et al., "QuIP", NeurIPS 2023, theorem 6).
    """
    parts = row_slices(weights)
    if len(parts) > 1:
        found = [compensated_rounding(weights[..., own, :], scale[..., own], feedback, limit) for own in parts]
        return np.concatenate([one for one, _ in found], -2), np.concatenate([lost for _, lost in found], -1)
    # Columns of weights are rows here, because they are read and written as a whole.
    exact = np.take_along_axis((weights / scale[..., None]).swapaxes(-1, -2), feedback.order[..., None], -2)
    back, rows = feedback.back, feedback.rows
    rounded, errors, lost = np.zeros(exact.shape, np.int8), np.zeros_like(exact), np.zeros(scale.shape)
    summed = np.zeros(0) if rows is None else np.zeros((*rows.shape[:-1], exact.shape[-1]))  # rows @ errors so far
    for start, stop in blocks(exact.shape[-2]):
        block = back[..., start:stop, :]
        if rows is None:
            led, within = block[..., :start] @ errors[..., :start, :], block[..., start:stop]
        else:
            led, within = block @ summed, block @ rows[..., start:stop]
        led += exact[..., start:stop, :]
        for j in range(start, stop):
            at = j - start
            column = led[..., at, :] + (within[..., at : at + 1, :at] @ errors[..., start:j, :])[..., 0, :]
            nearest = np.clip(np.rint(column), -limit, limit)
            rounded[..., j, :], errors[..., j, :] = nearest, exact[..., j, :] - nearest
            lost += feedback.cost[..., j, None] * (column - nearest) ** 2
        if rows is not None:
            summed += rows[..., start:stop] @ errors[..., start:stop, :]
    integers = np.take_along_axis(rounded, np.argsort(feedback.order, axis=-1)[..., None], -2).swapaxes(-1, -2)
    return integers, scale**2 * lost


def row_slices(weights: NDArray[np.float64], copies: int = 1) -> list[slice]:
    """The rows of weights [..., O, I] in parts, of which so many copies are small enough to be rounded at once."""
    rows = max(1, VALUES_AT_ONCE // (copies * weights[..., :1, :].size))
    count = weights.shape[-2]
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def rescaled_rounding(
    weights: NDArray[np.float64], scale: NDArray[np.float64], feedback: Feedback, limit: int
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """`compensated_rounding` with the best of SCALES for each row: integers [..., O, I] and scales [..., O]."""
    best, chosen = np.empty(weights.shape, np.int8), np.empty_like(scale)
    tried = len(SCALES)
    for own in row_slices(weights, tried):
        # Rows are independent, so one problem has those of all scales.
        scales = np.concatenate([factor * scale[..., own] for factor in SCALES], axis=-1)
        integers, lost = compensated_rounding(np.tile(weights[..., own, :], (tried, 1)), scales, feedback, limit)
        shape = (*scale.shape[:-1], tried, own.stop - own.start)
        least = lost.reshape(shape).argmin(-2)[..., None, :]
        chosen[..., own] = np.take_along_axis(scales.reshape(shape), least, -2)[..., 0, :]
        integers = integers.reshape(*shape, -1)
        best[..., own, :] = np.take_along_axis(integers, least[..., None], -3)[..., 0, :, :]
    return best, chosen


def bias_shift(errors: NDArray[np.float64], fitted: Moments) -> NDArray[np.float64]:
    """The shift [G, O] of the bias that compensates the mean of rounding errors of weights [G, O, I]."""
    shift: NDArray[np.float64] = (errors @ fitted.mean[..., None])[..., 0]
    return shift


def output_error(errors: NDArray[np.float64], fitted: Moments, seen: Moments) -> float:
    """Mean squared error of a layer's output, summed over channels.

    errors   float64 [G, O, I]: weights less rounded weights
    fitted   the inputs that the shift of the bias was solved on
    seen     the inputs that the error is computed for
    """
    mean = bias_shift(errors, seen) - bias_shift(errors, fitted)
    return seen.covariance.energy(errors) + float(np.sum(mean**2))
