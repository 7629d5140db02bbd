"""Reading official StyleGAN2-ADA snapshots without executing them.

A snapshot is a pickle that embeds the source code of its networks, and the official loader executes it. Here a small
machine walks through the pickle's instructions instead. It knows the instructions that snapshots need and no others,
and it has no way to import or call: names of functions stay names, and each of the few that occur is read as the
data it stands for. Embedded source is dropped unread. Storages are read by the same machine, so `torch.load`
has no part in it either. Whatever else a file asks for is refused by name.

What comes out is checked - shapes against the settings, finiteness - and is written once to safetensors.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import pickletools
import reprlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.sets import cache_dir
from ovcalib.errors import ModelError
from ovcalib.rundir import file_sha256, write_atomically

if TYPE_CHECKING:
    from torch import nn

    from ovcalib.gan.sampling import Drawer, ZDistribution
    from ovcalib.gan.stylegan2 import Discriminator, Generator, NoiseMode

MAX_BYTES = 4 * 2**30
MAX_INSTRUCTIONS = 5_000_000
MAX_MODULES = 2_000
MAX_TENSORS = 10_000
MAX_DEPTH = 16
FORMAT = "ovcalib-stylegan2-ada"
PERSISTENCE_VERSION = 6

CLASSES = frozenset(
    "Generator MappingNetwork SynthesisNetwork SynthesisBlock SynthesisLayer ToRGBLayer FullyConnectedLayer "
    "Discriminator DiscriminatorBlock DiscriminatorEpilogue Conv2dLayer MinibatchStdLayer AugmentPipe".split()
)
INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL "
    "REDUCE NEWOBJ BUILD BINPERSID".split()
)
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
STORAGES = {
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch DoubleStorage": "<f8",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch BoolStorage": "?",
}
SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "?"}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class RefusedError(ModelError):
    """A snapshot that asks for something outside the format, or contradicts itself."""


# The machine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A global that the pickle refers to; nothing is imported for it."""

    text: str


@dataclass
class Record:
    """A network of the snapshot: the class's name and the attributes, without the source."""

    class_name: str
    state: dict[Any, Any]


@dataclass(frozen=True)
class Blob:
    """The bytes of a tensor's storage, in the old format of torch.save."""

    data: bytes


@dataclass(frozen=True)
class StorageReference:
    """What a blob says about its storage."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of the snapshot, decoded when asked for."""

    blob: Blob
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, storage: NDArray[Any]) -> NDArray[Any]:
        """The values, copied from the content of the blob. Raises RefusedError where they lie outside of it."""
        count = math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        # A stride of zero would let a few bytes claim any size.
        if (
            self.offset < 0
            or min(self.stride, default=0) < 0
            or count > len(storage)
            or (count and last >= len(storage))
        ):
            raise RefusedError(
                f"It holds a tensor of shape {list(self.size)} that does not lie in its {len(storage)} stored values."
            )
        if count == 0:
            return np.zeros(self.size, storage.dtype)
        steps = tuple(step * storage.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.size, steps).copy()


class _DType:
    """numpy.dtype under construction; only its name counts."""

    def __init__(self, code: str) -> None:
        self.code = code


MARK = object()


