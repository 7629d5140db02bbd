"""Defaults chosen by measured output error.

Before quantizing, operations whose expected SQNR is too low are left in float. After it, settings that were left open
are compared by the error of the outputs against FP32 on held-out images of the calibration set: SmoothQuant, the range
estimator of activations, half or full range of the weights, and bias correction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Sequence
from functools import cached_property

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.split import Split
from ovcalib.errors import ModelError
from ovcalib.evaluation.metrics import nmse, nmse_by_item, ratio_interval
from ovcalib.graph.editing import before_softmax, float_activations, restore_biases
from ovcalib.graph.reading import layer_name
from ovcalib.kernels import is_emulated, outputs_on, without_saturation
from ovcalib.progress import Progress
from ovcalib.quantization.expected_noise import MIN_SQNR_DB, Expected, below_sqnr_limit, expected_sqnr
from ovcalib.quantization.rounding import compensated
from ovcalib.quantization.settings import Settings
from ovcalib.records.result import Kernels, KernelsError
from ovcalib.runtime import outputs_of

# Images of the calibration set from which the expected SQNR is computed.
GUARD_IMAGES = 8
# Up to this error the means of the images' extremes are not tried: there is little that better ranges could give back.
SUSPECT_NMSE = 0.001
# Smaller errors of an image are none, and larger ones may be infinite; their logarithms say nothing.
LEAST_NMSE, MOST_NMSE = 1e-12, 1e12
# Sums saturate where the error on the kernels of AVX2 is larger by more than this share: by a hundredth it differs
# without, see ovcalib.kernels.
SATURATED_SHARE = 0.1
# Before rounding half of that share counts: compensation takes a half of the rest of the error away, or more.
SHARE_BEFORE_ROUNDING = SATURATED_SHARE / 2
# Operations that a warning names.
NAMED_OPERATIONS = 4


def expected_operations(fp32: ov.Model, calibration: CalibrationSet, settings: Settings) -> list[Expected]:
    """What INT8 will make of each operation, the lowest SQNR first."""
    return expected_sqnr(fp32, calibration.inputs(last=GUARD_IMAGES), settings.channel_headroom)


def operations_to_guard(expected: Sequence[Expected], settings: Settings) -> list[Expected]:
    """The operations below the SQNR limit, the lowest first, without those that are ignored anyway."""
    return [operation for operation in below_sqnr_limit(expected) if operation.name not in settings.ignored]


def guard_warning(kept: Sequence[Expected]) -> str:
    """Why operations stay in float; `kept` has at least one, the lowest SQNR first."""
    named = [
        f"{layer_name(op.name)} ({op.sqnr_db:.0f} dB, {'weights' if op.weights_share > 0.5 else 'activations'})"
        for op in kept[:NAMED_OPERATIONS]
    ]
    more = len(kept) - len(named)
    return (
        f"{len(kept)} operations stay in float, because their expected SQNR in INT8 is below {MIN_SQNR_DB:.0f} dB: a "
        f"few channels or weights are far larger than the others: {', '.join(named)}"
        f"{f' and {more} more' if more else ''}. `guard=False` quantizes them."
    )


def compared_outputs(graph: ov.Model, inputs: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Outputs [N, K] as models are compared by: before a final Softmax, in arithmetic that does not saturate.

    That arithmetic is emulated in float32: the same on every CPU, so that what is chosen does not depend on the CPU
    that it is chosen on.
    """
    return outputs_of(without_saturation(before_softmax(graph)), inputs)


class OutputError:
    """The error of INT8 models against FP32 on images that they were not made from, see `compared_outputs`.

    inputs   of the network, float32 [1, C, H, W] each
    raises   ModelError where FP32 itself gives outputs that are not finite; those of INT8 are an infinite error
    """

    def __init__(self, fp32: ov.Model, inputs: Sequence[NDArray[np.float32]]) -> None:
        self.fp32, self.inputs = fp32, inputs

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        outputs = compared_outputs(self.fp32, self.inputs)
        if broken := int((~np.isfinite(outputs)).any(axis=1).sum()):
            raise ModelError(
                f"FP32 gives NaN or infinite outputs for {broken} of {len(outputs)} calibration images, so "
                "INT8 cannot be compared with it. Check the model and its preprocessing, or calibrate on other images."
            )
        return outputs

    def by_image(self, int8: ov.Model) -> NDArray[np.float64]:
        """What each image adds to the NMSE of the outputs where no sum saturates, float64 [N]; see `nmse_by_item`."""
        return nmse_by_item(self.reference, compared_outputs(int8, self.inputs))

    def nmse(self, int8: ov.Model) -> float:
        """NMSE of the outputs where no sum saturates."""
        return float(self.by_image(int8).mean())

    def on(self, kernels: Kernels, int8: ov.Model) -> float:
        """NMSE of the outputs on some kernels, executed where this CPU has them. Raises KernelsFailedError."""
        return nmse(self.reference, outputs_on(kernels, before_softmax(int8), self.inputs))

    def by_kernels(self, int8: ov.Model, wanted: Sequence[Kernels]) -> tuple[KernelsError, ...]:
        """NMSE of the outputs on each of several kernels."""
        return tuple(kernels_error(kernels, self.on(kernels, int8)) for kernels in wanted)


