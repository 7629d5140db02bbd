"""IntraQ: images of given classes, as different within a class as real ones (Zhong et al. 2022).

Statistics of each batch; local object reinforcement enlarges a random part of the image in half of the steps; the soft
inception loss asks for a probability of the class that is high but not always one, drawn once for every image; the
marginal distance constraint keeps what the classifier reads of an image neither too close to the centre of its class's
earlier images nor too far. "Earlier" are the images of earlier batches, so it needs two images a class or more.

Margins and targets are the published ones for the number of classes: those of CIFAR-10 up to 10 classes, of CIFAR-100
up to 100, and beyond of ResNet-18 on ImageNet, whose margins 0 and 2 and target 1 leave nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ovcalib.calibration.inversion_options import InversionOptions
from ovcalib.calibration.inversion_options import images_wanted as images_wanted
from ovcalib.calibration.sources import Generated, Request

NEEDS = frozenset({"checkpoint"})

# By the largest number of classes that it is for.
PUBLISHED = (
    (10, {"confidence": 0.95, "lower": 0.05, "upper": 0.8}),
    (100, {"confidence": 0.6, "lower": 0.02, "upper": 1.0}),
)
ON_IMAGENET = {"confidence": 1.0, "lower": 0.0, "upper": 2.0}


@dataclass(frozen=True)
class Options(InversionOptions):
    __doc__ = InversionOptions.__doc__

    scope: Literal["sample", "batch", "set"] = "batch"
    spread: Literal["std", "var"] = "var"
    input_weight: float | None = 0.0
    pipeline: Literal["none", "smooth-augment", "local-object"] = "local-object"
    output: Literal["none", "stretch", "labels"] = "labels"
    confidence: float | None = None
    lower: float | None = None
    upper: float | None = None

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 80, "batch": 8, "rate": 0.5, "patience": 8, "schedule": "cosine"},
        "standard": {"steps": 300, "batch": 16, "rate": 0.5, "patience": 25, "schedule": "cosine"},
        "paper": {"steps": 1000, "batch": 256, "rate": 0.5, "patience": 50, "schedule": "plateau"},
    }

    def filled_in(self, classes: int | None) -> dict[str, Any]:
        published = next((values for most, values in PUBLISHED if (classes or 0) <= most), ON_IMAGENET)
        return {**super().filled_in(classes), **published}


def generate(request: Request, options: Options) -> Generated:
    """Labelled images with the diversity of a class."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
