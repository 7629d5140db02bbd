"""`ovcalib sweep`: every model with every calibration source, mode and seed, each cell one run of `quantize`.

    DIR/
      request.json    the recipe                     sweep.json    state of every cell, with the error of a failed one
      sets/<key>/     a calibration set, shared      cells/<key>/  a result, as `ovcalib quantize` writes it
      report.md, report.csv   means and spread over seeds, written anew as cells are done
      report.html             the comparison page, written at the end

Sets and cells are written completely or not at all, and their keys are hashes of all that they depend on. A sweep that
is started again therefore continues, however it ended: only cells that failed or were not reached are run.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

from ovcalib import __version__
from ovcalib.errors import OvcalibError, UsageError
from ovcalib.progress import Progress
from ovcalib.records.options import BenchmarkOptions
from ovcalib.records.read import read_record
from ovcalib.records.result import Result
from ovcalib.records.sweep import Sweep, SweepCell, SweepRecipe
from ovcalib.rundir import REQUEST, write_atomically, write_json
from ovcalib.sweeps.engines import Engine, open_engine
from ovcalib.sweeps.plan import SET_FIELDS, Cell, plan
from ovcalib.sweeps.state import STATE, read_benchmarks, read_results
from ovcalib.sweeps.store import SetStore
from ovcalib.sweeps.tables import csv_report, markdown_report, write_page

LOCK = ".lock"
# The state and the tables are written again after this many times as long as that took, so that large sweeps spend
# little time on it. Results lie in folders of their own: a sweep that is killed in between loses nothing.
NOTE_EVERY = 20.0


def run_sweep(
    recipe: SweepRecipe,
    folder: Path,
    *,
    jobs: int | None = None,
    engine: str = "local",
    store: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Run the cells that are not done yet, and write the tables.

    folder    of a new sweep, or of the same sweep, which is continued
    jobs      cells at once, for the engine "local"; None is 1
    engine    "local", or "dask:ADDRESS" with workers that see the same folders
    store     folder or address in which calibration sets are looked for, and put for other sweeps
    resume    continue even in the folder of another recipe; cells that both have are kept
    raises    UsageError, DeviceError; the error of a cell is in the returned state instead
    """
    progress = progress or Progress()
    folder = folder.absolute()
    cells = plan(recipe)
    address = None if store is None else SetStore(store).prepare()
    with _own(folder, recipe, resume):
        with open_engine(engine, jobs) as opened:
            sweep = _Run(recipe, folder, cells, opened, progress, address).run()
        if recipe.timed_devices:
            _measure(recipe, folder, sweep, progress)
        results = read_results(folder, sweep)
        write_tables(folder, sweep, results)
        if results:
            write_page(folder, sweep, results, read_benchmarks(folder, sweep))
    return sweep


SHORTER = "fewer cells, `limit`, or more `jobs`; stop at any time, what is done is kept."


class _Run:
    """The loop over tasks: a calibration set, then the cells that it is for."""

    def __init__(
        self,
        recipe: SweepRecipe,
        folder: Path,
        cells: Sequence[Cell],
        engine: Engine,
        progress: Progress,
        store: str | None = None,
    ) -> None:
        self.recipe, self.folder, self.engine, self.progress, self.store = recipe, folder, engine, progress, store
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
        self.noted, self.note_took = -math.inf, 0.0

    def result(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.key / "result.json"

    def set_folder(self, set_key: str) -> Path:
        return self.folder / "sets" / set_key

    def state(self) -> Sweep:
        return Sweep(
            created=self.created, ovcalib=__version__, recipe=self.recipe, cells=tuple(self.states.values())
        )  # fmt: skip

    def run(self) -> Sweep:
        try:
            return self.work()
        finally:
            self.note()

    def work(self) -> Sweep:
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
        with self.progress.task("sweep: sets and cells", total, SHORTER) as tick:
            while ready or running:
                while ready and len(running) < self.engine.slots():
                    work = ready.popleft()
                    task = self.cell_task(work) if isinstance(work, Cell) else self.set_task(waiting[work][0])
                    running[self.engine.submit(task)] = work
                for future in self.engine.wait(running):
                    work = running.pop(future)
                    answer = answer_of(future)
                    if answer.get("note"):
                        self.progress.say(answer["note"])
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
        recipe = {name: value for name, value in cell.recipe.flat().items() if name in SET_FIELDS}
        return {"kind": "set", "recipe": recipe, "target": str(self.set_folder(cell.set_key)), "command": cell.command,
                "folder": str(Path.cwd()), "store": self.store}  # fmt: skip

    def cell_task(self, cell: Cell) -> dict[str, Any]:
        return {"kind": "cell", "recipe": cell.recipe.flat(), "target": str(self.result(cell).parent),
                "set": str(self.set_folder(cell.set_key)), "command": cell.command,
                "folder": str(Path.cwd())}  # fmt: skip

    def finish(self, cell: Cell, answer: dict[str, Any]) -> None:
        """Note how a cell ended, and say so."""
        error = answer["error"]
        if error is None and not self.result(cell).is_file():
            error = f"The worker wrote where this machine does not look: {str(self.folder)!r} must be on a shared disk."
        done = self.states[cell.key].model_copy(
            update={
                "state": "failed" if error else "done",
                "error": error,
                "exit_code": answer.get("exit_code", OvcalibError.exit_code) if error else None,
                "seconds": answer["seconds"],
            }
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
        if time.monotonic() - self.noted >= NOTE_EVERY * self.note_took:
            self.note()

    def note(self) -> None:
        """Write the state and the tables, whose size grows with the sweep."""
        began = time.monotonic()
        write_json(self.folder / STATE, self.state().model_dump(mode="json"))
        write_tables(self.folder, self.state(), self.results)
        self.noted = time.monotonic()
        self.note_took = self.noted - began


def answer_of(future: Future[dict[str, Any]]) -> dict[str, Any]:
    """The answer of a task, or the error that ended it."""
    try:
        return future.result()
    except OvcalibError as error:
        return {"seconds": None, "error": str(error), "exit_code": error.exit_code}
    except (Exception, CancelledError) as error:  # clusters have errors of their own
        return {"seconds": None, "error": f"The task was lost: {type(error).__name__}: {error}"}


def outcome_line(result: Result) -> str:
    """The line of a finished cell."""
    accuracy, agreement = result.accuracy, result.agreement
    words = [f"drop {accuracy.drop_points:+.2f} points"] if accuracy else []
    if agreement.top1 is not None:
        words.append(f"agreement {100 * agreement.top1:.2f} %")
    if agreement.pixels is not None:
        words.append(f"pixel agreement {100 * agreement.pixels:.2f} %")
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
    from ovcalib.measurement.benchmark import benchmark

    options = BenchmarkOptions(device=recipe.timed_devices, hint=("latency",), seconds=recipe.benchmark_time)
    cells = [folder / "cells" / c.key for c in sweep.cells if c.state == "done" and c.mode != "simulated"]
    left = [cell for cell in cells if not (cell / "benchmark.json").is_file()]
    with progress.task("sweep: latency", len(left)) as tick:
        for i, cell in enumerate(left):
            found = benchmark([cell], options, Progress())
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
                f"The output folder {str(folder)!r} is not empty and holds no sweep. Choose another `output`."
            ) from error
        if earlier.model_dump(mode="json") != request and not resume:
            raise UsageError(
                f"The output folder {str(folder)!r} holds the sweep of another recipe. Pass `resume=True` to go on "
                "in it, keeping the cells that both have, or choose another `output`."
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
                f"Another sweep is at work in {str(folder)!r}. Wait for it, or choose another `output`."
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
