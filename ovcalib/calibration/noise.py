"""Noise: the control, which other sources have to surpass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.sources import Generated, Request

NEEDS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Options:
    """
    distribution   gaussian: N(0, 1) as network input, the mean and variance of normalised photographs; uniform:
                   every pixel value equally likely
    """

    distribution: Literal["gaussian", "uniform"] = "gaussian"


def generate(request: Request, options: Options) -> Generated:
    """Independent values at every position."""
    c, h, w = request.spec.input_shape
    images: list[NDArray[Any]] = []
    for i in range(request.count):
        rng = np.random.default_rng((request.seed, i))
        if options.distribution == "gaussian":
            images.append(rng.standard_normal((c, h, w), dtype=np.float32))
        else:
            images.append(rng.integers(0, 256, (h, w, c), dtype=np.uint8))
        request.tick(i + 1, "")
    return Generated(np.stack(images), domain="network" if options.distribution == "gaussian" else "pixels")
