"""Images of several sources in one set, in given shares.

A few real images beside made ones are what FDDA calibrates on (Zhong et al., "Fine-grained Data Distribution Alignment
for Post-Training Quantization", ECCV 2022): photographs bring the tails that made images lack, and made images the
number. Sources take turns, so that any part of the set holds them in their shares. Each runs with its default options;
a set that was made with others joins as `npz:FILE`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.sources import Generated, Request, open_source
from ovcalib.calibration.sources import generate as generate_set
from ovcalib.calibration.sources import images_wanted as wanted_of
from ovcalib.errors import UsageError
from ovcalib.records.calibration import LabelOrigin
from ovcalib.records.model import ModelSpec

NEEDS = frozenset({"argument"})
ARGUMENT = "SOURCE=SHARE,SOURCE=SHARE"
# From the most trusted to the least.
ORIGINS: tuple[LabelOrigin, ...] = ("data", "method", "pseudo")


@dataclass(frozen=True)
class Options:
    pass


def shares(argument: str) -> dict[str, float]:
    """The share of each source, in the order in which they are named; they add up to 1.

    raises   UsageError
    """
    found: dict[str, float] = {}
    for part in argument.split(","):
        reference, _, text = part.strip().rpartition("=")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not reference or not 0 < share < math.inf:
            raise UsageError(f"mix:{argument}: {part!r} is no share of a source. Expected {ARGUMENT}, each above 0.")
        if reference in found:
            raise UsageError(f"mix:{argument}: {reference!r} is named twice. Add up its shares.")
        if reference.partition(":")[0] in ("mix", "auto"):
            raise UsageError(
                f"mix:{argument}: a mix cannot hold {reference!r}. Name sources that make images themselves."
            )
        found[reference] = share
    total = sum(found.values())
    return {reference: share / total for reference, share in found.items()}


def parts(argument: str) -> tuple[str, ...]:
    """The sources that are mixed."""
    return tuple(shares(argument))


def turns(parts: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Which source gives each image: the one that is furthest behind its share.

    parts     float64 [P], shares that add up to 1
    returns   int64 [count]; the first images do not depend on how many follow
    """
    given = np.zeros(len(parts))
    chosen = np.empty(count, np.int64)
    for i in range(count):
        chosen[i] = np.argmax(parts * (i + 1) - given)
        given[chosen[i]] += 1
    return chosen


def images_wanted(spec: ModelSpec, argument: str) -> int:
    """As many as the most expensive of the sources makes by default."""
    return min(wanted_of(reference, spec) for reference in shares(argument))


def generate(request: Request, options: Options) -> Generated:
    """The images of all sources, which take turns."""
    wanted = shares(request.argument)
    for reference in wanted:  # refused before any of them works
        open_source(reference, request.spec, request.module)
    order = turns(np.array(list(wanted.values())), request.count)
    places = [np.flatnonzero(order == i) for i in range(len(wanted))]
    for reference, place in zip(wanted, places, strict=True):
        if not len(place):
            raise UsageError(
                f"mix:{request.argument}: {request.count} images hold none of {reference!r}. Ask for more images "
                "(`num_samples`), or leave it out."
            )
    made: list[CalibrationSet] = []
    done = 0
    for i, (reference, place) in enumerate(zip(wanted, places, strict=True)):

        def tick(finished: float, note: str, before: int = done, name: str = reference) -> None:
            request.tick(before + finished, f"{name.partition(':')[0]}{f', {note}' if note else ''}")

        own = dataclasses.replace(
            request, count=len(place), tick=tick, resume=request.resume and request.resume / f"part-{i}"
        )
        made.append(generate_set(reference, own))
        done += len(place)
    # A source may run out of time, or of images.
    found = [place[: len(part)] for place, part in zip(places, made, strict=True)]
    back = np.argsort(np.concatenate(found), kind="stable")
    pixels = all(part.domain == "pixels" for part in made)
    images = [part.images if pixels else np.concatenate(list(part)) for part in made]
    labels = [part.labels for part in made if part.labels is not None]
    origins = [part.provenance.labels for part in made if part.provenance.labels is not None]
    labelled = len(labels) == len(made)
    return Generated(
        images=np.concatenate(images)[back],
        domain="pixels" if pixels else "network",
        labels=np.concatenate(labels)[back] if labelled else None,
        label_origin=max(origins, key=ORIGINS.index) if labelled else None,
        real=any(part.provenance.real for part in made),
        licence="; ".join(
            f"{reference}: {part.provenance.licence or 'not stated'}"
            for reference, part in zip(wanted, made, strict=True)
        ),
        parts=tuple(part.provenance for part in made),
        warnings=tuple(
            f"{reference}: {warning}"
            for reference, part in zip(wanted, made, strict=True)
            for warning in part.provenance.warnings
        ),
    )
