"""Hostile ONNX and IR files, images, and modules with factories."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
from onnx import AttributeProto, TensorProto, helper

from tests.hostile.archives import ESCAPES

FLOAT = TensorProto.FLOAT


def model(nodes, inputs=None, outputs=None, constants=(), opset=17):
    inputs = [("input", (1, 3, 16, 16))] if inputs is None else inputs
    outputs = [("out", (1, 4))] if outputs is None else outputs
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs], list(constants),
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9).SerializeToString()


def constant(name, shape, values=None, kind=FLOAT):
    values = np.zeros(shape, np.float32) if values is None else values
    return helper.make_tensor(name, kind, shape, values.tobytes(), raw=True)


def small(extra=(), start="input"):
    """A convolution, pooling and a matrix."""
    return [
        *extra, helper.make_node("Conv", [start, "w"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]), helper.make_node("MatMul", ["f", "m"], ["out"]),
    ]  # fmt: skip


WEIGHTS = (constant("w", (4, 3, 3, 3)), constant("m", (4, 4)))


def nested(levels, kind="If"):
    """An If in an If in an If, joined as bytes: protobuf writes at most a hundred levels."""
    leaf = branch("leaf", field(1, helper.make_node("Identity", ["input"], ["leaf"]).SerializeToString()))
    inner, name = leaf, "leaf"
    for level in range(levels + 1):
        name = f"o{level}"
        node = helper.make_node("If", ["yes"], [name]).SerializeToString()
        for key, graph in (("then_branch", inner), ("else_branch", inner if kind == "wide" else leaf)):
            node += field(5, AttributeProto(name=key, type=AttributeProto.GRAPH).SerializeToString() + field(6, graph))
        inner = branch(name, field(1, node))
    yes = helper.make_tensor("yes", TensorProto.BOOL, (), [True])
    nodes = [node, *(node.SerializeToString() for node in small(start=name))]
    return model([], constants=(*WEIGHTS, yes)) + field(7, b"".join(field(1, node) for node in nodes))


def branch(output, nodes):
    named = helper.make_tensor_value_info(output, FLOAT, None)
    return helper.make_graph([], f"graph-{output}", [], [named]).SerializeToString() + nodes


def field(number, content):
    """A field of protobuf that holds bytes or a message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def deep_protobuf(levels):
    """Groups in groups, which parsers follow by recursion."""
    data = b""
    for _ in range(levels):
        data = b"\x3a" + varint(len(data)) + data
    return data


def varint(number):
    made = b""
    while number > 127:
        made += bytes((number & 127 | 128,))
        number >>= 7
    return made + bytes((number,))


def chain(count):
    nodes = [helper.make_node("Relu", [f"r{i}" if i else "input"], [f"r{i + 1}"]) for i in range(count)]
    return model(small(nodes, f"r{count}"), constants=WEIGHTS)


def doubling(count):
    nodes = [helper.make_node("Concat", [f"r{i}" if i else "input"] * 2, [f"r{i + 1}"], axis=2) for i in range(count)]
    return model(small(nodes, f"r{count}"), constants=WEIGHTS)


def external(location):
    tensor = TensorProto(name="w", dims=(4, 3, 3, 3), data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "432"}.items():
        tensor.external_data.add(key=key, value=value)
    return model(small(), constants=(tensor, WEIGHTS[1]))


good = model(small(), constants=WEIGHTS)

