"""Expected SQNR of each operation in INT8, from the ranges of weights and activations before quantization.

Rounding to steps of size d adds noise of variance d^2 / 12. The noise at an operation's output follows from the
weights, and is compared with the variance of that output: the expected signal-to-quantization-noise ratio of Lin,
Talathi and Annapureddy, "Fixed Point Quantization of Deep Convolutional Networks", ICML 2016, section 3. A channel that
is far wider than the others of its tensor, or a weight far larger than the others of its channel, leaves the others few
of the 255 steps; if these carry the signal, the ratio is low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.graph.reading import quantizable_operations
from ovcalib.runtime import Inference, groups_that_fit, size_of

# Steps of a quantized range, of weights as of activations.
STEPS = 255
# In dB; at 10 the noise has a tenth of the signal's power. Operations of networks that quantize well are above 20. With
# channels of ResNet-20 widened without changing its function, agreement starts to drop here.
MIN_SQNR_DB = 10.0


@dataclass(frozen=True)
class Channels:
    """Statistics of a signal, [1, C, ...] or [..., C], over images and positions; arrays [C]."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    total: NDArray[np.float64]
    square: NDArray[np.float64]
    nonzero: NDArray[np.float64]
    count: int

    @staticmethod
    def of(values: NDArray[np.float32], axis: int) -> Channels:
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        return Channels(
            low=rows.min(1),
            high=rows.max(1),
            total=rows.sum(1).astype(np.float64),
            square=np.einsum("cp,cp->c", rows, rows).astype(np.float64),
            nonzero=np.count_nonzero(rows, 1).astype(np.float64),
            count=rows.shape[1],
        )

    def with_(self, other: Channels) -> Channels:
        """The statistics of both signals together."""
        return Channels(
            np.minimum(self.low, other.low), np.maximum(self.high, other.high), self.total + other.total,
            self.square + other.square, self.nonzero + other.nonzero, self.count + other.count,
        )  # fmt: skip

    @property
    def power(self) -> NDArray[np.float64]:
        return self.square / self.count

    @property
    def variance(self) -> NDArray[np.float64]:
        return np.maximum(self.square / self.count - np.square(self.total / self.count), 0)


def rounding_noise(x: Channels, by_channel: bool) -> NDArray[np.float64]:
    """Variance [C] of the rounding error of a signal; zero is exact.

    by_channel   each channel has a range of its own; else one serves all
    """
    low, high = (x.low, x.high) if by_channel else (x.low.min(), x.high.max())
    step = np.where(low < 0, 2 * np.maximum(high, -low), high) / STEPS
    return np.square(step) / 12 * x.nonzero / x.count


def output_noise(
    weights: NDArray[np.float64], noise: NDArray[np.float64], power: NDArray[np.float64]
) -> tuple[float, float]:
    """Output noise from rounding activations and from rounding weights, summed over channels.

    weights   [G, O, I, K]: groups, output and input channels of each, kernel positions
    noise     [G * I] variance of the rounding of each input channel
    power     [G * I] mean square of each input channel
    """
    groups, _, per_group, positions = weights.shape
    from_activations = np.einsum("goik,gi->", np.square(weights), noise.reshape(groups, per_group))
    step = 2 * np.abs(weights).max((2, 3)) / STEPS
    from_weights = np.einsum("go,gi->", np.square(step) / 12, power.reshape(groups, per_group)) * positions
    return float(from_activations), float(from_weights)


@dataclass(frozen=True)
class Expected:
    """The expected SQNR of an operation quantized alone.

    sqnr_db       variance of its output over that of the noise
    weights_share share of the noise that comes from rounding weights, 0..1; the rest comes from its inputs
    """

    name: str
    sqnr_db: float
    weights_share: float


def expected_sqnr(
    graph: ov.Model, images: Sequence[NDArray[np.float32]], channel_headroom: float = 1.0
) -> list[Expected]:
    """The operations of a float graph that INT8 suits least first.

    images             network inputs, float32 [1, C, H, W] each
    channel_headroom   factor on the ranges of single channels
    Convolutions, matrix products with constant weights and sums of two signals are looked at. Activations have one
    range a tensor, those of depthwise convolutions one a channel, weights one an output channel, as NNCF has it.
    """
    operations = quantizable_operations(graph)
    # A signal that several operations read is measured once.
    watched = {_key(value): (value, op.channel_axis) for op in operations for value in (*op.inputs, op.output)}
    signals: dict[tuple[str, int], Channels] = {}
    for group in groups_that_fit(list(watched), lambda key: size_of(watched[key][0])):
        infer = Inference(ov.Model([watched[key][0] for key in group], graph.get_parameters(), "signals"))
        for image in images:
            for key, values in zip(group, infer(image), strict=True):
                channels = Channels.of(values, watched[key][1])
                signals[key] = signals[key].with_(channels) if key in signals else channels
    found = []
    for op in operations:
        inputs = [signals[_key(value)] for value in op.inputs]
        wider = channel_headroom if op.by_channel else 1.0
        noise = [wider**2 * rounding_noise(x, op.by_channel) for x in inputs]
        if op.weights is None:
            from_activations, from_weights = float(sum(n.sum() for n in noise)), 0.0
        else:
            from_activations, from_weights = output_noise(op.weights, noise[0], inputs[0].power)
        total, signal = from_activations + from_weights, float(signals[_key(op.output)].variance.sum())
        if total > 0 and signal > 0:  # a constant signal has no SQNR
            found.append(Expected(op.name, 10 * math.log10(signal / total), from_weights / total))
    return sorted(found, key=lambda e: e.sqnr_db)


def below_sqnr_limit(expected: Sequence[Expected]) -> list[Expected]:
    """The operations whose expected SQNR is below MIN_SQNR_DB, the lowest first."""
    return [e for e in expected if e.sqnr_db < MIN_SQNR_DB]


def _key(value: ov.Output) -> tuple[str, int]:
    return value.get_node().get_name(), value.get_index()
