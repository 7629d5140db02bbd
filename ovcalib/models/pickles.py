"""Files that torch.save or pickle wrote, read without running anything that they hold.

A pickle is a program that may import and call whatever it names. Here a small machine walks through its instructions
instead. It knows those that tensors, numbers, texts and containers need and no others, and it has no way to import or
call: names of functions stay names, and each of the few that occur is read as the data it stands for. Whatever else a
file asks for is refused by name. Instructions, bytes, copies and sizes are bounded before memory is set aside, so a
small file costs little, whatever it claims.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ovcalib import machine
from ovcalib.errors import ModelError, excerpt

if TYPE_CHECKING:
    import torch

MAX_INSTRUCTIONS = 500_000
MAX_DEPTH = 16
MAX_NAME = 1000
# Flags of a part of a zip file: encrypted, patched, strongly encrypted.
LOCKED = 0x1 | 0x20 | 0x40
# Tensors may share their values; all of them together are at most so many times as large as what is stored.
MAX_SHARING = 4
SLACK_BYTES = 1 << 24

INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINPUT LONG_BINPUT MEMOIZE BINGET "
    "LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID".split()
)
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
# What a pickle calls the values of a storage, and what torch and numpy do.
STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    }.items()
}  # fmt: skip
DTYPES = frozenset(f"torch {dtype}" for dtype in STORAGES.values())
SCALARS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "?"}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class RefusedError(ModelError):
    """A file that asks for something outside its format, or contradicts itself."""


# The machine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A global that the pickle refers to; nothing is imported for it."""

    text: str


@dataclass(frozen=True)
class Blob:
    """The bytes of a tensor's storage, in the old format of torch.save."""

    data: bytes = field(repr=False)


@dataclass(frozen=True)
class StorageReference:
    """What a pickle says about a storage outside itself."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor, decoded when asked for."""

    storage: Blob | StorageReference
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def check(self, stored: int) -> None:
        """Raise RefusedError where the values do not lie in a storage of so many."""
        count = math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        # A stride of zero would let a few bytes claim any size.
        if self.offset < 0 or min(self.stride, default=0) < 0 or count > stored or (count and last >= stored):
            shape = excerpt(list(self.size))
            raise RefusedError(f"It holds a tensor of shape {shape} that does not lie in its {stored} stored values.")

    def array(self, storage: NDArray[Any]) -> NDArray[Any]:
        """The values, copied from the content of the storage. Raises RefusedError where they lie outside of it."""
        self.check(len(storage))
        if math.prod(self.size) == 0:
            return np.zeros(self.size, storage.dtype)
        steps = tuple(step * storage.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.size, steps).copy()


class _DType:
    """numpy.dtype under construction; only its name counts."""

    def __init__(self, code: str) -> None:
        self.code = code


MARK = object()
# What decoding raises for a file that is not what it seems.
DAMAGE = (ValueError, IndexError, KeyError, TypeError, MemoryError, RecursionError, OverflowError, struct.error)


def interpret(
    stream: BinaryIO,
    size: int,
    functions: Mapping[str, Callable[..., Any]],
    names: frozenset[str] = frozenset(),
    persistent: bool = False,
    needed_by: str = "file of tensors",
) -> Any:
    """The value of one pickle, read as data.

    stream       at the start of the pickle; afterwards behind its end
    size         bytes of the stream; nothing longer is ever read
    functions    what the names in the pickle stand for
    names        further names that may stand in it as they are
    persistent   whether the pickle may refer to storages outside itself
    needed_by    the kind of file, for messages
    raises       RefusedError for any other name or instruction, and for damage
    """
    try:
        return _Machine(functions, names, persistent, needed_by, size).run(_instructions(_Bounded(stream, size)))
    except DAMAGE as error:
        raise RefusedError(f"It is truncated or damaged ({type(error).__name__}: {excerpt(error)}).") from error


