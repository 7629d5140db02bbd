"""From a model reference to a proven INT8 IR: the order of the stages."""

from __future__ import annotations

import datetime
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import openvino as ov

from ovcalib import __version__
from ovcalib.calibration.make import make_set, resolve_calibration, set_of_object
from ovcalib.calibration.probe import SOURCE as PROBE
from ovcalib.calibration.probe import blind_to, judging_inputs, probe_inputs
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.data.objects import ObjectImages
from ovcalib.data.sets import open_image
from ovcalib.errors import UsageError, require_installed
from ovcalib.evaluation.custom import MetricFunction
from ovcalib.evaluation.dataset import (
    EvaluationSet,
    Images,
    calibration_images,
    open_evaluation,
    open_validation,
    proof_images,
    refuse_same_images,
    require_task,
)
from ovcalib.evaluation.detection import Decoder, decoder_of
from ovcalib.evaluation.metrics import probabilities
from ovcalib.evaluation.predicted_loss import predict_loss
from ovcalib.evaluation.proof import prove, reference_outputs
from ovcalib.evaluation.sanity import fp32_fault
from ovcalib.export.convert import Exported, export
from ovcalib.graph.files import batch_one, describe, ir_bytes, read_graph, stored_spec, write_ir
from ovcalib.graph.heads import raw_heads
from ovcalib.kernels import proof_kernels
from ovcalib.measurement.benchmark import measure_pair
from ovcalib.measurement.environment import environment
from ovcalib.models.load import Model, load_model, model_record, with_statistics
from ovcalib.progress import Progress
from ovcalib.quantization.accuracy_search import deadline
from ovcalib.quantization.arm_search import refuse_small_set, search
from ovcalib.quantization.quantize import quantize_graph
from ovcalib.quantization.settings import Settings, resolve_settings
from ovcalib.records.model import ModelSpec
from ovcalib.records.recipe import Recipe
from ovcalib.records.result import CustomMetric, Result, SizeBytes
from ovcalib.reports.result import write_result_report
from ovcalib.rundir import RunDir, write_json
from ovcalib.runtime import OpenVINORunner, check_device, output_ports

if TYPE_CHECKING:
    from torch import nn

# Rounding of weights alone needs no better images, see benchmarks/results/weights_only.md.
FOR_WEIGHTS, FOR_WEIGHTS_COUNT = "fractal", 64
# Modes whose graphs compute in float, the same on every machine.
IN_FLOAT = ("weight-only", "simulated")
SIMULATED = "fewer bits are simulated in float, which has no speed of its own"
STEERED_BY_EVALUATION = (
    "The evaluation images also steered the accuracy-aware algorithm, so the accuracy is flattered; name others with "
    "`validate_on`."
)


class Prediction(NamedTuple):
    """A class by its index, its name where it is known, and its probability."""

    label: int
    name: str | None
    probability: float


@dataclass(frozen=True, repr=False)
class QuantizationResult:
    """What `quantize` gives back.

    record        the content of result.json
    int8, fp32    OpenVINO graphs, batch 1
    calibration   the images that were used
    folder        where everything was written, or None
    """

    record: Result
    int8: ov.Model
    fp32: ov.Model
    calibration: CalibrationSet
    folder: Path | None

    def predict(self, image: Any, top: int = 5) -> tuple[Prediction, ...]:
        """The classes that INT8 names for an image, most likely first.

        image    a file, a PIL image, uint8 pixels [H, W, C] or [C, H, W] in RGB of any size, or a network input, float
                 [C, H, W]
        top      how many classes
        raises   DataError for what is no image; UsageError for a model without class logits: run `int8` itself
        """
        spec = self._spec
        if spec is None or spec.num_classes is None:
            raise UsageError(f"{self.record.model.name} has no class logits to predict from. Run `int8` with OpenVINO.")
        if isinstance(image, str | Path):
            image = open_image(Path(image))
        (found,) = ObjectImages([image], spec).read()
        scores = probabilities(np.stack(list(self._runner.run([found.input[None]]))))[0]
        best = np.argsort(-scores, kind="stable")[:top]
        return tuple(Prediction(int(i), spec.classes[i] if spec.classes else None, float(scores[i])) for i in best)

    @cached_property
    def _spec(self) -> ModelSpec | None:
        return stored_spec(self.int8)

    @cached_property
    def _runner(self) -> OpenVINORunner:
        return OpenVINORunner(self.int8)

    def __repr__(self) -> str:
        from ovcalib.reports.markdown import summary

        row = ", ".join(f"{name}: {value}" for name, value in summary(self.record).items())
        return f"<QuantizationResult {row}{f', in {str(self.folder)!r}' if self.folder else ''}>"

    def _repr_html_(self) -> str:
        from ovcalib.reports.markdown import summary
        from ovcalib.reports.tables import Table

        row = summary(self.record)
        return Table(list(row), [list(row.values())]).html()


