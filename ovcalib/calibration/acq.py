"""ACQ: a generator that directs the classifier's attention to a position, without collapse (Li et al. 2024).

"Attention-corrected generative data-free quantization". GDFQ's generator also gets a position of the last feature map.
Five terms are added to GDFQ's loss: classes and statistics as the classifier sees them in training mode, that is with
the statistics of the batch in its BatchNorm layers; attention at the position (CACM); the difference of the attention
in both modes; and for pairs of one class and position, the distance of latent vectors over that of the outputs. None of
them compares with the quantized network, from which the paper keeps the generator apart, so there is none here.

Weights are the published ones for the number of classes: those of CIFAR-10 up to 10 classes, of CIFAR-100 up to 100,
and beyond of ImageNet. A step makes pairs, so half as many classes as images; all terms but the last are means over
both halves. The paper does not say whether its batch counts pairs or images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ovcalib.calibration.generator_options import GeneratorOptions
from ovcalib.calibration.sources import Generated, Request

if TYPE_CHECKING:
    import torch

NEEDS = frozenset({"checkpoint"})

# By the largest number of classes that it is for; e3 and beta are 1 everywhere.
PUBLISHED = (
    (10, {"training_classes": 0.5, "training_bn": 1.0, "bn_weight": 0.5, "pair_weight": 1.0}),
    (100, {"training_classes": 0.05, "training_bn": 1.0, "bn_weight": 0.1, "pair_weight": 1.0}),
)
ON_IMAGENET = {"training_classes": 0.05, "training_bn": 0.5, "bn_weight": 0.1, "pair_weight": 0.5}


@dataclass(frozen=True)
class Options(GeneratorOptions):
    __doc__ = f"""{GeneratorOptions.__doc__}
    training_classes   weight of the classes in training mode against those in evaluation mode (e1)
    training_bn        weight of the statistics in training mode against those in evaluation mode (e2)
    attention_weight   weight of the attention at the position (beta)
    mode_weight        weight of the difference of the attention in both modes against that (e3)
    pair_weight        weight of the pairs (gamma)
    free_attention     by how much the attention at the position may miss 1
    free_difference    mean difference of the attention in both modes that is free
    """

    bn_weight: float | None = None
    training_classes: float | None = None
    training_bn: float | None = None
    attention_weight: float = 1.0
    mode_weight: float = 1.0
    pair_weight: float | None = None
    free_attention: float = 0.2
    free_difference: float = 0.1

    PASSES: ClassVar[int] = 2

    def filled_in(self, small: bool, classes: int) -> dict[str, Any]:
        published = next((values for most, values in PUBLISHED if classes <= most), ON_IMAGENET)
        return {**super().filled_in(small, classes), **published}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_batch is not None and self.train_batch % 2:
            raise ValueError(f"train_batch is {self.train_batch}, but must be even: images are made in pairs")
        if not 0 < self.free_attention <= 1:
            raise ValueError(f"free_attention is {self.free_attention}, but must lie in (0, 1]")


def generate(request: Request, options: Options) -> Generated:
    """Labelled images that the classifier looks at in many places."""
    from torch.nn.functional import cross_entropy

    from ovcalib.calibration.generator_training import Training
    from ovcalib.gan.class_losses import (
        attention,
        attention_at,
        attention_difference,
        pair_similarity,
        statistics_gap,
    )

    training = Training(request, options, positions=True)
    o = training.options
    assert o.bn_weight is not None
    assert o.training_classes is not None
    assert o.training_bn is not None
    assert o.pair_weight is not None
    e1, e2, alpha, beta, gamma = o.training_classes, o.training_bn, o.bn_weight, o.attention_weight, o.pair_weight

    def loss(draws: torch.Generator) -> torch.Tensor:
        pairs = training.batch // 2
        labels, positions = training.labels(draws, pairs).repeat(2), training.positions(draws, pairs).repeat(2)
        z = training.latents(draws)
        images = training.generator(z, labels, positions)
        seen, in_training = training.network(images), training.network(images, training=True)
        assert seen.last_map is not None
        assert in_training.last_map is not None
        looked, looked_in_training = attention(seen.last_map), attention(in_training.last_map)
        classes = cross_entropy(seen.logits, labels) + e1 * cross_entropy(in_training.logits, labels)
        statistics = statistics_gap(seen.found, seen.stored) + e2 * statistics_gap(
            in_training.found, in_training.stored
        )
        place = attention_at(looked, positions, o.free_attention) + o.mode_weight * attention_difference(
            looked_in_training, looked, o.free_difference
        )
        pair = pair_similarity(*z.chunk(2), *seen.logits.chunk(2))
        return classes + alpha * statistics + beta * place + gamma * pair

    return training.run(loss)
