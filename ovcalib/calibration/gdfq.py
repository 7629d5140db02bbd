"""GDFQ: a conditional generator, trained on the classifier's classes and BatchNorm statistics (Xu et al. 2020).

"Generative Low-bitwidth Data Free Quantization", equation 6: cross entropy of the classes that images are made for, and
a tenth of the distance of the BatchNorm statistics. The fine-tuning of the quantized network that alternates with it in
the paper is not part of a calibration source; the generator does not see that network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovcalib.calibration.generator_options import GeneratorOptions
from ovcalib.calibration.sources import Generated, Request

if TYPE_CHECKING:
    import torch

NEEDS = frozenset({"checkpoint"})


@dataclass(frozen=True)
class Options(GeneratorOptions):
    __doc__ = GeneratorOptions.__doc__


def generate(request: Request, options: Options) -> Generated:
    """Labelled images of a generator that knows the classifier alone."""
    from torch.nn.functional import cross_entropy

    from ovcalib.calibration.generator_training import Training
    from ovcalib.gan.class_losses import statistics_gap

    training = Training(request, options)
    weight = training.options.bn_weight
    assert weight is not None

    def loss(draws: torch.Generator) -> torch.Tensor:
        labels = training.labels(draws)
        seen = training.network(training.generator(training.latents(draws), labels))
        return cross_entropy(seen.logits, labels) + weight * statistics_gap(seen.found, seen.stored)

    return training.run(loss)
