"""IntraQ: images of given classes, as different within a class as real ones (Zhong et al. 2022).

Statistics of each batch; local object reinforcement enlarges a random part of the image in half of the steps; the soft
inception loss asks for a probability of the class that is high but not always one; the marginal distance constraint
keeps an image neither too close to the centre of its class's earlier images nor too far. Margins default to those for
CIFAR-10.
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

    scope: Literal["sample", "batch", "set"] = "batch"
    spread: Literal["std", "var"] = "var"
    input_layer: bool = False
    pipeline: Literal["none", "smooth-augment", "local-object"] = "local-object"
    output: Literal["none", "stretch", "labels"] = "labels"

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 80, "batch": 8, "rate": 0.5, "patience": 8, "schedule": "cosine"},
        "standard": {"steps": 300, "batch": 16, "rate": 0.5, "patience": 25, "schedule": "cosine"},
        "paper": {"steps": 1000, "batch": 256, "rate": 0.5, "patience": 50, "schedule": "plateau"},
    }


def generate(request: Request, options: Options) -> Generated:
    """Labelled images with the diversity of a class."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
