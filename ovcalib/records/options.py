"""All options, one group for each stage.

A field holds type, bounds, default and the sentence of help. The command line, recipe files, the JSON Schema and the
keywords of the Python API are made from the fields. To add an option, add a field here and the place that reads it, and
run `python -m ovcalib.records.schema`. Every field has a name of its own, so that they can also be given without their
groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ovcalib.records.base import MAX_WHOLE, Frozen, ImageShape, Shown

GoalMetric = Literal["top1", "agreement", "expected-top1", "nmse"]
Mode = Literal["default", "accuracy-aware", "weight-only", "simulated"]
Edges = Literal["academic", "full"]
Preset = Literal["performance", "mixed"]
OverflowFix = Literal["disable", "first-layer", "enable"]
DeployISA = Literal["any", "host", "avx2", "avx512", "vnni", "amx", "gpu", "npu"]
ActivationRanges = Literal["min-max", "mean-min-max", "histogram"]
BiasCorrection = Literal["none", "fast", "full", "layerwise"]
RoundingMode = Literal["nearest", "compensated"]
ChannelOrder = Literal["RGB", "BGR"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


def spelled(value: Any) -> Any:
    """YAML reads the words on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(spelled)]

# More calibration images than any method has use for; a typing error rather than a wish.
MAX_IMAGES = 1_000_000
# A month.
MAX_SECONDS = 31 * 86_400

# `validate_on` in place of a data reference: the calibration images, with the labels that came with them.
CALIBRATION = "calibration"

DATA = "imagefolder:DIR, cifar10[:ROOT], datumaro:FORMAT:DIR or npz:FILE"
MODEL = (
    "A name of `ovcalib models`, torchvision:NAME, timm:NAME, hub:OWNER/REPO:NAME, FILE.onnx, FILE.xml or "
    "package.module:factory."
)


def numbers(value: Any) -> Any:
    """Numbers with commas as a tuple; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise ValueError("expected numbers with commas, such as 3,224,224") from None


def shape(value: Any) -> Any:
    """The shape of an image as a tuple of three whole numbers, or None."""
    sizes = numbers(value)
    whole = isinstance(sizes, list | tuple) and all(
        isinstance(s, int | float) and s % 1 == 0 and s >= 1 for s in sizes
    )  # infinity % 1 is not a number
    if sizes is not None and not (whole and len(sizes) == 3):
        raise ValueError("expected C,H,W, such as 3,224,224")
    return sizes


def text_values(value: Any) -> Any:
    """A dict with text for keys and values; anything else as it is."""
    return {str(key): str(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def names(value: Any) -> Any:
    """Names with commas as a tuple, none twice; anything else as it is."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return tuple(dict.fromkeys(value)) if isinstance(value, list | tuple) else value


Numbers = Annotated[tuple[float, ...] | None, BeforeValidator(numbers)]
Shape = Annotated[ImageShape | None, BeforeValidator(shape)]
TextValues = Annotated[dict[str, str], BeforeValidator(text_values)]


