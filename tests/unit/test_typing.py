"""The public API under a user's type checker."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ovcalib

ROOT = Path(__file__).resolve().parents[2]


def mypy(script):
    """Lines that have an error."""
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", f"tests/typing/{script}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = re.findall(rf"{script}:(\d+): error: (.*)", found.stdout)
    assert found.stdout.count(": error:") == len(lines), found.stdout
    return lines


def test_a_users_script_is_typed_to_the_leaf() -> None:
    assert mypy("user_script.py") == []


def test_mistakes_are_found() -> None:
    found = dict(mypy("wrong_script.py"))
    assert set(found) == {"6", "8", "10"}
    assert 'Unexpected keyword argument "calibration"' in found["6"]
    assert 'Literal["default", "accuracy-aware", "weight-only", "simulated"]' in found["8"].replace("'", '"')


def test_pyright_finds_the_same(tmp_path) -> None:
    settings = {"include": [str(ROOT / "tests" / "typing")], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    found = subprocess.run(
        [sys.executable, "-m", "basedpyright", "-p", str(tmp_path), "--outputjson", "--pythonpath", sys.executable],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    errors = json.loads(found.stdout)["generalDiagnostics"]
    places = {(Path(error["file"]).name, error["range"]["start"]["line"] + 1) for error in errors}
    assert places == {("wrong_script.py", 6), ("wrong_script.py", 8), ("wrong_script.py", 10)}


def test_no_package_hides_a_public_function() -> None:
    """Importing ovcalib.x.y makes ovcalib.x a module, whatever was called so before."""
    packages = {path.parent.name for path in (ROOT / "ovcalib").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "ovcalib").glob("*.py")}
    assert not (packages | modules) & set(ovcalib.__all__)
