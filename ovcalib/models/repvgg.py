"""RepVGG (Ding et al. 2021, table 3) for 32x32 images, in training and in re-parameterised form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = (2, 4, 14, 1)
# Factors of 64, 128, 256, 512 channels.
WIDTHS: dict[str, tuple[float, float, float, float]] = {
    "a0": (0.75, 0.75, 0.75, 2.5),
    "a1": (1.0, 1.0, 1.0, 2.5),
    "a2": (1.5, 1.5, 1.5, 2.75),
}
STRIDES = (1, 2, 2, 2)


class ConvBN(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


def fold_batch_norm(kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel [O, I, k, k] and bias [O] of the convolution that equals `kernel` followed by `bn` in eval mode."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return kernel * scale.view(-1, 1, 1, 1), bn.bias - bn.running_mean * scale


class RepVGGBlock(nn.Module):
    """3x3 + 1x1 + identity, each with its own BatchNorm, in training; one 3x3 convolution when deployed."""

    def __init__(self, cin: int, cout: int, stride: int, deploy: bool) -> None:
        super().__init__()
        self.stride = stride
        if deploy:
            self.rbr_reparam = nn.Conv2d(cin, cout, 3, stride, 1)
        else:
            self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
            self.rbr_dense = ConvBN(cin, cout, 3, stride)
            self.rbr_1x1 = ConvBN(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return F.relu(self.rbr_reparam(x))
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(out if self.rbr_identity is None else out + self.rbr_identity(x))

    def equivalent_kernel(self) -> tuple[Tensor, Tensor]:
        """Kernel [O, I, 3, 3] and bias [O] of the one convolution that all branches add up to (section 3.3)."""
        kernel, bias = fold_batch_norm(self.rbr_dense.conv.weight, self.rbr_dense.bn)
        k1, b1 = fold_batch_norm(self.rbr_1x1.conv.weight, self.rbr_1x1.bn)
        kernel, bias = kernel + F.pad(k1, (1, 1, 1, 1)), bias + b1
        if self.rbr_identity is not None:
            channels = kernel.shape[1]
            eye = torch.eye(channels, device=kernel.device, dtype=kernel.dtype).view(channels, channels, 1, 1)
            ki, bi = fold_batch_norm(eye, self.rbr_identity)
            kernel, bias = kernel + F.pad(ki, (1, 1, 1, 1)), bias + bi
        return kernel, bias


class CifarRepVGG(nn.Module):
    """RepVGG-A0, -A1 or -A2.

    deploy    False: three branches a block; True: one convolution a block (see `reparameterise`)
    forward   float32 [N, 3, 32, 32] -> logits float32 [N, num_classes]
    """

    stage1: nn.Sequential
    stage2: nn.Sequential
    stage3: nn.Sequential
    stage4: nn.Sequential

    def __init__(self, variant: str, num_classes: int = 10, deploy: bool = False) -> None:
        super().__init__()
        widths = WIDTHS[variant]
        self.variant, self.num_classes = variant, num_classes
        cin = min(64, int(64 * widths[0]))
        self.stage0 = RepVGGBlock(3, cin, 1, deploy)
        for i, (blocks, width, stride) in enumerate(zip(BLOCKS, widths, STRIDES, strict=True), start=1):
            cout = int(32 * 2**i * width)
            stage = [RepVGGBlock(cin, cout, stride, deploy)]
            stage += [RepVGGBlock(cout, cout, 1, deploy) for _ in range(blocks - 1)]
            self.add_module(f"stage{i}", nn.Sequential(*stage))
            cin = cout
        self.linear = nn.Linear(cin, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage0(x)
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


@torch.no_grad()
def reparameterise(model: CifarRepVGG) -> CifarRepVGG:
    """A new network in deployed form that computes what `model` computes in eval mode; `model` stays as it is."""
    deployed = CifarRepVGG(model.variant, model.num_classes, deploy=True).eval()
    targets = dict(deployed.named_modules())
    for name, block in model.named_modules():
        if isinstance(block, RepVGGBlock):
            target = targets[name].rbr_reparam
            kernel, bias = block.equivalent_kernel()
            target.weight.copy_(kernel)
            target.bias.copy_(bias)
    deployed.linear.load_state_dict(model.linear.state_dict())
    return deployed
