"""Quantization below 8 bits, simulated: an INT8 graph whose weights and activations have fewer levels.

At 8 bits most calibration sets give the same accuracy. At 4 bits their differences show, and publications on
calibration data compare methods there. No CPU kernel runs these graphs in integers: they compute in float32, with
values on the low-bit grids, so latency and size say nothing. `without_saturation` gives the graph to run.

The grids are those of NNCF's INT8 graph: symmetric integers for each output channel of the weights, one range for each
activation, and 0 always a level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.graph.editing import quantize_outputs, set_levels
from ovcalib.graph.probing import quantizer_inputs
from ovcalib.graph.reading import (
    _quantizers,
    _range,
    activation_quantizers,
    quantized_layers,
)
from ovcalib.quantization.rounding import roundings_in
from ovcalib.records.options import Edges
from ovcalib.runtime import Inference

# Shares of the largest magnitude that are tried as range; the clipped rest costs less than coarser levels.
SHARES = tuple(k / 40 for k in range(8, 41))
# Values of an activation that are kept of each image: of a tensor with one range, and of every channel with its own.
SAMPLES, CHANNEL_SAMPLES = 4096, 256
SEED = 0


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits of a simulated graph.

    weights, activations   2 to 8
    edges    "full": all layers, and the network's outputs; "academic": the first and the last layer keep 8 bits, and
             outputs are float. Publications differ in it
    ranges   "extremes" of weights and activations, "mse": those of least squared error, or "power-of-two": of least
             squared error among powers of two, which hardware scales by shifts. With 8 bits, weights and inner
             activations keep the ranges that NNCF gave them, but for powers of two
    scales   "channel": one for each output channel of a layer's weights; "tensor": one for all of them
    """

    weights: int = 8
    activations: int = 8
    edges: Edges = "academic"
    ranges: Literal["extremes", "mse", "power-of-two"] = "mse"
    scales: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if not 2 <= getattr(self, name) <= 8:
                raise ValueError(f"{name} has {getattr(self, name)} bits, but must have 2 to 8")


# Grids: arrays in, arrays out -------------------------------------------------------------------


