"""BatchNorm inversion: fractals, optimised for the statistics in the network's BatchNorm layers.

Fractals have the colours and the spectrum of photographs. A few optimisation steps match the statistics of the whole
set to those stored in every layer, each in units of what it has stored: activations of one layer are often thirty times
as large as those of another, which would hardly count. DGH's output stretching widens the range of the outputs: with
matched means and variances alone the tails are too short, and INT8 clips larger activations. Many images with few steps
give a smaller output error than few images with many steps. Steps are small: Adam moves every pixel by the learning
rate, and larger moves leave noise that the first layers see. This is the default source: of the inversion methods it
has the smallest output error for the time that it takes (benchmarks/results/calibration.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ovcalib.calibration.inversion_options import InversionOptions
from ovcalib.calibration.inversion_options import images_wanted as images_wanted
from ovcalib.calibration.sources import Generated, Request

NEEDS = frozenset({"checkpoint"})


@dataclass(frozen=True)
class Options(InversionOptions):
    __doc__ = InversionOptions.__doc__

    scope: Literal["sample", "batch", "set"] = "set"
    relative: bool = True
    input_weight: float | None = 0.0
    init: Literal["gaussian", "uniform", "fractal"] = "fractal"
    output: Literal["none", "stretch", "labels"] = "stretch"
    output_weight: float | None = 3e-4

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 20, "batch": 8, "rate": 0.02, "schedule": "cosine"},
        "standard": {"steps": 120, "batch": 16, "rate": 0.05, "schedule": "cosine"},
        "paper": {"steps": 1000, "batch": 32, "rate": 0.05, "schedule": "cosine"},
    }


def generate(request: Request, options: Options) -> Generated:
    """Fractals, optimised for the network's BatchNorm statistics."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
