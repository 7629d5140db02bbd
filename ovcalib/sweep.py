"""`ovcalib sweep`: every model with every calibration source, mode and seed, each cell one run of `quantize`.

    DIR/
      request.json    the recipe                     sweep.json    state of every cell, with the error of a failed one
      sets/<key>/     a calibration set, shared      cells/<key>/  a result, as `ovcalib quantize` writes it
      report.md, report.csv   means and spread over seeds, written anew after every cell
      report.html             the comparison page, written at the end

Sets and cells appear whole or not at all, and their keys come from all that they depend on. A sweep that is started
again therefore goes on where it was, whatever ended it; only cells that failed or were not reached are run.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ovcalib import __version__
from ovcalib.calibration import SOURCES
from ovcalib.errors import OvcalibError, UnknownNameError, UsageError
from ovcalib.models.weights import file_sha256
from ovcalib.progress import Progress
from ovcalib.report.pages import write_comparison
from ovcalib.report.records import read_record
from ovcalib.rundir import REQUEST, write_atomically, write_json
from ovcalib.sweep_engines import Engine, open_engine
from ovcalib.sweep_tables import csv_report, markdown_report
from ovcalib.types import STEERING_FIELDS, Benchmark, Frozen, Recipe, Result

STATE = "sweep.json"
LOCK = ".lock"
# How often a cluster is asked whether it has grown.
POLL_S = 5.0
KEY_DIGITS = 16

# The recipe -----------------------------------------------------------------------------------


class SweepModel(Frozen):
    """A model of a sweep: the fields of Recipe that describe one, or its reference alone.

    name      how tables call it; None: the reference
    command   makes the weights file; shown where that is missing
    """

    model: str
    name: str | None = None
    weights: str | None = None
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    short_side: int | None = Field(default=None, ge=0)
    trust_remote_code: bool = False
    command: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        return self.name or self.model


class SweepSource(Frozen):
    """A calibration source of a sweep, or its reference alone.

    name          how tables call it; None: the reference with its options and count
    num_samples   images; None: what the source suggests
    """

    calib: str
    name: str | None = None
    options: dict[str, str] = Field(default={})
    num_samples: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"calib": value} if isinstance(value, str) else value

    @field_validator("options", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("calib")
    @classmethod
    def _known(cls, value: str) -> str:
        name = value.partition(":")[0]
        if name not in set(SOURCES):
            raise ValueError(str(UnknownNameError("calibration source", name, SOURCES)))
        return value

    @property
    def label(self) -> str:
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        return self.name or f"{self.calib}{options}{f' x {self.num_samples}' if self.num_samples else ''}"


# Fields of Recipe that a sweep sets itself; all others may stand under `common`.
OWN_FIELDS = (set(SweepModel.model_fields) | set(SweepSource.model_fields)) & set(Recipe.model_fields) | {
    "mode", "seed", "eval", "limit", "device", "benchmark_time"
}  # fmt: skip


class SweepRecipe(Frozen):
    """A matrix of runs.

    models, sources, modes, seeds   every combination is a cell
    eval, limit                     images on which every cell is proven, as in Recipe
    common                          other fields of Recipe, the same for every cell
    benchmark_time                  seconds of latency measurement of each model, one cell after the other when all are
                                    done; 0 leaves it out
    devices                         on which that is measured; None: CPU
    """

    models: tuple[SweepModel, ...] = Field(min_length=1)
    sources: tuple[SweepSource, ...] = Field(min_length=1)
    modes: tuple[Literal["default", "accuracy-aware"], ...] = Field(default=("default",), min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    eval: str | None = None
    limit: int | None = Field(default=None, ge=1)
    common: dict[str, Any] = Field(default={})
    devices: tuple[str, ...] | None = Field(default=None, min_length=1)
    benchmark_time: float = Field(default=0.0, ge=0)

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

    @field_validator("common")
    @classmethod
    def _fields_of_recipe(cls, value: dict[str, Any]) -> dict[str, Any]:
        for field in value:
            if field in OWN_FIELDS:
                raise ValueError(f"{field!r} is no common field: a sweep sets it by cell")
        try:
            Recipe.model_validate({"model": "any", **value})
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        return value

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
    try:
        return SweepRecipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "extra_forbidden":
            kinds: dict[Any, type[BaseModel]] = {"models": SweepModel, "sources": SweepSource}
            kind = kinds.get(first["loc"][0], SweepRecipe)
            raise UsageError(
                f"{origin} has an unknown field {place!r}. Expected: {', '.join(kind.model_fields)}."
            ) from error
        reason = first["msg"].removeprefix("Value error, ").removesuffix(".")
        value = "" if first["type"] == "missing" or not place else f" is {first['input']!r}"
        raise UsageError(f"{origin}: {place or 'fields'}{value}: {reason}.") from error


# The plan -------------------------------------------------------------------------------------

# What a calibration set depends on; the same set serves every mode.
SET_FIELDS = (
    "model", "weights", "input_shape", "mean", "std", "short_side", "trust_remote_code", "calib", "num_samples", "seed",
    "options", "download",
)  # fmt: skip

# What does not change the INT8 model of the default algorithm: cells of it stay where only these differ.
NOT_OF_DEFAULT = {*STEERING_FIELDS, "max_drop"}


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
    """The cells of a sweep, models outermost; their keys hold the content of the files that the recipe names."""
    contents: dict[str, str | None] = {}

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
        recipe = Recipe.model_validate(
            {
                **sweep.common, **model.model_dump(exclude={"name", "command"}), **source.model_dump(exclude={"name"}),
                "mode": mode, "seed": seed, "eval": sweep.eval, "limit": sweep.limit, "benchmark_time": 0,
            }
        )  # fmt: skip
        fields = recipe.model_dump(mode="json", exclude=NOT_OF_DEFAULT if mode == "default" else None)
        key, set_key = key_of(fields), key_of({name: fields[name] for name in SET_FIELDS})
        cells.append(Cell(model.label, source.label, mode, seed, recipe, key, set_key, model.command))
    return cells


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


# The state ------------------------------------------------------------------------------------


class SweepCell(Frozen):
    """One cell as `sweep.json` has it.

    state     pending: not reached yet
    error     of a failed cell
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