class ModelOptions(Frozen):
    """Model"""

    reference: Annotated[str, Shown(("MODEL",))] = Field(description=MODEL)
    weights: Annotated[
        str | None, Shown(metavar="shipped|published|random|FILE", default="shipped, or what the reference brings")
    ] = Field(default=None, description="Weights of the model; published ones are downloaded.")
    input_shape: Annotated[Shape, Shown(metavar="C,H,W", default="the model's")] = Field(
        default=None, description="Shape of one image, where the model does not say."
    )
    mean: Annotated[Numbers, Shown(metavar="A,B,C", default="the model's")] = Field(
        default=None, description="Mean of each channel on the 0..1 scale."
    )
    std: Annotated[Numbers, Shown(metavar="A,B,C", default="the model's")] = Field(
        default=None, description="Standard deviation of each channel on the 0..1 scale."
    )
    short_side: Annotated[int | None, Shown(metavar="PIXELS", default="the model's")] = Field(
        default=None, ge=0, le=16384, description="Short side before the centre crop; 0 scales the whole image."
    )
    crop_share: Annotated[float | None, Shown(metavar="SHARE", default="the model's")] = Field(
        default=None, gt=0, le=1, description="Share of the short side that the centre crop keeps, for `short_side`."
    )
    interpolation: Annotated[Interpolation | None, Shown(default="the model's, else bilinear")] = Field(
        default=None, description="Interpolation with which images are scaled."
    )
    channel_order: Annotated[ChannelOrder | None, Shown(default="the model's, else RGB")] = Field(
        default=None, description="Order of the colour channels that the model takes."
    )
    task: Annotated[
        Literal["auto", "classification", "segmentation", "dense"],
        Shown(default="auto: classification for [N, K], segmentation where channels sum to 1, else dense"),
    ] = Field(
        default="auto",
        description="What the outputs are: class logits, the class of every pixel [N, K, H, W], or anything else, such "
        "as heatmaps.",
    )
    trust_remote_code: bool = Field(default=False, description="Allow hub: references, which run somebody's code.")
    dynamic_batch: bool = Field(default=False, description="Leave the batch of the written IR open.")

    @model_validator(mode="after")
    def _one_crop(self) -> ModelOptions:
        if self.crop_share is not None and self.short_side is not None:
            raise ValueError(
                f"`crop_share={self.crop_share:g}` and `short_side={self.short_side}` both say how large the crop is; "
                "pass one of them"
            )
        return self


class CalibrationOptions(Frozen):
    """Calibration"""

    calib: Annotated[
        str | None,
        Shown(
            metavar="SOURCE", default="bn-inversion; without BatchNorm patch-similarity, and without attention fractal"
        ),
    ] = Field(default=None, description="Calibration source; see `ovcalib sources`.")
    num_samples: Annotated[int | None, Shown(metavar="N", default="300; fewer for expensive sources")] = Field(
        default=None, ge=1, le=MAX_IMAGES, description="Calibration images (never batches)."
    )
    seed: Annotated[int, Shown(metavar="N")] = Field(
        default=0, ge=0, le=MAX_WHOLE, description="Seed of everything random."
    )
    options: Annotated[TextValues, Shown(("-O",), metavar="KEY=VALUE", default="none", repeat=True)] = Field(
        default={}, description="An option of the source; see `ovcalib sources NAME`. Repeatable."
    )

    preview: bool = Field(default=True, description="Show some of the images in preview.png and in the report.")
    keep_images: bool = Field(
        default=True, description="Leave the images in the output folder (calibration.npz and the preview)."
    )


