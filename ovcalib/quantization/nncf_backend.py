"""INT8 by NNCF's default algorithm. The only module that imports nncf."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TextIO

import openvino as ov
from numpy.typing import NDArray

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.errors import ModelError, OvcalibError, require
from ovcalib.graph.editing import set_input_range, widen_channel_ranges
from ovcalib.graph.files import refuse_quantized_graph
from ovcalib.quantization.bias_correction import correct_biases
from ovcalib.quantization.rounding import compensated
from ovcalib.quantization.settings import Settings


@dataclass
class _Items:
    """What NNCF reads: a sized dataset of batch-1 inputs that can be gone through again, the same each time.

    Batches, generators and shuffling loaders are all read wrongly by NNCF without an error.
    """

    calibration: CalibrationSet
    tick: Callable[[int], None]
    seen: int = field(default=0)

    def __len__(self) -> int:
        return len(self.calibration)

    def __getitem__(self, index: int) -> NDArray[Any]:
        self.seen += 1
        self.tick(min(self.seen, len(self)))
        return self.calibration[index]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[i] for i in range(len(self)))


def quantize_default(
    graph: ov.Model,
    calibration: CalibrationSet,
    settings: Settings,
    tick: Callable[[int], None] = lambda done: None,
    log: TextIO | None = None,
    corrections: CalibrationSet | None = None,
) -> ov.Model:
    """INT8 by ranges over every image of the calibration set, with bias correction.

    The range of the network's input is that of pixels, where the images were made: it is known without any image.

    graph     float, batch 1, with named inputs and outputs; it stays as it is
    tick      receives the number of images read
    log       receives what NNCF prints
    corrections   images that biases are corrected on; None: all
    raises    ModelError where the graph is already quantized, or NNCF refuses it
    """
    refuse_quantized_graph(graph, graph.get_friendly_name())
    with _nncf(log) as nncf, _older_objects_left_alone():
        parameters = {
            "preset": {"performance": nncf.QuantizationPreset.PERFORMANCE, "mixed": nncf.QuantizationPreset.MIXED}[
                settings.preset
            ],
            "subset_size": len(calibration),
            "fast_bias_correction": settings.bias_correction == "fast",
            "model_type": nncf.ModelType.TRANSFORMER if settings.transformer else None,
            "ignored_scope": nncf.IgnoredScope(names=list(settings.ignored)) if settings.ignored else None,
        }

        advanced: dict[str, Any] = {}
        fix = {
            "disable": nncf.OverflowFix.DISABLE,
            "first-layer": nncf.OverflowFix.FIRST_LAYER,
            "enable": nncf.OverflowFix.ENABLE,
        }[settings.overflow_fix]
        estimators = nncf.quantization.range_estimator.RangeEstimatorParametersSet
        if settings.activation_ranges != "mean-min-max":  # named, it would be taken for channels too
            advanced["activations_range_estimator_params"] = {
                "min-max": estimators.MINMAX,
                "histogram": estimators.HISTOGRAM,
            }[settings.activation_ranges]
        if settings.transformer and not settings.smooth_quant:
            advanced["smooth_quant_alphas"] = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
        # Made anew for every call: nncf.quantize writes into the object that it is given.
        options = nncf.AdvancedQuantizationParameters(
            overflow_fix=fix, disable_bias_correction=settings.bias_correction in ("none", "layerwise"), **advanced
        )
        try:
            items = nncf.Dataset(_Items(calibration, tick))
            int8 = nncf.quantize(graph.clone(), items, advanced_parameters=options, **parameters)
            if calibration.input_range is not None:
                set_input_range(int8, *calibration.input_range)
            if settings.channel_headroom != 1:
                widen_channel_ranges(int8, settings.channel_headroom)
            return fit_weights(graph, int8, settings, corrections or calibration)
        except (OvcalibError, MemoryError):
            raise
        except Exception as error:  # NNCF raises its own types, re.error, RuntimeError and AttributeError
            lines = str(error).strip().splitlines()
            way_out = "Leave the operation at fault in float with `ignore`"
            if settings.smooth_quant:  # which heeds no ignored scope (nncf issue 4172)
                way_out = "Omit `smooth_quant=on`"
            raise ModelError(
                f"NNCF cannot quantize the model: {lines[0] if lines else type(error).__name__}. {way_out}."
            ) from error


def fit_weights(fp32: ov.Model, int8: ov.Model, settings: Settings, images: CalibrationSet) -> ov.Model:
    """Round the weights and correct the biases of a quantized graph as settings ask for."""
    if settings.rounding == "compensated":
        return compensated(fp32, [int8], images.inputs())[0]
    if settings.bias_correction == "layerwise":
        int8 = int8.clone()
        correct_biases(fp32, int8, images.inputs())
    return int8


@contextlib.contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Keep the garbage collector to objects made from here on.

    NNCF makes so many that the collector also walks everything that torch and OpenVINO brought along: a twentieth of
    the time on a small network.
    """
    if gc.get_freeze_count():  # by the application, whose objects we would thaw
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _nncf(log: TextIO | None) -> Iterator[ModuleType]:
    """NNCF with its output, which goes to stdout, led elsewhere."""
    # Importing NNCF makes torch look for a CUDA compiler, and complain.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    sink = log or io.StringIO()
    with contextlib.redirect_stdout(sink):
        nncf = require("nncf", "quantize", "Quantization")
        logger = logging.getLogger("nncf")
        # The handler of the first import keeps that import's stdout; ours follows every call.
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        handler = logging.StreamHandler(sink)
        logger.addHandler(handler)
        try:
            yield nncf
        finally:
            logger.removeHandler(handler)
