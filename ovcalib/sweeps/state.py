"""Reading the state and the results of a sweep."""

from __future__ import annotations

from pathlib import Path

from ovcalib.errors import UsageError
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.read import read_record
from ovcalib.records.result import Result
from ovcalib.records.sweep import Sweep

STATE = "sweep.json"


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
