"""The examples, each on a few images."""

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested() -> None:
    tested = {"quantize_without_data.py", "compare_sources.py", "notebook.ipynb"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


def test_quantize_without_data(tmp_path, capsys) -> None:
    run("quantize_without_data.py", "--images", 4, "--steps", 1, "--benchmark-time", 0, "-o", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "agreement with FP32:" in shown
    assert "NMSE) on avx2 kernels" in shown
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["calibration"]["source"] == "bn-inversion"
    assert result["calibration"]["num_samples"] == 4


@pytest.mark.parametrize("labelled", [False, True])
def test_compare_sources(labelled, toy, tmp_path, capsys, rng) -> None:
    import numpy as np

    from ovcalib.export.to_onnx import to_onnx

    to_onnx(toy.net, toy.spec.input_shape, tmp_path / "toy.onnx")
    arguments = [
        "--model",
        tmp_path / "toy.onnx",
        "--sources",
        "noise",
        "fractal",
        "--images",
        4,
        "-o",
        tmp_path / "out",
    ]
    if labelled:
        np.savez(tmp_path / "eval.npz", images=rng.integers(0, 256, (6, 16, 16, 3), np.uint8), labels=np.arange(6) % 4)
        arguments += ["--eval", f"npz:{tmp_path / 'eval.npz'}"]
    run("compare_sources.py", *arguments)
    rows = {words[0]: words for words in map(str.split, capsys.readouterr().out.splitlines())}
    for source in ("noise", "fractal"):
        result = json.loads((tmp_path / "out" / source / "result.json").read_text())
        assert rows[source][2] == f"{result['agreement']['top1']:.2%}"
        assert (rows[source][1] != "-") == labelled
        assert result["agreement"]["count"] == (6 if labelled else 4)
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_notebook(monkeypatch) -> None:
    """Each cell, and the value that a notebook shows under it."""
    monkeypatch.setenv("OVCALIB_EXAMPLE_IMAGES", "4")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names: dict[str, Any] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"])).body
        last = body[-1] if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body[:-1] if last else body, []), "notebook", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
    assert any("<table" in value._repr_html_() for value in shown if hasattr(value, "_repr_html_"))
    assert any(
        value == {"vnni": value.get("vnni"), "avx2": value.get("avx2")} for value in shown if isinstance(value, dict)
    )
    assert shown[-1].shape == (1, 10)
