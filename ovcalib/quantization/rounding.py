"""Compensated rounding of the weights of a network, layer by layer; `compensation` is the arithmetic.

The inputs of a layer are those of the FP32 network, quantized. So layers do not depend on each other: one pass over
the images is enough, and the rounding of a layer stays valid when others are reverted to float. A few images do not
determine the covariance of its inputs. Damping moves the result towards plain rounding, and the damping of each layer
is chosen on held-out images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.graph.editing import add_to_biases, restore_biases, set_integer_weights
from ovcalib.graph.probing import quantized_inputs
from ovcalib.graph.reading import (
    Layer,
    Window,
    exact_weights,
    integer_weights,
    quantized_layers,
    scale_count,
    smoothing,
)
from ovcalib.quantization.bias_correction import weight_errors
from ovcalib.quantization.compensation import (
    Feedback,
    Moments,
    bias_shift,
    compensated_rounding,
    moments_of,
    output_error,
    rescaled_rounding,
    row_slices,
)
from ovcalib.runtime import Inference, groups_that_fit, size_of

# Shares of the mean diagonal that are added to the diagonal of H; a layer takes the best of them, or plain rounding.
DAMPINGS = (0.01, 0.1, 1.0)
# Output positions of a layer that are sampled in one image.
POSITIONS = 256
# Share of the images that decides, layer by layer, whether compensation helps.
HELD_OUT_SHARE = 0.25
SEED = 0


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
        count = self.all_positions
        chosen = rng.choice(count, POSITIONS, replace=False) if count > POSITIONS else np.arange(count)
        if self.window is None:
            return x.reshape(1, count, -1)[:, chosen]
        groups = len(self.exact)
        at = np.unravel_index(chosen, self.window.shape)
        read = np.moveaxis(self.window.reads(x[0]), 0, len(at))[at].swapaxes(0, 1)  # [C, P, kernel]
        by_group = read.reshape(groups, len(read) // groups, len(chosen), -1)
        return by_group.transpose(0, 2, 1, 3).reshape(groups, len(chosen), -1)

    def errors(self, integers: NDArray[np.int8], scale: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
        """The rounding errors of weights, [G, O, I], some rows at a time."""
        for own in row_slices(self.exact):
            yield self.exact[:, own] - scale[:, own, None] * integers[:, own]

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

    @property
    def all_positions(self) -> int:
        """Output positions of one image."""
        read = self.layer.op.input_value(0).get_shape()
        return int(np.prod(read[:-1] if self.window is None else self.window.shape))

    @property
    def positions(self) -> int:
        """Those that are sampled."""
        return min(POSITIONS, self.all_positions)

    def bytes_held(self, images: int) -> int:
        """Of its input, and of its second moments over two sets of images, or of the samples where they are few."""
        groups, _, inputs = self.exact.shape
        rows = min(inputs, images * self.positions)
        return size_of(self.layer.op.input_value(0)) + int(2 * 8 * groups * inputs * rows)


def roundings_of(layers: Sequence[Layer], exact: NDArray[np.float64]) -> list[Rounding]:
    """Of the same layer in several graphs; none where it is not understood in one of them. exact as in `Rounding.of`"""
    found = [Rounding.of(layer, exact) for layer in layers]
    return [rounding for rounding in found if rounding is not None] if None not in found else []


def roundings_in(layers: Iterable[Layer], fp32: ov.Model) -> list[Rounding]:
    """Of those layers of a quantized graph that are understood, in order; fp32 is the network before quantization."""
    exact = exact_weights(fp32)
    found = (Rounding.of(layer, exact[layer.name]) for layer in layers if layer.name in exact)
    return [rounding for rounding in found if rounding is not None]


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
    sums = [moments_of(len(images) * rounding.positions, rounding.exact.shape[-1]) for rounding in roundings]
    for image in images:
        for rounding, own, x in zip(roundings, sums, infer(image), strict=True):
            own.add(rounding.rows(x, rng))
    return [own.moments() for own in sums]


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
    return seen.covariance.energy(rounding.exact) or 1.0


def relative_error(
    rounding: Rounding,
    integers: NDArray[np.int8],
    scale: NDArray[np.float64],
    fitted: Moments,
    unseen: Moments,
    power: float,
) -> float:
    """`output_error` of a layer over the power of its output."""
    return sum(output_error(rows, fitted, unseen) for rows in rounding.errors(integers, scale)) / power


def choose_rounding(
    roundings: Sequence[Rounding], fitted: Moments, unseen: Moments
) -> list[tuple[RoundedLayer, NDArray[np.int8], NDArray[np.float64]]]:
    """Plain or compensated rounding, whichever is better on inputs that were not fitted: integers and scales.

    roundings   of one layer, each with a range of weights of its own
    """
    power = output_power(roundings[0], unseen)

    def error(rounding: Rounding, integers: NDArray[np.int8], scale: NDArray[np.float64]) -> float:
        return relative_error(rounding, integers, scale, fitted, unseen, power)

    best: dict[int, tuple[float, float, Feedback, NDArray[np.int8]]] = {}
    for damping in DAMPINGS:
        feedback = fitted.covariance.feedback(damping)
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
    tick: Callable[[float], None] = lambda done: None,
) -> tuple[tuple[RoundedLayer, ...], ...]:
    """Round the weights of every quantized layer anew and correct its bias, in place.

    fp32         float, batch 1
    int8s        the same network after quantization without bias correction; several differ in their weights alone
    images       network inputs, float32 [1, C, H, W] each, that integers and biases are solved on
    rng          chooses the positions in each image
    held_out     network inputs that tell, for each layer, whether compensation helps
    choose       rounds one layer
    tick         receives the share of the weights that is rounded
    returns      of each graph the layers that were looked at, in execution order; others, if any, keep their integers
    """
    exact = exact_weights(fp32)
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
    done, total = 0, sum(same[0].exact.size for same in roundings)
    for group in groups_that_fit(roundings, lambda same: same[0].bytes_held(len(images))):
        first = [same[0] for same in group]
        graph = quantized_inputs(seeing, fp32, [rounding.layer.name for rounding in first])
        fitted, unseen = input_moments(graph, first, images, rng), input_moments(graph, first, held_out, rng)
        tick(done / total)  # the time left is reckoned from here: reading inputs says nothing of it
        for same, moments, other in zip(group, fitted, unseen, strict=True):
            chosen = choose(same, moments, other)
            for rounding, (record, integers, scale), own, found in zip(same, chosen, shifts, records, strict=True):
                rounding.write(integers, scale)
                shift = [bias_shift(rows, moments) for rows in rounding.errors(integers, scale)]
                own[record.name] = np.concatenate(shift, 1).reshape(-1)
                found.append(record)
            done += same[0].exact.size
            tick(done / total)
    for int8, own in zip(int8s, shifts, strict=True):
        add_to_biases(int8, own)
    return tuple(map(tuple, records))


def compensated(
    fp32: ov.Model,
    int8s: Sequence[ov.Model],
    images: Sequence[NDArray[np.float32]],
    choose: Choose = choose_rounding,
    tick: Callable[[float], None] = lambda done: None,
) -> list[ov.Model]:
    """Copies of INT8 graphs with their weights rounded anew; their biases are solved from those of the float graph.

    int8s    differ in their weights alone
    choose   rounds one layer
    tick     receives the share of the weights that is rounded
    images   some are held out to decide where compensation helps; a single one serves for both
    """
    copies = [restore_biases(int8, fp32) for int8 in int8s]
    held_out = max(1, round(HELD_OUT_SHARE * len(images)))
    fitted = images[:-held_out] or images
    round_weights(
        fp32, copies, fitted, np.random.default_rng(SEED), held_out=images[-held_out:], choose=choose, tick=tick
    )
    return copies
