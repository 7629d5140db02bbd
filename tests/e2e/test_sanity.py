"""What a person would notice at once: weights that were never trained, an FP32 model that does not work itself."""

import json
import shutil

import pytest
import torch

import ovcalib
from tests.e2e.test_cli import FAST, MODEL, run


@pytest.fixture(scope="module")
def weights(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.pt"
    torch.save(toy.net.state_dict(), path)
    return path


def warnings_of(*arguments, out):
    found = run("quantize", *arguments, "--num-samples", 8, "-o", out, "--benchmark-time", 0)
    assert found.exit_code == 0, found.stderr
    return json.loads((out / "result.json").read_text())["warnings"]


def test_untrained_weights_are_a_warning_and_so_is_the_fallback(tmp_path, weights):
    found = warnings_of(*MODEL, out=tmp_path / "factory")
    assert any("tests.toy:ToyNet looks untrained" in line for line in found)
    assert any("calibrated with fractal instead of bn-inversion" in line and "never trained" in line for line in found)
    found = warnings_of(*MODEL, "--weights", weights, "--calib", "noise", out=tmp_path / "trained")
    assert not any("untrained" in line or "instead of" in line for line in found)
    report = (tmp_path / "factory/report.html").read_text()
    assert "looks untrained" in report


def test_weights_may_be_random_on_purpose():
    for name in ("resnet20-cifar10", "torchvision:shufflenet_v2_x0_5", "tests.toy:ToyNet"):
        first, again = (ovcalib.load_model(name, weights="random", input_shape=(3, 32, 32)) for _ in range(2))
        assert first.spec.weights.origin == "random"
        assert any(f"The weights of {name} are random" in line for line in first.warnings)
        assert first.sha256 == again.sha256


def test_options_of_a_source_that_cannot_be_used_name_it_and_not_the_fallback(tmp_path):
    found = run("quantize", *MODEL, "-O", "steps=1", "-o", tmp_path / "o", *FAST)
    assert found.exit_code == 2
    assert "-O steps=1: options of which source?" in found.stderr
    assert "bn-inversion is not possible: The BatchNorm statistics of tests.toy:ToyNet" in found.stderr
    assert "Pass --calib, for example --calib fractal" in found.stderr
    assert not (tmp_path / "o").exists()
    found = run("quantize", *MODEL, "--calib", "bn-inversion", "-o", tmp_path / "o", *FAST)
    assert found.exit_code == 3
    assert "trained weights were not loaded" in found.stderr


def test_a_model_that_does_not_work_itself_never_meets_a_goal(toy, tmp_path, weights):
    names = toy.spec.classes
    toy.write_folder(tmp_path / "right", 60)
    for i, name in enumerate(names):  # folders in another order than the outputs
        (tmp_path / "wrong").mkdir(exist_ok=True)
        shutil.copytree(tmp_path / "right" / name, tmp_path / "wrong" / names[(i + 1) % 4])
    arguments = ["quantize", *MODEL, "--weights", weights, "--calib", "noise", "--num-samples", 8,
                 "--mode", "accuracy-aware", "--max-drop", 0.5, "--benchmark-time", 0]  # fmt: skip
    for given in ("--eval", "--validate"):
        found = run(*arguments, given, tmp_path / "wrong", "-o", tmp_path / given)
        assert found.exit_code == 5, found.stderr
        assert "\nFP32 itself is at " in found.stdout
        assert "The classes are in another order" in found.stdout
        record = json.loads((tmp_path / given / "result.json").read_text())
        assert record["outcome"] == "goal-missed"
        assert "The classes are in another order" in record["fp32_fault"]
    found = run(*arguments, "--eval", tmp_path / "right", "-o", tmp_path / "fine")
    assert found.exit_code == 0, found.stderr
    assert "FP32 itself" not in found.stdout


def test_images_can_be_kept_out_of_what_is_passed_on(toy, tmp_path, weights):
    toy.write_folder(tmp_path / "images", 12)
    arguments = ["quantize", *MODEL, "--weights", weights, "--calib", f"real:{tmp_path / 'images'}",
                 "--num-samples", 8, "--benchmark-time", 0]  # fmt: skip

    def contents(*extra):
        out = tmp_path / "-".join(["out", *extra])
        found = run(*arguments, *extra, "-o", out)
        assert found.exit_code == 0, found.stderr
        (line,) = [line for line in found.stdout.splitlines() if line.startswith("Calibration images:")]
        page = (out / "report.html").read_text()
        assert line.partition(". To")[0] in page
        there = {path.name for path in out.iterdir()} & {"calibration.npz", "preview.png", "calibration.json"}
        assert "images/" not in json.dumps(json.loads((out / "result.json").read_text())["files"])
        return line, there, "data:image/png" in page

    line, there, shown = contents()
    assert line.startswith(
        "Calibration images: calibration.npz holds all 8, preview.png and report.html show 8; they are real"
    )
    assert "use --no-keep-images, or --no-preview" in line
    assert (there, shown) == ({"calibration.npz", "preview.png", "calibration.json"}, True)
    line, there, shown = contents("--no-preview")
    assert line.startswith("Calibration images: calibration.npz holds all 8; they are real")
    assert (there, shown) == ({"calibration.npz", "calibration.json"}, False)
    line, there, shown = contents("--no-keep-images")
    assert line == "Calibration images: none in this folder."
    assert (there, shown) == ({"calibration.json"}, False)
    found = run("generate", "noise", "--model", *MODEL, "--count", 4, "--no-preview", "-o", tmp_path / "set")
    assert found.exit_code == 0, found.stderr
    assert not (tmp_path / "set/preview.png").exists()
    assert run("generate", "noise", "--model", *MODEL, "--no-keep-images").exit_code == 2
