"""Hostile JSON and YAML."""

import json
from pathlib import Path

from tests.hostile.archives import ESCAPES

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "result-0.1.json").read_text())


def result(*place, value, keep=True):
    """The golden result with another value at a place; `keep=False` takes the entry out."""
    content = json.loads(json.dumps(GOLDEN))
    owner = content
    for part in place[:-1]:
        owner = owner[part]
    if keep:
        owner[place[-1]] = value
    else:
        del owner[place[-1]]
    return json.dumps(content)


def raw(place, text):
    """The golden result with this text at a place."""
    return result(*place.split("."), value="@@@").replace('"@@@"', text)


DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 5_000 + "1" + "}" * 5_000
DIGITS = "1" * 5000
NUMBERS = {
    "NaN": "NaN", "infinity": "Infinity", "minus infinity": "-Infinity", "1e999": "1e999", "400 digits": "9" * 400,
    "5000 digits": DIGITS, "2^64": str(2**64), "negative": "-5", "text": '"x"', "null": "null", "a list": "[1]",
    "an object": '{"a": 1}', "true": "true", "deep": DEEP,
}  # fmt: skip
PLACES = [
    "model.parameters", "model.input_shape", "model.name", "model.weights.top1", "calibration.num_samples",
    "calibration.seconds", "calibration.options", "quantization.int8_operations", "agreement.top1", "agreement.nmse",
    "agreement.count", "size_bytes.int8", "size_bytes.fp32", "benchmark", "parity.torch_vs_ir_max_abs", "files",
    "warnings", "created", "outcome", "schema_version", "recipe.seed", "recipe.max_drop", "recipe.mean", "recipe",
    "environment", "accuracy",
]  # fmt: skip

RESULTS = {
    "empty file": "",
    "text": "<html>Not found</html>",
    "zeros": "\0" * 1000,
    "no UTF-8": b"\xff\xfe{}",
    "UTF-16": json.dumps(GOLDEN).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(GOLDEN).encode(),
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "deep lists": DEEP,
    "deep objects": DEEP_OBJECT,
    "an unclosed depth": "[" * 1_000_000,
    "100 MB of spaces": lambda: b" " * 100_000_000 + b"{}",
    "100 MB of one text": lambda: b'{"a": "' + b"x" * 100_000_000 + b'"}',
    "ten million numbers": lambda: b'{"a": [' + b"1," * 10_000_000 + b"1]}",
    "a million keys": lambda: b"{" + b",".join(b'"k%d":1' % i for i in range(1_000_000)) + b"}",
    "truncated": json.dumps(GOLDEN)[:1000],
    "two objects": json.dumps(GOLDEN) * 2,
    "no keys": "{}",
    "only a version": '{"schema_version": 1}',
    "another version": result("schema_version", value=99),
    "a version with escapes": result("schema_version", value=ESCAPES),
    "a version of 10 MB": lambda: result("schema_version", value="x" * 10_000_000),
    "a version that is nested": result("schema_version", value=[[[[1]]]]),
    "a version that is true": result("schema_version", value=True),
    "an unknown key": result("evil", value=1),
    "an unknown key with escapes": result(ESCAPES, value=1),
    "an unknown key with surrogates": result("\ud800", value=1),
    "an empty key": result("", value=1),
    "a name with escapes": result("model", "name", value=ESCAPES),
    "a name with surrogates": result("model", "name", value="\ud800"),
    "a name of 10 MB": lambda: result("model", "name", value="x" * 10_000_000),
    "a name with markup": result("model", "name", value="<script>alert(1)</script>|`**"),
    "a name with line breaks": result("model", "name", value="a\nb\r\n# c"),
    "a warning with surrogates": result("warnings", value=["\udfff"]),
    "a file name with surrogates": result("files", value={"\ud800": "x"}),
    "an option with surrogates": result("calibration", "options", value={"a": "\ud800"}),
    "shape that is negative": result("model", "input_shape", value=[3, -32, 32]),
    "shape of zeros": result("model", "input_shape", value=[0, 0, 0]),
    "shape of two sides": result("model", "input_shape", value=[3, 32]),
    "shape of 10^30": result("model", "input_shape", value=[3, 10**30, 32]),
    "top-1 of 10^300": raw("agreement.top1", "1e300"),
    "top-1 that is negative": raw("agreement.top1", "-1"),
    "sizes of zero": result("size_bytes", value={"fp32": 0, "int8": 0}),
    "a date that is none": result("created", value="yesterday"),
    "a latency of zeros": result("benchmark", "latency_ms", "fp32", value={"p50": 0, "p90": 0, "p99": 0, "mean": 0, "min": 0, "max": 0, "n": 0}),
    "a latency of 1e308": result("benchmark", "latency_ms", "fp32", value={"p50": 1e308, "p90": 1e308, "p99": 1e308, "mean": 1e308, "min": -1e308, "max": 1e308, "n": 1}),
    "a histogram of other lengths": result("benchmark", "latency_ms", "fp32", value={"p50": 1, "p90": 1, "p99": 1, "mean": 1, "min": 1, "max": 1, "n": 1, "edges": [1, 2], "counts": [1, 2, 3, 4, 5]}),
    "a recipe with a deep value": raw("recipe.options", DEEP_OBJECT),
    "a recipe of lists": result("recipe", value=[[["model", "x"]]]),
    "a benchmark of another kind": result("benchmark", value={"device": 3}),
}  # fmt: skip
RESULTS |= {f"{place} is missing": result(*place.split("."), value=None, keep=False) for place in PLACES}
RESULTS |= {f"{place}: {name}": raw(place, text) for place in PLACES for name, text in NUMBERS.items()}


