"""GENIE's generator, and the loop that trains one for each batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ovcalib.calibration.genie import Options
from ovcalib.calibration.inversion import Run


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
        assert o.patience is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng((self.request.seed, 3, number)).integers(2**63)))
            generator = Generator(o.latent, self.request.spec.input_shape).to(self.device).train()
        drawn = [np.random.default_rng((self.request.seed, 0, i)).standard_normal(o.latent) for i in group]
        z = torch.from_numpy(np.stack(drawn)).float().to(self.device).requires_grad_()
        latent_optimizer = torch.optim.Adam([z], o.rate)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(latent_optimizer, patience=o.patience, min_lr=1e-4)
        optimizer = torch.optim.Adam(generator.parameters(), o.generator_rate)
        decay = torch.optim.lr_scheduler.StepLR(optimizer, 100, o.decay)
        batch = self.batch_of(group, generator(z).detach())
        for step in range(steps):
            batch.step = step
            rng = np.random.default_rng((self.request.seed, 2, step, number))
            with self.swing.drawn_from(rng):
                outputs = self.measure(self.view(generator(z), rng))
            value = self.loss(number, batch, outputs, rng).sum()
            self.check(value, step)
            latent_optimizer.zero_grad()
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            latent_optimizer.step()
            optimizer.step()
            plateau.step(value.item())
            decay.step()
            self.report(number * steps + step, float(value.detach()))
        with torch.no_grad():
            batch.images = generator(z)
        self.batches[number] = batch
        self.close(number)
