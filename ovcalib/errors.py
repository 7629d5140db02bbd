"""Everything that ovcalib raises on purpose.

    OvcalibError                      exit code 1
      UsageError                      2   an option or its value
        UnknownNameError              2   a name that no table holds
        InvalidOptionError            2   a value that an argument does not take
        MissingDependencyError        2   an optional package that is not installed
      ModelError                      3   the model cannot be read, converted or quantized
      DataError                       4   calibration or evaluation data
      DeviceError                     6   a device is missing, or devices disagree

Exit codes 5 (goal missed) and 7 (budget reached) are outcomes of a run that wrote its best result,
not errors. A message says what happened with the value, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from types import ModuleType


class OvcalibError(Exception):
    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after which something is kept.

    kept     what, and where
    more     options that the same command needs to go on from there
    """

    def __init__(self, kept: str, more: Sequence[str] = ()) -> None:
        self.kept, self.more = kept, more
        super().__init__(kept)


class UsageError(OvcalibError):
    exit_code = 2


class ModelError(OvcalibError):
    exit_code = 3


class DataError(OvcalibError):
    exit_code = 4


class DeviceError(OvcalibError):
    exit_code = 6


class UnknownNameError(UsageError):
    """A name outside a table, with the nearest name that the table holds."""

    def __init__(self, kind: str, name: str, known: Iterable[str], origin: str = "") -> None:
        self.name, self.known = name, sorted(known)
        near = difflib.get_close_matches(name.lower(), self.known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        unknown = f"{origin}unknown" if origin else "Unknown"
        super().__init__(f"{unknown} {kind} {name!r}.{hint} Available: {', '.join(self.known)}.")


class InvalidOptionError(UsageError):
    """A value that an argument does not take.

    Rendered for Python here; the command line shows `field` as its flag.
    """

    def __init__(self, field: str, value: object, reason: str, origin: str = "") -> None:
        self.field, self.value, self.reason, self.origin = field, value, reason, origin
        given = "" if value is None else f"={_short(value)}"
        super().__init__(f"{origin}{field}{given}: {reason}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class MissingDependencyError(UsageError):
    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'ovcalib[{extra}]'"
        )


# The extra that brings each optional package.
EXTRAS = {
    **dict.fromkeys(
        ("datumaro", "nncf", "onnx", "onnxscript", "safetensors", "scipy", "torch", "torchvision"), "quantize"
    ),
    "timm": "timm",
    "onnxruntime": "parity",
    **dict.fromkeys(("sklearn", "torch_fidelity"), "gan"),
    **dict.fromkeys(("dask", "distributed"), "dask"),
}


def require_installed(packages: Iterable[str], purpose: str) -> None:
    """Raise MissingDependencyError for the first optional package that is not installed, without importing any."""
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ImportError:
            found = None
        if found is None:
            raise MissingDependencyError(package, EXTRAS[package], purpose)


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(package, extra, purpose) from error
