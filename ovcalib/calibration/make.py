"""Make, check and score a calibration set."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovcalib.calibration.sets import CalibrationSet, preflight
from ovcalib.calibration.sources import DEFAULT_IMAGES, Request, generate, images_wanted, open_source
from ovcalib.data.objects import ObjectImages
from ovcalib.data.sets import choose
from ovcalib.errors import ModelError, UsageError
from ovcalib.models.load import Model
from ovcalib.progress import Progress
from ovcalib.records.calibration import Provenance, SetScore
from ovcalib.records.model import ModelSpec
from ovcalib.records.options import CalibrationOptions

if TYPE_CHECKING:
    import openvino as ov
    from torch import nn

# BatchNorm layers for a convolution; below it the statistics of most layers are unknown.
ENOUGH_STATISTICS = 0.5
SHORTER = "fewer images (`num_samples`), or fewer optimisation steps (-O steps=N, -O budget=quick)."


def resolve_calibration(
    options: CalibrationOptions, model: Model, progress: Progress
) -> tuple[CalibrationOptions, tuple[str, ...]]:
    """The options with their source and number of images decided, and checked as far as that needs no image.

    returns   also a warning where the source is not the usual one
    raises    UnknownNameError, UsageError
    """
    calib = options.calib
    warnings: tuple[str, ...] = ()
    if calib is None:
        calib, obstacle = usual_source(model)
        if obstacle:
            if options.options:
                given = ", ".join(f"-O {key}={value}" for key, value in options.options.items())
                raise UsageError(
                    f"{given}: options of which source? None was named, and the usual bn-inversion is not possible: "
                    f"{obstacle.removesuffix('.')}. Pass `calib`, for example `calib={calib}`, with options of that "
                    "source."
                )
            if calib == "fractal":
                warnings = (f"calibrated with fractal instead of bn-inversion: {obstacle}",)
                progress.say(warnings[0])
    open_source(calib, model.spec, model.module, options.options)
    count = options.num_samples if options.num_samples is not None else images_wanted(calib, model.spec)
    return options.model_copy(update={"calib": calib, "num_samples": count}), warnings


def usual_source(model: Model) -> tuple[str, str | None]:
    """The source for a model for which none was named, and why it is not bn-inversion, if it is not."""
    return default_source(model.module, model.spec, model.obstacle or few_statistics(model))


def default_source(module: nn.Module | None, spec: ModelSpec, obstacle: str | None = None) -> tuple[str, str | None]:
    """The same, of a torch module.

    obstacle   to inverting it, that is known beforehand
    """
    obstacle = obstacle or inversion_obstacle(module, spec.name)
    if obstacle is None:
        return "bn-inversion", None
    if module is not None:
        from ovcalib.calibration.attention_taps import has_attention

        if has_attention(module, spec.input_shape):
            return "patch-similarity", obstacle
    return "fractal", obstacle


def inversion_obstacle(module: nn.Module | None, name: str) -> str | None:
    """Why the BatchNorm statistics of a model cannot be inverted; None where they can."""
    if module is None:
        return "the BatchNorm layers of a graph are folded away"
    from ovcalib.calibration.bn_taps import find_layers

    try:
        find_layers(module, name)
    except ModelError as error:
        return str(error)
    return None


def few_statistics(model: Model) -> str | None:
    """Why inversion is not the usual source for a file that has folded most of its BatchNorm layers; else None."""
    if model.graph is None or model.module is None:
        return None
    from ovcalib.models.graph_module import layer_counts

    norms, convolutions = layer_counts(model.module)
    if norms >= ENOUGH_STATISTICS * convolutions:
        return None
    return (
        f"{model.spec.name} has {norms} BatchNorm layers for {convolutions} convolutions, so most are folded away. The "
        "training checkpoint has them all, and `calib=prior:MODEL` takes those of another network"
    )


def make_set(
    options: CalibrationOptions,
    model: Model,
    progress: Progress,
    *,
    download: bool = False,
    resume: Path | None = None,
    score: bool = True,
    out_of_time: Callable[[], bool] = lambda: False,
    graph: ov.Model | None = None,
) -> CalibrationSet:
    """The calibration set of resolved options.

    download   whether a data set may be fetched
    resume     folder from which an interrupted generation continues
    score      compare the set with the model's BatchNorm statistics
    out_of_time   tells a source that optimises to end with its images so far, and a warning
    graph      float, batch 1, where the model has been exported
    raises     DataError, UsageError
    """
    assert options.calib is not None
    assert options.num_samples is not None
    with progress.task(f"making {options.calib} images", options.num_samples, SHORTER) as tick:
        calibration = generate(
            options.calib,
            Request(
                count=options.num_samples,
                seed=options.seed,
                spec=model.spec,
                module=model.module,
                graph=lambda: graph or export_once(model),
                tick=tick,
                resume=resume,
                download=download,
                out_of_time=out_of_time,
            ),
            options.options,
        )
    if trials := calibration.provenance.trials:
        from ovcalib.reports.provenance import compared

        taken = calibration.provenance.parts[0].source
        progress.say(
            f"calibrating with {taken}; INT8 error on all candidates' images, times the least: {compared(trials)}"
        )
    return _checked(calibration, model, score)


def export_once(model: Model) -> ov.Model:
    """The float graph of a model, batch 1; nothing is left of the files."""
    from ovcalib.export.convert import export

    with tempfile.TemporaryDirectory() as folder:
        return export(model, Path(folder), Progress()).graph.clone()


def set_of_object(source: Any, options: CalibrationOptions, model: Model) -> CalibrationSet:
    """The calibration set of the images that a Python object holds, see ovcalib.data.objects.

    Without a number, as many as other sources make; of what can be indexed a seeded choice, of a loader the first.
    raises   UsageError, DataError
    """
    if options.options:
        raise UsageError("`options` are those of a source, and images were given instead of one.")
    began = time.perf_counter()
    images = ObjectImages(source, model.spec)
    count = options.num_samples if options.num_samples is not None else min(DEFAULT_IMAGES, len(images))
    if count > len(images):
        raise UsageError(f"`num_samples={count}` is more than the {len(images)} images of {images.reference}.")
    order = choose(images.labels, len(images), options.seed)[:count]
    found = list(islice(images.read(order), count))
    fitted = [image.pixels for image in found if image.pixels is not None]
    whole = len(fitted) == len(found)
    labels = [image.label for image in found if image.label is not None]
    labelled = len(labels) == len(found)
    provenance = Provenance(
        source=images.reference, options={}, num_samples=len(found), requested=count, seed=options.seed,
        seconds=round(time.perf_counter() - began, 3), domain="pixels" if whole else "network", real=True,
        labels="data" if labelled else None,
    )  # fmt: skip
    calibration = CalibrationSet(
        images=np.stack(fitted) if whole else np.stack([image.input for image in found]),
        labels=np.array(labels, np.int64) if labelled else None,
        preprocessing=model.spec.preprocessing,
        provenance=provenance,
    )
    return _checked(calibration, model, score=True)


def _checked(calibration: CalibrationSet, model: Model, score: bool) -> CalibrationSet:
    """A set whose values are those of network inputs, scored where that is asked for."""
    found: dict[str, Any] = {"warnings": (*calibration.provenance.warnings, *preflight(calibration))}
    if score:
        found["score"], found["score_reason"] = score_calibration(model, calibration)
    return dataclasses.replace(calibration, provenance=calibration.provenance.model_copy(update=found))


def score_calibration(model: Model, calibration: CalibrationSet) -> tuple[SetScore | None, str | None]:
    """The score of a calibration set, or the reason why there is none."""
    obstacle = model.obstacle or inversion_obstacle(model.module, model.spec.name)
    if obstacle:
        return None, obstacle
    from ovcalib.calibration.score import score_set

    assert model.module is not None
    return score_set(model.module, calibration, model.spec.name), None
