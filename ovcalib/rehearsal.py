"""What a command would do and take, found by doing the beginning of its work.

A piece of work runs with a `Rehearsal` in place of its progress, which ends it after a few seconds. Nothing is written
to the output folder; what would be refused is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovcalib import machine
from ovcalib.calibration.make import make_set, resolve_calibration
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.errors import DataError, UsageError
from ovcalib.evaluation.proof import reference_outputs
from ovcalib.measurement.benchmark import (
    WARMUP_LIMIT_S,
    all_settings,
    describe_file,
    model_files,
    refuse_missing_devices,
    workers,
)
from ovcalib.measurement.worker import MEMORY_REASON, memory_bytes
from ovcalib.models.load import Model, load_model, with_statistics
from ovcalib.pipeline import IN_FLOAT, prepare
from ovcalib.progress import Progress, Rehearsal, Rehearsed
from ovcalib.records.model import ModelSpec
from ovcalib.records.options import BenchmarkOptions, CalibrationOptions, GenerateOptions, ModelOptions
from ovcalib.records.plan import Plan, QuantizePlan, Stage, SweepPlan
from ovcalib.records.recipe import Recipe
from ovcalib.records.result import NOTHING
from ovcalib.rundir import folder_bytes, free_to_write
from ovcalib.sweeps.plan import plan, read_sweep_recipe
from ovcalib.sweeps.store import SetStore

if TYPE_CHECKING:
    from ovcalib.gan.distillation import StudentRecipe
    from ovcalib.gan.pairs import Pairs
    from ovcalib.gan.teacher import TeacherRecipe
    from ovcalib.gan.training import TrainingImages

UNKNOWN = "depends on what is tried"
REPORTS = "reports alone"


def rehearse(what: str, work: Callable[[Progress], Any], progress: Progress) -> tuple[Stage, Any]:
    """Do the beginning of a piece of work.

    returns   the stage, and what the work returned where it ended by itself, else None
    """
    rehearsal = Rehearsal(progress.say)
    began = time.monotonic()
    try:
        found = work(rehearsal)
    except Rehearsed:
        return Stage(what=what, seconds=rehearsal.seconds, why=f"measured on {100 * rehearsal.share:.2g} % of it"), None
    return Stage(what=what, seconds=time.monotonic() - began, why="measured"), found


def resources(target: Path, images: int = 0) -> dict[str, Any]:
    """The memory fields of a plan, and what is free.

    images   bytes that the work holds at its end, and its beginning did not
    """
    memory = memory_bytes()
    place = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    return {
        "memory_bytes": None if memory is None else memory["peak"] + images,
        "memory_reason": MEMORY_REASON if memory is None else None,
        "writes": target,
        "free_memory_bytes": machine.free_memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(place).free,
    }


# Calibration sets -----------------------------------------------------------------------------


def rehearse_set(
    options: CalibrationOptions, model: Model, download: bool, score: bool, progress: Progress
) -> tuple[Stage, CalibrationSet | None]:
    """The stage that makes the set of resolved options, and the set where it was made at once."""
    what = f"make {options.num_samples} images with {options.calib}"
    try:
        return rehearse(what, lambda watch: make_set(options, model, watch, score=score), progress)
    except DataError:
        if not download:
            raise
        return Stage(what=what, why="the data set would be downloaded first"), None


def set_bytes(options: CalibrationOptions, spec: ModelSpec, made: CalibrationSet | None, as_pixels: bool) -> int:
    """Bytes of a set's images on disk; where it is not made yet, those of float32 unless they are stored as pixels."""
    if made is not None and not as_pixels:
        return made.images.nbytes
    assert options.num_samples is not None
    return options.num_samples * int(np.prod(spec.input_shape)) * (1 if as_pixels else 4)


def plan_generate(
    about: ModelOptions, asked: GenerateOptions, target: Path, overwrite: bool, progress: Progress
) -> Plan:
    """What `ovcalib generate` would do."""
    free_to_write(target, overwrite)
    model = with_statistics(load_model(about, None, progress.say))
    options, _ = resolve_calibration(asked, model, progress)
    stage, made = rehearse_set(options, model, asked.download, asked.score, progress)
    in_memory = 0 if made is not None else set_bytes(options, model.spec, None, as_pixels=False)
    return Plan(
        recipe={"model": about.model_dump(mode="json"), "calibration": options.model_dump(mode="json")},
        stages=(stage,),
        disk_bytes=set_bytes(options, model.spec, made, as_pixels=asked.format != "npz"),
        **resources(target, in_memory),
    )


