"""Values that shells complete: https://click.palletsprojects.com/shell-completion."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
# Where a context keeps the words of its command: click drops arguments by position where an option is incomplete.
WORDS = "ovcalib.words"
DATA = ("imagefolder:", "cifar10", "datumaro:", "npz:")


def choices(values: Iterable[str]) -> Completer:
    """Completes one of some values."""
    known = tuple(values)
    return lambda context, parameter, incomplete: items(known, incomplete)


def items(values: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(value) for value in values if value.startswith(incomplete)]


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lets the shell complete a path."""
    return [CompletionItem(incomplete, type="file")]


def models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The built-in models and the kinds of references; else paths."""
    from ovcalib.models import builtin

    kinds = ("torchvision:", "timm:", "hub:")
    return items((*builtin.NAMES, *kinds), incomplete) or files(context, parameter, incomplete)


def calibration_sources(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The sources, with a colon where more has to follow."""
    from ovcalib.calibration import SOURCES

    names = [f"{name}:" if "argument" in SOURCES[name].NEEDS else name for name in SOURCES]
    return items(names, incomplete)


def source_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The sources by their bare names, as `ovcalib sources` takes them."""
    from ovcalib.calibration import SOURCES

    return items(SOURCES, incomplete)


def source_options(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """KEY=VALUE for the source that the line names: the choices of an option, or its default."""
    from ovcalib.calibration import SOURCES

    named = [word.partition(":")[0] for word in context.meta.get(WORDS, ())]
    name = next((word for word in named if word in SOURCES.table), "bn-inversion")
    kind = SOURCES[name].Options
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        default = "none" if field.default is None else field.default
        values = literals(hints[field.name]) or [str(default).lower() if hints[field.name] is bool else str(default)]
        found += [f"{field.name}={value}" for value in values]
    return items(found, incomplete)


def literals(annotation: Any) -> list[str]:
    """The choices of a type, in their order; none of a type that is open."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [value for argument in typing.get_args(annotation) for value in literals(argument)]


# Of fields whose type does not say what they take.
OF_FIELDS: dict[str, Completer] = {
    "reference": models,
    "calib": calibration_sources,
    "options": source_options,
    **dict.fromkeys(("eval", "data", "validate_on"), choices(DATA)),
    "weights": lambda context, parameter, incomplete: (
        items(("shipped", "published", "random"), incomplete) or files(context, parameter, incomplete)
    ),
}


def completer(name: str, annotation: Any) -> Completer | None:
    """What completes the values of a field; None for numbers and free text."""
    known = literals(annotation)
    return OF_FIELDS.get(name) or (choices(known) if known else None)