def quantize(
    recipe: Recipe,
    output: Path | None = None,
    *,
    module: nn.Module | None = None,
    calibration: CalibrationSet | Any = None,
    evaluation: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Quantize a model to INT8 and prove the result.

    output        a folder that appears whole when all is done; None keeps nothing but the returned value
    module        the torch module itself, instead of the one that the recipe's reference names
    calibration   the set itself, where it was made before by the recipe's source, options, count and seed; or a Python
                  object that holds the images, see ovcalib.data.objects
    evaluation    a Python object that holds the evaluation images
    raises        OvcalibError
    """
    progress = progress or Progress()
    began = time.monotonic()
    out_of_time = deadline(recipe.quantization.max_time)
    check_device(recipe.measurement.device)
    with ExitStack() as stack:
        work = stack.enter_context(RunDir(output, overwrite, recipe.model_dump(mode="json")))
        log = stack.enter_context(work.log())

        ready = prepare(recipe, work.path / "fp32", progress, module, calibration, evaluation)
        recipe, model, exported, calibration = ready.recipe, ready.model, ready.exported, ready.calibration
        proven_on, validation, settings = ready.proven_on, ready.validation, ready.settings
        options = recipe.calibration
        if calibration is None:
            download = recipe.evaluation.download
            calibration = make_set(
                options, model, progress, download=download, resume=work.resume, out_of_time=out_of_time,
                graph=exported.graph,
            )  # fmt: skip
        calibration.save(work.path, options.keep_images, options.preview)
        warnings = [*model.warnings, *ready.warnings, *calibration.provenance.warnings]

        images = proof_images(proven_on, calibration, recipe.evaluation.allow_overlap)
        reference = reference_outputs(exported.graph, images, progress, ready.decode)
        fault = steered = None
        if proven_on is not None:
            fault = fp32_fault(lambda: OpenVINORunner(exported.graph), proven_on, reference, progress)
            steered = reference if validation is proven_on else None
        elif validation is not None:
            steered = reference_outputs(exported.graph, validation.images(), progress, ready.decode)
            fault = fp32_fault(lambda: OpenVINORunner(exported.graph), validation, steered, progress)
        if fault is not None:
            progress.say(fault)
        ports = output_ports(exported.graph)
        custom_fp32 = None if ready.metric is None else ready.metric.of(reference, ports)

        steering: Images | None = None
        if recipe.quantization.mode == "accuracy-aware":
            steering = validation.images() if validation is not None else calibration_images(calibration)
            if validation is not None and validation is proven_on:
                warnings.append(STEERED_BY_EVALUATION)
        asked, searched = recipe.quantization, None
        if asked.search:
            timed_on = recipe.measurement.device if recipe.measurement.benchmark_time else None
            asked, searched = search(
                asked, exported.graph, calibration, model.spec.task, out_of_time, progress, log, timed_on, work.resume
            )
            settings = resolve_settings(asked, exported.graph)
        quantized = quantize_graph(
            asked, settings, exported.graph, calibration, steering, model.spec.task,
            out_of_time, progress, log, steered, recipe.measurement.device,
            judging_inputs(model, calibration, progress) if asked.finetune else None,
        )  # fmt: skip
        if quantized.fp32 is not exported.graph:  # equalized: layers of both files belong together
            fp32 = exported.whole(quantized.fp32)
            describe(fp32, ready.spec, recipe.model.dynamic_batch)
            write_ir(fp32, work.path / "fp32" / "model.xml")
        written = exported.whole(quantized.int8)
        describe(written, ready.spec, recipe.model.dynamic_batch)
        how = quantized.record.model_dump_json(exclude={"restoration", "speed", "seconds"})
        written.set_rt_info(how, ["ovcalib", "quantization"])
        write_ir(written, work.path / "int8" / "model.xml")

        # What is measured from here on is the file, not the graph that it was written from.
        int8 = batch_one(read_graph(work.path / "int8" / "model.xml"), model.spec)
        kernels = None if quantized.record.mode in IN_FLOAT else proof_kernels(recipe.quantization.deploy_isa)
        body = int8 if exported.detector is None else raw_heads(int8)
        proof = prove(reference, body, images, proven_on, model.spec, kernels, progress, ready.decode)
        predicted, unpredicted = predict_loss(
            exported.graph, int8, model.spec, PROBE, lambda: probe_inputs(model.spec), blind_to(calibration),
            kernels,
        )  # fmt: skip
        custom = None
        if ready.metric is not None and custom_fp32 is not None:
            custom_int8 = ready.metric.of(proof.outputs, ports)
            custom = CustomMetric(
                function=ready.metric.reference, count=len(reference), on=images.on, fp32=custom_fp32,
                int8=custom_int8, difference=custom_int8 - custom_fp32,
            )  # fmt: skip
        simulated = quantized.record.mode == "simulated"
        latency, latency_reason = (
            (None, SIMULATED) if simulated else measure_pair(recipe.measurement, work.path, progress)
        )

        record = Result(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ovcalib=__version__,
            # A model that does not work has no accuracy to keep.
            outcome="goal-missed" if fault and quantized.outcome == "goal-met" else quantized.outcome,
            model=model_record(model, int8, recipe.model.dynamic_batch),
            recipe=recipe,
            calibration=calibration.record(),
            quantization=quantized.record.model_copy(update={"search": searched}),
            accuracy=proof.accuracy,
            accuracy_reason=proof.accuracy_reason,
            fp32_fault=fault,
            agreement=proof.agreement,
            predicted_loss=predicted,
            predicted_loss_reason=unpredicted,
            detection=proof.detection,
            custom_metric=custom,
            parity=exported.parity,
            parity_reason=exported.parity_reason,
            size_bytes=SizeBytes(fp32=ir_bytes(work.path / "fp32"), int8=ir_bytes(work.path / "int8")),
            benchmark=latency,
            benchmark_reason=latency_reason,
            environment=environment(),
            warnings=(*warnings, *quantized.warnings, *proof.warnings),
            files={},
        )
        log.close()
        # The report lists the hashes of all files but its own.
        record = record.model_copy(update={"files": work.hashes()})
        write_result_report(record, work.path, preview=work.path / "preview.png")
        record = record.model_copy(update={"files": work.hashes()})
        write_json(work.path / "result.json", record.model_dump(mode="json"))
        progress.say(f"done in {time.monotonic() - began:.0f} s")
        folder = work.finish()
    return QuantizationResult(record, *graphs_of(folder, exported.whole(exported.graph), int8), calibration, folder)


@dataclass(frozen=True)
class Prepared:
    """What is known before images are made.

    recipe        with the calibration source and its number of images decided
    spec          what the written files say about the model: also the class names of the evaluation images
    calibration   the set, where it was given
    exported      the FP32 model; its files are written
    warnings      about the choice of the source
    metric        of the user's own
    decode        from raw heads to boxes; None for what is no detector, or returns boxes in an unknown layout
    """

    recipe: Recipe
    model: Model
    spec: ModelSpec
    calibration: CalibrationSet | None
    proven_on: EvaluationSet | None
    validation: EvaluationSet | None
    exported: Exported
    settings: Settings
    warnings: tuple[str, ...]
    metric: MetricFunction | None
    decode: Decoder | None


def prepare(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    module: nn.Module | None = None,
    calibration: CalibrationSet | Any = None,
    evaluation: Any = None,
) -> Prepared:
    """Load and export the model, and refuse everything that can be refused before images are made.

    folder   for the FP32 files
    others   as of `quantize`
    """
    model = with_statistics(load_model(recipe.model, module, progress.say))
    require_installed(("nncf", "scipy"), "Quantization")
    if recipe.quantization.finetune:
        require_installed(("torch",), "Fine-tuning")
    require_task(recipe.quantization.metric, model.spec)
    asked = recipe.evaluation.metric_function
    metric = None if asked is None else MetricFunction(asked)
    warnings: tuple[str, ...] = ()
    if calibration is None:
        options = recipe.calibration
        if recipe.quantization.mode == "weight-only" and options.calib is None:
            options = options.model_copy(
                update={"calib": FOR_WEIGHTS, "num_samples": options.num_samples or FOR_WEIGHTS_COUNT}
            )
        options, warnings = resolve_calibration(options, model, progress)
    else:
        if not isinstance(calibration, CalibrationSet):
            calibration = set_of_object(calibration, recipe.calibration, model)
        calibration.refuse_other_shape(model.spec)
        options = recipe.calibration.model_copy(update={"num_samples": len(calibration)})
    if recipe.quantization.search and options.num_samples is not None:
        refuse_small_set(options.num_samples)
    recipe = recipe.model_copy(update={"calibration": options})
    proven_on = open_evaluation(recipe.evaluation, model.spec, evaluation)
    refuse_same_images(options.calib, proven_on, recipe.evaluation)
    validation = open_validation(recipe.quantization, recipe.evaluation, proven_on, model.spec)
    names = None if proven_on is None else proven_on.class_names
    spec = model.spec if names is None else model.spec.model_copy(update={"classes": names})
    exported = export(replace(model, spec=spec), folder, progress, recipe.model.dynamic_batch)
    settings = resolve_settings(recipe.quantization, exported.graph)
    if recipe.quantization.finetune:
        from ovcalib.quantization.finetuning import refuse_unknown_operations

        refuse_unknown_operations(exported.graph, model.spec.name)
    decode = decoder_of(model, exported.detector)
    return Prepared(
        recipe, model, spec, calibration, proven_on, validation, exported, settings, warnings, metric, decode
    )


def graphs_of(folder: Path | None, fp32: ov.Model, int8: ov.Model) -> tuple[ov.Model, ov.Model]:
    """Both graphs, INT8 first, read again from where the folder has moved to; their weights were mapped from it."""
    if folder is None:
        return int8.clone(), fp32
    return read_graph(folder / "int8" / "model.xml"), read_graph(folder / "fp32" / "model.xml")