class _Machine:
    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        names: frozenset[str],
        persistent: bool,
        needed_by: str,
        size: int,
    ) -> None:
        self.functions, self.names, self.persistent, self.needed_by = functions, names, persistent, needed_by
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Applied again and again to the same large value, even harmless functions take for ever.
        self.items_left, self.bytes_left = MAX_INSTRUCTIONS, 2 * size

    def pop_to_mark(self) -> list[Any]:
        stack = self.stack
        for position in range(len(stack) - 1, -1, -1):
            if stack[position] is MARK:
                found = stack[position + 1 :]
                del stack[position:]
                return found
        raise RefusedError("It is damaged: a mark is missing.")

    def name(self, text: str) -> Name:
        if text not in self.functions and text not in STORAGES and text not in self.names:
            raise RefusedError(f"It refers to {excerpt(text)!r}, which no {self.needed_by} needs.{_advice(text)}")
        return Name(text)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or function.text not in self.functions or not isinstance(arguments, tuple):
            raise RefusedError("It is damaged: something is applied that is no function.")
        self.items_left -= sum(len(a) for a in arguments if isinstance(a, list | tuple | dict | set))
        self.bytes_left -= sum(len(a) for a in arguments if isinstance(a, str | bytes))
        if min(self.items_left, self.bytes_left) < 0:
            raise RefusedError("It works on more data than it holds.")
        return self.functions[function.text](*arguments)

    def container(self, kind: type[Any]) -> Any:
        if type(self.stack[-1]) is not kind:
            raise RefusedError(f"It is damaged: a {type(self.stack[-1]).__name__} is used as a {kind.__name__}.")
        return self.stack[-1]

    def build(self, state: Any) -> None:
        """Set the state of the object on top: of a number type it is the byte order, of a dictionary nothing counts."""
        match self.stack[-1]:
            case dict() if isinstance(state, dict):  # `_metadata` of a state dict, which loading does not need
                return
            case _DType() if isinstance(state, tuple) and state[1:2] in (("<",), ("|",)):
                return
        raise RefusedError("It sets the state of an object other than a little-endian number type.")

    def run(self, instructions: Iterator[tuple[str, Any, int]]) -> Any:
        stack, memo = self.stack, self.memo
        for executed, (instruction, argument, position) in enumerate(instructions):
            if executed > MAX_INSTRUCTIONS:
                raise RefusedError(f"It has more than {MAX_INSTRUCTIONS} instructions.")
            match instruction:
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    stack.append(MARK)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction])
                case (
                    "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINSTRING" | "SHORT_BINSTRING"
                    | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
                ):  # fmt: skip
                    stack.append(argument)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(instruction[-1])
                    values = tuple(stack[-count:])
                    del stack[-count:]
                    stack.append(values)
                case "TUPLE":
                    stack.append(tuple(self.pop_to_mark()))
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND":
                    value = stack.pop()
                    self.container(list).append(value)
                case "APPENDS":
                    items = self.pop_to_mark()
                    self.container(list).extend(items)
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self.container(dict)[_key(key)] = value
                case "SETITEMS":
                    items = self.pop_to_mark()
                    target = self.container(dict)
                    target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
                case "EMPTY_SET":
                    stack.append(set())
                case "ADDITEMS":
                    items = self.pop_to_mark()
                    self.container(set).update(map(_key, items))
                case "GLOBAL":
                    stack.append(self.name(argument))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(self.name(f"{_text(module)} {_text(attribute)}"))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(self.call(function, arguments))
                case "BUILD":
                    self.build(stack.pop())
                case "BINPERSID" if self.persistent:
                    stack.append(_storage_reference(stack.pop()))
                case "PROTO":
                    if argument not in (2, 3, 4):
                        raise RefusedError(f"It is a pickle of protocol {argument}; expected 2, 3 or 4.")
                case "FRAME":
                    pass
                case "STOP":
                    (value,) = stack
                    return value
                case other:
                    raise RefusedError(
                        f"It has the instruction {other} at byte {position}, which no {self.needed_by} needs."
                    )
        raise RefusedError("It ends in the middle.")


def _instructions(stream: _Bounded) -> Iterator[tuple[str, Any, int]]:
    """Name, argument and position of each instruction. Arguments of unknown instructions are not even decoded."""
    while True:
        position, code = stream.tell(), stream.read(1)
        if not code:
            return
        opcode = OPCODES.get(code.decode("latin-1"))
        if opcode is None or opcode.name not in INSTRUCTIONS:
            name = f"0x{code.hex()}" if opcode is None else opcode.name
            raise RefusedError(f"It has the instruction {name} at byte {position}, which is not one of plain data.")
        yield opcode.name, None if opcode.arg is None else opcode.arg.reader(stream), position  # type: ignore[arg-type]


