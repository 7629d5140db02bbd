"""Weights as the training scripts store them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
