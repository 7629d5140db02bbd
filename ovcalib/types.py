"""Values that travel between the parts of ovcalib."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ovcalib.data.preprocessing import Preprocessing


class Frozen(BaseModel):
    """A value: immutable, comparable, and with no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Weights(Frozen):
    """Where the numbers of a model come from.

    origin      "shipped", "published", "file", "random", or the library that brings them
    sha256      of the weights file, as far as it is known before the file is read
    top1        published top-1 accuracy, a fraction, of `source`; never measured here
    """

    origin: str
    sha256: str | None = None
    licence: str | None = None
    url: str | None = None
    top1: float | None = None
    source: str | None = None


class ModelSpec(Frozen):
    """What ovcalib knows about a model, apart from its graph.

    input_shape   (C, H, W) of one item
    num_classes   width of the logits; None where the output is not [N, classes]
    classes       names in class order, where they are known
    """

    name: str
    dataset: str | None = None
    input_shape: tuple[int, int, int]
    num_classes: int | None = Field(gt=0)
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing
    weights: Weights


class Recipe(Frozen):
    """Everything a run of `quantize` needs; written beside its result, and run again with -c.

    model            reference (see ovcalib.models); for a module that was passed in, its class name
    calib            calibration source; `options` are its -O key=value. None: bn-inversion where the model has
                     BatchNorm statistics, else fractal
    num_samples      images, never batches; None: what the source suggests
    metric           None: top1 where the validation images have labels, else agreement
    max_drop         accuracy-aware: allowed drop of the metric, absolute, as a fraction
    max_time         accuracy-aware: seconds for the whole run
    max_iterations   accuracy-aware: candidates measured on the whole validation set
    validate_on      images that steer accuracy-aware quantization; None: those of `eval`, else the calibration set
    eval             images on which the result is proven
    limit            at most so many of them, chosen class by class
    benchmark_time   seconds of latency measurement for each model; 0 leaves it out
    """

    model: str
    weights: str | None = None
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    short_side: int | None = Field(default=None, ge=0)
    trust_remote_code: bool = False
    dynamic_batch: bool = False

    calib: str | None = None
    num_samples: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    options: dict[str, str] = {}

    mode: Literal["default", "accuracy-aware"] = "default"
    preset: Literal["performance", "mixed"] | None = None
    overflow_fix: Literal["auto", "disable", "first-layer", "enable"] = "auto"
    deploy_isa: Literal["any", "host", "avx2", "avx512", "vnni", "amx", "gpu", "npu"] = "any"
    bias_correction: Literal["fast", "full"] = "fast"
    model_type: Literal["auto", "cnn", "transformer"] = "auto"
    ignore: tuple[str, ...] = ()

    metric: Literal["top1", "agreement"] | None = None
    max_drop: float = Field(default=0.01, ge=0, le=1)
    max_time: float | None = Field(default=None, gt=0)
    max_iterations: int | None = Field(default=None, ge=1)
    validate_on: str | None = None

    eval: str | None = None
    limit: int | None = Field(default=None, ge=1)
    allow_overlap: bool = False
    download: bool = False
    device: str = "CPU"
    benchmark_time: float = Field(default=2.0, ge=0)


# Results: numbers as numbers, the unit in the name, null with a reason for what was not measured --------------


class SetScore(Frozen):
    """How a calibration set looks to the model, told without real data.

    images                  that were read
    bn_distance             from the BatchNorm statistics, mean over layers; 0 is equal, 1 a standard deviation off
    range_coverage          0..1, overlap of activation ranges with those that the statistics let expect
    diversity               between images, in standard deviations of the activations; 0 where all images are alike
    output_range            largest minus smallest output, mean over images
    output_range_distance   |ln| of its ratio to the range that the last BatchNorm layer lets expect
    """

    images: int
    bn_distance: float
    range_coverage: float
    diversity: float
    output_range: float
    output_range_distance: float


class Top(Frozen):
    """Accuracy of one model; fractions in 0..1.

    top5   None where there are five classes or fewer
    ci95   Wilson interval of top1
    """

    top1: float
    top5: float | None
    ci95: tuple[float, float]


