"""The conditional generator that GDFQ, FDDA and ACQ train against a frozen classifier.

It has two forms. For small images the class enters the latent vector (Xu et al. 2020, "Generative Low-bitwidth Data
Free Quantization"); for large ones it chooses the affine map of every normalisation. ACQ (Li et al. 2024) adds a
position, at which the classifier is to look.

Names and shapes of the tensors are those of GDFQ's code. So is 0.8 as the epsilon of the inner normalisations, which
was meant as a momentum there, but is what the published results have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovcalib.records.preprocessing import SMALL_SIDE

EPS = 0.8
SLOPE = 0.2
# What the other positions share in the map that tells a large generator its own (ACQ does not say how much).
SMOOTHING = 0.1

Grid = tuple[int, int]


class ClassGenerator(nn.Module):
    """Latent vectors and classes to normalised images.

    shape     (C, H, W) of the images
    classes   of the classifier
    latent    length of a latent vector
    width     channels of the widest layer; the next has half of them
    grid      (h, w), rows and columns of the positions; None for a generator without

    The last layer has no parameters: in training mode the images of a batch have mean 0 and variance 1 in each channel,
    wherever black and white are.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, latent: int = 100, width: int = 128, grid: Grid | None = None
    ) -> None:
        super().__init__()
        self.latent, self.classes, self.grid = latent, classes, grid
        self.width, self.size = width, shape[1:]
        self.start = -(-shape[1] // 4), -(-shape[2] // 4)
        self.l1 = nn.Sequential(nn.Linear(latent, width * self.start[0] * self.start[1]))

    def first_map(self, z: Tensor) -> Tensor:
        """[N, latent] -> [N, width, H / 4, W / 4]"""
        found: Tensor = self.l1(z).view(len(z), self.width, *self.start)
        return found

    def enlarged(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(2 * self.start[0], 2 * self.start[1]))

    def full_size(self, x: Tensor) -> Tensor:
        """At the size of the images, which need not divide by 4."""
        return F.interpolate(x, size=self.size)

    @property
    def positions(self) -> int:
        """How many positions there are."""
        return self.grid[0] * self.grid[1] if self.grid else 0


class SmallGenerator(ClassGenerator):
    """CIFAR's form: the class scales the latent vector, or is added to it and a position scales the sum (ACQ)."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, latent: int = 100, width: int = 128, grid: Grid | None = None
    ) -> None:
        super().__init__(shape, classes, latent, width, grid)
        self.label_emb = nn.Embedding(classes, latent)
        if grid:
            self.position_emb = nn.Embedding(self.positions, latent)
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(width))
        self.conv_blocks1 = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, EPS), nn.LeakyReLU(SLOPE)
        )
        self.conv_blocks2 = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, EPS),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width // 2, shape[0], 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(shape[0], affine=False),
        )

    def forward(self, z: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """z [N, latent], labels int64 [N], positions int64 [N] -> [N, C, H, W]"""
        of_class = self.label_emb(labels)
        given = of_class * z if positions is None else (of_class + z) * self.position_emb(positions)
        x = self.conv_blocks0(self.first_map(given))
        images: Tensor = self.conv_blocks2(self.full_size(self.conv_blocks1(self.enlarged(x))))
        return images


class ConditionalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose scale and shift are those of a class."""

    def __init__(self, channels: int, classes: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps, affine=False)
        self.weights, self.biases = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
        nn.init.ones_(self.weights.weight)
        nn.init.zeros_(self.biases.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        scale, shift = self.weights(labels)[..., None, None], self.biases(labels)[..., None, None]
        return torch.addcmul(shift, super().forward(x), scale)


class LargeGenerator(ClassGenerator):
    """ImageNet's form: every normalisation is conditional on the class, and the latent vector is not.

    A position enters the first map: its maxima and means in each cell of the grid and the smoothed position are
    convolved, enlarged and added (ACQ, which gives neither kernel nor smoothing: 3x3 and 0.1 here).
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, latent: int = 100, width: int = 128, grid: Grid | None = None
    ) -> None:
        super().__init__(shape, classes, latent, width, grid)
        if grid:
            self.place = nn.Conv2d(2 * width + 1, width, 3, padding=1)
        self.conv_blocks0_0 = ConditionalBatchNorm2d(width, classes)
        self.conv_blocks1_0 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_blocks1_1 = ConditionalBatchNorm2d(width, classes, EPS)
        self.conv_blocks2_0 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.conv_blocks2_1 = ConditionalBatchNorm2d(width // 2, classes, EPS)
        self.conv_blocks2_3 = nn.Conv2d(width // 2, shape[0], 3, padding=1)
        self.conv_blocks2_5 = nn.BatchNorm2d(shape[0], affine=False)

    def forward(self, z: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """z [N, latent], labels int64 [N], positions int64 [N] -> [N, C, H, W]"""
        x = self.first_map(z)
        if positions is not None:
            x = x + self.at(positions, x)
        x = self.enlarged(self.conv_blocks0_0(x, labels))
        x = self.full_size(F.leaky_relu(self.conv_blocks1_1(self.conv_blocks1_0(x), labels), SLOPE))
        x = F.leaky_relu(self.conv_blocks2_1(self.conv_blocks2_0(x), labels), SLOPE)
        images: Tensor = self.conv_blocks2_5(self.conv_blocks2_3(x).tanh())
        return images

    def at(self, positions: Tensor, x: Tensor) -> Tensor:
        """What a position adds to the first map, [N, width, H / 4, W / 4]."""
        assert self.grid is not None
        place = F.one_hot(positions, self.positions).to(x) * (1 - SMOOTHING) + SMOOTHING / self.positions
        cells = [F.adaptive_max_pool2d(x, self.grid), F.adaptive_avg_pool2d(x, self.grid)]
        coarse: Tensor = self.place(torch.cat([*cells, place.view(-1, 1, *self.grid)], 1))
        return F.interpolate(coarse, size=self.start)


def class_generator(
    shape: tuple[int, int, int], classes: int, latent: int, width: int, grid: Grid | None
) -> ClassGenerator:
    """The form for the size of the images; arguments are those of `ClassGenerator`."""
    form = SmallGenerator if min(shape[1:]) <= SMALL_SIDE else LargeGenerator
    return form(shape, classes, latent, width, grid)
