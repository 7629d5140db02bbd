"""ShuffleNetV2 (Ma et al. 2018, table 5) for 32x32 images: stride 1 and no pooling at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

REPEATS = (4, 8, 4)
# Output channels of stages 2, 3, 4 and of the last convolution, by width.
CHANNELS: dict[float, tuple[int, int, int, int]] = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def channel_shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """[N, C, H, W] with channel g * (C / groups) + i moved to i * groups + g."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def pointwise(cin: int, cout: int) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]


def depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class ShuffleBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        half = cout // 2
        self.stride = stride
        self.branch1 = nn.Sequential(*depthwise(cin, stride), *pointwise(cin, half)) if stride > 1 else nn.Sequential()
        self.branch2 = nn.Sequential(
            *pointwise(cin if stride > 1 else half, half), *depthwise(half, stride), *pointwise(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.stride == 1 else (self.branch1(x), x)
        return channel_shuffle(torch.cat((left, self.branch2(right)), dim=1))


class CifarShuffleNetV2(nn.Module):
    """ShuffleNetV2 of width 0.5, 1.0, 1.5 or 2.0.

    forward   float32 [N, 3, 32, 32] -> logits float32 [N, num_classes]
    """

    stage2: nn.Sequential
    stage3: nn.Sequential
    stage4: nn.Sequential

    def __init__(self, width: float, num_classes: int = 10) -> None:
        super().__init__()
        *stages, last = CHANNELS[width]
        cin = 24
        self.conv1 = nn.Sequential(nn.Conv2d(3, cin, 3, 1, 1, bias=False), nn.BatchNorm2d(cin), nn.ReLU(inplace=True))
        for i, (cout, repeats) in enumerate(zip(stages, REPEATS, strict=True), start=2):
            blocks = [ShuffleBlock(cin, cout, 2), *(ShuffleBlock(cout, cout, 1) for _ in range(repeats - 1))]
            self.add_module(f"stage{i}", nn.Sequential(*blocks))
            cin = cout
        self.conv5 = nn.Sequential(*pointwise(cin, last))
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in (self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.fc(self.conv5(x).mean((2, 3)))  # type: ignore[no-any-return]
