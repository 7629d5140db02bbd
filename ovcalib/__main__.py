"""The entry point of `ovcalib` and of `python -m ovcalib`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from ovcalib.cli.app import main as run
    except KeyboardInterrupt:  # the imports take long enough to be interrupted
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
