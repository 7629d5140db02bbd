"""The command line. Results go to stdout, logs and progress to stderr; a command imports its function when chosen."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

import click

from ovcalib import __version__
from ovcalib.cli import catalogue, gan, measure, quantize, sweep
from ovcalib.cli.guard import INTERRUPTED

# How long a signal waits for an import to end, in all and between two looks.
PATIENCE_S, LOOK_S = 10.0, 0.05


# What other commands, and other tools, call an option.
NAMESAKES = {
    "--eval": "--data", "--data": "--eval", "--source": "--calib", "--calibration": "--calib",
    "--count": "--num-samples", "--num-samples": "--count", "--subset-size": "--num-samples",
    "--seconds": "--time", "--benchmark-time": "--time", "--time": "--benchmark-time",
    "--target-device": "--deploy-isa", "--out": "--output", "--force": "--overwrite",
}  # fmt: skip


def with_namesake(error: click.NoSuchOption) -> click.NoSuchOption:
    """The error, which offers the option that does here what the one that was given does elsewhere."""
    meant = NAMESAKES.get(error.option_name)
    if error.ctx is not None and any(meant in option.opts for option in error.ctx.command.params):
        return click.NoSuchOption(error.option_name, f"{error.message} Did you mean {meant!r}?", ctx=error.ctx)
    return error


class App(click.Group):
    """A group that ends the process with our exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            print(error.format_message(), file=sys.stderr)
            code = error.exit_code
        except click.ClickException as error:
            if isinstance(error, click.NoSuchOption):
                error = with_namesake(error)
            print(f"error: {error.format_message()}", file=sys.stderr)
            code = error.exit_code
        except click.Abort:
            code = INTERRUPTED
        except BrokenPipeError:
            # The reader of stdout has closed it; closing it again at the end would raise.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        sys.exit(code or 0)


@click.group(cls=App, name="ovcalib", no_args_is_help=True)
@click.version_option(__version__, message="ovcalib %(version)s")
def app() -> None:
    """INT8 for OpenVINO without your data: convert, calibrate, quantize with NNCF, and prove the result."""


for module in (quantize, measure, sweep, catalogue, gan):
    module.add_to(app)


def main() -> None:
    """Run the command line; SIGTERM cleans up as Ctrl-C does."""
    waiting_since: float | None = None
    looking = False  # a thread will send the signal again
    main_thread = _thread.get_ident()

    def stop(number: int, frame: FrameType | None) -> None:
        # Libraries that are stopped in the middle of an import raise other errors, or end the process (nanobind).
        nonlocal waiting_since, looking
        waiting_since = waiting_since or time.monotonic()
        if importing(frame) and time.monotonic() < waiting_since + PATIENCE_S:
            if not looking:  # a second Ctrl-C waits with the first one
                looking = True
                _thread.start_new_thread(again, (number,))  # threading's own locks may be held here
            return
        waiting_since = None
        raise KeyboardInterrupt

    def again(number: int) -> None:
        nonlocal looking
        time.sleep(LOOK_S)
        looking = False
        if waiting_since is None:  # a second one has ended the wait
            return
        if hasattr(signal, "pthread_kill"):  # it also wakes up the main thread where that waits
            signal.pthread_kill(main_thread, number)
        else:
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
        signal.signal(signal.SIGINT, stop)
    app()


def importing(frame: FrameType | None) -> bool:
    """Whether a frame runs within an import statement."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False
