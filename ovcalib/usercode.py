"""Code of the user's own, by reference: `package.module:attribute`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from traceback import TracebackException
from typing import Any

from ovcalib.errors import OvcalibError, UsageError, brief, excerpt

MAX_REFERENCE = 300
MAX_FRAMES = 12


def load_reference(reference: str, kind: str, failure: type[OvcalibError], expected: str) -> Any:
    """The attribute that a reference names, importable from the current folder too.

    kind       what it is, for messages
    failure    of the user's code while it is imported
    expected   a sentence that says what a reference looks like
    raises     UsageError for a reference that names nothing
    """
    module_name, _, attribute = reference.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)) or len(reference) > MAX_REFERENCE:
        raise UsageError(f"{brief(reference)} is not a {kind} reference. {expected}")
    with users_code(reference, failure):
        module = _imported(module_name, reference, kind, failure, expected)
        if not hasattr(module, attribute):
            raise UsageError(f"The module {module_name!r} has no {attribute!r}.")
        return getattr(module, attribute)


def _imported(name: str, reference: str, kind: str, failure: type[OvcalibError], expected: str) -> Any:
    sys.path.insert(0, "")  # a factory.py in the current folder, as `python -m` would find it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise failure(f"{reference!r} needs the package {error.name!r}, which is not installed.") from error
        raise UsageError(f"There is no module {name!r} for the {kind} {reference!r}. {expected}") from error
    finally:
        with suppress(ValueError):  # the module may have changed the path
            sys.path.remove("")


@contextmanager
def users_code(reference: str, failure: type[OvcalibError]) -> Iterator[None]:
    """Run code of the user's: what it prints goes to stderr, and what it raises becomes a `failure`.

    Its message ends with the traceback of the user's lines, which is where the mistake is.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (OvcalibError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit
        trace = TracebackException.from_exception(error, limit=-MAX_FRAMES)
        ours = (str(Path(__file__).parent), "<frozen importlib", importlib.__file__)
        trace.stack[:] = [frame for frame in trace.stack if not frame.filename.startswith(ours)]
        raise failure(
            f"{reference!r} failed with {type(error).__name__}: {excerpt(error)}.\n{''.join(trace.format(chain=False))}"
        ) from error