def interpret(
    stream: BinaryIO, size: int, functions: Mapping[str, Callable[..., Any]], persistent: bool = False
) -> Any:
    """The value of one pickle, read as data.

    stream       at the start of the pickle; afterwards behind its end
    size         bytes of the stream; nothing longer is ever read
    functions    what the names in the pickle stand for
    persistent   whether the pickle may refer to storages outside itself
    raises       RefusedError for any other name or instruction
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        for position in range(len(stack) - 1, -1, -1):
            if stack[position] is MARK:
                found = stack[position + 1 :]
                del stack[position:]
                return found
        raise RefusedError("It is damaged: a mark is missing.")

    def name(text: str) -> Name:
        if text not in functions and text not in STORAGES:
            raise RefusedError(f"It refers to {_shown(text)}, which no snapshot of StyleGAN2-ADA needs.{_advice(text)}")
        return Name(text)

    spent = 0

    def call(function: Any, arguments: Any) -> Any:
        nonlocal spent
        if not isinstance(function, Name) or function.text not in functions or not isinstance(arguments, tuple):
            raise RefusedError("It is damaged: something is applied that is no function.")
        # Functions applied repeatedly to one large value could take unbounded time.
        spent += sum(len(a) for a in arguments if isinstance(a, str | bytes | list | tuple | dict))
        if spent > 8 * size:
            raise RefusedError("It works on more data than it holds.")
        return functions[function.text](*arguments)

    for executed, (instruction, argument, position) in enumerate(_instructions(_Bounded(stream, size))):
        if executed > MAX_INSTRUCTIONS:
            raise RefusedError(f"It has more than {MAX_INSTRUCTIONS} instructions.")
        match instruction:
            case "PROTO":
                if argument not in (2, 3, 4):
                    raise RefusedError(f"It is a pickle of protocol {argument}; expected 2, 3 or 4.")
            case "FRAME":
                pass
            case "STOP":
                (value,) = stack
                return value
            case "MARK":
                stack.append(MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction])
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
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
                stack.append(tuple(pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                value = stack.pop()
                _container(stack, list).append(value)
            case "APPENDS":
                items = pop_to_mark()
                _container(stack, list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _container(stack, dict)[_key(key)] = value
            case "SETITEMS":
                items = pop_to_mark()
                target = _container(stack, dict)
                target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
            case "EMPTY_SET":
                stack.append(set())
            case "ADDITEMS":
                items = pop_to_mark()
                _container(stack, set).update(map(_key, items))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(name(argument))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(name(f"{module} {attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(call(function, arguments))
            case "BUILD":
                state = stack.pop()
                if (
                    not isinstance(stack[-1], _DType)
                    or not isinstance(state, tuple)
                    or state[1:2] not in (("<",), ("|",))
                ):
                    raise RefusedError("It sets the state of an object other than a little-endian number type.")
            case "BINPERSID" if persistent:
                stack.append(_storage_reference(stack.pop()))
            case other:
                raise RefusedError(f"It has the instruction {other} at byte {position}, which no snapshot needs.")
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
            raise RefusedError(f"It has the instruction {name} at byte {position}, which no snapshot needs.")
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


def _container(stack: list[Any], kind: type[Any]) -> Any:
    if type(stack[-1]) is not kind:
        raise RefusedError(f"It is damaged: a {type(stack[-1]).__name__} is used as a {kind.__name__}.")
    return stack[-1]


def _key(value: Any) -> Any:
    # Large integers and floats could be chosen so that all of them collide.
    if not (value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**31)):
        raise RefusedError(f"It uses a {type(value).__name__} as a key.")
    return value


def _shown(value: Any) -> str:
    """A value of the file in a message: short, whatever it is."""
    return reprlib.repr(value)


def _advice(text: str) -> str:
    if text.startswith("dnnlib.tflib"):
        return " This is a snapshot of the TensorFlow version; convert it with the official legacy.py first."
    return " Nothing was executed; do not load this file elsewhere."


# What the names stand for ---------------------------------------------------------------------


def _persistent_object(meta: Any) -> Record:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise RefusedError("It holds a network that is not described as one.")
    if meta.get("version") != PERSISTENCE_VERSION:
        raise RefusedError(
            f"It describes its networks in version {_shown(meta.get('version'))}; expected {PERSISTENCE_VERSION}."
        )
    if not isinstance(meta.get("class_name"), str) or meta["class_name"] not in CLASSES:
        raise RefusedError(
            f"It holds a {_shown(meta.get('class_name'))}, which is no part of StyleGAN2-ADA. "
            f"Expected {', '.join(sorted(CLASSES))}."
        )
    return Record(meta["class_name"], meta["state"])


def _ordered_dict(*items: Any) -> dict[Any, Any]:
    if items and not (len(items) == 1 and isinstance(items[0], list)):
        raise RefusedError("It builds a dictionary from something else than pairs.")
    return {_key(key): value for key, value in (items[0] if items else [])}


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise RefusedError("It builds a set from something else than a list.")
    return set(map(_key, items))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> LazyTensor:
    whole = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DEPTH
    if not isinstance(storage, Blob) or not whole or not all(type(n) is int for n in (offset, *size, *stride)):
        raise RefusedError("It holds a tensor without storage, shape or strides.")
    if min(size, default=0) < 0:
        raise RefusedError(f"It holds a tensor of shape {list(size)}.")
    return LazyTensor(storage, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> LazyTensor:
    if not isinstance(data, LazyTensor):
        raise RefusedError("It holds a parameter that is no tensor.")
    return data


def _blob(data: Any) -> Blob:
    if not isinstance(data, bytes):
        raise RefusedError("It holds a storage that is not made of bytes.")
    return Blob(data)


def _dtype(code: Any, *rest: Any) -> _DType:
    if not isinstance(code, str) or code not in SCALARS:
        raise RefusedError(f"It holds numbers of the type {_shown(code)}; expected one of {', '.join(SCALARS)}.")
    return _DType(code)


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise RefusedError("It holds a number without type or value.")
    layout = SCALARS[dtype.code]
    if len(data) != struct.calcsize(layout):
        raise RefusedError(f"It holds a number of type {dtype.code} in {len(data)} bytes.")
    return struct.unpack(layout, data)[0]


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"It encodes text as {_shown(encoding)}.")
    return text.encode("latin-1")  # how protocol 2 writes bytes


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent_object,
    "dnnlib.util EasyDict": _ordered_dict,
    "collections OrderedDict": _ordered_dict,
    "builtins set": _set,
    "__builtin__ set": _set,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch.storage _load_from_bytes": _blob,
    "numpy dtype": _dtype,
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
    "_codecs encode": _encode,
}


def _storage_reference(value: Any) -> StorageReference:
    match value:
        case ("storage", Name(text), str(key), str(), int(count), *_) if text in STORAGES:
            return StorageReference(STORAGES[text], key, count)
    raise RefusedError("It refers to a storage of an unknown kind.")


def read_storage(data: bytes) -> NDArray[Any]:
    """The values of a storage in the old format of torch.save: five pickles, then the raw numbers."""
    stream = io.BytesIO(data)
    try:
        magic, protocol, system, reference, keys = (interpret(stream, len(data), {}, persistent=True) for _ in range(5))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise RefusedError(f"It holds a damaged storage ({error}).") from error
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise RefusedError("It holds a storage in a format that is not the old one of torch.save.")
    if not isinstance(reference, StorageReference) or keys != [reference.key] or system.get("little_endian") is False:
        raise RefusedError("It holds a storage that does not describe itself, or is big-endian.")
    dtype = np.dtype(reference.dtype)
    rest = memoryview(data)[stream.tell() :]
    if len(rest) != 8 + reference.count * dtype.itemsize or struct.unpack("<q", rest[:8])[0] != reference.count:
        raise RefusedError(
            f"It holds a storage of {reference.count} values in {max(len(rest) - 8, 0)} bytes: truncated or damaged."
        )
    return np.frombuffer(rest, dtype, offset=8)


# From the tree to a network -------------------------------------------------------------------


def read_snapshot(path: Path) -> dict[str, Any]:
    """The dictionary of an official snapshot; networks are `Record`s. Nothing in the file is executed.

    raises   ModelError that names the file and what is wrong with it
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RefusedError(f"It has {size / 2**30:.1f} GiB; expected at most {MAX_BYTES // 2**30}.")
        with path.open("rb") as stream:
            content = interpret(stream, size, FUNCTIONS)
    except OSError as error:
        raise ModelError(f"The snapshot {str(path)!r} cannot be read: {error.strerror}.") from error
    except RefusedError as error:
        raise _refused(path, error) from None
    except (ValueError, IndexError, KeyError, TypeError, MemoryError, RecursionError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{str(path)!r} is not a readable snapshot: it is truncated or damaged ({reason}).") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{str(path)!r} holds a {type(content).__name__}, not the dictionary with 'G_ema' of a "
            "StyleGAN2-ADA (PyTorch) snapshot."
        )
    return content