def zero_on_grid(
    low: NDArray[np.float64], high: NDArray[np.float64], levels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The range of as many steps, next to low..high, in which 0 is a level."""
    step = (high - low) / (levels - 1)
    zero = np.clip(np.rint(np.divide(-low, step, out=np.zeros_like(low), where=step > 0)), 0, levels - 1)
    return -zero * step, (levels - 1 - zero) * step


def fake_quantize(
    values: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], levels: int
) -> NDArray[np.float64]:
    """The nearest of `levels` equally spaced values in low..high, as OpenVINO's FakeQuantize."""
    step = np.where(high > low, (high - low) / (levels - 1), 1.0)
    return np.clip(np.rint((values - low) / step), 0, levels - 1) * step + low


def powers_of_two(largest: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """The power of two at or above each magnitude, and five halvings."""
    above = np.exp2(np.ceil(np.log2(np.maximum(largest, np.finfo(np.float64).tiny))))
    return [above * 0.5**halvings for halvings in range(6)]


def nearest(rows: NDArray[np.float64], scale: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """Integers in -limit..limit nearest to rows [R, I] in units of scale [R]."""
    return np.clip(np.rint(rows / scale[:, None]), -limit, limit)


def candidate_ranges(
    low: NDArray[np.float64], high: NDArray[np.float64], levels: int, ranges: str
) -> Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Ranges to choose from, each low [C] and high [C]."""
    if ranges == "power-of-two":
        # A power of two is the end of the range that the next level would have: (levels - 1) / levels of it is reached.
        for top in powers_of_two(np.maximum(-low, high)):
            signed = low < 0
            step = np.where(signed, 2 * top, top) / levels
            yield np.where(signed, -top, 0.0), top - step
    else:
        for share in SHARES if ranges == "mse" else (1.0,):
            yield zero_on_grid(share * low, share * high, levels)


def choose_range(
    values: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], levels: int, ranges: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each channel the range of least squared error.

    values      float64 [C, P]
    low, high   float64 [C], which the chosen range does not exceed, but for a power of two
    ranges      see `Bits`
    returns     low and high, float64 [C]
    """
    least = np.full(len(low), np.inf)
    best_low, best_high = low, high
    for some_low, some_high in candidate_ranges(low, high, levels, ranges):
        quantized = fake_quantize(values, some_low[:, None], some_high[:, None], levels)
        error = np.mean((quantized - values) ** 2, axis=1)
        better = error < least
        least = np.where(better, error, least)
        best_low, best_high = np.where(better, some_low, best_low), np.where(better, some_high, best_high)
    return best_low, best_high


def choose_scale(weights: NDArray[np.float64], limit: int, ranges: str, by_channel: bool) -> NDArray[np.float64]:
    """The scale of integers in -limit..limit with the least squared error.

    weights      float64 [R, I]
    by_channel   one scale for each row, else one for all
    returns      float64 [R]
    """
    rows = weights if by_channel else weights.reshape(1, -1)
    largest = np.abs(rows).max(1)
    if ranges == "power-of-two":
        tried = [top / (limit + 1) for top in powers_of_two(largest)]
    else:
        tried = [share * largest / limit for share in (SHARES if ranges == "mse" else (1.0,))]
    scales = np.where(largest > 0, np.stack(tried), 1.0)  # [S, R]
    errors = [np.sum((nearest(rows, scale, limit) * scale[:, None] - rows) ** 2, 1) for scale in scales]
    best: NDArray[np.float64] = np.take_along_axis(scales, np.argmin(errors, axis=0)[None], 0)[0]
    return best if by_channel else np.repeat(best, len(weights))


# The network ------------------------------------------------------------------------------------


def simulate(fp32: ov.Model, int8: ov.Model, bits: Bits, images: Sequence[NDArray[np.float32]]) -> ov.Model:
    """A copy of an INT8 graph with fewer levels, weights rounded to the nearest.

    Correct its biases, or round its weights by `ovcalib.quantization.rounding`, afterwards.
    fp32, int8   the same network before quantization and after it without bias correction, batch 1
    images       network inputs, float32 [1, C, H, W] each, for the ranges of activations
    """
    graph = int8.clone()
    if bits.weights < 8 or bits.ranges == "power-of-two" or bits.scales == "tensor":
        _other_weights(fp32, graph, bits)
    _other_activations(fp32, graph, bits, images)
    graph.validate_nodes_and_infer_types()
    return graph


def _other_weights(fp32: ov.Model, graph: ov.Model, bits: Bits) -> None:
    limit = 2 ** (bits.weights - 1) - 1
    layers = quantized_layers(graph)
    if bits.edges == "academic":
        layers = layers[1:-1]
    for rounding in roundings_in(layers, fp32):
        rows = rounding.exact.reshape(-1, rounding.exact.shape[-1])
        scale = choose_scale(rows, limit, bits.ranges, rounding.by_channel and bits.scales == "channel")
        integers = nearest(rows, scale, limit).astype(np.int8)
        rounding.write(integers.reshape(rounding.exact.shape), scale.reshape(rounding.exact.shape[:2]))


def _other_activations(fp32: ov.Model, graph: ov.Model, bits: Bits, images: Sequence[NDArray[np.float32]]) -> None:
    levels = 2**bits.activations
    unlike = bits.activations < 8 or bits.ranges == "power-of-two"
    quantizers = activation_quantizers(graph) if unlike else []
    if bits.edges == "academic":
        layers = quantized_layers(graph)
        kept = {fq.get_name() for layer in (layers[0], layers[-1]) for fq in _quantizers(layer.op.input_value(0))}
        quantizers = [fq for fq in quantizers if fq.get_name() not in kept]
    else:
        quantizers += quantize_outputs(graph, levels)
    if not quantizers:
        return
    by_channel = [_range(fq)[0].size > 1 for fq in quantizers]
    samples = sampled(quantizer_inputs(graph, fp32, [fq.get_friendly_name() for fq in quantizers]), by_channel, images)
    for fq, values in zip(quantizers, samples, strict=True):
        low, high = (end.astype(np.float64).reshape(-1) for end in _range(fq))
        if not (low < high).any():  # a quantizer of outputs, whose range is not known before
            low, high = values.min(1), values.max(1)
        found = choose_range(values, np.minimum(low, 0), np.maximum(high, 0), levels, bits.ranges)
        shape = _range(fq)[0].shape
        set_levels(fq, levels, *(end.reshape(shape).astype(np.float32) for end in found))


def sampled(
    graph: ov.Model, by_channel: Sequence[bool], images: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float64]]:
    """Values of each output of a graph, float64 [C, P] by channel, else [1, P]."""
    infer, rng = Inference(graph), np.random.default_rng(SEED)
    found: list[list[NDArray[np.float32]]] = [[] for _ in by_channel]
    for image in images:
        for kept, own, x in zip(found, by_channel, infer(image), strict=True):
            flat = x.reshape(x.shape[1] if own else 1, -1)
            most = CHANNEL_SAMPLES if own else SAMPLES
            few = flat.shape[1] <= most
            kept.append(flat.copy() if few else flat[:, rng.choice(flat.shape[1], most, replace=False)])
    return [np.concatenate(values, axis=1).astype(np.float64) for values in found]
