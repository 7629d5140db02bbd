"""Compensated rounding of weights (GPTQ): weights that are rounded later reduce the output error of earlier ones.

A layer computes W x + b of quantized inputs x. Integers Q, a scale s near NNCF's for each output channel, and a shift
of the bias are chosen to minimise the output error over calibration images:

    E|W x - (s Q x + shift)|^2

The best shift is (W - s Q) E[x], which is bias correction. What is left is e H e^T for each row e of W - s Q, where H
is the covariance of x. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, after their "Optimal Brain Compression", NeurIPS 2022: columns are rounded one after the
other, and the error of each is compensated by those that follow.

Here x is the input of the layer in the FP32 network, quantized. So layers do not depend on each other: one pass over
the images is enough, and the rounding of a layer stays valid when others are reverted to float. A few images do not
determine H. Damping moves the result towards plain rounding, and the damping of each layer is chosen on held-out
images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.graph.editing import add_to_biases, restore_biases, set_integer_weights
from ovcalib.graph.probing import quantized_inputs
from ovcalib.graph.reading import (
    Layer,
    Window,
    integer_weights,
    quantizable_operations,
    quantized_layers,
    scale_count,
    smoothing,
)
from ovcalib.quantization.bias_correction import weight_errors
from ovcalib.runtime import Inference, groups_that_fit, size_of

# Shares of the mean diagonal that are added to the diagonal of H; a layer takes the best of them, or plain rounding.
DAMPINGS = (0.01, 0.1, 1.0)
# Scales that are tried for an output channel, in those that NNCF chose. Smaller ones clip the largest weights.
SCALES = tuple(1 + k / 40 for k in range(-8, 5))
# Output positions of a layer that are sampled in one image.
POSITIONS = 256
# Share of the images that decides, layer by layer, whether compensation helps.
HELD_OUT_SHARE = 0.25
SEED = 0
# Columns whose errors are added to all later ones by one matrix product.
BLOCK = 128
# Weights that are rounded with several scales at once, which takes a few times their 8 bytes each.
VALUES_AT_ONCE = 2**23


# The rounding of one layer: arrays in, arrays out -----------------------------------------------


@dataclass(frozen=True)
class Feedback:
    """H plus damping as R D R^T: how the error of a column acts on those that are rounded after it.

    Columns of large variance, whose errors cost most, come first, when many others are left to compensate.

    order   int [..., I], of the columns
    unit    R, float64 [..., I, I], upper triangular with ones on its diagonal
    cost    the diagonal of D, float64 [..., I]
    """

    order: NDArray[np.intp]
    unit: NDArray[np.float64]
    cost: NDArray[np.float64]

    @classmethod
    def of(cls, hessian: NDArray[np.float64], damping: float) -> Feedback:
        """hessian is [..., I, I], symmetric and positive semidefinite; damping a share of its mean diagonal.

        The identity stands in for inputs that never change.
        """
        variances = np.diagonal(hessian, axis1=-2, axis2=-1)
        order = np.argsort(-variances, axis=-1, kind="stable")
        # An upper triangular factor is the lower one of the matrix from its end.
        end_first = order[..., ::-1]
        turned = np.empty(hessian.shape)
        for i in np.ndindex(hessian.shape[:-2]):
            turned[i] = hessian[i][end_first[i]][:, end_first[i]]
        mean = variances.mean(-1)[..., None]
        np.einsum("...ii->...i", turned)[...] += np.where(mean > 0, damping * mean, 1.0)
        factor = np.linalg.cholesky(turned)[..., ::-1, ::-1]
        diagonal = np.diagonal(factor, axis1=-2, axis2=-1)
        return cls(order, factor / diagonal[..., None, :], diagonal**2)


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
    # Columns of weights are rows here, because they are read and written as a whole.
    exact = np.take_along_axis((weights / scale[..., None]).swapaxes(-1, -2), feedback.order[..., None], -2)
    back = feedback.unit.swapaxes(-1, -2)
    count = exact.shape[-2]
    rounded, errors, lost = np.zeros(exact.shape, np.int8), np.zeros_like(exact), np.zeros(scale.shape)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        led = exact[..., start:stop, :] + back[..., start:stop, :start] @ errors[..., :start, :]
        for j in range(start, stop):
            column = led[..., j - start, :] + (back[..., j : j + 1, start:j] @ errors[..., start:j, :])[..., 0, :]
            nearest = np.clip(np.rint(column), -limit, limit)
            rounded[..., j, :], errors[..., j, :] = nearest, exact[..., j, :] - nearest
            lost += feedback.cost[..., j, None] * (column - nearest) ** 2
    integers = np.take_along_axis(rounded, np.argsort(feedback.order, axis=-1)[..., None], -2).swapaxes(-1, -2)
    return integers, scale**2 * lost


def rescaled_rounding(
    weights: NDArray[np.float64], scale: NDArray[np.float64], feedback: Feedback, limit: int
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """`compensated_rounding` with the best of SCALES for each row: integers [..., O, I] and scales [..., O]."""
    least = np.full(scale.shape, np.inf)
    best, chosen = np.zeros(weights.shape, np.int8), scale
    # Rows are independent, so one problem has those of many scales.
    for factors in np.array_split(SCALES, min(len(SCALES), math.ceil(len(SCALES) * weights.size / VALUES_AT_ONCE))):
        scales = np.concatenate([factor * scale for factor in factors], axis=-1)
        integers, lost = compensated_rounding(np.tile(weights, (len(factors), 1)), scales, feedback, limit)
        parts = (np.split(values, len(factors), axis) for values, axis in ((lost, -1), (integers, -2), (scales, -1)))
        for one_lost, one, one_scale in zip(*parts, strict=True):
            better = one_lost < least
            least = np.where(better, one_lost, least)
            best = np.where(better[..., None], one, best)
            chosen = np.where(better, one_scale, chosen)
    return best, chosen


@dataclass(frozen=True)
class Moments:
    """First two moments of the inputs of a layer.

    mean         float64 [G, I]: groups, inputs of one output position
    covariance   float64 [G, I, I]
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


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
    return float(np.sum((errors @ seen.covariance) * errors) + np.sum(mean**2))