def read_sweep(folder: Path) -> Sweep:
    """The state of the sweep in a folder. Raises UsageError where there is none."""
    try:
        return Sweep.model_validate_json((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{str(folder)!r} holds no sweep that this ovcalib reads. Expected a folder that `ovcalib sweep` wrote."
        ) from error


def read_results(folder: Path, sweep: Sweep) -> dict[str, Result]:
    """The results of the finished cells, by key."""
    found = {}
    for cell in sweep.cells:
        if cell.state == "done":
            record = read_record(folder / "cells" / cell.key / "result.json")
            assert isinstance(record, Result)
            found[cell.key] = record
    return found


def read_benchmarks(folder: Path, sweep: Sweep) -> dict[str, Benchmark]:
    """The latency measurements of the cells that have one, by key."""
    found = {}
    for cell in sweep.cells:
        path = folder / "cells" / cell.key / "benchmark.json"
        if cell.state == "done" and path.is_file():
            record = read_record(path)
            assert isinstance(record, Benchmark)
            found[cell.key] = record
    return found


# The run --------------------------------------------------------------------------------------


def run_sweep(
    recipe: SweepRecipe,
    folder: Path,
    *,
    jobs: int | None = None,
    engine: str = "local",
    resume: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Run the cells that are not done yet, and write the tables.

    folder    of a new sweep, or of this same one, which then goes on
    jobs      cells at once, for the engine "local"; None is 1
    engine    "local", or "dask:ADDRESS" with workers that see the same folders
    resume    go on even in the folder of another recipe; cells that both have are kept
    raises    UsageError, DeviceError; the error of a cell is in the returned state instead
    """
    progress = progress or Progress()
    folder = folder.absolute()
    cells = plan(recipe)
    with _own(folder, recipe, resume):
        with open_engine(engine, jobs) as opened:
            sweep = _Run(recipe, folder, cells, opened, progress).run()
        if recipe.timed_devices:
            _measure(recipe, folder, sweep, progress)
        results = read_results(folder, sweep)
        write_tables(folder, sweep, results)
        if results:
            write_comparison(list(results.values()), folder, ("html",), latency=False)
    return sweep


class _Run:
    """The loop over tasks: a calibration set, then the cells that it is for."""

    def __init__(
        self, recipe: SweepRecipe, folder: Path, cells: Sequence[Cell], engine: Engine, progress: Progress
    ) -> None:
        self.recipe, self.folder, self.engine, self.progress = recipe, folder, engine, progress
        self.created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.cells = {cell.key: cell for cell in cells}
        self.states = {
            cell.key: SweepCell(
                model=cell.model, source=cell.source, mode=cell.mode, seed=cell.seed, key=cell.key,
                set_key=cell.set_key, state="done" if self.result(cell).is_file() else "pending",
            )
            for cell in cells
        }  # fmt: skip
        self.results = read_results(folder, self.state())

    def result(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.key / "result.json"

    def set_folder(self, set_key: str) -> Path:
        return self.folder / "sets" / set_key

    def state(self) -> Sweep:
        return Sweep(
            created=self.created, ovcalib=__version__, recipe=self.recipe, cells=tuple(self.states.values())
        )  # fmt: skip

    def run(self) -> Sweep:
        self.note()
        waiting: dict[str, list[Cell]] = {}  # cells by the calibration set that they need
        for cell in self.cells.values():
            if self.states[cell.key].state == "pending":
                waiting.setdefault(cell.set_key, []).append(cell)
        left = sum(map(len, waiting.values()))
        if left < len(self.cells):
            self.progress.say(f"{len(self.cells) - left} of {len(self.cells)} cells are done already")
        ready: deque[Cell | str] = deque(waiting)  # a set by its key
        running: dict[Future[dict[str, Any]], Cell | str] = {}
        total, done = len(waiting) + left, 0
        with self.progress.task("sweep: sets and cells", total) as tick:
            while ready or running:
                while ready and len(running) < self.engine.slots():
                    work = ready.popleft()
                    task = self.cell_task(work) if isinstance(work, Cell) else self.set_task(waiting[work][0])
                    running[self.engine.submit(task)] = work
                finished, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                self.engine.check()  # what a lost cluster cancelled has not failed
                for future in finished:
                    work = running.pop(future)
                    answer = answer_of(future)
                    done += 1
                    if isinstance(work, Cell):
                        self.finish(work, answer)
                    elif answer["error"] is None and self.set_folder(work).is_dir():
                        ready.extendleft(reversed(waiting[work]))  # results come before further sets
                    else:
                        for cell in waiting[work]:
                            done += 1
                            self.finish(cell, {**answer, "seconds": None})
                    tick(done)
        return self.state()

    def set_task(self, cell: Cell) -> dict[str, Any]:
        """The task that makes the calibration set of a cell."""
        recipe = cell.recipe.model_dump(mode="json", include=set(SET_FIELDS))
        return {"kind": "set", "recipe": recipe, "target": str(self.set_folder(cell.set_key)), "command": cell.command,
                "folder": str(Path.cwd())}  # fmt: skip

    def cell_task(self, cell: Cell) -> dict[str, Any]:
        return {"kind": "cell", "recipe": cell.recipe.model_dump(mode="json"), "target": str(self.result(cell).parent),
                "set": str(self.set_folder(cell.set_key)), "command": cell.command,
                "folder": str(Path.cwd())}  # fmt: skip

    def finish(self, cell: Cell, answer: dict[str, Any]) -> None:
        """Note how a cell ended, and say so."""
        error = answer["error"]
        if error is None and not self.result(cell).is_file():
            error = f"The worker wrote where this machine does not look: {str(self.folder)!r} must be on a shared disk."
        done = self.states[cell.key].model_copy(
            update={"state": "failed" if error else "done", "error": error, "seconds": answer["seconds"]}
        )
        self.states[cell.key] = done
        count = sum(state.state != "pending" for state in self.states.values())
        if error:
            outcome = f"failed: {error}"
        else:
            record = read_record(self.result(cell))
            assert isinstance(record, Result)
            self.results[cell.key] = record
            outcome = outcome_line(record)
        self.progress.say(f"{count}/{len(self.states)} {cell}: {outcome}")
        self.note()

    def note(self) -> None:
        write_json(self.folder / STATE, self.state().model_dump(mode="json"))
        write_tables(self.folder, self.state(), self.results)


def answer_of(future: Future[dict[str, Any]]) -> dict[str, Any]:
    """What a task answered, or how it was lost."""
    try:
        return future.result()
    except OvcalibError as error:
        return {"seconds": None, "error": str(error)}
    except (Exception, CancelledError) as error:  # clusters have errors of their own
        return {"seconds": None, "error": f"The task was lost: {type(error).__name__}: {error}"}


def outcome_line(result: Result) -> str:
    """One finished cell in a few words."""
    accuracy, agreement = result.accuracy, result.agreement
    words = [f"drop {accuracy.drop_points:+.2f} points"] if accuracy else []
    if agreement.top1 is not None:
        words.append(f"agreement {100 * agreement.top1:.2f} %")
    if agreement.nmse is not None:
        words.append(f"NMSE {agreement.nmse:.3g}")
    return ", ".join([*words, *([result.outcome] if result.outcome != "done" else [])])


def write_tables(folder: Path, sweep: Sweep, results: Mapping[str, Result]) -> None:
    """report.md and report.csv, with the latencies that there are."""
    benchmarks = read_benchmarks(folder, sweep)
    for name, text in (
        ("report.md", markdown_report(sweep, results, benchmarks)),
        ("report.csv", csv_report(sweep, results, benchmarks)),
    ):
        write_atomically(folder / name, lambda partial, text=text: partial.write_text(text))  # type: ignore[misc]


def _measure(recipe: SweepRecipe, folder: Path, sweep: Sweep, progress: Progress) -> None:
    """Write benchmark.json into every finished cell that has none, one after the other, while nothing else runs."""
    from ovcalib.benchmark import all_settings, benchmark

    settings = all_settings(recipe.timed_devices, ("latency",), ("default",))
    cells = [folder / "cells" / cell.key for cell in sweep.cells if cell.state == "done"]
    left = [cell for cell in cells if not (cell / "benchmark.json").is_file()]
    with progress.task("sweep: latency", len(left)) as tick:
        for i, cell in enumerate(left):
            found = benchmark([cell], settings, recipe.benchmark_time)
            write_json(cell / "benchmark.json", found.model_dump(mode="json"))
            tick(i + 1)


@contextlib.contextmanager
def _own(folder: Path, recipe: SweepRecipe, resume: bool) -> Iterator[None]:
    """Make a folder this sweep's own, and no other's for as long as it runs.

    raises   UsageError where it holds something else, the sweep of another recipe, or a sweep that is at work
    """
    request = recipe.model_dump(mode="json")
    new = not folder.exists()
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        try:
            earlier = SweepRecipe.model_validate_json((folder / REQUEST).read_text())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The output folder {str(folder)!r} is not empty and holds no sweep. Choose another with -o."
            ) from error
        if earlier.model_dump(mode="json") != request and not resume:
            raise UsageError(
                f"The output folder {str(folder)!r} holds the sweep of another recipe. Pass --resume to go on in it, "
                "keeping the cells that both have, or choose another with -o."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UsageError(f"The folder {str(folder)!r} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: nothing keeps two sweeps out of one folder
            pass
        except OSError as error:
            raise UsageError(
                f"Another sweep is at work in {str(folder)!r}. Wait for it, or choose another -o."
            ) from error
        write_json(folder / REQUEST, request)
        _clear(folder)
        try:
            yield
        except BaseException:
            if new and not any((folder / name).exists() for name in ("sets", "cells")):
                shutil.rmtree(folder, ignore_errors=True)  # an engine that was not there, for example
            raise
        finally:
            _clear(folder)


def _clear(folder: Path) -> None:
    """Remove what workers that were killed had begun; nobody else writes here."""
    for partial in folder.glob("*/.*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
