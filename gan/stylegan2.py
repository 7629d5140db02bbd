"""StyleGAN2 as StyleGAN2-ADA trains it: skip generator, plain discriminator, conditional or not.

Karras et al. 2020a, "Analyzing and Improving the Image Quality of StyleGAN" (the networks), and 2020b, "Training
Generative Adversarial Networks with Limited Data" (the configuration for CIFAR-10). Written from the papers; the names
of tensors are those of the official snapshots, so that their weights load.

Weights are stored at unit scale and multiplied by their He constant at run time ("equalised learning rate").
Blocks of the highest resolutions can run in half precision; parameters stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NoiseMode = Literal["const", "random", "none"]

SLOPE = 0.2
GAIN = math.sqrt(2)  # keeps the variance through a leaky ReLU
EPS = 1e-8
TAPS = (1.0, 3.0, 3.0, 1.0)


@dataclass(frozen=True)
class GeneratorConfig:
    """The settings of a generator, in the words of the official code; the defaults are its `cifar` configuration.

    channel_base, channel_max   features at resolution r: min(channel_base // r, channel_max)
    num_layers                  of the mapping network
    num_fp16_res                how many of the highest resolutions may run in half precision
    conv_clamp                  activations are clamped to +-this, so that half precision does not overflow
    """

    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 10
    img_resolution: int = 32
    img_channels: int = 3
    num_layers: int = 2
    channel_base: int = 32768
    channel_max: int = 512
    num_fp16_res: int = 4
    conv_clamp: float | None = 256.0
    lr_multiplier: float = 0.01
    w_avg_beta: float = 0.995
    use_noise: bool = True

    @property
    def resolutions(self) -> tuple[int, ...]:
        """4, 8, ... up to the image."""
        return tuple(2**i for i in range(2, self.img_resolution.bit_length()))

    @property
    def num_ws(self) -> int:
        """Style vectors of one image: one for each convolution, and one for the last RGB layer."""
        return 2 * len(self.resolutions)

    def channels(self, resolution: int) -> int:
        return min(self.channel_base // resolution, self.channel_max)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The settings of a discriminator; the defaults are the official `cifar` configuration."""

    c_dim: int = 10
    img_resolution: int = 32
    img_channels: int = 3
    channel_base: int = 32768
    channel_max: int = 512
    num_fp16_res: int = 4
    conv_clamp: float | None = 256.0
    mapping_layers: int = 8
    mbstd_group_size: int = 32

    def channels(self, resolution: int) -> int:
        return min(self.channel_base // resolution, self.channel_max)


# Primitives -----------------------------------------------------------------------------------


def normalise_second_moment(x: Tensor) -> Tensor:
    """Each row scaled to a root mean square of 1. [N, D]"""
    return x * (x.square().mean(dim=1, keepdim=True) + EPS).rsqrt()


def activate(x: Tensor, bias: Tensor, clamp: float | None = None) -> Tensor:
    """Leaky ReLU with gain sqrt(2) after the bias of each channel; clamped afterwards. [N, C, ...]"""
    x = F.leaky_relu(x + bias.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2)), SLOPE) * GAIN
    return x if clamp is None else x.clamp(-clamp, clamp)


def resample_filter() -> Tensor:
    """The binomial low-pass that every change of resolution uses, [4, 4], with sum 1."""
    taps = torch.tensor(TAPS)
    return taps.outer(taps) / taps.sum().square()


def low_pass(x: Tensor, kernel: Tensor, padding: tuple[int, int, int, int], gain: float = 1.0) -> Tensor:
    """Every channel convolved with the same symmetric kernel.

    padding   (left, right, top, bottom), zeros; negative crops
    """
    channels = x.shape[1]
    weight = (kernel * gain).to(x.dtype).expand(channels, 1, *kernel.shape)
    return F.conv2d(F.pad(x, padding), weight, groups=channels)


def upsample_image(x: Tensor, kernel: Tensor) -> Tensor:
    """Twice the resolution: zeros between the pixels, then the low-pass. [N, C, H, W] -> [N, C, 2H, 2W]"""
    n, c, h, w = x.shape
    spread = x.new_zeros(n, c, h, 2, w, 2)
    spread[:, :, :, 0, :, 0] = x
    return low_pass(spread.reshape(n, c, 2 * h, 2 * w), kernel, (2, 1, 2, 1), gain=4)


