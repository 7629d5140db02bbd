"""MobileNetV3-small for 32x32 images: squeeze-and-excitation and hard-swish.

Howard et al., "Searching for MobileNetV3", ICCV 2019, table 2. The blocks are torchvision's. Three of its five strides
are left, so that the last map has 4x4 positions as it would have 7x7 at 224 pixels.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

# kernel, expanded channels, output channels, squeeze-and-excitation, activation (ReLU or hard-swish), stride
BLOCKS = (
    (3, 16, 16, True, "RE", 1),
    (3, 72, 24, False, "RE", 2),
    (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2),
    (5, 240, 40, True, "HS", 1),
    (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1),
    (5, 144, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2),
    (5, 576, 96, True, "HS", 1),
    (5, 576, 96, True, "HS", 1),
)


def mobilenetv3_small(num_classes: int) -> nn.Module:
    """Images [N, 3, 32, 32] to logits [N, num_classes]."""
    configs, channels = [], 16
    for kernel, expanded, out, squeeze, activation, stride in BLOCKS:
        configs.append(InvertedResidualConfig(channels, kernel, expanded, out, squeeze, activation, stride, 1, 1.0))
        channels = out
    # torchvision's momentum of 0.01 would average over hundreds of steps, which a short training does not have.
    norm_layer = partial(nn.BatchNorm2d, eps=0.001)
    network: nn.Module = MobileNetV3(configs, 1024, num_classes, norm_layer=norm_layer)
    network.get_submodule("features.0.0").stride = (1, 1)  # type: ignore[assignment]
    return network
