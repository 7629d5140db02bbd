"""The functions behind the commands, for Python."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from ovcalib.calibration import SOURCES, CalibrationSet
from ovcalib.calibration.sources import usage
from ovcalib.doctor import doctor
from ovcalib.errors import UsageError
from ovcalib.evaluation import accuracy, collect
from ovcalib.models import builtin as builtin_models
from ovcalib.models import list_models, load_model
from ovcalib.pipeline import (
    QuantizationResult,
    batch_one,
    calibrate,
    export,
    model_options,
    open_evaluation,
    quantize_recipe,
    with_calibration,
)
from ovcalib.progress import Progress
from ovcalib.rundir import REQUEST, RunDir, write_json
from ovcalib.runtime import EVALUATION_PRECISION, OpenVINORunner
from ovcalib.types import Evaluated, ModelSpec, Parity, Recipe, option_of

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "convert",
    "doctor",
    "evaluate",
    "generate",
    "load_model",
    "make_recipe",
    "models",
    "quantize",
    "quantize_recipe",
    "sources",
]

Format = Literal["npz", "imagefolder", "datumaro"]


def quantize(
    model: str | nn.Module,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **recipe: Any,
) -> QuantizationResult:
    """Quantize a model to INT8, prove the result, and write both into a folder.

    model      a reference (`resnet20-cifar10`, `torchvision:NAME`, `FILE.onnx`, ...) or a torch module
    output     folder; None keeps nothing but the returned value
    progress   ovcalib.progress.Terminal() for bars; None for silence
    recipe     fields of ovcalib.Recipe: calib, num_samples, mode, eval, ...
    raises     ovcalib.OvcalibError
    """
    name, module = (model, None) if isinstance(model, str) else (type(model).__name__, model)
    return quantize_recipe(
        make_recipe(model=name, **recipe),
        None if output is None else Path(output),
        module=module,
        overwrite=overwrite,
        progress=progress,
    )


def generate(
    source: str,
    model: str | nn.Module,
    count: int | None = None,
    output: str | Path | None = None,
    *,
    form: Format = "npz",
    score: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **recipe: Any,
) -> CalibrationSet:
    """Make a calibration set for a model, and write it where `output` says.

    source   a calibration source, such as `fractal` or `real:DATA`
    count    images; None: what the source suggests
    form     npz keeps the images exactly; imagefolder and datumaro hold them as 8-bit PNG
    score    compare the set with the model's BatchNorm statistics; the result is in its provenance
    recipe   fields of ovcalib.Recipe that describe the model and the source: seed, options, weights, ...
    """
    progress = progress or Progress()
    name, module = (model, None) if isinstance(model, str) else (type(model).__name__, model)
    resolved = make_recipe(model=name, calib=source, num_samples=count, **recipe)
    loaded = load_model(module if module is not None else name, model_options(resolved), progress.say)
    resolved = with_calibration(resolved, loaded, progress)
    if output is None:
        return calibrate(resolved, loaded, progress, score=score)
    with RunDir(Path(output), overwrite) as run:
        write_json(run.path / REQUEST, resolved.model_dump(mode="json"))
        calibration = calibrate(resolved, loaded, progress, run.checkpoint, score)
        if form == "npz":
            calibration.save(run.path)
        else:
            from ovcalib.calibration.writers import write_images

            write_images(calibration, loaded.spec, run.path, form)
        run.finish()
    return calibration


def convert(
    model: str | nn.Module,
    output: str | Path,
    *,
    to: tuple[str, ...] = ("onnx", "ir"),
    dynamic_batch: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **recipe: Any,
) -> Parity:
    """Write a model as ONNX and as OpenVINO IR (FP32), and prove that they compute what the model does.

    to        "onnx", "ir" or both
    returns   the parity of torch, ONNX and IR
    """
    unknown = set(to) - {"onnx", "ir"}
    if unknown or not to:
        raise UsageError(f"--to {','.join(to)}: expected onnx, ir or onnx,ir.")
    progress = progress or Progress()
    name, module = (model, None) if isinstance(model, str) else (type(model).__name__, model)
    resolved = make_recipe(model=name, **recipe)
    loaded = load_model(module if module is not None else name, model_options(resolved), progress.say)
    if "onnx" in to and loaded.module is None:
        raise UsageError(f"{name!r} is a graph already; it converts to IR alone. Pass --to ir.")
    with RunDir(Path(output), overwrite) as run:
        write_json(run.path / REQUEST, resolved.model_dump(mode="json"))
        _, parity = export(loaded, run.path, progress, dynamic_batch)
        if "onnx" not in to:
            (run.path / "model.onnx").unlink(missing_ok=True)
        if "ir" not in to:
            for suffix in (".xml", ".bin"):
                (run.path / "model").with_suffix(suffix).unlink()
        run.finish()
    return parity


def evaluate(
    model: str | nn.Module,
    data: str,
    *,
    device: str = "CPU",
    precision: str | None = EVALUATION_PRECISION,
    progress: Progress | None = None,
    **recipe: Any,
) -> Evaluated:
    """Accuracy of a model on labelled images, on a device.

    precision   inference precision hint: "f32", "f16", "bf16", or None for the device's default
    """
    progress = progress or Progress()
    name, module = (model, None) if isinstance(model, str) else (type(model).__name__, model)
    resolved = make_recipe(model=name, eval=data, device=device, **recipe)
    loaded = load_model(module if module is not None else name, model_options(resolved), progress.say)
    evaluation = open_evaluation(resolved, data, loaded.spec)
    if evaluation.labels is None:
        raise UsageError(f"{data!r} has no labels that fit {loaded.spec.name}, so there is no accuracy to measure.")
    with tempfile.TemporaryDirectory() as folder:
        graph = loaded.graph if loaded.graph is not None else export(loaded, Path(folder), progress)[0]
        runner = OpenVINORunner(batch_one(graph, loaded.spec), device, precision)
    with progress.task(f"evaluating on {device}", len(evaluation)) as tick:
        outputs = collect(runner, evaluation.items(), tick)
    assert outputs.labels is not None
    return Evaluated(
        model=loaded.spec.name,
        protocol=evaluation.protocol,
        count=len(outputs),
        data_sha256=outputs.digest,
        device=device,
        precision=precision,
        accuracy=accuracy(outputs.values, outputs.labels),
    )


def models(pattern: str = "*") -> list[ModelSpec]:
    """The built-in models whose names match a wildcard pattern."""
    return [builtin_models.spec(name, builtin_models.default_weights(name)) for name in list_models(pattern)]


def sources() -> dict[str, dict[str, Any]]:
    """Every calibration source: how its reference is written, what it does and what its options are."""
    import dataclasses

    table = {}
    for name in SOURCES:
        source = SOURCES[name]
        table[name] = {
            "reference": usage(name, source),
            "summary": (source.__doc__ or "").strip().splitlines()[0],
            "needs": sorted(source.NEEDS),
            "options": {field.name: field.default for field in dataclasses.fields(source.Options)},
            "help": (source.Options.__doc__ or "").strip(),
        }
    return table


def make_recipe(**fields: Any) -> Recipe:
    """A Recipe, with a user's mistake said in a user's words.

    raises   UsageError that names the field, the value and what was expected
    """
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(str(part) for part in first["loc"][:1])
        if first["type"] == "extra_forbidden":
            raise UsageError(f"A recipe has no field {field!r}. It has: {', '.join(Recipe.model_fields)}.") from error
        raise UsageError(f"{option_of(field)} {_shown(first.get('input'))}: {_reason(first)}.") from error


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _reason(error: Mapping[str, Any]) -> str:
    message = str(error["msg"])
    return message[0].lower() + message[1:].removesuffix(".")