def _refused(path: Path, error: RefusedError) -> RefusedError:
    return RefusedError(f"The snapshot {str(path)!r} was refused. {error}")


def network_tensors(record: Record) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of a network by their state-dict keys."""
    modules = 0

    def walk(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, LazyTensor]]:
        nonlocal modules
        modules += 1
        if not isinstance(module, Record) or depth > MAX_DEPTH or modules > MAX_MODULES:
            raise RefusedError(f"It holds no proper network at {prefix or 'the top'!r}.")
        state = module.state
        parts = [state.get(key, {}) for key in ("_parameters", "_buffers", "_modules")]
        transient = state.get("_non_persistent_buffers_set", set())
        if not all(isinstance(part, dict) for part in parts) or not isinstance(transient, set):
            raise RefusedError(f"It holds no proper network at {prefix or 'the top'!r}.")
        parameters, buffers, children = parts
        for name, tensor in [*parameters.items(), *((k, v) for k, v in buffers.items() if k not in transient)]:
            if tensor is None:
                continue
            if not isinstance(tensor, LazyTensor):
                raise RefusedError(f"It holds a {type(tensor).__name__} in place of the tensor {prefix}{name}.")
            yield f"{prefix}{name}", tensor
        for name, child in children.items():
            if not isinstance(name, str):
                raise RefusedError(f"It holds a network with a part called {_shown(name)}.")
            if child is not None:
                yield from walk(child, f"{prefix}{name}.", depth + 1)

    return walk(record, "", 0)


@dataclass(frozen=True)
class Teacher:
    """A generator ready to be sampled.

    classes   names in label order; empty where the file does not tell
    """

    generator: Generator
    classes: tuple[str, ...] = ()

    def drawer(
        self,
        seed: int,
        truncation: float = 1.0,
        cutoff: int | None = None,
        noise: NoiseMode = "const",
        z: ZDistribution = "gaussian",
    ) -> Drawer:
        """Image i from (seed, i), its noise included."""
        import torch

        from ovcalib.gan.sampling import Drawer, latents, one_hot, to_pixels

        config = self.generator.config
        device = self.generator.mapping.w_avg.device

        def own_noise(indices: Sequence[int]) -> list[torch.Tensor]:
            sides = [side for side in config.resolutions for _ in range(1 if side == 4 else 2)]
            drawn = []
            for i in indices:
                rng = np.random.default_rng((seed, i, 1))
                drawn.append([rng.standard_normal((1, side, side), dtype=np.float32) for side in sides])
            return [torch.from_numpy(np.stack(layer)).to(device) for layer in zip(*drawn, strict=True)]

        @torch.no_grad()
        def draw(indices: Sequence[int], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
            image = self.generator(
                latents(seed, indices, config.z_dim, z).to(device),
                None if labels is None else one_hot(labels, config.c_dim).to(device),
                truncation=truncation,
                cutoff=cutoff,
                noise=own_noise(indices) if noise == "random" else noise,
            )
            return to_pixels(image)

        return Drawer("This StyleGAN2-ADA generator", config.img_resolution, config.c_dim, self.classes, draw)


def load_teacher(path: Path) -> Teacher:
    """G_ema of an official snapshot (.pkl), or a generator that ovcalib wrote (.safetensors), in eval mode.

    A snapshot is converted once; the safetensors file is kept in the user's cache under the snapshot's SHA-256.
    raises   ModelError
    """
    if not path.is_file():
        raise ModelError(f"There is no generator {str(path)!r}. Give FILE.pkl or FILE.safetensors.")
    if path.suffix == ".safetensors":
        return read_teacher(path)
    cached = cache_dir() / "stylegan2-ada" / f"{file_sha256(path)[:32]}.safetensors"
    if cached.is_file():
        return read_teacher(cached)
    generator = generator_of(path, read_snapshot(path))
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second conversion, no more
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_generator(generator, cached)
    return Teacher(generator)


@contextlib.contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Errors from hostile settings become a ModelError that names the file."""
    try:
        yield
    except RefusedError as error:
        raise _refused(path, error) from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, MemoryError) as error:
        raise ModelError(f"The settings in {str(path)!r} make no sense ({error}).") from error


