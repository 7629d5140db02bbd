"""From a model reference to a proven INT8 IR: the one path behind the command line and the Python API."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino as ov

from ovcalib import __version__, machine
from ovcalib.benchmark import compare_latency, memory_of
from ovcalib.calibration import CalibrationSet, Request, generate, images_wanted, open_source
from ovcalib.calibration.sets import preflight
from ovcalib.data.sets import ImageData, Reader, choose, model_labels, open_data
from ovcalib.errors import DataError, ModelError, UnknownNameError
from ovcalib.evaluation import (
    Items,
    Outputs,
    agreement,
    calibration_items,
    collect,
    compare,
    expected_hits,
    hits,
    items_of,
    nmse,
    pixel_hash,
    same_class,
)
from ovcalib.export.parity import NOT_MEASURED, check_parity
from ovcalib.export.to_openvino import describe, read_graph, refuse_quantized_graph, to_ir, write_ir
from ovcalib.graph import (
    float_operations,
    layer_name,
    match_operations,
    quantized_operations,
    restore,
)
from ovcalib.kernels import is_emulated, kernels_of, proof_kernels, runner_for
from ovcalib.models import Model, ModelOptions, load_model
from ovcalib.models.weights import file_sha256
from ovcalib.progress import Progress
from ovcalib.quantization import Settings, has_attention, quantize_default, resolve_overflow_fix
from ovcalib.report.pages import write_result_report
from ovcalib.restoration import Restoration, deadline, restore_accuracy
from ovcalib.rundir import REQUEST, RunDir, write_json
from ovcalib.runtime import OpenVINORunner, check_device
from ovcalib.safeguards import Judge, guard_warning, operations_to_guard, quantize_by_outputs
from ovcalib.types import (
    GoalMetric,
    Kernels,
    ModelRecord,
    ModelSpec,
    Outcome,
    Parity,
    Quantization,
    Recipe,
    Restored,
    Result,
    SetScore,
    SizeBytes,
)

if TYPE_CHECKING:
    from torch import nn

# Items on which candidates of accuracy-aware quantization are ranked.
RANKING_ITEMS = 100
# Images of the calibration set on which agreement is measured where there are no others.
AGREEMENT_ITEMS = 100
# In place of a data reference: the calibration images, with the labels that came with them.
CALIBRATION = "calibration"
# Below this agreement with FP32 the INT8 model is another model.
COLLAPSED_AGREEMENT = 0.8


@dataclass
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


def quantize_recipe(
    recipe: Recipe,
    output: Path | None = None,
    *,
    module: nn.Module | None = None,
    calibration: CalibrationSet | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Quantize a model to INT8 and prove the result.

    recipe        what to do
    output        a folder that appears whole when all is done; None keeps nothing but the returned value
    module        the torch module itself, instead of the one that the recipe's reference names
    calibration   the set itself, where it was made before by the recipe's source, options, count and seed
    raises        OvcalibError
    """
    progress = progress or Progress()
    began = time.monotonic()
    out_of_time = deadline(recipe.max_time)
    check_device(recipe.device)
    with ExitStack() as stack:
        if output is None:
            run = None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            run = stack.enter_context(RunDir(output, overwrite))
            folder = run.path
        write_json(folder / REQUEST, recipe.model_dump(mode="json"))
        (folder / "logs").mkdir()
        log = stack.enter_context((folder / "logs" / "run.log").open("w"))

        model = load_model(module if module is not None else recipe.model, model_options(recipe), progress.say)
        recipe = with_calibration(recipe, model, progress)
        if calibration is None:
            assert recipe.calib is not None
            open_source(recipe.calib, model.spec, model.module, recipe.options)  # refuses before anything is exported
        warnings = list(model.warnings)
        evaluation = open_evaluation(recipe, recipe.eval, model.spec) if recipe.eval else None
        validation = open_validation(recipe, evaluation, model.spec) if recipe.mode == "accuracy-aware" else None
        fp32, parity = export(model, folder / "fp32", progress, dynamic_batch=recipe.dynamic_batch)
        settings = resolve_settings(recipe, fp32)
        classification = model.spec.num_classes is not None

        if calibration is None:
            calibration = calibrate(recipe, model, progress, run.checkpoint if run is not None else None)
        warnings += calibration.provenance.warnings
        calibration.save(folder)
        drowned = operations_to_guard(fp32, calibration, settings) if recipe.guard else []
        if drowned:
            warnings.append(guard_warning(drowned))
            ignored = *settings.ignored, *(operation.name for operation in drowned)
            settings = dataclasses.replace(settings, ignored=ignored)

        if evaluation is not None:
            forbidden = frozenset() if recipe.allow_overlap else calibration_hashes(calibration)
            count, items, where = len(evaluation), evaluation.items(forbidden), evaluation.data.reference
        else:
            # There is no accuracy then, only agreement, and that on the calibration images.
            count = min(len(calibration), AGREEMENT_ITEMS)
            items = Items(lambda: islice(calibration_items(calibration), count))
            where = name_of(calibration)
        with progress.task("evaluating FP32", count) as tick:
            reference = collect(OpenVINORunner(fp32), items, tick)

        quantizing = time.monotonic()
        with progress.task("calibrating", len(calibration)) as tick:
            quantize = functools.partial(quantize_default, fp32, calibration, tick=tick, log=log)
            judge = Judge(fp32, calibration)
            chosen = quantize_by_outputs(quantize, settings, left_open(recipe, settings), judge)
        int8, settings, saturation = chosen.int8, chosen.settings, chosen.saturation
        if saturation is not None and saturation.avoided:
            warnings.append(saturation.warning())
        kernels = proof_kernels(recipe.deploy_isa)
        restoration: Restoration[ov.Model] | None = None
        restored: Restored | None = None
        if recipe.mode == "accuracy-aware":
            if validation is None:
                # The whole set, with the labels that came with it.
                on, steering = name_of(calibration), Items(lambda: calibration_items(calibration))
            elif validation is evaluation:
                on, steering = where, items
                warnings.append(
                    "the evaluation images also steered the accuracy-aware search; name others with --validate"
                )
            else:
                on, steering = validation.data.reference, validation.items()
            restoration, restored = restore_to_goal(
                recipe, fp32, int8, kernels, on, steering, classification, out_of_time, progress
            )
            int8 = restoration.model
            if restored.metric == "agreement" and 2 * len(restoration.reverted) > len(restored.ranking):
                warnings.append(
                    f"{len(restoration.reverted)} of {len(restored.ranking)} operations are back in float, because "
                    "images that lie between classes cost agreement, but hardly accuracy. --metric expected-top1, "
                    "labelled images or a larger --max-drop keep more of them in INT8"
                )
        output_error = judge.errors(int8, kernels_of(recipe.deploy_isa))
        seconds = time.monotonic() - quantizing
        outcome: Outcome = restoration.outcome if restoration else "done"
        quantization = Quantization(
            mode=recipe.mode,
            preset=settings.preset,
            subset_size=len(calibration),
            overflow_fix=settings.overflow_fix,
            output_error=output_error,
            saturation_nmse=(saturation.vnni, saturation.avx2) if saturation else None,
            halved_nmse=saturation.halved if saturation else None,
            deploy_isa=recipe.deploy_isa,
            activation_ranges=settings.activation_ranges,
            ranges_nmse=chosen.ranges_nmse,
            bias_correction=settings.bias_correction,
            bias_nmse=chosen.bias_nmse,
            transformer=settings.transformer,
            ignored=settings.ignored,
            guarded={layer_name(operation.name): round(operation.sqnr_db, 2) for operation in drowned},
            input_range=calibration.input_range,
            int8_operations=len(quantized_operations(int8)),
            float_operations=len(float_operations(int8)),
            reverted=tuple(name.removesuffix("/WithoutBiases") for name in restoration.reverted) if restoration else (),
            restoration=restored,
            seconds=round(seconds, 3),
        )

        describe(int8, model.spec, recipe.dynamic_batch)
        int8.set_rt_info(quantization.model_dump_json(exclude={"restoration"}), ["ovcalib", "quantization"])
        write_ir(int8, folder / "int8" / "model.xml")
        # What is measured from here on is the file, not the graph that it was written from.
        written = read_graph(folder / "int8" / "model.xml")
        with progress.task("evaluating INT8", count) as tick:
            outputs = collect(runner_for(batch_one(written, model.spec), kernels), items, tick)
        executed = {"kernels": kernels, "emulated": is_emulated(kernels)}
        agreed = agreement(reference, outputs, where, classification).model_copy(update=executed)
        if agreed.top1 is not None and agreed.top1 < COLLAPSED_AGREEMENT:
            warnings.append(
                f"agreement collapsed: INT8 names another class than FP32 for {1 - agreed.top1:.1%} of {where}. "
                "Calibrate with another source, or use --mode accuracy-aware"
            )
        if agreed.nmse is None:
            warnings.append("the INT8 model gives non-finite outputs")
        proven = (
            compare(reference, outputs, evaluation.protocol, model.spec.classes) if evaluation is not None else None
        )
        if proven is not None:
            proven = proven.model_copy(update=executed)

        latency, latency_reason = None, "left out (--benchmark-time 0)"
        if recipe.benchmark_time > 0:
            progress.say(f"measuring latency on {recipe.device}")
            latency = compare_latency(
                batch_one(fp32, model.spec), batch_one(written, model.spec), recipe.device, recipe.benchmark_time
            )
            memory, reason = memory_of(
                {"fp32": folder / "fp32" / "model.xml", "int8": folder / "int8" / "model.xml"}, recipe.device
            )
            latency = latency.model_copy(update={"memory_bytes": memory, "memory_reason": reason})
        record = Result(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ovcalib=__version__,
            outcome=outcome,
            model=ModelRecord(
                name=model.spec.name,
                input_shape=model.spec.input_shape,
                parameters=model.parameters,
                sha256=model.sha256,
                weights=model.spec.weights,
            ),
            recipe=recipe,
            calibration=calibration_record(calibration),
            quantization=quantization,
            accuracy=proven,
            accuracy_reason=None if proven else accuracy_reason(evaluation),
            agreement=agreed,
            parity=parity,
            parity_reason=None if model.module is not None else "the model was given as a graph",
            size_bytes=SizeBytes(fp32=ir_bytes(folder / "fp32"), int8=ir_bytes(folder / "int8")),
            benchmark=latency,
            benchmark_reason=None if latency else latency_reason,
            environment=machine.environment(),
            warnings=tuple(warnings),
            files={},
        )
        log.close()
        write_result_report(record, folder, preview=folder / "preview.png")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        record = record.model_copy(update={"files": {p.relative_to(folder).as_posix(): file_sha256(p) for p in files}})
        write_json(folder / "result.json", record.model_dump(mode="json"))
        progress.say(f"done in {time.monotonic() - began:.0f} s")
        if run is not None:
            run.finish()
            # The graphs in memory still read the weights of the folder under its first name.
            fp32, int8 = read_graph(output / "fp32" / "model.xml"), read_graph(output / "int8" / "model.xml")  # type: ignore[operator]
    return QuantizationResult(record, int8, fp32, calibration, output)


