"""The functions behind the commands, for Python.

Keywords are the fields of the option groups in `ovcalib.records.options`, which say what each means, takes and
defaults to; `help(ovcalib.quantize)` lists them. Every function raises subclasses of
`ovcalib.OvcalibError`: `UsageError`, `ModelError`, `DataError`, `DeviceError`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack

from ovcalib.calibration import SOURCES
from ovcalib.calibration.make import make_set, resolve_calibration
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.sources import usage
from ovcalib.data.objects import reference_of
from ovcalib.errors import DataError, ModelError, UsageError
from ovcalib.evaluation.classification import accuracy
from ovcalib.evaluation.dataset import EvaluationSet, ObjectSet, open_dataset
from ovcalib.evaluation.detection import decoded, decoder_of, mean_precision
from ovcalib.evaluation.outputs import collect
from ovcalib.evaluation.proof import SHORTER
from ovcalib.evaluation.sanity import box_fault
from ovcalib.export.convert import export
from ovcalib.graph.files import batch_one
from ovcalib.graph.heads import split_detector
from ovcalib.keywords import (
    BenchmarkKeywords,
    ConvertKeywords,
    DiagnoseKeywords,
    EvaluateKeywords,
    GenerateKeywords,
    LoadKeywords,
    QuantizeKeywords,
)
from ovcalib.models import builtin
from ovcalib.models.load import Model, list_models, with_statistics
from ovcalib.models.load import load_model as _load_model
from ovcalib.pipeline import QuantizationResult
from ovcalib.pipeline import quantize as _quantize
from ovcalib.progress import Progress, usual_progress
from ovcalib.records.base import checked
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.diagnosis import Diagnosis
from ovcalib.records.documented import documented
from ovcalib.records.model import ModelSpec
from ovcalib.records.options import (
    BenchmarkOptions,
    ConvertOptions,
    DiagnosisOptions,
    EvaluateOptions,
    GenerateOptions,
    ModelOptions,
)
from ovcalib.records.recipe import Recipe, make_recipe
from ovcalib.records.result import Evaluated, Parity
from ovcalib.records.sweep import Sweep, SweepRecipe
from ovcalib.rundir import RunDir
from ovcalib.runtime import OpenVINORunner, output_ports

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "benchmark",
    "convert",
    "diagnose",
    "evaluate",
    "generate",
    "load_model",
    "make_recipe",
    "models",
    "quantize",
    "report",
    "run_recipe",
    "sources",
    "sweep",
]

Folder = str | Path


class Indexed(Protocol):
    """A map-style data set, such as torch's."""

    def __getitem__(self, index: Any, /) -> Any: ...


# An array, a torch Dataset or DataLoader, or a list of images; labels go in as (images, labels). What it must hold is
# in ovcalib.data.objects.
Images = Sequence[Any] | Iterable[Any] | Indexed


@documented(QuantizeKeywords)
def quantize(
    model: str | nn.Module,
    output: Folder | None = None,
    *,
    calib: str | CalibrationSet | Images | None = None,
    eval: str | Images | None = None,  # noqa: A002 (as the recipe calls it)
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[QuantizeKeywords],
) -> QuantizationResult:
    """Quantize a model to INT8 and prove the result.

    model       a reference (`resnet20-cifar10`, `torchvision:NAME`, `FILE.onnx`, `package.module:factory`, ...) or a
                torch module, which stays as it is
    output      folder, written when all is done; None writes nothing
    calib       a calibration source (`ovcalib.sources()`); or the images: a calibration set, an array, a torch Dataset
                or DataLoader, see ovcalib.data.objects. None: bn-inversion; without BatchNorm
                patch-similarity, and without attention fractal
    eval        images that the result is measured on: imagefolder:DIR, cifar10[:ROOT], datumaro:FORMAT:DIR or npz:FILE;
                or the images, with their labels. None: agreement on calibration images
    overwrite   replace an earlier result in that folder
    progress    None shows bars on a terminal and in a notebook; `ovcalib.Progress()` shows nothing
    returns     the record (`result.json`), both OpenVINO graphs and the calibration set
    """
    reference, module = _reference(model)
    made = calib.provenance.source if isinstance(calib, CalibrationSet) else _named(calib)
    return run_recipe(
        make_recipe(model=reference, calib=made, eval=_named(eval), **options),
        output,
        module=module,
        calibration=None if isinstance(calib, str) else calib,
        evaluation=None if isinstance(eval, str) else eval,
        overwrite=overwrite,
        progress=progress,
    )


