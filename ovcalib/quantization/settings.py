"""The settings of a quantization, resolved from options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import openvino as ov

from ovcalib.errors import UsageError
from ovcalib.graph.reading import match_operations
from ovcalib.kernels import host_kernels
from ovcalib.records.options import (
    ActivationRanges,
    BiasCorrection,
    DeployISA,
    OverflowFix,
    Preset,
    QuantizationOptions,
    RoundingMode,
)

# Without a 32-bit INT8 dot product, products are summed in 16 bits, where full-range weights overflow: "enable" halves
# the range of all weights. "first-layer" halves the first layer's, whose unsigned input is where it happens most; it is
# NNCF's own default and the compromise for a machine nobody named.
OVERFLOW_FIX: dict[str, OverflowFix] = {
    "any": "first-layer",
    "avx2": "enable",
    "avx512": "enable",
    "vnni": "disable",
    "amx": "disable",
    "gpu": "disable",
    "npu": "disable",
}

# The extremes of one channel over a few dozen images are soon exceeded by others, and what is clipped costs more than
# coarser levels. A tensor's extremes, over all of its channels, are hardly ever exceeded. Larger factors go on reducing
# the error of EfficientNet-Lite0, but raise MobileNetV2's (benchmarks/results/settings.md, "Headroom").
CHANNEL_HEADROOM = 1.5


@dataclass(frozen=True)
class Settings:
    """How to quantize, fully resolved.

    activation_ranges   of a tensor that has one: "min-max", the extremes over all images; "mean-min-max", the mean of
                        each image's extremes, as is NNCF's default; "histogram", what leaves a histogram of all
                        values the least error. Those of single channels are extremes with each of them
    channel_headroom    factor on the ranges of single channels, which the inputs of depthwise convolutions have
    bias_correction     "none"; "fast" and "full" by NNCF; "layerwise" by ovcalib.quantization.bias_correction
    rounding            "nearest", as NNCF has it, or "compensated", by ovcalib.quantization.rounding, which solves the
                        biases along with it
    transformer         attention is there: the mixed preset applies
    smooth_quant        large channels of the inputs of matrix products move into their weights, as NNCF has it
    ignored             friendly names of operations that stay in float
    """

    preset: Preset = "performance"
    overflow_fix: OverflowFix = "first-layer"
    activation_ranges: ActivationRanges = "min-max"
    channel_headroom: float = 1.0
    bias_correction: BiasCorrection = "layerwise"
    rounding: RoundingMode = "nearest"
    transformer: bool = False
    smooth_quant: bool = False
    ignored: tuple[str, ...] = ()


def resolve_overflow_fix(asked: OverflowFix | Literal["auto"], deploy_isa: DeployISA) -> OverflowFix:
    """The overflow fix for the machine that the model is deployed on; the machine here counts only for "host"."""
    if asked != "auto":
        return asked
    if deploy_isa == "host":
        return "disable" if host_kernels() == "vnni" else "enable"
    return OVERFLOW_FIX[deploy_isa]


def has_attention(graph: ov.Model) -> bool:
    """Whether a Softmax feeds a matrix product of two activations, or the graph has fused attention."""
    for op in graph.get_ops():
        if op.get_type_name() == "ScaledDotProductAttention":
            return True
        if op.get_type_name() == "Softmax":
            readers = [t.get_node() for t in op.output(0).get_target_inputs()]
            if any(r.get_type_name() == "MatMul" for r in readers):
                return True
    return False


def resolve_settings(options: QuantizationOptions, graph: ov.Model) -> Settings:
    """The settings that options come to for a graph.

    raises   UnknownNameError for a pattern of `ignore` that matches no operation, UsageError for SmoothQuant without
             attention
    """
    transformer = has_attention(graph) if options.model_type == "auto" else options.model_type == "transformer"
    if options.smooth_quant == "on" and not transformer:
        raise UsageError(
            "`smooth_quant=on` expects a transformer, and this model has no attention. Omit it, or pass "
            "`model_type=transformer`."
        )
    ignored = [op.get_friendly_name() for ops in match_operations(graph, options.ignore).values() for op in ops]
    return Settings(
        preset=options.preset or ("mixed" if transformer else "performance"),
        overflow_fix=resolve_overflow_fix(options.overflow_fix, options.deploy_isa),
        activation_ranges="min-max" if options.activation_ranges == "auto" else options.activation_ranges,
        channel_headroom=CHANNEL_HEADROOM if options.activation_ranges == "auto" else 1.0,
        rounding="compensated" if options.rounding == "compensated" else "nearest",
        bias_correction="layerwise" if options.bias_correction == "auto" else options.bias_correction,
        transformer=transformer,
        smooth_quant=options.smooth_quant == "on",
        ignored=tuple(dict.fromkeys(ignored)),
    )


def auto_fields(options: QuantizationOptions, settings: Settings) -> frozenset[str]:
    """The settings that are selected by their output error, because the options leave them open."""
    wanted = {
        "smooth_quant": options.smooth_quant == "auto" and settings.transformer,
        "activation_ranges": options.activation_ranges == "auto",
        "overflow_fix": options.overflow_fix == "auto" and options.deploy_isa == "any",
        "rounding": options.rounding == "auto" and options.bias_correction in ("auto", "layerwise"),
        "bias_correction": options.bias_correction == "auto" and options.rounding != "compensated",
    }
    return frozenset(name for name, auto in wanted.items() if auto)
