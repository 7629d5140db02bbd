"""Thousands of files that nobody should be given: each ends in a short time with an error of the user's kind, or works.

Every case is a command in a child process. It is never our fault (exit code 1), never a signal, never slow or large, and
nothing from a file reaches the terminal unescaped.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import archives, models, texts, weights

ROOT = Path(__file__).resolve().parents[2]
# Of the processor; measuring coverage doubles them, and a busy machine may take PATIENCE times as long.
SECONDS = 15 if any(name.startswith("COVERAGE_") for name in os.environ) else 5
MEGABYTES, PATIENCE = 1024, 40
# Everything that a terminal would act upon.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TOY = ["--model", "tests.toy:ToyNet", "--input-shape", "3,16,16"]
ANY, USAGE, MODEL, DATA = {0, 2, 3, 4}, {2}, {2, 3}, {0, 2, 4}


class Server:
    """The process that runs the commands."""

    def __init__(self, cache):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OVCALIB_CACHE": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip

    def __call__(self, folder, arguments, seconds=SECONDS):
        request = {"folder": str(folder), "arguments": [str(a) for a in arguments], "seconds": PATIENCE * seconds}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("cache"))
    yield made
    made.process.stdin.close()
    made.process.wait(30)


@pytest.fixture(scope="module")
def toy_ir(toy_graph, tmp_path_factory):
    from ovcalib.graph.files import write_ir

    path = tmp_path_factory.mktemp("ir") / "toy.xml"
    write_ir(toy_graph, path)
    return path


def put(path, content):
    content = content() if callable(content) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def survive(server, folder, arguments, codes=ANY, seconds=SECONDS):
    """Run a command that must end well."""
    found = server(folder, arguments, seconds)
    shown = f"{found['stdout'][-500:]}\n{found['stderr'][-1500:]}"
    assert found["code"] in codes, f"exit code {found['code']} in {found['seconds']:.1f} s\n{shown}"
    assert "Traceback" not in found["stderr"], shown
    assert found["seconds"] < seconds, f"{found['seconds']:.1f} s\n{shown}"
    assert found["peak_mb"] < MEGABYTES, f"{found['peak_mb']:.0f} MB\n{shown}"
    assert not CONTROL.search(found["stdout"] + found["stderr"]), repr(shown)
    assert len(found["stderr"]) < 10_000, shown
    assert not (folder / "executed").exists()
    return found


def cases(argument, values, every):
    """Parametrize a test; the fast suite takes one of `every` cases, the slow one the others."""
    slow = pytest.mark.slow
    marked = [value if i % every == 0 else pytest.param(value, marks=slow) for i, value in enumerate(values)]
    return pytest.mark.parametrize(argument, marked)


@cases("name", archives.NPZ, 16)
def test_npz_for_evaluation(server, toy_ir, tmp_path, name):
    put(tmp_path / "x.npz", archives.NPZ[name])
    survive(server, tmp_path, ["evaluate", toy_ir, "--data", "npz:x.npz"], DATA)


@cases("name", archives.NPZ, 8)
def test_npz_for_calibration(server, tmp_path, name):
    put(tmp_path / "x.npz", archives.NPZ[name])
    survive(server, tmp_path, ["generate", "npz:x.npz", *TOY, "-o", "out"], DATA)


@cases("name", archives.NPZ, 16)
def test_npz_for_pairs(server, tmp_path, name):
    put(tmp_path / "pairs" / "pairs.npz", archives.NPZ[name])
    survive(server, tmp_path, ["gan", "distill", "pairs", "-o", "out"], DATA)


@cases("name", [*weights.PICKLES, *weights.TENSORS, *weights.TORCH], 12)
@cases("reader", ["weights", "distylegan", "latents"], 8)
def test_torch_files(server, tmp_path, name, reader):
    if name in weights.PICKLES:
        program = weights.PICKLES[name]
        content = weights.torch_zip(program() if callable(program) else program, weights.FOUR)
    elif name in weights.TENSORS:
        entry = weights.TENSORS[name]
        parts: Any = entry() if callable(entry) else entry
        content = weights.torch_zip(*parts)
    else:
        content = weights.TORCH[name]
    read_torch(server, tmp_path, content, reader)


@cases("name", weights.PICKLES, 16)
@cases("reader", ["weights", "latents"], 4)
def test_bare_pickles(server, tmp_path, name, reader):
    read_torch(server, tmp_path, weights.PICKLES[name], reader)


def read_torch(server, folder, content, reader):
    if reader == "latents":
        put(folder / "pairs" / "class_0" / "image_0.png", models.picture("PNG", (32, 32)))
        put(folder / "pairs" / "class_0" / "noise_0.pt", content)
        survive(server, folder, ["gan", "distill", "pairs", "-o", "out"], {2, 4})
        return
    put(folder / "x.pt", content)
    if reader == "weights":
        survive(server, folder, ["generate", "noise", *TOY, "--weights", "x.pt", "--count", "1", "-o", "out"], {3})
    else:
        survive(server, folder, ["generate", "distylegan:x.pt", *TOY, "--count", "1", "-o", "out"], {3})


@cases("name", [*weights.SAFETENSORS, *weights.GENERATORS], 10)
@cases("reader", ["weights", "distylegan", "stylegan2-ada"], 4)
def test_safetensors(server, tmp_path, name, reader):
    put(tmp_path / "x.safetensors", {**weights.SAFETENSORS, **weights.GENERATORS}[name])
    source = ["noise", "--weights", "x.safetensors"] if reader == "weights" else [f"{reader}:x.safetensors"]
    survive(server, tmp_path, ["generate", *source, *TOY, "--count", "1", "-o", "out"], {0, 2, 3, 4})


@cases("name", [*weights.PICKLES, *weights.SNAPSHOTS], 12)
def test_snapshots(server, tmp_path, name):
    put(tmp_path / "x.pkl", {**weights.PICKLES, **weights.SNAPSHOTS}[name])
    survive(server, tmp_path, ["generate", "stylegan2-ada:x.pkl", *TOY, "--count", "1", "-o", "out"], {3, 4})


@cases("name", texts.RESULTS, 16)
def test_results(server, tmp_path, name):
    put(tmp_path / "result.json", texts.RESULTS[name])
    survive(server, tmp_path, ["report", ".", "-o", "out"], {0, 2})


@cases("name", texts.RESULTS, 20)
@cases("kind", ["result", "request"], 4)
def test_results_as_recipes(server, tmp_path, name, kind):
    put(tmp_path / f"{kind}.json", texts.RESULTS[name])
    survive(server, tmp_path, ["quantize", "-c", f"{kind}.json", "--weights", "none.pt", "--dry-run"], {2, 3})


@cases("name", texts.RECIPES, 12)
def test_recipes(server, tmp_path, name):
    put(tmp_path / "recipe.yaml", texts.RECIPES[name])
    survive(server, tmp_path, ["quantize", "-c", "recipe.yaml", "-o", "out", "--device", "NONE"], {2, 3, 4, 6})


@cases("name", [*texts.SWEEPS, *texts.RECIPES], 16)
def test_sweep_recipes(server, tmp_path, name):
    put(tmp_path / "sweep.yaml", {**texts.RECIPES, **texts.SWEEPS}[name])
    survive(server, tmp_path, ["sweep", "sweep.yaml", "-o", "out", "--engine", "none"], {2, 3, 4})


@cases("name", models.ONNX, 8)
def test_onnx(server, tmp_path, name):
    put(tmp_path / "x.onnx", models.ONNX[name])
    survive(server, tmp_path, ["convert", "x.onnx", "--to", "ir", "-o", "out"], {0, 2, 3})


@cases("name", models.IR, 8)
def test_ir(server, tmp_path, name):
    put(tmp_path / "x.xml", models.IR[name])
    put(tmp_path / "x.bin", bytes(100))
    survive(server, tmp_path, ["convert", "x.xml", "--to", "ir", "-o", "out"], {0, 2, 3})


@cases("name", models.PICTURES, 8)
def test_pictures(server, tmp_path, name):
    for i in range(12):
        put(tmp_path / "data" / f"class{i % 4}" / f"{i}.png", models.picture("PNG"))
    put(tmp_path / "data" / "class0" / name, models.PICTURES[name])
    survive(server, tmp_path, ["generate", "real:imagefolder:data", *TOY, "--count", "13", "-o", "out"], {0})


@cases("name", models.FACTORIES, 8)
def test_factories(server, tmp_path, name):
    source, attribute = models.FACTORIES[name]
    put(tmp_path / "my_factory.py", source)
    arguments = [
        "generate",
        "noise",
        "--model",
        f"my_factory:{attribute}",
        "--input-shape",
        "3,16,16",
        "--count",
        "1",
        "-o",
        "out",
    ]
    found = server(tmp_path, arguments)
    assert found["code"] in (2, 3) or (name == "interrupt" and found["code"] == 130), found
    assert "This is a fault of ovcalib" not in found["stderr"]
    assert not (tmp_path / "out").exists()


@cases("name", models.MODULES, 10)
@cases("attribute", ["make", ""], 4)
def test_module_names(server, tmp_path, name, attribute):
    survive(
        server,
        tmp_path,
        [
            "generate",
            "noise",
            "--model",
            f"{name}:{attribute}",
            "--input-shape",
            "3,16,16",
            "--count",
            "1",
            "-o",
            "out",
        ],
        {2, 3},
    )
