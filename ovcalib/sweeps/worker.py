"""Runs the tasks of a sweep: a function for a cluster, and the process behind `--jobs`.

The process takes tasks as JSON lines on stdin and answers on stdout. It stops at the end of stdin, so that it ends with
the sweep.
"""

from __future__ import annotations

import _thread
import contextlib
import filecmp
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from ovcalib.errors import OvcalibError, UsageError
from ovcalib.progress import Progress
from ovcalib.records.recipe import make_recipe

# Seconds after the end of stdin at which the process ends itself, even inside a library.
GRACE_S = 10.0
# NNCF's settings belong to the process, so a worker with many threads still runs one task at a time.
_one_task = threading.Lock()


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Make a calibration set or quantize one cell, into a folder that appears whole.

    task      kind ("set" or "cell"), recipe, target (where the result goes), set (folder of the calibration set),
              folder (to which the recipe's references are relative), command (makes missing weights), store (of
              sets; None for none)
    returns   seconds, error (None or the message), its exit code, and note (None, or what the user should know); a task
              that is done already takes no time
    """
    began = time.monotonic()
    error, note, code = None, None, OvcalibError.exit_code
    with _one_task:
        before = Path.cwd()
        try:
            os.chdir(task["folder"])
            if not Path(task["target"]).is_dir():
                note = {"set": _make_set, "cell": _run_cell}[task["kind"]](task)
        except OvcalibError as found:
            error, code = f"{found}{_remedy(task)}", found.exit_code
        except OSError as found:
            error = f"{type(found).__name__}: {found}"
        except Exception as found:  # one cell's bug must not stop the others
            where = traceback.extract_tb(found.__traceback__)[-1]
            error = f"{type(found).__name__}: {found} ({Path(where.filename).name}:{where.lineno})"
        finally:
            os.chdir(before)
    return {"seconds": round(time.monotonic() - began, 3), "error": error, "exit_code": code, "note": note}


def _make_set(task: dict[str, Any]) -> str | None:
    from ovcalib.calibration.make import make_set, resolve_calibration
    from ovcalib.models.load import load_model, with_statistics
    from ovcalib.rundir import RunDir
    from ovcalib.sweeps.store import SetStore

    target = Path(task["target"])
    store = SetStore(task["store"]) if task.get("store") else None
    if store is not None and store.fetch(target.name, target):
        return f"set {target.name} comes from {store.reference}"
    recipe, progress = make_recipe(**task["recipe"]), Progress()
    with RunDir(target, False, recipe.model_dump(mode="json")) as work:
        model = with_statistics(load_model(recipe.model))
        options, _ = resolve_calibration(recipe.calibration, model, progress)
        download = recipe.evaluation.download
        make_set(options, model, progress, download=download, resume=work.resume).save(work.path)
        work.finish()
    try:
        if store is not None:
            store.publish(target.name, target)
    except UsageError as error:  # the cells have their set
        return f"set {target.name} is not shared: {error}"
    return None


def _run_cell(task: dict[str, Any]) -> None:
    from ovcalib.calibration.sets import read_set
    from ovcalib.pipeline import quantize

    quantize(make_recipe(**task["recipe"]), Path(task["target"]), calibration=read_set(Path(task["set"])))
    share(Path(task["set"]) / "calibration.npz", Path(task["target"]) / "calibration.npz")


def share(original: Path, copy: Path) -> None:
    """Keep two equal files once, where the disk can: the images of a set are most of what its cells hold."""
    linked = copy.with_name(f".{copy.name}.partial")
    with contextlib.suppress(OSError):
        if filecmp.cmp(original, copy, shallow=False):
            linked.hardlink_to(original)
            linked.replace(copy)


def _remedy(task: dict[str, Any]) -> str:
    """How to get the weights file of a model, where that is missing and the recipe says how."""
    weights, command = task["recipe"]["weights"], task["command"]
    missing = command and weights and not Path(weights).is_file()
    return f" Make it with: {command}" if missing else ""


def main() -> None:
    # Libraries print to stdout, which is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the sweep, which then closes stdin
    if sys.argv[1] and hasattr(os, "sched_setaffinity"):
        # OpenVINO, NNCF and torch all take their number of threads from here.
        os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[1].split(",")})
    tasks: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            tasks.put(line)
        tasks.put(None)
        if _one_task.locked():
            _thread.interrupt_main()  # the task leaves nothing half-written
            time.sleep(GRACE_S)
            os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := tasks.get()) is not None:
            answers.write(json.dumps(run_task(json.loads(line))) + "\n")
            answers.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(1)


if __name__ == "__main__":
    main()
