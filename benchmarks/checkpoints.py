"""What the training scripts share: the weights as they store them, and when they take bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovcalib import machine


def takes_bfloat16(asked: bool | None, device: torch.device) -> bool:
    """What was asked for; without that, whether the device is faster in bfloat16 than in float32."""
    return device.type == "cuda" or machine.has_fast_bfloat16() if asked is None else asked


def stored(model: nn.Module, half: bool) -> dict[str, Tensor]:
    """The state dict to write; with `half` the model's own convolution and linear weights are rounded to float16 too.

    BatchNorm keeps float32: small variances do not survive half precision.
    """
    if half:
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.copy_(p.half())
    many = {name for name, p in model.named_parameters() if p.ndim > 1}
    return {name: t.half() if half and name in many else t for name, t in model.state_dict().items()}
