"""Networks for measurements, as `benchmarks.networks:NAME` with `--weights FILE`; none has weights of its own."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FeaturePyramidNetwork


class PyramidOfMobileNetV2(nn.Module):
    """Maps of MobileNetV2 at strides 8, 16 and 32, each joined with the coarser ones, which classify better.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018; Lin et al., "Feature Pyramid
    Networks for Object Detection", 2017.
    forward   float32 [N, 3, H, W] -> maps [N, out_channels, H / stride, W / stride], by name
    """

    def __init__(self, width: float, out_channels: int) -> None:
        super().__init__()
        blocks = mobilenet_v2(weights=None, width_mult=width).features
        # Stages end where the next block has stride 2; the last convolution, which is for a classifier, is left out.
        stages = [blocks[:7], blocks[7:14], blocks[14:18]]
        channels = [stage[-1].out_channels for stage in stages]
        self.stages = nn.ModuleList(stages)
        self.pyramid = FeaturePyramidNetwork(channels, out_channels, norm_layer=nn.BatchNorm2d)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = OrderedDict[str, Tensor]()
        for number, stage in enumerate(self.stages):
            x = maps[str(number)] = stage(x)
        joined: OrderedDict[str, Tensor] = self.pyramid(maps)
        return joined


def ssdlite160() -> nn.Module:
    """SSDLite for the ten classes of `pasted_objects.py`: 160x160 pixels, 1.3 million parameters.

    Its default boxes are squares of 32 to 91 pixels, as all pasted tiles are squares of 32 to 96.
    """
    backbone, levels = PyramidOfMobileNetV2(0.75, 96), 3
    # Two squares a position: the level's own scale, and the geometric mean with that of the next.
    anchors = DefaultBoxGenerator([[]] * levels, scales=[0.2, 0.325, 0.5, 0.65], steps=[8, 16, 32])
    head = SSDLiteHead([96] * levels, anchors.num_anchors_per_location(), 11, partial(nn.BatchNorm2d))
    detector: nn.Module = SSD(
        backbone, anchors, (160, 160), 11, image_mean=[0.5] * 3, image_std=[0.5] * 3, head=head,
        score_thresh=0.01, nms_thresh=0.45, detections_per_img=100,
    )  # fmt: skip
    return detector
