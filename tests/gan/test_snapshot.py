"""Snapshots: official ones load, and nothing that a file asks for is ever executed."""

import gc
import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ovcalib.errors import ModelError
from ovcalib.gan import snapshot
from ovcalib.gan.snapshot import generator_of, load_teacher, read_snapshot
from ovcalib.gan.stylegan2 import Generator
from ovcalib.models.pickles import RefusedError
from tests.gan.snapshots import Call, Persistent, dumps, generator_kwargs, record, tiny_config

FORBIDDEN = {
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "exec",
    "compile",
    "import",
}
watching: list[set[str]] = []


def watch(event, arguments) -> None:
    if watching and event in FORBIDDEN:
        watching[0].add(event)


sys.addaudithook(watch)


@pytest.fixture
def watched():
    """What the interpreter reports of executions and imports while the test runs."""
    events: set[str] = set()
    watching.append(events)
    yield events
    watching.clear()


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    made = Generator(tiny_config()).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.1)
    return made


@pytest.fixture(scope="module")
def honest(generator):
    return dumps({"training_set_kwargs": None, "G_ema": record(generator, kwargs=generator_kwargs(generator.config))})


def read(data, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    return generator_of(path, read_snapshot(path))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_snapshot_gives_the_network_that_was_saved(generator, tmp_path, protocol) -> None:
    content = {"G_ema": record(generator, kwargs=generator_kwargs(generator.config))}
    loaded = read(dumps(content, protocol), tmp_path)
    assert loaded.config == generator.config
    z, c = torch.randn(3, 8), torch.eye(3)
    assert torch.equal(loaded(z, c), generator(z, c))


def test_a_snapshot_is_converted_once(generator, honest, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OVCALIB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.pkl"
    path.write_bytes(honest)
    first = load_teacher(path).generator
    (kept,) = (tmp_path / "cache" / "stylegan2-ada").iterdir()
    monkeypatch.setattr(snapshot, "read_snapshot", lambda path: pytest.fail("converted twice"))
    z, c = torch.randn(3, 8), torch.eye(3)
    for again in (load_teacher(path), load_teacher(kept)):
        assert again.generator.config == generator.config
        assert torch.equal(again.generator(z, c), first(z, c))


def test_missing_settings_are_read_from_the_tensors(generator, tmp_path) -> None:
    config = read(dumps({"G_ema": record(generator)}), tmp_path).config
    assert (config.z_dim, config.w_dim, config.c_dim, config.img_resolution, config.num_layers) == (8, 6, 3, 8, 2)
    assert [config.channels(r) for r in (4, 8)] == [4, 4]
    assert config.conv_clamp is None


@pytest.mark.parametrize("name", ["tiny_protocol3.pkl", "tiny_protocol4.pkl"])
def test_official_files_load_and_the_process_survives(shared_data, name, watched) -> None:
    content = read_snapshot(shared_data / "stylegan2_ada" / name)
    assert {"G", "D", "G_ema", "augment_pipe"} <= set(content)
    assert "exec" not in watched
    assert "pickle.find_class" not in watched


# Hostile files --------------------------------------------------------------------------------

HOSTILE = {
    "os.system": (lambda: pickle.dumps(Call(os.system, "touch executed")), "posix system"),
    "eval": (lambda: pickle.dumps({"G_ema": Call(eval, "1")}), "eval"),
    "persistence of another version": (
        lambda: dumps({"G_ema": Persistent({"type": "class", "version": 7, "module_src": "", "class_name": "Generator", "state": {}})}),
        "version 7",
    ),
    "another class": (
        lambda: dumps({"G_ema": Persistent({"type": "class", "version": 6, "module_src": "", "class_name": "Evil", "state": {}})}),
        "'Evil'",
    ),
    "getattr": (lambda: pickle.dumps(Call(getattr, "x", "upper")), "getattr"),
    "torch.load": (lambda: pickle.dumps(Call(torch.load, "x")), "torch.serialization load"),
    "extension registry": (lambda: b"\x80\x02\x82\x01.", "EXT1"),
    "instance": (lambda: b"(i__main__\nX\n.", "INST"),
    "TensorFlow": (lambda: b"\x80\x04cdnnlib.tflib.network\nNetwork\n.", "TensorFlow"),
    "protocol 5": (lambda: pickle.dumps({}, 5), "protocol 5"),
    "huge announced bytes": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "announces"),
    "huge announced text": (lambda: b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"x.", "announces"),
    "not a dictionary": (lambda: pickle.dumps([1]), "holds a list"),
    "no network": (lambda: pickle.dumps({"model": 1}), "'model'"),
    "text": (lambda: b"<html>Not found</html>", "damaged|instruction"),
    "empty": (lambda: b"", "damaged|ends"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_anything_runs(name, tmp_path, monkeypatch, watched) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[name][0](), HOSTILE[name][1]
    watched.clear()
    with pytest.raises(ModelError, match=message):
        read(data, tmp_path)
    assert not watched & {"os.system", "exec", "pickle.find_class", "subprocess.Popen"}
    assert not (tmp_path / "executed").exists()


def poisoned(generator, blob):
    """A snapshot in which one storage is `blob`."""
    content = record(generator, kwargs=generator_kwargs(generator.config))
    state = content.meta["state"]["_modules"]["mapping"].meta["state"]
    storage = Call(torch.storage._load_from_bytes, blob)
    state["_buffers"]["w_avg"] = Call(torch._utils._rebuild_tensor_v2, storage, 0, (6,), (1,), False, {})
    return dumps({"G_ema": content})


def inner(values=6, count=6, reference=None, keys=("0",)):
    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, stream, 2)
    kept = ("storage", torch.FloatStorage, "0", "cpu", count) if reference is None else reference

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return kept if obj == "here" else None

    Pickler(stream, 2).dump("here")
    pickle.dump(list(keys), stream, 2)
    return stream.getvalue() + struct.pack("<q", count) + b"\0" * (4 * values)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (lambda: pickle.dumps(Call(os.system, "touch executed"), 2), "posix system"),
        (lambda: inner()[:-4], "truncated or damaged"),
        (lambda: inner(values=6, count=2**40), "truncated or damaged"),
        (lambda: inner(keys=("1",)), "does not describe itself"),
        (lambda: inner(reference=("module", "x")), "unknown kind"),
        (lambda: inner(values=2, count=2), "does not lie in|claims"),
        (lambda: b"PK\x03\x04", "damaged|instruction"),
        (lambda: b"", "damaged|ends"),
    ],
)
def test_poisoned_storages_are_refused(generator, blob, message, tmp_path, monkeypatch, watched) -> None:
    monkeypatch.chdir(tmp_path)
    data = poisoned(generator, blob())
    watched.clear()
    with pytest.raises(ModelError, match=message):
        read(data, tmp_path)
    assert not watched & {"os.system", "exec", "pickle.find_class"}
    assert not (tmp_path / "executed").exists()