class QuantizationOptions(Frozen):
    """Quantization"""

    mode: Mode = Field(
        default="default",
        description="accuracy-aware reverts operations to float until `max_drop` holds; weight-only stores weights in "
        "8 bits and computes in float; simulated computes in float on the levels of fewer bits.",
    )
    weight_bits: Annotated[int, Shown(metavar="N")] = Field(
        default=8, ge=2, le=8, description="Bits of weights, for `mode=simulated`."
    )
    activation_bits: Annotated[int, Shown(metavar="N")] = Field(
        default=8, ge=2, le=8, description="Bits of activations, for `mode=simulated`."
    )
    edges: Edges = Field(
        default="academic",
        description="For `mode=simulated`: academic leaves 8 bits to the first and the last layer and the outputs in "
        "float, full gives them as few as the others.",
    )
    search: bool = Field(
        default=False,
        description="Compare several ways to quantize, NNCF's own among them, on a part of the calibration images, and "
        "take the best.",
    )
    preset: Annotated[Preset | None, Shown(default="performance; mixed for transformers")] = Field(
        default=None, description="Symmetric activations, or asymmetric where they are signed."
    )
    deploy_isa: DeployISA = Field(
        default="any", description="Machine that the model will run on; any is safe on all of them."
    )
    overflow_fix: Annotated[Literal["auto", OverflowFix], Shown(default="auto, by `deploy_isa`")] = Field(
        default="auto", description="Layers whose weights use half of their range."
    )
    activation_ranges: Annotated[
        Literal["auto", ActivationRanges],
        Shown(
            default="auto: min-max, 1.5 times as wide for single channels; mean-min-max where its output error is "
            "smaller, image by image"
        ),
    ] = Field(
        default="auto",
        description="Range estimator: extremes over all images, mean of each image's extremes (NNCF's default), or a "
        "histogram.",
    )
    bias_correction: Annotated[
        Literal["auto", BiasCorrection],
        Shown(default="auto: layerwise, or none where its output error is smaller"),
    ] = Field(
        default="auto",
        description="layerwise removes the mean shift that rounding a layer's weights causes; fast and full are "
        "NNCF's.",
    )
    rounding: Annotated[
        Literal["auto", RoundingMode],
        Shown(default="auto: compensated where its output error is smaller"),
    ] = Field(
        default="auto",
        description="Rounding of weights: each to the nearest level, or so that weights make up for each other's "
        "errors (GPTQ).",
    )
    smooth_quant: Annotated[
        Switch,
        Shown(default="auto: on for transformers where its output error is smaller"),
    ] = Field(
        default="auto", description="SmoothQuant: large channels of a matrix product's input move into its weights."
    )
    guard: bool = Field(default=True, description="Leave operations in float whose expected SQNR in INT8 is too low.")
    equalize: Annotated[
        Switch,
        Shown(default="auto: where operations would stay in float, and the output error is no larger with it"),
    ] = Field(default="auto", description="Cross-layer equalization of channels before quantizing.")
    finetune: bool = Field(
        default=False,
        description="Train integer weights, biases and activation ranges on the calibration images towards what FP32 "
        "computes, without labels; takes minutes.",
    )
    finetune_steps: Annotated[int, Shown(metavar="N")] = Field(
        default=300, ge=1, le=MAX_WHOLE, description="Steps of `finetune`, of at most 32 images each."
    )
    optimize_for: Literal["size", "latency"] = Field(
        default="size",
        description="latency leaves operations in float that INT8 makes slower here, on `device`; size leaves none for "
        "that reason.",
    )
    model_type: Literal["auto", "cnn", "transformer"] = Field(
        default="auto", description="transformer turns on the mixed preset and tries SmoothQuant."
    )
    ignore: Annotated[tuple[str, ...], Shown(metavar="PATTERN", default="none", repeat=True)] = Field(
        default=(), description="Operations to leave in float, by wildcard (layer1.*) or type:NAME. Repeatable."
    )
    metric: Annotated[
        GoalMetric | None, Shown(default="top1 with labels, else expected-top1; nmse where outputs are no logits")
    ] = Field(
        default=None,
        description="Metric that `max_drop` bounds. expected-top1 (top-1 expected under FP32's probabilities), "
        "agreement with FP32 and nmse (1 - NMSE of the outputs) need no labels.",
    )
    max_drop: Annotated[float, Shown(metavar="FRACTION")] = Field(
        default=0.01, ge=0, le=1, description="Allowed drop of the metric: 0.01 is one point."
    )
    validate_on: Annotated[
        str | None, Shown(("--validate",), metavar="DATA|calibration", default="those of `eval`, else calibration")
    ] = Field(
        default=None,
        description="Images that steer accuracy-aware quantization; calibration: its own, with the labels that came "
        "with them.",
    )
    max_time: Annotated[float | None, Shown(metavar="SECONDS", default="none")] = Field(
        default=None,
        gt=0,
        le=MAX_SECONDS,
        description="Time after which accuracy-aware quantization, `search` or `finetune` ends with the best so far.",
    )
    max_iterations: Annotated[int | None, Shown(metavar="N", default="none")] = Field(
        default=None, ge=1, le=MAX_WHOLE, description="Candidates that accuracy-aware quantization measures at most."
    )

    @model_validator(mode="after")
    def _compensated_rounding_solves_biases(self) -> QuantizationOptions:
        if self.rounding == "compensated" and self.bias_correction not in ("auto", "layerwise"):
            raise ValueError(
                f"`bias_correction={self.bias_correction}` does not go with `rounding=compensated`, which solves the "
                "biases itself"
            )
        return self

    @model_validator(mode="after")
    def _steering_needs_something_to_steer(self) -> QuantizationOptions:
        if self.mode != "accuracy-aware":
            for name in STEERING_FIELDS:
                if getattr(self, name) is not None and not (name == "max_time" and (self.search or self.finetune)):
                    alternative = ", `search=True` or `finetune=True`" if name == "max_time" else ""
                    raise ValueError(
                        f"`{name}={getattr(self, name)}` does nothing without `mode=accuracy-aware`{alternative}"
                    )
        return self

    @model_validator(mode="after")
    def _some_modes_need_nothing_else(self) -> QuantizationOptions:
        if name := self.beyond(ALL_FIELDS.get(self.mode, type(self).model_fields)):
            raise ValueError(f"`{name}={getattr(self, name)}` does nothing with `mode={self.mode}`")
        return self

    @model_validator(mode="after")
    def _fewer_bits_are_simulated(self) -> QuantizationOptions:
        for name in BIT_FIELDS:
            if self.mode != "simulated" and getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(
                    f"`{name}={getattr(self, name)}` does nothing without `mode=simulated`: OpenVINO computes with 8 "
                    "bits or in float"
                )
        if self.mode == "simulated" and self.bias_correction in ("fast", "full"):
            raise ValueError(f"`bias_correction={self.bias_correction}` is NNCF's, which knows no `mode=simulated`")
        return self

    @model_validator(mode="after")
    def _steps_are_of_fine_tuning(self) -> QuantizationOptions:
        if not self.finetune and self.beyond(type(self).model_fields.keys() - {"finetune_steps"}):
            raise ValueError(f"`finetune_steps={self.finetune_steps}` does nothing without `finetune=True`")
        return self

    def beyond(self, names: Collection[str]) -> str | None:
        """The name of an option that is given and is none of `names`."""
        fields = {name: field for name, field in type(self).model_fields.items() if name not in names}
        return next((name for name, field in fields.items() if getattr(self, name) != field.get_default()), None)


