"""The command line. Results go to stdout, logs and progress to stderr; a command imports its function when chosen."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click

from ovcalib import __version__
from ovcalib.cli import catalogue, gan, measure, quantize, sweep
from ovcalib.cli.guard import INTERRUPTED


class App(click.Group):
    """A group that ends the process with our exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            print(error.format_message(), file=sys.stderr)
            code = error.exit_code
        except click.ClickException as error:
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

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    app()