class WeightError(OutputError):
    """The error that is left when INT8 models compute in float, of their weights alone."""

    def by_image(self, int8: ov.Model) -> NDArray[np.float64]:
        return super().by_image(float_activations(int8))


def kernels_error(kernels: Kernels, error: float) -> KernelsError:
    return KernelsError(kernels=kernels, nmse=error, emulated=is_emulated(kernels))


@dataclasses.dataclass(frozen=True)
class QuantizedCandidate:
    """An INT8 model and the settings that made it; its error is measured once."""

    int8: ov.Model
    settings: Settings
    output: OutputError

    @cached_property
    def errors(self) -> NDArray[np.float64]:
        return self.output.by_image(self.int8)

    @property
    def error(self) -> float:
        return float(self.errors.mean())

    @cached_property
    def error_on_avx2(self) -> float:
        return self.output.on("avx2", self.int8)

    def saturates(self, share: float) -> bool:
        """Whether sums saturate on the kernels of AVX2, and cost more than a share of the error there."""
        return self.error_on_avx2 > (1 + share) * self.error

    @property
    def larger_error(self) -> float:
        """The error on the kernels where it is larger."""
        return max(self.error, self.error_on_avx2)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """An INT8 model after rounding and bias correction were settled, and the errors that they were chosen by.

    rounding_nmse   NMSE of the outputs with rounding to the nearest level and with compensation; None: not compared
    bias_nmse       with the correction of biases and without it; None: not compared
    """

    best: QuantizedCandidate
    rounding_nmse: tuple[float, float] | None = None
    bias_nmse: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class RangesCompared:
    """The extremes over all images as activation ranges, and the mean of each image's extremes.

    nmse    NMSE of the outputs with the extremes and with the mean, on held-out images
    ratio   the error of an image with the mean over that with the extremes: geometric mean over all calibration images,
            and its 95 % interval
    """

    nmse: tuple[float, float]
    ratio: tuple[float, float, float]

    @property
    def mean_is_better(self) -> bool:
        # An output that is not finite is worse than any error, though it be that of one image.
        return self.ratio[2] < 1 or self.nmse[1] < self.nmse[0] == math.inf


@dataclasses.dataclass(frozen=True)
class Saturation:
    """NMSE of the outputs of an INT8 model.

    vnni     where sums do not saturate
    avx2     on the kernels of AVX2
    halved   the larger of both with half the range of weights, which does not saturate; None where the full one does
             not either
    """

    vnni: float
    avx2: float
    halved: float | None

    @property
    def avoided(self) -> bool:
        """Half the range has the smaller error: where it was tried, the full one has its larger error on AVX2."""
        return self.halved is not None and self.halved < self.avx2

    def warning(self) -> str:
        return (
            f"All weights use half of their range (output NMSE {self.halved:.2g}), because sums of products saturate "
            f"on CPUs without VNNI (NMSE {self.avx2:.2g} there, {self.vnni:.2g} with VNNI). Where the model will run "
            "on VNNI, AMX, a GPU or an NPU, name it with `deploy_isa`."
        )


@dataclasses.dataclass(frozen=True)
class Selection:
    """An INT8 model, its settings, and the errors that they were chosen by; None where there was nothing to choose.

    smooth_nmse   see `select_smooth_quant`
    ranges        see `select_activation_ranges`
    saturation    see `select_weight_range`
    rounding_nmse, bias_nmse   see `Fitted`
    """

    int8: ov.Model
    settings: Settings
    smooth_nmse: tuple[float, float] | None
    ranges: RangesCompared | None
    saturation: Saturation | None
    rounding_nmse: tuple[float, float] | None
    bias_nmse: tuple[float, float] | None


def select_settings(
    quantize: Callable[[Settings], ov.Model],
    settings: Settings,
    auto: Container[str],
    output: OutputError,
    parts: Split,
    progress: Progress,
) -> Selection:
    """Quantize, and replace settings that were left open where the output error is smaller with others.

    quantize   makes the INT8 model of settings
    auto       of "smooth_quant", "activation_ranges", "overflow_fix", "rounding" and "bias_correction" those that were
               left open
    output     the error on `parts.choices`
    """

    def make(settings: Settings) -> QuantizedCandidate:
        return QuantizedCandidate(quantize(settings), settings, output)

    best = make(settings)
    smooth_nmse = ranges = saturation = None
    if "smooth_quant" in auto:
        best, smooth_nmse = select_smooth_quant(best, make)
    if "activation_ranges" in auto:
        seen = OutputError(output.fp32, parts.corrections.inputs()) if parts.fresh else None
        best, ranges = select_activation_ranges(best, make, seen)
    candidates = [best]
    if "overflow_fix" in auto and best.saturates(SHARE_BEFORE_ROUNDING):
        candidates.append(make(halved(best.settings)))
    if "rounding" in auto:
        fitted = select_rounding(candidates, parts.corrections, progress)
    else:
        fitted = [Fitted(candidate) for candidate in candidates]
    if "bias_correction" in auto:
        fitted = list(map(select_bias_correction, fitted))
    found = fitted[0]
    if "overflow_fix" in auto:
        found, saturation = select_weight_range(found, fitted[1] if len(fitted) > 1 else None)
    int8, chosen = found.best.int8, found.best.settings
    return Selection(int8, chosen, smooth_nmse, ranges, saturation, found.rounding_nmse, found.bias_nmse)


