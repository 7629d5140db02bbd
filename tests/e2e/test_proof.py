"""benchmark, diagnose, report and doctor as a user meets them."""

import copy
import csv
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import jsonschema
import numpy as np
import openvino as ov
import PIL.Image
import pytest
import torch
import yaml
from click.testing import CliRunner

import ovcalib
from ovcalib.calibration.probe import probe_inputs
from ovcalib.cli import app as cli
from ovcalib.evaluation.metrics import nmse
from ovcalib.measurement.benchmark import COMPUTE_KINDS
from ovcalib.records.schema import schema
from ovcalib.rundir import file_sha256
from ovcalib.runtime import outputs_of
from tests.e2e.test_process import ovcalib as process

QUICK = ["-t", "0.1"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_report_of_a_run_holds_what_people_ask_for(result) -> None:
    page = (result / "report.html").read_text()
    for words in ("top-1 accuracy", "latency p50", "size", "memory", "Calibration statement", "licence of the images",
                  "By class", "Do it again", "ovcalib quantize ToyNet", "data:image/png;base64"):  # fmt: skip
        assert words in page
    record = json.loads((result / "result.json").read_text())
    assert {c["label"] for c in record["accuracy"]["per_class"]} == {0, 1, 2, 3}
    assert sum(c["count"] for c in record["accuracy"]["per_class"]) == 60
    memory = record["benchmark"]["memory_bytes"]
    assert memory["int8"]["baseline"] < memory["int8"]["loaded"] <= memory["int8"]["peak"]
    assert {"report.html", "report.md", "report.csv"} <= set(record["files"])
    rows = list(csv.DictReader((result / "report.csv").open()))
    assert float(rows[0]["top-1 INT8 %"]) == 100 * record["accuracy"]["int8"]["top1"]


def test_the_loss_is_predicted_from_images_that_calibrated_nothing(toy, tmp_path) -> None:
    toy.write_folder(tmp_path / "images", 20)
    about: dict[str, Any] = {"input_shape": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    found = ovcalib.quantize(
        toy.net, tmp_path / "out", calib=f"real:{tmp_path / 'images'}", num_samples=20, benchmark_time=0, **about
    )
    predicted = found.record.predicted_loss
    assert predicted is not None
    spec = ovcalib.load_model(toy.net, **about).spec
    reference, outputs = (outputs_of(graph, probe_inputs(spec)) for graph in (found.fp32, found.int8))
    assert (predicted.probe.source, predicted.probe.count) == ("fractal", 32)
    assert predicted.probe.nmse == pytest.approx(nmse(reference, outputs))
    assert "Expected loss of top-1 on real images:" in (tmp_path / "out" / "report.html").read_text()
    assert "| expected loss, points |" in (tmp_path / "out" / "report.md").read_text()


def test_the_written_model_takes_other_shapes(result, rng) -> None:
    model = ov.Core().read_model(result / "int8" / "model.xml")
    images = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
    expected = outputs_of(model, [image[None] for image in images])
    batch = model.clone()
    batch.reshape([2, 3, 16, 16])
    (found,) = ov.Core().compile_model(batch, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images).values()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    larger = model.clone()
    larger.reshape([1, 3, 24, 20])
    assert outputs_of(larger, [np.zeros((1, 3, 24, 20), np.float32)]).shape == (1, 4)


def test_the_report_says_where_everything_comes_from(result):
    record = json.loads((result / "result.json").read_text())
    page, text = (result / "report.html").read_text(), (result / "report.md").read_text()
    for name in ("int8/model.bin", "fp32/model.xml", "calibration.npz", "request.json"):
        assert record["files"][name] in page
    assert record["files"]["report.html"] not in page
    for words in (record["model"]["sha256"], "module", "not stated", "largest difference from torch",
                  "CC0-1.0 (made from random numbers)", "[1, 3, 16, 16], NCHW", "Model.create_model"):  # fmt: skip
        assert words in page, words
        assert words in text.replace("\\", ""), words
    assert f"{record['model']['parameters']:,}" in page


def test_the_report_starts_with_a_model_card(result) -> None:
    _, card, _ = (result / "report.md").read_text().split("---\n", 2)
    found = yaml.safe_load(card)
    assert found["library_name"] == "openvino"
    assert found["license"] == "unknown"
    assert found["pipeline_tag"] == "image-classification"
    record = json.loads((result / "result.json").read_text())["accuracy"]
    (measured,) = found["model-index"][0]["results"]
    assert measured["dataset"]["type"] == record["data_sha256"]
    assert [(m["name"], m["value"]) for m in measured["metrics"]] == [
        ("INT8 top-1", pytest.approx(record["int8"]["top1"], abs=1e-6)),
        ("FP32 top-1", pytest.approx(record["fp32"]["top1"], abs=1e-6)),
    ]
    assert str(result.parent) not in (result / "report.md").read_text()


def test_the_command_of_the_report_gives_the_same_int8_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(
        "quantize",
        "resnet20-cifar10",
        "--calib",
        "fractal",
        "--num-samples",
        16,
        "--benchmark-time",
        0,
        "-o",
        tmp_path / "a",
    )
    assert first.exit_code == 0, first.output
    page = (tmp_path / "a" / "report.html").read_text()
    command = shlex.split(html.unescape(page.partition("<code>ovcalib ")[2].partition("</code>")[0]))
    again = run(*command, "-o", "b")
    assert again.exit_code == 0, again.output
    for name in ("model.xml", "model.bin"):
        assert file_sha256(tmp_path / "a" / "int8" / name) == file_sha256(tmp_path / "b" / "int8" / name)


def test_the_snippet_of_the_report_runs(result, tmp_path):
    shutil.copytree(result / "int8", tmp_path / "int8")
    (image,) = sorted((result.parent / "images" / "wide-v").iterdir())[:1]
    PIL.Image.open(image).save(tmp_path / "image.jpg", quality=100)
    code = (result / "report.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 8
    # OpenVINO (2026.4) takes bfloat16 where the CPU has it, and cannot compile where this withholds it.
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == "3", found.stderr


def test_an_edge_device_benchmarks(benchmarked):
    out, stdout = benchmarked
    found = json.loads((out / "benchmark.json").read_text())
    jsonschema.validate(found, schema("benchmark"))
    assert {(r["kind"], r["hint"]) for r in found["runs"]} == {
        (kind, hint) for kind in ("fp32", "int8") for hint in ("latency", "throughput")
    }
    for r in found["runs"]:
        latency = r["latency_ms"]
        assert latency["min"] <= latency["p50"] <= latency["p99"] <= latency["max"]
        assert sum(latency["counts"]) + latency["beyond"] == latency["n"] > 5
        assert len(r["round_p50_ms"]) == found["rounds"] == 5
        assert r["throughput_fps"] > 0
        assert r["memory_bytes"]["loaded"] > r["memory_bytes"]["baseline"]
        assert (r["power"] is None) == (r["power_reason"] is not None)
        assert (r["compile_cached_ms"] is None) == (r["compile_cached_reason"] is not None)
        assert r["effective"]["PERFORMANCE_HINT"] == r["requested"]["PERFORMANCE_HINT"]
        # The proof that INT8 ran: every layer of the INT8 model, none of the other.
        assert r["int8_nodes"] == (sum(r["compute_nodes"].values()) if r["kind"] == "int8" else 0)
        assert r["api"] == {"latency": "sync", "throughput": "async"}[r["hint"]]
    assert [(s["model"], s["against"]) for s in found["speedups"]] == [("int8/model", "fp32/model")] * 2
    assert all(s["ci95"][0] <= s["speedup"] <= s["ci95"][1] for s in found["speedups"])
    assert "5/5" in stdout
    assert {p.name for p in out.iterdir()} == {
        "benchmark.json",
        "report.html",
        "report.md",
        "report.csv",
        "request.json",
    }


def test_every_convolution_is_counted(benchmarked) -> None:
    out, stdout = benchmarked
    for run in json.loads((out / "benchmark.json").read_text())["runs"]:
        counted = {node["name"]: node["mean_us"] for node in run["nodes"] if node["mean_us"] is not None}
        work = {node["name"] for node in run["nodes"] if node["kind"] in COMPUTE_KINDS}
        assert work <= set(counted)
        assert sum(counted[name] for name in work) > 0
    assert "all operations" in stdout
    for page in ("report.html", "report.md"):
        assert "Where the time goes: CPU, latency hint" in (out / page).read_text()


def test_devices_agree_with_cpu_in_f32(benchmarked) -> None:
    parity = json.loads((benchmarked[0] / "benchmark.json").read_text())["parity"]
    assert [(p["model"], p["device"], p["count"], p["agrees"]) for p in parity] == [
        ("fp32/model", "CPU", 60, True),
        ("int8/model", "CPU", 60, True),
    ]


def test_devices_that_disagree_end_with_6(result, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ovcalib.measurement.device_parity.likeness", lambda a, b: (0.2, 7, 3.5))
    found = run("benchmark", result / "int8/model.xml", *QUICK, "--hint", "latency", "--data", result.parent / "images",
                "--limit", 4, "-o", tmp_path / "out")  # fmt: skip
    assert found.exit_code == 6
    assert "disagrees with CPU in f32: correlation 0.2" in found.stderr
    assert not json.loads((tmp_path / "out/benchmark.json").read_text())["parity"][0]["agrees"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-d", "CPU,GPU,NPU"], 6, "Unknown device 'GPU'. Available: AUTO, CPU."),
        (["-d", "CPU,GPU,NPU"], 6, "Unknown device 'NPU'"),
        (["--hint", "speed"], 2, "--hint speed: input should be 'latency' or 'throughput'"),
        (["--precision", "int8"], 2, "--precision int8"),
        (["--api", "both"], 2, "--api both"),
        (["--api", "sync", "--requests", "4"], 2, "--requests 4"),
        (["-t", "0"], 2, "--time 0"),
    ],
)
def test_what_cannot_be_benchmarked(result, tmp_path, arguments, code, message) -> None:
    found = run("benchmark", result, *arguments, "-o", tmp_path / "out")
    assert found.exit_code == code, found.stderr
    assert message in found.stderr
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_benchmarked(result, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("no.xml", "no model file"),
        ("empty", "holds no fp32/model.xml"),
        ("a.bin", "no model that can"),
    ):
        found = run("benchmark", tmp_path / path, "-o", tmp_path / "out")
        assert found.exit_code == 3, found.stderr
        assert message in found.stderr


def test_diagnose_writes_a_report(result, tmp_path) -> None:
    found = run("diagnose", result / "fp32/model.xml", result / "int8/model.xml", "--data", result.parent / "images",
                "--calib", f"npz:{result / 'calibration.npz'}", "--num-samples", 8, "--benchmark-time", 0, "-o",
                tmp_path / "out")  # fmt: skip
    assert found.exit_code == 0, found.stderr
    diagnosis = json.loads((tmp_path / "out/diagnosis.json").read_text())
    jsonschema.validate(diagnosis, schema("diagnosis"))
    assert len(diagnosis["sets"]) == 2
    assert diagnosis["int8"]["latency_p50_ms"] is None
    # It belongs on the page of its result, and on no other.
    attached = run("report", result, tmp_path / "out", "-o", tmp_path / "page", "--format", "html")
    assert attached.exit_code == 0, attached.stderr
    assert "Where the accuracy goes" in (tmp_path / "page/report.html").read_text()
    diagnosis["int8_sha256"] = "0" * 64
    (tmp_path / "out/diagnosis.json").write_text(json.dumps(diagnosis))
    refused = run("report", result, tmp_path / "out", "-o", tmp_path / "page")
    assert refused.exit_code == 2
    assert "is about another INT8 model" in refused.stderr


def test_the_command_of_the_report_is_the_recipe(result) -> None:
    import shlex

    from ovcalib.records.recipe import Recipe
    from ovcalib.reports.result import quantize_command

    recipe = Recipe.model_validate(json.loads((result / "request.json").read_text()))
    about = recipe.model.model_copy(update={"reference": "tests.toy:ToyNet"})
    words = shlex.split(quantize_command(recipe.model_copy(update={"model": about})))
    found = run(*words[1:], "--dry-run", "--json")
    assert found.exit_code == 0, found.stderr
    again = json.loads(found.stdout)["recipe"]
    assert again["model"].pop("reference") == "tests.toy:ToyNet"
    expected = recipe.model_dump(mode="json")
    expected["model"].pop("reference")
    assert again == expected


def test_several_results_make_a_comparison(result, benchmarked, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(result, other)
    record = json.loads((other / "result.json").read_text())
    record["model"]["name"] = "second"
    (other / "result.json").write_text(json.dumps(record))
    found = run("report", result, other, "-o", tmp_path / "page")
    assert found.exit_code == 0, found.stderr
    assert len(list(csv.DictReader((tmp_path / "page/report.csv").open()))) == 2
    assert "second" in (tmp_path / "page/report.html").read_text()
    record["environment"]["cpu"] = "Other CPU"
    (other / "result.json").write_text(json.dumps(record))
    refused = run("report", result, other, "-o", tmp_path / "page")
    assert refused.exit_code == 2
    assert "different machines" in refused.stderr
    assert run("report", result, other, "--no-latency", "-o", tmp_path / "page").exit_code == 0
    assert run("report", result, other, benchmarked[0], "-o", tmp_path / "page").exit_code == 2
    alone = run("report", benchmarked[0], "--format", "md", "-o", tmp_path / "alone")
    assert alone.exit_code == 0
    assert [p.name for p in (tmp_path / "alone").iterdir()] == ["report.md"]


def test_writing_the_report_again_keeps_the_list_of_files_true(result, tmp_path) -> None:
    from ovcalib.rundir import file_sha256

    shutil.copytree(result, tmp_path / "copy")
    assert run("report", tmp_path / "copy").exit_code == 0
    files = json.loads((tmp_path / "copy/result.json").read_text())["files"]
    assert all(file_sha256(tmp_path / "copy" / name) == digest for name, digest in files.items())


def test_the_doctor_says_what_is_missing_and_how_to_get_it() -> None:
    found = process("doctor", "--json", edge=True)
    assert found.returncode == 0, found.stderr
    about = json.loads(found.stdout)
    assert "FP32" in about["capabilities"]["CPU"]
    assert set(about["absent_devices"]) | {d.split(".")[0] for d in about["devices"]} >= {"CPU", "GPU", "NPU"}
    assert set(about["instruction_sets"]) >= {"VNNI", "AMX-INT8"}
    assert all(
        f["ready"] == (not f["missing"]) and (f["how"] is None) == f["ready"] for f in about["features"].values()
    )
    assert about["caches"]["ovcalib"] == {"path": "/nonexistent/ovcalib-cache", "bytes": 0}
    text = run("doctor").stdout
    assert "VNNI" in text
    assert "cache ovcalib" in text


@pytest.mark.parametrize(
    ("flags", "kernels", "said"),
    [
        ({"avx2"}, "avx2", "AVX2 without VNNI: INT8 products are summed in 16 bits, and full-range weights saturate; .* half of"),
        ({"avx2", "avx512f"}, "avx2", "AVX512 without VNNI: .* 16 bits, .* half of"),
        ({"avx2", "avx_vnni"}, "vnni", "AVX-VNNI: INT8 products are summed in 32 bits and do not saturate; .* the whole of"),
        ({"avx2", "avx512f", "avx512_vnni", "amx_int8"}, "vnni", "AMX-INT8: .* 32 bits .* the whole of"),
        ({"asimd", "asimddp"}, "vnni", "NEON-DOTPROD: .* 32 bits .* the whole of"),
        (set(), "vnni", "this CPU: .* 32 bits .* the whole of"),
        # ONEDNN_MAX_CPU_ISA=AVX2 on a CPU that has more
        ({"avx2", "avx512f", "avx512_vnni"}, "avx2", "AVX512-VNNI: .* 16 bits, .* half of"),
    ],
)  # fmt: skip
def test_the_doctor_says_what_int8_does_on_this_cpu(flags, kernels, said, monkeypatch) -> None:
    from ovcalib import machine
    from ovcalib.measurement import doctor
    from ovcalib.quantization import settings

    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    for module in (doctor, settings):
        monkeypatch.setattr(module, "host_kernels", lambda: kernels)
    found = run("doctor")
    assert re.search(rf"^INT8 +{said}", found.stdout, re.MULTILINE)


def test_the_sums_that_the_doctor_names_are_those_of_this_cpu() -> None:
    from ovcalib.kernels import host_kernels

    bits = {"vnni": "32 bits", "avx2": "16 bits"}[host_kernels()]
    assert bits in json.loads(run("doctor", "--json").stdout)["int8"]


def test_what_would_drown_in_int8_stays_in_float(toy, tmp_path) -> None:
    """A channel thousands of times wider than the others, which the next layer takes back."""
    net = copy.deepcopy(toy.net)
    with torch.no_grad():
        for scaled in (net.stem[1].weight, net.stem[1].bias):
            scaled[0] *= 3000
        net.block.conv.weight[:, 0] /= 3000
        net.down[0].weight[:, 0] /= 3000
    quantize = partial(
        ovcalib.quantize, net, calib="noise", num_samples=10, input_shape=(3, 16, 16), mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25), benchmark_time=0,
    )  # fmt: skip
    guarded = quantize(output=tmp_path / "guarded", equalize="off")
    record = guarded.record.quantization
    assert {"block.conv", "down.0"} <= set(record.guarded)
    assert all(sqnr < 10 for sqnr in record.guarded.values())
    assert record.float_operations >= 2
    (warning,) = [w for w in guarded.record.warnings if "expected SQNR" in w]
    assert "activations" in warning
    assert "`guard=False`" in warning
    assert json.loads((tmp_path / "guarded" / "result.json").read_text())["quantization"]["guarded"] == record.guarded
    # Equalized, nothing has to stay in float.
    equalized = quantize().record.quantization
    assert equalized.guarded == {}
    assert equalized.equalized
    assert equalized.equalization_nmse[1] <= equalized.equalization_nmse[0]
    plain = quantize(guard=False).record.quantization
    assert plain.guarded == {}
    assert plain.float_operations == 0


def test_bias_correction_is_chosen_and_said(result) -> None:
    chosen = json.loads((result / "result.json").read_text())["quantization"]
    nearest, compensated = chosen["rounding_nmse"]
    assert chosen["rounding"] == ("compensated" if compensated < nearest else "nearest")
    assert f"rounding: {chosen['rounding']} (NMSE" in (result / "report.md").read_text()
    if chosen["rounding"] == "nearest":
        with_it, without = chosen["bias_nmse"]
        assert chosen["bias_correction"] == ("layerwise" if with_it <= without else "none")
        assert f"bias correction: {chosen['bias_correction']} (NMSE" in (result / "report.md").read_text()
