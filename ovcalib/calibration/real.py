"""Real images: the reference for all other sources."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from ovcalib.calibration.sources import Generated, Request
from ovcalib.data.sets import Reader, choose, model_labels, open_data
from ovcalib.errors import DataError, UsageError

NEEDS = frozenset({"argument"})
ARGUMENT = "DATA"


@dataclass(frozen=True)
class Options:
    """
    balanced   interleave the classes, so that any number of images holds them equally
    """

    balanced: bool = True


def generate(request: Request, options: Options) -> Generated:
    """A seeded, class-interleaved choice of real images."""
    data = open_data(request.argument, split="train", download=request.download)
    if request.count > len(data):
        raise UsageError(
            f"`num_samples={request.count}` is more than the {len(data)} images of {request.argument!r}. "
            f"Ask for at most {len(data)}."
        )
    warnings = []
    labels = None
    try:
        if request.spec.num_classes is not None:  # folders say nothing to a network without classes
            labels = model_labels(data, request.spec)
    except DataError as error:
        # The default algorithm needs no labels, so images of other classes serve as well.
        warnings.append(f"labels are not used: {error}")
    order = choose(data.labels if options.balanced else None, len(data), request.seed)
    reader = Reader(data, request.spec, labels, order)
    samples = []
    for sample in islice(reader, request.count):
        samples.append(sample)
        request.tick(len(samples), "")
    if reader.unreadable:
        warnings.append(
            f"{len(reader.unreadable)} unreadable images were skipped, for example {reader.unreadable[0]!r}"
        )
    if len(samples) < request.count:
        warnings.append(f"only {len(samples)} of {request.count} images could be read")
    if labels is not None and request.spec.num_classes:
        present = len({sample.label for sample in samples})
        expected = min(request.spec.num_classes, len(samples))
        if present < expected / 2:
            warnings.append(f"the images cover {present} of the model's {request.spec.num_classes} classes")
    return Generated(
        images=np.stack([sample.pixels for sample in samples]),
        domain="pixels",
        real=True,
        labels=None if labels is None else np.array([sample.label for sample in samples], dtype=np.int64),
        label_origin=None if labels is None else "data",
        warnings=tuple(warnings),
    )
