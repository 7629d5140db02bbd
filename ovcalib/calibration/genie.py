"""GENIE: a small generator and its latent vectors, optimised for each batch anew (Jeon et al. 2023).

Instead of pixels, a new generator and its inputs are optimised; its convolutions are a prior for natural
images. Swing convolution moves the inputs of strided convolutions at random, so that every pixel gets a gradient. The
learning rates are those of the published code, in which the two are swapped: 0.1 for latent vectors, 0.01 for
the generator.

The images' own mean and standard deviation are those of each image: over the batch they are 0 and 1 by construction,
because the generator ends in a BatchNorm without parameters. The published code adds up their three channels, which
input_weight=3 does here, and the layers, where this averages; Adam does not see that factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ovcalib.calibration.inversion_options import InversionOptions
from ovcalib.calibration.inversion_options import images_wanted as images_wanted
from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import UsageError

NEEDS = frozenset({"checkpoint"})


@dataclass(frozen=True)
class Options(InversionOptions):
    __doc__ = f"""{InversionOptions.__doc__}
    latent          length of a latent vector; `rate` is their learning rate
    generator_rate  learning rate of the generator, multiplied with `decay` every 100 steps
    decay           the factor of generator_rate
    """

    scope: Literal["sample", "batch", "set"] = "batch"
    unbiased: bool = True
    input_weight: float | None = 3.0
    swing: bool = True
    latent: int = 256
    generator_rate: float = 0.01
    decay: float = 0.95

    BUDGETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 80, "batch": 8, "rate": 0.1, "patience": 100, "schedule": "cosine"},
        "standard": {"steps": 300, "batch": 16, "rate": 0.1, "patience": 100, "schedule": "cosine"},
        "paper": {"steps": 4000, "batch": 128, "rate": 0.1, "patience": 100, "schedule": "plateau"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent < 1:
            raise ValueError(f"latent is {self.latent}, but must be at least 1")
        if not self.generator_rate > 0 or not 0 < self.decay <= 1:
            raise ValueError("generator_rate must be positive, and decay lie in (0, 1]")


def generate(request: Request, options: Options) -> Generated:
    """Images of a generator that is trained on the stored BatchNorm statistics."""
    from ovcalib.calibration.genie_generator import GeneratorRun
    from ovcalib.calibration.inversion import invert

    _, height, width = request.spec.input_shape
    if options.scope != "batch":
        raise UsageError(f"-O scope={options.scope}: genie trains a generator for each batch; expected batch.")
    if options.init != "gaussian" or options.schedule == "plateau-reset":
        given = f"init={options.init}" if options.init != "gaussian" else f"schedule={options.schedule}"
        raise UsageError(f"-O {given}: genie starts from gaussian latent vectors, with schedule plateau or cosine.")
    if height % 4 or width % 4:
        raise UsageError(f"genie makes images whose sides divide by 4, and {request.spec.name} takes {height}x{width}.")
    return invert(request, options, GeneratorRun)
