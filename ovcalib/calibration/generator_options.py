"""Options of the sources that train a generator against the classifier: gdfq, acq and fdda. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ovcalib.records.preprocessing import SMALL_SIDE

# At the published rate a few hundred steps hardly reach the classes.
SHORT = {"rate": 5e-3, "schedule": "cosine"}


@dataclass(frozen=True)
class GeneratorOptions:
    """
    Values that are None depend on the budget, the size of the images and the classes; a run records what they came to.

    budget          quick, standard or paper (the published number of steps, batch, width and schedule)
    steps           optimisation steps of the generator
    train_batch     images of a step
    width           channels of the generator's widest layer
    latent          length of a latent vector
    rate            learning rate of Adam; the short budgets take five times the published one
    schedule        cosine to zero, or tenths: a tenth of the rate after every quarter of the steps, as published. Short
                    budgets take cosine: with tenths most of their steps would hardly move anything
    bn_weight       weight of the BatchNorm statistics against the classes
    """

    budget: Literal["quick", "standard", "paper"] = "quick"
    steps: int | None = None
    train_batch: int | None = None
    width: int | None = None
    latent: int = 100
    rate: float | None = None
    schedule: Literal["cosine", "tenths"] | None = None
    bn_weight: float | None = 0.1

    # Of a batch through the network at every step; short budgets take so many times fewer steps.
    PASSES: ClassVar[int] = 1

    def filled_in(self, small: bool, classes: int) -> dict[str, Any]:
        """What takes the place of None, by option.

        small     the images have sides of at most 96 pixels
        classes   of the network
        """
        short, long = (1000, 5000) if small else (100, 500)
        return {
            "quick": {"steps": short // self.PASSES, "train_batch": 16 if small else 8, "width": 32},
            "standard": {"steps": long // self.PASSES, "train_batch": 32 if small else 16, "width": 64},
            "paper": {"steps": 80_000, "train_batch": 200 if small else 16, "width": 128},
        }[self.budget] | ({"rate": 1e-3, "schedule": "tenths"} if self.budget == "paper" else SHORT)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("train_batch", 2), ("width", 2), ("latent", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate is {self.rate}, but must be positive")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("budget", "schedule") and value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} is {value}, but must not be negative")


Options = TypeVar("Options", bound=GeneratorOptions)


def resolve(options: Options, side: int, classes: int) -> Options:
    """The options, with what is None filled in.

    side      shorter side of the network's input, pixels
    classes   of the network
    """
    values = options.filled_in(side <= SMALL_SIDE, classes)
    return dataclasses.replace(
        options, **{name: value for name, value in values.items() if getattr(options, name) is None}
    )
