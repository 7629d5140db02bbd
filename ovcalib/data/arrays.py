"""npz and npy files, read within bounds: nothing is set aside for what a header announces before it is checked.

np.load trusts the header of each array, imports what an object array asks for if it is allowed to, and raises a dozen
unrelated types. Here an array has numbers, truth values or short texts, is no longer than the bytes that the file holds
for it, and fits into memory; whatever else a file holds is refused by name.
"""

from __future__ import annotations

import ast
import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ovcalib import machine
from ovcalib.errors import DataError, excerpt
from ovcalib.models.pickles import LOCKED

MAGIC = b"\x93NUMPY"
# numpy writes headers of 118 bytes; those of plain arrays are never much longer.
MAX_HEADER = 4096
MAX_SIDES = 8
MAX_ITEM_BYTES = 4096
# Photographs shrink to a third, drawings to a fiftieth; deflate alone can make a thousand bytes of one.
MAX_EXPANSION = 200
BLOCK = 1 << 20


@dataclass(frozen=True)
class Header:
    """What an array says of itself."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Npz:
    """An npz file, for a `with` block; headers and arrays are read when asked for.

    names    of the arrays
    raises   DataError that names the file and the array, also from `header` and `read`
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"There is no file {str(path)!r}.")
        with _damage_named(path):
            self.archive = zipfile.ZipFile(path)
            entries = {entry.filename: entry for entry in self.archive.infolist()}
        self.entries = {name.removesuffix(".npy"): entry for name, entry in entries.items() if name.endswith(".npy")}
        self.names = list(self.entries)
        if sum(entry.compress_size for entry in entries.values()) > path.stat().st_size:
            self.archive.close()
            raise DataError(f"{str(path)!r} is damaged: its parts overlap. Write it again with np.savez.")

    def __enter__(self) -> Npz:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.archive.close()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def held(self) -> str:
        """The names for a message."""
        return f"{', '.join(map(excerpt, self.names[:8]))}{', ...' if len(self.names) > 8 else ''}" or "nothing"

    def header(self, name: str) -> Header:
        """What array `name` is, from its first bytes."""
        with self._opened(name) as stream:
            return _header(stream)

    def read(self, name: str) -> NDArray[Any]:
        """Array `name`."""
        with self._opened(name) as stream:
            header = _header(stream)
            return _values(stream, header, self.entries[name].file_size - stream.tell())

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        entry = self.entries[name]
        with _damage_named(self.path, name):
            if entry.flag_bits & LOCKED:
                raise ValueError("it is encrypted")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"it is compressed by method {entry.compress_type}")
            if entry.file_size > MAX_EXPANSION * entry.compress_size + BLOCK:
                raise ValueError(f"it claims to expand from {entry.compress_size} to {entry.file_size} bytes")
            with self.archive.open(entry) as stream:
                yield stream


def read_npy(path: Path) -> NDArray[Any]:
    """The array of an npy file. Raises DataError."""
    with _damage_named(path), path.open("rb") as stream:
        return _values(stream, _header(stream), path.stat().st_size - stream.tell())


def _header(stream: IO[bytes]) -> Header:
    """The header at the start of a stream. Raises ValueError."""
    start = stream.read(8)
    if len(start) < 8 or start[:6] != MAGIC or start[6] not in (1, 2, 3):
        raise ValueError("it does not begin as an array does")
    form = "<H" if start[6] == 1 else "<I"
    announced = stream.read(struct.calcsize(form))
    (length,) = struct.unpack(form, announced)
    if length > MAX_HEADER:
        raise ValueError(f"its header of {length} bytes is longer than that of any array of numbers")
    text = stream.read(length).decode("latin-1")
    try:
        said = ast.literal_eval(text.strip())
        descr, fortran, shape = (said.pop(key) for key in ("descr", "fortran_order", "shape"))
        if said or type(descr) is not str or type(fortran) is not bool or type(shape) is not tuple:
            raise ValueError("fields")
        dtype = np.dtype(descr)
    except (ValueError, TypeError, SyntaxError, KeyError, AttributeError, MemoryError, RecursionError) as error:
        raise ValueError(f"its header {excerpt(text)!r} is not that of a plain array") from error
    if dtype.kind not in "biufSU" or not 0 < dtype.itemsize <= MAX_ITEM_BYTES:
        raise ValueError(f"it holds {excerpt(descr)}, but numbers were expected")
    if len(shape) > MAX_SIDES or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its shape is {excerpt(shape)}")
    return Header(dtype, shape, fortran)


def _values(stream: IO[bytes], header: Header, size: int) -> NDArray[Any]:
    """The array that follows its header in `size` bytes. Raises ValueError."""
    if header.nbytes != size:
        raise ValueError(f"its header announces {header.nbytes} bytes of {header}, but the file holds {size}")
    free = machine.free_memory_bytes()
    if free is not None and size > free:
        raise ValueError(f"it takes {size / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of memory are free")
    flat = np.empty(math.prod(header.shape), header.dtype)
    # Texts have no buffers of their own.
    view, position = flat.view(np.uint8), 0
    while position < size:
        block = stream.read(min(BLOCK, size - position))
        if not block:
            raise ValueError(f"it ends after {position} of {size} bytes")
        view[position : position + len(block)] = np.frombuffer(block, np.uint8)
        position += len(block)
    if stream.read(1):
        raise ValueError("it goes on behind its end")
    return flat.reshape(header.shape[::-1]).T if header.fortran else flat.reshape(header.shape)


@contextlib.contextmanager
def _damage_named(path: Path, name: str | None = None) -> Iterator[None]:
    """What zipfile, zlib and struct raise becomes an error that names the file."""
    try:
        yield
    except (
        OSError, ValueError, EOFError, RuntimeError, OverflowError, MemoryError, struct.error, zlib.error,
        zipfile.BadZipFile, zipfile.LargeZipFile,
    ) as error:  # fmt: skip
        array = "" if name is None else f"{excerpt(name)!r}: "
        raise DataError(
            f"{str(path)!r} is not a readable {path.suffix[1:] or 'npz'} file: {array}{excerpt(error)}. Write it again "
            "with np.savez."
        ) from error
