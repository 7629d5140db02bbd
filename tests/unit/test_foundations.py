"""Errors, the registry, output folders, benchmark arithmetic and results."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import ovcalib
from ovcalib import errors, progress
from ovcalib.calibration import SOURCES
from ovcalib.measurement import benchmark
from ovcalib.records.result import KernelsError
from ovcalib.registry import Registry
from ovcalib.rundir import RunDir, write_atomically, write_json


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    codes = {name: getattr(errors, name).exit_code for name in dir(errors) if name.endswith("Error")}
    assert codes == {
        "DataError": 4, "DeviceError": 6, "MissingDependencyError": 2, "ModelError": 3, "OvcalibError": 1,
        "InvalidOptionError": 2, "UnknownNameError": 2, "UsageError": 2,
    }  # fmt: skip


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    assert str(errors.UnknownNameError("source", "dgs", ["dsg", "real"])) == (
        "Unknown source 'dgs'. Did you mean 'dsg'? Available: dsg, real."
    )
    assert "Did you mean" not in str(errors.UnknownNameError("source", "xyzzy", ["dsg"]))


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(errors.MissingDependencyError, match=r"pip install 'ovcalib\[gan\]'"):
        errors.require("no_such_package_anywhere", "gan", "This")


def test_the_registry_imports_what_is_asked_for() -> None:
    table = Registry("thing", "ovcalib.test", {"join": "os.path:join", "json": "json"})
    assert table["join"] is os.path.join
    assert table["json"] is json
    assert list(table) == ["join", "json"]
    with pytest.raises(errors.UnknownNameError, match="Unknown thing 'jion'"):
        table["jion"]


@pytest.mark.parametrize("name", list(SOURCES))
def test_every_source_has_the_three_things(name) -> None:
    source = SOURCES[name]
    assert isinstance(source.NEEDS, frozenset)
    assert source.Options.__dataclass_params__.frozen
    assert callable(source.generate)
    assert source.__doc__


def test_public_names_resolve() -> None:
    for name in ovcalib.__all__:
        assert getattr(ovcalib, name) is not None
    with pytest.raises(AttributeError):
        _ = ovcalib.nothing


def test_a_file_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError):
        write_atomically(target, fail)
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def fail(partial) -> None:
    partial.write_text("half")
    raise RuntimeError


def test_nan_is_not_written_as_json(tmp_path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_run_appears_when_it_is_finished(tmp_path) -> None:
    target = tmp_path / "out"
    with RunDir(target) as run:
        (run.path / "request.json").write_text("1")
        assert not target.exists()
        run.finish()
    assert (target / "request.json").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_run_leaves_nothing(tmp_path, error) -> None:
    def work() -> None:
        with RunDir(tmp_path / "deep" / "out") as run:
            (run.path / "file").write_text("1")
            raise error

    with pytest.raises(error):
        work()
    assert not list(tmp_path.iterdir())


def test_an_earlier_result_is_replaced_only_when_asked_and_only_at_the_end(tmp_path) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        with RunDir(target, overwrite=True) as run:
            (run.path / "request.json").write_text(text)
            run.finish()
    assert (target / "request.json").read_text() == "new"
    with pytest.raises(errors.UsageError, match="not empty"):
        RunDir(target)
    with pytest.raises(RuntimeError), RunDir(target, overwrite=True):
        raise RuntimeError
    assert (target / "request.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_resume_folder_goes_when_the_run_is_done_and_stays_when_it_is_interrupted(tmp_path) -> None:
    for error in (KeyboardInterrupt, None):
        with contextlib.suppress(KeyboardInterrupt), RunDir(tmp_path / "out") as run:
            run.resume.mkdir(exist_ok=True)
            if error is not None:
                raise error
            run.finish()
        assert run.resume.exists() == (error is not None)


def test_without_a_target_nothing_stays() -> None:
    with RunDir(None) as run:
        (run.path / "model.xml").write_text("")
        assert run.resume is None
        assert run.finish() is None
    assert not run.path.exists()
    with pytest.raises(errors.UsageError, match="No space is left for temporary files"), RunDir(None) as run:
        raise OSError(errno.ENOSPC, "full")
    assert not run.path.exists()


def test_other_peoples_files_are_never_overwritten(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.UsageError, match="ovcalib did not write"):
        RunDir(tmp_path, overwrite=True)


def test_a_file_is_no_output_folder(tmp_path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(errors.UsageError, match="is a file"):
        RunDir(tmp_path / "f")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_plainly(tmp_path, code) -> None:
    with pytest.raises(errors.UsageError, match="No space is left"), RunDir(tmp_path / "out"):
        raise OSError(code, "the system's own words")
    assert not list(tmp_path.iterdir())


def test_a_failed_stream_on_a_full_disk_is_called_a_full_disk(tmp_path, monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="iostream"), RunDir(tmp_path / "out"):
        raise RuntimeError("basic_ios::clear: iostream error")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(errors.UsageError, match="No space is left"), RunDir(tmp_path / "out"):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert not list(tmp_path.iterdir())


def test_percentiles_are_those_of_the_durations() -> None:
    found = benchmark.summarise(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found.p50, found.mean, found.min, found.max, found.n) == (2.5, 2.5, 1, 4, 4)
    assert found.p90 == pytest.approx(3.7)


def test_models_take_turns_by_a_scripted_clock() -> None:
    now = [0.0]
    calls = []

    def run(name, seconds):
        def infer() -> None:
            calls.append(name)
            now[0] += seconds

        return infer

    durations = benchmark.interleave({"a": run("a", 0.125), "b": run("b", 0.25)}, 1.0, 2, clock=lambda: now[0])
    warm = calls[: 2 * benchmark.WARMUP_RUNS]
    assert warm == ["a"] * benchmark.WARMUP_RUNS + ["b"] * benchmark.WARMUP_RUNS
    assert "".join(calls[len(warm) :]) == "aaaabbaaaabb"
    assert [list(r) for r in durations["a"]] == [pytest.approx([125] * 4)] * 2
    assert [list(r) for r in durations["b"]] == [pytest.approx([250] * 2)] * 2


def test_the_time_left_counts_from_where_work_was_taken_up(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress.Terminal().task("training", 1000) as tick:
        for done in (901, 911, 921):
            tick(done)
            now[0] += 30.0
    # 10 steps in 30 s, and not 911.
    assert capsys.readouterr().err.splitlines() == [
        "training 911/1000, 4 min 27 s left",
        "training 921/1000, 3 min 57 s left",
    ]


def test_a_notebook_shows_one_bar_that_is_replaced_and_cleared(monkeypatch, capsys) -> None:
    class ZMQInteractiveShell:  # by whose name rich knows a notebook
        pass

    shown: list[str] = []
    handle = SimpleNamespace(update=lambda content, raw: shown.append(content["text/plain"]))
    display = SimpleNamespace(display=lambda content, raw, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress.Terminal().task("training", 4) as tick:
        for done in (1, 2, 3):
            tick(done)
            now[0] += 3.0
    assert shown == [
        f"{'━' * 12}{'┄' * 12} training 2/4, 6 s left",
        f"{'━' * 18}{'┄' * 6} training 3/4, 3 s left",
        "",
    ]
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_honest_from_the_first_report(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal = progress.Terminal(lambda text: text.replace("`limit`", "--limit"))
    with terminal.task("evaluating", 100, "a part (`limit`).") as tick:
        now[0] = 20.0  # the first of a hundred took that long
        tick(1)
        now[0] = 40.0
        tick(2.5)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating 1/100, up to 33 min 00 s left",
        "evaluating takes about 22 min 20 s. Shorter: a part (--limit).",
        "evaluating 2/100, 21 min 40 s left",
    ]
    with terminal.task("evaluating", 10, "a part (`limit`).") as tick:
        for done in (1, 2):
            now[0] += 20.0
            tick(done)
    assert "Shorter" not in capsys.readouterr().err  # three minutes are not long


def test_progress_is_shown_where_somebody_looks_on(monkeypatch):
    import sys
    import types

    from ovcalib.progress import Progress, Terminal, usual_progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert type(usual_progress()) is Progress
    notebook = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    assert isinstance(usual_progress(), Terminal)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert type(usual_progress()) is Progress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(usual_progress(), Terminal)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_measured_number_that_is_not_finite_is_null(value) -> None:
    found = KernelsError(kernels="vnni", nmse=value, emulated=False)
    assert found.nmse is None
    assert KernelsError.model_validate_json(found.model_dump_json()) == found