def plan_quantize(recipe: Recipe, target: Path, overwrite: bool, progress: Progress) -> QuantizePlan:
    """What `ovcalib quantize` would do."""
    free_to_write(target, overwrite)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        ready = prepare(recipe, Path(folder), progress)
        exporting = Stage(what="load and export the model", seconds=time.monotonic() - began, why="measured")
        fp32_bytes, int8_bytes = folder_bytes(Path(folder)), folder_bytes(Path(folder) / "model.bin")
        options, spec = ready.recipe.calibration, ready.model.spec
        making, made = rehearse_set(options, ready.model, recipe.evaluation.download, True, progress)
        stages = [exporting, making]
        if ready.proven_on is not None:
            images = ready.proven_on.images()
            stage, _ = rehearse(
                f"evaluate FP32 on {images.count} images",
                lambda watch: reference_outputs(ready.exported.graph, images, watch),
                progress,
            )
            stages.append(stage)
        ignored = tuple(
            f"{pattern}: {', '.join(found)}" for pattern, found in matches(ready.exported.graph, recipe).items()
        )
    limit = recipe.quantization.max_time
    stages.append(
        Stage(what="quantize, and evaluate INT8", why=UNKNOWN)
        if limit is None
        else Stage(what="quantize, and evaluate INT8", seconds=limit, why="at most (`max_time`)")
    )
    seconds = recipe.measurement.benchmark_time
    if seconds and recipe.quantization.mode != "simulated":
        stages.append(
            Stage(
                what="measure the latency of both models",
                seconds=2 * (seconds + WARMUP_LIMIT_S),
                why="at most (`benchmark_time`, and a warm-up)",
            )
        )
    images_bytes = set_bytes(options, spec, made, as_pixels=False)
    in_float = recipe.quantization.mode in IN_FLOAT
    return QuantizePlan(
        recipe=recipe.model_dump(mode="json"),
        stages=tuple(stages),
        disk_bytes=fp32_bytes + int8_bytes + (images_bytes if options.keep_images else 0),
        overflow_fix=NOTHING if in_float else ready.settings.overflow_fix,
        preset=NOTHING if recipe.quantization.mode == "weight-only" else ready.settings.preset,
        transformer=ready.settings.transformer,
        ignored=ignored,
        **resources(target, 0 if made is not None else images_bytes),
    )


def matches(graph: Any, recipe: Recipe) -> dict[str, list[str]]:
    """The operations that each pattern of `ignore` matches."""
    from ovcalib.graph.reading import layer_name, match_operations

    found = match_operations(graph, recipe.quantization.ignore)
    return {pattern: [f"{layer_name(op)} ({op.get_type_name()})" for op in ops] for pattern, ops in found.items()}


def plan_sweep(file: Path, target: Path, store: str | None = None) -> SweepPlan:
    """What `ovcalib sweep` would do; nothing is tried."""
    recipe = read_sweep_recipe(file)
    cells = plan(recipe)
    rows = [{"model": c.model, "source": c.source, "mode": c.mode, "seed": str(c.seed), "folder": c.key} for c in cells]
    reason = "`ovcalib quantize --dry-run` tells that of a cell"
    keys = {cell.set_key for cell in cells}
    shared = None if store is None else SetStore(store)
    return SweepPlan(
        recipe=recipe.model_dump(mode="json"),
        stages=(Stage(what=f"quantize {len(cells)} times", why=reason),),
        cells=tuple(rows),
        calibration_sets=len(keys),
        sets_in_the_store=0 if shared is None else sum(map(shared.holds, keys)),
        disk_reason=reason,
        **{**resources(target), "memory_bytes": None, "memory_reason": reason},
    )


# Benchmarks -----------------------------------------------------------------------------------


