"""Exit codes, and errors as a line on stderr. A user's mistake never shows a traceback."""

from __future__ import annotations

import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ovcalib.errors import (
    EXTRAS,
    Interrupted,
    InvalidOptionError,
    MissingDependencyError,
    OvcalibError,
    UsageError,
    excerpt,
    interrupted,
    printable,
)

INTERRUPTED = 130
OUTCOME_CODES = {"done": 0, "goal-met": 0, "goal-missed": 5, "budget": 7}


def guarded(run: Callable[[], Any], flags: Mapping[str, str], debug: bool) -> Any:
    """What `run` returns, or the exit code of its error, which is printed.

    flags   names of arguments on the command line
    """
    try:
        return run()
    except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
        raise
    except Interrupted as stopped:
        again = shlex.join(["ovcalib", *sys.argv[1:], *stopped.more])
        print(f"interrupted; {stopped.kept}. Go on with: {again}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        return nothing_kept()
    except OvcalibError as error:
        if interrupted(error):
            return nothing_kept()
        if debug:
            traceback.print_exc()
        print(f"error: {printable(message(error, flags))}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        if debug:
            traceback.print_exc()
        print("error: The memory of this machine is not enough. Use fewer images, or free some.", file=sys.stderr)
        return OUTCOME_CODES["budget"]
    except Exception as error:
        if interrupted(error):
            return nothing_kept()
        if debug:
            traceback.print_exc()
        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if package in EXTRAS:
            print(f"error: {MissingDependencyError(package, EXTRAS[package], 'This command')}", file=sys.stderr)
            return MissingDependencyError.exit_code
        full = full_disk(error)
        if full is not None:
            print(
                f"error: No space is left for {printable(full)!r}. Free some, or use another disk: -o DIR for results, "
                "TMPDIR for temporary files, OVCALIB_CACHE for downloads.",
                file=sys.stderr,
            )
            return UsageError.exit_code
        print(
            f"error: {type(error).__name__}: {excerpt(error)}\n"
            "This is a fault of ovcalib, not yours. Run again with --debug and report what it prints.",
            file=sys.stderr,
        )
        return 1


def nothing_kept() -> int:
    print("interrupted; nothing was written", file=sys.stderr)
    return INTERRUPTED


def full_disk(error: Exception) -> str | None:
    """The file or folder without space that is behind an error; None where none is."""
    import tempfile

    from ovcalib.rundir import no_space_left

    if isinstance(error, OSError) and no_space_left(error, Path()):
        return str(error.filename or tempfile.gettempdir())
    folders = (Path(tempfile.gettempdir()), Path.cwd())
    return next((str(folder) for folder in folders if no_space_left(error, folder)), None)


def message(error: OvcalibError, flags: Mapping[str, str]) -> str:
    """The message of an error, with flags in place of arguments."""
    field = error.field.partition("[")[0] if isinstance(error, InvalidOptionError) else ""
    if isinstance(error, InvalidOptionError) and field in flags and not error.origin:
        value = ",".join(map(str, error.value)) if isinstance(error.value, list | tuple) else error.value
        return f"{flags[field]}{'' if value is None else f' {value}'}: {error.reason}."
    return in_flags(str(error), flags)


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A text with flags in place of arguments in backquotes: `max_drop=0.1` becomes --max-drop 0.1."""

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in flags:
            return match[0]
        if value == "False":
            return f"--no-{flags[name].removeprefix('--')}"
        return flags[name] if value in (None, "True") else f"{flags[name]} {value}"

    return re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]*))?`", flag, text)