def generator_of(path: Path, snapshot: Mapping[str, Any], key: str = "G_ema") -> Generator:
    """The generator in the content of a snapshot."""
    from ovcalib.gan.stylegan2 import Generator

    with _refusals_named(path):
        record, arrays = _arrays(snapshot, key, "Generator")
        config = generator_config(record, arrays)
        _check_config(config)
        return _filled(lambda: Generator(config), arrays)  # type: ignore[return-value]


def discriminator_of(path: Path, snapshot: Mapping[str, Any]) -> Discriminator:
    """The discriminator in the content of a snapshot; only the plain architecture of the `cifar` configuration."""
    from ovcalib.gan.stylegan2 import Discriminator, DiscriminatorConfig

    with _refusals_named(path):
        record, arrays = _arrays(snapshot, "D", "Discriminator")
        given = _settings(record)
        if given.get("architecture", "resnet") != "orig":
            raise RefusedError(
                f"Its discriminator is of the kind {_shown(given.get('architecture', 'resnet'))}; only 'orig' is known."
            )
        kwargs: dict[str, Any] = {
            key: given[key] for key in ("c_dim", "img_resolution", "img_channels") if key in given
        }
        kwargs |= {k: given[k] for k in ("channel_base", "channel_max", "num_fp16_res", "conv_clamp") if k in given}
        kwargs["mapping_layers"] = sum(name.startswith("mapping.fc") for name in arrays) // 2
        kwargs["mbstd_group_size"] = given.get("epilogue_kwargs", {}).get("mbstd_group_size", 4)
        config = DiscriminatorConfig(**kwargs)
        _check_config(config)
        return _filled(lambda: Discriminator(config), arrays)  # type: ignore[return-value]