# The steps ------------------------------------------------------------------------------------


def model_options(recipe: Recipe) -> ModelOptions:
    return ModelOptions(
        weights=recipe.weights,
        input_shape=recipe.input_shape,
        mean=recipe.mean,
        std=recipe.std,
        short_side=recipe.short_side,
        trust_remote_code=recipe.trust_remote_code,
    )


def export(model: Model, folder: Path, progress: Progress, dynamic_batch: bool = False) -> tuple[ov.Model, Parity]:
    """Write model.onnx and model.xml into a folder; returns the FP32 graph with batch 1 and the parity of all forms."""
    folder.mkdir(parents=True, exist_ok=True)
    if model.module is None:
        assert model.graph is not None
        refuse_quantized_graph(model.graph, model.spec.name)
        graph, parity = model.graph, NOT_MEASURED
        describe(graph, model.spec, dynamic_batch)
    else:
        from ovcalib.export.to_onnx import to_onnx

        progress.say(f"exporting {model.spec.name}")
        path = folder / "model.onnx"
        to_onnx(model.module, model.spec.input_shape, path, dynamic_batch)
        graph = to_ir(path, model.spec, dynamic_batch)
        parity = check_parity(model.module, path, graph)
    write_ir(graph, folder / "model.xml")
    return batch_one(graph, model.spec), parity


