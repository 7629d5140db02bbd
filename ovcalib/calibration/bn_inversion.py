"""BatchNorm inversion: fractal pictures, optimised for the network's own statistics.

Fractal pictures already have the colours and the spectrum of photographs; a few steps of whole-set matching give them
the statistics that this very network remembers, in every layer, and DGH's stretching gives the outputs their range:
matched means and spreads alone leave the tails too short, and INT8 clips what is longer. Many images with few steps
measured better than few images with many. Of the methods here it measures best in the least time, and is what ovcalib
calibrates with where nothing else is asked for (benchmarks/results/calibration.md).
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
    input_layer: bool = False
    init: Literal["gaussian", "uniform", "fractal"] = "fractal"
    output: Literal["none", "stretch", "labels"] = "stretch"
    output_weight: float = 1e-3

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 20, "batch": 8, "rate": 0.05, "schedule": "cosine"},
        "standard": {"steps": 120, "batch": 16, "rate": 0.05, "schedule": "cosine"},
        "paper": {"steps": 1000, "batch": 32, "rate": 0.05, "schedule": "cosine"},
    }


def generate(request: Request, options: Options) -> Generated:
    """Fractal pictures, optimised for the network's own BatchNorm statistics."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
