"""Fine-tuning as publications on generated data have it, to compare with: classes and logits, by gradient descent.

The float network's own class is the label, and its logits are distilled at a temperature (Hinton, Vinyals & Dean,
"Distilling the Knowledge in a Neural Network", 2015). Weights start as those of FP32; they and biases learn. All
published codes distil alike but for one factor:

    GDFQ     Xu et al., ECCV 2020: KL averaged over images and classes
    INTRAQ   Zhong et al., CVPR 2022, and FDDA (ECCV 2022): KL averaged over images, times 20

Labels are those of ACQ (Li et al., Pattern Recognition 2024); the others take the class that an image was made for.
Ranges and scales are those that the graph comes with: the publications take the extremes of activations in the first
four epochs, and those of weights at each step. BatchNorm is in the weights, where they train its factor and its shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ovcalib.quantization.finetuning import Pair, Recipe

TEMPERATURE = 20.0
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
RATE = 1e-4  # for CIFAR-10


def published_loss(found: Tensor, wanted: Tensor, weight: float, over_classes: bool) -> Tensor:
    """Cross-entropy with the class of FP32, and the distance of the logits at TEMPERATURE.

    found, wanted   logits [N, K] of the quantized and of the float network
    weight          of KL(softmax(wanted / T) || softmax(found / T)) T^2, which is averaged over images
    over_classes    ... and over classes
    """
    divergence = F.kl_div(
        F.log_softmax(found / TEMPERATURE, 1), F.softmax(wanted / TEMPERATURE, 1), reduction="batchmean"
    )
    if over_classes:
        divergence = divergence / found.shape[1]
    return F.cross_entropy(found, wanted.argmax(1)) + weight * TEMPERATURE**2 * divergence


def of_logits(
    found: Sequence[Tensor], wanted: Sequence[Tensor], powers: Sequence[float], heads: int, *, weight: float,
    over_classes: bool,
) -> Tensor:  # fmt: skip
    """The loss of a `Recipe`: of the network's only output."""
    return published_loss(found[-1], wanted[-1], weight, over_classes)


def by_descent(pair: Pair, powers: Sequence[float]) -> torch.optim.Optimizer:
    """Weights and biases learn, from those of FP32 on."""
    for layer in pair.layers:
        with torch.no_grad():
            layer.units.copy_(torch.from_numpy(layer.rounding.exact) / layer.scale)
        # A step is that of weights: their gradient is that of units over the scale, and so is a step of units.
        squares = layer.scale.square()
        layer.units.register_hook(partial(torch.Tensor.div, other=squares))  # type: ignore[no-untyped-call]
    groups: list[dict[str, Any]] = [
        {"params": [layer.units for layer in pair.layers], "weight_decay": WEIGHT_DECAY},
        {"params": [layer.shift for layer in pair.layers]},
    ]
    return torch.optim.SGD(groups, RATE, MOMENTUM, nesterov=True)


GDFQ = Recipe(by_descent, partial(of_logits, weight=1.0, over_classes=True))
INTRAQ = Recipe(by_descent, partial(of_logits, weight=20.0, over_classes=False))
