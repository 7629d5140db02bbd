"""StyleGAN2-ADA: images of a generator that was trained on the model's data, from an official snapshot or our own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import require

NEEDS = frozenset({"argument"})


@dataclass(frozen=True)
class Options:
    """
    truncation     psi: 1 draws from the whole distribution, less stays nearer to the mean image
    cutoff         truncate the styles of the first so many layers only
    noise          const: the noise that was fixed with the weights; random: drawn for every image; none
    z              gaussian: as the generator was trained; uniform01: as the publication of DiStyleGAN drew it
    """

    truncation: float = 1.0
    cutoff: int | None = None
    noise: Literal["const", "random", "none"] = "const"
    z: Literal["gaussian", "uniform01"] = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.truncation <= 2:
            raise ValueError(f"truncation is {self.truncation}, but 0 to 2 was expected")
        if self.cutoff is not None and self.cutoff < 0:
            raise ValueError(f"cutoff is {self.cutoff}, but a number of layers was expected")


def generate(request: Request, options: Options) -> Generated:
    """Pixels, as many of each class as of any other; image i comes from (seed, i) alone."""
    require("torch", "quantize", "The calibration source 'stylegan2-ada'")
    from ovcalib.gan.sampling import for_model
    from ovcalib.gan.snapshot import load_teacher

    teacher = load_teacher(Path(request.argument))
    images, labels = for_model(
        teacher.drawer(request.seed, options.truncation, options.cutoff, options.noise, options.z),
        request.spec, request.count, request.tick,
    )  # fmt: skip
    return Generated(images, domain="pixels", labels=labels, label_origin=None if labels is None else "method")
