"""A network and its gradient in bfloat16, on CPUs where that is faster than float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

from ovcalib import machine


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether a step in bfloat16 takes less time than one in float32."""
    return device.type == "cpu" and machine.has_fast_bfloat16()


@contextmanager
def in_bfloat16(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Convolutions and matrix products in bfloat16 inside of the block; the gradient of pixels stays float32."""
    if not wanted:
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), _GroupedConvolutions():
        yield


class _GroupedConvolutions(TorchFunctionMode):
    """Sends grouped convolutions of any module through _GroupedConvolution."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_conv2d if func is F.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,  # noqa: A002  the name that torch gives it
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if groups == 1 or isinstance(padding, str) or weight.requires_grad:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _GroupedConvolution.apply(input.bfloat16(), weight, bias, stride, padding, dilation, groups)  # type: ignore


class _GroupedConvolution(torch.autograd.Function):
    """Forward in bfloat16, backward in float32: torch has no fast bfloat16 kernel for the gradient of a depthwise
    convolution, which alone takes longer than all else of EfficientNet-Lite0."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, (_pair(stride), _pair(padding), _pair(dilation), False, (0, 0), groups)
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, *tuple[None, ...]]:
        (weight,) = ctx.saved_tensors
        # Only its shape and layout are used. Without a layout, as in torch.nn.grad.conv2d_input, this takes four times
        # as long.
        x = torch.empty(ctx.shape, device=weight.device, memory_format=torch.channels_last)
        found = torch.ops.aten.convolution_backward(
            gradients[0].float(), x, weight, None, *ctx.settings, (True, False, False)
        )
        return found[0].to(gradients[0].dtype), None, None, None, None, None, None
