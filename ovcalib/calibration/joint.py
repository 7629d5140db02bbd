"""A network whose images another one sees as well."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovcalib.models.load import Model
from ovcalib.records.preprocessing import Preprocessing


class JointNetwork(nn.Module):
    """Runs a prior and a target on the same images, and returns the target's outputs; the prior's without a target.

    preprocessing   of the images, which are the target's inputs
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, prior: Model, target: nn.Module | None, preprocessing: Preprocessing) -> None:
        super().__init__()
        assert prior.module is not None
        self.prior, self.target = prior.module, target
        own, theirs = preprocessing, prior.spec.preprocessing
        self.size, self.reverse = (theirs.height, theirs.width), own.channel_order != theirs.channel_order
        mean, std = (np.array(v) for v in (own.mean, own.std))
        if self.reverse:
            mean, std = mean[::-1], std[::-1]
        # From the target's normalisation to the prior's, in one multiplication and one addition.
        scale, offset = std / np.array(theirs.std), (mean - np.array(theirs.mean)) / np.array(theirs.std)
        for name, value in (("scale", scale), ("offset", offset)):
            self.register_buffer(
                name, torch.from_numpy(value.astype(np.float32))[None, :, None, None], persistent=False
            )

    def as_prior(self, images: Tensor) -> Tensor:
        """The inputs of the prior for inputs of the target, [N, C, H, W]."""
        images = images.flip(1) if self.reverse else images
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return images * self.scale + self.offset

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.prior(self.as_prior(images))
        if self.target is not None:
            outputs = self.target(images)
        return outputs