def test_an_honest_storage_passes(generator, tmp_path) -> None:
    assert torch.equal(read(poisoned(generator, inner()), tmp_path).mapping.w_avg, torch.zeros(6))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (6,), (2,)), (1, (6,), (1,)), (-1, (6,), (1,)), (0, (2**40,), (0,)), (0, (6,), (-1,)), (0, (-6,), (1,))],
)
def test_tensors_outside_their_storage_are_refused(generator, tmp_path, offset, size, stride) -> None:
    content = record(generator, kwargs=generator_kwargs(generator.config))
    state = content.meta["state"]["_modules"]["mapping"].meta["state"]
    storage = Call(torch.storage._load_from_bytes, inner())
    state["_buffers"]["w_avg"] = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    with pytest.raises(RefusedError):
        read(dumps({"G_ema": content}), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"z_dim": 9}, "z_dim is 9"),
        ({"synthesis_kwargs": {"channel_max": 2**60}}, "channel_max"),
        ({"synthesis_kwargs": {"channel_base": 128, "channel_max": 8}}, "do not fit"),
        ({"synthesis_kwargs": {"architecture": "resnet"}}, "'resnet'"),
        ({"synthesis_kwargs": {"resample_filter": [1, 2, 1]}}, "resample_filter"),
        ({"mapping_kwargs": {"activation": "relu"}}, "'relu'"),
        ({"mapping_kwargs": {"lr_multiplier": "x"}}, "make no sense"),
        ({"mapping_kwargs": {"lr_multiplier": float("nan")}}, "lr_multiplier"),
        ({"mapping_kwargs": 3}, "not dictionaries"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(generator, tmp_path, changed, message) -> None:
    content = record(generator, kwargs=generator_kwargs(generator.config, **changed))
    with pytest.raises(ModelError, match=message):
        read(dumps({"G_ema": content}), tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path) -> None:
    broken = Generator(tiny_config())
    broken.get_parameter("synthesis.b4.const").data[0, 0, 0] = np.inf
    with pytest.raises(RefusedError, match=r"b4\.const"):
        read(dumps({"G_ema": record(broken)}), tmp_path)


def bombs():
    yield "memo", b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"."
    deep = b"\x80\x02)" + b"\x85" * 200_000 + b"."
    yield "nesting", deep
    yield "marks", b"\x80\x02" + b"(" * 200_000 + b"t."
    many = b"\x80\x02](" + b"K\x01" * 100_000 + b"eq\x00" + b"c__builtin__\nset\nh\x00\x85R" * 20_000 + b"."
    yield "the same work again and again", many
    # Every module holds the next one twice: 2^60 modules in a few thousand bytes.
    state: dict[str, dict[str, object]] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    module = Persistent({"type": "class", "version": 6, "class_name": "MappingNetwork", "state": state})
    for _ in range(60):
        state = {"_parameters": {}, "_buffers": {}, "_modules": {"a": module, "b": module}}
        module = Persistent({"type": "class", "version": 6, "class_name": "Generator", "state": state})
    yield "a tree that doubles", dumps({"G_ema": module})


@pytest.mark.parametrize(("name", "data"), list(bombs()), ids=[name for name, _ in bombs()])
def test_bombs_cost_little_time_and_memory(name, data, tmp_path) -> None:
    gc.collect()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ModelError):
        read(data, tmp_path)
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


