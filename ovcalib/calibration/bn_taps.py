"""Reading the statistics at the input of every BatchNorm layer, forwards and backwards, at little more than the
network's own cost."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovcalib.errors import ModelError
from ovcalib.models.weights import never_trained, statistics_layers
from ovcalib.records.preprocessing import USUAL_PIXELS

# Values of one image at one layer from which on images are read one by one: more than the fast caches hold.
LARGE_IMAGE = 2**18


@dataclass(frozen=True)
class Layer:
    """One BatchNorm layer: its stored statistics and the affine map that it computes in eval mode.

    mean0, var0    [C]
    scale, shift   [C], output = input * scale + shift
    """

    name: str
    module: nn.Module
    mean0: Tensor
    var0: Tensor
    scale: Tensor
    shift: Tensor


def find_layers(module: nn.Module, name: str) -> list[Layer]:
    """The BatchNorm layers of a network with statistics of the training data.

    raises   ModelError that says what to use instead, if there is none or all have their initial statistics
    """
    layers = []
    for path, child in statistics_layers(module):
        mean, var = child.running_mean, child.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        weight, bias = getattr(child, "weight", None), getattr(child, "bias", None)
        scale = (var + float(child.eps)).rsqrt()  # type: ignore[arg-type]
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        layers.append(Layer(path, child, mean.detach(), var.detach(), scale.detach(), shift.detach()))
    if not layers:
        raise ModelError(
            f"{name} has no BatchNorm layer with stored statistics, so there is nothing to invert: they are folded "
            "into the convolutions (deployed RepVGG, ONNX), or the network has none (ViT, ConvNeXt). Give the model in "
            "its training form, or calibrate with patch-similarity (ViT), fractal or real:DATA."
        )
    if never_trained(module):
        raise ModelError(
            f"The BatchNorm statistics of {name} are those of a new network (mean 0, variance 1), so there is nothing "
            "to invert: it was never trained, or trained weights were not loaded. Calibrate with fractal or real:DATA."
        )
    return layers


class _BatchNormWithMoments(torch.autograd.Function):
    """input * scale + shift, and the first two moments of every image and channel.

    The gradient is written by hand, because autograd would read every activation five more times: the gradients of the
    moments are added to that of the affine map. Activations may be bfloat16; sums are float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = _flat(x)
        out, flat_out = _empty_channels_last(x.shape, x)
        values = flat.float()
        # The squares are written into the memory of the output, which is filled later.
        scratch = flat_out if x.dtype == torch.float32 else torch.empty_like(values)
        if x.device.type == "cpu" and values[0].numel() >= LARGE_IMAGE:
            # One image after the other, so that later passes find it in the cache.
            found = [_moments_and_affine(*image, scale, shift) for image in zip(values, scratch, strict=True)]
            mean, square = (torch.stack(part) for part in zip(*found, strict=True))
        else:
            mean = values.mean(1)
            square = torch.mul(values, values, out=scratch).mean(1)
            torch.addcmul(shift, values, scale, out=scratch)
        if scratch is not flat_out:
            flat_out.copy_(scratch)
        ctx.save_for_backward(flat, scale)
        return out, mean, square

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, of_mean, of_square = gradients
        flat, scale = ctx.saved_tensors
        flat_gradient = _flat(gradient)
        out, flat_out = _empty_channels_last(gradient.shape, gradient)
        constant, linear = (of_mean / flat.shape[1])[:, None], (of_square * (2 / flat.shape[1]))[:, None]
        constant, linear, scale = (t.to(gradient.dtype) for t in (constant, linear, scale))
        torch.addcmul(constant, flat, linear, out=flat_out)
        flat_out.addcmul_(flat_gradient, scale)
        return out, None, None


def _moments_and_affine(values: Tensor, out: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of one image, [positions, C], and values * scale + shift into `out`."""
    as_images = values.t()[None, :, :, None]  # [1, C, positions, 1], channels-last
    mean, variance = torch.batch_norm_update_stats(as_images, None, None, 0.0)
    torch.addcmul(shift, values, scale, out=out)
    return mean, variance + mean * mean


def _flat(x: Tensor) -> Tensor:
    """[N, C, ...] as contiguous [N, positions, C]; no copy where x is channels-last."""
    return x.movedim(1, -1).reshape(len(x), -1, x.shape[1]).contiguous()


def _empty_channels_last(shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
    """A new channels-last tensor, and its memory as [N, positions, C]."""
    # A tensor of its own with these strides, not a view of `flat`: networks work on it in place.
    inner = torch.empty((shape[0], *shape[2:], shape[1]), device="meta").movedim(-1, 1)
    tensor = torch.empty_strided(shape, inner.stride(), dtype=like.dtype, device=like.device)
    return tensor, tensor.movedim(1, -1).view(shape[0], -1, shape[1])


@dataclass
class Moments:
    """What one forward pass left at the input of one layer.

    mean, square   [N, C], mean and mean square of each image
    positions      values an image and channel
    """

    layer: Layer
    mean: Tensor
    square: Tensor
    positions: int


@dataclass
class Taps:
    """The moments of the last forward pass, in execution order."""

    moments: list[Moments] = field(default_factory=list)

    def clear(self) -> None:
        self.moments.clear()


def _normalised_by_own(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """What a BatchNorm layer computes in training mode, and the moments; its stored statistics stay as they are."""
    values = _flat(x)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    out = F.batch_norm(x, None, None, weight, bias, training=True, eps=float(layer.eps))  # type: ignore[arg-type]
    return out, values.mean(1), values.square().mean(1)


@contextmanager
def tapped(layers: list[Layer], own_statistics: bool = False) -> Iterator[Taps]:
    """Let the layers record their inputs' moments; they are as they were afterwards, whatever happens.

    own_statistics   normalise by the statistics of the batch, as in training, in place of the stored ones
    """
    taps = Taps()

    def recording(layer: Layer) -> Any:
        def forward(x: Tensor) -> Tensor:
            if own_statistics:
                out, mean, square = _normalised_by_own(x, layer.module)
            else:
                out, mean, square = _BatchNormWithMoments.apply(x, layer.scale, layer.shift)
            taps.moments.append(Moments(layer, mean, square, math.prod(x.shape[2:])))
            return out

        return forward

    try:
        for layer in layers:
            layer.module.forward = recording(layer)
        yield taps
    finally:
        for layer in layers:
            layer.module.__dict__.pop("forward", None)
        taps.clear()


# glibc's names and defaults: free memory at the top of the heap that is given back, and blocks that are mapped.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_DEFAULT, _MMAP_DEFAULT = 128 * 1024, 65536


@contextmanager
def large_blocks_kept(shape: tuple[int, int, int]) -> Iterator[None]:
    """Let glibc keep freed memory: mapping and unmapping activations at every step costs more than the network.

    Everything is given back at the end. Elsewhere than on glibc this does nothing. Nor does it for large images: what
    is kept grows from step to step, and there memory counts more than time.

    shape   of the network's input, C, H, W
    """
    if math.prod(shape[1:]) > USUAL_PIXELS:
        yield
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_MMAP_MAX, 0)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, _MMAP_DEFAULT)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_DEFAULT)
        malloc_trim(0)