class Accuracy(Frozen):
    """Accuracy of the FP32 and the INT8 model on the same labelled images.

    protocol      names the data, the split and the preprocessing
    data_sha256   of the pixels and labels, in order
    drop_points   top-1 of FP32 minus top-1 of INT8, in percentage points; its interval is paired
    """

    protocol: str
    count: int
    data_sha256: str
    fp32: Top
    int8: Top
    drop_points: float
    drop_ci95: tuple[float, float]


class Agreement(Frozen):
    """How often INT8 names the class that FP32 names; says nothing of whether it is the right one.

    top1   fraction in 0..1; None for models without class logits
    nmse   squared error of the outputs over the squared outputs of FP32; None where INT8 is not finite
    on     which images
    """

    count: int
    top1: float | None
    nmse: float | None
    on: str


class Parity(Frozen):
    """Largest absolute difference of outputs on seeded inputs, and the largest output that it compares with.

    onnx_runtime   what ran the ONNX file: "onnxruntime", or "openvino" where that is missing
    """

    torch_vs_ir_max_abs: float | None
    torch_vs_onnx_max_abs: float | None
    output_max_abs: float | None
    onnx_runtime: str | None


class Latency(Frozen):
    """Latency of one inference in milliseconds, over `n` inferences.

    precision   in which the device ran the float parts, where it tells
    """

    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    max: float
    n: int
    precision: str | None = None


class LatencyComparison(Frozen):
    """Single-stream latency of both models, measured in turns at the device's defaults.

    speedup   median latency of FP32 over median latency of INT8
    """

    device: str
    latency_ms: dict[Literal["fp32", "int8"], Latency]
    speedup: float


class Restored(Frozen):
    """What accuracy-aware quantization did.

    metric        that steered it, on the `count` items of `on`
    baseline      of FP32, value of the final INT8 model; both on the validation set
    ranking       (operation, output error when it alone is quantized), worst first
    """

    metric: Literal["top1", "agreement"]
    on: str
    count: int
    max_drop: float
    baseline: float
    value: float
    validations: int
    ranking: tuple[tuple[str, float], ...]


class Quantization(Frozen):
    """How INT8 was made, resolved.

    overflow_fix       what it came to, whatever was asked
    int8_operations    operations that compute on quantized values
    float_operations   convolutions and matrix products left in float
    reverted           operations that accuracy-aware quantization gave their float precision back
    """

    mode: Literal["default", "accuracy-aware"]
    preset: str
    subset_size: int
    overflow_fix: str
    deploy_isa: str
    bias_correction: str
    transformer: bool
    ignored: tuple[str, ...]
    int8_operations: int
    float_operations: int
    reverted: tuple[str, ...]
    restoration: Restored | None
    seconds: float


class SizeBytes(Frozen):
    """Bytes of .xml and .bin together."""

    fp32: int
    int8: int


class Evaluated(Frozen):
    """Accuracy of one model on labelled images.

    precision   the inference precision hint; None is the device's default
    """

    model: str
    protocol: str
    count: int
    data_sha256: str
    device: str
    precision: str | None
    accuracy: Top


class ModelRecord(Frozen):
    name: str
    input_shape: tuple[int, int, int]
    parameters: int
    sha256: str
    weights: Weights


Outcome = Literal["done", "goal-met", "goal-missed", "budget"]


class Result(Frozen):
    """`result.json`: everything that a run found out. `*_reason` says why the value beside it is null."""

    schema_version: Literal[1] = 1
    created: str
    ovcalib: str
    outcome: Outcome
    model: ModelRecord
    recipe: Recipe
    calibration: dict[str, Any]
    quantization: Quantization
    accuracy: Accuracy | None
    accuracy_reason: str | None
    agreement: Agreement
    parity: Parity
    parity_reason: str | None
    size_bytes: SizeBytes
    benchmark: LatencyComparison | None
    benchmark_reason: str | None
    environment: dict[str, Any]
    warnings: tuple[str, ...]
    files: dict[str, str]
