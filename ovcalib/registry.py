"""A table of names and "module:attribute", which is imported when it is first used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from ovcalib.errors import UnknownNameError, UsageError


class Registry:
    """Names of one kind, our own and those that installed packages add through an entry-point group."""

    def __init__(self, kind: str, group: str, table: dict[str, str]) -> None:
        self.kind = kind
        self.table = {**{e.name: e.value for e in entry_points(group=group)}, **table}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.table))

    def check(self, name: str) -> None:
        """Raise UnknownNameError, with the nearest name, where there is no such name."""
        if name not in self.table:
            raise UnknownNameError(self.kind, name, self.table)

    def __getitem__(self, name: str) -> Any:
        """The module or attribute behind a name. Raises UnknownNameError."""
        self.check(name)
        module, _, attribute = self.table[name].partition(":")
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f"The {self.kind} {name!r} needs the package {error.name!r}, which is not installed. "
                "Install it with: pip install 'ovcalib[quantize]'"
            ) from error
        return getattr(loaded, attribute) if attribute else loaded
