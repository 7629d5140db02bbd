"""Sources by reference, their options, and their calibration sets."""

from __future__ import annotations

import dataclasses
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.data.objects import refuse_reference
from ovcalib.errors import UnknownNameError, UsageError
from ovcalib.records.calibration import Domain, LabelOrigin, Provenance, Trial
from ovcalib.records.model import ModelSpec

if TYPE_CHECKING:
    import openvino as ov
    from torch import nn


DEFAULT_IMAGES = 300


@dataclass(frozen=True)
class Request:
    """What a source has to make.

    count        images
    spec         the model that the images are for
    module       the torch module itself, where there is one
    graph        gives the float graph, batch 1, which takes an export where there has been none
    argument     what follows the colon in the reference
    tick         receives the number of finished images, and a word on how it goes
    resume       the resume folder, with the state of an interrupted run, or None
    download     whether a data set may be fetched
    out_of_time  whether to end with the images so far; sources that optimise ask before every step
    """

    count: int
    seed: int
    spec: ModelSpec
    module: nn.Module | None = None
    graph: Callable[[], ov.Model] | None = None
    argument: str = ""
    tick: Callable[[float, str], None] = lambda done, note: None
    resume: Path | None = None
    download: bool = False
    out_of_time: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Generated:
    """What a source returns; `generate` adds the provenance.

    images    uint8 [N, H, W, C] ("pixels") or float32 [N, C, H, W] ("network"); N may be less than asked for
    labels    int64 [N], or None
    real      they are photographs or the user's own, not made
    options   as they were resolved, where the source fills in some of them itself
    parts     where the images are those of other sources
    trials    what sources were compared by
    """

    images: NDArray[Any]
    domain: Domain
    labels: NDArray[np.int64] | None = None
    label_origin: LabelOrigin | None = None
    real: bool = False
    licence: str | None = None
    options: Mapping[str, Any] | None = None
    parts: tuple[Provenance, ...] = ()
    trials: tuple[Trial, ...] = ()
    warnings: tuple[str, ...] = ()


class Source(Protocol):
    """The shape of a source module."""

    NEEDS: frozenset[str]
    Options: type[Any]

    def generate(self, request: Request, options: Any) -> Generated: ...


def open_source(
    reference: str, spec: ModelSpec, module: nn.Module | None, overrides: Mapping[str, str] | None = None
) -> tuple[Source, str, Any]:
    """The source that a reference names, its argument and its options; all that can be refused before any work.

    raises   UnknownNameError, UsageError
    """
    from ovcalib.calibration import SOURCES

    refuse_reference(reference)
    name, _, argument = reference.partition(":")
    if name not in SOURCES and (images := images_behind(reference)) is not None:
        raise UsageError(f"{reference!r} is no calibration source, but names images. Did you mean {images!r}?")
    source: Source = SOURCES[name]
    options = parse_options(source.Options, overrides or {}, name)
    if "argument" in source.NEEDS and not argument:
        raise UsageError(f"The calibration source {name!r} needs more: expected {usage(name, source)}.")
    if argument and not source.NEEDS & {"argument", "optional argument"}:
        raise UsageError(f"The calibration source {name!r} takes nothing after the colon, but got {argument!r}.")
    if "checkpoint" in source.NEEDS and module is None:
        raise UsageError(
            f"The calibration source {name!r} needs the torch module, and {spec.name!r} is a graph whose "
            "BatchNorm layers are folded away, or which cannot be read as one. Pass the PyTorch model (the training "
            "checkpoint), or calibrate with fractal or real:DATA."
        )
    return source, argument, options


def images_behind(reference: str) -> str | None:
    """The source that takes the images of a folder, a file or a data reference; None for anything else."""
    if reference.partition(":")[0] in ("imagefolder", "cifar10", "datumaro"):
        return f"real:{reference}"
    if Path(reference).is_dir():
        return f"real:imagefolder:{reference}"
    return f"npz:{reference}" if reference.endswith(".npz") and Path(reference).is_file() else None


