"""Losses of the generators that are trained against a frozen classifier: pure functions of tensors.

Shapes: N images, K classes, maps of h rows and w columns. `Statistics` are the mean and the biased variance, each [C],
of the input of one BatchNorm layer over a batch and its positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor]

# Added to the divergence of a pair, which is 0 for equal images.
EPS = 1e-3
# Below this a probability counts as 0, so that its logarithm has a gradient.
TINY = 1e-12


def statistics_gap(found: Sequence[Statistics], targets: Sequence[Statistics]) -> Tensor:
    """Squared distance of means and variances, averaged over channels and then over layers.

    The papers print sums over channels; all published weights belong to this form, which is that of GDFQ's code.
    """
    return torch.stack([
        (mean - mean0).square().mean() + (variance - variance0).square().mean()
        for (mean, variance), (mean0, variance0) in zip(found, targets, strict=True)
    ]).mean()  # fmt: skip


# FDDA (Zhong et al. 2022) ------------------------------------------------------------------------------------


def first_deep_layer(layers: int) -> int:
    """The index, from 0, of the first of so many BatchNorm layers that is aligned with the centre of a class.

    Half of the layers less one or two, as in the authors' code: 8 of 20, 9 of 21, 24 of 52. The paper's ceil(L / 2) - 2
    is the same number; it does not say where it counts from.
    """
    return max(0, (layers + 1) // 2 - 2)


def distorted(
    centre: Sequence[Statistics], mean_noise: float, variance_noise: float, draws: torch.Generator
) -> list[Statistics]:
    """The centre of a class with Gaussian noise, anew for every layer and channel; variances may become negative.

    mean_noise, variance_noise   standard deviations of the noise (v_mu, v_sigma)
    """

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draws).to(like)

    return [(mean + mean_noise * noise(mean), variance + variance_noise * noise(variance)) for mean, variance in centre]


# ACQ (Li et al. 2024) ----------------------------------------------------------------------------------------


def attention(maps: Tensor) -> Tensor:
    """Energy of the last feature map at each position, scaled to 0..1 image by image: [N, C, h, w] -> [N, h * w]."""
    energy = maps.float().square().sum(1).flatten(1)
    low, high = energy.amin(1, keepdim=True), energy.amax(1, keepdim=True)
    return (energy - low) / (high - low).clamp_min(TINY)


def attention_at(found: Tensor, positions: Tensor, free: float) -> Tensor:
    """-log min(M[p] + free, 1): class attention centre matching, mean over the images.

    found       [N, h * w], attention of the images
    positions   int64 [N], row * w + column of the position that each image was asked for
    free        by how much the attention may miss 1
    The paper prints max in place of min, which would be constant.
    """
    at = found.gather(1, positions[:, None]).squeeze(1)
    return -(at + free).clamp_max(1).log().mean()


def attention_difference(one: Tensor, other: Tensor, free: float) -> Tensor:
    """max(mean |M - M'| - free, 0) of the attention in both modes of the network, [N, h * w] each."""
    return ((one - other).abs().mean() - free).clamp_min(0)


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Divergence of two distributions in nats, 0 to ln 2: [N, K], [N, K] -> [N]."""
    middle = (one + other) / 2

    def divergence(p: Tensor) -> Tensor:
        return (p * (p.clamp_min(TINY).log() - middle.clamp_min(TINY).log())).sum(1)

    return (divergence(one) + divergence(other)) / 2


def pair_similarity(z1: Tensor, z2: Tensor, logits1: Tensor, logits2: Tensor) -> Tensor:
    """Distance of two latent vectors over the distance of what the classifier makes of their images (L_AD).

    z1, z2             [N, latent]
    logits1, logits2   [N, K] of images of the same classes and positions
    The classes that the classifier takes either image for are left out of both, so that other classes have to differ.
    The mean of the distances is divided by the mean of the divergences; the paper does not say which comes first.
    """
    rows = torch.arange(len(logits1), device=logits1.device)
    taken = torch.zeros_like(logits1, dtype=torch.bool)
    taken[rows, logits1.argmax(1)] = True
    taken[rows, logits2.argmax(1)] = True
    # With two or three classes nothing may be left, where minus infinity would make NaN.
    rest1, rest2 = (logits.float().masked_fill(taken, -1e9).softmax(1) for logits in (logits1, logits2))
    return (z1 - z2).abs().mean() / (jensen_shannon(rest1, rest2).mean() + EPS)
