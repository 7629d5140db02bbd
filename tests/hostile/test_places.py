"""Output folders that cannot be written, full disks, and what killed runs leave."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovcalib.cli.guard import guarded
from ovcalib.errors import UsageError
from ovcalib.rundir import RunDir, clean, leftovers, write_atomically, write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in a folder of its own, below tmp_path."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(target, **options):
    with RunDir(Path(target), request={}, **options) as run:
        (run.path / "result.txt").write_text("whole")
        run.finish()


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "./.", "../here"])
def test_the_current_folder_and_those_above_are_not_replaced(target, here, tmp_path):
    with pytest.raises(UsageError, match="current folder or one above|not empty|holds files"):
        write(target, overwrite=True)
    assert list(tmp_path.iterdir()) == [here]
    assert not list(here.iterdir())


def test_a_link_to_a_folder_is_followed(here, tmp_path):
    (tmp_path / "there").mkdir()
    (here / "link").symlink_to(tmp_path / "there")
    for _ in range(2):
        write("link", overwrite=True)
    assert (here / "link").is_symlink()
    assert (tmp_path / "there" / "result.txt").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there"}
    assert [path.name for path in here.iterdir()] == ["link"]


@pytest.mark.parametrize("leads_to", ["nowhere", "link", "/dev/null", "file"])
def test_a_link_that_leads_to_no_folder_is_refused(leads_to, here):
    (here / "file").touch()
    (here / "link").symlink_to(leads_to)
    with pytest.raises(UsageError, match="'link' is a (link|file)"):
        write("link", overwrite=True)
    assert {path.name for path in here.iterdir()} == {"file", "link"}


@pytest.mark.parametrize(
    "target", ["x" * 240, "x" * 300, "a/" * 3000 + "b", "a\0b", "file/x", "file/x/y", "/proc/x", "/dev/null/x"]
)
def test_names_that_no_folder_can_have_are_refused(target, here):
    (here / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write(target)
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_mount_point_is_refused(here, monkeypatch):
    (here / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(UsageError, match="mount point"):
        write("disk")
    assert not list((here / "disk").iterdir())


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(here, monkeypatch):
    write("out")
    (here / "out" / "result.txt").write_text("old")
    rename = Path.rename

    def fail(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UsageError, match="cannot be moved"):
        write("out", overwrite=True)
    assert [path.name for path in here.iterdir()] == ["out"]
    assert (here / "out" / "result.txt").read_text() == "old"


# Full disks -------------------------------------------------------------------------------------


class RustError(Exception):
    """As safetensors raises: a type of its own, and the system's reason in its text."""


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EFBIG, "File too large"),
              RustError("I/O error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_full_disk_is_a_users_error_with_the_path(error, here, capsys):
    def half(partial):
        partial.write_text("ha")
        raise error

    def fill():
        write_atomically(here / "x.safetensors", half)

    assert guarded(fill, {}, debug=False) == 2
    shown = capsys.readouterr().err
    assert "No space is left" in shown
    assert "fault" not in shown
    assert not list(here.iterdir())


def test_a_full_disk_ends_a_run_with_nothing_left(here):
    with pytest.raises(UsageError, match="No space is left"), RunDir(Path("out"), request={}) as run:
        write_atomically(run.path / "x", lambda partial: (_ for _ in ()).throw(RustError("os error 28")))
    assert not list(here.iterdir())


def test_other_errors_are_not_taken_for_a_full_disk(here, capsys):
    assert guarded(lambda: write_atomically(here / "x", lambda partial: 1 / 0), {}, debug=False) == 1
    assert "fault of ovcalib" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs rights that this user lacks")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_report_on_a_full_disk(small_disk, tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "result.json").write_bytes((ROOT / "tests/golden/result-0.1.json").read_bytes())
    (small_disk / "filler").write_bytes(bytes(500_000))
    found = subprocess.run(
        [sys.executable, "-m", "ovcalib", "report", tmp_path / "result", "-o", small_disk / "report"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert "No space is left" in found.stderr
    assert str(small_disk) in found.stderr
    assert not [path for path in small_disk.rglob("*") if path.name.endswith(".partial")]


# Killed runs --------------------------------------------------------------------------------------


def test_what_a_killed_run_leaves_is_found_and_cleaned(here):
    code = (
        "import os, time; from pathlib import Path; from ovcalib.rundir import *\n"
        "run = RunDir(Path('runs/one'), request={}); run.__enter__(); run.resume.mkdir()\n"
        "(run.path / 'big').write_bytes(bytes(1000)); print('ready', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert leftovers([here, here / "runs"]) == []  # it is at work
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (here / ".x.json.123.partial").touch()
    (here / ".hidden").mkdir()
    (here / ".mine.partial").mkdir()
    found = leftovers([here, here / "runs"])
    assert sorted((entry.path.suffix, entry.resumable) for entry in found) == [
        (".partial", False), (".partial", False), (".resume", True),
    ]  # fmt: skip
    clean(found)
    assert {path.name for path in here.rglob("*")} == {".hidden", ".mine.partial", "runs"}


def test_doctor_shows_and_removes_leftovers(here, monkeypatch):
    from click.testing import CliRunner

    from ovcalib.cli.app import app
    from ovcalib.measurement.doctor import places

    monkeypatch.setenv("OVCALIB_CACHE", str(here / "cache"))
    left = [here / "runs" / ".a.0123abcd.partial", here / "runs" / "s" / "cells" / ".b.0123abcd.partial",
            here / "cache" / "weights" / ".w.17.partial", here / "runs" / ".a.resume"]  # fmt: skip
    for path in left:
        path.mkdir(parents=True)
    assert {entry.path.resolve() for entry in leftovers(places())} == set(left)
    found = CliRunner().invoke(app, ["doctor", "--clean"])
    assert found.exit_code == 0, found.stderr
    assert "4 removed" in found.stdout
    assert not any(path.exists() for path in left)


def test_a_result_is_whole_or_not_there_whenever_it_is_killed(here):
    code = "from tests.hostile.test_places import *\nwhile True: write('out', overwrite=True)"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (here / "out").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    if (here / "out").is_dir():
        assert (here / "out" / "result.txt").read_text() == "whole"
    clean(leftovers([here]))
    assert {path.name for path in here.iterdir()} <= {"out"}


def test_json_of_a_record_is_written_whole(here):
    with pytest.raises(ValueError, match="NaN|nan|JSON compliant"):
        write_json(here / "x.json", {"a": float("nan")})
    assert not list(here.iterdir())
