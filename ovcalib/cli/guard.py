"""Exit codes, and errors as a line on stderr. A user's mistake never shows a traceback."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import click

from ovcalib.errors import InvalidOptionError, OvcalibError

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
        reason = str(error).strip().splitlines()
        print(
            f"error: {type(error).__name__}: {reason[0] if reason else ''}\n"
            "This is a fault of ovcalib, not yours. Run again with --debug and report what it prints.",
            file=sys.stderr,
        )
        return 1


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
