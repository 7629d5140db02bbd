"""DGH: one set of statistics for the whole set (Dikstein et al., Sony).

Every batch is optimised for the statistics of all images together, so single images may differ as those of a data set
do. Images are blurred and cropped on the way to the network, and a second loss stretches
the range of the outputs, limited by the statistics of the last BatchNorm. Needs no labels and works for any task.

The paper prints the squared distance of means and variances; its code compares standard deviations, averages over
channels, and weighs the spread with 10 (paper's repository) or 1 (the product). The defaults here are the product's
form; -O spread=var, -O reduction=sum and -O spread_weight=10 give the others. -O refresh=true is the paper's
algorithm, false its code.
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
    pipeline: Literal["none", "smooth-augment", "local-object"] = "smooth-augment"
    clip: bool = True
    output: Literal["none", "stretch", "labels"] = "stretch"
    output_weight: float = 1e-5
    optimizer: Literal["adam", "radam"] = "radam"
    factor: float = 0.5

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 80, "batch": 8, "rate": 16.0, "patience": 2, "schedule": "plateau-reset"},
        "standard": {"steps": 300, "batch": 16, "rate": 16.0, "patience": 6, "schedule": "plateau-reset"},
        "paper": {"steps": 1000, "batch": 128, "rate": 16.0, "patience": 20, "schedule": "plateau-reset"},
    }


def generate(request: Request, options: Options) -> Generated:
    """Whole-set statistics, smoothed and augmented images, stretched outputs."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
