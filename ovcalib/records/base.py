"""Base of all records and groups of options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ovcalib.errors import InvalidOptionError, UnknownNameError, UsageError, excerpt

T = TypeVar("T", bound=BaseModel)

# What numpy, torch and a JSON reader in any language take.
MAX_WHOLE = 2**63 - 1
MAX_CHANNELS = 4096
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
Pixels = Annotated[int, Field(ge=1, le=16384)]
# (C, H, W) of one image.
ImageShape = tuple[Channels, Pixels, Pixels]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A measured number; None where it is not finite, which JSON cannot say.
Measured = Annotated[float | None, BeforeValidator(_finite)]


class Frozen(BaseModel):
    """An immutable, comparable value; unknown fields are refused, and numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Shown:
    """How the command line shows a field, beyond its name, type and default.

    flags     names of the option; () is --field-name. A name in capitals is that of an argument by position
    metavar   what stands for the value in the help
    default   the default in words
    repeat    the option is given once for each of the field's values
    """

    flags: tuple[str, ...] = ()
    metavar: str | None = None
    default: str | None = None
    repeat: bool = False


def shown(kind: type[BaseModel], name: str) -> Shown:
    """The `Shown` of a field, from its annotation; else an empty one."""
    return next((entry for entry in kind.model_fields[name].metadata if isinstance(entry, Shown)), Shown())


def flags_of(kind: type[BaseModel], name: str) -> tuple[str, ...]:
    """The flags of a field on the command line."""
    return shown(kind, name).flags or (f"--{name.replace('_', '-')}",)


def checked(kind: type[T], values: Mapping[str, Any], origin: str = "", grouped: bool = False) -> T:
    """A model of values that a user gave.

    origin    begins the message of an error: the file that the values come from
    grouped   fields lie in groups that a message leaves out
    raises   InvalidOptionError with the field, its value and what was expected; UnknownNameError for an unknown field
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(kind, error, origin, grouped) from error


def invalid(kind: type[BaseModel], error: ValidationError, origin: str, grouped: bool) -> UsageError:
    """The first error of pydantic, as one of ours."""
    first = error.errors()[0]
    place = first["loc"]
    owner, own = kind, True  # the model that the place lies in, and whether the place is a model itself
    for part in place:
        if isinstance(part, str):
            field = owner.model_fields.get(part)
            nested = model_of(field.annotation) if field is not None else None
            owner, own = nested or owner, nested is not None and nested is field.annotation  # type: ignore[union-attr]
        else:
            own = nested is not None
    named = excerpt(path(place[1:] if grouped and len(place) > 1 else place))
    reason = excerpt(first["msg"]).removeprefix("Value error, ").removesuffix(".")
    if first["type"] == "extra_forbidden":
        return UnknownNameError("field", named, owner.model_fields, origin)
    if first["type"] == "missing":
        return UsageError(f"{origin}`{named}` is missing.")
    if own:  # fields that do not go together: the message names them
        return UsageError(f"{origin}{reason}.")
    return InvalidOptionError(named, first["input"], reason[:1].lower() + reason[1:], origin)


def path(place: tuple[int | str, ...]) -> str:
    """A place in nested values, as in models[0].name."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone, optional or in a tuple; None for any other field."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
