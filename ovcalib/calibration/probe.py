"""Images to compare FP32 and INT8 on, which have nothing to do with how the model was calibrated."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.sources import Request, generate
from ovcalib.records.model import ModelSpec

SOURCE = "fractal"
IMAGES = 32
SEED = 1000
# Looking for function systems takes most of the time, and eight look different enough.
OPTIONS = {"systems": "8"}


@functools.lru_cache(maxsize=1)
def probe_inputs(spec: ModelSpec, source: str = SOURCE) -> tuple[NDArray[np.float32], ...]:
    """Network inputs [1, C, H, W] of a source that needs no model."""
    options = OPTIONS if source == SOURCE else {}
    return tuple(generate(source, Request(count=IMAGES, seed=SEED, spec=spec), options).inputs())