Make = Callable[[Settings], QuantizedCandidate]


def halved(settings: Settings) -> Settings:
    """The same with half the range of all weights."""
    return dataclasses.replace(settings, overflow_fix="enable")


def select_smooth_quant(plain: QuantizedCandidate, make: Make) -> tuple[QuantizedCandidate, tuple[float, float] | None]:
    """Use SmoothQuant where the output error is smaller with it.

    It serves where a few channels are far larger than the others, and costs where the weights then have them.
    returns   the better one, and NMSE without it and with it; None where NNCF fails with it, as on some shared weights
    """
    try:
        smooth = make(dataclasses.replace(plain.settings, smooth_quant=True))
    except ModelError:
        return plain, None
    return smooth if smooth.error < plain.error else plain, (plain.error, smooth.error)


def select_activation_ranges(
    extremes: QuantizedCandidate, make: Make, seen: OutputError | None
) -> tuple[QuantizedCandidate, RangesCompared | None]:
    """Use the mean of each image's extremes where a few images widen the extremes over all images too far.

    Activations beyond their range are clipped, which costs more than coarser levels: on most CIFAR-10 networks, NNCF's
    mean has 2 to 20 times the NMSE of the extremes. But values far beyond all others leave those few levels. Coarse
    levels cost on every image, and clipping much on few, which the images can have or lack. So the mean has to be
    better image by image, whatever the loudest ones do to the NMSE. Images that the ranges were taken from count as
    well: the extremes clip nothing of them, so these favour the extremes.
    seen      the error on images that ranges were taken from; None where those of the candidates are these
    returns   the better one, and how they compare; None where the mean was not tried
    """

    def by_image(candidate: QuantizedCandidate) -> NDArray[np.float64]:
        errors = candidate.errors if seen is None else np.append(candidate.errors, seen.by_image(candidate.int8))
        return np.clip(errors, LEAST_NMSE, MOST_NMSE)

    if extremes.error <= SUSPECT_NMSE or len(extremes.errors) < 2:
        return extremes, None
    mean = make(dataclasses.replace(extremes.settings, activation_ranges="mean-min-max"))
    compared = RangesCompared((extremes.error, mean.error), ratio_interval(by_image(mean), by_image(extremes)))
    return mean if compared.mean_is_better else extremes, compared


def select_rounding(
    nearest: Sequence[QuantizedCandidate], corrections: CalibrationSet, progress: Progress
) -> list[Fitted]:
    """Use compensated rounding where the output error is smaller with it.

    nearest       models that differ in their weights alone
    corrections   images that integers and biases are fitted on
    returns       the better one of each
    """
    output = nearest[0].output
    plainly = [candidate.int8 for candidate in nearest]
    with progress.task("rounding weights", 100, "`rounding=nearest`.") as tick:
        rounded = compensated(output.fp32, plainly, corrections.inputs(), tick=lambda share: tick(100 * share))
    fitted = []
    for plain, int8 in zip(nearest, rounded, strict=True):
        other = QuantizedCandidate(int8, dataclasses.replace(plain.settings, rounding="compensated"), output)
        best = other if other.error < plain.error else plain
        fitted.append(Fitted(best, rounding_nmse=(plain.error, other.error)))
    return fitted


def select_bias_correction(fitted: Fitted) -> Fitted:
    """Omit bias correction where weights are rounded to the nearest and the output error is smaller without it.

    A shift does not compensate an error that grows with the activation, and on few images it is noisy.
    """
    corrected = fitted.best
    if corrected.settings.rounding != "nearest":
        return fitted
    output = corrected.output
    settings = dataclasses.replace(corrected.settings, bias_correction="none")
    plain = QuantizedCandidate(restore_biases(corrected.int8, output.fp32), settings, output)
    best = plain if plain.error < corrected.error else corrected
    return dataclasses.replace(fitted, best=best, bias_nmse=(corrected.error, plain.error))


def select_weight_range(full: Fitted, half: Fitted | None) -> tuple[Fitted, Saturation]:
    """Use half the range of weights where sums saturate on the kernels of AVX2, and cost more there.

    They are compared as they will be, rounded: compensation gives back most of what half the range costs.
    half      None where the sums of the full range did not saturate before rounding
    returns   the better one where its error is larger, and what was measured
    raises    KernelsFailedError
    """
    errors = full.best.error, full.best.error_on_avx2
    if half is None or not full.best.saturates(SATURATED_SHARE):
        return full, Saturation(*errors, None)
    saturation = Saturation(*errors, half.best.larger_error)
    return half if saturation.avoided else full, saturation
