"""Output folders: nothing half-written, and nothing of the user's overwritten by accident."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ovcalib.errors import UsageError

# Written first into every output folder: what was asked for.
REQUEST = "request.json"
# A disk with less than this is full: a library keeps what it could write of its last block.
NO_SPACE_BYTES = 1 << 20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name and move it to `path` when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n"))


class RunDir:
    """The folder of a run: a hidden sibling of `target`, which `finish` moves into place; temporary where that is None.

    A run that fails or is interrupted leaves nothing behind.
    path      the folder to write into
    resume    the resume folder, where a source keeps the state of an interrupted run; None for a temporary folder
    request   what was asked for, written first
    raises    UsageError where the target cannot be written, or holds files and `overwrite` is not set
    """

    def __init__(self, target: Path | None, overwrite: bool = False, request: Any = None) -> None:
        self.target, self.request = target, request
        self.made: list[Path] = []
        self.resume: Path | None = None
        if target is None:
            self.path = Path(tempfile.mkdtemp())
            return
        if target.exists() and not target.is_dir():
            raise UsageError(f"{str(target)!r} is a file. Choose another `output` folder.")
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise UsageError(
                    f"The output folder {str(target)!r} is not empty. Choose another `output`, or pass "
                    "`overwrite=True`."
                )
            if not (target / REQUEST).is_file():
                raise UsageError(
                    f"The output folder {str(target)!r} holds files that ovcalib did not write and that would be lost. "
                    "Choose another `output`."
                )
        self.path = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
        self.resume = target.parent / f".{target.name}.checkpoint"
        # Parents that this run makes go with it if it fails.
        self.made = [parent for parent in target.parents if not parent.exists()]
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"The folder {str(target.parent)!r} cannot be written: {error.strerror}.") from error

    def __enter__(self) -> RunDir:
        if self.target is not None:
            write_json(self.path / REQUEST, self.request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        full = error is not None and self.no_space_left(error)
        shutil.rmtree(self.path, ignore_errors=True)
        if error is not None:
            with contextlib.suppress(OSError):  # somebody else has put something there
                for parent in self.made:
                    parent.rmdir()
        if full:
            place = "temporary files" if self.target is None else f"the output folder {str(self.target)!r}"
            raise UsageError(f"No space is left for {place}. Free some, or use another disk.") from error

    def no_space_left(self, error: BaseException) -> bool:
        """Whether a full disk is behind an error; libraries in C++ say no more than that a stream failed."""
        if isinstance(error, OSError):
            return error.errno in (errno.ENOSPC, errno.EDQUOT)
        return isinstance(error, RuntimeError) and shutil.disk_usage(self.path.parent).free < NO_SPACE_BYTES

    def log(self) -> TextIO:
        """logs/run.log, opened for writing."""
        (self.path / "logs").mkdir()
        return (self.path / "logs" / "run.log").open("w")

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every file in the folder, by its path there."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): file_sha256(path) for path in files}

    def finish(self) -> Path | None:
        """Move the finished folder to its place, and return that; an old one is replaced only now."""
        if self.target is None:
            return None
        if self.target.is_dir():
            old = self.path.with_suffix(".old")
            self.target.rename(old)
            self.path.rename(self.target)
            shutil.rmtree(old)
        else:
            self.path.rename(self.target)
        if self.resume is not None:
            shutil.rmtree(self.resume, ignore_errors=True)
        return self.target


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
