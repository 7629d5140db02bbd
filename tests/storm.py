"""Interrupt ovcalib at random moments, go on, and compare with runs that nothing interrupted.

    python -m tests.storm --seconds 1800 [--seed 0] [--only generate quantize sweep distill]

Each round starts one command in a process of its own, sends it SIGINT, SIGTERM or SIGKILL at a random moment, and
repeats the command until it ends. Then the round is checked:

- a stopped process leaves no process behind, and says what it kept, without a traceback;
- the hashes of images, weights and tables are those of the run that nothing interrupted;
- cells of a sweep that were done are not done again;
- nothing is left beside the results that `ovcalib doctor --clean` does not find, and nothing after it.

Processes are forked from this one, which has imported what is heavy, so that signals meet the work rather than the
imports; every tenth is a fresh `python -m ovcalib`. State is saved at every step instead of every few seconds. Runs
where there is fork. Exit code 1 after the first failure, whose folder is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml

from ovcalib.calibration import inversion
from ovcalib.cli import app as cli
from ovcalib.gan import distillation
from ovcalib.gan.snapshot import write_generator
from ovcalib.gan.stylegan2 import Generator
from ovcalib.rundir import clean, leftovers
from tests.conftest import toy_images
from tests.gan.snapshots import tiny_config
from tests.toy import ToyNet

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MODEL = ["tests.toy:ToyNet", "--weights", "toy.pt", "--input-shape", "3,16,16", "--mean", "0.5,0.5,0.5",
         "--std", "0.25,0.25,0.25"]  # fmt: skip
LIMIT_S = 300  # of a run; none takes a tenth of it
REPORT_EVERY = 10  # rounds


@dataclass(frozen=True)
class Job:
    """A command, and what of its result must not depend on interruptions.

    weight      how often it is chosen
    content     of its output folder; equal where the results are
    """

    name: str
    weight: int
    command: list[str]
    content: Callable[[Path], Any]


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def images(folder: Path) -> str:
    return hashlib.sha256(np.load(folder / "calibration.npz")["images"].tobytes()).hexdigest()


JOBS = (
    Job("generate", 4, ["generate", "bn-inversion", "--model", *MODEL, "--count", "8", "-O", "steps=12"], images),
    Job(
        "quantize", 4,
        ["quantize", *MODEL, "--calib", "bn-inversion", "--num-samples", "16", "-O", "steps=8",
         "--benchmark-time", "0"],
        lambda folder: (images(folder), digest(folder / "int8" / "model.xml", folder / "int8" / "model.bin")),
    ),
    Job("sweep", 2, ["sweep", "sweep.yaml"], lambda folder: digest(folder / "report.csv", folder / "report.md")),
    Job(
        "distill", 1, ["gan", "distill", "pairs", "--preset", "cpu", "--batch", "8", "--epochs", "1"],
        lambda folder: digest(folder / "distylegan.safetensors"),
    ),
)  # fmt: skip


def main() -> int:
    arguments = parse()
    place = Path(tempfile.mkdtemp(prefix="storm-"))
    os.chdir(place)
    # In a process of its own: threads that torch starts would be missing from every fork.
    preparation = multiprocessing.get_context("fork").Process(target=prepare, args=(place,))
    preparation.start()
    preparation.join()
    assert preparation.exitcode == 0
    jobs = [job for job in JOBS if job.name in arguments.only]
    expected = {}
    for job in jobs:
        code, seconds, errors = run(job, place / "expected" / job.name, None, 0.0, fresh=False)
        assert code == 0, f"{job.name} ended with {code} although nothing interrupted it: {errors}"
        expected[job.name] = (job.content(place / "expected" / job.name), seconds)
        print(f"{job.name}: {seconds:.1f} s uninterrupted", flush=True)
    rng = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    begun = time.monotonic()
    while time.monotonic() - begun < arguments.seconds:
        job = rng.choices(jobs, [job.weight for job in jobs])[0]
        fault = interrupted_round(job, place / "round" / "out", *expected[job.name], rng, counts)
        counts["rounds"] += 1
        if fault:
            print(f"FAILED after {dict(counts)}: {job.name}: {fault}\nkept: {place}", file=sys.stderr)
            return 1
        if counts["rounds"] % REPORT_EVERY == 0:
            print(f"{interruptions(counts)} without a fault", flush=True)
    print(f"{interruptions(counts)}, none with a fault:")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    os.chdir(ROOT)
    shutil.rmtree(place)
    return 0


def interruptions(counts: Counter[str]) -> str:
    return f"{counts.total() - counts['rounds']} interruptions in {counts['rounds']} rounds"


def parse() -> argparse.Namespace:
    names = [job.name for job in JOBS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    return parser.parse_args()


def prepare(place: Path) -> None:
    """Weights, pairs and a recipe, in the current folder."""
    torch.manual_seed(0)
    net = ToyNet()
    with torch.no_grad():  # statistics that are not those of a new network, so that there is something to invert
        net.train()
        for _ in range(20):
            net(torch.from_numpy(toy_images(32, 1)[0]).permute(0, 3, 1, 2) / 64 - 2)
    torch.save(net.state_dict(), "toy.pt")
    write_generator(Generator(tiny_config(c_dim=10, img_resolution=32)), place / "teacher.safetensors")
    model = {"name": "toy", "model": "tests.toy:ToyNet", "weights": "toy.pt", "input_shape": [3, 16, 16],
             "mean": [0.5] * 3, "std": [0.25] * 3}  # fmt: skip
    sources = [{"calib": "noise", "num_samples": 4}, {"calib": "fractal", "num_samples": 4, "options": {"systems": 2}}]
    recipe = {"models": [model], "sources": sources, "seeds": [0, 1]}
    Path("sweep.yaml").write_text(yaml.safe_dump(recipe))
    code, _, errors = start(["gan", "collect", "teacher.safetensors", "-o", "pairs", "--count", "24"], None, 0, True)
    assert code == 0, errors


def interrupted_round(
    job: Job, target: Path, content: Any, seconds: float, rng: random.Random, counts: Counter[str]
) -> str | None:
    """Interrupt a command two to twelve times, let it end, and compare; what is wrong, or None."""
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir()
    done: dict[str, int] = {}
    for _ in range(rng.randint(2, 12)):
        # Any moment of the run, early ones more often: what is taken up again has less left to do.
        number, delay = rng.choice(SIGNALS), rng.triangular(0, 1.1 * seconds, 0)
        code, _, errors = run(job, target, number, delay, fresh=rng.random() < 0.1)
        if code == 0:  # it ended before the signal
            break
        counts[f"{job.name}, {number.name}"] += 1
        if fault := after_signal(code, number, errors):
            return fault
        cells = {path.parent.name: path.stat().st_mtime_ns for path in target.glob("cells/*/result.json")}
        if any(cells.get(name) != at for name, at in done.items()):
            return f"finished cells {sorted(done)} became {sorted(cells)}"
        done = cells
    else:
        code, _, errors = run(job, target, None, 0.0, fresh=False)
    if code != 0:
        return f"exit code {code} at the end: {errors}"
    if job.content(target) != content:
        return "another result than without interruptions"
    clean(leftovers([target.parent, target, *target.glob("cells")]))
    hidden = {path.relative_to(target.parent) for path in target.parent.rglob(".*")} - {Path("out/.lock")}
    return f"left behind: {sorted(map(str, hidden))}" if hidden else None


def after_signal(code: int, number: signal.Signals, errors: str) -> str | None:
    if number == signal.SIGKILL:
        return None if code == -signal.SIGKILL else f"exit code {code} after SIGKILL: {errors}"
    # Python shows one of its own where it is stopped before it has come to ovcalib.
    if "Traceback" in errors and "ovcalib/" in errors.replace("ovcalib/__init__.py", ""):
        return f"a traceback after {number.name}: {errors}"
    # A process that has not yet installed its handlers dies of the signal itself. Python ends by SIGINT, which a shell
    # shows as 130, where an extension module ran Python code when a signal came, even if it was handled.
    return None if code in (130, -number, -signal.SIGINT) else f"exit code {code} after {number.name}: {errors}"


def run(job: Job, target: Path, number: signal.Signals | None, delay: float, fresh: bool) -> tuple[int, float, str]:
    begun = time.monotonic()
    code, _, errors = start([*job.command, "-o", str(target)], number, delay, fresh)
    return code, time.monotonic() - begun, errors


def start(command: list[str], number: signal.Signals | None, delay: float, fresh: bool) -> tuple[int, float, str]:
    """Run a command, and send its process a signal after a while; exit code (-N after signal N), and its stderr."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = fresh_process(command, log.fileno()) if fresh else forked(command, log.fileno())
        if number is not None:
            time.sleep(delay)
            os.kill(process, number)
        status = None
        while status is None and time.monotonic() - begun < LIMIT_S:
            found, state = os.waitpid(process, os.WNOHANG)
            status = os.waitstatus_to_exitcode(state) if found else None
            time.sleep(0.01)
        if status is None:
            os.killpg(process, signal.SIGKILL)
            raise TimeoutError(f"{command} did not end in {LIMIT_S} s")
        until = time.monotonic() + 30
        while group_lives(process):
            assert time.monotonic() < until, f"processes of {command} live on after it has ended"
            time.sleep(0.02)
        log.seek(0)
        return status, time.monotonic() - begun, log.read()


def fresh_process(command: list[str], log: int) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "ovcalib", *command], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=log,
    )  # fmt: skip
    process.returncode = 0  # waited for by its number
    return process.pid


def forked(command: list[str], log: int) -> int:
    process = os.fork()
    if process == 0:
        child(command, log)
    return process


def child(command: list[str], log: int) -> NoReturn:
    """Run a command in a forked process, saving its state at every step."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ["PYTHONPATH"] = str(ROOT)
        sys.argv = ["ovcalib", *command]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        inversion.SAVE_EVERY_S = distillation.SAVE_EVERY_S = 0.0
        distillation.distil.__kwdefaults__["report_every"] = 1
        cli.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except KeyboardInterrupt:  # before the command has begun
        code = 130
    finally:
        os._exit(code)


def group_lives(leader: int) -> bool:
    """Whether a process of a group that a process led still runs."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
