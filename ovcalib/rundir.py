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

from ovcalib.errors import Interrupted, UsageError

# Written first into every output folder: what was asked for.
REQUEST = "request.json"
# The end of the hidden folder beside an output folder in which an interrupted run keeps its state.
RESUME = ".resume"
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


def resume_folder(target: Path) -> Path:
    """Where an interrupted run into an output folder keeps its state."""
    return target.parent / f".{target.name}{RESUME}"


class RunDir:
    """A folder that appears whole: work goes into a hidden sibling, which `finish` moves into place.

    A run that fails or is interrupted leaves nothing behind.
    request   what was asked for, written first
    raises   UsageError where the target cannot be written, or holds files and `overwrite` is not set
    """

    def __init__(self, target: Path, overwrite: bool = False, request: Any = None) -> None:
        self.target, self.request = target, request
        self.overwrite = overwrite
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
        # Where a source keeps what it has made, so that an interrupted run goes on; gone when the run is done.
        self.resume = resume_folder(target)
        # Parents that this run makes go with it if it fails.
        self.made = [parent for parent in target.parents if not parent.exists()]
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"The folder {str(target.parent)!r} cannot be written: {error.strerror}.") from error

    def __enter__(self) -> RunDir:
        write_json(self.path / REQUEST, self.request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        full = error is not None and self.no_space_left(error)
        shutil.rmtree(self.path, ignore_errors=True)
        if error is not None:
            with contextlib.suppress(OSError):  # somebody else has put something there
                for parent in self.made:
                    parent.rmdir()
        if isinstance(error, KeyboardInterrupt) and self.resume.is_dir():
            raise Interrupted(f"the images so far are kept in {str(self.resume)!r}") from error
        if full:
            raise UsageError(
                f"No space is left for the output folder {str(self.target)!r}. Free some, or use another disk."
            ) from error

    def no_space_left(self, error: BaseException) -> bool:
        """Whether a full disk is behind an error; libraries in C++ say no more than that a stream failed."""
        if isinstance(error, OSError):
            return error.errno in (errno.ENOSPC, errno.EDQUOT)
        return isinstance(error, RuntimeError) and shutil.disk_usage(self.path.parent).free < NO_SPACE_BYTES

    def finish(self) -> None:
        """Move the finished folder to its place; an old one is replaced only now."""
        if self.target.is_dir():
            old = self.path.with_suffix(".old")
            self.target.rename(old)
            self.path.rename(self.target)
            shutil.rmtree(old)
        else:
            self.path.rename(self.target)
        shutil.rmtree(self.resume, ignore_errors=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Workspace:
    """The folder that a run works in: that of a `RunDir`, or a temporary one where nothing is to be kept.

    path      the folder
    resume    where a source keeps what it has made so far, or None
    """

    def __init__(self, output: Path | None, overwrite: bool, request: Any) -> None:
        self.stack = contextlib.ExitStack()
        self.run = None if output is None else RunDir(output, overwrite, request)

    def __enter__(self) -> Workspace:
        if self.run is None:
            self.path = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
            self.resume = None
        else:
            self.stack.enter_context(self.run)
            self.path, self.resume = self.run.path, self.run.resume
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.stack.__exit__(kind, error, trace)

    def log(self) -> TextIO:
        """logs/run.log, opened for writing."""
        (self.path / "logs").mkdir()
        return (self.path / "logs" / "run.log").open("w")

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every file in the folder, by its path there."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): file_sha256(path) for path in files}

    def finish(self) -> Path | None:
        """Move the folder to its place, and return it."""
        if self.run is None:
            return None
        self.run.finish()
        return self.run.target