def laughs(levels, width=10):
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\nmodel: *a{levels - 1}\n"


def merging(levels):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], y{i}: 1}}" for i in range(1, levels)]
    return "\n".join(lines) + f"\nmodel: *a{levels - 1}\n"


def recipe(**fields):
    return "model: resnet20-cifar10\n" + "".join(f"{name}: {value}\n" for name, value in fields.items())


FIELDS = {
    "seed": [".nan", "-1", "1e400", "9" * 400, DIGITS, "0x" + "f" * 5000, "~", "true", "[1]", "1.5", "2020-01-01"],
    "num_samples": [".nan", ".inf", "0", "-1", "9" * 30, "1:30:59", "{a: 1}"],
    "max_drop": [".nan", ".inf", "-.inf", "2", "-1", "x", "[0.1]"],
    "benchmark_time": [".nan", ".inf", "-1", "1e308", "9" * 400],
    "max_time": [".nan", ".inf", "0"],
    "mean": [".nan", "[.nan, 0, 0]", "[.inf, 0, 0]", "[1, 2]", "x,y,z", "'nan,nan,nan'", "[[1], 2, 3]", "'" + "1," * 100_000 + "1'", "[]", "1e400"],
    "std": [".nan", "[.nan, 1, 1]", "[0, 0, 0]", "[-1, 1, 1]", "'inf,inf,inf'", "[1e-300, 1, 1]", "[1e300, 1, 1]", "''"],
    "input_shape": ["[3, -32, 32]", "[.nan, 32, 32]", "[.inf, 32, 32]", "'nan,inf,3'", "'inf,inf,inf'", "[3, 1e30, 32]", "[3, 99999999, 99999999]", "[0, 0, 0]", "[3]", "3", "'3,32,32,'", "{a: 1}"],
    "short_side": ["-1", "99999999999", ".nan", "x"],
    "limit": ["0", "-1", ".inf", "9" * 400],
    "options": ["[1]", "{1: 2}", "{a: [1]}", "{a: {b: c}}", "{~: ~}", "{[a]: 1}", "x", "{a: .nan}"],
    "ignore": ["x", "[1]", "{a: 1}", "[[a]]", "['" + "*" * 30_000 + "a']"],
    "calib": ["3", "[fractal]", "~", "'\\ud800'", '"\\ud800"', "'real:\\0'", '"real:\\0"', '"\\e[31m"', "''", "':'", "npz:" + "x" * 5000],
    "eval": ['"imagefolder:\\0"', "imagefolder:" + "x" * 5000, "3", '"\\ud800"', "''", "':'", "'imagefolder:'"],
    "device": ["3", "''", '"\\e[31m"', '"\\0"', "x" * 100_000],
    "weights": ['"\\0"', "x" * 5000, "3", "''", ".", "/dev/null", '"\\ud800"'],
    "mode": ["x", "3", "~", "[default]"],
    "evil": ["1"],
    "model": ["3", "~", "''", "':'", "a:", "':a'", "[a]", '"\\0"', '"\\ud800"', '"\\e[31m"', "x" * 100_000, "{reference: 3}", "{}", "{a: b}", ".onnx", ".xml", "/.onnx", '"a\\0.onnx"', "x" * 5000 + ".onnx"],
}  # fmt: skip

