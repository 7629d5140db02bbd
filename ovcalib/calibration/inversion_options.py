"""Options of sources that optimise images, and the axes along which methods of BatchNorm inversion differ.

Needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ovcalib.records.model import ModelSpec
from ovcalib.records.preprocessing import SMALL_SIDE, USUAL_PIXELS

# Eight small images do not use a processor fully: with 32, ResNet-20 takes half the time and has the same output error.
BATCH_OF_SMALL = 32


@dataclass(frozen=True)
class LoopOptions:
    """
    Values that are None depend on the budget, on other options or on the network; a run records what they came to.

    budget          quick, standard or paper (the published number of steps and schedule)
    steps           optimisation steps of every image
    batch           images that go through the network together
    init            where images start: gaussian noise, uniform noise, or fractal pictures
    rate            learning rate, in units of the normalised input
    """

    budget: Literal["quick", "standard", "paper"] = "quick"
    steps: int | None = None
    batch: int | None = None
    init: Literal["gaussian", "uniform", "fractal"] | None = "gaussian"
    rate: float | None = None

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {}

    def filled_in(self, classes: int | None) -> dict[str, Any]:
        """What takes the place of None, by option.

        classes   of the network, None where it has no class logits
        """
        return self.BUDGETS[self.budget]

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate is {self.rate}, but must be positive")


@dataclass(frozen=True)
class InversionOptions(LoopOptions):
    """
    precision       bf16 runs the network in bfloat16 (autocast), fp32 in float32; auto takes the faster one on this CPU

    scope           statistics of each sample, of each batch, or of the whole set
    spread          what is compared beside the mean: standard deviation or variance
    unbiased        spread with n - 1 in the denominator
    reduction       sum or mean over channels and layers
    relative        divide squared deviations by the layer's stored variance, averaged over channels, so that layers
                    with large activations do not outweigh the others
    spread_weight   weight of the spread against the mean
    input_weight    weight of the images themselves, compared with mean 0 and std 1 as one more layer; 0 leaves them
                    out. Statistics of a batch are those of each of its images here
    slack           share of channels (0..1) whose deviation, measured on noise, is free in each BatchNorm layer
    enhance         count BatchNorm layer j twice for image j

    pipeline        what images go through at every step: nothing, smooth-augment (blur, flip, crop), or local-object
                    (a random enlarged part, flipped)
    extra_pixels    how much larger than the network's input the optimised images are, for the crop
    enlarge         local-object: smallest share of the area that is enlarged
    clip            keep what the network sees between black and white, straight through for the gradient
    swing           read the input of every strided convolution shifted by up to a pixel, at random, at every step

    output          output loss: none, stretch (widen the range of the outputs), or labels (soft inception)
    output_weight   weight of the output loss against the statistics
    squared_range   stretch: the square of the range
    leash           stretch: hold each image's statistics at the last BatchNorm near the stored ones
    delta           stretch: mean squared deviation there that is free
    confidence      labels: smallest target probability of the label
    lower, upper    labels: cosine distances from the class's centre between which nothing is pushed
    distance_weight labels: weight of that distance; 0 leaves it out

    optimizer       adam or radam
    schedule        plateau, plateau-reset (as DGH: forgets the best loss at every cut), or cosine. The short budgets of
                    methods published with plateau take cosine: they end before a plateau shows, and the published rate
                    would leave its own noise in the images
    patience        plateau: steps without improvement before the rate is cut
    factor          plateau: what the rate is multiplied with
    refresh         after a step, measure the batch again for the statistics of the set (DGH, algorithm 1) instead of
                    keeping what was measured before the step (the authors' code)
    """

    precision: Literal["auto", "fp32", "bf16"] = "auto"

    scope: Literal["sample", "batch", "set"] = "set"
    spread: Literal["std", "var"] = "std"
    unbiased: bool = False
    reduction: Literal["sum", "mean"] = "mean"
    relative: bool = False
    spread_weight: float | None = 1.0
    input_weight: float | None = 1.0
    slack: float = 0.0
    enhance: bool = False

    pipeline: Literal["none", "smooth-augment", "local-object"] = "none"
    extra_pixels: int | None = None
    enlarge: float = 0.5
    clip: bool = False
    swing: bool = False

    output: Literal["none", "stretch", "labels"] = "none"
    output_weight: float | None = 1.0
    squared_range: bool | None = False
    leash: bool | None = True
    delta: float = 0.5
    confidence: float | None = 0.95
    lower: float | None = 0.05
    upper: float | None = 0.8
    distance_weight: float = 1.0

    optimizer: Literal["adam", "radam"] = "adam"
    schedule: Literal["plateau", "plateau-reset", "cosine"] | None = None
    patience: int | None = None
    factor: float = 0.1
    refresh: bool | None = False

    @property
    def keeps_distance(self) -> bool:
        """Whether any distance within a class would cost something: cosine distances lie between 0 and 2."""
        if self.output != "labels" or self.lower is None or self.upper is None:
            return False
        return self.distance_weight > 0 and (self.lower > 0 or self.upper < 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}, but must be at least 1")
        if not 0 <= self.slack < 1:
            raise ValueError(f"slack is {self.slack}, but must lie in [0, 1)")
        if not 0 < self.enlarge <= 1:
            raise ValueError(f"enlarge is {self.enlarge}, but must lie in (0, 1]")
        if self.extra_pixels is not None and self.extra_pixels < 0:
            raise ValueError(f"extra_pixels is {self.extra_pixels}, but must not be negative")
        if self.extra_pixels and self.pipeline != "smooth-augment":
            raise ValueError("extra_pixels is for the crop of pipeline=smooth-augment")
        if self.enhance and self.scope != "sample":
            raise ValueError("enhance weighs layers by image, which needs scope=sample")
        if self.input_weight is not None and self.input_weight < 0:
            raise ValueError(f"input_weight is {self.input_weight}, but must not be negative")
        if self.refresh and self.scope != "set":
            raise ValueError("refresh is about the statistics of the whole set, which needs scope=set")


# What `ovcalib sources` and the documentation show of an option.
InversionOptions.__doc__ = f"{LoopOptions.__doc__}{InversionOptions.__doc__}"

Options = TypeVar("Options", bound=LoopOptions)


def resolve(options: Options, size: tuple[int, int], classes: int | None = None) -> Options:
    """The options, with what is None filled in.

    size      height and width of the network's input, pixels
    classes   of the network, None where it has no class logits
    """
    values = options.filled_in(classes)
    filled = {name: value for name, value in values.items() if getattr(options, name) is None}
    side = min(size)
    if "batch" in filled:
        if side <= SMALL_SIDE:
            filled["batch"] = max(filled["batch"], BATCH_OF_SMALL)
        # Of larger images fewer go together, for their memory.
        filled["batch"] = max(1, int(filled["batch"] * min(1.0, USUAL_PIXELS / math.prod(size))))
    if isinstance(options, InversionOptions) and options.extra_pixels is None:
        # 32 pixels at 224, as published; in proportion elsewhere.
        filled["extra_pixels"] = round(side / 7) if options.pipeline == "smooth-augment" else 0
    return dataclasses.replace(options, **filled)


def images_wanted(spec: ModelSpec, argument: str) -> int:
    """The default number of images: optimised ones are expensive, and a few dozen are enough."""
    _, height, width = spec.input_shape
    return 64 if height * width > 96 * 96 else 128