def plan_benchmark(
    models: Iterable[Path], asked: BenchmarkOptions, target: Path, overwrite: bool, progress: Progress
) -> Plan:
    """What `ovcalib benchmark` would do. The largest model is compiled and warmed up under the first setting."""
    free_to_write(target, overwrite)
    settings = all_settings(asked)
    refuse_missing_devices(settings)
    files = model_files(list(models))
    sizes = {label: describe_file(path)["size_bytes"] for label, path in files.items()}
    largest = max(sizes, key=lambda label: sizes[label])
    setting = settings[0]

    def start(watch: Progress) -> dict[str, int] | None:
        with workers([largest]) as started:
            worker = started[largest]
            worker.load(files[largest], setting)
            worker("warm_up", limit_s=WARMUP_LIMIT_S)
            found: dict[str, int] | None = worker("finish", compile_cached=True)["memory_bytes"]
            return found

    progress.say(f"starting {largest}")
    starting, memory = rehearse("", start, progress)
    assert starting.seconds is not None
    runs = len(files) * len(settings)
    stages = [
        Stage(
            what=f"start and compile {len(files)} models, {len(settings)} times",
            seconds=runs * starting.seconds,
            why=f"measured on {largest}",
        ),
        Stage(
            what=f"measure {len(files)} models under {len(settings)} settings",
            seconds=runs * asked.seconds,
            why="`seconds` for each",
        ),
    ]
    if asked.data is not None:
        stages.append(Stage(what=f"compare the devices on {asked.data}", why=UNKNOWN))
    return Plan(
        recipe={"models": list(map(str, files.values())), **asked.model_dump(mode="json")},
        stages=tuple(stages),
        disk_reason=REPORTS,
        **{
            **resources(target),
            "memory_bytes": None if memory is None else len(files) * memory["peak"],
            "memory_reason": MEMORY_REASON if memory is None else None,
        },
    )


# Trainings ------------------------------------------------------------------------------------


def plan_teacher(
    data: TrainingImages, recipe: TeacherRecipe, folder: Path, reference: str, device: str, score_every: float,
    progress: Progress,
) -> Plan:  # fmt: skip
    """What `ovcalib gan train-teacher` would do.

    score_every   thousands of images between scores, which are not tried; 0 for none
    """
    from ovcalib.gan import teacher
    from ovcalib.gan.training import workers

    recipe = teacher.fitted(recipe, data.images.shape[1], len(data.classes))
    request = teacher.request_of(data, recipe, reference)
    _refuse_processes()
    with workers(device) as team:
        return _plan_training(
            teacher.TeacherTraining(recipe, data, team), "train the teacher", request, folder, progress
        )


def plan_student(
    pairs: Pairs, recipe: StudentRecipe, folder: Path, reference: str, real: TrainingImages | None,
    real_reference: str | None, device: str, progress: Progress,
) -> Plan:  # fmt: skip
    """What `ovcalib gan distill` would do."""
    from ovcalib.gan.distillation import StudentTraining
    from ovcalib.gan.training import pick_device

    training = StudentTraining(recipe, pairs, real, pick_device(device))
    return _plan_training(training, "train the student", training.request(reference, real_reference), folder, progress)


def _refuse_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("A rehearsal runs in one process. Start it without torchrun.")


def _plan_training(training: Any, what: str, request: Mapping[str, Any], folder: Path, progress: Progress) -> Plan:
    from ovcalib.gan.training import gpu_memory, load_checkpoint, refuse_another_training, tensor_bytes

    refuse_another_training(folder, request)
    device = getattr(training, "device", None) or training.team.device
    earlier = load_checkpoint(folder, device)
    if earlier is not None:
        training.restore(earlier)
        progress.say(f"the training would go on after step {training.steps}")

    def steps(watch: Progress) -> None:
        with watch.task(what, training.total) as tick:
            if earlier is not None:
                tick(training.steps)
            while training.steps < training.total:
                training.step()
                tick(training.steps)

    stage, _ = rehearse(f"{what}, {training.total - training.steps} steps", steps, progress)
    return Plan(
        recipe=dict(request),
        stages=(stage,),
        # The checkpoint is written beside the last one before it replaces it.
        disk_bytes=2 * tensor_bytes(training.state()),
        **resources(folder),
        **gpu_memory(device),
    )
