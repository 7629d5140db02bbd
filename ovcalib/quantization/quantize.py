"""Quantization of an FP32 graph with a calibration set, and its record."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.split import Split, split
from ovcalib.evaluation.dataset import Images
from ovcalib.evaluation.outputs import Outputs
from ovcalib.graph.editing import float_activations
from ovcalib.graph.reading import float_operations, layer_name, quantized_operations
from ovcalib.kernels import host_kernels, kernels_of, without_saturation
from ovcalib.progress import Progress
from ovcalib.quantization.accuracy_aware import restore_to_goal
from ovcalib.quantization.equalization import equalize
from ovcalib.quantization.expected_noise import Expected
from ovcalib.quantization.latency_search import faster_in_float, speed_warnings
from ovcalib.quantization.low_bits import Bits, simulate
from ovcalib.quantization.nncf_backend import fit_weights, quantize_default
from ovcalib.quantization.selection import (
    OutputError,
    Selection,
    WeightError,
    compared_outputs,
    expected_operations,
    guard_warning,
    halved,
    operations_to_guard,
    select_settings,
)
from ovcalib.quantization.settings import Settings, auto_fields
from ovcalib.records.model import Task
from ovcalib.records.options import QuantizationOptions
from ovcalib.records.result import NOTHING, Equalized, FineTuning, Outcome, Quantization

# Network inputs, float32 [1, C, H, W] each, by the source that made them.
Judges = Mapping[str, Sequence[NDArray[np.float32]]]


@dataclass(frozen=True)
class Quantized:
    """An INT8 graph, how it was made, how that ended, and what the user should know.

    fp32   the float graph that it was made from: the one given, or an equalized one that computes the same
    """

    fp32: ov.Model
    int8: ov.Model
    record: Quantization
    outcome: Outcome
    warnings: tuple[str, ...]


def saturates_here(settings: Settings, options: QuantizationOptions) -> bool:
    """Whether sums can saturate on this CPU, but not on a machine that the model is for."""
    full_range = settings.overflow_fix != "enable"
    return full_range and host_kernels() == "avx2" and "vnni" in kernels_of(options.deploy_isa)


@dataclass(frozen=True)
class Attempt:
    """A float graph, equalized or not, and its INT8 graph.

    expected   of every operation; empty without the guard
    kept       operations that stay in float, because their expected SQNR is too low
    """

    source: ov.Model
    equalized: tuple[Equalized, ...]
    expected: list[Expected]
    kept: list[Expected]
    output: OutputError
    selected: Selection

    @functools.cached_property
    def error(self) -> float:
        return self.output.nmse(self.selected.int8)


def in_execution_order(graph: ov.Model, expected: Sequence[Expected]) -> dict[str, float]:
    """Expected SQNR in dB by layer, as the record has it."""
    by_name = {operation.name: operation.sqnr_db for operation in expected}
    order = (op.get_friendly_name() for op in graph.get_ordered_ops())
    return {layer_name(name): round(by_name[name], 2) for name in order if name in by_name}


def calibrate(
    settings: Settings, auto: frozenset[str], output: OutputError, parts: Split, progress: Progress, log: TextIO | None
) -> Selection:
    """The INT8 graph of the float one that `output` compares with, and its settings; see `select_settings`."""
    with progress.task("calibrating", len(parts.ranges), "fewer images (`num_samples`).") as tick:
        make = functools.partial(
            quantize_default, output.fp32, parts.ranges, corrections=parts.corrections, tick=tick, log=log
        )
        return select_settings(make, settings, auto, output, parts, progress)


def quantize_graph(
    options: QuantizationOptions,
    settings: Settings,
    fp32: ov.Model,
    calibration: CalibrationSet,
    steering: Images | None,
    task: Task,
    out_of_time: Callable[[], bool],
    progress: Progress,
    log: TextIO | None = None,
    steering_reference: Outputs | None = None,
    device: str = "CPU",
    judges: Judges | None = None,
) -> Quantized:
    """Quantize a graph with the default algorithm and, where it is asked for, the accuracy-aware one; or weights alone.

    settings         what `resolve_settings` made of the options
    fp32             float, batch 1
    steering         the images of the accuracy-aware algorithm; None for the default one
    task             what the outputs are
    log              receives what NNCF prints
    steering_reference   outputs of FP32 on the steering images, where they are known
    device           on which operations are timed, where options ask for that
    judges           images of other sources than the calibration images, which judge fine-tuning as well
    raises           ModelError, DataError, DeviceError
    """
    if options.mode == "weight-only":
        return weights_only(options, settings, fp32, calibration, progress, log)
    if options.mode == "simulated":
        return simulated(options, settings, fp32, calibration, out_of_time, progress, log, judges)
    began = time.monotonic()
    warnings = []
    parts = split(calibration)

    def attempt(source: ov.Model, equalized: tuple[Equalized, ...] = ()) -> Attempt:
        expected = expected_operations(source, calibration, settings) if options.guard else []
        kept = operations_to_guard(expected, settings)
        ignored = *settings.ignored, *(operation.name for operation in kept)
        output = OutputError(source, parts.choices.inputs())
        chosen = dataclasses.replace(settings, ignored=ignored)
        selected = calibrate(chosen, auto_fields(options, settings), output, parts, progress, log)
        return Attempt(source, equalized, expected, kept, output, selected)

    best = attempt(*equalize(fp32)) if options.equalize == "on" else attempt(fp32)
    equalization_nmse = None
    if options.equalize == "auto" and best.kept:
        other = attempt(*equalize(fp32))
        if other.equalized:
            equalization_nmse = best.error, other.error
            best = other if other.error <= best.error else best
    int8, settings = best.selected.int8, best.selected.settings
    ranges, saturation = best.selected.ranges, best.selected.saturation
    if settings.bias_correction in ("fast", "full") and saturates_here(settings, options):
        warnings.append(
            f"NNCF's {settings.bias_correction} bias correction ran on this CPU, whose sums of products saturate with "
            "full-range weights, unlike those of the machine that the model is for. Use `bias_correction=layerwise`."
        )
    if best.kept:
        warnings.append(guard_warning(best.kept))
    if saturation is not None and saturation.avoided:
        warnings.append(saturation.warning())
    tuning = None
    if options.finetune:
        wanted = kernels_of(options.deploy_isa)

        def error(output: OutputError, graph: ov.Model) -> float:
            return max(output.on(kernels, graph) for kernels in wanted)

        start = best.selected
        if options.overflow_fix == "auto" and "avx2" in wanted and settings.overflow_fix != "enable":
            # Narrower ranges of activations, which are learned, saturate sooner. Learning gives back what half the
            # range of weights costs (benchmarks/results/finetuning.md).
            start = calibrate(halved(settings), frozenset(), best.output, parts, progress, log)
        steps = options.finetune_steps
        int8, tuning = finetuned(best.output, int8, start.int8, parts, steps, judges, error, out_of_time, progress)
        settings = start.settings if tuning.kept else settings
        warnings += tuning_warnings(tuning)
    outcome: Outcome = "done"
    reverted: tuple[str, ...] = ()
    restored = None
    if steering is not None:
        found, restored = restore_to_goal(
            options, best.source, int8, steering, task, out_of_time, progress, steering_reference
        )
        int8, outcome, reverted = found.model, found.outcome, found.reverted
        if restored.metric == "agreement" and 2 * len(reverted) > len(restored.ranking):
            warnings.append(
                f"{len(reverted)} of {len(restored.ranking)} operations were reverted to float. Images that lie "
                "between classes cost agreement, but hardly accuracy: `metric=expected-top1`, labelled images or a "
                "larger `max_drop` keep more operations in INT8."
            )
    speed = None
    if options.optimize_for == "latency":
        int8, speed = faster_in_float(int8, best.source, best.output.nmse, device, progress)
        warnings += speed_warnings(speed, options.deploy_isa)
    record = Quantization(
        mode=options.mode,
        preset=settings.preset,
        subset_size=len(parts.ranges),
        images=parts.record(),
        overflow_fix=settings.overflow_fix,
        output_error=best.output.by_kernels(int8, kernels_of(options.deploy_isa)),
        saturation_nmse=(saturation.vnni, saturation.avx2) if saturation else None,
        halved_nmse=saturation.halved if saturation else None,
        deploy_isa=options.deploy_isa,
        activation_ranges=settings.activation_ranges,
        channel_headroom=settings.channel_headroom,
        smooth_quant=settings.smooth_quant,
        smooth_nmse=best.selected.smooth_nmse,
        ranges_nmse=ranges.nmse if ranges else None,
        ranges_ratio=ranges.ratio if ranges else None,
        rounding=settings.rounding,
        rounding_nmse=best.selected.rounding_nmse,
        bias_correction=settings.bias_correction,
        bias_nmse=best.selected.bias_nmse,
        transformer=settings.transformer,
        ignored=settings.ignored,
        equalized=best.equalized,
        equalization_nmse=equalization_nmse,
        expected_sqnr=in_execution_order(best.source, best.expected),
        guarded={layer_name(operation.name): round(operation.sqnr_db, 2) for operation in best.kept},
        input_range=calibration.input_range,
        int8_operations=len(quantized_operations(int8)),
        float_operations=len(float_operations(int8)),
        reverted=tuple(map(layer_name, reverted)),
        restoration=restored,
        finetuning=tuning,
        speed=speed,
        seconds=round(time.monotonic() - began, 3),
    )
    return Quantized(best.source, int8, record, outcome, tuple(warnings))


def finetuned(
    output: OutputError,
    before: ov.Model,
    start: ov.Model,
    parts: Split,
    steps: int,
    judges: Judges | None,
    error: Callable[[OutputError, ov.Model], float],
    out_of_time: Callable[[], bool],
    progress: Progress,
) -> tuple[ov.Model, FineTuning]:
    """A quantized graph, or what fine-tuning makes of `start` where that has the smaller error.

    A network that learns from images which look like no others, such as noise, can get better on more of them and worse
    on photographs. So it must not get worse on images of other sources either.

    error   of a graph by its outputs on some images
    """
    from ovcalib.quantization.finetuning import finetune

    began = time.monotonic()
    learned_from = parts.ranges.inputs()
    with progress.task("fine-tuning", steps, "a limit (`max_time`).") as tick:
        after, made = finetune(output.fp32, start, learned_from, steps, tick=tick, out_of_time=out_of_time)
    first, second = error(output, before), error(output, after)
    judged = {}
    for source, images in (judges or {}).items():
        # Images on which FP32 itself is not finite tell nothing, and the user did not give them.
        outputs = compared_outputs(output.fp32, images)
        finite = [image for image, found in zip(images, outputs, strict=True) if np.isfinite(found).all()]
        if finite:
            judge = OutputError(output.fp32, finite)
            judged[source] = error(judge, before), error(judge, after)
    kept = second < first and all(second <= first for first, second in judged.values())
    record = FineTuning(
        steps=made, images=len(learned_from), nmse=(first, second),
        judged_nmse=judged, kept=kept, seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip
    return after if kept else before, record


def tuning_warnings(tuning: FineTuning) -> list[str]:
    """What a user should know of fine-tuning that was asked for."""
    if tuning.kept:
        return []
    return [
        "Fine-tuning did not reduce the output error on held-out calibration images, or increased it on images of "
        "another source, so the model is as it was without."
    ]


def simulated(
    options: QuantizationOptions,
    settings: Settings,
    fp32: ov.Model,
    calibration: CalibrationSet,
    out_of_time: Callable[[], bool],
    progress: Progress,
    log: TextIO | None = None,
    judges: Judges | None = None,
) -> Quantized:
    """A graph that computes in float on the levels that weights and activations of fewer bits have."""
    began = time.monotonic()
    parts = split(calibration)
    warnings = [
        f"{options.weight_bits} bits of weights and {options.activation_bits} of activations are simulated: the model "
        "computes in float on their levels, and has the size and the speed of float."
    ]
    output = OutputError(fp32, parts.choices.inputs())
    bits = Bits(options.weight_bits, options.activation_bits, options.edges)
    plain = dataclasses.replace(settings, overflow_fix="disable", rounding="nearest", bias_correction="none")
    with progress.task("calibrating", len(parts.ranges), "fewer images (`num_samples`).") as tick:
        int8 = quantize_default(fp32, parts.ranges, plain, tick=tick, log=log)
    coarse = simulate(fp32, int8, bits, parts.ranges.inputs())
    selected = select_settings(
        lambda asked: fit_weights(fp32, coarse, asked, parts.corrections), settings,
        auto_fields(options, settings) & {"rounding", "bias_correction"}, output, parts, progress,
    )  # fmt: skip
    graph, tuning = selected.int8, None
    if options.finetune:
        steps = options.finetune_steps
        graph, tuning = finetuned(output, graph, graph, parts, steps, judges, OutputError.nmse, out_of_time, progress)
        warnings += tuning_warnings(tuning)
    chosen = selected.settings
    record = Quantization(
        mode=options.mode, weight_bits=bits.weights, activation_bits=bits.activations, edges=bits.edges,
        preset=settings.preset, subset_size=len(parts.ranges), images=parts.record(), overflow_fix=NOTHING,
        deploy_isa=options.deploy_isa, activation_ranges=settings.activation_ranges, rounding=chosen.rounding,
        rounding_nmse=selected.rounding_nmse, bias_correction=chosen.bias_correction, bias_nmse=selected.bias_nmse,
        transformer=settings.transformer, ignored=settings.ignored, input_range=calibration.input_range,
        int8_operations=len(quantized_operations(graph)), float_operations=len(float_operations(graph)), reverted=(),
        restoration=None, finetuning=tuning, seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip
    return Quantized(fp32, without_saturation(graph), record, "done", tuple(warnings))


def weights_only(
    options: QuantizationOptions,
    settings: Settings,
    fp32: ov.Model,
    calibration: CalibrationSet,
    progress: Progress,
    log: TextIO | None = None,
) -> Quantized:
    """A graph that computes in float, with weights in 8 bits: those of an INT8 graph whose sums cannot saturate."""
    began = time.monotonic()
    parts = split(calibration)
    selected = calibrate(
        dataclasses.replace(settings, overflow_fix="disable"),
        auto_fields(options, settings) & {"rounding", "bias_correction"},
        WeightError(fp32, parts.choices.inputs()), parts, progress, log,
    )  # fmt: skip
    graph, chosen = float_activations(selected.int8), selected.settings
    record = Quantization(
        mode=options.mode, preset=NOTHING, subset_size=len(parts.ranges), images=parts.record(), overflow_fix=NOTHING,
        deploy_isa=options.deploy_isa, activation_ranges=NOTHING, rounding=chosen.rounding,
        rounding_nmse=selected.rounding_nmse, bias_correction=chosen.bias_correction, bias_nmse=selected.bias_nmse,
        transformer=settings.transformer, ignored=settings.ignored, int8_operations=0,
        float_operations=len(float_operations(graph)), reverted=(), restoration=None,
        seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip
    return Quantized(fp32, graph, record, "done", ())
