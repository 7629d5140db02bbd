"""Drawing labels and latents, and turning what a generator makes into pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

ZDistribution = Literal["gaussian", "uniform01"]
PixelMap = Literal["affine", "minmax-per-image"]

# Values that one batch of the widest resolution may hold; small images are made 64 at a time.
BATCH_PIXELS = 64 * 32 * 32


def balanced_labels(count: int, classes: int) -> NDArray[np.int64]:
    """Class 0, 1, ..., 0, 1, ...: any prefix is as balanced as it can be. int64 [count]"""
    return np.arange(count, dtype=np.int64) % classes


def latent(seed: int, index: int, z_dim: int, distribution: ZDistribution = "gaussian") -> NDArray[np.float32]:
    """The latent of one image, from (seed, index) alone. float32 [z_dim]

    "uniform01" is what the publication of DiStyleGAN drew by mistake: z in [0, 1) points into a narrow cone, which
    under-samples the generator.
    """
    rng = np.random.default_rng((seed, index))
    if distribution == "uniform01":
        return rng.random(z_dim, dtype=np.float32)
    return rng.standard_normal(z_dim, dtype=np.float32)


def one_hot(labels: NDArray[np.int64] | Tensor, classes: int) -> Tensor:
    """float32 [N, classes]"""
    return F.one_hot(torch.as_tensor(labels), classes).float()


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """[-1, 1] to 0..255, as StyleGAN2-ADA does it: -1 is 0.5 and rounds down. [N, C, H, W] -> uint8 [N, H, W, C]"""
    values = (images.float() * 127.5 + 128).clamp(0, 255)
    return values.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def to_pixels_minmax(images: Tensor) -> NDArray[np.uint8]:
    """Each image stretched to the full range 0..255, as the publication of DiStyleGAN saved its set."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    values = (images - low) / (high - low).clamp_min(1e-12) * 255
    return values.round().permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def from_pixels(images: NDArray[np.uint8]) -> Tensor:
    """0..255 to [-1, 1]. uint8 [N, H, W, C] -> float32 [N, C, H, W]"""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1


def in_batches(
    make: Callable[[Sequence[int]], NDArray[np.uint8]],
    count: int,
    resolution: int,
    tick: Callable[[int, str], None] = lambda done, note: None,
) -> NDArray[np.uint8]:
    """Images 0 .. count-1, made in batches of one size.

    The last batch is filled up with images that are thrown away: kernels may sum in another order for another batch
    size, and an image must not depend on how many are made with it.
    """
    size = max(1, BATCH_PIXELS // resolution**2)
    made = []
    for start in range(0, count, size):
        images = make(range(start, start + size))
        made.append(images[: count - start])
        tick(min(start + size, count), "")
    return np.concatenate(made)
