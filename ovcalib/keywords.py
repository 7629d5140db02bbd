"""Keywords of the public functions. Written by `python -m ovcalib.records.schema` from the option groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict


class InputKeywords(TypedDict, total=False):
    input_shape: tuple[int, int, int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    short_side: int | None
    crop_share: float | None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None
    channel_order: Literal["RGB", "BGR"] | None
    task: Literal["auto", "classification", "segmentation", "dense"]


class LoadKeywords(InputKeywords, total=False):
    weights: str | None
    trust_remote_code: bool


class QuantizeKeywords(LoadKeywords, total=False):
    dynamic_batch: bool
    num_samples: int | None
    seed: int
    options: Mapping[str, object]
    preview: bool
    keep_images: bool
    mode: Literal["default", "accuracy-aware", "weight-only", "simulated"]
    weight_bits: int
    activation_bits: int
    edges: Literal["academic", "full"]
    search: bool
    preset: Literal["performance", "mixed"] | None
    deploy_isa: Literal["any", "host", "avx2", "avx512", "vnni", "amx", "gpu", "npu"]
    overflow_fix: Literal["auto", "disable", "first-layer", "enable"]
    activation_ranges: Literal["auto", "min-max", "mean-min-max", "histogram"]
    bias_correction: Literal["auto", "none", "fast", "full", "layerwise"]
    rounding: Literal["auto", "nearest", "compensated"]
    smooth_quant: Literal["auto", "on", "off"]
    guard: bool
    equalize: Literal["auto", "on", "off"]
    finetune: bool
    finetune_steps: int
    optimize_for: Literal["size", "latency"]
    model_type: Literal["auto", "cnn", "transformer"]
    ignore: Sequence[str]
    metric: Literal["top1", "agreement", "expected-top1", "nmse"] | None
    max_drop: float
    validate_on: str | None
    max_time: float | None
    max_iterations: int | None
    limit: int | None
    metric_function: str | None
    allow_overlap: bool
    download: bool
    device: str
    benchmark_time: float


class GenerateKeywords(LoadKeywords, total=False):
    seed: int
    options: Mapping[str, object]
    preview: bool
    score: bool
    format: Literal["npz", "imagefolder", "datumaro"]
    download: bool


class ConvertKeywords(LoadKeywords, total=False):
    dynamic_batch: bool
    to: Sequence[Literal["onnx", "ir"]]
    fp16: bool


class EvaluateKeywords(LoadKeywords, total=False):
    limit: int | None
    download: bool
    device: str
    precision: Literal["f32", "f16", "bf16", "default"]


class BenchmarkKeywords(InputKeywords, total=False):
    device: Sequence[str]
    hint: Sequence[Literal["latency", "throughput"]]
    precision: Sequence[Literal["default", "f32", "f16", "bf16"]]
    seconds: float
    batch: int
    api: Literal["sync", "async"] | None
    streams: int | None
    threads: int | None
    requests: int | None
    data: str | None
    limit: int | None
    min_agreement: float
    counters: bool


class DiagnoseKeywords(InputKeywords, total=False):
    data: str | None
    calib: Sequence[str]
    num_samples: int
    limit: int | None
    max_drop: float
    device: str
    benchmark_time: float
    seed: int
