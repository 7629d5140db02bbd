"""Images from an npz file: one that `ovcalib generate` wrote, or arrays of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ovcalib.calibration.sets import load_calibration
from ovcalib.calibration.sources import DEFAULT_IMAGES, Generated, Request
from ovcalib.data.arrays import Npz
from ovcalib.errors import DataError, UsageError
from ovcalib.records.model import ModelSpec

NEEDS = frozenset({"argument"})


@dataclass(frozen=True)
class Options:
    pass


def images_wanted(spec: ModelSpec, argument: str) -> int:
    """All images of the file, as far as its header tells; reading it is what reports a broken one."""
    try:
        with Npz(Path(argument)) as archive:
            return max(1, archive.header("images").shape[0])
    except (DataError, KeyError, IndexError):
        return DEFAULT_IMAGES


def generate(request: Request, options: Options) -> Generated:
    """The first images of a file, in its order."""
    images, domain, labels, origin, real = load_calibration(Path(request.argument), request.spec)
    if request.count > len(images):
        raise UsageError(
            f"`num_samples={request.count}` is more than the {len(images)} images of {request.argument!r}. "
            f"Ask for at most {len(images)}."
        )
    request.tick(request.count, "")
    return Generated(
        images=images[: request.count],
        domain=domain,
        real=real,
        labels=None if labels is None else labels[: request.count],
        label_origin=origin,
    )
