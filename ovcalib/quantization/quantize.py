"""From an FP32 graph and a calibration set to an INT8 graph, with the record of how it was made."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

import openvino as ov

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.evaluation.dataset import Images
from ovcalib.graph.reading import float_operations, layer_name, quantized_operations
from ovcalib.kernels import kernels_of
from ovcalib.progress import Progress
from ovcalib.quantization.accuracy_aware import restore_to_goal
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.selection import OutputError, guard_warning, operations_to_guard, select_settings
from ovcalib.quantization.settings import Settings, auto_fields
from ovcalib.records.options import QuantizationOptions
from ovcalib.records.result import Outcome, Quantization


@dataclass(frozen=True)
class Quantized:
    """An INT8 graph (batch 1), how it was made, how that ended, and what the user should know."""

    int8: ov.Model
    record: Quantization
    outcome: Outcome
    warnings: tuple[str, ...]


def quantize_graph(
    options: QuantizationOptions,
    settings: Settings,
    fp32: ov.Model,
    calibration: CalibrationSet,
    steering: Images | None,
    classification: bool,
    out_of_time: Callable[[], bool],
    progress: Progress,
    log: TextIO | None = None,
) -> Quantized:
    """Quantize a graph with the default algorithm and, where it is asked for, the accuracy-aware one.

    settings         what `resolve_settings` made of the options
    fp32             float, batch 1
    steering         the images of the accuracy-aware algorithm; None for the default one
    classification   outputs are class logits
    log              receives what NNCF prints
    raises           ModelError, DataError
    """
    began = time.monotonic()
    warnings = []
    kept = operations_to_guard(fp32, calibration, settings) if options.guard else []
    if kept:
        warnings.append(guard_warning(kept))
        settings = dataclasses.replace(settings, ignored=(*settings.ignored, *(operation.name for operation in kept)))
    with progress.task("calibrating", len(calibration)) as tick:
        make = functools.partial(quantize_default, fp32, calibration, tick=tick, log=log)
        error = OutputError(fp32, calibration)
        selected = select_settings(make, settings, auto_fields(options, settings), error)
    int8, settings, saturation = selected.int8, selected.settings, selected.saturation
    if saturation is not None and saturation.avoided:
        warnings.append(saturation.warning())
    outcome: Outcome = "done"
    reverted: tuple[str, ...] = ()
    restored = None
    if steering is not None:
        found, restored = restore_to_goal(options, fp32, int8, steering, classification, out_of_time, progress)
        int8, outcome, reverted = found.model, found.outcome, found.reverted
        if restored.metric == "agreement" and 2 * len(reverted) > len(restored.ranking):
            warnings.append(
                f"{len(reverted)} of {len(restored.ranking)} operations were reverted to float. Images that lie "
                "between classes cost agreement, but hardly accuracy: `metric=expected-top1`, labelled images or a "
                "larger `max_drop` keep more operations in INT8."
            )
    record = Quantization(
        mode=options.mode,
        preset=settings.preset,
        subset_size=len(calibration),
        overflow_fix=settings.overflow_fix,
        output_error=error.by_kernels(int8, kernels_of(options.deploy_isa)),
        saturation_nmse=(saturation.vnni, saturation.avx2) if saturation else None,
        halved_nmse=saturation.halved if saturation else None,
        deploy_isa=options.deploy_isa,
        activation_ranges=settings.activation_ranges,
        ranges_nmse=selected.ranges_nmse,
        bias_correction=settings.bias_correction,
        bias_nmse=selected.bias_nmse,
        transformer=settings.transformer,
        ignored=settings.ignored,
        guarded={layer_name(operation.name): round(operation.sqnr_db, 2) for operation in kept},
        input_range=calibration.input_range,
        int8_operations=len(quantized_operations(int8)),
        float_operations=len(float_operations(int8)),
        reverted=tuple(map(layer_name, reverted)),
        restoration=restored,
        seconds=round(time.monotonic() - began, 3),
    )
    return Quantized(int8, record, outcome, tuple(warnings))