def modulated_conv(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, up: Tensor | None = None
) -> Tensor:
    """A convolution whose weights each image scales by its style (Karras et al. 2020a, equations 1 and 3).

    x         [N, C_in, H, W]
    weight    [C_out, C_in, k, k]
    style     [N, C_in]; scales the input channels
    up        low-pass filter; doubles the resolution when given
    returns   [N, C_out, H, W] or [N, C_out, 2H, 2W]

    The style is applied to the input and the demodulation to the output, which equals scaling the weights of each
    image but needs one ordinary convolution for the whole batch.
    """
    if demodulate and x.dtype != torch.float32:
        # Demodulation cancels any common factor, and half precision needs sums that stay small.
        weight = weight * weight.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
        style = style / style.abs().amax(dim=1, keepdim=True).clamp_min(EPS)
    padding = weight.shape[-1] // 2
    y = x * style.to(x.dtype)[:, :, None, None]
    if up is None:
        y = F.conv2d(y, weight.to(x.dtype), padding=padding)
    else:
        y = F.conv_transpose2d(y, weight.transpose(0, 1).to(x.dtype), stride=2)
        y = low_pass(y, up, (1, 1, 1, 1), gain=4)
    if demodulate:
        power = style.square() @ weight.square().sum(dim=(2, 3)).t()
        y = y * (power + EPS).rsqrt().to(x.dtype)[:, :, None, None]
    return y


class FullyConnected(nn.Module):
    """A linear layer with run-time scaling of weight and bias, and optionally a leaky ReLU."""

    def __init__(
        self, inputs: int, outputs: int, *, activated: bool = False, lr_multiplier: float = 1.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.weight_gain = lr_multiplier / math.sqrt(inputs)
        self.bias_gain = lr_multiplier
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.weight * self.weight_gain).t()
        bias = self.bias * self.bias_gain
        return activate(y, bias) if self.activated else y + bias


# Generator ------------------------------------------------------------------------------------


class MappingNetwork(nn.Module):
    """(z, c) -> w. Without `z_dim` it maps the label alone, as the discriminator needs it.

    z   float [N, z_dim], N(0, 1); its length does not matter
    c   float [N, c_dim], one-hot
    """

    w_avg: Tensor

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, num_layers: int, lr_multiplier: float = 0.01, average: bool = True
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.num_layers = z_dim, c_dim, num_layers
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        for i in range(num_layers):
            inputs = z_dim + (w_dim if c_dim else 0) if i == 0 else w_dim
            setattr(self, f"fc{i}", FullyConnected(inputs, w_dim, activated=True, lr_multiplier=lr_multiplier))
        if average:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        parts = []
        if z is not None:
            parts.append(normalise_second_moment(z))
        if self.c_dim:
            parts.append(normalise_second_moment(self.embed(c)))
        w = torch.cat(parts, dim=1)
        for i in range(self.num_layers):
            w = getattr(self, f"fc{i}")(w)
        return w


