"""Readers of files from outside raise one of our errors, or read, whatever they are given.

The fast suite tries a few dozen examples of each, the slow one thousands.
"""

import io
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovcalib.data.arrays import Npz, read_npy
from ovcalib.errors import DataError, ModelError, OvcalibError, UsageError
from ovcalib.models.pickles import EMBEDDED, interpret, read_torch
from ovcalib.models.weights import load_state_dict, read_safetensors
from ovcalib.records.read import read_recipe, read_record
from ovcalib.records.recipe import make_recipe
from ovcalib.reports.result import result_page
from tests.hostile import archives, texts, weights

FEW, MANY = 30, 3000


@pytest.fixture(scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def examples(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def fuzz(examples, strategy, check):
    """Check so many examples, the same ones every time."""
    allow = list(HealthCheck)
    settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=allow)(
        given(strategy)(check)
    )()


@st.composite
def damaged(draw, originals):
    """One of some byte strings with up to four damages: bytes, cuts, repetitions."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["byte", "cut", "end", "repeat", "insert"])):
            case "byte" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case "end":
                del data[at:]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 60))]
            case _:
                data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)


def readable(function, error):
    """Call a reader; only one type of error may come out, short and without control characters."""
    try:
        return function()
    except error as raised:
        text = str(raised)
        assert len(text) <= 4000
        assert text.replace("\n", "").isprintable()
        return None


SMALL = archives.npz(
    {"images.npy": archives.npy(archives.IMAGES[:1, :2, :2]), "labels.npy": archives.npy(np.arange(1))}
)
PACKED = io.BytesIO()
np.savez_compressed(PACKED, images=np.zeros((2, 3, 3, 3), np.uint8), name=np.array("x"))
HEADER_PARTS = ["'descr'", "'fortran_order'", "'shape'", "'|u1'", "'<f4'", "'|O'", "'<U9'", "True", "False", "None", "(2, 3)",
                "(-1,)", "()", "(", ")", "{", "}", "[", "]", ":", ", ", "1", "9" * 30, "'", "\\", "\0", "\n", "# ", "+", "-"]  # fmt: skip


def test_npz(examples, folder):
    def check(data):
        (folder / "x.npz").write_bytes(data)

        def read():
            with Npz(folder / "x.npz") as archive:
                for name in archive.names:
                    readable(partial(archive.read, name), DataError)

        readable(read, DataError)

    fuzz(examples, damaged([SMALL, PACKED.getvalue()]), check)


def test_headers_of_arrays(examples, folder):
    def check(parts):
        (folder / "x.npy").write_bytes(archives.header("".join(parts)) + bytes(64))
        readable(lambda: read_npy(folder / "x.npy"), DataError)

    fuzz(examples, st.lists(st.sampled_from(HEADER_PARTS), max_size=30), check)


STATE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": {"c": (1, 2.5, None, "x")},
    "d": torch.ones(2).half(),
}


def test_files_of_torch_save(examples, folder):
    originals = [weights.saved(STATE), weights.legacy(STATE), weights.saved(torch.zeros(2))]

    def check(data):
        (folder / "x.pt").write_bytes(data)
        readable(lambda: read_torch(folder / "x.pt"), ModelError)
        readable(lambda: load_state_dict(folder / "x.pt"), ModelError)

    fuzz(examples, damaged(originals), check)


INSTRUCTIONS = [b"(", b")", b"]", b"}", b"N", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"R", b"\x81", b"b", b"Q",
                b"0", b"2", b"\x8f", b"\x90", b"q\0", b"h\0", b"\x94", b"\x93", b"\x88", b"K\x01", b"J\xff\xff\xff\xff",
                b"\x8a\x08" + b"\x7f" * 8, b"G" + b"\x7f\xf8" + bytes(6), b"X\x01\0\0\0a", b"B\x02\0\0\0ab",
                b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n",
                b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.storage\n_load_from_bytes\n", b"cos\nsystem\n"]  # fmt: skip


def test_programs_of_pickle(examples):
    def check(parts):
        data = b"\x80\x02" + b"".join(parts) + b"."
        readable(lambda: interpret(io.BytesIO(data), len(data), EMBEDDED), ModelError)

    fuzz(examples, st.lists(st.sampled_from(INSTRUCTIONS), max_size=60), check)


def test_plain_pickles_are_read_as_pickle_reads_them(examples):
    scalars = (
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text() | st.binary()
    )
    keys = st.text() | st.integers(0, 1000)
    trees = st.recursive(
        scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner), max_leaves=20
    )

    def check(value):
        for protocol in (2, 4):
            data = pickle.dumps(value, protocol)
            assert interpret(io.BytesIO(data), len(data) + 1000, EMBEDDED) == value

    fuzz(examples, trees, check)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from([-1, 0, 2**63, 10**400, "F32", "BF16", "x" * 500, "\ud800", archives.ESCAPES]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@st.composite
def changed(draw, original):
    """A JSON object with other values at one to three places, or without them."""
    content = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        owner = content
        while True:
            keys = list(owner) if isinstance(owner, dict) else range(len(owner))
            if not len(keys):
                break
            key = draw(st.sampled_from(keys))
            if isinstance(owner[key], dict | list) and owner[key] and draw(st.integers(0, 3)):
                owner = owner[key]
                continue
            if draw(st.booleans()) and isinstance(owner, dict):
                del owner[key]
            else:
                owner[key] = draw(JSON_VALUES)
            break
    return content


def test_safetensors(examples, folder):
    header = {"__metadata__": {"format": "pt"}, "a": weights.entry(), "b": weights.entry("F16", (2, 4), (16, 32))}

    def check(value):
        content = json.dumps(value).encode("utf-8", "surrogatepass")
        (folder / "x.safetensors").write_bytes(weights.safetensors(content, bytes(32)))
        readable(lambda: read_safetensors(folder / "x.safetensors"), ModelError)

    fuzz(examples, changed(header), check)


def test_results(examples, folder):
    def check(value):
        (folder / "result.json").write_text(json.dumps(value))
        record = readable(lambda: read_record(folder / "result.json"), UsageError)
        if record is not None:
            assert "</html>" in result_page(record)

    fuzz(examples, changed(texts.GOLDEN), check)


def test_recipes(examples, folder):
    original = {"model": "resnet20-cifar10", "calibration": {"calib": "noise", "options": {"a": "b"}}, "mean": [0.1, 0.2, 0.3],
                "seed": 1, "ignore": ["a"], "input_shape": [3, 32, 32], "max_drop": 0.1, "eval": "imagefolder:x"}  # fmt: skip

    def check(value):
        (folder / "r.yaml").write_bytes(yaml.dump(value, allow_unicode=False).encode("utf-8", "surrogatepass"))
        readable(lambda: make_recipe(**read_recipe(folder / "r.yaml")), OvcalibError)
        (folder / "r.json").write_text(json.dumps(value))
        readable(lambda: make_recipe(**read_recipe(folder / "r.json")), OvcalibError)

    fuzz(examples, changed(original), check)


YAML_PARTS = ["model", ": ", "\n", "- ", "  ", "&a ", "*a", "[", "]", "{", "}", ", ", "<<", "!!int ", "!!set ", "!!python/name:os ", "? ",
              "| ", "> ", "'", '"', "\\x1b", "\x1b", "#", "---", "...", "%YAML 1.1\n", ".nan", "0x_", "1:1", "2020-01-01", "~", "\t"]  # fmt: skip


def test_texts_of_yaml(examples, folder):
    def check(parts):
        (folder / "r.yaml").write_text("".join(parts))
        content = readable(lambda: read_recipe(folder / "r.yaml"), UsageError)
        assert content is None or isinstance(content, dict)

    fuzz(examples, st.lists(st.sampled_from(YAML_PARTS), max_size=25), check)
