"""Values that travel between the parts of ovcalib."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ovcalib.data.preprocessing import Preprocessing

# What accuracy-aware quantization watches: the last two without labels.
GoalMetric = Literal["top1", "agreement", "expected-top1"]
# The INT8 arithmetic of a CPU; see ovcalib.kernels.
Kernels = Literal["vnni", "avx2"]


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
    activation_ranges
                     auto: min-max, or mean-min-max for transformers and where that is closer to FP32
    bias_correction  auto: layerwise, or none where that is closer to FP32
    guard            leave operations in float that INT8 cannot hold
    metric           None: top1 where the validation images have labels, else expected-top1 (evaluation.expected_hits),
                     or agreement where the outputs are no classes
    max_drop         accuracy-aware: allowed drop of the metric, absolute, as a fraction
    max_time         accuracy-aware: seconds for the whole run
    max_iterations   accuracy-aware: candidates measured on the whole validation set
    validate_on      images that steer accuracy-aware quantization: a data reference, or "calibration", the calibration
                     images with the labels that came with them; None: those of `eval`, else the calibration images
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
    activation_ranges: Literal["auto", "min-max", "mean-min-max", "histogram"] = "auto"
    bias_correction: Literal["auto", "none", "fast", "full", "layerwise"] = "auto"
    guard: bool = True
    model_type: Literal["auto", "cnn", "transformer"] = "auto"
    ignore: tuple[str, ...] = ()

    metric: GoalMetric | None = None
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


# Fields of Recipe that the default algorithm does not ask for.
STEERING_FIELDS = ("metric", "max_time", "max_iterations", "validate_on")


def option_of(field: str) -> str:
    """What a field of Recipe is called on the command line."""
    return "--validate" if field == "validate_on" else f"--{field.replace('_', '-')}"


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


class ClassAccuracy(Frozen):
    """Accuracy on the images of one class; top-1 as fractions."""

    label: int
    name: str | None
    count: int
    fp32_top1: float
    int8_top1: float


class Confusion(Frozen):
    """How many images of class `label` each model takes for class `predicted`."""

    label: int
    name: str | None
    predicted: int
    predicted_name: str | None
    fp32: int
    int8: int


class Accuracy(Frozen):
    """Accuracy of the FP32 and the INT8 model on the same labelled images.

    protocol      names the data, the split and the preprocessing
    data_sha256   of the pixels and labels, in order
    drop_points   top-1 of FP32 minus top-1 of INT8, in percentage points; its interval is paired
    per_class     every class of which there are images
    confusions    the mistakes that INT8 makes more often than FP32, most added first, at most 20
    kernels, emulated   on which INT8 was measured, see KernelsError; None in records of earlier versions
    """

    protocol: str
    count: int
    data_sha256: str
    fp32: Top
    int8: Top
    drop_points: float
    drop_ci95: tuple[float, float]
    per_class: tuple[ClassAccuracy, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    kernels: Kernels | None = None
    emulated: bool = False


class Agreement(Frozen):
    """How often INT8 names the class that FP32 names; says nothing of whether it is the right one.

    top1   fraction in 0..1; None for models without class logits
    nmse   squared error of the outputs over the squared outputs of FP32; None where INT8 is not finite
    on     which images
    kernels, emulated   see KernelsError; None in records of earlier versions
    """

    count: int
    top1: float | None
    nmse: float | None
    on: str
    kernels: Kernels | None = None
    emulated: bool = False


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

    precision       in which the device ran the float parts, where it tells
    edges, counts   histogram from min to p99 in equal steps
    """

    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    max: float
    n: int
    precision: str | None = None
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class Memory(Frozen):
    """Resident memory of a process that ran one model and nothing else, in bytes.

    baseline   OpenVINO loaded, no model
    loaded     after compilation and the first inference
    peak       at most
    """

    baseline: int
    loaded: int
    peak: int


class LatencyComparison(Frozen):
    """Single-stream latency of both models, measured in turns at the device's defaults.

    speedup        median latency of FP32 over median latency of INT8
    memory_bytes   each model in a process of its own
    """

    device: str
    latency_ms: dict[Literal["fp32", "int8"], Latency]
    speedup: float
    memory_bytes: dict[Literal["fp32", "int8"], Memory] | None = None
    memory_reason: str | None = None


class Restored(Frozen):
    """What accuracy-aware quantization did.

    metric        that steered it, on the `count` items of `on`
    baseline      of FP32, value of the final INT8 model; both on the validation set
    ranking       (operation, output error when it alone is quantized), worst first
    """

    metric: GoalMetric
    on: str
    count: int
    max_drop: float
    baseline: float
    value: float
    validations: int
    ranking: tuple[tuple[str, float], ...]


class KernelsError(Frozen):
    """Output error of the INT8 model on one kind of kernels, on the last calibration images.

    kernels    vnni: sums of products do not saturate; avx2: they do, see ovcalib.kernels
    emulated   this CPU does not have them: computed in another way that gives the same
    """

    kernels: Kernels
    nmse: float | None
    emulated: bool