def mutate(data, rng):
    """One to four random damages: bits, bytes, cuts, repetitions, opcodes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + rng.randint(1, 40)]
            case 3:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 60)]
            case 4:
                data[at:at] = rng.choice(
                    [b"R", b"c", b"\x93", b"b", b"0", b"(", b"t", b"\x81", b"e", b"u", b"s", b"Q", b"cos\nsystem\n"]
                )
            case 5:
                del data[max(1, at) :]
    return bytes(data)


def fuzz(data, rounds, seed, tmp_path, watched):
    rng = random.Random(seed)
    outcomes, longest = {"loaded": 0, "refused": 0}, 0
    for _ in range(rounds):
        began = time.process_time()
        mutated = mutate(data, rng)
        watched.clear()
        try:
            read(mutated, tmp_path)
            outcomes["loaded"] += 1
        except ModelError as error:
            outcomes["refused"] += 1
            longest = max(longest, len(str(error)))
        assert not watched & {"os.system", "exec", "pickle.find_class", "subprocess.Popen", "os.posix_spawn"}
        assert time.process_time() - began < 10
    assert longest < 2000
    return outcomes


def test_damaged_snapshots_are_refused_or_load(honest, tmp_path, watched) -> None:
    read(honest, tmp_path)
    assert fuzz(honest, 150, 0, tmp_path, watched)["refused"] > 20


@pytest.mark.slow
def test_thousands_of_damaged_snapshots_never_execute_hang_or_exhaust_memory(honest, tmp_path) -> None:
    """In a process of its own, with little memory to take."""
    (tmp_path / "honest.pkl").write_bytes(honest)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.gan import test_snapshot as t\n"
        "data = Path('honest.pkl').read_bytes(); t.read(data, Path('.'))\n"
        "now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))\n"
        "events = set(); t.watching.append(events)\n"
        "print(t.fuzz(data, 5000, 1, Path('.'), events))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root},
                           capture_output=True, text=True, timeout=1800)  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert "refused" in found.stdout
