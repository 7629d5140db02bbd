"""GENIE's generator, and the loop that trains one for each batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from ovcalib.calibration.inversion import Run

if TYPE_CHECKING:
    from ovcalib.calibration.genie import Options


class Generator(nn.Module):
    """Latent vectors to normalised images, four times upsampled (Jeon et al. 2023, appendix).

    shape   (C, H, W) of the images; H and W divide by 4
    """

    def __init__(self, latent: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.grid = height // 4, width // 4
        self.project = nn.Linear(latent, 128 * self.grid[0] * self.grid[1])
        self.grow = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.Tanh(),
            # Its output has mean 0 and std 1 over the batch, as a normalised image should.
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        """[N, latent] -> [N, C, H, W]"""
        images: Tensor = self.grow(self.project(z).view(len(z), 128, *self.grid))
        return images


class GeneratorRun(Run):
    """As Run, but the pixels come from a generator. An interrupted batch begins again; finished ones are kept."""

    options: Options

    def steps_alone(self, number: int, steps: int) -> None:
        o, group = self.options, self.groups[number]
        assert o.rate is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng((self.request.seed, 3, number)).integers(2**63)))
            generator = Generator(o.latent, self.request.spec.input_shape).to(self.device).train()
        drawn = [np.random.default_rng((self.request.seed, 0, i)).standard_normal(o.latent) for i in group]
        z = torch.from_numpy(np.stack(drawn)).float().to(self.device).requires_grad_()
        method = torch.optim.RAdam if o.optimizer == "radam" else torch.optim.Adam
        latent_optimizer, optimizer = method([z], o.rate), method(generator.parameters(), o.generator_rate)
        adjust_rates = schedule(o, latent_optimizer, optimizer, steps)
        batch = self.batch_of(group, generator(z).detach())
        for step in range(steps):
            if self.out_of_time():
                break
            batch.step = step
            rng = np.random.default_rng((self.request.seed, 2, step, number))
            with self.swing.drawn_from(rng):
                outputs = self.measure(self.view(generator(z), rng))
            value = self.loss(number, batch, outputs).sum()
            self.check(value, step)
            latent_optimizer.zero_grad()
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            latent_optimizer.step()
            optimizer.step()
            adjust_rates(value.item())
            self.report(value.item())
        with torch.no_grad():
            batch.images = generator(z)
        self.batches[number] = batch
        self.close(number)


def schedule(o: Options, latents: Optimizer, generator: Optimizer, steps: int) -> Callable[[float], None]:
    """Called with the loss after every step: the authors' schedules, or a cosine to zero for both rates."""
    if o.schedule == "cosine":
        cosines = [
            lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)))
            for optimizer in (latents, generator)
        ]

        def follow(loss: float) -> None:
            for cosine in cosines:
                cosine.step()

        return follow
    assert o.patience is not None
    plateau = lr_scheduler.ReduceLROnPlateau(latents, factor=o.factor, patience=o.patience, min_lr=1e-4)
    decay = lr_scheduler.StepLR(generator, 100, o.decay)

    def cut(loss: float) -> None:
        plateau.step(loss)
        decay.step()

    return cut