def generate(reference: str, request: Request, overrides: Mapping[str, str] | None = None) -> CalibrationSet:
    """The calibration set that a reference names.

    reference   NAME or NAME:ARGUMENT, NAME from the table of sources
    overrides   options of the source, as text
    raises      UnknownNameError, UsageError, DataError
    """
    source, argument, options = open_source(reference, request.spec, request.module, overrides)
    if request.count < 1:
        raise UsageError(f"`num_samples={request.count}`: expected at least 1 image.")
    began = time.perf_counter()
    made = source.generate(dataclasses.replace(request, argument=argument), options)
    return CalibrationSet(
        images=made.images,
        labels=made.labels,
        preprocessing=request.spec.preprocessing,
        provenance=Provenance(
            source=reference,
            options=dict(made.options) if made.options is not None else dataclasses.asdict(options),
            num_samples=len(made.images),
            requested=request.count,
            seed=request.seed,
            seconds=round(time.perf_counter() - began, 3),
            domain=made.domain,
            real=made.real,
            labels=made.label_origin,
            licence=made.licence or licence_statement(made.real, source, request.spec),
            model=request.spec.name if "checkpoint" in source.NEEDS else None,
            parts=made.parts,
            trials=made.trials,
            warnings=made.warnings,
        ),
    )


def licence_statement(real: bool, source: Source, spec: ModelSpec) -> str | None:
    """Whose rights may be in images of which nobody said it; None for real ones, which are not ours to judge."""
    if real:
        return None
    if "checkpoint" in source.NEEDS:
        weights = spec.weights.licence or "whose licence is not stated"
        return f"made without photographs, from the weights of {spec.name} ({weights})"
    return "CC0-1.0 (made from random numbers)"


def images_wanted(reference: str, spec: ModelSpec) -> int:
    """The default number of images of a source: 300, as in NNCF; fewer for expensive sources."""
    from ovcalib.calibration import SOURCES

    name, _, argument = reference.partition(":")
    suggest = getattr(SOURCES[name], "images_wanted", None)
    return suggest(spec, argument) if suggest is not None else DEFAULT_IMAGES


def parts_of(reference: str) -> tuple[str, ...]:
    """The sources that a reference to several of them names; any other reference is its own only part."""
    from ovcalib.calibration import SOURCES

    name, _, argument = reference.partition(":")
    named = getattr(SOURCES[name], "parts", None)
    return named(argument) if named is not None else (reference,)


def usage(name: str, source: Source) -> str:
    """How a reference to a source is written."""
    argument = getattr(source, "ARGUMENT", "FILE")
    if "argument" in source.NEEDS:
        return f"{name}:{argument}"
    return f"{name}[:{argument}]" if "optional argument" in source.NEEDS else name


def parse_options(kind: type[Any], given: Mapping[str, str], name: str) -> Any:
    """An options dataclass from `key=value` text, converted by the types of its fields.

    raises   UsageError with the key, the value and what was expected
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, text in given.items():
        plain = key.replace("-", "_")
        if plain not in fields:
            raise UnknownNameError(f"option of {name}", key, fields or ["(none)"])
        values[plain] = _convert(text, hints[plain], key)
    try:
        return kind(**values)
    except ValueError as error:  # an options class checks its own ranges
        raise UsageError(f"Options of {name}: {error}") from error


def _convert(text: str, hint: Any, key: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in hint.__args__:
            return None
        hint = next(arg for arg in hint.__args__ if arg is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise UsageError(f"-O {key}={text}: expected one of {', '.join(map(str, typing.get_args(hint)))}.")
        return text
    if hint is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if text.lower() not in words:
            raise UsageError(f"-O {key}={text}: expected true or false.")
        return words[text.lower()]
    try:
        return hint(text)
    except ValueError as error:
        kind = {int: "a whole number", float: "a number"}.get(hint, hint.__name__)
        raise UsageError(f"-O {key}={text}: expected {kind}.") from error
