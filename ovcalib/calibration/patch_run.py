"""The loop of patch-similarity."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovcalib.calibration.attention_taps import attended, no_attention
from ovcalib.calibration.bn_taps import large_blocks_kept
from ovcalib.calibration.inversion import Batch, Loop, descend
from ovcalib.calibration.inversion_options import resolve
from ovcalib.calibration.network_outputs import frozen
from ovcalib.calibration.patch_losses import patch_entropy, total_variation
from ovcalib.calibration.sources import Generated, Request

if TYPE_CHECKING:
    from ovcalib.calibration.patch_similarity import Options

BETAS = (0.5, 0.9)
RATE, RATE_OF_WINDOWS = 0.2, 0.25
# Total variation of 32 images of 3x224x224, and the largest shift in pixels of both rounds at 224.
TARGET, PUBLISHED_BATCH, PUBLISHED_SIDE = (2500.0, 3000.0), 32, 224
SHIFTS = (15, 30)
WARM_UP = 0.2  # share of a round


def optimise(request: Request, options: Options) -> Generated:
    """Images that attention tells the patches of apart.

    raises   ModelError for a network without attention
    """
    assert request.module is not None
    spec = request.spec
    module, device = frozen(request.module)
    with torch.no_grad():
        _, found = attended(module, torch.zeros(1, *spec.input_shape, device=device))
    if not found:
        raise no_attention(spec.name)
    options = resolve(options, spec.input_shape[1:], spec.num_classes)
    if options.rate is None:
        windows = any(output.shape[1] > 1 for output in found)
        options = dataclasses.replace(options, rate=RATE_OF_WINDOWS if windows else RATE)
    labels = None if spec.num_classes is None else torch.arange(request.count) % spec.num_classes
    with large_blocks_kept(spec.input_shape), torch.enable_grad():
        run = PatchRun(request, options, module, labels, device)
        images = run.all_steps()
    module.cpu()
    by_method = labels is not None and options.class_weight > 0
    return Generated(
        images=images.numpy(),
        domain="network",
        labels=labels[: len(images)].numpy().astype(np.int64) if labels is not None and by_method else None,
        label_origin="method" if by_method else None,
        options=dataclasses.asdict(options),
        warnings=run.warnings(len(images)),
    )


def rate_at(step: int, steps: int) -> float:
    """The factor of the learning rate: two rounds, each a linear warm-up over a fifth and half a cosine to zero."""
    length = math.ceil(steps / 2)
    step, warm = step % length, round(WARM_UP * length)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (length - warm)))


def shifted(images: Tensor, rng: np.random.Generator, most: int) -> Tensor:
    """All images rolled by as many pixels along both axes, up to `most` either way, and half of the time mirrored."""
    offset = int(rng.integers(-most, most + 1))
    images = images.roll((offset, offset), (2, 3))
    return images.flip(3) if rng.random() < 0.5 else images


class PatchRun(Loop):
    """One run: images for the entropy of patch similarities."""

    options: Options

    def __init__(
        self, request: Request, options: Options, module: nn.Module, labels: Tensor | None, device: torch.device
    ) -> None:
        super().__init__(request, options, labels, device)
        self.module = module
        sides = request.spec.input_shape
        # A norm over pixels grows with the square root of their number.
        self.size = math.sqrt(math.prod(sides) / (3 * PUBLISHED_SIDE**2))

    def improve(self, number: int, batch: Batch) -> Tensor:
        o = self.options
        assert o.steps is not None
        # The same for all batches, so that an image does not depend on the batch that it is in.
        rng = np.random.default_rng((self.request.seed, 2, batch.step))
        most = round(SHIFTS[batch.step >= math.ceil(o.steps / 2)] * min(self.height, self.width) / PUBLISHED_SIDE)
        images = batch.images.detach().requires_grad_()
        value = self.loss(shifted(images, rng, most), batch.indices)
        (gradient,) = torch.autograd.grad(value.sum(), images)
        with torch.no_grad():
            descend(batch, gradient, "adam", rate_at(batch.step, o.steps), BETAS)
            batch.images.clamp_(self.low, self.high)
        return value

    def loss(self, images: Tensor, indices: list[int]) -> Tensor:
        """[N]: negative entropies of all blocks, cross-entropy, and distance from the target of the variation."""
        o = self.options
        outputs, blocks = attended(self.module, images)
        value = -torch.stack([patch_entropy(block, self.height, self.width, o.bandwidth) for block in blocks]).sum(0)
        if self.labels is not None and o.class_weight:
            labels = self.labels[indices].to(self.device)
            value = value + o.class_weight * F.cross_entropy(outputs[0], labels, reduction="none")
        if o.tv_weight:
            targets = torch.from_numpy(self.size * self.targets(indices)).to(images)
            variation = math.sqrt(PUBLISHED_BATCH) * total_variation(images)
            value = value + o.tv_weight * (variation - targets).abs()
        return value

    def targets(self, indices: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Total variation of 32 images like each of these, at the published size."""
        return np.array([np.random.default_rng((self.request.seed, 5, i)).uniform(*TARGET) for i in indices])

    def network_key(self) -> list[float]:
        return [float(weights.double().sum()) for weights in self.module.parameters()]