RECIPES = {
    "empty file": "",
    "text": "<html>Not found</html>",
    "a list": "[1, 2]",
    "a number": "3",
    "a date": "2020-01-01",
    "zeros": "\0" * 100,
    "no UTF-8": b"\xff\xfe\xfa",
    "UTF-16": recipe().encode("utf-16"),
    "control characters": "model: \x1b[31m",
    "escapes in a key": f'"{json.dumps(ESCAPES)[1:-1]}": 1',
    "tabs": "\tmodel: x",
    "unclosed": "model: [",
    "unclosed text": 'model: "x',
    "two documents": "model: a\n---\nmodel: b\n",
    "laughs": laughs(9),
    "laughs of 9^30": laughs(30),
    "laughs in options": laughs(9).replace("model:", "options:"),
    "laughs as a key": "a: &a [b]\n? *a\n: 1\n",
    "merging": merging(25),
    "merging of 20,000": "".join(f"a{i}: &a{i} {{<<: *a{i - 1}, y{i}: 1}}\n" if i else "a0: &a0 {x: 1}\n" for i in range(1500)) + "model: *a1499\n",
    "merging of text": "<<: x\nmodel: a",
    "an anchor in itself": "model: &a [*a]",
    "an anchor in itself as options": "model: resnet20-cifar10\noptions: &a {a: *a}",
    "an alias that is not there": "model: *a",
    "deep lists": "model: " + DEEP,
    "deep maps": "model: " + "{a: " * 3000 + "1" + "}" * 3000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(2000)),
    "deep sequences": "- " * 3000 + "a",
    "tags": "!!python/object/apply:os.system ['touch executed']",
    "other tags": "model: !evil x",
    "binary": "model: !!binary aGFsbG8=",
    "binary that is none": "model: !!binary '!!!'",
    "sets": "model: !!set {a, b}",
    "pairs": "model: !!pairs [a: 1]",
    "ordered maps": "model: !!omap [a: 1]",
    "a date that is none": "model: 2020-99-99",
    "a timestamp that is none": "model: !!timestamp x",
    "a number that is none": "model: !!int x",
    "a float that is none": "model: !!float x",
    "a truth value that is none": "model: !!bool x",
    "a number of sixties": "model: resnet20-cifar10\nseed: " + "1:" * 20_000 + "1",
    "keys that are numbers": "1: 2\nmodel: a",
    "keys that are null": "~: 2\nmodel: a",
    "keys that are dates": "2020-01-01: 2",
    "keys that are lists": "[1]: 2",
    "keys that are maps": "{a: 1}: 2",
    "the same key twice": "model: a\nmodel: b",
    "stages that are lists": "model: a\ncalibration: [1]",
    "stages that are texts": "model: a\ncalibration: x",
    "a stage in a stage": "model: {reference: a, model: {reference: b}}",
    "10 MB": lambda: "# x\n" * 2_500_000 + "model: a",
    "10 MB of fields": lambda: "".join(f"k{i}: {i}\n" for i in range(500_000)),
    "a text of 10 MB": lambda: "model: " + "x" * 10_000_000,
    "directives": "%YAML 9.9\n---\nmodel: a",
    "many directives": "%TAG !a! x\n" * 2000 + "---\nmodel: a",
}  # fmt: skip
RECIPES |= {
    f"{name}: {value if len(value) < 30 else f'{value[:20]}... ({len(value)})'}": recipe(**{name: value}) if name != "model" else f"model: {value}\n"
    for name, values in FIELDS.items()
    for value in values
}  # fmt: skip

SWEEPS = {
    "empty": "",
    "laughs": laughs(9).replace("model:", "models:"),
    "no models": "models: []\nsources: [noise]",
    "models that are numbers": "models: [1]\nsources: [noise]",
    "models that are null": "models: [~]\nsources: [noise]",
    "shapes that are not finite": "models: [{model: a, input_shape: [.nan, 1, 1]}]\nsources: [noise]",
    "means that are not finite": "models: [{model: a, mean: [.nan, 1, 1]}]\nsources: [noise]",
    "deep common fields": "models: [a]\nsources: [noise]\ncommon: " + "{a: " * 200 + "1" + "}" * 200,
    "common fields that are numbers": "models: [a]\nsources: [noise]\ncommon: {1: 2}",
    "common fields of dates": "models: [a]\nsources: [noise]\ncommon: {seed: 2020-01-01}",
    "a common field of a set": "models: [a]\nsources: [noise]\ncommon: {ignore: !!set {a, b}}",
    "seeds that are not finite": "models: [a]\nsources: [noise]\nseeds: [.nan]",
    "seeds of 400 digits": f"models: [a]\nsources: [noise]\nseeds: [{'9' * 400}]",
    "a million seeds": lambda: f"models: [a]\nsources: [noise]\nseeds: [{','.join(map(str, range(1_000_000)))}]",
    "a thousand of each": lambda: f"models: [{','.join(f'm{i}' for i in range(1000))}]\nsources: [noise, fractal]\nseeds: [{','.join(map(str, range(1000)))}]",
    "an unknown source": "models: [a]\nsources: ['\\e[31m']",
    "names with zeros": 'models: ["a\\0b"]\nsources: [noise]',
    "names with surrogates": 'models: ["\\ud800"]\nsources: [noise]',
    "times that are not finite": "models: [a]\nsources: [noise]\nbenchmark_time: .nan",
    "evaluation of a huge name": f"models: [a]\nsources: [noise]\neval: imagefolder:{'x' * 5000}",
}  # fmt: skip
