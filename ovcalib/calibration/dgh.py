"""DGH: one set of statistics for the whole set (Dikstein et al., Sony).

Every batch is optimised for the statistics of all images together, so single images may differ as those of a data set
do. Images are blurred and cropped on the way to the network, and a second loss stretches the range of the outputs.
Needs no labels and works for any task.

There are three forms of it, `-O variant=...`:

    leashed   the product's loss, with the paper's limit on the stretching: each image's statistics at the last
              BatchNorm stay near the stored ones. The default: it is the form that was measured
              (benchmarks/results/calibration.md), and without the limit the loss has no lower bound
    paper     algorithm 1, which measures a batch again after its step; the squared range, with the limit; the weights
              of the paper's repository, which weighs the spread with 10. Its output_weight is that for ResNet-18;
              ResNet-50 has 1e-7 and MobileNetV2 3e-5
    product   Sony's Model Compression Toolkit: no second measurement, the plain range and no limit. Its published
              budget is 500 steps in batches of 32, the paper's 1000 in batches of 128

The paper prints the squared distance of means and variances; both codes compare standard deviations and average over
channels, and their weights belong to that. -O spread=var and -O reduction=sum give the printed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ovcalib.calibration.inversion_options import InversionOptions
from ovcalib.calibration.inversion_options import images_wanted as images_wanted
from ovcalib.calibration.sources import Generated, Request

NEEDS = frozenset({"checkpoint"})

LEASHED = {
    "refresh": False, "squared_range": False, "leash": True, "output_weight": 1e-5, "spread_weight": 1.0,
    "input_weight": 1.0,
}  # fmt: skip
VARIANTS = {
    "leashed": LEASHED,
    "paper": {**LEASHED, "refresh": True, "squared_range": True, "output_weight": 3e-7, "spread_weight": 10.0},
    # It adds up the three channels of the images, and averages those of layers.
    "product": {**LEASHED, "leash": False, "input_weight": 3.0},
}


@dataclass(frozen=True)
class Options(InversionOptions):
    __doc__ = f"""{InversionOptions.__doc__}
    variant         leashed, paper or product: fills in refresh, squared_range, leash, output_weight, spread_weight and
                    input_weight, and the budget `paper`
    """

    variant: Literal["leashed", "paper", "product"] = "leashed"
    scope: Literal["sample", "batch", "set"] = "set"
    spread_weight: float | None = None
    input_weight: float | None = None
    pipeline: Literal["none", "smooth-augment", "local-object"] = "smooth-augment"
    clip: bool = True
    output: Literal["none", "stretch", "labels"] = "stretch"
    output_weight: float | None = None
    squared_range: bool | None = None
    leash: bool | None = None
    optimizer: Literal["adam", "radam"] = "radam"
    factor: float = 0.5
    refresh: bool | None = None

    # Patience is a fiftieth of the steps.
    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 80, "batch": 8, "rate": 16.0, "patience": 2, "schedule": "plateau-reset"},
        "standard": {"steps": 300, "batch": 16, "rate": 16.0, "patience": 6, "schedule": "plateau-reset"},
        "paper": {"steps": 1000, "batch": 128, "rate": 16.0, "patience": 20, "schedule": "plateau-reset"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "paper" and self.scope != "set" and self.refresh is None:
            raise ValueError("variant=paper measures the set again after every step, which needs scope=set")

    def filled_in(self, classes: int | None) -> dict[str, Any]:
        values = {**super().filled_in(classes), **VARIANTS[self.variant]}
        if self.variant == "product" and self.budget == "paper":
            values |= {"steps": 500, "batch": 32, "patience": 10}
        return values


def generate(request: Request, options: Options) -> Generated:
    """Whole-set statistics, smoothed and augmented images, stretched outputs."""
    from ovcalib.calibration.inversion import invert

    return invert(request, options)