def _arrays(snapshot: Mapping[str, Any], key: str, class_name: str) -> tuple[Record, dict[str, NDArray[np.float32]]]:
    record = snapshot.get(key)
    if not isinstance(record, Record) or record.class_name != class_name:
        held = ", ".join(map(_shown, list(snapshot)[:8])) or "nothing"
        raise RefusedError(f"It has no network {key!r} of the class {class_name!r}; it holds {held}.")
    tensors = dict(itertools.islice(network_tensors(record), MAX_TENSORS + 1))
    if len(tensors) > MAX_TENSORS:
        raise RefusedError(f"It has more than {MAX_TENSORS} tensors.")
    claimed = sum(math.prod(tensor.size) for tensor in tensors.values())
    stored = sum(len(blob) for blob in {tensor.blob.data for tensor in tensors.values()})
    if claimed > stored:
        raise RefusedError(f"It claims {claimed} values in {stored} bytes.")
    blobs = {id(tensor.blob): tensor.blob for tensor in tensors.values()}
    storages = {key: read_storage(blob.data) for key, blob in blobs.items()}
    arrays = {}
    for name, tensor in tensors.items():
        array = tensor.array(storages[id(tensor.blob)])
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise RefusedError(f"Its tensor {name} holds {array.dtype} values that are not all finite numbers.")
        arrays[name] = array.astype(np.float32)
    return record, arrays


def _settings(record: Record) -> dict[str, Any]:
    settings = record.state.get("_init_kwargs")
    return settings if isinstance(settings, dict) else {}