# The inputs of a layer --------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """A layer whose weights can be rounded anew.

    exact     float64 [G, O, I]: groups, output channels, inputs of one output position; smoothed where the layer is
    plain     int8 like it: its weights as NNCF rounded them
    scale     float64 [G, O]
    limit     largest absolute integer that NNCF uses here
    window    None for a matrix product
    """

    layer: Layer
    exact: NDArray[np.float64]
    plain: NDArray[np.int8]
    scale: NDArray[np.float64]
    limit: int
    window: Window | None

    @staticmethod
    def of(layer: Layer, exact: NDArray[np.float64]) -> Rounding | None:
        """None for a layer that is not understood. exact is float64 [G, O, I, K] of FP32, as in `Quantizable`."""
        found, kind, attributes = integer_weights(layer), layer.op.get_type_name(), layer.op.get_attributes()
        if found is None or layer.op.output(0).get_partial_shape().is_dynamic:
            return None
        if kind == "MatMul":
            if attributes["transpose_a"]:
                return None
        elif kind not in ("Convolution", "GroupConvolution"):
            return None
        if (factor := smoothing(layer.op)) is not None:
            exact = exact / factor[:, None]
        flat = exact.reshape(*exact.shape[:2], -1)
        integers, scale = (value.T if _is_turned(layer) else value for value in found)
        plain, scale = integers.astype(np.int8).reshape(flat.shape), scale.astype(np.float64).reshape(flat.shape)
        limit = min(127, int(np.abs(plain.astype(np.int64)).max()))
        return Rounding(layer, flat, plain, scale[..., 0], limit, Window.of(layer))

    def rows(self, x: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """The inputs [G, P, I] of at most POSITIONS output positions of one image; x as the layer reads it."""
        count = x.size // x.shape[-1] if self.window is None else int(np.prod(self.window.shape))
        chosen = rng.choice(count, POSITIONS, replace=False) if count > POSITIONS else np.arange(count)
        if self.window is None:
            return x.reshape(1, count, -1)[:, chosen]
        groups = len(self.exact)
        at = np.unravel_index(chosen, self.window.shape)
        read = np.moveaxis(self.window.reads(x[0]), 0, len(at))[at].swapaxes(0, 1)  # [C, P, kernel]
        by_group = read.reshape(groups, len(read) // groups, len(chosen), -1)
        return by_group.transpose(0, 2, 1, 3).reshape(groups, len(chosen), -1)

    def errors(self, integers: NDArray[np.int8], scale: NDArray[np.float64]) -> NDArray[np.float64]:
        """The rounding errors of weights, [G, O, I]."""
        return self.exact - scale[..., None] * integers

    def write(self, integers: NDArray[np.int8], scale: NDArray[np.float64]) -> None:
        shape = list(self.layer.op.input_value(1).get_shape())
        own = integers[0].T if self.turned else integers.reshape(shape)
        set_integer_weights(self.layer, own, scale if self.by_channel else scale.reshape(-1)[:1])

    @property
    def turned(self) -> bool:
        """Whether the layer has inputs before output channels in its weights, as some matrix products do."""
        return _is_turned(self.layer)

    @property
    def by_channel(self) -> bool:
        """Whether every output channel has a scale of its own."""
        return scale_count(self.layer) == self.scale.size

    def bytes_held(self) -> int:
        """Of its input, and of its second moments over two sets of images."""
        groups, _, inputs = self.exact.shape
        return size_of(self.layer.op.input_value(0)) + int(2 * 8 * groups * inputs**2)


def roundings_of(layers: Sequence[Layer], exact: NDArray[np.float64]) -> list[Rounding]:
    """Of the same layer in several graphs; none where it is not understood in one of them. exact as in `Rounding.of`"""
    found = [Rounding.of(layer, exact) for layer in layers]
    return [rounding for rounding in found if rounding is not None] if None not in found else []


def _is_turned(layer: Layer) -> bool:
    """Whether its weights have inputs before output channels, as some matrix products have."""
    return layer.op.get_type_name() == "MatMul" and not layer.op.get_attributes()["transpose_b"]


def input_moments(
    graph: ov.Model, roundings: Sequence[Rounding], images: Sequence[NDArray[np.float32]], rng: np.random.Generator
) -> list[Moments]:
    """Moments over images and sampled positions.

    graph   has the inputs of the layers as its outputs
    """
    infer = Inference(graph)
    sums = [np.zeros((len(r.exact), r.exact.shape[-1])) for r in roundings]
    # Products are summed in float32, which is faster; the errors are far below any damping. That takes inputs without
    # the mean of the first image: where inputs hardly vary, their mean would leave nothing of the differences.
    products = [np.zeros((*total.shape, total.shape[-1]), np.float32) for total in sums]
    origins = [np.zeros((len(total), 1, total.shape[-1]), np.float32) for total in sums]
    counts = [0] * len(roundings)
    for image in images:
        for i, (rounding, x) in enumerate(zip(roundings, infer(image), strict=True)):
            rows = rounding.rows(x, rng)
            if not counts[i]:
                origins[i] = rows.mean(1, keepdims=True)
            rows = rows - origins[i]
            counts[i] += rows.shape[1]
            sums[i] += rows.sum(1, dtype=np.float64)
            products[i] += rows.transpose(0, 2, 1) @ rows
    found = []
    for count, total, product, origin in zip(counts, sums, products, origins, strict=True):
        mean = total / count
        covariance = product.astype(np.float64) / count - mean[..., :, None] * mean[..., None, :]
        found.append(Moments(mean + origin[:, 0], covariance))
    return found


# The network ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundedLayer:
    """The output error of a layer on held-out images.

    plain         error of plain rounding with a corrected bias: mean squared error of the output over its variance
    compensated   the same of the best compensated rounding
    damping       of the rounding that was taken; None for plain rounding
    rescaled      whether it has scales of its own
    """

    name: str
    plain: float
    compensated: float
    damping: float | None
    rescaled: bool

    @property
    def kept(self) -> bool:
        return self.damping is not None


def output_power(rounding: Rounding, seen: Moments) -> float:
    """The variance of a layer's output, summed over channels; 1 for a layer whose output never changes."""
    return float(np.sum((rounding.exact @ seen.covariance) * rounding.exact)) or 1.0


