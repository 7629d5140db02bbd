"""The exceptions of ovcalib.

    OvcalibError                      exit code 1
      UsageError                      2   an option or its value
        UnknownNameError              2   an unknown name
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
import reprlib
from collections.abc import Iterable, Sequence
from types import ModuleType

# No message is longer, whatever it quotes.
MAX_MESSAGE = 4000


class _Short(reprlib.Repr):
    """Reprs whose cost does not grow with what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxset, self.maxfrozenset = 3, 4, 4, 4
        self.maxtuple = self.maxlist = 8
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[: self.maxstring])


brief = _Short().repr


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """Text that a terminal shows and does not act upon: line breaks stay, other control characters are escaped."""
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def excerpt(value: object) -> str:
    """What a message quotes of a file or a library: one short line without control characters.

    value   text; an error, of which the first line counts; or anything else, of which the beginning of its repr does
    """
    if not isinstance(value, str | BaseException):
        return printable(brief(value))
    try:
        text = str(value).strip()
    except Exception:  # the class of the error is the user's
        text = ""
    return printable(text.splitlines()[0] if text else type(value).__name__, 300)


class OvcalibError(Exception):
    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after which something is kept.

    kept     what, and where
    more     options that the same command needs to go on from there
    """

    def __init__(self, kept: str, more: Sequence[str] = ()) -> None:
        self.kept, self.more = kept, more
        super().__init__(kept)


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C or SIGTERM led to an error: a library that is stopped in the middle of an import raises others."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        if isinstance(found, KeyboardInterrupt):
            return True
        seen.add(id(found))
        waiting += [found.__cause__, found.__context__]
    return False


class UsageError(OvcalibError):
    exit_code = 2


class ModelError(OvcalibError):
    exit_code = 3


class DataError(OvcalibError):
    exit_code = 4


class DeviceError(OvcalibError):
    exit_code = 6


class UnknownNameError(UsageError):
    """An unknown name, with the nearest known one."""

    def __init__(self, kind: str, name: str, known: Iterable[str], origin: str = "") -> None:
        self.name, self.known = name, sorted(known)
        near = difflib.get_close_matches(name[:80].lower(), self.known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        unknown = f"{origin}unknown" if origin else "Unknown"
        super().__init__(f"{unknown} {kind} {brief(name)}.{hint} Available: {', '.join(self.known)}.")


class InvalidOptionError(UsageError):
    """A value that an argument does not take.

    Rendered for Python here; the command line shows `field` as its flag.
    """

    def __init__(self, field: str, value: object, reason: str, origin: str = "") -> None:
        self.field, self.value, self.reason, self.origin = field, value, reason, origin
        given = "" if value is None else f"={brief(value)}"
        super().__init__(f"{origin}{field}{given}: {reason}.")


class MissingDependencyError(UsageError):
    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'ovcalib[{extra}]'"
        )


# The extra that brings each optional package.
EXTRAS = {
    **dict.fromkeys(
        (
            "datumaro",
            "fsspec",
            "nncf",
            "onnx",
            "onnxscript",
            "pycocotools",
            "safetensors",
            "scipy",
            "torch",
            "torchvision",
        ),
        "quantize",
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
