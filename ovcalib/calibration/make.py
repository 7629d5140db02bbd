"""Make, check and score a calibration set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovcalib.calibration.sets import CalibrationSet, preflight
from ovcalib.calibration.sources import Request, generate, images_wanted, open_source
from ovcalib.errors import ModelError, UsageError
from ovcalib.models.load import Model
from ovcalib.progress import Progress
from ovcalib.records.calibration import SetScore
from ovcalib.records.options import CalibrationOptions


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
        obstacle = inversion_obstacle(model)
        calib = "fractal" if obstacle else "bn-inversion"
        if obstacle:
            if options.options:
                given = ", ".join(f"-O {key}={value}" for key, value in options.options.items())
                raise UsageError(
                    f"{given}: options of which source? None was named, and the usual bn-inversion is not possible: "
                    f"{obstacle.removesuffix('.')}. Pass `calib`, for example `calib=fractal`, with options of that "
                    "source."
                )
            warnings = (f"calibrated with fractal instead of bn-inversion: {obstacle}",)
            progress.say(warnings[0])
    open_source(calib, model.spec, model.module, options.options)
    count = options.num_samples if options.num_samples is not None else images_wanted(calib, model.spec)
    return options.model_copy(update={"calib": calib, "num_samples": count}), warnings


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


def make_set(
    options: CalibrationOptions,
    model: Model,
    progress: Progress,
    *,
    download: bool = False,
    resume: Path | None = None,
    score: bool = True,
    out_of_time: Callable[[], bool] = lambda: False,
) -> CalibrationSet:
    """The calibration set of resolved options.

    download   whether a data set may be fetched
    resume     folder from which an interrupted generation continues
    score      compare the set with the model's BatchNorm statistics
    out_of_time   tells a source that optimises to end with its images so far, and a warning
    raises     DataError, UsageError
    """
    assert options.calib is not None
    assert options.num_samples is not None
    with progress.task(f"making {options.calib} images", options.num_samples) as tick:
        try:
            calibration = generate(
                options.calib,
                Request(
                    count=options.num_samples,
                    seed=options.seed,
                    spec=model.spec,
                    module=model.module,
                    tick=tick,
                    checkpoint=resume,
                    download=download,
                    out_of_time=out_of_time,
                ),
                options.options,
            )
        except KeyboardInterrupt:
            if resume is not None and resume.is_dir():
                progress.say(f"the images so far are kept in {resume}; the same command goes on from there")
            raise
    found: dict[str, Any] = {"warnings": (*calibration.provenance.warnings, *preflight(calibration))}
    if score:
        found["score"], found["score_reason"] = score_calibration(model, calibration)
    return dataclasses.replace(calibration, provenance=calibration.provenance.model_copy(update=found))


def score_calibration(model: Model, calibration: CalibrationSet) -> tuple[SetScore | None, str | None]:
    """The score of a calibration set, or the reason why there is none."""
    obstacle = inversion_obstacle(model)
    if obstacle:
        return None, obstacle
    from ovcalib.calibration.score import score_set

    assert model.module is not None
    return score_set(model.module, calibration, model.spec.name), None
