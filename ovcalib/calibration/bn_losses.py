"""Losses of BatchNorm inversion, side by side: pure functions of tensors.

Shapes: S is the number of statistics sets: images for per-sample statistics, 1 for a batch or a whole set.
    mean, spread      [S, C] of the images at the input of a layer
    mean0, spread0    [C]    stored in the layer
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # inside the square root of a standard deviation, as ZeroQ, DSG and DGH have it


def variance(mean: Tensor, square: Tensor, count: float, unbiased: bool) -> Tensor:
    """Variance from the first two moments of `count` values, clamped against cancellation."""
    biased = (square - mean * mean).clamp_min(0)
    return biased * (count / (count - 1)) if unbiased and count > 1 else biased


def standard_deviation(variance_: Tensor) -> Tensor:
    return (variance_ + EPS).sqrt()


def slack_gap(value: Tensor, target: Tensor, slack: Tensor | float) -> Tensor:
    """max(|value - target| - slack, 0): the part of a deviation beyond the slack.

    Slack distribution alignment (DSG, Zhang et al. 2021); with slack 0 its square is ZeroQ's term.
    """
    return F.relu((value - target).abs() - slack)


def sum_over_channels(gap: Tensor) -> Tensor:
    """[S, C] -> [S]: the squared norm, as the papers print it; wide layers weigh more."""
    return gap.square().sum(-1)


def mean_over_channels(gap: Tensor) -> Tensor:
    """[S, C] -> [S]: the mean square, as the code of GDFQ and its successors has it; every layer weighs the same."""
    return gap.square().mean(-1)


def enhancement(layers: int, images: Tensor) -> Tensor:
    """Layer weights of each image, [N, L]: image j counts layer j mod L twice (DSG's layerwise sample enhancement).

    images   int64 [N], index of each image in the whole set
    The rows are (1 + I) / L, so each sums to (L + 1) / L.
    """
    weights = torch.ones(len(images), layers)
    weights[torch.arange(len(images)), images % layers] = 2.0
    return weights / layers


# Output losses: of the logits or output maps, one value an image ---------------------------------------------


def output_range(outputs: Tensor) -> Tensor:
    """[N, K] -> [N]: largest minus smallest output."""
    return outputs.amax(-1) - outputs.amin(-1)


def stretch(outputs: Tensor, squared: bool) -> Tensor:
    """Output distribution stretching (DGH, Dikstein et al.): minus the range, or its square as the paper prints it.

    outputs   [N, K] flattened outputs
    The loss has no lower bound of its own: see `leash`.
    """
    reach = output_range(outputs)
    return -reach.square() if squared else -reach


def leash(mean: Tensor, std: Tensor, mean0: Tensor, std0: Tensor, delta: float) -> Tensor:
    """What keeps stretched images near the stored statistics of the last BatchNorm (DGH).

    mean, std   [N, C] of each image at the input of the last BatchNorm
    delta       mean squared deviation per channel that is free
    """
    return F.relu(mean_over_channels(mean - mean0) - delta) + F.relu(mean_over_channels(std - std0) - delta)


def soft_inception(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of the label's probability from a soft target (IntraQ, Zhong et al. 2022).

    logits    [N, K]; labels int64 [N]; targets [N] in 0..1
    """
    probability = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    return (probability - targets).square()


def marginal_distance(features: Tensor, centres: Tensor, known: Tensor, lower: float, upper: float) -> Tensor:
    """Keep images of a class apart, but not too far: hinge on the cosine distance to the class's centre (IntraQ).

    features   [N, D], what the classifier reads
    centres    [N, D], mean feature of earlier images of the same class; known bool [N], whether there are any
    """
    distance = 1 - F.cosine_similarity(features, centres, dim=-1)
    hinge = F.relu(lower - distance) + F.relu(distance - upper)
    return torch.where(known, hinge, torch.zeros_like(hinge))
