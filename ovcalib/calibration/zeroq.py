"""ZeroQ: every single image has the statistics of the training data (Cai et al. 2020, section 3.1).

Each image's mean and standard deviation over its own positions are pulled to the stored ones, in every layer, and those
of the image itself to 0 and 1. Statistics are read at the inputs of the BatchNorm layers; the authors' code reads the
outputs of the first convolutions, and pairs them wrongly wherever their order or number differs.

The published learning rate is for 500 steps. With the few steps of the quick budget it drives pixels far beyond black
and white and makes the images alike (`diversity` in the score); a fifth of it does not.
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

    scope: Literal["sample", "batch", "set"] = "sample"
    unbiased: bool = True
    reduction: Literal["sum", "mean"] = "sum"

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 80, "batch": 8, "rate": 0.1, "patience": 16, "schedule": "cosine"},
        "standard": {"steps": 300, "batch": 16, "rate": 0.5, "patience": 60, "schedule": "cosine"},
        "paper": {"steps": 500, "batch": 32, "rate": 0.5, "patience": 100, "schedule": "plateau"},
    }


def generate(request: Request, options: Options) -> Generated:
    """Images that each match the stored BatchNorm statistics."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