class Quantization(Frozen):
    """How INT8 was made, resolved.

    overflow_fix       what it came to, whatever was asked
    output_error       of the model as it was written, on the kernels of all machines that it is for
    saturation_nmse    NMSE of the outputs on the kernels of a CPU with VNNI and of one without, on the last
                       calibration images, before the overflow fix was settled; None where a machine was named
    halved_nmse        the same with half the range of weights, on any kernels; None where there was no need to try
    activation_ranges  what they came to, whatever was asked
    ranges_nmse        NMSE of the outputs with ranges min-max and mean-min-max, on the last calibration images; None
                       where the first gave no reason to try the other
    bias_correction    what it came to, whatever was asked
    bias_nmse          NMSE of the outputs with bias correction and without it, on the last calibration images; None
                       where it was not for us to choose
    guarded            operations that the guard left in float, with their expected SQNR in dB
    input_range        that quantizers of the network's input were given from the preprocessing; None: from the images
    int8_operations    operations that compute on quantized values
    float_operations   convolutions and matrix products left in float
    reverted           operations that accuracy-aware quantization gave their float precision back
    """

    mode: Literal["default", "accuracy-aware"]
    preset: str
    subset_size: int
    overflow_fix: str
    output_error: tuple[KernelsError, ...] = ()
    saturation_nmse: tuple[float, float] | None = None
    halved_nmse: float | None = None
    deploy_isa: str
    # Records of earlier versions have NNCF's default.
    activation_ranges: str = "mean-min-max"
    ranges_nmse: tuple[float, float] | None = None
    bias_correction: str
    bias_nmse: tuple[float, float] | None = None
    transformer: bool
    ignored: tuple[str, ...]
    guarded: dict[str, float] = {}
    input_range: tuple[float, float] | None = None
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


# Diagnosis ------------------------------------------------------------------------------------


class SignalQuality(Frozen):
    """How near a quantized signal is to the float one.

    sqnr_db   signal-to-quantization-noise ratio, limited to -200..200 dB; 200 means no difference
    cosine    similarity of the two as vectors, -1..1
    """

    sqnr_db: float
    cosine: float


class ChannelRange(Frozen):
    """One channel's quantized range, and the values that it meets on the first image set."""

    channel: int
    low: float
    high: float
    seen: tuple[float, float]
    clipped_share: float


class QuantizedInput(Frozen):
    """The range of an activation's FakeQuantize against the values that it meets.

    source          the operation that makes the activation
    low, high       the quantized range; the widest over channels where it is per channel
    worst_channel   where the range is per channel, the channel of which most is clipped; else None
    seen            per image set, smallest and largest value of the FP32 network
    clipped_share   per image set, share of the values outside the range, 0..1
    used_share      per image set, share of the range that lies between smallest and largest value, 0..1
    edges, counts   histogram of the FP32 values, of `worst_channel` if there is one: 65 edges, 64 counts per image set
    """

    source: str
    low: float
    high: float
    seen: dict[str, tuple[float, float]]
    clipped_share: dict[str, float]
    used_share: dict[str, float]
    worst_channel: ChannelRange | None
    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


class OperationDiagnosis(Frozen):
    """One quantized operation.

    output_nmse   error of the network's output when this operation alone is quantized, relative to its energy; None
                  where the output is then not finite
    cumulative    its output in the INT8 network, which inherits every error before it
    alone         its output on float input, input and weights quantized
    weights       only the weights quantized; None without weights
    activations   only the input quantized; None without weights, where it is the same as `alone`
    """

    name: str
    kind: str
    output_nmse: float | None
    cumulative: SignalQuality
    alone: SignalQuality
    weights: SignalQuality | None
    activations: SignalQuality | None
    inputs: tuple[QuantizedInput, ...]


class Candidate(Frozen):
    """A model between INT8 and FP32, and what it is worth.

    in_float         operations that compute in float, worst first; names for --ignore
    top1             accuracy, a fraction; None without labels
    agreement        with FP32, a fraction; None for models without class logits
    nmse             output error against FP32; None where the output is not finite
    latency_p50_ms   single-stream, measured in turns with the others; None where it was left out
    """

    in_float: tuple[str, ...]
    top1: float | None
    agreement: float | None
    nmse: float | None
    latency_p50_ms: float | None


class Diagnosis(Frozen):
    """`diagnosis.json`: where the accuracy goes.

    on           the images on which everything was measured; `count` of them, `signal_count` for the signals
    sets         image sets whose ranges are compared; the first is that of `on`
    operations   every quantized operation, most harmful first
    candidates   more and more operations, most harmful first, back in float
    suggested    index of the candidate to choose: the first within `max_drop` of FP32, else the best
    faults       what is wrong with the ranges of the most harmful operations, in words
    """

    schema_version: Literal[1] = 1
    created: str
    ovcalib: str
    model: str
    fp32_sha256: str
    int8_sha256: str
    device: str
    on: str
    count: int
    signal_count: int
    metric: Literal["top1", "agreement", "nmse"]
    max_drop: float
    sets: tuple[str, ...]
    operations: tuple[OperationDiagnosis, ...]
    fp32: Candidate
    int8: Candidate
    candidates: tuple[Candidate, ...]
    suggested: int | None
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


