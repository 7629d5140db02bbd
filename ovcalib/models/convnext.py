"""A small ConvNeXt for 32x32 images: LayerNorm and GELU, without BatchNorm or attention.

Liu et al., "A ConvNet for the 2020s", CVPR 2022. The blocks are torchvision's; the stem makes patches of 2x2 pixels
instead of 4x4.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

WIDTHS, DEPTHS = (48, 96, 192), (2, 4, 2)
PATCH = 2  # pixels


def convnext(num_classes: int) -> nn.Module:
    """Images [N, 3, 32, 32] to logits [N, num_classes]."""
    following = (*WIDTHS[1:], None)
    stages = [CNBlockConfig(w, after, depth) for w, after, depth in zip(WIDTHS, following, DEPTHS, strict=True)]
    # The published layer scale of 1e-6 is for trainings of hundreds of epochs.
    network: nn.Module = ConvNeXt(stages, layer_scale=0.1, num_classes=num_classes)
    stem = nn.Conv2d(3, WIDTHS[0], PATCH, PATCH)
    nn.init.trunc_normal_(stem.weight, std=0.02)
    network.get_submodule("features.0")[0] = stem  # type: ignore[operator]
    return network
