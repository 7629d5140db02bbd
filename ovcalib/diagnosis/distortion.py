"""Statistics of quantization errors of signals, accumulated over batches. Pure functions of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ovcalib.records.diagnosis import ChannelRange, SignalQuality

# 200 dB is far beyond float32; it stands for "no difference", which JSON cannot say as infinity.
LIMIT_DB = 200.0
BINS = 64


@dataclass
class Distortion:
    """Sums over pairs of signals from which SQNR and cosine follow."""

    reference_energy: float = 0.0
    value_energy: float = 0.0
    noise_energy: float = 0.0
    product: float = 0.0

    def add(self, reference: NDArray[np.float32], value: NDArray[np.float32]) -> None:
        """Count one more pair of signals of the same shape."""
        # numpy adds pairwise within a call, and the calls are few: float32 products lose nothing that matters.
        r, v = reference.reshape(-1), value.reshape(-1)
        noise = v - r
        self.reference_energy += float(r @ r)
        self.value_energy += float(v @ v)
        self.noise_energy += float(noise @ noise)
        self.product += float(r @ v)

    @property
    def sqnr_db(self) -> float:
        """10 log10 of signal energy over noise energy, limited to +-200 dB; a non-finite signal counts as -200."""
        if not math.isfinite(self.noise_energy):
            return -LIMIT_DB
        if self.noise_energy == 0:
            return LIMIT_DB
        if self.reference_energy == 0:
            return -LIMIT_DB
        ratio = 10 * math.log10(self.reference_energy / self.noise_energy)
        return max(-LIMIT_DB, min(LIMIT_DB, ratio))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the signals; two zero signals are alike, one zero signal is unlike."""
        if not math.isfinite(self.noise_energy):
            return 0.0
        scale = math.sqrt(self.reference_energy) * math.sqrt(self.value_energy)
        if scale == 0:
            return 1.0 if self.reference_energy == self.value_energy else 0.0
        return max(-1.0, min(1.0, self.product / scale))

    def quality(self) -> SignalQuality:
        return SignalQuality(sqnr_db=self.sqnr_db, cosine=self.cosine)


@dataclass
class Spread:
    """Extremes of a signal [1, C, ...], and the share of it outside a quantized range.

    low, high   the range, for the whole signal or for each channel, broadcastable to it
    Sums are kept for each range: scalars as arrays [1], or [C].
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    smallest: NDArray[np.float32] = field(init=False)
    largest: NDArray[np.float32] = field(init=False)
    outside: NDArray[np.int64] = field(init=False)
    total: int = 0

    def __post_init__(self) -> None:
        self.smallest = np.full(self.low.size, np.inf, np.float32)
        self.largest = np.full(self.low.size, -np.inf, np.float32)
        self.outside = np.zeros(self.low.size, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count one more signal."""
        shape = (1,) * (values.ndim - self.low.ndim) + self.low.shape
        axes = tuple(i for i, size in enumerate(shape) if size == 1)
        self.smallest = np.minimum(self.smallest, values.min(axes).reshape(-1))
        self.largest = np.maximum(self.largest, values.max(axes).reshape(-1))
        # Half a step beyond the last level still rounds to it; only what lies further is clipped.
        half_step = (self.high - self.low) / 510
        beyond = (values < self.low - half_step) | (values > self.high + half_step)
        self.outside += beyond.sum(axes).reshape(-1)
        self.total += values.size

    @property
    def seen(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return float(self.smallest.min()), float(self.largest.max())

    def bounds(self, channel: int | None) -> tuple[float, float]:
        """The smallest and the largest value of a channel, or of all."""
        return self.seen if channel is None else (float(self.smallest[channel]), float(self.largest[channel]))

    @property
    def clipped_share(self) -> float:
        """Share of the values that the range cuts off, 0..1."""
        return int(self.outside.sum()) / max(self.total, 1)

    @property
    def used_share(self) -> float:
        """Share of the range between the smallest and the largest value, 0..1, the mean over channels."""
        low, high = self.low.reshape(-1), self.high.reshape(-1)
        used = np.minimum(self.largest, high) - np.maximum(self.smallest, low)
        return float(np.clip(used / np.maximum(high - low, np.finfo(np.float32).tiny), 0, 1).mean())

    def telling(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values of the channel that is clipped most, or all values if all channels have one range."""
        if self.low.size == 1:
            return values
        axis = values.ndim - self.low.ndim + int(np.argmax(self.low.shape))
        return np.asarray(values.take(int(self.outside.argmax()), axis))

    def worst_channel(self) -> ChannelRange | None:
        """The channel of which most is clipped; None where one range serves all."""
        if self.low.size == 1:
            return None
        i = int(self.outside.argmax())
        return ChannelRange(
            channel=i,
            low=float(self.low.reshape(-1)[i]),
            high=float(self.high.reshape(-1)[i]),
            seen=(float(self.smallest[i]), float(self.largest[i])),
            clipped_share=int(self.outside[i]) * self.low.size / max(self.total, 1),
        )


@dataclass
class Histogram:
    """Counts of values in equal bins between two bounds; values beyond fall into the outermost bins."""

    low: float
    high: float
    bins: int = BINS
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        if not self.high > self.low:  # a constant signal
            self.low, self.high = self.low - 0.5, self.low + 0.5
        self.counts = np.zeros(self.bins, np.int64)

    @property
    def edges(self) -> NDArray[np.float64]:
        return np.linspace(self.low, self.high, self.bins + 1)

    def add(self, values: NDArray[np.float32]) -> None:
        index = ((values.reshape(-1) - self.low) * (self.bins / (self.high - self.low))).astype(np.int64)
        self.counts += np.bincount(np.clip(index, 0, self.bins - 1), minlength=self.bins)