def choose_rounding(
    roundings: Sequence[Rounding], fitted: Moments, unseen: Moments
) -> list[tuple[RoundedLayer, NDArray[np.int8], NDArray[np.float64]]]:
    """Plain or compensated rounding, whichever is better on inputs that were not fitted: integers and scales.

    roundings   of one layer, each with a range of weights of its own
    """
    power = output_power(roundings[0], unseen)

    def error(rounding: Rounding, integers: NDArray[np.int8], scale: NDArray[np.float64]) -> float:
        return output_error(rounding.errors(integers, scale), fitted, unseen) / power

    best: dict[int, tuple[float, float, Feedback, NDArray[np.int8]]] = {}
    for damping in DAMPINGS:
        feedback = Feedback.of(fitted.covariance, damping)
        for i, rounding in enumerate(roundings):
            integers, _ = compensated_rounding(rounding.exact, rounding.scale, feedback, rounding.limit)
            found = error(rounding, integers, rounding.scale)
            if i not in best or found < best[i][0]:
                best[i] = found, damping, feedback, integers
        del feedback  # the factors of a wide layer are large
    chosen = []
    for i, rounding in enumerate(roundings):
        compensated, damping, feedback, integers = best.pop(i)
        plain, scale = error(rounding, rounding.plain, rounding.scale), rounding.scale
        if rounding.by_channel:
            others = rescaled_rounding(rounding.exact, rounding.scale, feedback, rounding.limit)
            if (rescaled := error(rounding, *others)) < compensated:
                compensated, (integers, scale) = rescaled, others
        if compensated < plain:
            rescaled_too = scale is not rounding.scale
            record = RoundedLayer(rounding.layer.name, plain, compensated, damping, rescaled_too)
        else:
            record = RoundedLayer(rounding.layer.name, plain, compensated, None, False)
            integers, scale = rounding.plain, rounding.scale
        chosen.append((record, integers, scale))
    return chosen


