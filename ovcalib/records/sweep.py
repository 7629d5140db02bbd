"""`sweep.json`, and the recipe of a sweep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ovcalib.errors import UsageError
from ovcalib.records.base import MAX_WHOLE, Frozen, checked
from ovcalib.records.options import (
    MAX_IMAGES,
    MAX_SECONDS,
    ChannelOrder,
    Interpolation,
    Mode,
    Shape,
    TextValues,
    fields_of,
)
from ovcalib.records.recipe import STAGE_OF, flat_fields, make_recipe

# Recipes of all cells are made before the first one runs: seconds, and a page of megabytes.
MAX_CELLS = 10_000


class SweepEntry(Frozen):
    """An entry of a list in a sweep recipe: its fields, or the value of the first one alone."""

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {next(iter(cls.model_fields)): value} if isinstance(value, str) else value


class SweepModel(SweepEntry):
    """A model of a sweep: the fields of Recipe that describe one, or its reference alone.

    name      how tables call it; None: the reference
    command   makes the weights file; shown where that is missing
    """

    model: str
    name: str | None = None
    weights: str | None = None
    input_shape: Shape = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    short_side: int | None = Field(default=None, ge=0, le=16384)
    crop_share: float | None = Field(default=None, gt=0, le=1)
    interpolation: Interpolation | None = None
    channel_order: ChannelOrder | None = None
    trust_remote_code: bool = False
    command: str | None = None

    @property
    def label(self) -> str:
        return self.name or self.model


class SweepSource(SweepEntry):
    """A calibration source of a sweep, or its reference alone.

    name          how tables call it; None: the reference with its options and count
    num_samples   images; None: what the source suggests
    """

    calib: str
    name: str | None = None
    options: TextValues = Field(default={})
    num_samples: int | None = Field(default=None, ge=1, le=MAX_IMAGES)

    @property
    def label(self) -> str:
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        return self.name or f"{self.calib}{options}{f' x {self.num_samples}' if self.num_samples else ''}"


# Fields of a recipe that a sweep sets itself; all others may stand under `common`.
OWN_FIELDS = (set(SweepModel.model_fields) | set(SweepSource.model_fields)) & {"model", *STAGE_OF} | {
    "mode", "seed", "eval", "limit", "device", "benchmark_time"
}  # fmt: skip


class SweepRecipe(Frozen):
    """A matrix of runs.

    models, sources, modes, seeds   every combination is a cell
    eval, limit                     images on which every cell is proven, as in a recipe
    common                          other fields of a recipe, the same for every cell that they count for: those of the
                                    accuracy-aware algorithm do not reach cells of the default one
    benchmark_time                  seconds of latency measurement of each model but simulated ones, one cell after the
                                    other when all are done; 0 leaves it out
    devices                         on which that is measured; None: CPU
    """

    models: tuple[SweepModel, ...] = Field(min_length=1)
    sources: tuple[SweepSource, ...] = Field(min_length=1)
    modes: tuple[Mode, ...] = Field(default=("default",), min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, le=MAX_WHOLE)], ...] = Field(default=(0,), min_length=1)
    eval: str | None = None
    limit: int | None = Field(default=None, ge=1, le=MAX_WHOLE)
    common: dict[str, Any] = Field(default={})
    devices: tuple[str, ...] | None = Field(default=None, min_length=1)
    benchmark_time: float = Field(default=0.0, ge=0, le=MAX_SECONDS)

    @model_validator(mode="before")
    @classmethod
    def _images_may_stand_under_common(cls, value: Any) -> Any:
        """Lift what a recipe calls the same and a sweep has at the top, where it is not there already."""
        if not isinstance(value, dict) or not isinstance(value.get("common"), dict):
            return value
        common = flat_fields(value["common"])
        lifted = {name: common.pop(name) for name in ("eval", "limit") if name in common and name not in value}
        return {**value, **lifted, "common": common}

    @field_validator("modes", "seeds")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _refuse_twice(values, values)

    @field_validator("models", "sources")
    @classmethod
    def _named_apart(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        _refuse_twice(values, [value.label for value in values])
        labels: dict[str, str] = {}  # by what makes a cell
        for value in values:
            fields = value.model_dump_json(exclude={"name", "command"})
            if fields in labels:
                raise ValueError(f"{labels[fields]!r} and {value.label!r} are the same but for their names")
            labels[fields] = value.label
        return values

    @model_validator(mode="after")
    def _common_fields_fit(self) -> SweepRecipe:
        common = flat_fields(self.common)
        for field in common:
            if field in OWN_FIELDS:
                raise ValueError(f"'common' has the field {field!r}, which a sweep sets by cell")
        if common.get("keep_images") is False:
            raise ValueError("'common': cells share calibration sets, so a sweep cannot have `keep_images=False`")
        counting = {mode: fields_of(mode, common) for mode in self.modes}
        unused = {name: common[name] for name in common if not any(name in fields for fields in counting.values())}
        try:
            for mode, fields in counting.items():
                make_recipe(model="any", mode=mode, **fields, **unused)
        except UsageError as error:
            raise ValueError(f"'common': {error}") from error
        return self

    @model_validator(mode="after")
    def _cells_are_bounded(self) -> SweepRecipe:
        sides = [len(values) for values in (self.models, self.sources, self.modes, self.seeds)]
        if (cells := math.prod(sides)) > MAX_CELLS:
            raise ValueError(
                f"{' x '.join(map(str, sides))} models, sources, modes and seeds are {cells} cells. Expected at most "
                f"{MAX_CELLS}: make several sweeps of it"
            )
        return self

    @model_validator(mode="after")
    def _devices_are_measured(self) -> SweepRecipe:
        if self.devices is not None and self.benchmark_time == 0:
            raise ValueError(
                "'devices' says where latency is measured: set 'benchmark_time' to seconds, or leave it out"
            )
        return self

    @property
    def timed_devices(self) -> tuple[str, ...]:
        """The devices on which latency is measured."""
        return (self.devices or ("CPU",)) if self.benchmark_time > 0 else ()


def _refuse_twice(values: tuple[Any, ...], labels: Sequence[Any]) -> tuple[Any, ...]:
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice; give each its own 'name', or leave one out")
    return values


def make_sweep_recipe(content: Any, origin: str = "The sweep recipe") -> SweepRecipe:
    """A SweepRecipe from the content of a YAML file.

    raises   UsageError that names the field, the value and what was expected
    """
    return checked(SweepRecipe, content, f"{origin}: ")


class SweepCell(Frozen):
    """One cell as `sweep.json` has it.

    state     pending: not reached yet
    error     of a failed cell, with the exit code that it would have alone
    seconds   that this sweep took for it, without its calibration set; None where it was done before
    """

    model: str
    source: str
    mode: str
    seed: int
    key: str
    set_key: str
    state: Literal["done", "failed", "pending"] = "pending"
    error: str | None = None
    exit_code: int | None = None
    seconds: float | None = None


class Sweep(Frozen):
    """`sweep.json`."""

    schema_version: Literal[1] = 1
    created: str
    ovcalib: str
    recipe: SweepRecipe
    cells: tuple[SweepCell, ...]

    @property
    def failed(self) -> list[SweepCell]:
        return [cell for cell in self.cells if cell.state == "failed"]
