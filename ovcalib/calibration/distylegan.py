"""DiStyleGAN: images of a small generator that was distilled from a large one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import require

NEEDS = frozenset({"optional argument"})


@dataclass(frozen=True)
class Options:
    """
    pixels   affine: -1..1 becomes 0..255; minmax-per-image: every image stretched to the full range, which
             exaggerates contrast, as the published set was made
    z        gaussian, or uniform01
    """

    pixels: Literal["affine", "minmax-per-image"] = "affine"
    z: Literal["gaussian", "uniform01"] = "gaussian"


def generate(request: Request, options: Options) -> Generated:
    """Pixels, as many of each class as of any other; image i comes from (seed, i) alone."""
    require("torch", "quantize", "The calibration source 'distylegan'")
    from ovcalib.gan.distylegan import load_student, shipped_student
    from ovcalib.gan.sampling import for_model

    student = load_student(Path(request.argument)) if request.argument else shipped_student()
    images, labels = for_model(
        student.drawer(request.seed, options.pixels, options.z), request.spec, request.count, request.tick
    )
    return Generated(
        images, domain="pixels", labels=labels, label_origin="method" if labels is not None else None,
        licence=student.licence,
    )  # fmt: skip
