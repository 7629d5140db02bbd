"""Who may import whom, and what the package holds."""

import ast
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
        "ovcalib/models/shufflenetv2.py", "ovcalib/models/repvgg.py",
        *(f"ovcalib/calibration/{name}.py" for name in ("inversion", "bn_losses", "bn_taps", "network_outputs", "score",
                                                        "genie_generator", "bfloat16"))}  # fmt: skip
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
def test_heavy_packages_are_imported_where_they_are_needed(file):
    if file in LAZY or file.startswith("gan/"):
        pytest.skip("reached only when torch is wanted")
    heavy = {name.partition(".")[0] for name in imports(tree(file), top_only=True)} & HEAVY
    assert not heavy


@pytest.mark.parametrize("file", FILES)
def test_one_place_imports_nncf(file):
    found = any(name.partition(".")[0] == "nncf" for name in imports(tree(file), top_only=False))
    text = (ROOT / file).read_text()
    assert not found
    assert ('require("nncf"' in text) == (file == "ovcalib/quantization.py")


ALLOWED = {
    "ovcalib/errors.py": set(),
    "ovcalib/types.py": {"ovcalib.data.preprocessing"},
    "ovcalib/registry.py": {"ovcalib.errors"},
    "ovcalib/data/preprocessing.py": set(),
}


@pytest.mark.parametrize("file", ALLOWED)
def test_foundations_rest_on_nothing_of_ours(file):
    ours = {name for name in imports(tree(file), top_only=False) if name.startswith("ovcalib")}
    assert ours <= ALLOWED[file]


@pytest.mark.parametrize("file", FILES)
def test_layers_point_downwards(file):
    names = {name for name in imports(tree(file), top_only=False) if name.startswith("ovcalib")}
    above = {
        "ovcalib/calibration/": ("ovcalib.pipeline", "ovcalib.api", "ovcalib.cli", "ovcalib.quantization", "ovcalib.export"),
        "ovcalib/models/": ("ovcalib.pipeline", "ovcalib.api", "ovcalib.cli", "ovcalib.quantization", "ovcalib.calibration"),
        "ovcalib/data/": ("ovcalib.pipeline", "ovcalib.api", "ovcalib.cli", "ovcalib.quantization", "ovcalib.models",
                          "ovcalib.calibration"),
        "export/": ("ovcalib.pipeline", "ovcalib.api", "ovcalib.cli", "ovcalib.quantization", "ovcalib.calibration"),
        "gan/": ("ovcalib.pipeline", "ovcalib.quantization"),
    }  # fmt: skip
    for prefix, forbidden in above.items():
        if file.startswith(prefix):
            assert not [name for name in names if name.startswith(forbidden)]
    assert not [name for name in names if name.startswith(("ovcalib.tests", "benchmarks"))]


def test_the_package_list_is_complete():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"ovcalib", "ovcalib.gan", "ovcalib.export"} | {
        f"ovcalib.{p.name}" for p in (ROOT / "ovcalib").iterdir() if (p / "__init__.py").is_file()
    }
    assert set(packages) == folders


@pytest.mark.parametrize("name", ["gan", "export"])
def test_top_level_folders_are_linked_into_the_package(name):
    link = ROOT / "ovcalib" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


def test_shipped_weights_are_small_and_described():
    import json

    from ovcalib.models import builtin
    from ovcalib.models.weights import file_sha256

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