ONNX = {
    "empty file": b"",
    "text": b"<html>Not found</html>",
    "zeros": bytes(1000),
    "truncated": good[:-100],
    "half": good[: len(good) // 2],
    "a torch file": b"PK\x03\x04" + bytes(100),
    "deep protobuf": deep_protobuf(5000),
    "no nodes": model([], outputs=[]),
    "no inputs": model([helper.make_node("Constant", [], ["out"], value=constant("v", (1, 4)))], inputs=[]),
    "no outputs": model(small(), outputs=[], constants=WEIGHTS),
    "two inputs": model(small(), inputs=[("input", (1, 3, 16, 16)), ("more", (1, 3))], constants=WEIGHTS),
    "an input of two sides": model([helper.make_node("Identity", ["input"], ["out"])], inputs=[("input", (1, 4))]),
    "an input without sides": model([helper.make_node("Identity", ["input"], ["out"])], inputs=[("input", ())]),
    "an input of open sides": model(small(), inputs=[("input", (None, None, None, None))], constants=WEIGHTS),
    "an input of huge sides": model(small(), inputs=[("input", (1, 3, 2**30, 2**30))], constants=WEIGHTS),
    "an input of no sides": model(small(), inputs=[("input", (1, 3, 0, 0))], constants=WEIGHTS),
    "an input of negative sides": model(small(), inputs=[("input", (1, 3, -5, -5))], constants=WEIGHTS),
    "a batch of 8": model(small(), inputs=[("input", (8, 3, 16, 16))], outputs=[("out", (8, 4))], constants=WEIGHTS),
    "an unknown operation": model([helper.make_node("Evil", ["input"], ["out"])]),
    "an unknown operation with escapes": model([helper.make_node(ESCAPES, ["input"], ["out"])]),
    "an unknown domain": model([helper.make_node("Evil", ["input"], ["out"], domain="evil.com")]),
    "an opset of 10^9": model(small(), constants=WEIGHTS, opset=10**9),
    "missing weights": model(small(), constants=WEIGHTS[:1]),
    "a cycle": model([helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Flatten", ["b"], ["out"])]),
    "the same name twice": model([helper.make_node("Relu", ["input"], ["a"]), helper.make_node("Relu", ["input"], ["a"]), helper.make_node("Flatten", ["a"], ["out"])]),
    "names with escapes": model([helper.make_node("Flatten", ["input"], [ESCAPES], name=ESCAPES)], outputs=[(ESCAPES, (1, 768))]),
    "weights elsewhere": external("/etc/passwd"),
    "weights in the folder above": external("../../../../etc/passwd"),
    "weights that are missing": external("missing.bin"),
    "weights of a wrong length": model(small(), constants=(TensorProto(name="w", dims=(4, 3, 3, 3), data_type=FLOAT, raw_data=b"xx"), WEIGHTS[1])),
    "weights of a negative size": model(small(), constants=(TensorProto(name="w", dims=(-4, 3, 3, 3), data_type=FLOAT, raw_data=b""), WEIGHTS[1])),
    "weights of 2^40 values": model(small(), constants=(TensorProto(name="w", dims=(2**20, 2**20), data_type=FLOAT, raw_data=b""), WEIGHTS[1])),
    "a constant of 2^40 values": model([helper.make_node("ConstantOfShape", ["s"], ["x"]), helper.make_node("Flatten", ["x"], ["out"])], constants=(helper.make_tensor("s", TensorProto.INT64, (2,), [2**20, 2**20]),)),
    "an expansion to 2^40 values": model([helper.make_node("Expand", ["input", "s"], ["x"]), helper.make_node("Flatten", ["x"], ["out"])], constants=(helper.make_tensor("s", TensorProto.INT64, (5,), [2**20, 1, 3, 16, 16]),)),
    "40 doublings": doubling(40),
    "a chain of 5000": lambda: chain(5000),
    "nested If, 20 levels": lambda: nested(20),
    "nested If, 300 levels": lambda: nested(300),
    "nested If, doubling": lambda: nested(13, "wide"),
    "an output of two sides too many": model([helper.make_node("Identity", ["input"], ["out"])], outputs=[("out", (1, 3, 16, 16))]),
}  # fmt: skip

IR = {
    "empty file": b"",
    "text": b"<html>Not found</html>",
    "no net": b"<?xml version='1.0'?><a/>",
    "an empty net": b"<?xml version='1.0'?><net name='x' version='11'></net>",
    "a net of version 1": b"<?xml version='1.0'?><net name='x' version='1'><layers/><edges/></net>",
    "no layers": b"<?xml version='1.0'?><net name='x' version='11'><layers/><edges/></net>",
    "truncated": b"<?xml version='1.0'?><net name='x' version='11'><layers><layer id='0' name='x' type='Parameter'",
    "entities that double": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'lol'>" + b"".join(b"<!ENTITY a%d '&a%s;&a%s;'>" % (i, str(i - 1).encode() if i > 1 else b"", str(i - 1).encode() if i > 1 else b"") for i in range(1, 40)) + b"]><net name='&a39;' version='11'/>",
    "an entity of a file": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><net name='&a;' version='11'/>",
    "deep elements": b"<net>" * 50_000,
    "a layer of an unknown type": b"<?xml version='1.0'?><net name='x' version='11'><layers><layer id='0' name='x' type='Evil' version='opset1'/></layers><edges/></net>",
    "a constant beyond the weights": b"<?xml version='1.0'?><net name='x' version='11'><layers><layer id='0' name='x' type='Const' version='opset1'><data element_type='f32' shape='1000000,1000000' offset='0' size='4000000000000'/><output><port id='0' precision='FP32'><dim>1000000</dim><dim>1000000</dim></port></output></layer></layers><edges/></net>",
    "identifiers of text": b"<?xml version='1.0'?><net name='x' version='11'><layers><layer id='a' name='x' type='Parameter' version='opset1'/></layers><edges><edge from-layer='b' from-port='c' to-layer='d' to-port='e'/></edges></net>",
    "a shape of text": b"<?xml version='1.0'?><net name='x' version='11'><layers><layer id='0' name='x' type='Parameter' version='opset1'><data shape='a,b' element_type='f32'/></layer></layers><edges/></net>",
    "escapes": b"<?xml version='1.0'?><net name='x' version='11'><layers><layer id='0' name='&#27;[31m' type='&#27;[31m' version='opset1'/></layers><edges/></net>",
}  # fmt: skip


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=b"", bits=8, colours=0, more=b""):
    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def picture(form, size=(16, 16), mode="RGB", **options):
    stream = io.BytesIO()
    PIL.Image.effect_noise(size, 60).convert(mode).save(stream, form, **options)
    return stream.getvalue()


# Each lies among ten good pictures: it is skipped and counted, or read.
PICTURES = {
    "empty.png": b"",
    "text.png": b"<html>",
    "signature.png": b"\x89PNG\r\n\x1a\n",
    "truncated.png": picture("PNG")[:100],
    "truncated.jpg": picture("JPEG")[:-100],
    "bomb of 20000 x 20000.png": png(20_000, 20_000, bits=1, data=bytes(20_000 * 2501)),
    "bomb of 60000 x 60000.png": png(60_000, 60_000),
    "warning of 10000 x 10000.png": png(10_000, 10_000, bits=1, data=bytes(10_000 * 1251)),
    "2^31.png": png(2**31 - 1, 2**31 - 1),
    "no width.png": png(0, 16),
    "one row of 2^30.png": png(2**30, 1),
    "text bomb.png": png(16, 16, bytes(16 * 17), more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))),
    "profile bomb.png": png(16, 16, bytes(16 * 17), more=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000)))),
    "huge.bmp": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    "negative.bmp": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, -16, -16, 1, 24, 0, 0, 0, 0, 0, 0),
    "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x4c\x01\0;",
    "huge.ppm": b"P6 60000 60000 255\n",
    "digits.ppm": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "text.ppm": b"P6 a b c\n",
    "huge.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 3) + struct.pack("<HHII", 256, 4, 1, 2**30) + struct.pack("<HHII", 257, 4, 1, 2**30) + struct.pack("<HHII", 258, 3, 1, 8) + bytes(4),
    "loop.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 16) + struct.pack("<I", 8),
    "huge.webp": b"RIFF\xff\xff\xff\xffWEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff\xff\xff\xff",
    "profile that is none.jpg": picture("JPEG", icc_profile=b"x" * 200),
    "exif that is none.jpg": picture("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "palette.png": picture("PNG", mode="P"),
    "transparent.png": picture("PNG", mode="LA"),
    "16 bits.png": picture("PNG", mode="I"),
    "CMYK.jpg": picture("JPEG", mode="CMYK"),
    "floats.tif": picture("TIFF", mode="F"),
    "one pixel.png": picture("PNG", size=(1, 1)),
    "one row.png": picture("PNG", size=(5000, 1)),
    f"escapes {chr(27)}[31m.png": b"",
    "an EPS called png.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\nshowpage\n",
    "an ICO called png.png": b"\0\0\1\0\xff\xff" + bytes(100),
    "a PSD called png.png": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(20),
    "an SVG called png.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>",
}  # fmt: skip

