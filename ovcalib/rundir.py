"""Output folders: nothing half-written, and nothing of the user's overwritten by accident."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ovcalib.errors import Interrupted, OvcalibError, UsageError, excerpt

# Written first into every output folder: what was asked for.
REQUEST = "request.json"
# The end of the hidden folder beside an output folder in which an interrupted run keeps its state.
RESUME = ".resume"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A disk with less than this is full: a library keeps what it could write of its last block.
NO_SPACE_BYTES = 1 << 20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name and move it to `path` when it is whole.

    raises   OSError that names the path where no space is left, whatever the library behind `write` raises then
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except Exception as error:
        if no_space_left(error, path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def no_space_left(error: BaseException, folder: Path) -> bool:
    """Whether a full disk is behind an error; libraries in C++ and Rust say no more than that a stream failed."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_SPACE
    if isinstance(error, OvcalibError | MemoryError) or not isinstance(error, Exception):
        return False
    try:
        return "os error 28" in str(error) or shutil.disk_usage(folder).free < NO_SPACE_BYTES
    except OSError:
        return False


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n"))


def resume_folder(target: Path) -> Path:
    """Where an interrupted run into an output folder keeps its state."""
    return target.parent / f".{target.name}{RESUME}"


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
        self.claim: int | None = None
        if target is None:
            self.path = Path(tempfile.mkdtemp())
            return
        try:
            self.target = target = free_to_write(target, overwrite)
            self.path = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
            self.resume = resume_folder(target)
            # Parents that this run makes go with it if it fails.
            self.made = [parent for parent in target.parents if not parent.exists()]
            self.path.mkdir(parents=True)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"The output folder {excerpt(str(target))!r} cannot be written: {reason}.") from error
        self.claim = claim(self.path)

    def __enter__(self) -> RunDir:
        if self.target is not None:
            write_json(self.path / REQUEST, self.request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        full = error is not None and no_space_left(error, self.path.parent)
        shutil.rmtree(self.path, ignore_errors=True)
        if self.claim is not None:
            os.close(self.claim)
        if error is not None:
            with contextlib.suppress(OSError):  # somebody else has put something there
                for parent in self.made:
                    parent.rmdir()
        if isinstance(error, KeyboardInterrupt) and self.resume is not None and self.resume.is_dir():
            raise Interrupted(f"the work so far is kept in {str(self.resume)!r}") from error
        if full:
            place = "temporary files" if self.target is None else f"the output folder {str(self.target)!r}"
            raise UsageError(f"No space is left for {place}. Free some, or use another disk.") from error

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
        old = self.path.with_suffix(".old")
        try:
            if self.target.is_dir():
                self.target.rename(old)
            self.path.rename(self.target)
        except OSError as error:
            if old.is_dir() and not self.target.exists():
                old.rename(self.target)
            raise UsageError(
                f"The result cannot be moved to {str(self.target)!r}: {error.strerror}. Choose another `output`."
            ) from error
        shutil.rmtree(old, ignore_errors=True)
        if self.resume is not None:
            shutil.rmtree(self.resume, ignore_errors=True)
        return self.target


def free_to_write(target: Path, overwrite: bool) -> Path:
    """The folder that an output path stands for, of which nothing would be lost that `overwrite` does not allow.

    raises   UsageError
    """
    target = replaceable(target)
    if not target.is_dir() or not any(target.iterdir()):
        return target
    if not overwrite:
        raise UsageError(
            f"The output folder {str(target)!r} is not empty. Choose another `output`, or pass `overwrite=True`."
        )
    if not (target / REQUEST).is_file():
        raise UsageError(
            f"The output folder {str(target)!r} holds files that ovcalib did not write and that would be "
            "lost. Choose another `output`."
        )
    return target


def replaceable(target: Path) -> Path:
    """The folder that an output path stands for, which a rename can replace.

    raises   UsageError for a file, a link that leads nowhere, the current folder or one above it, and a mount point
    """
    shown = str(target)
    try:
        folder = target.resolve() if target.is_symlink() else target
    except RuntimeError as error:  # links that lead to each other
        raise UsageError(f"{shown!r} is a link that leads to itself. Choose another `output` folder.") from error
    if target.is_symlink() and not folder.exists():
        raise UsageError(f"{shown!r} is a link to {str(folder)!r}, which is not there. Choose another `output` folder.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{shown!r} is a file. Choose another `output` folder.")
    if not folder.is_dir():
        return folder
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"{shown!r} is the current folder or one above it, and a result replaces its folder as a whole. Choose a "
            f"folder inside, such as `output={folder / 'result'}`."
        )
    if folder.is_mount():
        raise UsageError(
            f"{shown!r} is a mount point, which cannot be replaced as a whole. Choose a folder inside, such as "
            f"`output={folder / 'result'}`."
        )
    return folder


# What killed runs leave ------------------------------------------------------------------------


def claim(folder: Path) -> int | None:
    """Mark a folder as being worked in, for as long as the process lives.

    returns   a file descriptor that holds the mark; None where the system has none, or somebody else has it
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@dataclass(frozen=True)
class Leftover:
    """A hidden folder or file of a run that did not end.

    resumable   the command that made it goes on from there
    """

    path: Path
    resumable: bool


LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{8}\.(?:partial|old)|\d+\.partial|(?P<resumable>resume))")


def leftovers(folders: Iterable[Path]) -> list[Leftover]:
    """What killed runs have left in folders; what a living run works in is left out."""
    found, at_work = [], set()
    for folder in dict.fromkeys(folders):
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        for path, match in [(path, match) for path in entries if (match := LEFTOVER.fullmatch(path.name))]:
            mark = claim(path) if path.is_dir() and not match["resumable"] else None
            if mark is not None:
                os.close(mark)
            elif path.is_dir() and not match["resumable"]:
                at_work.add((folder, match["name"]))
                continue
            found.append((Leftover(path, bool(match["resumable"])), (folder, match["name"])))
    return [entry for entry, run in found if run not in at_work]


def clean(found: Iterable[Leftover]) -> None:
    """Remove leftovers."""
    for entry in found:
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, or of a file; links are not followed, and 0 stands for what is not there."""
    total = folder.lstat().st_size if folder.is_file() else 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:  # deleted meanwhile
                continue
    return total
