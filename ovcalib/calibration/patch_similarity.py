"""Patch similarity: images of which attention tells the patches apart, for vision transformers (PSAQ-ViT).

Li et al. 2022, "Patch Similarity Aware Data-Free Quantization for Vision Transformers". Pixels are optimised until the
similarities between patches have a high entropy in every block, the network sees a class, and neighbouring pixels
differ as much as in photographs. Needs no BatchNorm.

Differences from the authors' code:
- Attention is found by its calls (ovcalib/calibration/attention_taps.py), not by the names of modules.
- Each image has its own loss, evaluates densities between its own smallest and largest similarity, and has its own
  target of the variation, so it does not depend on its neighbours in the batch.
- Of windows (Swin) no patch is dropped; the code drops the first, where ViT has its class token.
- The budgets quick and standard start from fractals and take small steps, as bn-inversion does. INT8 of vit-cifar10
  agrees more with FP32 than after 20 published steps from noise (benchmarks/results/vit.md).
- Shift and target of the variation are in proportion to the size of the image. They are published for 224x224.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ovcalib.calibration.inversion_options import LoopOptions
from ovcalib.calibration.inversion_options import images_wanted as images_wanted
from ovcalib.calibration.sources import Generated, Request

NEEDS = frozenset({"checkpoint"})


@dataclass(frozen=True)
class Options(LoopOptions):
    """
    Values that are None depend on the budget or on the network; a run records what they came to.

    budget          quick, standard or paper (the published number of steps)
    steps           optimisation steps of every image, in two rounds of warm-up and cosine
    batch           images that go through the network together
    init            where images start: gaussian noise, uniform noise, or fractal pictures
    rate            learning rate of Adam, in units of the normalised input; of the budget paper 0.2, and 0.25 with
                    windows
    bandwidth       of the kernels whose sum is the density of similarities
    class_weight    weight of the cross-entropy to a class; 0 leaves it out
    tv_weight       weight of the total variation's distance from its target; 0 leaves it out
    """

    init: Literal["gaussian", "uniform", "fractal"] | None = None
    bandwidth: float = 0.01
    class_weight: float = 1.0
    tv_weight: float = 0.05

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 20, "batch": 8, "init": "fractal", "rate": 0.05},
        "standard": {"steps": 120, "batch": 16, "init": "fractal", "rate": 0.05},
        "paper": {"steps": 1000, "batch": 32, "init": "gaussian"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth is {self.bandwidth}, but must be positive")
        for name in ("class_weight", "tv_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")


def generate(request: Request, options: Options) -> Generated:
    """Images with a high entropy of patch similarities."""
    from ovcalib.calibration.patch_run import optimise

    return optimise(request, options)
