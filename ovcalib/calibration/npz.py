"""Images from an npz file: one that `ovcalib generate` wrote, or arrays of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ovcalib.calibration.sets import load_calibration
from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import UsageError

NEEDS = frozenset({"argument"})


@dataclass(frozen=True)
class Options:
    pass


def generate(request: Request, options: Options) -> Generated:
    """The first images of a file, in its order."""
    images, labels, domain = load_calibration(Path(request.argument), request.spec)
    if request.count > len(images):
        raise UsageError(
            f"--num-samples {request.count} is more than the {len(images)} images of {request.argument!r}. "
            f"Ask for at most {len(images)}."
        )
    request.tick(request.count, "")
    return Generated(
        images=images[: request.count],
        domain=domain,
        labels=None if labels is None else labels[: request.count],
        label_origin=None if labels is None else "data",
    )
