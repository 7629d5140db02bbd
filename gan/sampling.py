"""Drawing labels and latents, and turning what a generator makes into pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ovcalib.errors import DataError
from ovcalib.records.model import ModelSpec

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


def latents(seed: int, indices: Sequence[int], z_dim: int, distribution: ZDistribution = "gaussian") -> Tensor:
    """float32 [N, z_dim], one row an index."""
    return torch.from_numpy(np.stack([latent(seed, i, z_dim, distribution) for i in indices]))


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


@dataclass(frozen=True)
class Drawer:
    """A generator that makes image i from i alone.

    what         how to call it in a message
    resolution   of its square images
    classes      how many it knows; 0 where it is unconditional
    names        of the classes, where they are known
    draw         indices and labels -> uint8 [N, H, W, C]
    """

    what: str
    resolution: int
    classes: int
    names: tuple[str, ...]
    draw: Callable[[Sequence[int], NDArray[np.int64] | None], NDArray[np.uint8]]


def draw_images(
    drawer: Drawer,
    count: int,
    tick: Callable[[int, str], None] = lambda done, note: None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Images 0 .. count-1 with class-balanced labels, made in batches of one size.

    The last batch is filled up with images that are thrown away: kernels may sum in another order for another batch
    size, and an image must not depend on how many are made with it.
    """
    size = max(1, BATCH_PIXELS // drawer.resolution**2)
    padded = -(-count // size) * size
    labels = balanced_labels(padded, drawer.classes) if drawer.classes else None
    made = []
    for start in range(0, count, size):
        chosen = slice(start, start + size)
        images = drawer.draw(range(start, start + size), None if labels is None else labels[chosen])
        made.append(images[: count - start])
        tick(min(start + size, count), "")
    return np.concatenate(made), None if labels is None else labels[:count]


def for_model(
    drawer: Drawer, spec: ModelSpec, count: int, tick: Callable[[int, str], None]
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Images of a generator at the input size of a model, and their labels as the model's classes.

    raises   DataError where the generator cannot serve the model: fewer pixels, or other classes
    """
    _, height, width = spec.input_shape
    if max(height, width) > drawer.resolution:
        raise DataError(
            f"{drawer.what} makes images of {drawer.resolution}x{drawer.resolution}, but {spec.name} takes "
            f"{height}x{width}: scaled up they would hold nothing that its filters look for. Use a generator of that "
            "resolution, or calibrate with fractal or real:DATA."
        )
    if drawer.classes and spec.num_classes not in (None, drawer.classes):
        raise DataError(
            f"{drawer.what} makes images of {drawer.classes} classes, but {spec.name} knows {spec.num_classes}. "
            "Use a generator that was trained on the model's data, or calibrate with fractal or real:DATA."
        )
    index = _class_index(drawer, spec)
    images, labels = draw_images(drawer, count, tick)
    if images.shape[1:] != (height, width, spec.input_shape[0]):
        fitted = [spec.preprocessing.fit(PIL.Image.fromarray(image.squeeze())) for image in images]
        images = np.stack(fitted)
    return images, None if labels is None or index is None else index[labels]


def _class_index(drawer: Drawer, spec: ModelSpec) -> NDArray[np.int64] | None:
    """The model's class for each of the generator's: by name where both tell, else in order."""
    if not drawer.names or not spec.classes:
        return np.arange(drawer.classes) if drawer.classes else None
    own = {name.lower().replace("_", " "): i for i, name in enumerate(spec.classes)}
    names = [name.lower().replace("_", " ") for name in drawer.names]
    strangers = [name for name in names if name not in own]
    if strangers:
        raise DataError(
            f"{drawer.what} makes images of {', '.join(drawer.names[:10])}, but {spec.name} has no class "
            f"{strangers[0]!r}. Use a generator that was trained on the model's data."
        )
    return np.array([own[name] for name in names], dtype=np.int64)
