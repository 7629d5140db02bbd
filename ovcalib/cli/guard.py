"""Exit codes, and errors as a line on stderr. A user's mistake never shows a traceback."""

from __future__ import annotations

import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import click

from ovcalib.errors import EXTRAS, Interrupted, InvalidOptionError, MissingDependencyError, OvcalibError

INTERRUPTED = 130
OUTCOME_CODES = {"done": 0, "goal-met": 0, "goal-missed": 5, "budget": 7}


def guarded(run: Callable[[], Any], flags: Mapping[str, str], debug: bool) -> Any:
    """What `run` returns, or the exit code of its error, which is printed.

    flags   how the command line calls arguments
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
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except OvcalibError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {message(error, flags)}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if package in EXTRAS:
            print(f"error: {MissingDependencyError(package, EXTRAS[package], 'This command')}", file=sys.stderr)
            return MissingDependencyError.exit_code
        reason = str(error).strip().splitlines()
        print(
            f"error: {type(error).__name__}: {reason[0] if reason else ''}\n"
            "This is a fault of ovcalib, not yours. Run again with --debug and report what it prints.",
            file=sys.stderr,
        )
        return 1


def message(error: OvcalibError, flags: Mapping[str, str]) -> str:
    """An error in the words of the command line."""
    field = error.field.partition("[")[0] if isinstance(error, InvalidOptionError) else ""
    if isinstance(error, InvalidOptionError) and field in flags and not error.origin:
        value = ",".join(map(str, error.value)) if isinstance(error.value, list | tuple) else error.value
        return f"{flags[field]}{'' if value is None else f' {value}'}: {error.reason}."
    return in_flags(str(error), flags)


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A text with arguments in backquotes, as the command line calls them: `max_drop=0.1` is --max-drop 0.1."""

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in flags:
            return match[0]
        if value == "False":
            return f"--no-{flags[name].removeprefix('--')}"
        return flags[name] if value in (None, "True") else f"{flags[name]} {value}"

    return re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]*))?`", flag, text)