def batch_one(graph: ov.Model, spec: ModelSpec) -> ov.Model:
    """The graph with batch 1; a copy where its batch is open."""
    if graph.inputs[0].get_partial_shape().is_static:
        return graph
    fixed = graph.clone()
    fixed.reshape({fixed.inputs[0]: ov.PartialShape([1, *spec.input_shape])})
    return fixed


def resolve_settings(recipe: Recipe, graph: ov.Model) -> Settings:
    """The quantization settings that a recipe comes to for a graph."""
    transformer = has_attention(graph) if recipe.model_type == "auto" else recipe.model_type == "transformer"
    ranges = recipe.activation_ranges
    if ranges == "auto":
        ranges = "mean-min-max" if transformer else "min-max"
    ignored = [op.get_friendly_name() for ops in match_operations(graph, recipe.ignore).values() for op in ops]
    return Settings(
        preset=recipe.preset or ("mixed" if transformer else "performance"),
        overflow_fix=resolve_overflow_fix(recipe.overflow_fix, recipe.deploy_isa),
        activation_ranges=ranges,
        bias_correction="layerwise" if recipe.bias_correction == "auto" else recipe.bias_correction,
        transformer=transformer,
        ignored=tuple(dict.fromkeys(ignored)),
    )


def left_open(recipe: Recipe, settings: Settings) -> frozenset[str]:
    """The settings that a recipe leaves to what the outputs say."""
    wanted = {
        "activation_ranges": recipe.activation_ranges == "auto" and not settings.transformer,
        "overflow_fix": recipe.overflow_fix == "auto" and recipe.deploy_isa == "any",
        "bias_correction": recipe.bias_correction == "auto",
    }
    return frozenset(name for name, ours in wanted.items() if ours)


