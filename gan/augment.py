"""Adaptive discriminator augmentation: the `bgc` transformations and the controller of their strength.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", section 3 and appendix B: pixel
blitting, geometry and colour, each applied with probability p to the discriminator's input. p is adjusted so that the
share of real images that the discriminator is sure of stays at its target.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Low-pass of the symlet with six vanishing moments (Daubechies 1992), scaled to sum 1: geometry is executed at twice
# the resolution between this filter and its mirror image, so that it does not alias.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
FILTER_MARGIN = len(SYM6) // 4  # pixels around the output that the filter reaches
# The filter is not quite symmetric; without its delay (in pixels) a mirrored image would move by half of one.
FILTER_SHIFT = -(sum(i * h for i, h in enumerate(SYM6)) / sum(SYM6) - (len(SYM6) - 1) / 2) / 2

TRANSLATION = 0.125  # of the side: bound of integer shifts, standard deviation of fractional ones
SCALE_LOG2_STD = 0.2
BRIGHTNESS_STD = 0.2
CONTRAST_LOG2_STD = 0.5
SATURATION_LOG2_STD = 1.0


def adjust_probability(p: float, sign_real: float, images: int, target: float = 0.6, kimg: float = 500.0) -> float:
    """The next augmentation probability: one fixed step up while the discriminator is too sure, else down.

    sign_real   mean of sign(D(real)) since the last adjustment; r_t of the paper
    images      seen since the last adjustment
    kimg        thousands of images in which p may go from 0 to 1
    """
    step = math.copysign(images / (kimg * 1000), sign_real - target) if sign_real != target else 0.0
    return min(max(p + step, 0.0), 1.0)


def augment(images: Tensor, p: float, rng: torch.Generator) -> Tensor:
    """Augmented images for the discriminator.

    images    float32 [N, 3, H, W] in [-1, 1]
    p         probability of each transformation, 0 to 1
    rng       on the CPU, so that the same draws are made on every device
    """
    if p <= 0:
        return images
    n, _, height, width = images.shape
    inverse, colour = draw_geometry(n, height, width, p, rng), draw_colour(n, p, rng)
    # Resampling is slow, and with a small p most images need none.
    moved = (inverse != torch.eye(3)).any(dim=2).any(dim=1).nonzero()[:, 0]
    if len(moved):
        there = moved.to(images.device)
        images = images.index_put((there,), apply_geometry(images[there], inverse[moved]))
    return apply_colour(images, colour)


# Geometry -------------------------------------------------------------------------------------


def draw_geometry(n: int, height: int, width: int, p: float, rng: torch.Generator) -> Tensor:
    """Random maps from positions in the augmented image to positions in the original, [N, 3, 3].

    Positions are in pixels from the centre.
    """

    def uniform() -> Tensor:
        return torch.rand(n, generator=rng)

    def normal() -> Tensor:
        return torch.randn(n, generator=rng)

    def gate(values: Tensor, neutral: float, probability: float = p) -> Tensor:
        return torch.where(uniform() < probability, values, torch.full_like(values, neutral))

    one = torch.ones(n)
    # A rotation before and one after the anisotropic scaling: together they happen with probability p.
    p_rotation = 1 - math.sqrt(1 - p)
    inverse = torch.eye(3).expand(n, 3, 3)
    inverse = inverse @ _scaling(gate(1 - 2 * (2 * uniform()).floor(), 1.0), one)  # mirrored
    inverse = inverse @ _rotation(gate((4 * uniform()).floor() * (math.pi / 2), 0.0))
    shift = [gate(((2 * uniform() - 1) * TRANSLATION * side).round(), 0.0) for side in (width, height)]
    inverse = inverse @ _translation(*shift)
    size = gate(torch.exp2(normal() * SCALE_LOG2_STD), 1.0)
    inverse = inverse @ _scaling(1 / size, 1 / size)
    inverse = inverse @ _rotation(gate((2 * uniform() - 1) * math.pi, 0.0, p_rotation))
    aspect = gate(torch.exp2(normal() * SCALE_LOG2_STD), 1.0)
    inverse = inverse @ _scaling(1 / aspect, aspect)
    inverse = inverse @ _rotation(gate((2 * uniform() - 1) * math.pi, 0.0, p_rotation))
    chosen = gate(one, 0.0)
    shift = [normal() * TRANSLATION * side * chosen for side in (width, height)]
    return inverse @ _translation(*shift)


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    o, i = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[x, o, o], [o, y, o], [o, o, i]])


def _rotation(angle: Tensor) -> Tensor:
    o, i, c, s = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    return _matrix([[c, -s, o], [s, c, o], [o, o, i]])


def _translation(x: Tensor, y: Tensor) -> Tensor:
    o, i = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[i, o, x], [o, i, y], [o, o, i]])


def apply_geometry(images: Tensor, inverse: Tensor) -> Tensor:
    """Each image resampled through its map, reflected at the borders. [N, C, H, W], [N, 3, 3] on the CPU"""
    height, width = images.shape[2:]
    m = FILTER_MARGIN
    corners = torch.tensor([[x * (width / 2 + m), y * (height / 2 + m), 1.0] for x in (-1, 1) for y in (-1, 1)])
    reach = (corners @ inverse.transpose(1, 2)).abs().amax(dim=(0, 1))
    pad_x = min(max(math.ceil(float(reach[0]) - width / 2) + m, 0), width - 1)
    pad_y = min(max(math.ceil(float(reach[1]) - height / 2) + m, 0), height - 1)

    x = F.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    x = _both_axes(x, _upsampling(height + 2 * pad_y), _upsampling(width + 2 * pad_x))
    rows = (torch.arange(2 * (height + 2 * m)) + 0.5) / 2 - m - height / 2 + FILTER_SHIFT
    cols = (torch.arange(2 * (width + 2 * m)) + 0.5) / 2 - m - width / 2 + FILTER_SHIFT
    points = torch.stack([*reversed(torch.meshgrid(rows, cols, indexing="ij")), torch.ones(len(rows), len(cols))], -1)
    source = torch.einsum("nij,hwj->nhwi", inverse[:, :2], points) - FILTER_SHIFT
    grid = source / torch.tensor([width / 2 + pad_x, height / 2 + pad_y])
    x = _resample(x, grid.to(images))
    return _both_axes(x, _downsampling(height), _downsampling(width))


@functools.cache
def _upsampling(side: int) -> Tensor:
    """Zeros between the values, then the filter, as a matrix: [2 * side, side].

    One dimension at a time a dense product is many times faster than a depthwise convolution with twelve taps.
    """
    spread = torch.zeros(side, 2 * side)
    spread[:, ::2] = torch.eye(side)
    return F.conv1d(F.pad(spread, (6, 5))[:, None], 2 * _kernel().flip(0)[None, None])[:, 0].t().contiguous()


@functools.cache
def _downsampling(side: int) -> Tensor:
    """The mirrored filter, then every second value, without the margins: [side, 2 * (side + 2 * margin)]."""
    inputs = torch.eye(2 * (side + 2 * FILTER_MARGIN))[:, 1:-1]
    return F.conv1d(inputs[:, None], _kernel()[None, None], stride=2)[:, 0].t().contiguous()


def _kernel() -> Tensor:
    kernel = torch.tensor(SYM6)
    return kernel / kernel.sum()


def _both_axes(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    return rows.to(x) @ x @ cols.to(x).t()


def _resample(x: Tensor, grid: Tensor) -> Tensor:
    return _Resample.apply(x, grid)  # type: ignore[no-any-return]


class _Resample(torch.autograd.Function):
    """grid_sample with a fixed grid, differentiable twice as the R1 penalty needs it.

    In the image it is linear: the backward pass is its adjoint, and the adjoint's backward pass is itself again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _Adjoint.apply(gradients[0], grid, ctx.shape), None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        like = gradient.new_zeros(shape)  # bilinear interpolation does not depend on the values of the image
        found: Tensor = torch.ops.aten.grid_sampler_2d_backward(gradient, like, grid, 0, 0, False, [True, False])[0]
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _resample(gradients[0], grid), None, None


