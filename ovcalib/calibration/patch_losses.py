"""The loss of PSAQ-ViT (Li et al. 2022, "Patch Similarity Aware Data-Free Quantization for Vision Transformers").

What attention makes of a photograph differs between the patches of its objects and those of its background; what it
makes of noise is alike everywhere. The entropy of the similarities between patches measures that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

POINTS = 10  # where a density is evaluated
FLOOR = 1e-4  # added to a density, so that its logarithm exists
MOST_EXTRA_TOKENS = 5  # class token, distillation token or four registers


def extra_tokens(tokens: int, height: int, width: int) -> int:
    """How many tokens stand in front of the patches.

    The patches are a grid, of the proportions of the image or square (windows), and other tokens are few: the smallest
    number from 0 to 5 that leaves a grid. 0 if none does.

    height, width   of the image, pixels
    """
    common = math.gcd(height, width)
    cell = (height // common) * (width // common)
    for extra in range(min(MOST_EXTRA_TOKENS, tokens - 1) + 1):
        patches = tokens - extra
        if math.isqrt(patches) ** 2 == patches:
            return extra
        if patches % cell == 0 and math.isqrt(patches // cell) ** 2 == patches // cell:
            return extra
    return 0


def similarities(patches: Tensor) -> Tensor:
    """Cosine similarities of all pairs of patches of each window, in (-1, 1).

    patches   [N, windows, L, D]
    returns   [N, windows * L * L]
    """
    directions = F.normalize(patches, dim=-1)
    return (directions @ directions.transpose(-1, -2)).flatten(1)


def density(samples: Tensor, points: Tensor, bandwidth: float) -> Tensor:
    """Gaussian kernel density of samples [N, S] at points [N, P], as [N, P]."""
    distance = (points[:, :, None] - samples[:, None, :]) / bandwidth
    return torch.exp(-0.5 * distance.square()).mean(2) / (bandwidth * math.sqrt(2 * math.pi))


def differential_entropy(samples: Tensor, bandwidth: float) -> Tensor:
    """Differential entropy in nats of the density of samples [N, S], as [N].

    The density is evaluated at ten points from the smallest to the largest sample, and the integral is that of
    trapezoids between them.
    """
    with torch.no_grad():
        low, high = samples.amin(1, keepdim=True), samples.amax(1, keepdim=True)
        points = low + (high - low) * torch.linspace(0, 1, POINTS, device=samples.device)
    p = density(samples, points, bandwidth) + FLOOR
    return torch.trapezoid(-p * p.log(), points, dim=1)


def patch_entropy(attended: Tensor, height: int, width: int, bandwidth: float) -> Tensor:
    """Entropy of the patch similarities of one block, [N].

    attended        softmax(QK^T)V, averaged over heads, [N, windows, tokens, D]
    height, width   of the image, pixels
    """
    patches = attended[:, :, extra_tokens(attended.shape[2], height, width) :]
    return differential_entropy(similarities(patches), bandwidth)


def total_variation(images: Tensor) -> Tensor:
    """Norms of the differences to the neighbours below, right, and on both diagonals, summed; [N, C, H, W] to [N]."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., 1:, 1:] - images[..., :-1, :-1],
    )
    return torch.stack([difference.flatten(1).norm(dim=1) for difference in differences]).sum(0)