Choose = Callable[
    [Sequence[Rounding], Moments, Moments], list[tuple[RoundedLayer, NDArray[np.int8], NDArray[np.float64]]]
]


def round_weights(
    fp32: ov.Model,
    int8s: Sequence[ov.Model],
    images: Sequence[NDArray[np.float32]],
    rng: np.random.Generator,
    *,
    held_out: Sequence[NDArray[np.float32]],
    choose: Choose = choose_rounding,
) -> tuple[tuple[RoundedLayer, ...], ...]:
    """Round the weights of every quantized layer anew and correct its bias, in place.

    fp32         float, batch 1
    int8s        the same network after quantization without bias correction; several differ in their weights alone
    images       network inputs, float32 [1, C, H, W] each, that integers and biases are solved on
    rng          chooses the positions in each image
    held_out     network inputs that tell, for each layer, whether compensation helps
    choose       rounds one layer
    returns      of each graph the layers that were looked at, in execution order; others, if any, keep their integers
    """
    exact = {op.name: op.weights for op in quantizable_operations(fp32) if op.weights is not None}
    layers = list(zip(*map(quantized_layers, int8s), strict=True))
    possible = [roundings_of(same, exact[same[0].name]) for same in layers if same[0].name in exact]
    roundings = [same for same in possible if same]
    seeing, known = int8s[0].clone(), {same[0].layer.name for same in roundings}
    shifts: list[dict[str, NDArray[np.float64]]] = [{} for _ in int8s]
    if len(known) < len(layers):
        for own, int8 in zip(shifts, int8s, strict=True):
            errors = weight_errors(fp32, int8, images)
            own.update({name: -error for name, error in errors.items() if name not in known})
    records: list[list[RoundedLayer]] = [[] for _ in int8s]
    for group in groups_that_fit(roundings, lambda same: same[0].bytes_held()):
        first = [same[0] for same in group]
        graph = quantized_inputs(seeing, fp32, [rounding.layer.name for rounding in first])
        fitted, unseen = input_moments(graph, first, images, rng), input_moments(graph, first, held_out, rng)
        for same, moments, other in zip(group, fitted, unseen, strict=True):
            chosen = choose(same, moments, other)
            for rounding, (record, integers, scale), own, found in zip(same, chosen, shifts, records, strict=True):
                rounding.write(integers, scale)
                own[record.name] = bias_shift(rounding.errors(integers, scale), moments).reshape(-1)
                found.append(record)
    for int8, own in zip(int8s, shifts, strict=True):
        add_to_biases(int8, own)
    return tuple(map(tuple, records))


def compensated(
    fp32: ov.Model, int8s: Sequence[ov.Model], images: Sequence[NDArray[np.float32]], choose: Choose = choose_rounding
) -> list[ov.Model]:
    """Copies of INT8 graphs with their weights rounded anew; their biases are solved from those of the float graph.

    int8s    differ in their weights alone
    choose   rounds one layer
    images   some are held out to decide where compensation helps; a single one serves for both
    """
    copies = [restore_biases(int8, fp32) for int8 in int8s]
    held_out = max(1, round(HELD_OUT_SHARE * len(images)))
    fitted = images[:-held_out] or images
    round_weights(fp32, copies, fitted, np.random.default_rng(SEED), held_out=images[-held_out:], choose=choose)
    return copies
