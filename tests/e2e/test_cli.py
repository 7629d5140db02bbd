"""The command line as a user meets it, in this process."""

import json
import os
from pathlib import Path

import jsonschema
import numpy as np
import openvino as ov
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from ovcalib.cli import app as cli
from ovcalib.cli.options import next_folder
from ovcalib.records.schema import SCHEMAS, current_schema, schema

MODEL = ["tests.toy:ToyNet", "--input-shape", "3,16,16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
FAST = ["--benchmark-time", "0.05"]


@pytest.fixture(scope="module")
def data(toy, tmp_path_factory):
    """Weights and two folders of images."""
    root = tmp_path_factory.mktemp("data")
    torch.save({"state_dict": {f"module.{k}": v for k, v in toy.net.state_dict().items()}}, root / "toy.pt")
    toy.write_folder(root / "calib", 80, seed=3)
    toy.write_folder(root / "eval", 200, seed=2)
    return root


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("done") / "out"
    found = run(
        "quantize", *MODEL, "--weights", data / "toy.pt", "--calib", f"real:{data / 'calib'}", "--num-samples", 60,
        "--eval", data / "eval", "-o", out, *FAST,
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    return out


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_quantize_proves_a_users_model(done, data) -> None:
    result = json.loads((done / "result.json").read_text())
    assert result["outcome"] == "done"
    assert result["accuracy"]["count"] == 200
    assert result["accuracy"]["fp32"]["top1"] > 0.95
    assert abs(result["accuracy"]["drop_points"]) < 3
    assert result["agreement"]["top1"] > 0.95
    assert result["calibration"]["num_samples"] == 60
    assert result["calibration"]["domain"] == "pixels"
    assert result["quantization"]["overflow_fix"] == "first-layer"
    assert result["quantization"]["int8_operations"] >= 5
    assert result["quantization"]["float_operations"] == 0
    assert result["size_bytes"]["int8"] < result["size_bytes"]["fp32"] * 1.5
    speed = result["benchmark"]
    assert speed["latency_ms"]["int8"]["n"] > 10
    assert speed["speedup_ci95"][0] <= speed["speedup"] <= speed["speedup_ci95"][1]
    assert speed["memory_bytes"]["fp32"]["peak"] > speed["memory_bytes"]["fp32"]["baseline"] > 1e6
    assert result["parity"]["torch_vs_ir_max_abs"] < 1e-3
    written = {p.relative_to(done).as_posix() for p in done.rglob("*") if p.is_file()} - {"result.json"}
    assert set(result["files"]) == written
    assert {"fp32/model.onnx", "fp32/model.xml", "int8/model.bin", "request.json", "report.md", "logs/run.log",
            "calibration.npz", "calibration.json", "preview.png"} <= written  # fmt: skip


def test_what_is_written_keeps_its_schema(done) -> None:
    jsonschema.validate(json.loads((done / "result.json").read_text()), schema("result"))
    jsonschema.validate(json.loads((done / "request.json").read_text()), schema("recipe"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_schemas_are_those_of_the_types(name) -> None:
    assert schema(name) == current_schema(name), "run python -m ovcalib.records.schema"


@pytest.mark.parametrize("recipe", ["request.json", "result.json"])
def test_a_recipe_runs_again_to_the_same_weights(done, tmp_path, recipe) -> None:
    found = run("quantize", "-c", done / recipe, "-o", tmp_path / "out", *FAST)
    assert found.exit_code == 0, found.stderr
    assert (tmp_path / "out/int8/model.bin").read_bytes() == (done / "int8/model.bin").read_bytes()


def test_the_command_line_beats_the_recipe(done, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: resnet20-cifar10\ncalib: noise\nnum_samples: 5\n")
    found = run("quantize", *MODEL, "-c", recipe, "--num-samples", 7, "-o", tmp_path / "out", "--json", *FAST)
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["model"]["name"] == "tests.toy:ToyNet"
    assert result["calibration"] == {**result["calibration"], "source": "noise", "num_samples": 7}


def test_without_data_there_is_agreement_and_it_is_called_so(data, tmp_path) -> None:
    found = run("quantize", *MODEL, "--weights", data / "toy.pt", "--num-samples", 20, "-O", "steps=3",
                "-O", "init=gaussian", "-o", tmp_path / "out", *FAST)  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert "agreement" in found.stdout
    assert "top-1 INT8" not in found.stdout
    assert "expected loss of top-1, in points" in found.stdout  # and it is called so, too
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["accuracy"] is None
    assert "`eval`" in result["accuracy_reason"]
    assert result["agreement"]["on"] == "the calibration set (bn-inversion)"
    assert "Accuracy was not measured" in (tmp_path / "out/report.md").read_text()


def test_accuracy_aware_says_what_it_did(data, tmp_path) -> None:
    arguments = ["quantize", *MODEL, "--weights", data / "toy.pt", "--calib", "noise", "--num-samples", 30,
                 "--eval", data / "eval", "--mode", "accuracy-aware", *FAST]  # fmt: skip
    found = run(*arguments, "--max-drop", 0.5, "-o", tmp_path / "loose")
    assert found.exit_code == 0, found.stderr
    assert json.loads((tmp_path / "loose/result.json").read_text())["outcome"] == "goal-met"
    found = run(*arguments, "--max-drop", 0, "--metric", "agreement", "--max-iterations", 1, "-o", tmp_path / "tight")
    result = json.loads((tmp_path / "tight/result.json").read_text())
    assert found.exit_code == {"goal-met": 0, "goal-missed": 5, "budget": 7}[result["outcome"]]
    assert result["quantization"]["restoration"]["metric"] == "agreement"
    assert any("also steered" in warning for warning in result["warnings"])
    assert (tmp_path / "tight/int8/model.xml").exists()


def test_weights_alone_need_no_data(data, tmp_path) -> None:
    weights = ["--weights", data / "toy.pt"]
    out = tmp_path / "out"
    found = run("quantize", *MODEL, *weights, "--mode", "weight-only", "--eval", data / "eval", "-o", out, *FAST)
    assert found.exit_code == 0, found.stderr
    result = json.loads((out / "result.json").read_text())
    made = result["quantization"]
    assert (made["mode"], made["int8_operations"], made["subset_size"]) == ("weight-only", 0, 48)
    assert (made["preset"], made["overflow_fix"], made["activation_ranges"]) == ("none", "none", "none")
    assert result["calibration"]["source"] == "fractal"
    assert result["accuracy"]["kernels"] is None
    assert not result["accuracy"]["emulated"]
    assert result["agreement"]["top1"] > 0.98
    assert result["agreement"]["nmse"] < 1e-3
    assert made["rounding_nmse"] is not None
    report = (out / "report.md").read_text()
    assert "weights in 8 bits" in report
    assert "overflow fix" not in report
    assert "executed on" not in report
    plan = run("quantize", *MODEL, *weights, "--mode", "weight-only", "--dry-run", "--json")
    assert json.loads(plan.stdout)["overflow_fix"] == "none"
    for option, value in (("--deploy-isa", "vnni"), ("--preset", "mixed"), ("--optimize-for", "latency")):
        refused = run("quantize", *MODEL, *weights, "--mode", "weight-only", option, value, "-o", tmp_path / "no")
        assert refused.exit_code == 2
        assert f"{option} {value} does nothing with --mode weight-only" in refused.stderr


def test_fewer_bits_are_simulated_and_called_so(data, tmp_path) -> None:
    arguments = ["quantize", *MODEL, "--weights", data / "toy.pt", "--calib", f"real:{data / 'calib'}",
                 "--num-samples", 60, "--mode", "simulated", "--eval", data / "eval"]  # fmt: skip
    found = run(*arguments, "--weight-bits", 3, "--activation-bits", 4, "--edges", "full", "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    assert "3 bits of weights and 4 of activations are simulated" in found.stderr
    assert "simulated W3A4" in found.stdout
    assert "INT8" not in found.stdout
    result = json.loads((tmp_path / "out/result.json").read_text())
    jsonschema.validate(result, schema("result"))
    made = result["quantization"]
    assert (made["mode"], made["weight_bits"], made["activation_bits"], made["edges"]) == ("simulated", 3, 4, "full")
    assert result["benchmark"] is None
    assert "simulated in float" in result["benchmark_reason"]
    assert result["accuracy"]["kernels"] is None
    assert (
        "simulated: 3 bits of weights and 4 of activations, also in the first"
        in (tmp_path / "out/report.md").read_text()
    )
    # The file computes in float, with as many levels as that.
    graph = ov.Core().read_model(tmp_path / "out/int8/model.xml")
    levels = {op.get_attributes()["levels"] for op in graph.get_ops() if op.get_type_name() == "FakeQuantize"}
    assert levels == {16}
    weights = [
        np.array(op.input_value(1).get_node().get_data())
        for op in graph.get_ops() if op.get_type_name() in ("Convolution", "MatMul")
    ]  # fmt: skip
    assert len(weights) > 4
    for w in weights:
        assert w.dtype == np.float32
        assert all(len(np.unique(np.round(row, 6))) <= 7 for row in w.reshape(len(w), -1))
    # Fewer bits, a larger error; the most bits are INT8 itself.
    found = run(*arguments, "--weight-bits", 8, "-o", tmp_path / "eight")
    assert found.exit_code == 0, found.stderr
    eight = json.loads((tmp_path / "eight/result.json").read_text())
    assert eight["agreement"]["nmse"] < 0.1 * result["agreement"]["nmse"]
    for words, reason in (
        (["--weight-bits", 4], "--weight-bits 4 does nothing without --mode simulated"),
        (["--mode", "simulated", "--bias-correction", "full"], "--bias-correction full is NNCF's"),
        (["--mode", "simulated", "--deploy-isa", "vnni"], "--deploy-isa vnni does nothing with --mode simulated"),
    ):
        refused = run("quantize", *MODEL, *words, "-o", tmp_path / "no")
        assert refused.exit_code == 2
        assert reason in refused.stderr


def test_finetuning_is_taken_where_images_that_it_has_not_seen_say_so(data, done, tmp_path, monkeypatch) -> None:
    from ovcalib.quantization import finetuning

    arguments = ["quantize", *MODEL, "--weights", data / "toy.pt", "--calib", f"real:{data / 'calib'}",
                 "--num-samples", 60, "--finetune", "--finetune-steps", 12, *FAST]  # fmt: skip
    found = run(*arguments, "--max-time", 1000, "-o", tmp_path / "good")
    assert found.exit_code == 0, found.stderr
    made = json.loads((tmp_path / "good/result.json").read_text())["quantization"]
    tuned = made["finetuning"]
    assert (tuned["steps"], tuned["images"]) == (12, made["subset_size"])
    before, after = tuned["nmse"]
    judged = tuned["judged_nmse"]
    assert list(judged) == ["fractal", "bn-inversion"]
    assert tuned["kept"] == (after < before and all(second <= first for first, second in judged.values()))
    assert f"- fine-tuning: 12 steps on {tuned['images']} images in" in (tmp_path / "good/report.md").read_text()
    # Rates that destroy the network: what is written is what would be written without.
    monkeypatch.setattr(finetuning, "WEIGHT_RATE", 10.0)
    found = run(*arguments, "-o", tmp_path / "bad")
    assert found.exit_code == 0, found.stderr
    assert "Fine-tuning did not reduce the output error" in found.stderr
    result = json.loads((tmp_path / "bad/result.json").read_text())
    assert not result["quantization"]["finetuning"]["kept"]
    assert (tmp_path / "bad/int8/model.bin").read_bytes() == (done / "int8/model.bin").read_bytes()
    refused = run(*arguments, "--mode", "weight-only", "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "--finetune does nothing with --mode weight-only" in refused.stderr
    refused = run("quantize", *MODEL, "--finetune-steps", 9, "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "--finetune-steps 9 does nothing without --finetune" in refused.stderr


def test_the_calibration_set_can_steer(data, tmp_path, toy) -> None:
    """With the labels that came with it; there are no others, and the evaluation images are left for the proof."""
    np.savez(tmp_path / "set.npz", images=255 - toy.images[:30], labels=toy.labels[:30])
    arguments = ["quantize", *MODEL, "--weights", data / "toy.pt", "--mode", "accuracy-aware", "--max-drop", 0.5, *FAST]
    found = run(*arguments, "--calib", f"npz:{tmp_path}/set.npz", "--num-samples", 30, "--eval", data / "eval",
                "--validate", "calibration", "-o", tmp_path / "labelled")  # fmt: skip
    assert found.exit_code == 0, found.stderr
    result = json.loads((tmp_path / "labelled/result.json").read_text())
    steered = result["quantization"]["restoration"]
    assert (steered["metric"], steered["count"]) == ("top1", 30)
    assert steered["on"].startswith("the calibration set (npz:")
    assert result["accuracy"] is not None
    assert not any("also steered" in warning for warning in result["warnings"])
    # Images without labels, and none to evaluate on: the probabilities of FP32, on all of them.
    found = run(*arguments, "--max-drop", 0.02, "--calib", "noise", "--num-samples", 120, "-o", tmp_path / "alone")
    assert found.exit_code == 0, found.stderr
    steered = json.loads((tmp_path / "alone/result.json").read_text())["quantization"]["restoration"]
    assert (steered["metric"], steered["count"]) == ("expected-top1", 120)
    for report in ("report.html", "report.md"):
        text = (tmp_path / "alone" / report).read_text()
        assert "expected-top1 on 120 images of the calibration set (noise) at most 2.00 points under FP32" in text
        assert "reverted to float" in text
    assert 0 < steered["baseline"] < 1
    assert steered["value"] >= steered["baseline"] - 0.02
    # FP32's own answers are no labels either, also when they come out of a file.
    found = run(*arguments, "--calib", "zeroq", "--num-samples", 8, "-O", "steps=1", "-o", tmp_path / "pseudo")
    assert found.exit_code == 0, found.stderr
    again = f"npz:{tmp_path}/pseudo/calibration.npz"
    assert run(*arguments, "--calib", again, "-o", tmp_path / "again").exit_code == 0
    for name in ("pseudo", "again"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["calibration"]["labels"] == "pseudo"
        assert result["quantization"]["restoration"]["metric"] == "expected-top1"


def test_images_that_cannot_steer_are_refused_before_anything_is_made(data, tmp_path, toy, monkeypatch) -> None:
    monkeypatch.setattr("ovcalib.export.to_onnx.to_onnx", lambda *a, **k: pytest.fail("too late"))
    np.savez(tmp_path / "bare.npz", images=toy.images[:30])
    arguments = ["quantize", *MODEL, "--weights", data / "toy.pt", "--calib", "noise", "--mode", "accuracy-aware",
                 "-o", tmp_path / "out"]  # fmt: skip
    found = run(*arguments, "--validate", "calibrate")
    assert found.exit_code == 2
    assert "Did you mean 'calibration'?" in found.stderr
    for where in (["--validate", f"npz:{tmp_path}/bare.npz"], ["--eval", f"npz:{tmp_path}/bare.npz"]):
        found = run(*arguments, *where, "--metric", "top1")
        assert found.exit_code == 4
        assert "has none. Use --metric expected-top1" in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--validate", "calibration"], ["--metric", "top1"], ["--max-time", 9],
                                    ["--max-iterations", 1]])  # fmt: skip
def test_options_of_the_other_algorithm_are_refused(tmp_path, option) -> None:
    found = run("quantize", "resnet20-cifar10", *option, "-o", tmp_path / "out")
    assert found.exit_code == 2
    assert f"{option[0]} {option[1]}" in found.stderr
    assert "does nothing without --mode accuracy-aware" in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_budget_of_nothing_still_writes_the_best_so_far(data, tmp_path) -> None:
    found = run("quantize", *MODEL, "--weights", data / "toy.pt", "--calib", "noise", "--num-samples", 8, "--mode",
                "accuracy-aware", "--metric", "agreement", "--max-drop", 0, "--max-time", 0.001, "--eval", data / "eval",
                "-o", tmp_path / "out", *FAST)  # fmt: skip
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert found.exit_code == {"goal-met": 0, "budget": 7}[result["outcome"]]
    assert (tmp_path / "out/int8/model.xml").exists()


def test_collapsed_agreement_is_warned_about(data, tmp_path, toy) -> None:
    # Constant colour shifts: the ranges are far from those of the evaluation images.
    images = np.full((10, 16, 16, 3), 127, np.uint8)
    images[:, ::2] += 1
    np.savez(tmp_path / "flat.npz", images=images)
    found = run("quantize", *MODEL, "--weights", data / "toy.pt", "--calib", f"npz:{tmp_path / 'flat.npz'}",
                "--num-samples", 10, "--eval", data / "eval", "-o", tmp_path / "out", *FAST)  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert "agreement collapsed" in found.stderr
    assert "unlike photographs" in found.stderr


def test_agreement_on_images_of_one_class_is_warned_about(data, tmp_path) -> None:
    images = np.full((20, 16, 16, 3), 127, np.uint8)
    images[:, ::2] += 1
    np.savez(tmp_path / "flat.npz", images=images)
    found = run("quantize", *MODEL, "--weights", data / "toy.pt", "--calib", f"npz:{tmp_path / 'flat.npz'}",
                "--num-samples", 20, "-o", tmp_path / "out", *FAST)  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert "for all 20 images of the calibration set" in found.stderr


def test_ignore_and_dry_run(tmp_path) -> None:
    found = run("quantize", *MODEL, "--ignore", "stem.*", "--ignore", "type:MatMul", "--dry-run")
    assert found.exit_code == 0, found.stderr
    assert "ignored: stem.*: stem.0 (Convolution)" in found.stdout
    assert "ignored: type:MatMul: fc (MatMul)" in found.stdout
    assert "overflow fix: first-layer" in found.stdout
    found = run(
        "quantize", *MODEL, "--calib", "noise", "--num-samples", 5, "--ignore", "top.*", "-o", tmp_path / "o", *FAST
    )
    assert found.exit_code == 0, found.stderr
    assert json.loads((tmp_path / "o/result.json").read_text())["quantization"]["float_operations"] == 1


def test_evaluate_reads_what_the_ir_says_about_itself(done, data) -> None:
    found = run("evaluate", done / "int8/model.xml", "--data", data / "eval", "--json")
    assert found.exit_code == 0, found.stderr
    result = json.loads((done / "result.json").read_text())
    assert json.loads(found.stdout)["accuracy"]["top1"] == result["accuracy"]["int8"]["top1"]
    assert json.loads(found.stdout)["data_sha256"] == result["accuracy"]["data_sha256"]
    limited = run("evaluate", done / "fp32/model.xml", "--data", data / "eval", "--limit", 40)
    assert limited.exit_code == 0
    assert "40 of 200 images" in limited.stdout


def test_onnx_and_ir_files_are_models_too(done, data, tmp_path) -> None:
    for model in ("fp32/model.onnx", "fp32/model.xml"):
        out = tmp_path / Path(model).suffix[1:]
        extra = MODEL[1:] if model.endswith("onnx") else []
        found = run("quantize", done / model, *extra, "--calib", f"real:{data / 'calib'}", "--num-samples", 60,
                    "--eval", data / "eval", "-o", out, *FAST)  # fmt: skip
        assert found.exit_code == 0, found.stderr
        result = json.loads((out / "result.json").read_text())
        assert result["parity_reason"] == "the model was given as a graph"
        assert (out / "int8/model.bin").read_bytes() == (done / "int8/model.bin").read_bytes()


def test_an_onnx_file_without_normalisation_is_assumed_and_warned_about(done, tmp_path) -> None:
    found = run(
        "quantize", done / "fp32/model.onnx", "--calib", "noise", "--num-samples", 4, "-o", tmp_path / "o", *FAST
    )
    assert found.exit_code == 0, found.stderr
    assert "Nothing says how the model's input is normalised" in found.stderr


def test_convert_writes_what_is_asked_for(tmp_path) -> None:
    assert run("convert", *MODEL, "-o", tmp_path / "both").exit_code == 0
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"model.onnx", "model.xml", "model.bin", "request.json"}
    assert run("convert", *MODEL, "--to", "ir", "--dynamic-batch", "-o", tmp_path / "ir").exit_code == 0
    assert {p.name for p in (tmp_path / "ir").iterdir()} == {"model.xml", "model.bin", "request.json"}
    assert 'shape="?,3,16,16"' in (tmp_path / "ir/model.xml").read_text()


def test_fp16_stores_weights_in_16_bits_and_tells_their_difference(tmp_path) -> None:
    found = {
        out: run("convert", *MODEL, *extra, "-o", tmp_path / out, "--json")
        for out, extra in (("plain", ()), ("half", ("--fp16",)))
    }
    parity = {out: json.loads(result.stdout) for out, result in found.items()}
    sizes = {out: (tmp_path / out / "model.bin").stat().st_size for out in found}
    assert sizes["half"] < 0.6 * sizes["plain"]
    assert all(found["torch_vs_onnx_max_abs"] < 1e-6 for found in parity.values())
    # Weights of 11 bits instead of 24 move the outputs by more than the kernels of float32 do.
    assert parity["plain"]["torch_vs_ir_max_abs"] < parity["half"]["torch_vs_ir_max_abs"]
    assert parity["half"]["torch_vs_ir_max_abs"] < 0.01 * parity["half"]["output_max_abs"]
    refused = run("convert", *MODEL, "--fp16", "--to", "onnx", "-o", tmp_path / "none")
    assert refused.exit_code == 2
    assert refused.stderr == "error: --fp16 does nothing without an IR; pass --to ir or --to onnx,ir.\n"


def test_class_names_of_the_evaluation_images_are_in_the_ir_and_the_report(tmp_path) -> None:
    import openvino as ov

    names = ("daisy", "fox", "tree", "zebra crossing")
    for k, name in enumerate(names):
        (tmp_path / "eval" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(10 * k + i).integers(0, 256, (16, 16, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "eval" / name / f"{i}.png")
    found = run("quantize", *MODEL, "--calib", "noise", "--num-samples", 8, "--eval", tmp_path / "eval",
                "-o", tmp_path / "out", "--benchmark-time", 0)  # fmt: skip
    assert found.exit_code == 0, found.stderr
    for kind in ("fp32", "int8"):
        graph = ov.Core().read_model(tmp_path / "out" / kind / "model.xml")
        assert graph.get_rt_info(["model_info", "labels"]).astype(str) == "daisy fox tree zebra_crossing"
    accuracy = json.loads((tmp_path / "out/result.json").read_text())["accuracy"]
    assert {entry["name"] for entry in accuracy["per_class"]} <= set(names)
    again = run("evaluate", tmp_path / "out/int8/model.xml", "--data", tmp_path / "eval")
    assert again.exit_code == 0, again.stderr


@pytest.mark.parametrize("form", ["npz", "imagefolder", "datumaro"])
def test_generated_sets_can_be_used_again(data, tmp_path, form) -> None:
    out = tmp_path / "set"
    found = run(
        "generate", f"real:{data / 'calib'}", "--model", MODEL[0], *MODEL[1:], "--count", 8, "--format", form, "-o", out
    )
    assert found.exit_code == 0, found.stderr
    reference = {"npz": f"npz:{out / 'calibration.npz'}", "imagefolder": f"real:{out}",
                 "datumaro": f"real:datumaro:datumaro:{out}"}[form]  # fmt: skip
    used = run("quantize", *MODEL, "--calib", reference, "--num-samples", 8, "-o", tmp_path / "q", *FAST)
    assert used.exit_code == 0, used.stderr


def test_output_folders_are_numbered(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "0007-x").mkdir(parents=True)
    assert next_folder(Path("runs"), "tests.toy:ToyNet-noise") == Path("runs/0008-tests.toy-ToyNet-noise")


def test_tables_of_models_and_sources() -> None:
    found = run("models", "resnet*-cifar10")
    assert found.exit_code == 0
    assert found.stdout.count("cifar10") >= 4
    assert "vgg" not in found.stdout
    assert run("models", "nothing*").exit_code == 2
    found = run("sources")
    assert all(name in found.stdout for name in ("real:DATA", "npz:FILE", "noise", "fractal"))
    assert "-O systems=64" in run("sources", "fractal").stdout
    assert json.loads(run("doctor", "--json").stdout)["devices"]["CPU"]


# Bad input: the exit code, a line that helps, no traceback, nothing left behind -------------------------------------


def refuse(tmp_path, arguments, code, message) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = run(*arguments)
    assert found.exit_code == code, found.stderr
    assert message in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert sorted(tmp_path.rglob("*")) == before


def bad_models(tmp_path, data):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pth")
    torch.save({"fc.weight": torch.zeros(4, 16)}, tmp_path / "other.pth")
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    return {
        "missing-file": (["no.onnx"], 3, "There is no model file 'no.onnx'"),
        "text-as-onnx": ([tmp_path / "text.onnx"], 3, "cannot be read as ONNX"),
        "malicious-pickle": ([*MODEL, "--weights", tmp_path / "evil.pth"], 3, "loading it could run code"),
        "text-as-weights": ([*MODEL, "--weights", tmp_path / "text.pth"], 3, "text.pth"),
        "missing-weights": ([*MODEL, "--weights", "no.pth"], 3, "There is no weights file 'no.pth'"),
        "other-weights": ([*MODEL, "--weights", tmp_path / "other.pth"], 3, "are not those of tests.toy:ToyNet"),
        "wrong-shape": ([MODEL[0], "--input-shape", "1,16,16"], 3, "does not take an input of shape [1, 1, 16, 16]"),
        "no-shape": ([MODEL[0]], 2, "--input-shape"),
        "unknown-model": (["resnet20_cifar10"], 2, "Did you mean 'resnet20-cifar10'"),
        "no-weights-shipped": (["vgg11_bn-cifar10"], 2, "--weights published"),
        "unknown-torchvision": (["torchvision:resnet181"], 2, "Did you mean 'resnet18'"),
        "untrusted-hub": (["hub:owner/repo:net"], 2, "--trust-remote-code"),
        "unknown-module": (["no_such_module:net"], 2, "There is no module 'no_such_module'"),
        "unknown-attribute": (["tests.toy:Net"], 2, "has no 'Net'"),
        "no-module": (["os:getcwd"], 3, "Expected a torch.nn.Module"),
    }


@pytest.mark.parametrize("case", [
    "missing-file", "text-as-onnx", "malicious-pickle", "text-as-weights", "missing-weights", "other-weights",
    "wrong-shape", "no-shape", "unknown-model", "no-weights-shipped", "unknown-torchvision", "untrusted-hub",
    "unknown-module", "unknown-attribute", "no-module",
])  # fmt: skip
def test_bad_models(tmp_path, data, case) -> None:
    arguments, code, message = bad_models(tmp_path, data)[case]
    refuse(tmp_path, ["quantize", *arguments, "--calib", "noise", "-o", tmp_path / "out"], code, message)


def bad_data(tmp_path, data):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken" / "fine-h"
    broken.mkdir(parents=True)
    for i in range(10):
        (broken / f"{i}.jpg").write_bytes(b"\xff\xd8\xff damaged")
    PIL.Image.new("RGB", (16, 16)).save(broken / "good.png")
    values = np.random.default_rng(0).standard_normal((6, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "nan.npz", images=np.where(values > 2, np.nan, values))
    np.savez(tmp_path / "raw.npz", images=(np.abs(values) * 60))
    np.savez(tmp_path / "chw.npz", images=np.zeros((6, 3, 16, 16), np.uint8))
    calib = data / "calib"
    return {
        "empty-folder": (["--calib", f"real:{tmp_path / 'empty'}"], 4, "holds no images"),
        "damaged-images": (["--calib", f"real:{tmp_path / 'broken'}", "--num-samples", 5], 4, "cannot be decoded"),
        "missing-folder": (["--calib", "real:/no/such"], 4, "no folder '/no/such'"),
        "too-many": (["--calib", f"real:{calib}", "--num-samples", 5000], 2, "more than the 80 images"),
        "none": (["--calib", "noise", "--num-samples", 0], 2, "--num-samples 0"),
        "nan": (["--calib", f"npz:{tmp_path / 'nan.npz'}", "--num-samples", 6], 4, "NaN"),
        "unnormalised": (["--calib", f"npz:{tmp_path / 'raw.npz'}", "--num-samples", 6], 4, "unnormalised pixels"),
        "uint8-channels-first": (["--calib", f"npz:{tmp_path / 'chw.npz'}", "--num-samples", 6], 4, "Expected uint8 [N, 16, 16, 3]"),
        "overlap": (["--calib", f"real:{calib}", "--num-samples", 9, "--eval", calib], 4, "--allow-overlap"),
        "one-class": (["--calib", "noise", "--num-samples", 4, "--eval", tmp_path / "broken"], 4, "has the classes fine-h (1)"),
        "missing-eval": (["--calib", "noise", "--num-samples", 4, "--eval", "imagefolder:/no"], 4, "no folder '/no'"),
        "unknown-source": (["--calib", "fractl"], 2, "Did you mean 'fractal'"),
        "unknown-option": (["--calib", "noise", "-O", "color=red"], 2, "Unknown option of noise 'color'"),
        "malformed-option": (["--calib", "noise", "-O", "color"], 2, "expected KEY=VALUE"),
        "unknown-device": (["--calib", "noise", "-d", "GPUX"], 6, "Unknown device 'GPUX'"),
        "unknown-mode": (["--calib", "noise", "--mode", "magic"], 2, "--mode magic"),
        "unknown-preset": (["--calib", "noise", "--preset", "fast"], 2, "--preset fast"),
        "bad-mean": (["--mean", "a,b"], 2, "--mean a,b"),
        "bad-std": (["--std", "1,0,1"], 2, "--std 1,0,1"),
        "unknown-ignore": (["--calib", "noise", "--ignore", "layer1.*"], 2, "Unknown operation pattern 'layer1.*'"),
        "top1-without-labels": (["--calib", "noise", "--num-samples", 4, "--mode", "accuracy-aware", "--metric", "top1",
                                 "--max-drop", 0], 4, "--metric top1 needs labels"),
        "missing-recipe": (["-c", "no.yaml"], 2, "cannot be read"),
    }  # fmt: skip


@pytest.mark.parametrize("case", [
    "empty-folder", "damaged-images", "missing-folder", "too-many", "none", "nan", "unnormalised",
    "uint8-channels-first", "overlap", "one-class", "missing-eval", "unknown-source", "unknown-option",
    "malformed-option", "unknown-device", "unknown-mode", "unknown-preset", "bad-mean", "bad-std", "unknown-ignore",
    "top1-without-labels", "missing-recipe",
])  # fmt: skip
def test_bad_data_and_options(tmp_path, data, case) -> None:
    arguments, code, message = bad_data(tmp_path, data)[case]
    refuse(tmp_path, ["quantize", *MODEL, *arguments, "-o", tmp_path / "out"], code, message)


def test_a_wrong_option_is_refused_before_the_model_is_exported(tmp_path, data, monkeypatch) -> None:
    monkeypatch.setattr("ovcalib.export.to_onnx.to_onnx", None)
    refuse(tmp_path, ["quantize", *MODEL, "--weights", data / "toy.pt", "-O", "steps=0", "-o", tmp_path / "out"], 2,
           "steps is 0")  # fmt: skip


def test_an_already_quantized_ir_is_refused(done, tmp_path) -> None:
    refuse(
        tmp_path,
        ["quantize", done / "int8/model.xml", "--calib", "noise", "-o", tmp_path / "out"],
        3,
        "already quantized",
    )


def test_truncated_weights_are_refused(done, tmp_path) -> None:
    (tmp_path / "m.xml").write_bytes((done / "fp32/model.xml").read_bytes())
    (tmp_path / "m.bin").write_bytes((done / "fp32/model.bin").read_bytes()[:99])
    refuse(
        tmp_path,
        ["quantize", tmp_path / "m.xml", "--calib", "noise", "-o", tmp_path / "out"],
        3,
        "cannot be read as XML",
    )


def test_output_folders_that_cannot_be_used(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    quantize = ["quantize", *MODEL, "--calib", "noise", "--num-samples", 4]
    refuse(tmp_path, [*quantize, "-o", tmp_path / "full"], 2, "is not empty")
    refuse(tmp_path, [*quantize, "-o", tmp_path / "full", "--overwrite"], 2, "ovcalib did not write")
    refuse(tmp_path, [*quantize, "-o", "/proc/ovcalib/out"], 2, "cannot be written")


STEPS = {
    "parity": "ovcalib.export.convert.check_parity",
    "preflight": "ovcalib.calibration.make.preflight",
    "quantization": "ovcalib.quantization.quantize.quantize_default",
}


@pytest.mark.parametrize("step", STEPS)
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, step) -> None:
    def interrupted(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(STEPS[step], interrupted)
    refuse(
        tmp_path,
        ["quantize", *MODEL, "--calib", "noise", "--num-samples", 4, "-o", tmp_path / "out"],
        130,
        "interrupted",
    )


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ovcalib.export.convert.write_ir", full)
    refuse(
        tmp_path,
        ["quantize", *MODEL, "--calib", "noise", "--num-samples", 4, "-o", tmp_path / "out"],
        2,
        "No space is left",
    )


def test_a_fault_of_ours_is_said_to_be_ours(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(STEPS["preflight"], lambda calibration: 1 / 0)
    refuse(tmp_path, ["quantize", *MODEL, "--calib", "noise", "--num-samples", 4, "-o", tmp_path / "out"], 1, "--debug")
