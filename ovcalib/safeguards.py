"""What keeps the default algorithm safe: choices that nobody made, made by what they do to the outputs.

Before quantizing, operations that INT8 cannot hold are told and stay in float. After it, the INT8 model runs on the
last images of its own calibration set beside FP32: other ranges of activations where a few images spoil them, half
the range of weights where full ones saturate on CPUs without VNNI, and no bias correction where it does harm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Sequence
from functools import cached_property

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.calibration import CalibrationSet
from ovcalib.evaluation import nmse
from ovcalib.graph import layer_name, restore_biases
from ovcalib.kernels import is_emulated, outputs_on, without_saturation
from ovcalib.quantization import Settings
from ovcalib.runtime import outputs_of
from ovcalib.spread import MIN_SQNR_DB, Expected, drowning, expected_sqnr
from ovcalib.types import Kernels, KernelsError

# Images of the calibration set on which the spread of activations is measured, and those that judge INT8 models.
GUARD_IMAGES = 8
JUDGING_ITEMS = 32
# An error that ranges may be to blame for. CIFAR-10 networks are below it with the extremes, but for RepVGG, whose few
# large activations bring it to 0.07, and the mean back to 0.003.
SUSPECT_NMSE = 0.005
# So much more error on the kernels of AVX2 than on others is saturation.
SATURATED_NMSE = 0.01
# Operations that a warning names.
NAMED_OPERATIONS = 4


def operations_to_guard(fp32: ov.Model, calibration: CalibrationSet, settings: Settings) -> list[Expected]:
    """The operations that INT8 cannot hold, the worst first, without those ignored."""
    expected = expected_sqnr(fp32, calibration.inputs(last=GUARD_IMAGES))
    return [operation for operation in drowning(expected) if operation.name not in settings.ignored]


def guard_warning(drowned: Sequence[Expected]) -> str:
    """Why operations stay in float; `drowned` has one at least, the worst first."""
    named = [
        f"{layer_name(op.name)} ({op.sqnr_db:.0f} dB, {'weights' if op.weights_share > 0.5 else 'activations'})"
        for op in drowned[:NAMED_OPERATIONS]
    ]
    more = len(drowned) - len(named)
    return (
        f"{len(drowned)} of the operations would drown in the rounding of INT8 and stay in float, because channels or "
        f"weights that are far larger than the others take their levels: {', '.join(named)}"
        f"{f' and {more} more' if more else ''}. Expected SQNR below {MIN_SQNR_DB:.0f} dB; --no-guard quantizes them"
    )


class Judge:
    """How far INT8 models are from FP32 on the last images of a calibration set.

    Sums do not saturate here, and every CPU computes the same: the emulation in float32 of a CPU with VNNI. So neither
    ranges nor biases are chosen by what only this CPU does.
    """

    def __init__(self, fp32: ov.Model, calibration: CalibrationSet) -> None:
        self.fp32 = fp32
        self.inputs = calibration.inputs(-JUDGING_ITEMS)

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        return outputs_of(self.fp32, self.inputs)

    def error(self, int8: ov.Model) -> float:
        """NMSE of the outputs."""
        return nmse(self.reference, outputs_of(without_saturation(int8), self.inputs))

    def errors(self, int8: ov.Model, wanted: Sequence[Kernels]) -> tuple[KernelsError, ...]:
        """The output error on each kind of kernels: executed where this CPU has them, else emulated."""
        found = [(kernels, nmse(self.reference, outputs_on(kernels, int8, self.inputs))) for kernels in wanted]
        return tuple(
            KernelsError(kernels=kernels, nmse=error if math.isfinite(error) else None, emulated=is_emulated(kernels))
            for kernels, error in found
        )

    def error_on_avx2(self, int8: ov.Model) -> float:
        """NMSE of the outputs on kernels whose sums saturate. Raises KernelsFailedError."""
        return nmse(self.reference, outputs_on("avx2", int8, self.inputs))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An INT8 model and the settings that made it; `judge` is asked once."""

    int8: ov.Model
    settings: Settings
    judge: Judge

    @cached_property
    def error(self) -> float:
        return self.judge.error(self.int8)

    @cached_property
    def error_on_avx2(self) -> float:
        return self.judge.error_on_avx2(self.int8)