class _Bounded:
    """A stream that never hands out, or sets memory aside for, more than the file holds."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def read(self, count: int) -> bytes:
        if count > self.size:
            raise RefusedError(f"It announces {count} bytes but the file has {self.size}: it is truncated or damaged.")
        return self.stream.read(count)

    def readline(self) -> bytes:
        return self.stream.readline(4096)  # only the names of globals are read by line

    def tell(self) -> int:
        return self.stream.tell()


def _key(value: Any) -> Any:
    # Large integers and floats could be chosen so that all of them collide.
    if not (value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**60)):
        raise RefusedError(f"It uses a {type(value).__name__} as a key.")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise RefusedError(f"It has the name {excerpt(value)!r}.")
    return value


def _advice(text: str) -> str:
    if text.startswith("dnnlib.tflib"):
        return " This is a snapshot of the TensorFlow version; convert it with the official legacy.py first."
    return " Nothing was executed; do not load this file elsewhere."


# What the names stand for ---------------------------------------------------------------------


def ordered_dict(*items: Any) -> dict[Any, Any]:
    if items and not (len(items) == 1 and isinstance(items[0], list)):
        raise RefusedError("It builds a dictionary from something else than pairs.")
    return {_key(key): value for key, value in (items[0] if items else [])}


def _counter(items: Any = None) -> dict[Any, Any]:
    if items is not None and not isinstance(items, dict):
        raise RefusedError("It builds a counter from something else than a dictionary.")
    return dict(items or {})


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise RefusedError("It builds a set from something else than a list.")
    return set(map(_key, items))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> LazyTensor:
    whole = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DEPTH
    if not isinstance(storage, Blob | StorageReference) or not whole:
        raise RefusedError("It holds a tensor without storage, shape or strides.")
    if not all(type(n) is int and abs(n) < 2**62 for n in (offset, *size, *stride)):
        raise RefusedError("It holds a tensor without storage, shape or strides.")
    if min(size, default=0) < 0:
        raise RefusedError(f"It holds a tensor of shape {excerpt(list(size))}.")
    return LazyTensor(storage, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> LazyTensor:
    if not isinstance(data, LazyTensor):
        raise RefusedError("It holds a parameter that is no tensor.")
    return data


def _blob(data: Any) -> Blob:
    if not isinstance(data, bytes):
        raise RefusedError("It holds a storage that is not made of bytes.")
    return Blob(data)


def _size(sides: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sides, tuple | list):
        raise RefusedError("It holds a size that is no tuple.")
    return tuple(sides)


def _device(name: Any, *rest: Any) -> str:
    return _text(name)


def _dtype(code: Any, *rest: Any) -> _DType:
    if not isinstance(code, str) or code not in SCALARS:
        raise RefusedError(f"It holds numbers of the type {excerpt(code)}; expected one of {', '.join(SCALARS)}.")
    return _DType(code)


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise RefusedError("It holds a number without type or value.")
    layout = SCALARS[dtype.code]
    if len(data) != struct.calcsize(layout):
        raise RefusedError(f"It holds a number of type {dtype.code} in {len(data)} bytes.")
    return struct.unpack(layout, data)[0]


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise RefusedError("It makes bytes of something else than text.")
    return b""  # how protocol 2 writes it


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"It encodes text as {excerpt(encoding)}.")
    return text.encode("latin-1")  # how protocol 2 writes bytes


NOTHING: dict[str, Callable[..., Any]] = {}
# Of numbers, texts and containers.
PLAIN: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": ordered_dict,
    "collections Counter": _counter,
    "builtins set": _set,
    "__builtin__ set": _set,
    "numpy dtype": _dtype,
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
    "_codecs encode": _encode,
    "builtins bytes": _no_bytes,
    "__builtin__ bytes": _no_bytes,
}
TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
TORCH: dict[str, Callable[..., Any]] = {**PLAIN, **TENSORS, "torch Size": _size, "torch device": _device}
# A tensor within a pickle, as in the snapshots of StyleGAN2-ADA.
EMBEDDED: dict[str, Callable[..., Any]] = {**PLAIN, **TENSORS, "torch.storage _load_from_bytes": _blob}


def _storage_reference(value: Any) -> StorageReference:
    match value:
        case ("storage", Name(text), str(key), str(), int(count), *_) if text in STORAGES and 0 <= count < 2**48:
            return StorageReference(STORAGES[text], _text(key), count)
    raise RefusedError("It refers to a storage of an unknown kind.")


# Files of torch.save --------------------------------------------------------------------------


def read_torch(path: Path, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote: tensors, on a device, numbers, texts and containers of them.

    raises   RefusedError for a file that is damaged, or that holds anything else; nothing is executed
    """
    try:
        refuse_larger_than_memory(path)
        with path.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            read = _read_zip if start == b"PK\x03\x04" else _read_legacy
            return read(stream, path.stat().st_size, device)
    except OSError as error:
        raise RefusedError(f"{str(path)!r} cannot be read: {error.strerror or excerpt(error)}.") from error
    except RefusedError as error:
        raise RefusedError(
            f"{str(path)!r} is damaged, or holds more than tensors and was not loaded, because loading it could run "
            f"code. {error} Save the state dict alone: torch.save(model.state_dict(), FILE)."
        ) from None


