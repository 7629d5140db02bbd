"""Hostile npz and npy files."""

import io
import struct
import zipfile
import zlib

import numpy as np

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(8) % 4
GIB = 2**30


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header(text, version=1, length=None):
    """An npy file that has this header and no data."""
    data = text.encode("latin-1", "surrogateescape") if isinstance(text, str) else text
    data = data + b" " * (-(len(data) + 11) % 64) + b"\n"
    size = len(data) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + (struct.pack("<H", size) if version == 1 else struct.pack("<I", size))
        + data
    )


def described(descr="'|u1'", order="False", shape="(8, 16, 16, 3)", extra="", data=b""):
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {extra}}}") + data


def npz(members, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def with_images(data, **others):
    """An npz in which `images` is `data`."""
    return npz({"images.npy": data, **{f"{name}.npy": npy(value) for name, value in others.items()}})


def patched(data, changes, central=True):
    """A zip of one member with fields of its headers changed: {offset in the central header: (format, value)}."""
    data = bytearray(data)
    start = data.rindex(b"PK\x01\x02") if central else data.index(b"PK\x03\x04")
    for offset, (form, value) in changes.items():
        struct.pack_into(form, data, start + offset, value)
    return bytes(data)


def deflated_zeros(size):
    """A raw deflate stream of zeros, made from one block again and again."""
    block = 1 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first * (size // block) + packer.flush()


def bomb(member, start, size):
    """A zip whose one deflated member begins with `start` and goes on with zeros up to `size` bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(size)
    name, total = member.encode(), len(start) + size // (1 << 20) * (1 << 20)
    zip64 = struct.pack("<HHQQ", 1, 16, total, len(body))
    common = struct.pack("<HHHHHIII", 45, 0, 8, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    local = b"PK\x03\x04" + common + struct.pack("<HH", len(name), len(zip64)) + name + zip64 + body
    central = b"PK\x01\x02" + struct.pack("<H", 45) + common
    central += struct.pack("<HHHHHII", len(name), len(zip64), 0, 0, 0, 0, 0) + name + zip64
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


def overlapping(count):
    """A zip whose members are all the same bytes."""
    one = npz({"images.npy": npy(IMAGES)})
    start, end = one.index(b"PK\x01\x02"), one.index(b"PK\x05\x06")
    central = b""
    for i in range(count):
        entry = bytearray(one[start:end])
        entry[46:56] = f"im{i:04}.npy"[:10].encode()
        central += bytes(entry)
    central += one[start:end]
    tail = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count + 1, count + 1, len(central), start, 0)
    return one[:start] + central + tail


good = npy(IMAGES)
ESCAPES = "\x1b[31mred\x1b]0;title\x07"

NPZ = {
    "empty file": b"",
    "one zero byte": b"\0",
    "text": b"<html>Not found</html>",
    "only the signature of zip": b"PK\x03\x04",
    "empty zip": npz({}),
    "a npy file called npz": good,
    "a pickle called npz": b"\x80\x04}.",
    "truncated": npz({"images.npy": good})[:-60],
    "truncated in front": npz({"images.npy": good})[30:],
    "half": npz({"images.npy": good})[:3000],
    "end record alone": b"PK\x05\x06" + bytes(18),
    "end record that announces members": b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 900, 0, 0),
    "other members": npz({"pictures.npy": good}),
    "member that is no array": npz({"images": b"text", "images.npy": b"text"}),
    "folder as member": npz({"images.npy/": b""}),
    "escapes in a name": npz({f"{ESCAPES}.npy": good}),
    "newlines in a name": npz({"a\nerror: all is well\n.npy": good}),
    "surrogate in a name": patched(npz({"imagex.npy": good}), {}).replace(b"imagex", b"image\xff"),
    "a very long name": npz({"x" * 60_000 + ".npy": good}),
    "ten thousand members": npz({f"a{i}.npy": b"" for i in range(10_000)}),
    "the same name twice": overlapping(1),
    "overlapping members": overlapping(2000),
    "encrypted": patched(patched(npz({"images.npy": good}), {8: ("<H", 1)}), {6: ("<H", 1)}, central=False),
    "strongly encrypted": patched(npz({"images.npy": good}), {8: ("<H", 0x41)}),
    "patched data flag": patched(npz({"images.npy": good}), {8: ("<H", 0x20)}),
    "implode": patched(npz({"images.npy": good}), {10: ("<H", 6)}),
    "deflate64": patched(npz({"images.npy": good}), {10: ("<H", 9)}),
    "unknown compression": patched(npz({"images.npy": good}), {10: ("<H", 4711)}),
    "zstd": patched(npz({"images.npy": good}), {10: ("<H", 93)}),
    "stored called deflated": patched(patched(npz({"images.npy": good}), {10: ("<H", 8)}), {8: ("<H", 8)}, central=False),
    "bzip2": npz({"images.npy": good}, zipfile.ZIP_BZIP2),
    "lzma": npz({"images.npy": good}, zipfile.ZIP_LZMA),
    "damaged bzip2": npz({"images.npy": good}, zipfile.ZIP_BZIP2).replace(b"1AY&SY", b"2AY&SY"),
    "damaged deflate": npz({"images.npy": good}, zipfile.ZIP_DEFLATED)[:60] + b"\xff" * 200 + npz({"images.npy": good}, zipfile.ZIP_DEFLATED)[260:],
    "wrong checksum": npz({"images.npy": good}).replace(good[500:504], b"\0\0\0\0"),
    "size in the directory too small": patched(npz({"images.npy": good}), {20: ("<I", 10), 24: ("<I", 10)}),
    "size in the directory too large": patched(npz({"images.npy": good}), {20: ("<I", GIB), 24: ("<I", GIB)}),
    "offset outside": patched(npz({"images.npy": good}), {42: ("<I", GIB)}),
    "needs version 9.9": patched(npz({"images.npy": good}), {6: ("<H", 99)}),
    "bomb of 6 GB": lambda: bomb("images.npy", described(shape=f"({6 * GIB // 768}, 16, 16, 3)"), 6 * GIB),
    "bomb of floats": lambda: bomb("images.npy", described("'<f4'", shape=f"({2 * GIB // 768 // 4}, 3, 16, 16)"), 2 * GIB),
    "bomb behind a small array": lambda: bomb("images.npy", good, 2 * GIB),
    "bomb in another member": lambda: bomb("other.npy", described(shape=f"({4 * GIB},)"), 4 * GIB),
    "bomb of spaces in a header": lambda: bomb("images.npy", b"\x93NUMPY\x02\0" + struct.pack("<I", GIB), 2 * GIB),
    "empty member": with_images(b""),
    "zero bytes": with_images(bytes(1000)),
    "magic alone": with_images(b"\x93NUMPY"),
    "magic and version": with_images(b"\x93NUMPY\x01\0"),
    "half a length": with_images(b"\x93NUMPY\x01\0\x10"),
    "no header": with_images(b"\x93NUMPY\x01\0\x10\0"),
    "version 0": with_images(header("{}", 0)),
    "version 3": with_images(header("{'descr': '|u1', 'fortran_order': False, 'shape': (8, 16, 16, 3)}", 3)),
    "version 200": with_images(header("{}", 200)),
    "header of 4 GB announced": with_images(header("{}", 2, 2**32 - 1)),
    "header of 1 GB announced": with_images(header("{}", 2, GIB)),
    "header of 20 MB": with_images(header("{" + " " * 20_000_000 + "}", 2)),
    "header of 60 kB": with_images(header("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "1, " * 20_000 + ")}")),
    "header that is no literal": with_images(header("__import__('os').system('touch executed')")),
    "header that is no dictionary": with_images(header("[1, 2]")),
    "header that is empty": with_images(header("")),
    "unclosed header": with_images(header("{'descr': '|u1', 'shape': (8,")),
    "unclosed string": with_images(header("{'descr': '|u1")),
    "unclosed triple string": with_images(header('{"""')),
    "zeros in the header": with_images(header(b"{'descr': '|u1', \0\0 }")),
    "line breaks in the header": with_images(header("{'descr': '|u1',\n'fortran_order': False,\r'shape': (8, 16, 16, 3)}")),
    "indented header": with_images(header("  \n   {'descr':\n 1}\n  ")),
    "deep header": with_images(header("(" * 9000 + ")" * 9000)),
    "deep header of brackets": with_images(header("{'descr': " + "[" * 3000 + "]" * 3000 + ", 'fortran_order': False, 'shape': (1,)}")),
    "long sum in the header": with_images(header("+".join("1" * 4000))),
    "minus signs in the header": with_images(header("-" * 9000 + "1")),
    "power in the header": with_images(described(shape="(9**9**9,)")),
    "escapes in the header": with_images(header(f"{{'{ESCAPES}': 1}}")),
    "unknown escape in the header": with_images(header("{'\\N{x}': 1}")),
    "missing shape": with_images(header("{'descr': '|u1', 'fortran_order': False}")),
    "extra key": with_images(described(extra="'more': 1")),
    "key that is no text": with_images(header("{1: '|u1', 'fortran_order': False, 'shape': (8,)}")),
    "unhashable key": with_images(header("{[]: 1}")),
    "key that is bytes": with_images(header("{b'descr': '|u1', 'fortran_order': False, 'shape': (8,)}")),
    "negative shape": with_images(described(shape="(-8, 16, 16, 3)")),
    "two negative sides": with_images(described(shape="(-8, -16, 16, 3)", data=good)),
    "shape of 2^62": with_images(described(shape=f"({2**62}, 16, 16, 3)")),
    "shape of 2^64": with_images(described(shape=f"({2**64}, 16, 16, 3)")),
    "shape whose product wraps": with_images(described(shape=f"({2**33}, {2**31}, 1, 3)")),
    "shape of 10^4000": with_images(described(shape=f"(1{'0' * 4000},)")),
    "shape of 10^9000": with_images(described(shape=f"(1{'0' * 9000},)")),
    "shape of floats": with_images(described(shape="(8.0, 16, 16, 3)")),
    "shape of truth values": with_images(described(shape="(True, True, True, True)", data=b"x")),
    "shape that is a list": with_images(described(shape="[8, 16, 16, 3]")),
    "shape that is None": with_images(described(shape="None")),
    "shape of text": with_images(described(shape="('8',)")),
    "shape of 100 sides": with_images(described(shape="(" + "1, " * 100 + ")", data=b"x")),
    "no sides": with_images(described(shape="()", data=b"x")),
    "no images": with_images(npy(IMAGES[:0])),
    "no channels": with_images(npy(IMAGES[..., :0])),
    "no rows": with_images(npy(IMAGES[:, :0])),
    "100 GB that the file lacks": with_images(described(shape=f"({100 * GIB // 768}, 16, 16, 3)", data=good)),
    "more than the file has": with_images(described(shape="(9, 16, 16, 3)", data=IMAGES.tobytes())),
    "less than the file has": with_images(described(shape="(7, 16, 16, 3)", data=IMAGES.tobytes())),
    "order that is no truth value": with_images(described(order="'yes'")),
    "order of Fortran": with_images(npy(np.asfortranarray(IMAGES))),
    "objects": with_images(described("'|O'", data=b"cos\nsystem\n(S'touch executed'\ntR.")),
    "objects in fields": with_images(described("[('a', '|O')]")),
    "empty type": with_images(described("''")),
    "unknown type": with_images(described("'<q9'")),
    "type that is None": with_images(described("None")),
    "type that is a number": with_images(described("3")),
    "type that is a dictionary": with_images(described("{'names': ['a'], 'formats': ['|u1']}")),
    "type that is bytes": with_images(described("b'|u1'")),
    "type of 2 GB items": with_images(described("'|V2000000000'", shape="(8,)")),
    "text of 2 GB items": with_images(described("'<U500000000'", shape="(1,)")),
    "items of no bytes": with_images(described("'|V0'", shape=f"({2**40},)")),
    "text of no bytes": with_images(described("'<U0'", shape=f"({2**40},)")),
    "type of fields": with_images(described("[('a', '|u1'), ('b', '<f4')]", shape="(8,)")),
    "type of sub-arrays": with_images(described("[('a', '|u1', (1000000, 1000000))]", shape="(8,)")),
    "type with commas": with_images(described("'|u1,|u1'", shape="(8,)")),
    "type of many commas": with_images(described("'" + "|u1," * 8000 + "'", shape="(8,)")),
    "type with a negative sub-array": with_images(described("[('a', '|u1', (-1,))]", shape="(8,)")),
    "two fields of one name": with_images(described("[('a', '|u1'), ('a', '|u1')]", shape="(8,)")),
    "deep fields": with_images(described("[('a', " * 200 + "'|u1'" + ")]" * 200, shape="(8,)")),
    "dates": with_images(npy(np.zeros((8, 16, 16, 3), "M8[s]"))),
    "complex numbers": with_images(npy(IMAGES.astype(np.complex64))),
    "truth values": with_images(npy(IMAGES > 100)),
    "texts": with_images(npy(np.full((8, 16, 16, 3), "x"))),
    "big-endian numbers": with_images(npy(IMAGES.astype(">i4"))),
    "half precision that is not finite": with_images(npy(np.full((8, 3, 16, 16), np.nan, np.float16))),
    "long doubles": with_images(npy(np.zeros((8, 3, 16, 16), np.longdouble))),
    "values of 1e300": with_images(npy(np.full((8, 3, 16, 16), 1e300))),
    "infinite values": with_images(npy(np.full((8, 3, 16, 16), np.inf, np.float32))),
    "two channels": with_images(npy(IMAGES[..., :2])),
    "four channels": with_images(npy(np.zeros((8, 16, 16, 4), np.uint8))),
    "five sides": with_images(npy(IMAGES[None])),
    "labels of another length": with_images(good, labels=LABELS[:3]),
    "labels that are negative": with_images(good, labels=LABELS - 1),
    "labels that are floats": with_images(good, labels=LABELS.astype(float)),
    "labels that are text": with_images(good, labels=LABELS.astype(str)),
    "labels of two sides": with_images(good, labels=LABELS[:, None]),
    "labels of 2^63": with_images(good, labels=np.full(8, 2**63, np.uint64)),
    "labels beyond the classes": with_images(good, labels=LABELS + 4),
    "labels alone": npz({"labels.npy": npy(LABELS)}),
    "no labels": with_images(good[:0] + npy(IMAGES[:0]), labels=LABELS[:0]),
    "labels of objects": npz({"images.npy": good, "labels.npy": described("'|O'", shape="(8,)", data=b"x")}),
    "an empty member for labels": npz({"images.npy": good, "labels.npy": b""}),
    "domain of objects": npz({"images.npy": good, "domain.npy": described("'|O'", shape="()", data=b"x")}),
    "real that is text": with_images(good, real=np.array("yes")),
    "real that has no values": with_images(good, real=np.zeros(0, bool)),
    "real of 6 GB": npz({"images.npy": good, "real.npy": described("'|b1'", shape=f"({6 * GIB},)")}),
    "origin that is nothing": with_images(good, labels=LABELS, label_origin=np.array("evil")),
    "origin with escapes": with_images(good, labels=LABELS, label_origin=np.array(ESCAPES * 5)),
    "origin of 2 GB": npz({"images.npy": good, "labels.npy": npy(LABELS), "label_origin.npy": described("'<U500000000'", shape="()")}),
    "origin that is an array": with_images(good, labels=LABELS, label_origin=np.arange(100_000)),
}  # fmt: skip
