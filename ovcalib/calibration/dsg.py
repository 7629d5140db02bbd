"""DSG: statistics with slack, and layer weights that differ by image (Zhang et al. 2021).

Slack distribution alignment: in every BatchNorm layer a deviation costs nothing up to the 0.9 quantile, over the
channels, of the deviation of Gaussian noise. Layerwise sample enhancement: image j counts layer j twice. The images
themselves are compared as in ZeroQ, without either. This follows the paper; the published code pulls deviations *to*
the margin, weighs channels instead of layers, and hard-codes 20 layers.
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
    slack: float = 0.9
    enhance: bool = True

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 80, "batch": 8, "rate": 0.5, "patience": 16, "schedule": "cosine"},
        "standard": {"steps": 300, "batch": 16, "rate": 0.5, "patience": 60, "schedule": "cosine"},
        "paper": {"steps": 500, "batch": 40, "rate": 0.5, "patience": 100, "schedule": "plateau"},
    }


def generate(request: Request, options: Options) -> Generated:
    """Diverse images: statistics with slack, layers enhanced image by image."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