@dataclasses.dataclass(frozen=True)
class Saturation:
    """NMSE of the outputs of an INT8 model.

    vnni     where sums do not saturate
    avx2     on the kernels of AVX2
    halved   with half the range of weights, the same on both; None where there was no need to try
    """

    vnni: float
    avx2: float
    halved: float | None

    @property
    def avoided(self) -> bool:
        """Half the range is the better one."""
        return self.halved is not None and self.halved < self.avx2

    def warning(self) -> str:
        """Why weights have half their range, where that avoids the saturation."""
        return (
            f"on a CPU without VNNI the sums of products would saturate (output NMSE {self.avx2:.2g}; with VNNI "
            f"{self.vnni:.2g}), so all weights use half of their range, which is safe everywhere (NMSE "
            f"{self.halved:.2g}); where the model will run on VNNI, AMX, a GPU or an NPU, say so with --deploy-isa"
        )


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An INT8 model, its settings, and what they were chosen by; None where there was nothing to choose.

    ranges_nmse   see `choose_activation_ranges`
    saturation    see `choose_weight_range`
    bias_nmse     see `choose_biases`
    """

    int8: ov.Model
    settings: Settings
    ranges_nmse: tuple[float, float] | None
    saturation: Saturation | None
    bias_nmse: tuple[float, float] | None


def quantize_by_outputs(
    quantize: Callable[[Settings], ov.Model], settings: Settings, left_open: Container[str], judge: Judge
) -> Chosen:
    """Quantize, and change the settings that nobody made where the outputs are closer to FP32 with others.

    quantize    makes the INT8 model of settings
    left_open   of "activation_ranges", "overflow_fix" and "bias_correction" those that are ours to choose
    """

    def make(settings: Settings) -> Candidate:
        return Candidate(quantize(settings), settings, judge)

    best = make(settings)
    ranges_nmse = saturation = bias_nmse = None
    if "activation_ranges" in left_open:
        best, ranges_nmse = choose_activation_ranges(best, make)
    if "overflow_fix" in left_open:
        best, saturation = choose_weight_range(best, make)
    if "bias_correction" in left_open:
        best, bias_nmse = choose_biases(best)
    return Chosen(best.int8, best.settings, ranges_nmse, saturation, bias_nmse)


def choose_activation_ranges(
    extremes: Candidate, make: Callable[[Settings], Candidate]
) -> tuple[Candidate, tuple[float, float] | None]:
    """Take the mean of each image's extremes where a few images have spoilt the extremes over all.

    Activations beyond their range are clipped, which costs more than coarser levels: on most CIFAR-10 networks, NNCF's
    mean has 2 to 20 times the NMSE of the extremes. But values far beyond all others leave those few levels.
    returns   the better one, and NMSE with the extremes and with the mean; None where the mean was not tried
    """
    if extremes.error <= SUSPECT_NMSE:
        return extremes, None
    mean = make(dataclasses.replace(extremes.settings, activation_ranges="mean-min-max"))
    return mean if mean.error < extremes.error else extremes, (extremes.error, mean.error)


def choose_weight_range(full: Candidate, make: Callable[[Settings], Candidate]) -> tuple[Candidate, Saturation]:
    """Give weights half their range where the full one saturates on the kernels of AVX2.

    returns   the better one there, and what was measured
    raises    KernelsFailedError
    """
    if full.error_on_avx2 <= full.error + SATURATED_NMSE:
        return full, Saturation(full.error, full.error_on_avx2, None)
    half = make(dataclasses.replace(full.settings, overflow_fix="enable"))
    saturation = Saturation(full.error, full.error_on_avx2, half.error)
    return half if saturation.avoided else full, saturation


def choose_biases(corrected: Candidate) -> tuple[Candidate, tuple[float, float]]:
    """Leave bias correction out where the outputs are closer to FP32 without it.

    A shift of the mean is a poor account of an error that grows with the activation, and on few images a matter of
    chance. The last images tell, which the correction has not seen where there are enough.
    returns   the better one, and the NMSE of the outputs with the correction and without it
    """
    judge = corrected.judge
    settings = dataclasses.replace(corrected.settings, bias_correction="none")
    plain = Candidate(restore_biases(corrected.int8, judge.fp32), settings, judge)
    return plain if plain.error < corrected.error else corrected, (corrected.error, plain.error)
