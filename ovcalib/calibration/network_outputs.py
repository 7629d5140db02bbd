"""Output tensors of any network: logits, or the output maps of a detector's heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def frozen(module: nn.Module) -> tuple[nn.Module, torch.device]:
    """The network in eval mode, whose weights take no gradients, on CUDA where there is some, and where it is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return module.to(device).eval().requires_grad_(False), device


def network_outputs(module: nn.Module, images: Tensor) -> list[Tensor]:
    """All output tensors of a network, batch first."""
    outputs: Any = module(images)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def flat_outputs(outputs: list[Tensor]) -> list[Tensor]:
    """Outputs as [N, K] each."""
    return [output.flatten(1) for output in outputs]


@contextmanager
def features_kept(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside of the block a pass leaves in the list, as its only entry, what the classifier read.

    That is the input of the layer with weights that runs last: [N, D] of a linear layer, [N, D, H, W] of a convolution.
    """
    kept: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[:] = [inputs[0]]

    readers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in readers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def last_map_kept(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside of the block a pass leaves in the list, as its only entry, the last feature map, [N, D, h, w].

    That is the last output of a module that has more than one position: what a global pooling reads.
    """
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            kept[:] = [output]

    hooks = [part.register_forward_hook(keep) for part in module.modules()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
