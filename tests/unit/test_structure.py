"""Who may import whom, and what the package holds."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "torch",
    "torchvision",
    "nncf",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "datumaro",
    "timm",
    "scipy",
    "cv2",
    "safetensors",
}
# Files that are themselves reached only when torch is wanted.
LAZY = {"ovcalib/models/resnet.py", "ovcalib/models/vgg.py", "ovcalib/models/mobilenetv2.py",
        "ovcalib/models/shufflenetv2.py", "ovcalib/models/repvgg.py", "ovcalib/models/vit.py",
        "ovcalib/models/mobilenetv3.py", "ovcalib/models/convnext.py",
        "ovcalib/models/graph_module.py", "ovcalib/models/detectors.py",
        "ovcalib/quantization/finetuning.py", "ovcalib/quantization/adaround.py", "ovcalib/quantization/reconstruction.py",
        "ovcalib/quantization/published_finetuning.py",
        *(f"ovcalib/calibration/{name}.py" for name in ("inversion", "bn_losses", "bn_taps", "network_outputs", "score",
                                                        "genie_generator", "generator_training", "bfloat16", "parallel",
                                                        "attention_taps", "patch_losses", "patch_run", "joint"))}  # fmt: skip
FILES = sorted(
    p.relative_to(ROOT).as_posix()
    for folder in ("ovcalib", "export", "gan")
    for p in (ROOT / folder).glob("**/*.py")
    if not any(part.is_symlink() for part in p.parents)
)


def imports(node, top_only):
    """(module, is at top level) of every import that runs when the file is imported, or anywhere."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if top_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
        else:
            yield from imports(child, top_only)


def tree(file):
    return ast.parse((ROOT / file).read_text())


@pytest.mark.parametrize("file", FILES)
def test_heavy_packages_are_imported_where_they_are_needed(file) -> None:
    if file in LAZY or file.startswith("gan/"):
        pytest.skip("reached only when torch is wanted")
    heavy = {name.partition(".")[0] for name in imports(tree(file), top_only=True)} & HEAVY
    assert not heavy


@pytest.mark.parametrize("file", FILES)
def test_one_place_imports_nncf(file) -> None:
    found = any(name.partition(".")[0] == "nncf" for name in imports(tree(file), top_only=False))
    text = (ROOT / file).read_text()
    assert not found
    assert ('require("nncf"' in text) == (file == "ovcalib/quantization/nncf_backend.py")


# Lowest first: a module imports from its own layer and from those below it. See docs/architecture.md.
LAYERS = (
    {"errors", "usercode", "progress", "registry", "rundir", "machine", "records"},
    {"runtime", "graph", "kernels", "models", "data"},
    {"calibration", "quantization", "evaluation", "measurement", "diagnosis", "reports", "export", "gan"},
    {"pipeline"},
    {"sweeps", "rehearsal"},
    {"api", "keywords"},
    {"cli", "__main__"},
)
MODULES = {file: ".".join(("ovcalib", *Path(file.removeprefix("ovcalib/")).with_suffix("").parts)) for file in FILES}
MODULES = {file: name.removesuffix(".__init__") for file, name in MODULES.items()}


def layer(module):
    """The layer of a module of ours; None for the package itself, which resolves its names when they are used."""
    part = [*module.split("."), ""][1]
    return next((i for i, names in enumerate(LAYERS) if part in names), None)


def ours(file):
    """The modules of ours that a file imports, anywhere in it."""
    known = set(MODULES.values())
    found = set()
    for node in ast.walk(without_type_checking(tree(file))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ovcalib"):
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("ovcalib")}
    return found - {"ovcalib"}


def without_type_checking(module):
    class Remover(ast.NodeTransformer):
        def visit_If(self, node):
            checking = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if checking else self.generic_visit(node)

    return Remover().visit(module)


@pytest.mark.parametrize("file", [file for file in FILES if MODULES[file] != "ovcalib"])
def test_arrows_point_downwards(file) -> None:
    own = layer(MODULES[file])
    assert own is not None, f"{file} belongs to no layer"
    assert not [name for name in ours(file) if layer(name) > own]


def test_there_are_no_circles() -> None:
    arrows = {MODULES[file]: ours(file) for file in FILES if MODULES[file] != "ovcalib"}
    done: set[str] = set()
    path: list[str] = []

    def visit(name) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(arrows.get(name, ())):
                visit(other)
            path.pop()
            done.add(name)

    for name in sorted(arrows):
        visit(name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_every_module_can_be_the_first() -> None:
    # Records first, which import no other layer: they take most of the time, and are then there for all others.
    script = (
        "import importlib, os, sys\n"
        "import openvino, torch, torchvision, scipy, pydantic, click, jinja2, PIL.Image\n"
        "import numpy, pydantic.networks, zoneinfo\n"
        "for name in sys.argv[1:]:\n"
        "    if name == 'RECORDS':\n"
        "        for done in sys.argv[1:sys.argv.index(name)]:\n"
        "            importlib.import_module(done)\n"
        "        continue\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except BaseException as error:\n"
        "            print(name, type(error).__name__, error, flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    names = [name for name in MODULES.values() if name != "ovcalib.__main__"]
    records = [name for name in names if name.startswith("ovcalib.records.")]
    names = [*records, "RECORDS", *(name for name in names if name not in records)]
    found = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == ""


def test_the_package_list_is_complete() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"ovcalib", "ovcalib.gan", "ovcalib.export"} | {
        f"ovcalib.{p.name}" for p in (ROOT / "ovcalib").iterdir() if (p / "__init__.py").is_file()
    }
    assert set(packages) == folders


def test_the_image_holds_the_package_and_runs_it_without_root() -> None:
    lines = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    assert {word for word, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}
    copied = {
        name for word, rest in steps if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    }  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert copied == needed | set(project["tool"]["setuptools"]["package-dir"].values())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    last = dict(steps)
    assert last["USER"] not in ("root", "0")
    assert json.loads(last["ENTRYPOINT"]) == ["ovcalib"]
    extras = re.findall(r"\.\[(\w+)\]", " ".join(rest for word, rest in steps if word == "RUN"))
    assert extras
    assert set(extras) <= set(project["project"]["optional-dependencies"])


@pytest.mark.parametrize("name", ["gan", "export"])
def test_top_level_folders_are_linked_into_the_package(name) -> None:
    link = ROOT / "ovcalib" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


def test_shipped_weights_are_small_and_described() -> None:
    from ovcalib.models import builtin
    from ovcalib.rundir import file_sha256

    shipped = [name for name in builtin.NAMES if builtin.shipped_weights(name)]
    assert "resnet20-cifar10" in shipped
    total = 0
    for name in shipped:
        file = Path(str(builtin.shipped_weights(name)))
        card = json.loads(file.with_suffix(".json").read_text())
        assert card["sha256"] == file_sha256(file)
        assert {"command", "data", "top1", "seed", "test_data"} <= set(card)
        assert file.stat().st_size < 6 * 2**20
        total += file.stat().st_size
    assert total < 20 * 2**20