def generator_config(record: Record, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """The settings of a generator: sizes from its tensors, the rest from what the snapshot says of itself."""
    from ovcalib.gan.stylegan2 import GeneratorConfig

    given = _settings(record)
    mapping, synthesis = given.get("mapping_kwargs", {}), given.get("synthesis_kwargs", {})
    if not isinstance(mapping, dict) or not isinstance(synthesis, dict):
        raise RefusedError("Its settings are not dictionaries.")
    for where, key, expected in (
        (synthesis, "architecture", "skip"), (synthesis, "activation", "lrelu"), (mapping, "activation", "lrelu"),
        (synthesis, "resample_filter", [1, 3, 3, 1]),
    ):  # fmt: skip
        if where.get(key, expected) != expected:
            raise RefusedError(f"Its generator has {key} {_shown(where[key])}; only {expected!r} is known.")

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise RefusedError(f"Its generator has no tensor {name}.")
        return arrays[name].shape

    if any(len(shape(name)) != 2 for name in ("mapping.fc0.weight", "synthesis.b4.conv1.affine.weight")):
        raise RefusedError("Its linear layers are not matrices.")
    blocks = {int(n.split(".")[1][1:]) for n in arrays if n.startswith("synthesis.b") and n.split(".")[1][1:].isdigit()}
    resolution = max(blocks)
    c_dim = shape("mapping.embed.weight")[-1] if "mapping.embed.weight" in arrays else 0
    w_dim = shape("synthesis.b4.conv1.affine.weight")[1]
    widest, top = shape("synthesis.b4.conv1.weight")[0], shape(f"synthesis.b{resolution}.conv1.weight")[0]
    sizes: dict[str, Any] = {
        "z_dim": shape("mapping.fc0.weight")[1] - (w_dim if c_dim else 0),
        "c_dim": c_dim,
        "w_dim": w_dim,
        "img_resolution": resolution,
        "img_channels": shape("synthesis.b4.torgb.weight")[0],
    }
    for key, found in sizes.items():
        if given.get(key, found) != found:
            raise RefusedError(f"It says that {key} is {_shown(given[key])}, but its tensors say {found}.")
    config = GeneratorConfig(**sizes)
    clamp = synthesis.get("conv_clamp", None)
    return GeneratorConfig(
        **sizes,
        num_layers=sum(name.startswith("mapping.fc") and name.endswith("weight") for name in arrays),
        channel_base=synthesis.get("channel_base", top * resolution),
        channel_max=synthesis.get("channel_max", widest),
        num_fp16_res=synthesis.get("num_fp16_res", 0),
        conv_clamp=None if clamp is None else float(clamp),
        lr_multiplier=float(mapping.get("lr_multiplier", config.lr_multiplier)),
        w_avg_beta=float(mapping.get("w_avg_beta", config.w_avg_beta)),
        use_noise=any(name.endswith("noise_strength") for name in arrays),
    )


def _check_config(config: Any) -> None:
    """Bounds within which a network of these settings can be described without harm."""
    bounds = {"z_dim": (1, 2**14), "w_dim": (1, 2**14), "c_dim": (0, 2**16), "img_resolution": (4, 2**11),
              "img_channels": (1, 64), "num_layers": (1, 64), "mapping_layers": (0, 64), "channel_base": (1, 2**20),
              "channel_max": (1, 2**12), "num_fp16_res": (0, 16), "mbstd_group_size": (1, 2**10)}  # fmt: skip
    for field in fields(config):
        value = getattr(config, field.name)
        low, high = bounds.get(field.name, (None, None))
        if low is not None and high is not None and (type(value) is not int or not low <= value <= high):
            raise RefusedError(f"Its {field.name} is {_shown(value)}; expected a whole number of {low} to {high}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise RefusedError(f"Its {field.name} is {_shown(value)}.")
    if config.img_resolution & (config.img_resolution - 1):
        raise RefusedError(f"Its img_resolution is {config.img_resolution}; expected a power of two.")
    if config.channels(config.img_resolution) < 1:
        raise RefusedError(f"Its channel_base is {config.channel_base}: no channels are left at the full resolution.")


def _filled(build: Callable[[], nn.Module], arrays: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    """The network with these tensors; nothing is set aside before names and shapes are known to fit."""
    import torch

    with torch.device("meta"):
        module = build()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: array.shape for name, array in arrays.items()}
    if expected != given:
        wrong = sorted(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
        lines = [f"{k} is {given.get(k, 'missing')}, expected {expected.get(k, 'nothing')}" for k in wrong[:3]]
        raise RefusedError(f"{len(wrong)} of its tensors do not fit its settings: {'; '.join(lines)}.")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    tensors = {name: tensor.reshape(expected[name]) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


# Our own container ----------------------------------------------------------------------------


def write_generator(generator: Generator, path: Path, classes: Sequence[str] = ()) -> None:
    """Tensors, settings and the names of the classes, where they are known, as safetensors, atomically."""
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(generator.config)),
        "classes": json.dumps(list(classes)),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata))


def read_teacher(path: Path) -> Teacher:
    """A generator that `write_generator` wrote, in eval mode. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    from ovcalib.gan.stylegan2 import Generator, GeneratorConfig

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ModelError(
            f"{str(path)!r} is no StyleGAN2-ADA generator of ovcalib: expected a file that `ovcalib gan train-teacher` "
            "or the conversion of a snapshot wrote."
        )
    try:
        config = GeneratorConfig(**json.loads(metadata["config"]))
        _check_config(config)
        classes = tuple(map(str, json.loads(metadata.get("classes", "[]"))))
        return Teacher(_filled(lambda: Generator(config), arrays), classes)  # type: ignore[arg-type]
    except RefusedError as error:
        raise _refused(path, error) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"The settings in {str(path)!r} make no sense ({error}).") from error