# Fields that only the accuracy-aware algorithm takes.
STEERING_FIELDS = ("metric", "validate_on", "max_time", "max_iterations")
# The only fields that count where weights alone are quantized; `max_drop` is what the verdict goes by.
WEIGHT_FIELDS = ("mode", "ignore", "rounding", "bias_correction", "max_drop")
# Those that only simulated bits take, and all that count for them.
BIT_FIELDS = ("weight_bits", "activation_bits", "edges")
SIMULATED_FIELDS = (
    *WEIGHT_FIELDS, *BIT_FIELDS, "preset", "activation_ranges", "model_type", "finetune", "finetune_steps",
    "max_time",
)  # fmt: skip
# All fields that count with a mode, where most do not.
ALL_FIELDS = {"weight-only": WEIGHT_FIELDS, "simulated": SIMULATED_FIELDS}


def fields_of(mode: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a recipe that count with a mode; others, such as its model, count with every one."""
    kept = dict(fields)
    for name in QuantizationOptions.model_fields.keys() & kept.keys():
        counts = name in ALL_FIELDS.get(mode, QuantizationOptions.model_fields)
        steers = name in STEERING_FIELDS and mode != "accuracy-aware"
        bounds = name == "max_time" and (fields.get("search") or fields.get("finetune"))
        if not counts or (steers and not bounds) or (name in BIT_FIELDS and mode != "simulated"):
            del kept[name]
    return kept


class EvaluationOptions(Frozen):
    """Evaluation"""

    eval: Annotated[str | None, Shown(metavar="DATA", default="none")] = Field(
        default=None, description=f"Images that prove the result: {DATA}."
    )
    limit: Annotated[int | None, Shown(metavar="N", default="all")] = Field(
        default=None, ge=1, le=MAX_WHOLE, description="Evaluate on at most N images, chosen class by class."
    )
    metric_function: Annotated[str | None, Shown(metavar="PACKAGE.MODULE:METRIC", default="none")] = Field(
        default=None,
        description="A metric of your own: gets the outputs by name, arrays [N, ...], and the labels or None, and "
        "returns a number.",
    )
    allow_overlap: bool = Field(default=False, description="Evaluate even on images of the calibration set.")
    download: bool = Field(default=False, description="Allow the CIFAR-10 data set to be downloaded.")


class MeasurementOptions(Frozen):
    """Measurement"""

    device: Annotated[str, Shown(("-d", "--device"), metavar="DEVICE")] = Field(
        default="CPU", description="OpenVINO device on which latency is measured."
    )
    benchmark_time: Annotated[float, Shown(metavar="SECONDS")] = Field(
        default=2.0, ge=0, le=MAX_SECONDS, description="Latency measurement of each model; 0 leaves it out."
    )


# Of commands that measure finished models ------------------------------------------------------


class BenchmarkOptions(Frozen):
    """Benchmark"""

    device: Annotated[tuple[str, ...], Shown(("-d", "--device"), metavar="CPU,GPU", default="CPU")] = Field(
        default=("CPU",), min_length=1, description="OpenVINO devices, with commas."
    )
    hint: Annotated[
        tuple[Literal["latency", "throughput"], ...],
        Shown(metavar="latency,throughput", default="latency,throughput"),
    ] = Field(default=("latency", "throughput"), min_length=1, description="Performance hints, with commas.")
    precision: Annotated[
        tuple[Literal["default", "f32", "f16", "bf16"], ...],
        Shown(metavar="default,f32,f16,bf16", default="default"),
    ] = Field(default=("default",), min_length=1, description="Inference precision hints, with commas.")
    seconds: Annotated[float, Shown(("-t", "--time"), metavar="SECONDS")] = Field(
        default=10.0, gt=0, le=MAX_SECONDS, description="Measurement of each model under each setting."
    )
    batch: Annotated[int, Shown(metavar="N")] = Field(
        default=1, ge=1, le=MAX_IMAGES, description="Images in one inference."
    )
    api: Annotated[Literal["sync", "async"] | None, Shown(default="sync for latency, else async")] = Field(
        default=None, description="Inference API."
    )
    streams: Annotated[int | None, Shown(metavar="N", default="the device's")] = Field(
        default=None, ge=1, le=2**16, description="Streams of the device."
    )
    threads: Annotated[int | None, Shown(metavar="N", default="the device's")] = Field(
        default=None, ge=1, le=2**16, description="Threads on CPU."
    )
    requests: Annotated[int | None, Shown(metavar="N", default="the device's")] = Field(
        default=None, ge=1, le=2**16, description="Requests in flight (async)."
    )
    data: Annotated[str | None, Shown(metavar="DATA", default="none")] = Field(
        default=None, description="Images on which devices and precisions must agree with CPU f32."
    )
    limit: Annotated[int | None, Shown(metavar="N", default="all")] = Field(
        default=None, ge=1, le=MAX_WHOLE, description="Use at most N of them, chosen class by class."
    )
    min_agreement: Annotated[float, Shown(metavar="SHARE")] = Field(
        default=0.98,
        ge=0,
        le=1,
        description="Share of these images with the same class below which a device disagrees.",
    )
    counters: bool = Field(
        default=False, description="Show which operations take the time, from the counters of the device."
    )

    @field_validator("device", "hint", "precision", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return names(value)

    @model_validator(mode="after")
    def _sync_has_one_request(self) -> BenchmarkOptions:
        if self.api == "sync" and self.requests not in (None, 1):
            raise ValueError(f"`requests={self.requests}`: the sync API has one request; use `api=async`")
        return self


class DiagnosisOptions(Frozen):
    """Diagnosis"""

    data: Annotated[str | None, Shown(metavar="DATA", default="those of the first `calib`")] = Field(
        default=None, description=f"Images to measure on: {DATA}."
    )
    calib: Annotated[tuple[str, ...], Shown(metavar="SOURCE", default="none", repeat=True)] = Field(
        default=(),
        description="Calibration source, such as npz:calibration.npz, whose ranges are compared. Repeatable.",
    )
    num_samples: Annotated[int, Shown(metavar="N")] = Field(
        default=32, ge=1, le=MAX_IMAGES, description="Images of each set for signals and ranges."
    )
    limit: Annotated[int | None, Shown(metavar="N", default="all")] = Field(
        default=None, ge=1, le=MAX_WHOLE, description="Measure the metric on at most N images."
    )
    max_drop: Annotated[float, Shown(metavar="FRACTION")] = Field(
        default=0.01, ge=0, le=1, description="Drop of the metric that the suggested scope may leave."
    )
    device: Annotated[str, Shown(("-d", "--device"), metavar="DEVICE")] = Field(
        default="CPU", description="OpenVINO device on which latency is measured."
    )
    benchmark_time: Annotated[float, Shown(metavar="SECONDS")] = Field(
        default=1.0, ge=0, le=MAX_SECONDS, description="Latency measurement of each candidate; 0 leaves it out."
    )
    seed: Annotated[int, Shown(metavar="N")] = Field(
        default=0, ge=0, le=MAX_WHOLE, description="Seed of the calibration sources."
    )

    @model_validator(mode="after")
    def _has_images(self) -> DiagnosisOptions:
        if self.data is None and not self.calib:
            raise ValueError("no images were given to diagnose on; pass `data`, `calib` or both")
        return self


class EvaluateOptions(Frozen):
    """Evaluation"""

    data: Annotated[str, Shown(metavar="DATA")] = Field(description=f"Labelled images: {DATA}.")
    limit: Annotated[int | None, Shown(metavar="N", default="all")] = Field(
        default=None, ge=1, le=MAX_WHOLE, description="Evaluate on at most N images, chosen class by class."
    )
    download: bool = Field(default=False, description="Allow the CIFAR-10 data set to be downloaded.")
    device: Annotated[str, Shown(("-d", "--device"), metavar="DEVICE")] = Field(
        default="CPU", description="OpenVINO device."
    )
    precision: Literal["f32", "f16", "bf16", "default"] = Field(
        default="f32", description="Inference precision hint of the device."
    )


class GenerateOptions(CalibrationOptions):
    """Calibration"""

    calib: Annotated[str, Shown(("SOURCE",))] = Field(description="A calibration source; see `ovcalib sources`.")
    num_samples: Annotated[int | None, Shown(("--count",), metavar="N", default="300; fewer for expensive sources")] = (
        Field(default=None, ge=1, le=MAX_IMAGES, description="Images.")
    )
    score: bool = Field(default=False, description="Compare the set with the model's BatchNorm statistics.")
    format: Literal["npz", "imagefolder", "datumaro"] = Field(
        default="npz", description="npz keeps the images exactly, the others hold 8-bit PNG."
    )
    download: bool = Field(default=False, description="Allow the CIFAR-10 data set to be downloaded.")

    @model_validator(mode="after")
    def _images_are_what_is_made(self) -> GenerateOptions:
        if not self.keep_images:
            raise ValueError("`keep_images=False` does nothing here: the images are what is made")
        return self


class ConvertOptions(Frozen):
    """Conversion"""

    to: Annotated[tuple[Literal["onnx", "ir"], ...], Shown(metavar="onnx,ir", default="onnx,ir")] = Field(
        default=("onnx", "ir"), min_length=1, description="What to write, with commas."
    )

    fp16: bool = Field(default=False, description="Store the weights of the IR in 16 bits, at half the size.")

    @field_validator("to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return names(value)

    @model_validator(mode="after")
    def _fp16_is_of_the_ir(self) -> ConvertOptions:
        if self.fp16 and "ir" not in self.to:
            raise ValueError("`fp16=True` does nothing without an IR; pass `to=ir` or `to=onnx,ir`")
        return self