# Benchmark ------------------------------------------------------------------------------------


class Distribution(Frozen):
    """Durations in milliseconds, over every one of `n` inferences.

    p999             None below 1000 inferences, which do not tell it
    edges, counts    histogram from min to p99 in equal steps; what is slower is in `beyond`
    """

    p50: float
    p90: float
    p95: float
    p99: float
    p999: float | None
    mean: float
    std: float
    min: float
    max: float
    n: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    beyond: int


class ExecutedNode(Frozen):
    """One node of the graph that a device really runs; `precision` and `primitive` in the device's own words."""

    name: str
    kind: str
    precision: str
    primitive: str


class Power(Frozen):
    """Energy of the whole processor package while a model ran, by RAPL."""

    package_watts: float
    joules_per_inference: float


class BenchmarkRun(Frozen):
    """One model on one device with one set of settings.

    model              FOLDER/NAME of the file; `kind` is what its graph says
    hint               performance hint; latency runs one request, throughput as many as the device wants
    latency_ms         of a request, as OpenVINO measures it; under throughput, many are in flight at once
    call_p50_ms        sync: median of the whole call, dispatch from Python included
    throughput_fps     images a second, mean of the rounds, with the 95 % interval over them
    round_p50_ms       median latency of each round
    compile_ms         cold; compile_cached_ms from the device's cache
    steady             the warm-up ended because the latency had settled, not because its time was over
    compute_nodes      convolutions and matrix products of the executed graph, by runtime precision
    int8_nodes         those of them that ran on 8-bit integers
    unreliable         reasons to distrust this run
    """

    model: str
    sha256: str
    kind: Literal["fp32", "fp16", "int8"]
    size_bytes: int
    device: str
    hint: Literal["latency", "throughput"]
    api: Literal["sync", "async"]
    precision: str
    batch: int
    requests: int
    requested: dict[str, str]
    effective: dict[str, str]
    latency_ms: Distribution
    call_p50_ms: float | None
    round_p50_ms: tuple[float, ...]
    throughput_fps: float
    throughput_ci95: tuple[float, float]
    round_fps: tuple[float, ...]
    read_ms: float
    compile_ms: float
    compile_cached_ms: float | None
    compile_cached_reason: str | None
    first_inference_ms: float
    warmup_inferences: int
    steady: bool
    memory_bytes: Memory | None
    memory_reason: str | None
    power: Power | None
    power_reason: str | None
    compute_nodes: dict[str, int]
    int8_nodes: int
    nodes: tuple[ExecutedNode, ...]
    unreliable: tuple[str, ...]


class Speedup(Frozen):
    """How much faster one run was than another, measured in turns with it.

    metric    latency: p50 of `against` over p50 of `model`; throughput: the inverse ratio of images a second
    ci95      from the ratios of the rounds
    verdict   in words
    """

    model: str
    against: str
    device: str
    hint: Literal["latency", "throughput"]
    precision: str
    speedup: float
    ci95: tuple[float, float]
    verdict: str
    unreliable: tuple[str, ...]


class DeviceParity(Frozen):
    """The outputs of a model on one device and precision against the same model on CPU in f32.

    correlation     Pearson's, over all outputs of all images; None where an output is constant or not finite
    agreement       share of the images with the same class; None without class logits
    worst_sample    position of the image with the largest absolute difference `worst_abs`
    effective       precision that the device says it used
    """

    model: str
    device: str
    precision: str
    effective: str | None
    on: str
    count: int
    correlation: float | None
    agreement: float | None
    worst_sample: int
    worst_abs: float | None
    agrees: bool


class Noise(Frozen):
    """What else the machine did, and under which conditions; None is what the system does not tell.

    busy_before        share of the processor time that other work took in the second before the start
    steal_share        share of the processor time that the host took away, during the measurement
    throttled          how often a core was slowed down for heat
    governor           what decides the clock of the cores
    clock_limits_mhz   slowest and fastest clock that they may take
    temperature_c      the hottest sensor before and after the measurement
    power_source       mains or battery; None also where there is no battery
    """

    busy_before: float | None
    steal_share: float | None
    throttled: int | None
    governor: str | None = None
    clock_limits_mhz: tuple[float, float] | None = None
    temperature_c: tuple[float | None, float | None] = (None, None)
    power_source: Literal["mains", "battery"] | None = None


class Benchmark(Frozen):
    """`benchmark.json`. Every number comes from processes that ran one model each, in turns."""

    schema_version: Literal[1] = 1
    created: str
    ovcalib: str
    seconds: float
    rounds: int
    input: str
    environment: dict[str, Any]
    noise: Noise
    runs: tuple[BenchmarkRun, ...]
    speedups: tuple[Speedup, ...]
    parity: tuple[DeviceParity, ...]
    warnings: tuple[str, ...]
