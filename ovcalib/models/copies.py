"""A copy of a user's module."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ovcalib.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def private_copy(module: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in eval mode, without the user's hooks; the module itself stays as it is.

    Hooks that belong to torch.nn.utils are kept, because weight and spectral normalisation work through them.
    raises   ModelError where the module cannot be copied
    """
    try:
        clone = copy.deepcopy(module)
    except Exception as error:  # whatever the user's __deepcopy__ or tensors raise
        raise ModelError(f"The module cannot be copied: {error}. Pass a module that copy.deepcopy accepts.") from error
    for child in clone.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]
    return clone.cpu().float().eval()
