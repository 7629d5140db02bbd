"""Sweeps of a tiny network: whatever ends them, no finished cell is lost and the table is the same."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import jsonschema
import pytest
import torch
import yaml
from click.testing import CliRunner

from ovcalib.cli import app as cli
from ovcalib.errors import DeviceError, UsageError
from ovcalib.progress import Progress
from ovcalib.records.schema import schema
from ovcalib.records.sweep import make_sweep_recipe
from ovcalib.rehearsal import plan_sweep
from ovcalib.sweeps import run as sweeps
from ovcalib.sweeps.engines import LocalEngine
from ovcalib.sweeps.state import read_results, read_sweep
from ovcalib.sweeps.store import SetStore
from ovcalib.sweeps.worker import run_task, share

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


class Inline:
    """Runs every task in this process, which has imported all that is heavy, and counts them."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def slots(self) -> int:
        return 1

    def wait(self, running):
        return list(running)

    def submit(self, task):
        self.tasks.append(task)
        future: Future[dict[str, Any]] = Future()
        future.set_result(run_task(task))
        return future


class AtCell(Progress):
    """Keeps what is said, and does something when so many cells are finished."""

    def __init__(self, count, action) -> None:
        self.count, self.action = count, action
        self.lines: list[str] = []

    def say(self, line) -> None:
        self.lines.append(line)
        if line.startswith(f"{self.count}/"):
            self.action()


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def inline(monkeypatch):
    engine = Inline()
    monkeypatch.setattr(sweeps, "open_engine", lambda reference, jobs: engine)
    return engine


