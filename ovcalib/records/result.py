"""`result.json`: numbers as numbers, the unit in the name, null with a reason for what was not measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ovcalib.records.base import Frozen, Measured
from ovcalib.records.calibration import Calibration
from ovcalib.records.environment import Environment
from ovcalib.records.model import ModelRecord
from ovcalib.records.options import Edges, GoalMetric, Mode
from ovcalib.records.recipe import Recipe

# The INT8 arithmetic of a CPU; see ovcalib.kernels.
Kernels = Literal["vnni", "avx2"]


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


class OutputAgreement(Frozen):
    """INT8 against FP32 in one output tensor.

    shape    of one item
    nmse     as in Agreement, of this output alone
    pixels   share of positions at which both have their maximum in the same channel; None where channels are no classes
    """

    name: str
    shape: tuple[int, ...]
    nmse: Measured
    pixels: float | None = None


class BoxAgreement(Frozen):
    """Boxes of INT8 and FP32 in common: same class, and an intersection over union of `iou` or more.

    score        boxes of a lower score do not count
    fp32, int8   how many boxes each model finds on all images, `matched` of which both find
    share        2 matched / (fp32 + int8); None where neither finds any. Says nothing of whether they are right
    """

    iou: float
    score: float
    fp32: int
    int8: int
    matched: int
    share: float | None


class MeanPrecision(Frozen):
    """COCO's mean average precision in 0..1: `map` over IoU 0.50 to 0.95, `map50` at 0.50."""

    map: float
    map50: float


class DetectionAccuracy(Frozen):
    """Mean average precision of the FP32 and the INT8 detector on the same labelled images.

    boxes         of the truth
    drop_points   100 times `map` of FP32 minus that of INT8
    data_sha256   of the pixels and boxes, in order
    """

    protocol: str
    count: int
    boxes: int
    data_sha256: str
    fp32: MeanPrecision
    int8: MeanPrecision
    drop_points: float


class Agreement(Frozen):
    """How well INT8 agrees with FP32; says nothing of whether either is right.

    top1     how often INT8 names the class that FP32 names, a fraction; None for models without class logits
    pixels   the same for the pixels of a segmentation network; None for any other
    boxes    of a detector; None for any other
    nmse     squared error of all outputs over the squared outputs of FP32; None where INT8 is not finite
    on       which images
    outputs  every output tensor; empty in records of earlier versions
    kernels, emulated   see KernelsError; None in records of earlier versions
    """

    count: int
    top1: float | None
    pixels: float | None = None
    boxes: BoxAgreement | None = None
    nmse: Measured
    on: str
    outputs: tuple[OutputAgreement, ...] = ()
    kernels: Kernels | None = None
    emulated: bool = False


class ProbeError(Frozen):
    """INT8 against FP32 on images of one source that nobody took.

    agreement       how often INT8 names the class that FP32 names, a fraction
    expected_loss   of top-1 if FP32's probabilities are right, a fraction
    confidence      mean probability that FP32 gives to the class that it names
    nmse            as in Agreement
    """

    source: str
    count: int
    agreement: float
    expected_loss: float
    confidence: float
    nmse: Measured


class PredictedLoss(Frozen):
    """Loss of top-1 accuracy to expect on real images, in percentage points, predicted from images that were made.

    points, interval90   median, and what nine of ten cases lie within, see ovcalib.evaluation.predicted_loss
    probe                what it was predicted from
    """

    points: float
    interval90: tuple[float, float]
    probe: ProbeError


class CustomMetric(Frozen):
    """The user's own metric, of both models on the same `count` images of `on`.

    difference   INT8 minus FP32
    """

    function: str
    count: int
    on: str
    fp32: float
    int8: float
    difference: float


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
    """Single-stream latency of both models, measured in turns at the device's defaults, each in a process of its own.

    speedup        latency of FP32 over latency of INT8, from the medians of the rounds
    speedup_ci95   over the rounds; None in records of earlier versions
    unreliable     reasons to distrust the measurement: where there are some, reports show no latency
    """

    device: str
    latency_ms: dict[Literal["fp32", "int8"], Latency]
    speedup: float
    speedup_ci95: tuple[float, float] | None = None
    unreliable: tuple[str, ...] = ()
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