HEAD = "import torch\nfrom torch import nn\n"

# Python files of the user, and what comes after the colon.
FACTORIES = {
    "syntax error": ("def make(:\n", "make"),
    "indentation": ("  x = 1\n y\n", "make"),
    "zeros in the source": ("x = '\0'\n", "make"),
    "no UTF-8": (b"x = '\xff\xfe'\n", "make"),
    "deep source": ("x = " + "(" * 500 + ")" * 500, "make"),
    "exception while importing": ("raise RuntimeError('broken \x1b[31m')", "make"),
    "exception without text": ("raise RuntimeError", "make"),
    "exception of its own": ("class E(BaseException): pass\nraise E('x')", "make"),
    "exception whose text fails": ("class E(Exception):\n    def __str__(self): raise ValueError('no')\nraise E", "make"),
    "exit while importing": ("raise SystemExit(1)", "make"),
    "exit with a text": ("raise SystemExit('bye')", "make"),
    "sys.exit in the factory": ("import sys\ndef make(): sys.exit(0)", "make"),
    "interrupt": ("def make(): raise KeyboardInterrupt", "make"),
    "missing import": ("import there_is_no_such_module", "make"),
    "missing import in the factory": ("def make(): import there_is_no_such_module", "make"),
    "missing name in an import": ("from torch import there_is_no_such_name", "make"),
    "relative import": ("from . import x", "make"),
    "recursion": ("def make(): return make()", "make"),
    "assertion": ("def make(): assert False", "make"),
    "stop iteration": ("def make(): raise StopIteration", "make"),
    "warning as error": ("def make():\n    import warnings\n    raise UserWarning('x')", "make"),
    "memory error": ("def make(): raise MemoryError", "make"),
    "key error": ("def make(): return {}['x']", "make"),
    "OSError": ("def make(): open('/there/is/none')", "make"),
    "file as the attribute": ("make = 3", "make"),
    "attribute that is a module": ("import torch as make", "make"),
    "attribute that is missing": ("x = 1", "make"),
    "attribute without a name": ("x = 1", ""),
    "attribute of an attribute": ("class A:\n    make = 1", "A.make"),
    "attribute with escapes": ("x = 1", "\x1b[31m"),
    "attribute that raises": ("def __getattr__(name): raise RuntimeError('no')", "make"),
    "arguments": ("def make(x): return x", "make"),
    "gives None": ("def make(): return None", "make"),
    "gives a class": (HEAD + "def make(): return nn.ReLU", "make"),
    "gives text": ("def make(): return 'x' * 10**7", "make"),
    "gives a list of modules": (HEAD + "def make(): return [nn.ReLU()]", "make"),
    "gives something whose class name has escapes": ("make = type('\x1b[31m', (), {})", "make"),
    "forward raises": (HEAD + "class make(nn.Module):\n    def forward(self, x): raise ValueError", "make"),
    "forward raises its own": (HEAD + "class E(Exception):\n    def __str__(self): raise E\nclass make(nn.Module):\n    def forward(self, x): raise E", "make"),
    "forward exits": (HEAD + "class make(nn.Module):\n    def forward(self, x): raise SystemExit(0)", "make"),
    "forward without an argument": (HEAD + "class make(nn.Module):\n    def forward(self): return 1", "make"),
    "forward of two arguments": (HEAD + "class make(nn.Module):\n    def forward(self, x, y): return x", "make"),
    "no forward": (HEAD + "class make(nn.Module): pass", "make"),
    "no super().__init__()": (HEAD + "class make(nn.Module):\n    def __init__(self): self.x = nn.ReLU()", "make"),
    "eval raises": (HEAD + "class make(nn.Module):\n    def train(self, mode=True): raise RuntimeError('no')", "make"),
    "state_dict raises": (HEAD + "class make(nn.Module):\n    def state_dict(self, *a, **k): raise RuntimeError('no')\n    def forward(self, x): return x.mean((2, 3))", "make"),
    "parameters on meta": (HEAD + "def make():\n    with torch.device('meta'): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())", "make"),
    "prints": (HEAD + "print('\x1b[31mhello')\ndef make():\n    print('x')\n    raise ValueError('y')", "make"),
}  # fmt: skip

# Module names as they are given, without a file.
MODULES = ["", ".", "..", ".x", "..x.y", "x.", "x..y", "/", "a/b", "\x1b[31m", "\x00", " ", "os.path", "import", "é", "x" * 5000, "1", "tests",
           "__main__", "C", "None", "ovcalib..api", "-", "*"]  # fmt: skip