# Colour ---------------------------------------------------------------------------------------


def draw_colour(n: int, p: float, rng: torch.Generator) -> Tensor:
    """Random affine maps of RGB values, [N, 3, 4]."""

    def gate(values: Tensor, neutral: float) -> Tensor:
        return torch.where(torch.rand(n, generator=rng) < p, values, torch.full_like(values, neutral))

    def normal() -> Tensor:
        return torch.randn(n, generator=rng)

    luma = torch.full((3,), 1 / math.sqrt(3))
    along = luma.outer(luma)  # projection on the grey axis
    across = torch.eye(3) - along
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # cross product with the grey axis

    brightness = gate(normal() * BRIGHTNESS_STD, 0.0)[:, None]
    contrast = gate(torch.exp2(normal() * CONTRAST_LOG2_STD), 1.0)[:, None, None]
    flip = gate((2 * torch.rand(n, generator=rng)).floor(), 0.0)[:, None, None]
    hue = gate((2 * torch.rand(n, generator=rng) - 1) * math.pi, 0.0)[:, None, None]
    saturation = gate(torch.exp2(normal() * SATURATION_LOG2_STD), 1.0)[:, None, None]

    linear = contrast * (torch.eye(3) - 2 * flip * along)
    offset = (contrast[:, 0] * brightness).expand(n, 3) * (1 - 2 * flip[:, :, 0])  # grey, so the flip negates it
    rotation = along + across * hue.cos() + turn * hue.sin()  # Rodrigues; leaves grey alone
    stretch = along + across * saturation
    return torch.cat([stretch @ rotation @ linear, offset[:, :, None]], dim=2)


def apply_colour(images: Tensor, colour: Tensor) -> Tensor:
    """Every pixel through the map of its image. [N, 3, H, W], [N, 3, 4]"""
    colour = colour.to(images)
    return torch.einsum("nij,njhw->nihw", colour[:, :, :3], images) + colour[:, :, 3, None, None]