def with_calibration(recipe: Recipe, model: Model, progress: Progress) -> Recipe:
    """The recipe with its source and number of images decided."""
    calib = recipe.calib
    if calib is None:
        missing = inversion_obstacle(model)
        calib = "fractal" if missing else "bn-inversion"
        if missing:
            progress.say(f"calibrating with fractal: {missing}")
    count = recipe.num_samples if recipe.num_samples is not None else images_wanted(calib, model.spec)
    return recipe.model_copy(update={"calib": calib, "num_samples": count})


def inversion_obstacle(model: Model) -> str | None:
    """Why the BatchNorm statistics of a model cannot be inverted; None where they can."""
    if model.module is None:
        return "the BatchNorm layers of a graph are folded away"
    from ovcalib.calibration.bn_taps import find_layers

    try:
        find_layers(model.module, model.spec.name)
    except ModelError as error:
        return str(error)
    return None


def calibrate(
    recipe: Recipe, model: Model, progress: Progress, checkpoint: Path | None = None, score: bool = True
) -> CalibrationSet:
    """The calibration set of a recipe whose source is decided, checked and scored.

    checkpoint   a folder from which an interrupted generation goes on
    """
    assert recipe.calib is not None
    assert recipe.num_samples is not None
    with progress.task(f"making {recipe.calib} images", recipe.num_samples) as tick:
        try:
            calibration = generate(
                recipe.calib,
                Request(
                    count=recipe.num_samples,
                    seed=recipe.seed,
                    spec=model.spec,
                    module=model.module,
                    tick=tick,
                    checkpoint=checkpoint,
                    download=recipe.download,
                ),
                recipe.options,
            )
        except KeyboardInterrupt:
            if checkpoint is not None and checkpoint.is_dir():
                progress.say(f"the images so far are kept in {checkpoint}; the same command goes on from there")
            raise
    found: dict[str, Any] = {"warnings": (*calibration.provenance.warnings, *preflight(calibration))}
    if score:
        found["score"], found["score_reason"] = score_calibration(model, calibration)
    return dataclasses.replace(calibration, provenance=calibration.provenance.model_copy(update=found))


def name_of(calibration: CalibrationSet) -> str:
    """What a calibration set is called where images of others are named by their reference."""
    return f"the calibration set ({calibration.provenance.source})"


def calibration_hashes(calibration: CalibrationSet) -> frozenset[bytes]:
    """Pixel hashes of a set that may hold real images."""
    if calibration.domain != "pixels":
        return frozenset()
    return frozenset(pixel_hash(calibration.pixels(i)) for i in range(len(calibration)))


@dataclass
class Evaluation:
    """A labelled or unlabelled set, and which of its images count."""

    data: ImageData
    spec: ModelSpec
    labels: Any
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def protocol(self) -> str:
        pre = self.spec.preprocessing
        fit = f"short side {pre.short_side}, centre crop" if pre.short_side else "scaled to"
        return (
            f"{len(self)} of {len(self.data)} images of {self.data.reference}, "
            f"{fit} {pre.height}x{pre.width}, {pre.interpolation}"
        )

    def items(self, forbidden: frozenset[bytes] = frozenset()) -> Items:
        return Items(lambda: items_of(Reader(self.data, self.spec, self.labels, self.order), forbidden))