@pytest.fixture(scope="module")
def data(toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    torch.save(toy.net.state_dict(), root / "toy.pt")
    toy.write_folder(root / "images", 40)
    return root


def content(data, **changes):
    """Two sources x two seeds."""
    toy = {"name": "toy", "model": "tests.toy:ToyNet", "weights": str(data / "toy.pt"), "input_shape": [3, 16, 16],
           "mean": [0.5] * 3, "std": [0.25] * 3}  # fmt: skip
    sources = [{"calib": "noise", "num_samples": 4}, {"calib": "fractal", "num_samples": 4, "options": {"systems": 2}}]
    return {"models": [toy], "sources": sources, "seeds": [0, 1], "eval": str(data / "images"), **changes}


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """A sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "open_engine", lambda engine, jobs: Inline())
        patch.chdir(ROOT)
        found = sweeps.run_sweep(make_sweep_recipe(content(data)), out)
    assert [cell.state for cell in found.cells] == ["done"] * 4, found.failed
    return out


def tables(folder):
    return [(folder / name).read_text() for name in ("report.md", "report.csv")]


def results(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("cells/*/result.json")}


def nothing_half_written(folder) -> bool:
    return not list(folder.glob("*/.*.partial"))


def test_a_result_says_where_its_images_came_from(reference) -> None:
    found = read_results(reference, read_sweep(reference))
    assert {r.calibration.source for r in found.values()} == {"noise", "fractal"}
    assert {r.calibration.seed for r in found.values()} == {0, 1}
    for key, result in found.items():
        assert result.recipe.calibration.calib == result.calibration.source  # so `quantize -c` makes the same images
        assert result.benchmark is None
        folder = reference / "cells" / key
        shared = read_sweep(reference)
        own = next(cell for cell in shared.cells if cell.key == key)
        made = (reference / "sets" / own.set_key / "calibration.npz").read_bytes()
        assert (folder / "calibration.npz").read_bytes() == made
        assert (folder / "calibration.npz").samefile(reference / "sets" / own.set_key / "calibration.npz")


def test_files_are_kept_once_where_they_are_equal_and_the_disk_can(tmp_path, monkeypatch) -> None:
    original, copy = tmp_path / "a", tmp_path / "b"
    original.write_text("images")
    copy.write_text("others")
    share(original, copy)
    assert copy.read_text() == "others"
    copy.write_text("images")

    def refuse(*paths) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "hardlink_to", refuse)
        share(original, copy)
    assert copy.read_text() == "images"
    assert not copy.samefile(original)
    share(original, copy)
    assert copy.samefile(original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_written_keeps_its_schema(reference) -> None:
    jsonschema.validate(json.loads((reference / "sweep.json").read_text()), schema("sweep"))
    jsonschema.validate(json.loads((reference / "request.json").read_text()), schema("sweep-recipe"))


def test_the_comparison_page_has_every_cell(reference) -> None:
    page = (reference / "report.html").read_text()
    assert "4 results side by side" in page
    assert "fractal" in page
    for cell in read_sweep(reference).cells:
        assert f"{cell.model}, {cell.source}, {cell.mode}, seed {cell.seed}" in page
    assert "Output error (NMSE) (default)" in page


def test_a_finished_sweep_has_nothing_to_do(reference, data, inline) -> None:
    before = results(reference)
    sweeps.run_sweep(make_sweep_recipe(content(data)), reference)
    assert inline.tasks == []
    assert results(reference) == before


def test_modes_share_sets_and_a_larger_recipe_keeps_what_is_there(reference, data, inline, tmp_path) -> None:
    import shutil

    shutil.copytree(reference, tmp_path / "out")
    larger = make_sweep_recipe(
        content(data, modes=["default", "accuracy-aware"], seeds=[0], common={"max_iterations": 1})
    )
    with pytest.raises(UsageError, match="another recipe.*`resume=True`"):
        sweeps.run_sweep(larger, tmp_path / "out")
    sets = {path.name for path in (reference / "sets").iterdir()}
    found = sweeps.run_sweep(larger, tmp_path / "out", resume=True)
    assert not found.failed
    assert {path.name for path in (tmp_path / "out" / "sets").iterdir()} == sets
    # The cells of the default algorithm are there, whatever steers the other.
    assert len([task for task in inline.tasks if task["kind"] == "cell"]) == 2
    assert "Operations reverted to float" in (tmp_path / "out" / "report.md").read_text()


def test_simulated_cells_name_their_bits_and_are_not_timed(data, inline, tmp_path) -> None:
    recipe = make_sweep_recipe(
        content(
            data, modes=["weight-only", "simulated"], seeds=[0], sources=[{"calib": "noise", "num_samples": 8}],
            common={"weight_bits": 4}, benchmark_time=0.05,
        )
    )  # fmt: skip
    found = sweeps.run_sweep(recipe, tmp_path / "out")
    assert not found.failed
    timed = {c.mode: (tmp_path / "out" / "cells" / c.key / "benchmark.json").is_file() for c in found.cells}
    assert timed == {"weight-only": True, "simulated": False}
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("Speed-up on CPU") == 1
    assert "## Mode weight-only\n" in report
    assert "## Mode simulated W4A8\n" in report
    assert "(simulated W4A8)" in (tmp_path / "out" / "report.html").read_text()


def test_a_failing_cell_is_reported_and_only_it_is_tried_again(data, inline, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    toy = content(data)["models"][0]
    late = {**toy, "name": "late", "weights": str(tmp_path / "late.pt"), "command": "python train.py late"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump(content(data, models=[late, toy], seeds=[0], sources=[{"calib": "noise", "num_samples": 4}]))
    )
    arguments = ["sweep", str(recipe), "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(cli.app, arguments)
    assert found.exit_code == 3, found.stderr  # a missing weights file, as of `quantize`
    assert "1 of 2 cells failed" in found.stderr
    assert "late.pt'. Make it with: python train.py late" in found.stderr
    assert "| noise x 4 | failed | 0.00 |" in found.stdout
    first = results(tmp_path / "out")
    assert len(first) == 1

    late_weights = data / "toy.pt"
    (tmp_path / "late.pt").write_bytes(late_weights.read_bytes())
    found = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert found.exit_code == 0, found.stderr
    state = json.loads(found.stdout)
    assert [cell["state"] for cell in state["cells"]] == ["done", "done"]
    assert first.items() <= results(tmp_path / "out").items()
    assert len(inline.tasks) == 5  # a set that failed; a set and its cell, twice


def test_folders_of_others_are_left_alone(data, tmp_path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty and holds no sweep"):
        sweeps.run_sweep(make_sweep_recipe(content(data)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_two_sweeps_do_not_share_a_folder(reference, data) -> None:
    import fcntl

    with (reference / sweeps.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="Another sweep is at work"):
            sweeps.run_sweep(make_sweep_recipe(content(data)), reference)


def test_latency_is_measured_alone_and_afterwards(reference, data, inline, tmp_path) -> None:
    import shutil

    shutil.copytree(reference, tmp_path / "out")
    timed = make_sweep_recipe(content(data, seeds=[0], benchmark_time=0.05))
    sweeps.run_sweep(timed, tmp_path / "out", resume=True)
    assert inline.tasks == []
    assert len(list((tmp_path / "out").glob("cells/*/benchmark.json"))) == 2
    assert "Speed-up on CPU" in (tmp_path / "out" / "report.md").read_text()


def test_tables_and_state_are_of_all_cells_that_are_done_however_a_sweep_ends(
    data, inline, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sweeps, "NOTE_EVERY", 1e9)
    with pytest.raises(KeyboardInterrupt):
        sweeps.run_sweep(make_sweep_recipe(content(data)), tmp_path / "out", progress=AtCell(3, interrupt))
    assert [cell.state for cell in read_sweep(tmp_path / "out").cells].count("done") == 3
    assert len((tmp_path / "out" / "report.csv").read_text().splitlines()) == 1 + 2


# A store of sets ------------------------------------------------------------------------------


@pytest.fixture
def key(reference):
    return next((reference / "sets").iterdir()).name


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_sets_of_another_sweep_are_taken_from_a_store(reference, data, inline, tmp_path, kind, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = "shared/sets" if kind == "folder" else f"memory://{tmp_path.name}/sets"
    changes = {"seeds": [0], "sources": [{"calib": "noise", "num_samples": 4}]}
    recipe = make_sweep_recipe(content(data, **changes))
    sweeps.run_sweep(recipe, tmp_path / "first", store=address)
    monkeypatch.setattr("ovcalib.calibration.make.make_set", None)  # nothing is made any more
    said = AtCell(1, lambda: None)
    assert not sweeps.run_sweep(recipe, tmp_path / "second", store=address, progress=said).failed
    assert [line.split()[2:] for line in said.lines if "comes from" in line] == [["comes", "from", ANY]]
    assert tables(tmp_path / "second") == tables(tmp_path / "first")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content(data, **changes)))
    assert plan_sweep(tmp_path / "r.yaml", tmp_path / "third", address).sets_in_the_store == 1
    for folder in (tmp_path / "first" / "sets").iterdir():
        assert files(tmp_path / "second" / "sets" / folder.name) == files(folder)


@pytest.mark.parametrize("harm", ["cut", "no archive", "a set that is none", "a path outside"])
def test_a_set_in_the_store_that_cannot_be_read_is_none_and_is_replaced(reference, key, tmp_path, harm) -> None:
    store = SetStore(str(tmp_path / "sets"))
    store.prepare()
    assert not store.fetch(key, tmp_path / "out")
    store.publish(key, reference / "sets" / key)
    file = tmp_path / "sets" / f"{key}.tar"
    whole = file.read_bytes()
    if harm == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif harm == "no archive":
        file.write_bytes(b"x" * 100)
    else:
        with tarfile.open(file, "a" if harm == "a path outside" else "w") as packed:
            packed.addfile(tarfile.TarInfo("../outside" if harm == "a path outside" else "request.json"))
    assert not store.fetch(key, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sets"]
    store.publish(key, reference / "sets" / key)
    assert store.fetch(key, tmp_path / "out")
    assert files(tmp_path / "out") == files(reference / "sets" / key)


def test_a_set_that_cannot_be_shared_still_serves_its_cells(data, inline, tmp_path, monkeypatch) -> None:
    def refuse(store, key, folder):
        raise UsageError("the bucket is read-only")

    monkeypatch.setattr(SetStore, "publish", refuse)
    said = AtCell(1, lambda: None)
    recipe = make_sweep_recipe(content(data, seeds=[0], sources=[{"calib": "noise", "num_samples": 4}]))
    assert not sweeps.run_sweep(recipe, tmp_path / "out", store=str(tmp_path / "sets"), progress=said).failed
    assert any("is not shared: the bucket is read-only" in line for line in said.lines)


@pytest.mark.parametrize("address", ["s4://bucket/sets", "taken", "taken/below", ""])
def test_a_store_that_cannot_be_used_is_refused_before_anything_runs(data, tmp_path, monkeypatch, address) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content(data)))
    found = CliRunner().invoke(cli.app, ["sweep", "r.yaml", "-o", "out", "--store", address])
    assert found.exit_code == 2
    if address:
        assert f"The store '{address}' cannot be used" in found.stderr
        assert "leave --store out" in found.stderr
    else:
        assert "--store is empty" in found.stderr
    assert not (tmp_path / "out").exists()


def start(recipe, out, *options):
    return subprocess.Popen([sys.executable, "-m", "ovcalib", "sweep", str(recipe), "-o", str(out), *options], cwd=ROOT,
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip


def until(process, text) -> None:
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"no {text!r}")


def children(pid):
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        pytest.skip("this system does not tell the children of a process")


def alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_sweep_killed_midway_goes_on_to_the_same_table(reference, data, tmp_path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(content(data)))
    process = start(recipe, out, "--jobs", "2")
    until(process, "1/4 toy")
    workers = children(process.pid)
    process.kill()
    process.wait()
    done = results(out)
    assert 1 <= len(done) < 4
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):  # workers never outlive their sweep
        assert time.monotonic() < deadline
        time.sleep(0.1)

    process = start(recipe, out, "--jobs", "2")
    until(process, "of 4 cells are done already")
    while not (started := children(process.pid)):
        time.sleep(0.01)
    os.kill(started[0], signal.SIGKILL)  # and a worker of the second run is lost as well
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert done.items() <= results(out).items()
    assert tables(out) == tables(reference)
    assert nothing_half_written(out)


def test_an_interrupted_sweep_leaves_whole_cells_alone(data, tmp_path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(content(data, sources=[{"calib": "fractal", "num_samples": 100000}], seeds=[0])))
    process = start(recipe, out)
    deadline = time.monotonic() + 60
    while not list(out.glob("sets/.*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished cells are kept in" in errors
    assert errors.count("interrupted;") == 1  # the folder is called after the test
    assert "Traceback" not in errors
    assert nothing_half_written(out)


def test_a_task_whose_process_is_killed_runs_again(tmp_path) -> None:
    engine = LocalEngine(1)
    try:
        recipe = {"model": "resnet20-cifar10", "weights": "none.pt", "calib": "noise", "num_samples": 1}
        task = {
            "kind": "set",
            "recipe": recipe,
            "target": str(tmp_path / "set"),
            "folder": str(tmp_path),
            "command": "make it",
        }
        future = engine.submit(task)
        while 0 not in engine.workers:
            time.sleep(0.01)
        killed = engine.workers[0].process
        killed.kill()
        assert "There is no weights file 'none.pt'. Make it with: make it" in future.result(120)["error"]
        assert engine.workers[0].process is not killed
    finally:
        engine.stop()


# A cluster ------------------------------------------------------------------------------------


def spawn(*arguments):
    return subprocess.Popen([sys.executable, "-m", *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)  # fmt: skip


@pytest.fixture
def cluster(tmp_path):
    """The address of a scheduler, its process, and those of its two workers by the address that dask knows them by."""
    pytest.importorskip("distributed")
    from distributed import Client

    file = tmp_path / "scheduler.json"
    started = [spawn("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                     "--scheduler-file", str(file))]  # fmt: skip
    try:
        while not file.exists():
            assert started[0].poll() is None
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        started += [spawn("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
                          "--name", name, "--local-directory", str(tmp_path)) for name in "ab"]  # fmt: skip
        with Client(address) as client:
            client.wait_for_workers(2, timeout=120)
        yield address, started
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_ends_with_the_same_table(reference, data, cluster, tmp_path) -> None:
    address, (_, _, worker) = cluster
    progress = AtCell(1, worker.kill)
    found = sweeps.run_sweep(
        make_sweep_recipe(content(data)), tmp_path / "out", engine=f"dask:{address}", progress=progress
    )
    assert worker.wait(10) == -signal.SIGKILL
    assert not found.failed
    assert tables(tmp_path / "out") == tables(reference)
    assert nothing_half_written(tmp_path / "out")


@pytest.mark.slow
def test_a_scheduler_that_dies_ends_the_sweep_which_then_goes_on(
    reference, data, cluster, inline, tmp_path, monkeypatch
) -> None:
    from ovcalib.sweeps.engines import open_engine

    address, (scheduler, *_) = cluster
    recipe = make_sweep_recipe(content(data))
    monkeypatch.setattr(sweeps, "open_engine", open_engine)
    with pytest.raises(DeviceError, match="went away"):
        sweeps.run_sweep(recipe, tmp_path / "out", engine=f"dask:{address}", progress=AtCell(1, scheduler.kill))
    done = results(tmp_path / "out")
    assert len(done) >= 1
    monkeypatch.setattr(sweeps, "open_engine", lambda reference, jobs: inline)
    assert not sweeps.run_sweep(recipe, tmp_path / "out").failed
    assert done.items() <= results(tmp_path / "out").items()
    assert tables(tmp_path / "out") == tables(reference)


def test_there_is_no_scheduler(data, tmp_path, monkeypatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("ovcalib.sweeps.engines.CONNECT_S", 0.5)
    with pytest.raises(DeviceError, match="no dask scheduler at 'tcp://127.0.0.1:9'"):
        sweeps.run_sweep(make_sweep_recipe(content(data)), tmp_path / "out", engine="dask:tcp://127.0.0.1:9")
    assert not list(tmp_path.iterdir())
