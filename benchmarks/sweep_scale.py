"""What a sweep of many cells costs beside the cells, and how many workers it keeps busy.

    python benchmarks/sweep_scale.py SWEEP [--cells 1000] [--workers 1 8 64 256] [--dask] [--json FILE]

SWEEP is a folder that `ovcalib sweep` wrote: its sets and cells took the seconds that this replays. The sweep that is
replayed has the same sources under as many models as make the number of cells. ovcalib's own coordinator runs it, with
its state, its tables and its files, on workers of a virtual clock: a set or a cell takes a measured time, drawn at
random from those of its source, and what the coordinator does meanwhile takes the time that it really takes here. A
straggler takes several times as long, and a lost worker's task begins again after half its time.

Columns: `makespan` until the last cell is done; `bound` is the work over the workers, or the longest chain of a set and
a cell where that is more; `kept busy` is the share of the workers' time in which they work; `coordinator` is its own
seconds in all, then those for one task of the last twentieth; `page` is what the end takes. `--dask` also sends empty
tasks through a real scheduler of dask with two workers, for the seconds that it takes for each.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import command

from ovcalib.progress import Progress
from ovcalib.records.read import read_record
from ovcalib.records.result import Result
from ovcalib.records.sweep import make_sweep_recipe
from ovcalib.sweeps import run
from ovcalib.sweeps.plan import plan
from ovcalib.sweeps.run import _Run, write_tables
from ovcalib.sweeps.state import read_results, read_sweep
from ovcalib.sweeps.tables import write_page


@dataclass
class Measured:
    """The seconds of a source's sets and cells, and the folders of one of each."""

    sets: list[float] = field(default_factory=list)
    cells: list[float] = field(default_factory=list)
    folder: Path = Path()
    set_folder: Path = Path()


def measured(folder: Path) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for cell in read_sweep(folder).cells:
        if cell.seconds is None or cell.state != "done":
            continue
        source = found.setdefault(cell.source, Measured())
        source.folder, source.set_folder = folder / "cells" / cell.key, folder / "sets" / cell.set_key
        record = read_record(source.folder / "result.json")
        assert isinstance(record, Result)
        source.sets.append(record.calibration.seconds)
        source.cells.append(cell.seconds)
    assert found, f"{folder} holds no cells that were timed; give a sweep that ran in one go"
    return found


class VirtualEngine:
    """Workers on a clock that runs with the coordinator's own time, and jumps to the end of the next task."""

    def __init__(self, workers: int, costs: dict[str, Measured], sources: dict[str, str], args: argparse.Namespace):
        self.workers, self.costs, self.sources, self.args = workers, costs, sources, args
        self.rng = random.Random(args.seed)
        self.clock, self.seen = 0.0, time.perf_counter()
        self.coordinator: list[float] = []  # its seconds between the ends of two tasks
        self.ends: list[tuple[float, int, Future[dict[str, Any]], dict[str, Any], Measured, float]] = []
        self.worked, self.started, self.lost, self.slow = 0.0, 0, 0, 0

    def slots(self) -> int:
        return self.workers

    def submit(self, task: dict[str, Any]) -> Future[dict[str, Any]]:
        source = self.costs[self.sources[task["target"].rpartition("/")[2]]]
        seconds = self.rng.choice(source.sets if task["kind"] == "set" else source.cells)
        if self.rng.random() < self.args.stragglers:
            seconds, self.slow = seconds * self.args.slowdown, self.slow + 1
        if self.rng.random() < self.args.losses:
            seconds, self.lost = seconds * 1.5, self.lost + 1
        self.started += 1
        self.worked += seconds
        future: Future[dict[str, Any]] = Future()
        heapq.heappush(self.ends, (self.now() + seconds, self.started, future, task, source, seconds))
        return future

    def now(self) -> float:
        return self.clock + time.perf_counter() - self.seen

    def wait(self, running: Collection[Future[dict[str, Any]]]) -> Collection[Future[dict[str, Any]]]:
        own = time.perf_counter() - self.seen
        self.coordinator.append(own)
        end, _, future, task, source, seconds = heapq.heappop(self.ends)
        write(task, source)
        future.set_result({"seconds": round(seconds, 3), "error": None, "exit_code": 1})
        self.clock, self.seen = max(self.clock + own, end), time.perf_counter()
        return [future]


def write(task: dict[str, Any], source: Measured) -> None:
    """What the coordinator reads of a task: the folder of a set, the result of a cell."""
    target = Path(task["target"])
    target.mkdir(parents=True)
    if task["kind"] == "cell":
        shutil.copy(source.folder / "result.json", target)


