"""Hostile weights: pickles, torch files, safetensors, snapshots."""

import collections
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from dataclasses import asdict

import torch

from ovcalib.gan.stylegan2 import Generator
from tests.gan.snapshots import Persistent, dumps, generator_kwargs, record, tiny_config
from tests.hostile.archives import ESCAPES, GIB, deflated_zeros
from tests.toy import ToyNet

MIB = 2**20


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def tuples(levels, first=b")"):
    """A tuple of two of the one before, `levels` times, left on the stack; without POP."""
    made = bytearray(first + b"r\0\0\0\0")
    for level in range(levels):
        made += b"j" + struct.pack("<I", level) + b"\x86r" + struct.pack("<I", level + 1)
    return bytes(made)


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def torch_zip(program, members=(), compression=zipfile.ZIP_STORED):
    """A file of torch.save with this pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, data in members:
            archive.writestr(f"archive/{name}", data)
    return stream.getvalue()


def storage(kind=b"FloatStorage", key="0", count=4):
    """The instructions that leave a storage on the stack."""
    return (b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu")
            + b"\x8a\x08" + struct.pack("<q", count) + b"tQ")  # fmt: skip


def number(value):
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes((len(data),)) + data


def tensor(size, stride, offset=0, **of):
    """The instructions that leave a tensor on the stack."""
    sides, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    arguments = storage(**of) + number(offset) + sides + steps + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def holding(name, instructions):
    """A state dict with one entry."""
    return b"\x80\x02}" + text(name) + instructions + b"s."


def apply(function, *arguments):
    """The instructions that apply a function."""
    module, _, name = function.rpartition(".")
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + b"".join(arguments) + b"tR"


FOUR = [("data/0", bytes(16))]


def state():
    torch.manual_seed(0)
    return ToyNet().state_dict()


def changed(**entries):
    return {**state(), **entries}


def meta_state():
    return {name: value.to("meta") for name, value in state().items()}


def quantized():
    return changed(**{"fc.weight": torch.quantize_per_tensor(torch.zeros(4, 16), 0.1, 0, torch.qint8)})


def legacy(content):
    return saved(content, _use_new_zipfile_serialization=False)


class Odd(torch.Tensor):
    pass


CYCLE = b"\x80\x02]r\0\0\0\0j\0\0\0\0a"
HEAVY = b"X" + struct.pack("<I", MIB) + b"a" * MIB

# Pickles for any reader of pickles; those of torch are wrapped into a file of torch.save.
PICKLES = {
    "empty": b"",
    "stop alone": b"\x80\x02.",
    "nothing": b"\x80\x02N.",
    "no end": b"\x80\x02}",
    "empty dictionary": b"\x80\x02}.",
    "a number": b"\x80\x02K\x01.",
    "protocol 0": b"(dp0\n.",
    "protocol 99": b"\x80\x63}.",
    "system": b"\x80\x02cos\nsystem\n" + text("touch executed") + b"\x85R.",
    "eval": b"\x80\x02cbuiltins\neval\n" + text("open('executed', 'w')") + b"\x85R.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
    "bytearray of 10 GB": b"\x80\x02cbuiltins\nbytearray\n" + number(10 * GIB) + b"\x85R.",
    "bytes of 10 GB": b"\x80\x02cbuiltins\nbytes\n" + number(10 * GIB) + b"\x85R.",
    "range": b"\x80\x02cbuiltins\nrange\n" + number(10 * GIB) + b"\x85R.",
    "tuples that double": b"\x80\x02" + tuples(60) + b".",
    "tuples that double as a key": b"\x80\x02}" + tuples(60) + b"Ns.",
    "tuples that double in a set": b"\x80\x02cbuiltins\nset\n]" + tuples(60) + b"a\x85R.",
    "tuples that double in a dictionary of calls": b"\x80\x02ccollections\nOrderedDict\n]" + tuples(60) + b"N\x86a\x85R.",
    "tuples that double under a name": b"\x80\x02}" + text("weight") + tuples(60) + b"s.",
    "tuples that double for a storage": b"\x80\x02" + tuples(60) + b"Q.",
    "tuples that double for a tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + tuples(60) + b"K\x00))\x89NtR.",
    "tuples that double for a type": b"\x80\x02cnumpy\ndtype\n(" + tuples(60) + b"tR.",
    "tuples that double for a version": b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(" + text("type") + text("class")
    + text("state") + b"}" + text("version") + tuples(60) + b"u\x85R.",
    "a list in itself": CYCLE + b".",
    "a list in itself under a name": b"\x80\x02}" + text("weight") + CYCLE[2:] + b"s.",
    "a dictionary in itself": b"\x80\x02}r\0\0\0\0" + text("a") + b"j\0\0\0\0s.",
    "the entry state_dict in itself": b"\x80\x02}r\0\0\0\0" + text("state_dict") + b"j\0\0\0\0s.",
    "the entry model in itself": b"\x80\x02}r\0\0\0\0" + text("model") + b"j\0\0\0\0s.",
    "copies of a dictionary": lambda: b"\x80\x02](" + b"K\x01K\x02\x86" * 100_000 + b"er\0\0\0\0]" + b"ccollections\nOrderedDict\nj\0\0\0\0\x85Ra" * 3000 + b".",
    "copies of a set": lambda: b"\x80\x02](" + b"K\x01" * 200_000 + b"er\0\0\0\0]" + b"cbuiltins\nset\nj\0\0\0\0\x85Ra" * 3000 + b".",
    "copies of a text": lambda: b"\x80\x02" + HEAVY * 4 + b"r\0\0\0\0]" + (b"c_codecs\nencode\n(j\0\0\0\0" + text("latin1") + b"tRa") * 3000 + b".",
    "copies of a storage": lambda: b"\x80\x02B" + struct.pack("<I", MIB) + bytes(MIB) + b"r\0\0\0\0]" + b"ctorch.storage\n_load_from_bytes\nj\0\0\0\0\x85Ra" * 30_000 + b".",
    "the number types without end": lambda: b"\x80\x02](" + (b"cnumpy\ndtype\n(" + text("f8") + b"K\x00K\x01tR") * 300_000 + b"e.",
    "ten million instructions": lambda: b"\x80\x02](" + b"N" * 10_000_000 + b"e.",
    "ten million marks": lambda: b"\x80\x02" + b"(" * 10_000_000 + b".",
    "ten million tuples in each other": lambda: b"\x80\x02)" + b"\x85" * 10_000_000 + b".",
    "a million lists in each other": lambda: b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "a million memos": lambda: b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i * 4001) for i in range(1_000_000)) + b".",
    "announced text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "announced bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "announced number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "number of 10^6 digits": b"\x80\x02}" + text("a") + b"\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000 + b"s.",
    "text that is no UTF-8": b"\x80\x02X\x02\0\0\0\xff\xfe.",
    "surrogates as a key": b"\x80\x02}" + text("\ud800") + b"Ns.",
    "escapes as a key": b"\x80\x02}" + text(ESCAPES) + b"Ns.",
    "escapes as a name": b"\x80\x04\x8c\x05\x1b[31m\x8c\x05\x1b[31m\x93.",
    "escapes as a global": b"\x80\x02c\x1b[31m\n\x1b]0;x\x07\n.",
    "a name without end": lambda: b"\x80\x02c" + b"a" * 50_000_000 + b"\nb\n.",
    "a name of 50 MB from the stack": lambda: b"\x80\x04X" + struct.pack("<I", 50 * MIB) + b"a" * (50 * MIB) + b"\x8c\x01b\x93.",
    "a name that is a number": b"\x80\x04K\x01K\x02\x93.",
    "a memo that is not there": b"\x80\x02j\xff\xff\xff\xff.",
    "a mark that is not there": b"\x80\x02t.",
    "odd items": b"\x80\x02}(" + text("a") + b"u.",
    "an instance": b"\x80\x02(i__main__\nX\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer of protocol 5": b"\x80\x05\x97.",
    "the class int": b"\x80\x02cbuiltins\nint\n.",
    "keys that collide": lambda: b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little", signed=True) + b"N" for i in range(60_000)) + b"u.",
    "keys that are floats": b"\x80\x02}G?\xf0\0\0\0\0\0\0Ns.",
    "keys that are lists": b"\x80\x02}]Ns.",
}  # fmt: skip

# Pickles of a state dict, and what else a file of torch.save holds.
TENSORS = {
    "a storage that is not there": (holding("fc.weight", tensor((4,), (1,))), ()),
    "a storage that is too short": (holding("fc.weight", tensor((4,), (1,))), [("data/0", b"")]),
    "a storage of a negative length": (holding("fc.weight", tensor((4,), (1,), count=-4)), FOUR),
    "a storage of 2^62 values": (holding("fc.weight", tensor((4,), (1,), count=2**62)), FOUR),
    "a storage of an unknown kind": (holding("fc.weight", tensor((4,), (1,), kind=b"EvilStorage")), FOUR),
    "a storage key that leads out": (holding("fc.weight", tensor((4,), (1,), key="../../etc/passwd")), FOUR),
    "a storage key with escapes": (holding("fc.weight", tensor((4,), (1,), key=ESCAPES)), FOUR),
    "a storage key of 2 MB": (holding("fc.weight", tensor((4,), (1,), key="k" * 2 * MIB)), FOUR),
    "a stride of zero": (holding("fc.weight", tensor((2**40,), (0,))), FOUR),
    "a stride of zero that fits": (holding("fc.weight", tensor((4, 16), (0, 0))), FOUR),
    "many strides of zero": (holding("fc.weight", tensor((2**20, 2**20, 2**20), (0, 0, 0))), FOUR),
    "half precision with a stride of zero": (holding("fc.weight", tensor((2**36,), (0,), kind=b"HalfStorage", count=8)), FOUR),
    "a negative stride": (holding("fc.weight", tensor((4,), (-1,))), FOUR),
    "a negative size": (holding("fc.weight", tensor((-4,), (1,))), FOUR),
    "a negative offset": (holding("fc.weight", tensor((2,), (1,), -2)), FOUR),
    "an offset of 2^62": (holding("fc.weight", tensor((2,), (1,), 2**62)), FOUR),
    "a size of 2^200": (holding("fc.weight", tensor((2**200,), (1,))), FOUR),
    "a stride of 2^62": (holding("fc.weight", tensor((2, 2), (2**62, 2**62))), FOUR),
    "no size": (holding("fc.weight", tensor((0,), (1,))), FOUR),
    "an empty storage": (holding("fc.weight", tensor((0,), (1,), count=0)), [("data/0", b"")]),
    "a thousand sides": (holding("fc.weight", tensor((1,) * 1000, (1,) * 1000)), FOUR),
    "more sides than strides": (holding("fc.weight", tensor((2, 2), (1,))), FOUR),
    "values that are not finite": (holding("fc.weight", tensor((4,), (1,))), [("data/0", b"\xff" * 16)]),
    "a parameter that is None": (b"\x80\x02}" + text("fc.weight") + apply("torch._utils._rebuild_parameter", b"N", b"\x88", b"N") + b"s.", ()),
    "parameters without end": lambda: (b"\x80\x02}(" + b"".join(text(f"p{i}") + b"N" for i in range(200_000)) + b"u.", ()),
    "tensors without end": lambda: (b"\x80\x02" + b"}" + tensor((4,), (1,)) + b"r\0\0\0\0" + b"(" + b"".join(text(f"p{i}") + b"j\0\0\0\0" for i in range(100_000)) + b"u.", FOUR),
    "numbers as keys": (b"\x80\x02}K\x01" + tensor((4,), (1,)) + b"s.", FOUR),
    "None as a key": (b"\x80\x02}N" + tensor((4,), (1,)) + b"s.", FOUR),
    "bytes as a key": (b"\x80\x03}C\x01a" + tensor((4,), (1,)) + b"s.", FOUR),
    "a tensor as a key": (b"\x80\x02}" + tensor((4,), (1,)) + b"Ns.", FOUR),
    "a tuple as a key": (b"\x80\x02})" + tensor((4,), (1,)) + b"s.", FOUR),
    "texts and numbers as keys": (b"\x80\x02}(K\x01" + tensor((4,), (1,)) + text("a") + tensor((4,), (1,)) + b"u.", FOUR),
    "keys of 10 MB": lambda: (b"\x80\x02}(" + b"".join(text(str(i) * 10 * MIB) + tensor((4,), (1,)) for i in range(4)) + b"u.", FOUR),
    "keys with escapes": (holding(ESCAPES, tensor((4,), (1,))), FOUR),
    "keys with surrogates": (holding("\ud800", tensor((4,), (1,))), FOUR),
    "a tensor alone": (b"\x80\x02" + tensor((4,), (1,)) + b".", FOUR),
    "a tensor on meta": (holding("fc.weight", apply("torch._utils._rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", b"(" + number(2**40) + b"t", b"(K\x01t", b"\x89")), ()),
    "a wrapper subclass": (holding("fc.weight", apply("torch._utils._rebuild_wrapper_subclass", b"ctorch\nTensor\n", b"ctorch\nfloat32\n", b"(" + number(2**40) + b"t", b"(K\x01t", b"K\0", b"N", b"N", b"\x89")), ()),
    "torch.Size": (holding("fc.weight", apply("torch.Size", b"(" + number(2**40) + b"t")), ()),
    "a device that is nowhere": (holding("fc.weight", apply("torch.device", text("cuda:99999"))), ()),
    "OrderedDict of pairs that are none": (b"\x80\x02" + apply("collections.OrderedDict", b"](K\x01K\x02e") + b".", ()),
    "attributes of a dictionary": (b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__") + b"Nsb.", ()),
    "attributes of a tensor": (b"\x80\x02}" + text("a") + tensor((4,), (1,)) + b"}" + text("x") + b"Nsb" + b"s.", FOUR),
}  # fmt: skip


def deflated_torch(size):
    """A file of torch.save whose one storage is deflated and holds zeros."""
    program = holding("fc.weight", tensor((size // 4,), (1,), count=size // 4))
    return with_deflated(program, "archive/data/0", deflated_zeros(size), size)


def with_deflated(program, name, body, size):
    """A zip of two stored members and a deflated one, with a checksum that is wrong."""
    parts, central, offset = [], b"", 0
    members = [("archive/data.pkl", program, 0, len(program)), ("archive/version", b"3\n", 0, 2), (name, body, 8, size)]
    for member, content, method, whole in members:
        encoded, crc = member.encode(), 0 if method else zlib.crc32(content)
        extra = struct.pack("<HHQQ", 1, 16, whole, len(content)) if whole >= 2**32 - 1 else b""
        sizes = (0xFFFFFFFF, 0xFFFFFFFF) if extra else (len(content), whole)
        common = struct.pack("<HHHHHIII", 45, 0, method, 0, 0, crc, *sizes)
        common += struct.pack("<HH", len(encoded), len(extra))
        central += (
            b"PK\x01\x02" + struct.pack("<H", 45) + common + struct.pack("<HHHII", 0, 0, 0, 0, offset) + encoded + extra
        )
        parts.append(b"PK\x03\x04" + common + encoded + extra + content)
        offset += len(parts[-1])
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(central), offset, 0)
    return b"".join(parts) + central + end


# Whole files that a reader of state dicts is given.
TORCH = {
    "empty file": b"",
    "text": b"<html>Not found</html>",
    "zeros": bytes(10_000),
    "signature of zip": b"PK\x03\x04",
    "empty zip": b"PK\x05\x06" + bytes(18),
    "truncated": lambda: saved(state())[:-500],
    "half": lambda: saved(state())[:5000],
    "truncated, old format": lambda: legacy(state())[:-50],
    "half, old format": lambda: legacy(state())[:3000],
    "a whole module": lambda: saved(ToyNet()),
    "a whole module, old format": lambda: legacy(torch.nn.Conv2d(3, 4, 3)),
    "TorchScript": lambda: script(),
    "deflated bomb of 6.6 GB": lambda: deflated_torch(6600 * MIB),
    "deflated bomb of 2 GB": lambda: deflated_torch(2048 * MIB),
    "deflated pickle": lambda: torch_zip(holding("fc.weight", tensor((4,), (1,))) , FOUR, zipfile.ZIP_DEFLATED),
    "deflated pickle of 1 GB": lambda: with_deflated(b"", "archive/data.pkl", deflated_zeros(1024 * MIB), 1024 * MIB),
    "empty tensors": lambda: saved({name: torch.zeros(0) for name in state()}),
    "one scalar": lambda: saved({"a": torch.tensor(1.0)}),
    "on meta": lambda: saved(meta_state()),
    "sparse": lambda: saved(changed(**{"fc.weight": torch.zeros(4, 16).to_sparse()})),
    "sparse of 2^40 values": lambda: saved(changed(**{"fc.weight": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (2**20, 2**20))})),
    "compressed sparse": lambda: saved(changed(**{"fc.weight": torch.eye(4, 16).to_sparse_csr()})),
    "quantized": lambda: saved(quantized()),
    "expanded": lambda: saved(changed(**{"fc.weight": torch.zeros(1).expand(2**40)})),
    "expanded half precision": lambda: saved(changed(**{"fc.weight": torch.zeros(1, dtype=torch.half).expand(2**36)})),
    "complex": lambda: saved(changed(**{"fc.weight": torch.zeros(4, 16, dtype=torch.complex64)})),
    "whole numbers": lambda: saved(changed(**{"fc.weight": torch.zeros(4, 16, dtype=torch.int32)})),
    "bytes": lambda: saved(changed(**{"fc.weight": torch.zeros(4, 16, dtype=torch.uint8)})),
    "truth values": lambda: saved(changed(**{"fc.weight": torch.zeros(4, 16, dtype=torch.bool)})),
    "8-bit floats": lambda: saved(changed(**{"fc.weight": torch.zeros(4, 16).to(torch.float8_e4m3fn)})),
    "not finite": lambda: saved(changed(**{"fc.weight": torch.full((4, 16), float("nan"))})),
    "a subclass of Tensor": lambda: saved(changed(**{"fc.weight": torch.zeros(4, 16).as_subclass(Odd)})),
    "numbers as keys": lambda: saved(dict(enumerate(state().values()))),
    "numbers among keys": lambda: saved({**state(), 3: torch.zeros(1)}),
    "keys with escapes": lambda: saved({**state(), ESCAPES: torch.zeros(1)}),
    "keys of 1 MB": lambda: saved({**state(), "x" * MIB: torch.zeros(1)}),
    "None among values": lambda: saved({**state(), "x": None}),
    "texts among values": lambda: saved({**state(), "x": "y"}),
    "an entry state_dict that is None": lambda: saved({"state_dict": None}),
    "entries in entries": lambda: saved({"state_dict": {"state_dict": {"model": {"state_dict": {}}}}}),
    "a list": lambda: saved([torch.zeros(1)]),
    "a tensor": lambda: saved(torch.zeros(1)),
    "a counter": lambda: saved(collections.Counter("aab")),
    "an empty dictionary": lambda: saved({}),
    "big-endian": lambda: torch_zip(holding("fc.weight", tensor((4,), (1,))), FOUR).replace(b"little", b"big   "),
    "old tar format": lambda: tar(),
    "pickle of the standard library": lambda: pickle.dumps({"a": 1}),
    "magic of the old format and nothing": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
}  # fmt: skip


def tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"\x80\x02N."))
    return stream.getvalue()


def script():
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "length alone": struct.pack("<Q", 10),
    "length of 2^63": safetensors(b"{}", length=2**63),
    "length beyond the file": safetensors(b"{}", length=1000),
    "length of zero": safetensors(b"", length=0),
    "empty header": safetensors({}),
    "text": b"<html>Not found</html>",
    "header that is no JSON": safetensors(b"{not json}"),
    "header that is a list": safetensors([]),
    "header that is a number": safetensors(3),
    "header that is no UTF-8": safetensors(b"{\xff\xfe}"),
    "header of 90 MB": lambda: safetensors(b"{" + b" " * 90_000_000 + b"}"),
    "header of 60 MB of names": lambda: safetensors(b"{" + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)) + b"}"),
    "deep header": safetensors(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "deep metadata": safetensors(b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata that is a list": safetensors({"__metadata__": ["a"], "fc.weight": entry()}, bytes(16)),
    "metadata that is text": safetensors({"__metadata__": "a", "fc.weight": entry()}, bytes(16)),
    "metadata of numbers": safetensors({"__metadata__": {"format": 3}, "fc.weight": entry()}, bytes(16)),
    "metadata of dictionaries": safetensors({"__metadata__": {"config": {"a": 1}}, "fc.weight": entry()}, bytes(16)),
    "metadata of nothing": safetensors({"__metadata__": None, "fc.weight": entry()}, bytes(16)),
    "metadata of 20 MB": lambda: safetensors({"__metadata__": {"config": "x" * 20_000_000}, "fc.weight": entry()}, bytes(16)),
    "one tensor that is too short": safetensors({"fc.weight": entry()}, bytes(8)),
    "one tensor and more bytes": safetensors({"fc.weight": entry()}, bytes(64)),
    "offsets backwards": safetensors({"fc.weight": entry(offsets=(16, 0))}, bytes(16)),
    "offsets that overlap": safetensors({"a": entry(), "b": entry()}, bytes(16)),
    "offsets with a hole": safetensors({"a": entry(), "b": entry(offsets=(100, 116))}, bytes(116)),
    "negative offsets": safetensors({"a": entry(offsets=(-16, 0))}, bytes(16)),
    "offsets of 2^64": safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,18446744073709551616]}}', bytes(16)),
    "negative shape": safetensors({"a": entry(shape=(-4,))}, bytes(16)),
    "shape that overflows": safetensors({"a": entry(shape=(2**40, 2**40))}, bytes(16)),
    "shape with a zero": safetensors({"a": entry(shape=(0, 2**60), offsets=(0, 0))}),
    "shape of a thousand sides": safetensors({"a": entry(shape=(1,) * 1000, offsets=(0, 4))}, bytes(4)),
    "shape of floats": safetensors({"a": entry(shape=(4.5,))}, bytes(16)),
    "unknown dtype": safetensors({"a": entry(dtype="Q9")}, bytes(16)),
    "dtype with escapes": safetensors({"a": entry(dtype=ESCAPES)}, bytes(16)),
    "BF16": safetensors({"fc.weight": entry("BF16", (8,))}, bytes(16)),
    "F8": safetensors({"fc.weight": entry("F8_E5M2", (16,))}, bytes(16)),
    "F8 of the other kind": safetensors({"fc.weight": entry("F8_E4M3", (16,))}, bytes(16)),
    "F8_E8M0": safetensors({"fc.weight": entry("F8_E8M0", (16,))}, bytes(16)),
    "F4": safetensors({"fc.weight": entry("F4", (32,))}, bytes(16)),
    "U16": safetensors({"fc.weight": entry("U16", (8,))}, bytes(16)),
    "U64": safetensors({"fc.weight": entry("U64", (2,))}, bytes(16)),
    "BOOL": safetensors({"fc.weight": entry("BOOL", (16,))}, b"\x02" * 16),
    "C64": safetensors({"fc.weight": entry("C64", (2,))}, bytes(16)),
    "I8": safetensors({"fc.weight": entry("I8", (16,))}, bytes(16)),
    "a name with escapes": safetensors({ESCAPES: entry()}, bytes(16)),
    "a name with surrogates": safetensors(b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(16)),
    "a name of 1 MB": lambda: safetensors({"x" * MIB: entry()}, bytes(16)),
    "an empty name": safetensors({"": entry()}, bytes(16)),
    "the same name twice": safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(16)),
    "not finite": safetensors({"fc.weight": entry()}, b"\xff" * 16),
    "missing fields": safetensors({"a": {"dtype": "F32"}}, bytes(16)),
    "further fields": safetensors({"a": {**entry(), "evil": 1}}, bytes(16)),
    "a tensor that is a list": safetensors({"a": [1, 2]}, bytes(16)),
    "a torch file": lambda: saved({"a": torch.zeros(1)}),
}  # fmt: skip


def generator_file(config=None, classes=None, form="ovcalib-stylegan2-ada", module=None):
    """A generator of ours with other metadata."""
    from safetensors.torch import save

    module = module or Generator(tiny_config())
    metadata = {"format": form, "config": json.dumps(asdict(tiny_config())) if config is None else config}
    if classes is not None:
        metadata["classes"] = classes
    return save({k: v.contiguous() for k, v in module.state_dict().items()}, metadata)


def own(**changed):
    return json.dumps({**asdict(tiny_config()), **changed})


GENERATORS = {
    "no format": lambda: generator_file(form=""),
    "format with escapes": lambda: generator_file(form=ESCAPES),
    "settings that are no JSON": lambda: generator_file("{"),
    "settings that are empty": lambda: generator_file(""),
    "settings that are a list": lambda: generator_file("[1]"),
    "settings that are a number": lambda: generator_file("3"),
    "settings that are null": lambda: generator_file("null"),
    "deep settings": lambda: generator_file("[" * 100_000 + "]" * 100_000),
    "settings with an unknown key": lambda: generator_file(own(evil=1)),
    "settings with an unknown key with escapes": lambda: generator_file(own(**{ESCAPES: 1})),
    "settings with a NaN": lambda: generator_file(own(lr_multiplier=float("nan"))),
    "settings with an infinity": lambda: generator_file(own(conv_clamp=float("inf"))),
    "settings of text": lambda: generator_file(own(z_dim="8")),
    "settings of lists": lambda: generator_file(own(lr_multiplier=[1])),
    "settings of huge numbers": lambda: generator_file(own(z_dim=10**30)),
    "settings of 5000 digits": lambda: generator_file(own(z_dim=1).replace('"z_dim": 1', '"z_dim": ' + "1" * 5000)),
    "negative settings": lambda: generator_file(own(c_dim=-3)),
    "resolution of 3": lambda: generator_file(own(img_resolution=3)),
    "resolution of 2^30": lambda: generator_file(own(img_resolution=2**30)),
    "classes that are a number": lambda: generator_file(classes="3"),
    "classes that are null": lambda: generator_file(classes="null"),
    "classes that are a dictionary": lambda: generator_file(classes='{"a": 1}'),
    "classes that are no JSON": lambda: generator_file(classes="["),
    "deep classes": lambda: generator_file(classes="[" * 100_000 + "]" * 100_000),
    "too many classes": lambda: generator_file(classes=json.dumps(["a"] * 100_000)),
    "classes with surrogates": lambda: generator_file(classes='["\\ud800", "a", "b"]'),
    "half precision": lambda: generator_file(module=Generator(tiny_config()).half()),
    "bfloat16": lambda: generator_file(module=Generator(tiny_config()).bfloat16()),
    "not finite": lambda: generator_file(module=broken()),
}  # fmt: skip


def broken():
    module = Generator(tiny_config())
    module.synthesis.get_submodule("b4").get_parameter("const").data[:] = float("nan")
    return module


def snapshot(kwargs=None, key="G_ema", change=None):
    module = Generator(tiny_config())
    content = record(module, kwargs=generator_kwargs(module.config, **(kwargs or {})))
    if change is not None:
        change(content.meta["state"])
    return dumps({key: content})


def set_in(name, value):
    return lambda state: state.__setitem__(name, value)


SNAPSHOTS = {
    "another key": lambda: snapshot(key="G"),
    "a key with escapes": lambda: snapshot(key=ESCAPES),
    "a key of 10 MB": lambda: snapshot(key="x" * 10 * MIB),
    "settings that are text": lambda: snapshot({"synthesis_kwargs": "x"}),
    "settings of huge numbers": lambda: snapshot({"synthesis_kwargs": {"channel_base": 10**300}}),
    "settings that are not finite": lambda: snapshot({"synthesis_kwargs": {"conv_clamp": float("nan")}}),
    "settings of text of 10 MB": lambda: snapshot({"synthesis_kwargs": {"architecture": "x" * 10 * MIB}}),
    "settings of lists": lambda: snapshot({"mapping_kwargs": {"lr_multiplier": [1]}}),
    "parameters that are None": lambda: snapshot(change=set_in("_parameters", None)),
    "a parameter that is None": lambda: snapshot(change=set_in("_parameters", {"a": None})),
    "200,000 parameters that are None": lambda: snapshot(change=set_in("_parameters", {f"p{i}": None for i in range(200_000)})),
    "a parameter that is text": lambda: snapshot(change=set_in("_parameters", {"a": "x"})),
    "a parameter with escapes": lambda: snapshot(change=set_in("_parameters", {ESCAPES: "x"})),
    "a parameter with a name of 10 MB": lambda: snapshot(change=set_in("_parameters", {"x" * 10 * MIB: "x"})),
    "a parameter whose name is a number": lambda: snapshot(change=set_in("_buffers", {3: torch.zeros(1)})),
    "modules that are a list": lambda: snapshot(change=set_in("_modules", [])),
    "buffers that are not kept as a list": lambda: snapshot(change=set_in("_non_persistent_buffers_set", [])),
    "a block of a strange number": lambda: snapshot(change=lambda s: s["_modules"]["synthesis"].meta["state"]["_modules"].update({"b²": s["_modules"]["mapping"]})),
    "a block of 5000 digits": lambda: snapshot(change=lambda s: s["_modules"]["synthesis"].meta["state"]["_modules"].update({"b" + "1" * 5000: s["_modules"]["mapping"]})),
    "shared empty modules": lambda: shared_nones(),
    "very long names": lambda: long_names(),
}  # fmt: skip


def module_of(children=(), parameters=None):
    state = {"_parameters": parameters or {}, "_buffers": {}, "_modules": dict(children)}
    return Persistent({"type": "class", "version": 6, "class_name": "Generator", "state": state})


def shared_nones():
    """2,000 modules that share one dictionary of many `None`s."""
    nones = {f"p{i}": None for i in range(200_000)}
    leaf = module_of(parameters=nones)
    return dumps({"G_ema": module_of({f"m{i}": leaf for i in range(1900)})})


def long_names():
    """Modules whose names are a megabyte each, and that share their children."""
    leaf = module_of()
    for _ in range(7):
        leaf = module_of({"x" * MIB: leaf, "y" * MIB: leaf})
    return dumps({"G_ema": leaf})
