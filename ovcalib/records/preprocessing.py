"""Preprocessing: from a decoded image to the network's input.

Calibration, evaluation, benchmark and the IR's metadata all use `Preprocessing`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ovcalib.errors import DataError
from ovcalib.records.base import MAX_CHANNELS, Frozen, Pixels
from ovcalib.records.options import ChannelOrder, Interpolation

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
# The share of the resized short side that the usual centre crop keeps (224 of 256).
USUAL_CROP = 0.875
# Sides up to which images are small. Published settings for CIFAR have been used with 32 pixels, ImageNet's with 224.
SMALL_SIDE = 96
# Pixels up to which images take the memory that budgets for ImageNet's networks were chosen with.
USUAL_PIXELS = 260**2

# A longer image would take a large multiple of its memory when its short side is scaled up.
MAX_ASPECT = 100


@functools.cache
def scale_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One multiply and one subtraction from a byte to a network input, float32 [C, 1, 1]; folded in float64."""
    means, stds = (np.array(v)[:, None, None] for v in (mean, std))
    return (1 / (255.0 * stds)).astype(np.float32), (means / stds).astype(np.float32)


class Preprocessing(Frozen):
    """How an image becomes a network input.

    height, width   of the network input, pixels
    short_side      the image is first scaled so that its short side has this many pixels and then
                    cropped at the centre; None scales the whole image to height x width
    interpolation   of the scaling, as Pillow has it
    mean, std       per channel of the network input, on the 0..1 scale
    channel_order   of the network input; images are always decoded as RGB
    """

    height: Pixels
    width: Pixels
    mean: tuple[float, ...] = Field(default=(0.0, 0.0, 0.0), min_length=1, max_length=MAX_CHANNELS)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0, 1.0, 1.0), max_length=MAX_CHANNELS)
    short_side: Pixels | None = None
    interpolation: Interpolation = "bilinear"
    channel_order: ChannelOrder = "RGB"

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Preprocessing:
        if len(self.mean) != len(self.std):
            raise ValueError(f"`mean` has {len(self.mean)} values, `std` {len(self.std)}")
        return self

    @property
    def channels(self) -> int:
        return len(self.mean)

    def fit(self, image: Image) -> NDArray[np.uint8]:
        """Scale and crop a decoded image: uint8 [H, W, 3], RGB (or [H, W, 1] for a one-channel network).

        raises   DataError where the network takes other channels; ValueError for an image more than MAX_ASPECT times as
                 long as wide, where the short side counts
        """
        import PIL.Image

        if self.channels not in (1, 3):
            raise DataError(
                f"An image has 1 or 3 channels, but the model takes {self.channels}. Calibrate with a source that "
                "makes images, such as fractal, or with npz:FILE of float32 [N, C, H, W]."
            )
        image = image.convert("RGB" if self.channels == 3 else "L")
        resample = PIL.Image.Resampling[self.interpolation.upper()]
        if self.short_side is None:
            if image.size != (self.width, self.height):
                image = image.resize((self.width, self.height), resample)
        else:
            w, h = image.size
            if max(w, h) > MAX_ASPECT * min(w, h):
                raise ValueError(f"an image of {w} x {h} pixels is a line")
            scale = self.short_side / min(w, h)
            # Truncation and rounding follow torchvision's Resize and CenterCrop.
            size = (self.short_side, int(scale * h)) if w <= h else (int(scale * w), self.short_side)
            if image.size != size:
                image = image.resize(size, resample)
            left, top = round((size[0] - self.width) / 2), round((size[1] - self.height) / 2)
            image = image.crop((left, top, left + self.width, top + self.height))
        return np.asarray(image, dtype=np.uint8).reshape(self.height, self.width, self.channels)

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Network inputs, float32 [..., C, H, W], of pixels, uint8 [..., H, W, C] in RGB."""
        if self.channel_order == "BGR":
            pixels = pixels[..., ::-1]
        # Channels are brought forward while they are bytes, a quarter of the traffic of floats.
        values = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)).astype(np.float32)
        scale, offset = scale_and_offset(self.mean, self.std)
        values *= scale
        values -= offset
        return values

    def denormalise(self, inputs: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pixels, uint8 [..., H, W, C] in RGB, nearest to network inputs, [..., C, H, W]; clipped to 0..255."""
        mean, std = (np.array(v)[:, None, None] for v in (self.mean, self.std))
        values = np.moveaxis((inputs.astype(np.float64) * std + mean) * 255.0, -3, -1)
        if self.channel_order == "BGR":
            values = values[..., ::-1]
        return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)

    def input_range(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per channel of the network input, the values of a black and of a white pixel."""
        mean, std = np.array(self.mean), np.array(self.std)
        return -mean / std, (1 - mean) / std
