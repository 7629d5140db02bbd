"""The cells of a sweep, and the keys of their folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ovcalib import __version__
from ovcalib.calibration import SOURCES
from ovcalib.records.options import fields_of
from ovcalib.records.read import read_recipe
from ovcalib.records.recipe import Recipe, flat_fields, make_recipe
from ovcalib.records.sweep import SweepRecipe, make_sweep_recipe
from ovcalib.rundir import file_sha256

KEY_DIGITS = 16

# What a calibration set depends on; the same set serves every mode.
SET_FIELDS = (
    "model", "weights", "input_shape", "mean", "std", "short_side", "crop_share", "interpolation", "channel_order",
    "trust_remote_code", "calib", "num_samples", "seed", "options", "download",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    model, source   labels of the recipe
    key, set_key    names of the folders of its result and of its calibration set
    command         makes the weights file of the model
    """

    model: str
    source: str
    mode: str
    seed: int
    recipe: Recipe
    key: str
    set_key: str
    command: str | None

    def __str__(self) -> str:
        return f"{self.model}, {self.source}, {self.mode}, seed {self.seed}"


def plan(sweep: SweepRecipe) -> list[Cell]:
    """The cells of a sweep, models outermost; their keys hold the content of the files that the recipe names.

    raises   UnknownNameError for a calibration source that does not exist
    """
    contents: dict[str, str | None] = {}
    for source in sweep.sources:
        SOURCES.check(source.calib.partition(":")[0])

    def key_of(fields: dict[str, Any]) -> str:
        named = [fields.get(name) for name in ("model", "weights", "calib", "eval", "validate_on")]
        for reference in (*named, *fields["options"].values()):
            if reference is not None and reference not in contents:
                contents[reference] = content_of(reference)
        seen = {reference: contents[reference] for reference in (*named, *fields["options"].values()) if reference}
        text = json.dumps([__version__, fields, seen], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    cells = []
    for model, source, mode, seed in product(sweep.models, sweep.sources, sweep.modes, sweep.seeds):
        recipe = make_recipe(
            **fields_of(mode, flat_fields(sweep.common)), **model.model_dump(exclude={"name", "command"}),
            **source.model_dump(exclude={"name"}), mode=mode, seed=seed, eval=sweep.eval, limit=sweep.limit,
            benchmark_time=0,
        )  # fmt: skip
        # Cells stay where only what does not change their model differs.
        fields = fields_of(mode, recipe.flat())
        if mode != "accuracy-aware":
            del fields["max_drop"]
        key, set_key = key_of(fields), key_of({name: fields[name] for name in SET_FIELDS})
        cells.append(Cell(model.label, source.label, mode, seed, recipe, key, set_key, model.command))
    return cells


def read_sweep_recipe(path: Path) -> SweepRecipe:
    """The sweep recipe of a YAML file.

    raises   UsageError
    """
    return make_sweep_recipe(read_recipe(path), f"The sweep recipe {str(path)!r}")


def content_of(reference: str) -> str | None:
    """A hash of the file or folder that a reference ends in; None where it ends in neither.

    Of a file all bytes count, of a folder the names and sizes of its files.
    """
    parts = reference.split(":")
    paths = (Path(":".join(parts[i:])) for i in range(len(parts)))
    with contextlib.suppress(OSError):  # a name that no file can have
        for path in paths:
            if path.is_file():
                weights = path.with_suffix(".bin")
                beside = file_sha256(weights) if path.suffix == ".xml" and weights.is_file() else ""
                return file_sha256(path) + beside
            if str(path) != "." and path.is_dir():
                files = sorted(
                    (p.relative_to(path).as_posix(), p.stat().st_size) for p in path.rglob("*") if p.is_file()
                )
                return hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return None