class FineTuning(Frozen):
    """What `finetune` did.

    steps    that were made; fewer than planned where time was up
    images   that it learned from
    nmse     of the outputs on held-out calibration images, before and after, on the kernels where it is larger; None
             where it is not finite
    judged_nmse   the same on images of other sources, by their names
    kept     whether the fine-tuned model was taken: the first error is smaller, and no other is larger
    """

    steps: int
    images: int
    nmse: tuple[Measured, Measured]
    judged_nmse: dict[str, tuple[Measured, Measured]]
    kept: bool
    seconds: float


class SpeedSearch(Frozen):
    """What `optimize_for=latency` did, by times on one machine: single-stream latency with batch 1, in turns.

    in_float           operations that were given their float precision back, by what that promised to save
    over_int8, ci95    latency of the model with all of them in INT8 over that of the one that was written
    over_fp32, ci95    latency of FP32 over that of the one that was written
    nmse               of the outputs on held-out calibration images, before and after; None where it is not finite
    """

    device: str
    in_float: tuple[str, ...]
    over_int8: float
    over_int8_ci95: tuple[float, float]
    over_fp32: float
    over_fp32_ci95: tuple[float, float]
    nmse: tuple[Measured, Measured]


class SetSplit(Frozen):
    """How many images of the calibration set served for what; `shared` names the parts that have images in common.

    ranges        activation ranges
    corrections   rounding and biases
    choices       defaults chosen by output error
    """

    ranges: int
    corrections: int
    choices: int
    shared: tuple[Literal["ranges", "corrections", "choices"], ...]