def refuse_larger_than_memory(path: Path) -> None:
    """Raise RefusedError for a file that does not fit into the memory that is free."""
    size, free = path.stat().st_size, machine.free_memory_bytes()
    if free is not None and size > free:
        raise RefusedError(
            f"{str(path)!r} has {size / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of memory are free. Free some."
        )


def _read_zip(stream: BinaryIO, size: int, device: torch.device | str) -> Any:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            packed = [
                e.filename for e in entries.values() if e.compress_type != zipfile.ZIP_STORED or e.flag_bits & LOCKED
            ]
            if packed:
                raise RefusedError(
                    f"Its part {excerpt(packed[0])!r} is compressed or encrypted, as torch.save writes none."
                )
            if sum(entry.file_size for entry in entries.values()) > size:
                raise RefusedError("Its parts overlap.")
            programs = [name for name in entries if name.endswith("/data.pkl")]
            if len(programs) != 1:
                raise RefusedError(f"It has {len(programs)} parts data.pkl; expected one, as torch.save writes.")
            root = programs[0].removesuffix("data.pkl")
            order = f"{root}byteorder"
            if order in entries and entries[order].file_size < 10 and archive.read(entries[order]) != b"little":
                raise RefusedError("It is big-endian.")
            program = archive.read(entries[programs[0]])
            tree = interpret(io.BytesIO(program), len(program), TORCH, DTYPES, True, "state dict")

            def load(reference: StorageReference) -> bytearray:
                name = f"{root}data/{reference.key}"
                if name not in entries:
                    raise RefusedError(f"Its part {excerpt(name)!r} is missing.")
                return bytearray(archive.read(entries[name]))

            return _with_tensors(tree, load, size, device)
    except (OSError, ValueError, EOFError, RuntimeError, OverflowError, struct.error, zipfile.BadZipFile) as error:
        raise RefusedError(f"It is truncated or damaged ({excerpt(error)}).") from error