def larger(folder: Path, cells: int) -> dict[str, Any]:
    """The recipe of a sweep with as many cells, with models that nobody loads."""
    recipe = read_sweep(folder).recipe
    each = len(recipe.sources) * len(recipe.modes) * len(recipe.seeds)
    models = [{"model": recipe.models[0].model, "name": f"model {i}", "mean": [0.5 + i * 1e-6] * 3}
              for i in range(-(-cells // each))]  # fmt: skip
    return recipe.model_dump(exclude={"models"}) | {"models": models, "benchmark_time": 0.0, "devices": None}


def simulate(
    workers: int, recipe: dict[str, Any], costs: dict[str, Measured], args: argparse.Namespace
) -> dict[str, Any]:
    asked = make_sweep_recipe(recipe)
    began = time.perf_counter()
    cells = plan(asked)
    planning = time.perf_counter() - began
    sources = {cell.key: cell.source for cell in cells} | {cell.set_key: cell.source for cell in cells}
    chain = max(max(cost.sets) + max(cost.cells) for cost in costs.values())
    with tempfile.TemporaryDirectory() as root:
        engine = VirtualEngine(workers, costs, sources, args)
        folder = Path(root)
        sweep = _Run(asked, folder, cells, engine, Progress()).run()
        makespan = engine.now()
        began = time.perf_counter()
        results = read_results(folder, sweep)
        write_tables(folder, sweep, results)
        write_page(folder, sweep, results, {})
        closing = time.perf_counter() - began
        page = (folder / "report.html").stat().st_size
        written = sum(path.stat().st_size for path in folder.rglob("result.json"))
    assert not sweep.failed
    own = engine.coordinator
    last = own[-max(1, len(own) // 20) :]
    return {
        "workers": workers, "cells": len(cells), "tasks": engine.started, "makespan_s": makespan,
        "bound_s": max(engine.worked / workers, chain), "busy": engine.worked / workers / makespan,
        "coordinator_s": sum(own), "coordinator_last_s": statistics.fmean(last), "planning_s": planning,
        "closing_s": closing, "page_bytes": page, "results_bytes": written,
        "stragglers": engine.slow, "lost": engine.lost,
    }  # fmt: skip


def moved(costs: dict[str, Measured]) -> dict[str, float]:
    """Bytes on the shared disk for one set and one cell, means over the sources."""
    return {
        "set_bytes": statistics.fmean(size(c.set_folder) for c in costs.values()),
        "cell_bytes": statistics.fmean(size(c.folder) for c in costs.values()),
        "images_in_cell_bytes": statistics.fmean((c.folder / "calibration.npz").stat().st_size for c in costs.values()),
    }


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dask_seconds(tasks: int = 300) -> float:
    """Seconds of a real scheduler for an empty task of two workers."""
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        pool = client.get_executor(pure=False)
        list(pool.map(abs, range(50)))
        began = time.perf_counter()
        list(pool.map(abs, range(tasks)))
        return (time.perf_counter() - began) / tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--cells", type=command.positive, default=1000)
    parser.add_argument("--workers", type=command.positive, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--stragglers", type=float, default=0.02, help="share of the tasks that are slow")
    parser.add_argument("--slowdown", type=float, default=5.0)
    parser.add_argument("--losses", type=float, default=0.01, help="share of the tasks whose worker is lost once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note-every", type=float, default=run.NOTE_EVERY, help="0: state and tables after every cell")
    parser.add_argument("--dask", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    run.NOTE_EVERY = args.note_every
    costs = measured(args.sweep)
    recipe = larger(args.sweep, args.cells)
    rows = [simulate(workers, recipe, costs, args) for workers in args.workers]
    print("| workers | makespan, s | bound, s | kept busy | coordinator, s | a task at the end, ms | page, s |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['workers']} | {row['makespan_s']:.0f} | {row['bound_s']:.0f} | {100 * row['busy']:.1f} % | "
            f"{row['coordinator_s']:.1f} | {1000 * row['coordinator_last_s']:.1f} | {row['closing_s']:.1f} |"
        )
    found = {"rows": rows, "moved": moved(costs), "stragglers": args.stragglers, "slowdown": args.slowdown,
             "losses": args.losses, "seed": args.seed, "note_every": args.note_every}  # fmt: skip
    if args.dask:
        found["dask_task_s"] = dask_seconds()
        print(f"\na task of dask's scheduler: {1000 * found['dask_task_s']:.1f} ms")
    print({name: round(value / 1e6, 3) for name, value in found["moved"].items()}, "MB")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main)
