"""How a benchmark ends: an error of the user's as a line on stderr, as those of `ovcalib`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable

from ovcalib.cli.guard import INTERRUPTED
from ovcalib.errors import OvcalibError, printable


def run(main: Callable[[], None]) -> None:
    """Run a benchmark, and leave with the exit code of an error of the user's; a fault of ours keeps its traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OvcalibError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def positive(text: str) -> int:
    """The type of an argument that is a number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def program(text: str) -> str:
    """The type of an option that names a program."""
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no program that can be run")
    return text