class SynthesisLayer(nn.Module):
    """A modulated 3x3 convolution with noise; `up` doubles the resolution, `resolution` is that of the output."""

    noise_const: Tensor
    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, resolution: int, up: bool, config: GeneratorConfig) -> None:
        super().__init__()
        self.up, self.resolution, self.clamp = up, resolution, config.conv_clamp
        self.affine = FullyConnected(config.w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("resample_filter", resample_filter())
        self.use_noise = config.use_noise
        if config.use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        x = modulated_conv(x, self.weight, self.affine(w), up=self.resample_filter if self.up else None)
        if noise is not None:
            x = x + (noise * self.noise_strength).to(x.dtype)
        return activate(x, self.bias, self.clamp)


class ToRGB(nn.Module):
    """A modulated 1x1 convolution to the image, without demodulation."""

    def __init__(self, inputs: int, config: GeneratorConfig) -> None:
        super().__init__()
        self.clamp = config.conv_clamp
        self.affine = FullyConnected(config.w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(config.img_channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(config.img_channels))
        self.weight_gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = modulated_conv(x, self.weight, self.affine(w) * self.weight_gain, demodulate=False)
        x = x + self.bias.to(x.dtype)[:, None, None]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two convolutions (one at 4x4, which starts from a learned constant) and their RGB layer."""

    resample_filter: Tensor

    def __init__(self, resolution: int, config: GeneratorConfig) -> None:
        super().__init__()
        channels = config.channels(resolution)
        self.first = resolution == 4
        self.register_buffer("resample_filter", resample_filter())
        if self.first:
            self.const = nn.Parameter(torch.randn(channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(config.channels(resolution // 2), channels, resolution, True, config)
        self.conv1 = SynthesisLayer(channels, channels, resolution, False, config)
        self.torgb = ToRGB(channels, config)

    @property
    def layers(self) -> tuple[SynthesisLayer, ...]:
        return (self.conv1,) if self.first else (self.conv0, self.conv1)


class SynthesisNetwork(nn.Module):
    """w -> image, every resolution adding its RGB output to the upsampled sum of the lower ones."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        for resolution in config.resolutions:
            setattr(self, f"b{resolution}", SynthesisBlock(resolution, config))

    def forward(
        self,
        ws: Tensor,
        noise: NoiseMode | Sequence[Tensor] = "const",
        half: torch.dtype | None = None,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """
        ws        [N, num_ws, w_dim]
        noise     a mode, or one [N, 1, r, r] for every convolution in order
        half      dtype of the blocks that may run in half precision; None keeps all in float32
        rng       of "random" noise, on the device of ws
        returns   [N, img_channels, H, W], nominally in [-1, 1] but not clipped
        """
        blocks: list[SynthesisBlock] = [getattr(self, f"b{r}") for r in self.config.resolutions]
        x: Tensor = blocks[0].const.expand(len(ws), -1, -1, -1)
        image: Tensor | None = None
        index = 0
        for position, block in enumerate(blocks):
            low = half is not None and not block.first and position >= len(blocks) - self.config.num_fp16_res
            x = x.to(half if low and half is not None else torch.float32)
            for layer in block.layers:
                x = layer(x, ws[:, index], self._noise(layer, index, len(ws), noise, rng))
                index += 1
            # The RGB layer shares its style with the next block's first convolution.
            rgb: Tensor = block.torgb(x, ws[:, index]).float()
            image = rgb if image is None else upsample_image(image, block.resample_filter) + rgb
        assert image is not None
        return image

    def _noise(
        self,
        layer: SynthesisLayer,
        index: int,
        count: int,
        noise: NoiseMode | Sequence[Tensor],
        rng: torch.Generator | None,
    ) -> Tensor | None:
        if not layer.use_noise or noise == "none":
            return None
        if noise == "const":
            return layer.noise_const
        if noise == "random":
            shape = (count, 1, layer.resolution, layer.resolution)
            return torch.randn(shape, generator=rng, device=layer.noise_const.device)
        return noise[index]


class Generator(nn.Module):
    """(z, c) -> image. 20,215,315 parameters in the `cifar` configuration."""

    def __init__(self, config: GeneratorConfig = GeneratorConfig()) -> None:
        super().__init__()
        self.config = config
        self.synthesis = SynthesisNetwork(config)
        self.mapping: MappingNetwork = MappingNetwork(
            config.z_dim, config.c_dim, config.w_dim, config.num_layers, config.lr_multiplier, average=True
        )

    def styles(self, z: Tensor, c: Tensor | None, truncation: float = 1.0, cutoff: int | None = None) -> Tensor:
        """One style for every layer, [N, num_ws, w_dim].

        truncation   psi: 1 leaves w alone, 0 is the mean of all classes
        cutoff       truncate the first so many layers only; None truncates all
        """
        w: Tensor = self.mapping(z, c)
        ws = w[:, None].repeat(1, self.config.num_ws, 1)
        if truncation != 1:
            average = self.mapping.w_avg
            ws[:, :cutoff] = average.lerp(ws[:, :cutoff], truncation)
        return ws

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        *,
        truncation: float = 1.0,
        cutoff: int | None = None,
        noise: NoiseMode | Sequence[Tensor] = "const",
        half: torch.dtype | None = None,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """
        z         float32 [N, z_dim], N(0, 1)
        c         float32 [N, c_dim], one-hot; None for an unconditional generator
        returns   float32 [N, img_channels, H, W], nominally in [-1, 1] but not clipped
        """
        return self.synthesis(self.styles(z, c, truncation, cutoff), noise, half, rng)  # type: ignore[no-any-return]


# Discriminator --------------------------------------------------------------------------------


class Convolution(nn.Module):
    """An ordinary convolution with run-time scaling and a leaky ReLU; `down` halves the resolution."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, clamp: float | None, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("resample_filter", resample_filter())
        self.weight_gain = 1 / math.sqrt(inputs * kernel**2)
        self.clamp, self.down, self.padding = clamp, down, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight * self.weight_gain).to(x.dtype)
        if self.down:
            x = F.conv2d(low_pass(x, self.resample_filter, (2, 2, 2, 2)), weight, stride=2)
        else:
            x = F.conv2d(x, weight, padding=self.padding)
        return activate(x, self.bias, self.clamp)


class DiscriminatorBlock(nn.Module):
    def __init__(self, resolution: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        inputs, outputs = config.channels(resolution), config.channels(resolution // 2)
        self.register_buffer("resample_filter", resample_filter())
        if resolution == config.img_resolution:
            self.fromrgb = Convolution(config.img_channels, inputs, 1, config.conv_clamp)
        self.conv0 = Convolution(inputs, inputs, 3, config.conv_clamp)
        self.conv1 = Convolution(inputs, outputs, 3, config.conv_clamp, down=True)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "fromrgb"):
            x = self.fromrgb(x)
        return self.conv1(self.conv0(x))  # type: ignore[no-any-return]


def minibatch_std(x: Tensor, group_size: int) -> Tensor:
    """x with one more channel: the standard deviation within a group of images, averaged over everything else.

    x   [N, C, H, W]; image n belongs to group n mod (N / group), and N must be a multiple of the group
    """
    n, c, h, w = x.shape
    group = min(group_size, n)
    y = x.reshape(group, n // group, c, h, w)
    y = (y - y.mean(dim=0)).square().mean(dim=0)
    y = (y + EPS).sqrt().mean(dim=(1, 2, 3))
    return torch.cat([x, y.repeat(group)[:, None, None, None].expand(n, 1, h, w)], dim=1)


class DiscriminatorEpilogue(nn.Module):
    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels = config.channels(4)
        self.group_size = config.mbstd_group_size
        self.conv = Convolution(channels + 1, channels, 3, config.conv_clamp)
        self.fc = FullyConnected(channels * 16, channels, activated=True)
        self.out = FullyConnected(channels, channels if config.c_dim else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(minibatch_std(x, self.group_size))
        return self.out(self.fc(x.flatten(1)))  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """(image, c) -> logit: projection on the label. 23,089,664 parameters in the `cifar` configuration."""

    def __init__(self, config: DiscriminatorConfig = DiscriminatorConfig()) -> None:
        super().__init__()
        self.config = config
        self.resolutions = [2**i for i in range(config.img_resolution.bit_length() - 1, 2, -1)]
        for resolution in self.resolutions:
            setattr(self, f"b{resolution}", DiscriminatorBlock(resolution, config))
        channels = config.channels(4)
        if config.c_dim:
            self.mapping = MappingNetwork(0, config.c_dim, channels, config.mapping_layers, average=False)
        self.b4 = DiscriminatorEpilogue(config)

    def forward(self, image: Tensor, c: Tensor | None = None, half: torch.dtype | None = None) -> Tensor:
        """
        image     float32 [N, img_channels, H, W] in [-1, 1]
        c         float32 [N, c_dim], one-hot
        half      dtype of the blocks that may run in half precision
        returns   float32 [N, 1]; higher is more real
        """
        x: Tensor = image
        for position, resolution in enumerate(self.resolutions):
            low = half is not None and position < self.config.num_fp16_res
            x = getattr(self, f"b{resolution}")(x.to(half if low and half is not None else torch.float32))
        x = self.b4(x.float())
        if not self.config.c_dim:
            return x
        label: Tensor = self.mapping(None, c)
        return (x * label).sum(dim=1, keepdim=True) / math.sqrt(label.shape[1])
