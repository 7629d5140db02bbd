"""Reading what attention makes of its values, softmax(QK^T)V, in any torch module.

Calls are seen, not modules, so that no name of a class or an attribute matters:

- `scaled_dot_product_attention`, as in timm
- `multi_head_attention_forward`, which nn.MultiheadAttention calls, as in torchvision's ViT
- a softmax over the last axis, and the matrix product that takes its result, as in Swin
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ovcalib.calibration.network_outputs import network_outputs
from ovcalib.errors import ModelError

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum)
# What may stand between the two and changes neither shape nor place.
BETWEEN = (F.dropout, torch.dropout, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.contiguous)

FEWEST_TOKENS = 4
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


class AttentionTaps(TorchFunctionMode):
    """While it is active, collects softmax(QK^T)V of every attention in `outputs`, each [..., tokens, D].

    Fused kernels without a gradient (torch's fast path of nn.MultiheadAttention) are off meanwhile: torch takes none
    while functions are overridden.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self.multi_head(args, kwargs)
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.outputs.append(result)
        elif func in SOFTMAXES:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if result.ndim >= 3 and axis in (-1, result.ndim - 1):
                self.weights.append(result)
        elif func in PRODUCTS:
            if any(self.is_weight(arg) and result.shape[:-1] == arg.shape[:-1] for arg in args):
                self.outputs.append(result)
        elif func in BETWEEN and self.is_weight(args[0]):
            self.weights.append(result)
        return result

    def is_weight(self, value: Any) -> bool:
        return any(value is weight for weight in self.weights)

    def multi_head(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """With the identity in place of the projection at the end, the function returns the heads side by side."""
        given = _MULTI_HEAD.bind(*args, **kwargs)
        values = given.arguments
        weight, bias, heads = values["out_proj_weight"], values["out_proj_bias"], values["num_heads"]
        values["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        values["out_proj_bias"] = None
        mixed, weights = F.multi_head_attention_forward(*given.args, **given.kwargs)
        apart = mixed.reshape(*mixed.shape[:-1], heads, -1)  # [tokens, N, heads, D], or without N
        self.outputs.append(apart.movedim(0, -2))
        return F.linear(mixed, weight, bias), weights


def attended(module: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a network, and softmax(QK^T)V of every attention over several tokens, averaged over heads.

    returns   outputs; [N, windows, tokens, D] for each attention, in execution order. Windows are what attention
              works on separately, in the batch: one in ViT, many in Swin
    """
    with AttentionTaps() as taps:
        outputs = network_outputs(module, images)
    return outputs, [found for output in taps.outputs if (found := by_image(output, len(images))) is not None]


def by_image(output: Tensor, images: int) -> Tensor | None:
    """[..., heads, tokens, D] or [N, tokens, D] as [images, windows, tokens, D]; None where that cannot be."""
    if output.ndim < 3 or output.shape[-2] < FEWEST_TOKENS:
        return None
    if output.ndim > 3:
        output = output.mean(-3)
    tokens, width = output.shape[-2:]
    rows = output.shape[:-2].numel()
    return None if rows % images else output.reshape(images, rows // images, tokens, width)


def has_attention(module: nn.Module, input_shape: Sequence[int]) -> bool:
    """Whether attention is seen while one black image goes through the network.

    input_shape   [C, H, W]
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            return bool(attended(module, next_to_weights(module, torch.zeros(1, *input_shape)))[1])
    except Exception:  # a network that does not run is refused where it is used
        return False
    finally:
        for part in training:
            part.training = True


def next_to_weights(module: nn.Module, images: Tensor) -> Tensor:
    first = next(module.parameters(), None)
    return images if first is None else images.to(first.device)


def no_attention(name: str) -> ModelError:
    """The error for a network without attention."""
    return ModelError(
        f"{name} has no attention: no softmax(QK^T)V over {FEWEST_TOKENS} tokens or more was seen while an image went "
        "through it, and patch-similarity optimises that. Calibrate with bn-inversion (networks with BatchNorm), "
        "fractal or real:DATA."
    )