def _read_legacy(stream: BinaryIO, size: int, device: torch.device | str) -> Any:
    """The old format: magic, version, system, content and storage keys as pickles, then the storages."""
    magic, protocol, system = (interpret(stream, size, NOTHING, needed_by="state dict") for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise RefusedError("It is none of the formats of torch.save.")
    if system.get("little_endian") is False:
        raise RefusedError("It is big-endian.")
    tree = interpret(stream, size, TORCH, DTYPES, True, "state dict")
    keys = interpret(stream, size, NOTHING, needed_by="state dict")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise RefusedError("It does not list its storages.")
    wanted: dict[str, StorageReference] = {}
    for reference in _references(tree):
        if wanted.setdefault(reference.key, reference) != reference:
            raise RefusedError(f"Its storage {excerpt(reference.key)!r} is described in two ways.")
    storages = {}
    for key in keys:
        if key not in wanted:
            raise RefusedError(f"Its storage {excerpt(key)!r} belongs to no tensor.")
        length = wanted[key].count * itemsize(wanted[key].dtype)
        head, data = stream.read(8), stream.read(min(length, size))
        if len(head) < 8 or struct.unpack("<q", head)[0] != wanted[key].count or len(data) != length:
            raise RefusedError("It is truncated or damaged: a storage is too short.")
        storages[key] = bytearray(data)
    if wanted.keys() - storages.keys():
        raise RefusedError(f"Its storage {excerpt(min(wanted.keys() - storages.keys()))!r} is missing.")
    return _with_tensors(tree, lambda reference: storages[reference.key], size, device)


def itemsize(dtype: str) -> int:
    return {"bool": 1, "bfloat16": 2}.get(dtype) or np.dtype(dtype).itemsize


def _leaves(tree: Any) -> Iterator[Any]:
    """Everything in nested containers, of bounded depth and number. Raises RefusedError."""
    left, stack = MAX_INSTRUCTIONS, [(tree, 0)]
    while stack:
        value, depth = stack.pop()
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        left -= 1 + len(children)
        if left < 0 or depth > MAX_DEPTH:
            raise RefusedError("Its containers hold each other too often or too deep.")
        stack.extend((child, depth + 1) for child in children)
        yield value


def _references(tree: Any) -> Iterator[StorageReference]:
    for value in _leaves(tree):
        if isinstance(value, LazyTensor) and isinstance(value.storage, StorageReference):
            yield value.storage


def _with_tensors(
    tree: Any, load: Callable[[StorageReference], bytearray], size: int, device: torch.device | str
) -> Any:
    """Nested containers with tensors in place of their descriptions.

    load   gives the bytes of a storage, which are kept
    size   bytes of the file
    """
    import torch

    claimed = sum(
        math.prod(value.size) * itemsize(value.storage.dtype)
        for value in _leaves(tree)
        if isinstance(value, LazyTensor) and isinstance(value.storage, StorageReference)
    )
    if claimed > MAX_SHARING * size + SLACK_BYTES:
        raise RefusedError(f"Its tensors claim {claimed} bytes, but the file has {size}.")
    storages: dict[StorageReference, torch.Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(convert, value))
        if not isinstance(value, LazyTensor):
            return value
        reference = value.storage
        assert isinstance(reference, StorageReference)
        if reference not in storages:
            data, kind = load(reference), getattr(torch, reference.dtype)
            if len(data) != reference.count * itemsize(reference.dtype):
                raise RefusedError(f"It holds a storage of {reference.count} values in {len(data)} bytes.")
            storages[reference] = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
        value.check(reference.count)
        return storages[reference].as_strided(value.size, value.stride, value.offset).to(device)

    return convert(tree)


def read_storage(data: bytes) -> NDArray[Any]:
    """The values of a storage in the old format of torch.save: five pickles, then the raw numbers."""
    stream = io.BytesIO(data)
    magic, protocol, system, reference, keys = (
        interpret(stream, len(data), NOTHING, persistent=True, needed_by="storage") for _ in range(5)
    )
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise RefusedError("It holds a storage in a format that is not the old one of torch.save.")
    if not isinstance(reference, StorageReference) or keys != [reference.key] or system.get("little_endian") is False:
        raise RefusedError("It holds a storage that does not describe itself, or is big-endian.")
    if reference.dtype == "bfloat16":
        raise RefusedError("It holds a storage of bfloat16.")
    dtype = np.dtype(reference.dtype).newbyteorder("<")
    rest = memoryview(data)[stream.tell() :]
    if len(rest) != 8 + reference.count * dtype.itemsize or struct.unpack("<q", rest[:8])[0] != reference.count:
        raise RefusedError(
            f"It holds a storage of {reference.count} values in {max(len(rest) - 8, 0)} bytes: truncated or damaged."
        )
    return np.frombuffer(rest, dtype, offset=8)


@contextlib.contextmanager
def refusals_named(path: Path, what: str) -> Iterator[None]:
    """A refusal becomes one that names the file."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"The {what} {str(path)!r} was refused. {error}") from None
