"""DiStyleGAN, the student: a generator a tenth of its teacher's size, and the discriminator it learns from.

Masouris et al. 2022, "Post-training Model Quantization Using GANs for Synthetic Data Generation". Names and shapes of
tensors are those of the published checkpoint, which loads with strict=True.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ovcalib.errors import ModelError, UsageError
from ovcalib.gan.sampling import (
    Drawer,
    PixelMap,
    ZDistribution,
    latents,
    one_hot,
    to_pixels,
    to_pixels_minmax,
)
from ovcalib.models.weights import apply_state_dict, class_names, load_state_dict, read_safetensors, save_state_dict

FORMAT = "ovcalib-distylegan"
RESOLUTION = 32
SLOPE = 0.2


@dataclass(frozen=True)
class StudentConfig:
    """Sizes of the student; the defaults are the publication's.

    ngf           channels that the first upsampling convolution emits
    project_dim   length of the projected latent
    """

    z_dim: int = 512
    c_dim: int = 10
    ngf: int = 256
    project_dim: int = 128


def _upsample(inputs: int, outputs: int) -> nn.Sequential:
    """Nearest neighbour to twice the size, then a convolution whose gate halves its channels."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(inputs, 2 * outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * outputs),
        nn.GLU(dim=1),
    )


class StudentGenerator(nn.Module):
    """(z, c) -> image. 2,054,368 parameters with the default sizes."""

    def __init__(self, config: StudentConfig = StudentConfig()) -> None:
        super().__init__()
        self.config = config
        ngf, project = config.ngf, config.project_dim
        self.project = nn.Sequential(
            nn.Linear(config.z_dim, 2 * project, bias=False), nn.BatchNorm1d(2 * project), nn.GLU(dim=1)
        )
        self.fc = nn.Sequential(
            nn.Linear(project + config.c_dim, 32 * ngf, bias=False), nn.BatchNorm1d(32 * ngf), nn.GLU(dim=1)
        )
        self.upsample1 = _upsample(ngf, ngf // 2)
        self.upsample2 = _upsample(ngf // 2, ngf // 4)
        self.upsample3 = _upsample(ngf // 4, ngf // 8)
        self.img = nn.Sequential(nn.Conv2d(ngf // 8, 3, 3, padding=1, bias=False), nn.Tanh())

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """
        z         float32 [N, z_dim], N(0, 1)
        c         float32 [N, c_dim], one-hot
        returns   float32 [N, 3, 32, 32] in [-1, 1]
        """
        x = self.fc(torch.cat([self.project(z), c], dim=1))
        x = x.reshape(len(z), self.config.ngf, 4, 4)
        return self.img(self.upsample3(self.upsample2(self.upsample1(x))))  # type: ignore[no-any-return]


def _spectral_norm(module: nn.Module) -> nn.Module:
    # The older form of spectral normalisation: its tensors are those of the published checkpoint.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(module)


class StudentDiscriminator(nn.Module):
    """(image, c) -> logit and the features of four layers. 3,415,178 parameters with the default sizes."""

    def __init__(self, ndf: int = 128, c_dim: int = 10, project_dim: int = 128) -> None:
        super().__init__()
        widths = [3, ndf, ndf, 2 * ndf, 4 * ndf]
        self.netD = nn.ModuleList(
            nn.Sequential(_spectral_norm(nn.Conv2d(i, o, 4, stride=2, padding=1)), nn.LeakyReLU(SLOPE))
            for i, o in itertools.pairwise(widths)
        )
        self.project = nn.Sequential(_spectral_norm(nn.Linear(16 * ndf, 2 * project_dim, bias=False)), nn.GLU(dim=1))
        self.output = nn.Linear(project_dim + c_dim, 1, bias=False)

    def forward(self, image: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """
        image     float32 [N, 3, 32, 32] in [-1, 1]
        c         float32 [N, c_dim], one-hot
        returns   [N, 1], unbounded; features [N, ndf, 16, 16], [N, ndf, 8, 8], [N, 2 ndf, 4, 4], [N, 4 ndf, 2, 2]
        """
        features = []
        x = image
        for block in self.netD:
            x = block(x)
            features.append(x)
        return self.output(torch.cat([self.project(x.flatten(1)), c], dim=1)), features


def initialise(module: nn.Module) -> None:
    """Orthogonal matrices and kernels, N(1, 0.02) gains, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            # With spectral normalisation the trained tensor is `weight_orig`.
            nn.init.orthogonal_(getattr(layer, "weight_orig", layer.weight))
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        if isinstance(getattr(layer, "bias", None), Tensor):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def infer_config(state: Mapping[str, Tensor], source: str) -> StudentConfig:
    """The sizes of a student from its tensors. Raises ModelError."""
    try:
        project = state["project.0.weight"].shape[0] // 2
        return StudentConfig(
            z_dim=state["project.0.weight"].shape[1],
            c_dim=state["fc.0.weight"].shape[1] - project,
            ngf=state["upsample1.1.weight"].shape[0],
            project_dim=project,
        )
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"{source!r} holds no DiStyleGAN generator: the tensor {error} is missing. "
            "Expected the published generator.pt, or a file that `ovcalib gan distill` wrote."
        ) from error


@dataclass(frozen=True)
class Student:
    """A student ready to generate.

    classes   names in label order; empty where the file does not tell
    licence   of the weights, where the file tells
    """

    generator: StudentGenerator
    classes: tuple[str, ...]
    licence: str | None = None

    def drawer(self, seed: int, pixels: PixelMap = "affine", z: ZDistribution = "gaussian") -> Drawer:
        """Image i from (seed, i)."""
        convert = to_pixels if pixels == "affine" else to_pixels_minmax
        config = self.generator.config
        device = next(self.generator.parameters()).device

        @torch.no_grad()
        def draw(indices: Sequence[int], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
            assert labels is not None
            c = one_hot(labels, config.c_dim)
            return convert(self.generator(latents(seed, indices, config.z_dim, z).to(device), c.to(device)))

        return Drawer("DiStyleGAN", RESOLUTION, config.c_dim, self.classes, draw)


def load_student(path: Path) -> Student:
    """A student from the published generator.pt or from our safetensors, in eval mode. Raises ModelError."""
    state = load_state_dict(path)
    metadata = read_safetensors(path)[1] if path.suffix == ".safetensors" else {}
    config = infer_config(state, str(path))
    if max(asdict(config).values()) > 2**14 or config.c_dim < 1 or config.ngf < 8:
        raise ModelError(f"{str(path)!r} has impossible sizes: {config}.")
    generator = StudentGenerator(config)
    apply_state_dict(generator, state, str(path), "a DiStyleGAN generator of these sizes")
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise ModelError(f"{str(path)!r} holds values that are not finite. Train it again, or fetch it again.")
    try:
        classes = class_names(metadata)
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is damaged: {error}.") from error
    return Student(generator.eval().requires_grad_(False), classes, metadata.get("licence"))


def save_student(
    generator: StudentGenerator,
    path: Path,
    classes: Sequence[str] = (),
    licence: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Tensors as safetensors, in half precision by default, with the names of the classes; atomically."""
    metadata = {"format": FORMAT, "config": json.dumps(asdict(generator.config)), "classes": json.dumps(list(classes))}
    if licence:
        metadata["licence"] = licence
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in generator.state_dict().items()
    }
    save_state_dict(tensors, path, metadata)


def shipped_student() -> Student:
    """The student that comes with the package. Raises UsageError where this build has none."""
    file = files("ovcalib.gan").joinpath("weights", "distylegan-cifar10.safetensors")
    if not file.is_file():
        raise UsageError(
            "This build of ovcalib ships no DiStyleGAN weights. Give the file: distylegan:FILE, the published "
            "generator.pt or one that `ovcalib gan distill` made; or calibrate with fractal, which needs none."
        )
    with as_file(file) as path:
        return load_student(path)