class Equalized(Frozen):
    """Signals whose channels were equalized together, see ovcalib.quantization.equalization.

    producers, consumers        names of the layers that write and that read them
    ratio_before, ratio_after   the largest range of weights that a channel has over the geometric mean of all channels,
                                in the layer where that is most
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    ratio_before: float
    ratio_after: float


class KernelsError(Frozen):
    """Output error of the INT8 model on one kind of kernels, on held-out calibration images.

    kernels    vnni: sums of products do not saturate; avx2: they do, see ovcalib.kernels
    emulated   this CPU does not have them: computed in another way that gives the same
    """

    kernels: Kernels
    nmse: Measured
    emulated: bool


class Arm(Frozen):
    """A way to quantize, judged on calibration images that it has not seen.

    changes           options that differ from those of the run
    output_error      on the kernels of all machines that the model is for
    difference_ci95   of the NMSE minus that of the defaults, paired by image, where both are largest
    agreement         how often it names the class that FP32 names; None for what is no classifier
    latency_ms        median, measured in turns with the other arms; None where no time is measured
    seconds           of quantizing
    """

    name: str
    changes: dict[str, str]
    output_error: tuple[KernelsError, ...]
    difference_ci95: tuple[float, float] | None
    agreement: float | None
    size_bytes: int
    latency_ms: float | None
    seconds: float


class ArmSearch(Frozen):
    """What `search` compared, on `count` images.

    left_out   arms that would have undone what was asked for
    late       arms that `max_time` left no time for
    """

    arms: tuple[Arm, ...]
    chosen: str
    count: int
    left_out: tuple[str, ...] = ()
    late: tuple[str, ...] = ()


# Of settings that weights alone have no use for.
NOTHING = "none"


class Quantization(Frozen):
    """How INT8 was made, resolved. An NMSE of outputs that are not finite is None.

    weight_bits        with activation_bits and edges, of a simulated model; edges is None for any other
    overflow_fix       what it came to, whatever was asked
    images             None in records of earlier versions
    output_error       of the model as it was written, on the kernels of all machines that it is for
    saturation_nmse    NMSE of the outputs on the kernels of a CPU with VNNI and of one without, on held-out
                       calibration images, before the overflow fix was settled; None where a machine was named
    halved_nmse        the larger of both with half the range of weights; None where the full one does not saturate
    activation_ranges  what they came to, whatever was asked
    channel_headroom   factor on the ranges of single channels, those of depthwise convolutions' inputs
    smooth_quant       what it came to, whatever was asked; None in records of earlier versions
    smooth_nmse        NMSE of the outputs without SmoothQuant and with it, on held-out calibration images; None where
                       it was not compared
    ranges_nmse        NMSE of the outputs with ranges min-max and mean-min-max, on held-out calibration images; None
                       where the first gave no reason to try the other
    ranges_ratio       error of an image with mean-min-max over that with min-max: geometric mean over all calibration
                       images, and its 95 % interval, which decides; None in records of earlier versions, too
    rounding           of weights, what it came to; with "compensated" the biases were solved along with it
    rounding_nmse      NMSE of the outputs with weights rounded to the nearest and with compensation; None where it was
                       not compared
    bias_correction    what it came to, whatever was asked
    bias_nmse          NMSE of the outputs with bias correction and without it, on held-out calibration images; None
                       where it was not for us to choose
    equalized          groups of signals whose channels were equalized before quantizing
    equalization_nmse  NMSE of the outputs without equalization and with it; None where it was not compared
    expected_sqnr      of operations in INT8, in dB, in execution order; empty without the guard
    guarded            operations that the guard left in float, with their expected SQNR in dB
    input_range        that quantizers of the network's input were given from the preprocessing; None: from the images
    int8_operations    operations that compute on quantized values
    float_operations   convolutions and matrix products left in float
    reverted           operations that accuracy-aware quantization gave their float precision back
    finetuning         None where that was not asked for
    speed              None where operations were not given back for the sake of speed
    search             the ways to quantize that were compared; None where that was not asked for
    """

    mode: Mode
    weight_bits: int = 8
    activation_bits: int = 8
    edges: Edges | None = None
    preset: str
    subset_size: int
    images: SetSplit | None = None
    overflow_fix: str
    output_error: tuple[KernelsError, ...] = ()
    saturation_nmse: tuple[Measured, Measured] | None = None
    halved_nmse: Measured = None
    deploy_isa: str
    # Records of earlier versions have NNCF's default.
    activation_ranges: str = "mean-min-max"
    channel_headroom: float = 1.0
    smooth_quant: bool | None = None
    smooth_nmse: tuple[Measured, Measured] | None = None
    ranges_nmse: tuple[Measured, Measured] | None = None
    ranges_ratio: tuple[float, float, float] | None = None
    rounding: str = "nearest"
    rounding_nmse: tuple[Measured, Measured] | None = None
    bias_correction: str
    bias_nmse: tuple[Measured, Measured] | None = None
    transformer: bool
    ignored: tuple[str, ...]
    equalized: tuple[Equalized, ...] = ()
    equalization_nmse: tuple[Measured, Measured] | None = None
    expected_sqnr: dict[str, float] = Field(default={})
    guarded: dict[str, float] = Field(default={})
    input_range: tuple[float, float] | None = None
    int8_operations: int
    float_operations: int
    reverted: tuple[str, ...]
    restoration: Restored | None
    finetuning: FineTuning | None = None
    speed: SpeedSearch | None = None
    search: ArmSearch | None = None
    seconds: float

    @property
    def precision(self) -> str:
        """What reports call the quantized model: INT8, or the bits that are simulated."""
        return "INT8" if self.mode != "simulated" else f"simulated W{self.weight_bits}A{self.activation_bits}"


class SizeBytes(Frozen):
    """Bytes of .xml and .bin together."""

    fp32: int = Field(gt=0)
    int8: int = Field(gt=0)


class Evaluated(Frozen):
    """Accuracy of one model on labelled images: top-1 of a classifier, or mean average precision of a detector.

    precision   the inference precision hint; None is the device's default
    boxes       of the truth, for a detector
    fault       why a detector does not work on the images, with the likely cause; None where it works
    """

    model: str
    protocol: str
    count: int
    data_sha256: str
    device: str
    precision: str | None
    accuracy: Top | None
    detection: MeanPrecision | None = None
    boxes: int | None = None
    fault: str | None = None


Outcome = Literal["done", "goal-met", "goal-missed", "budget"]


class Result(Frozen):
    """`result.json`: everything that a run found out. `*_reason` says why the value beside it is null.

    fp32_fault   why the FP32 model itself does not work on the labelled images, with the likely cause; None where it
                 works, or was not evaluated
    """

    schema_version: Literal[1] = 1
    created: str
    ovcalib: str
    outcome: Outcome
    model: ModelRecord
    recipe: Recipe
    calibration: Calibration
    quantization: Quantization
    accuracy: Accuracy | None
    accuracy_reason: str | None
    fp32_fault: str | None = None
    agreement: Agreement
    # Records of earlier versions have neither.
    predicted_loss: PredictedLoss | None = None
    predicted_loss_reason: str | None = None
    detection: DetectionAccuracy | None = None
    custom_metric: CustomMetric | None = None
    parity: Parity
    parity_reason: str | None
    size_bytes: SizeBytes
    benchmark: LatencyComparison | None
    benchmark_reason: str | None
    environment: Environment
    warnings: tuple[str, ...]
    files: dict[str, str]
