"""Images to compare FP32 and INT8 on, which have nothing to do with how the model was calibrated."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.make import usual_source
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.sources import Request, generate
from ovcalib.models.load import Model
from ovcalib.progress import Progress
from ovcalib.records.calibration import Provenance
from ovcalib.records.model import ModelSpec, Weights

SOURCE = "fractal"
IMAGES = 32
SEED = 1000
# Looking for function systems takes most of the time, and eight look different enough.
OPTIONS = {"systems": "8"}


def probe_inputs(spec: ModelSpec, source: str = SOURCE) -> tuple[NDArray[np.float32], ...]:
    """Network inputs [1, C, H, W] of a source that needs no model."""
    # Of the model only its input counts, so that models of the same input share the images.
    plain = ModelSpec(
        name="probe", input_shape=spec.input_shape, num_classes=None, preprocessing=spec.preprocessing,
        weights=Weights(origin="random"),
    )  # fmt: skip
    return _made(plain, source)


def judging_inputs(
    model: Model, calibration: CalibrationSet, progress: Progress
) -> dict[str, tuple[NDArray[np.float32], ...]]:
    """Network inputs [1, C, H, W] that judge what was fitted to a calibration set, by the source that made them.

    Fractals, and images of the source that is usual for the model; but none of a source that the set is of, and none
    at all where that is not known.
    """
    origins = list(_origins(calibration.provenance))
    if any(map(_unknown, origins)):
        return {}
    made_by = set(map(_name, origins))
    judges = {} if SOURCE in made_by else {SOURCE: probe_inputs(model.spec)}
    source, _ = usual_source(model)
    if source not in (SOURCE, *made_by):
        with progress.task(f"making {source} images to judge by", IMAGES) as tick:
            request = Request(count=IMAGES, seed=SEED, spec=model.spec, module=model.module, tick=tick)
            judges[source] = tuple(generate(source, request).inputs())
    return judges


@functools.lru_cache(maxsize=4)
def _made(spec: ModelSpec, source: str) -> tuple[NDArray[np.float32], ...]:
    options = OPTIONS if source == SOURCE else {}
    return tuple(generate(source, Request(count=IMAGES, seed=SEED, spec=spec), options).inputs())


def blind_to(calibration: CalibrationSet) -> str | None:
    """Why fractals say nothing of a model that was calibrated with a set; None where they do.

    Ranges that come from fractals fit fractals, whatever they do to photographs.
    """
    for origin in _origins(calibration.provenance):
        if _name(origin) == SOURCE:
            return "it is predicted from fractals, and the calibration images are fractals themselves"
        if _unknown(origin):
            return f"it is not known which source made the images of {origin.source}"
    return None


def _name(origin: Provenance) -> str:
    return origin.source.partition(":")[0]


def _unknown(origin: Provenance) -> bool:
    """Whether it is not known what made the images."""
    return _name(origin) == "npz" and not origin.real


def _origins(provenance: Provenance) -> Iterator[Provenance]:
    if not provenance.parts:
        yield provenance
    for part in provenance.parts:
        yield from _origins(part)