def open_evaluation(recipe: Recipe, reference: str, spec: ModelSpec) -> Evaluation:
    """The evaluation images that a reference names.

    raises   DataError where labels are there but do not fit the model, or all are of one class
    """
    data = open_data(reference, split="test", download=recipe.download)
    labels = None
    if data.labels is not None and spec.num_classes is not None:
        labels = model_labels(data, spec)
        present = len(set(labels.tolist()))
        if present < min(2, spec.num_classes):
            name = data.class_names[0] if data.class_names else str(labels[0])
            raise DataError(
                f"{reference!r} holds images of one class ({name!r}), but {spec.name} has {spec.num_classes}. "
                "Accuracy on one class is not the model's accuracy: give a folder with all classes."
            )
    order = range(len(data)) if recipe.limit is None else choose(labels, len(data), recipe.seed)[: recipe.limit]
    return Evaluation(data, spec, labels, order)


def open_validation(recipe: Recipe, evaluation: Evaluation | None, spec: ModelSpec) -> Evaluation | None:
    """The images that steer accuracy-aware quantization; None where those of the calibration set do.

    raises   DataError also where they have no labels, and the metric needs some
    """
    if recipe.validate_on == CALIBRATION:
        return None
    validation = evaluation
    if recipe.validate_on is not None:
        try:
            validation = open_evaluation(recipe, recipe.validate_on, spec)
        except UnknownNameError as error:
            if error.name != recipe.validate_on:
                raise
            raise UnknownNameError("images for --validate:", error.name, [*error.known, CALIBRATION]) from error
    if validation is not None:
        require_labels(recipe.metric, validation.labels, validation.data.reference)
    return validation


def require_labels(metric: str | None, labels: Any, on: str) -> None:
    if metric == "top1" and labels is None:
        raise DataError(
            f"--metric top1 needs labels, and {on} has none. Use --metric expected-top1 or agreement, or "
            "labelled images."
        )


def restore_to_goal(
    recipe: Recipe,
    fp32: ov.Model,
    int8: ov.Model,
    kernels: Kernels,
    on: str,
    items: Items,
    classification: bool,
    out_of_time: Callable[[], bool],
    progress: Progress,
) -> tuple[Restoration[ov.Model], Restored]:
    """Accuracy-aware quantization, from the default INT8 model on, steered by `items` of the set `on`."""
    reference = collect(OpenVINORunner(fp32), items)
    require_labels(recipe.metric, reference.labels, on)
    # Where the outputs are no classes, FP32's probabilities say nothing.
    without_labels: GoalMetric = "expected-top1" if classification else "agreement"
    metric = recipe.metric or (without_labels if reference.labels is None else "top1")
    subset = list(islice(items, RANKING_ITEMS))

    def score(outputs: Outputs) -> float:
        if metric == "top1":
            assert reference.labels is not None
            return float(hits(outputs.values, reference.labels).mean())
        if metric == "expected-top1":
            return float(expected_hits(reference.values, outputs.values).mean())
        return float(same_class(reference.values, outputs.values).mean())

    def error(model: ov.Model) -> float:
        return nmse(reference.values[: len(subset)], collect(runner_for(model, kernels), subset).values)

    with ExitStack() as stack:
        tasks: dict[str, Any] = {}

        def say(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = stack.enter_context(progress.task(step, total))
            tasks[step](done)

        found = restore_accuracy(
            operations=[op.get_friendly_name() for op in quantized_operations(int8)],
            build=functools.partial(restore, int8, fp32),
            validate=lambda model: score(collect(runner_for(model, kernels), items)),
            error=error,
            baseline=score(reference),
            max_drop=recipe.max_drop,
            max_iterations=recipe.max_iterations,
            out_of_time=out_of_time,
            say=say,
        )
    return found, Restored(
        metric=metric, on=on, count=len(reference), max_drop=recipe.max_drop, baseline=score(reference),
        value=found.metric, validations=found.validations,
        ranking=tuple((name.removesuffix("/WithoutBiases"), value) for name, value in found.ranking),
    )  # fmt: skip


def score_calibration(model: Model, calibration: CalibrationSet) -> tuple[SetScore | None, str | None]:
    """The score of a calibration set, or the reason why there is none."""
    obstacle = inversion_obstacle(model)
    if obstacle:
        return None, obstacle
    from ovcalib.calibration.score import score_set

    assert model.module is not None
    return score_set(model.module, calibration, model.spec.name), None


def calibration_record(calibration: CalibrationSet) -> dict[str, Any]:
    """The calibration block of a result."""
    record = calibration.provenance.model_dump(mode="json")
    record["has_labels"] = calibration.labels is not None
    return record


def accuracy_reason(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "no evaluation images were given (--eval DATA)"
    return f"{evaluation.data.reference} has no labels"


def ir_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.xml", "model.bin"))