def run_recipe(
    recipe: Recipe,
    output: Folder | None = None,
    *,
    module: nn.Module | None = None,
    calibration: CalibrationSet | Images | None = None,
    evaluation: Images | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Run a recipe, as `quantize` does.

    module        the torch module itself, instead of the one that the recipe's reference names
    calibration   the set itself, where it was made before from the recipe's calibration options, or its images
    evaluation    the evaluation images, instead of those that the recipe names
    """
    return _quantize(
        recipe,
        _path(output),
        module=module,
        calibration=calibration,
        evaluation=evaluation,
        overwrite=overwrite,
        progress=progress or usual_progress(),
    )


@documented(GenerateKeywords)
def generate(
    source: str,
    model: str | nn.Module,
    count: int | None = None,
    output: Folder | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[GenerateKeywords],
) -> CalibrationSet:
    """Make a calibration set for a model.

    source    a calibration source, such as `fractal` or `real:DATA`
    count     images; None: what the source suggests
    output    folder for calibration.npz, calibration.json and preview.png, or for images (`format`); None writes
              nothing
    returns   the set; its `provenance` says how it was made, and holds the score
    """
    progress = progress or usual_progress()
    reference, module = _reference(model)
    about, rest = model_options(reference, options)
    asked = checked(GenerateOptions, {"calib": source, "num_samples": count, **rest})
    loaded = with_statistics(_load_model(about, module, progress.say))
    resolved, _ = resolve_calibration(asked, loaded, progress)
    request = {"model": about.model_dump(mode="json"), "calibration": resolved.model_dump(mode="json")}
    with RunDir(_path(output), overwrite, request) as work:
        calibration = make_set(
            resolved, loaded, progress, download=asked.download, resume=work.resume, score=asked.score
        )
        if output is not None:
            if asked.format == "npz":
                calibration.save(work.path, preview=asked.preview)
            else:
                from ovcalib.calibration.writers import write_images

                write_images(calibration, loaded.spec, work.path, asked.format, asked.preview)
            work.finish()
    return calibration


@documented(ConvertKeywords)
def convert(
    model: str | nn.Module,
    output: Folder,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[ConvertKeywords],
) -> Parity:
    """Write a model as ONNX and as OpenVINO IR (FP32), and check that all forms compute the same.

    output    folder for model.onnx, model.xml and model.bin
    returns   the largest differences between torch, ONNX and IR
    """
    progress = progress or usual_progress()
    reference, module = _reference(model)
    about, rest = model_options(reference, options)
    asked = checked(ConvertOptions, rest)
    to = asked.to
    loaded = _load_model(about, module, progress.say)
    if "onnx" in to and loaded.module is None:
        raise UsageError(f"{reference!r} is a graph already; it converts to IR alone. Use `to=ir`.")
    request = {"model": about.model_dump(mode="json"), **asked.model_dump(mode="json")}
    with RunDir(Path(output), overwrite, request) as work:
        parity = export(loaded, work.path, progress, about.dynamic_batch, asked.fp16).parity
        unwanted = {"onnx": (".onnx",), "ir": (".xml", ".bin")}
        for form in unwanted.keys() - set(to):
            for suffix in unwanted[form]:
                (work.path / "model").with_suffix(suffix).unlink(missing_ok=True)
        work.finish()
    return parity


@documented(EvaluateKeywords)
def evaluate(
    model: str | nn.Module,
    data: str | Images,
    *,
    progress: Progress | None = None,
    **options: Unpack[EvaluateKeywords],
) -> Evaluated:
    """Accuracy of a model on labelled images, or mean average precision of a detector, on a device.

    data   imagefolder:DIR, cifar10[:ROOT], datumaro:FORMAT:DIR or npz:FILE; or the images with their labels, as `eval`
           of `quantize`
    """
    progress = progress or usual_progress()
    reference, module = _reference(model)
    about, rest = model_options(reference, options)
    asked = checked(EvaluateOptions, {"data": _named(data), **rest})
    loaded = _load_model(about, module, progress.say)
    dataset: EvaluationSet
    if isinstance(data, str):
        dataset = open_dataset(data, loaded.spec, asked.limit, asked.download)
    else:
        dataset = ObjectSet(data, loaded.spec, asked.limit)
    task = loaded.spec.task
    _refuse_without_labels(loaded, dataset)
    with tempfile.TemporaryDirectory() as folder:
        if loaded.graph is None:
            exported = export(loaded, Path(folder), progress)
            graph, parts = exported.graph, exported.detector
        else:
            graph = batch_one(loaded.graph, loaded.spec)
            parts = split_detector(graph) if task == "detection" else None
        precision = None if asked.precision == "default" else asked.precision
        body = graph if parts is None else parts.body
        decode = decoder_of(loaded, parts)
        if task == "detection" and decode is None:
            raise ModelError(
                f"The file holds the raw heads of {loaded.spec.name}, and torchvision makes boxes of them outside. "
                "Evaluate the torch model; `ovcalib quantize --eval` measures INT8."
                if parts is None
                else f"The boxes that {loaded.spec.name} returns are in no known layout: DetectionOutput [1, 1, n, 7], "
                "[1, n, 6], or corners [n, 4] with scores and classes. Export it with one of them."
            )
        runner = OpenVINORunner(body, asked.device, precision)
    with progress.task(f"evaluating on {asked.device}", len(dataset), SHORTER) as tick:
        outputs = collect(runner, dataset.images().items, tick)
    found = Evaluated(
        model=loaded.spec.name,
        protocol=dataset.protocol,
        count=len(outputs),
        data_sha256=outputs.digest,
        device=asked.device,
        precision=precision,
        accuracy=None if outputs.labels is None else accuracy(outputs.values, outputs.labels),
    )
    if decode is None:
        return found
    assert outputs.boxes is not None
    boxes = decoded(outputs, output_ports(body), decode)
    return found.model_copy(
        update={
            "detection": mean_precision(outputs.boxes, boxes),
            "boxes": sum(map(len, outputs.boxes)),
            "fault": box_fault(outputs.boxes, boxes, loaded.spec, loaded.spec.name),
        }
    )


@documented(BenchmarkKeywords)
def benchmark(
    models: Folder | Sequence[Folder],
    output: Folder | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[BenchmarkKeywords],
) -> Benchmark:
    """Measure speed and memory of models in turns, each in its own process, and prove that INT8 ran.

    models    FILE.xml or FILE.onnx, or a result folder, which stands for its FP32 and INT8 models
    output    folder for benchmark.json and report.html, .md and .csv; None writes nothing
    """
    from ovcalib.measurement.benchmark import benchmark as measure
    from ovcalib.measurement.device_parity import device_parity
    from ovcalib.reports.benchmark import write_benchmark_report
    from ovcalib.rundir import write_json

    progress = progress or usual_progress()
    paths = _paths(models)
    about, rest = model_options("", options)
    asked = checked(BenchmarkOptions, rest)
    with RunDir(_path(output), overwrite, {"models": list(map(str, paths)), **asked.model_dump(mode="json")}) as work:
        found = measure(paths, asked, progress)
        if asked.data is not None:
            found = found.model_copy(update={"parity": device_parity(paths, asked, about, progress)})
        if output is not None:
            write_json(work.path / "benchmark.json", found.model_dump(mode="json"))
            write_benchmark_report(found, work.path)
            work.finish()
    return found


@documented(DiagnoseKeywords)
def diagnose(
    fp32: Folder,
    int8: Folder,
    output: Folder | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[DiagnoseKeywords],
) -> Diagnosis:
    """Compare a quantized model with its float original, operation by operation.

    fp32     FILE.xml or FILE.onnx
    int8     FILE.xml of the same network after quantization
    output   folder for diagnosis.json and report.html, .md and .csv; None writes nothing
    raises   ModelError where the two are not one network
    """
    from ovcalib.diagnosis.diagnose import diagnose as compare
    from ovcalib.reports.diagnosis import write_diagnosis_report
    from ovcalib.rundir import write_json

    about, rest = model_options(str(fp32), options)
    asked = checked(DiagnosisOptions, rest)
    request = {"model": about.model_dump(mode="json"), "int8": str(int8), **asked.model_dump(mode="json")}
    with RunDir(_path(output), overwrite, request) as work:
        found = compare(about, str(int8), asked, progress or usual_progress())
        if output is not None:
            write_json(work.path / "diagnosis.json", found.model_dump(mode="json"))
            write_diagnosis_report(found, work.path)
            work.finish()
    return found


def report(
    results: Folder | Sequence[Folder],
    output: Folder | None = None,
    *,
    formats: Iterable[Literal["html", "md", "csv"]] = ("html", "md", "csv"),
    latency: bool = True,
) -> list[Path]:
    """Write the report of a result, with its benchmark and diagnosis, or a comparison of several results.

    results   folders that ovcalib wrote, or their JSON files
    output    folder; None is that of the one result, or the current one for several
    latency   False leaves latency out, to compare results of different machines
    returns   the files written
    """
    from ovcalib.reports.build import build_report

    return build_report(_paths(results), list(formats), _path(output), latency)


def sweep(
    recipe: SweepRecipe | Folder,
    output: Folder,
    *,
    jobs: int = 1,
    engine: str = "local",
    store: Folder | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Quantize every model with every source, mode and seed; the same call continues an interrupted sweep.

    recipe    what to run, or a YAML file with it
    output    folder of a new sweep, or of the same sweep, which is continued
    jobs      cells at once, for the engine "local"
    engine    "local", or "dask:ADDRESS" with workers that see the same folders
    store     folder, or address such as s3://bucket/sets, in which calibration sets are looked for, and put for other
              sweeps and machines
    resume    continue in the folder of another recipe; cells that both have are kept
    returns   the state of every cell, with the error of a failed one
    """
    from ovcalib.sweeps.plan import read_sweep_recipe
    from ovcalib.sweeps.run import run_sweep

    content = recipe if isinstance(recipe, SweepRecipe) else read_sweep_recipe(Path(recipe))
    return run_sweep(
        content,
        Path(output),
        jobs=jobs,
        engine=engine,
        store=None if store is None else str(store),
        resume=resume,
        progress=progress or usual_progress(),
    )


@documented(LoadKeywords)
def load_model(model: str | nn.Module, **options: Unpack[LoadKeywords]) -> Model:
    """The model behind a reference: its spec, and a torch module or an OpenVINO graph."""
    reference, module = _reference(model)
    return _load_model(model_options(reference, options)[0], module)


def models(pattern: str = "*") -> list[ModelSpec]:
    """The built-in models whose names match a wildcard pattern."""
    return [builtin.spec(name, builtin.default_weights(name)) for name in list_models(pattern)]


def sources() -> dict[str, dict[str, Any]]:
    """Every calibration source: how its reference is written, what it does and what its options are."""
    table = {}
    for name in SOURCES:
        source = SOURCES[name]
        table[name] = {
            "reference": usage(name, source),
            "summary": (source.__doc__ or "").strip().splitlines()[0],
            "needs": sorted(source.NEEDS),
            "options": {field.name: field.default for field in dataclasses.fields(source.Options)},
            # A dataclass without a docstring gets its signature for one.
            "help": (source.Options.__doc__ or "").strip() if dataclasses.fields(source.Options) else "",
        }
    return table


def _refuse_without_labels(model: Model, dataset: EvaluationSet) -> None:
    """Raise DataError, or ModelError, with the reason where there is nothing to measure."""
    spec = model.spec
    if spec.task == "detection":
        if getattr(dataset, "box_classes", None) is None:
            raise DataError(
                f"{dataset.reference!r} has no boxes, and {spec.name} is a detector. Give a detection set, such as "
                "datumaro:coco:DIR."
            )
    elif spec.num_classes is None:
        raise ModelError(
            f"The outputs of {spec.name} are no class logits (`task={spec.task}`), so there is no accuracy to measure. "
            "`ovcalib quantize --metric-function` measures them with a function of yours."
        )
    elif dataset.labels is None:
        raise DataError(f"{dataset.reference!r} has no labels, so there is no accuracy to measure.")


def _reference(model: str | nn.Module) -> tuple[str, nn.Module | None]:
    """The reference of a model, and the module itself where it was passed."""
    return (model, None) if isinstance(model, str) else (type(model).__name__, model)


def model_options(reference: str, options: Any) -> tuple[ModelOptions, dict[str, Any]]:
    """The options of the model among keywords, and the others."""
    own = {name: value for name, value in options.items() if name in ModelOptions.model_fields}
    rest = {name: value for name, value in options.items() if name not in own}
    return checked(ModelOptions, {"reference": reference, **own}), rest


def _named(images: Any) -> str | None:
    """How a recipe names images: by their reference, or as an object that it cannot hold."""
    return images if images is None or isinstance(images, str) else reference_of(images)


def _path(folder: Folder | None) -> Path | None:
    return None if folder is None else Path(folder)


def _paths(folders: Folder | Sequence[Folder]) -> list[Path]:
    return [Path(folders)] if isinstance(folders, str | Path) else [Path(folder) for folder in folders]
