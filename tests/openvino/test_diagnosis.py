"""The diagnosis finds what was planted."""

import html
import json
import shlex
from dataclasses import replace

import jsonschema
import numpy as np
import openvino as ov
import pytest

import ovcalib
from ovcalib.diagnosis import remedies
from ovcalib.diagnosis.diagnose import operation_signals, output_errors
from ovcalib.errors import ModelError, UsageError
from ovcalib.evaluation.outputs import calibration_items
from ovcalib.graph.files import write_ir
from ovcalib.graph.probing import instrument, observe
from ovcalib.graph.reading import WEIGHTED, layer_name, quantized_operations
from ovcalib.progress import Progress
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.quantize import quantize_graph
from ovcalib.quantization.settings import Settings
from ovcalib.records.schema import schema
from ovcalib.reports.diagnosis import ignore_options


@pytest.fixture(scope="module")
def int8(toy, toy_graph):
    return quantize_default(toy_graph, toy.calibration(), Settings())


def plant_narrow_range(graph, name, factor):
    """Cut the range of the activation that one operation reads to a fraction; the other readers keep theirs."""
    graph = graph.clone()
    op = next(op for op in graph.get_ops() if layer_name(op) == name and op.get_type_name() in WEIGHTED)
    quantize = op.input_value(0).get_node()
    while quantize.get_type_name() != "FakeQuantize":
        quantize = quantize.input_value(0).get_node()
    bounds = [
        ov.op.Constant(np.array(v.get_node().get_data() * factor, np.float32)) for v in quantize.input_values()[1:]
    ]
    own = ov.opset13.fake_quantize(quantize.input_value(0), *bounds, levels=256)
    op.input(0).replace_source_output(own.output(0))
    graph.validate_nodes_and_infer_types()
    return graph


def write_pair(folder, fp32, int8):
    write_ir(fp32, folder / "fp32.xml")
    write_ir(int8, folder / "int8.xml")
    return str(folder / "fp32.xml"), str(folder / "int8.xml")


@pytest.mark.parametrize("planted", ["down.0", "fc"])
def test_a_planted_bad_layer_is_named_first(toy, toy_graph, int8, tmp_path, planted) -> None:
    fp32, bad = write_pair(tmp_path, toy_graph, plant_narrow_range(int8, planted, 0.02))
    toy.write_folder(tmp_path / "images", 80)
    toy.calibration(20).save(tmp_path / "set")
    found = ovcalib.diagnose(
        fp32, bad, tmp_path / "out", data=str(tmp_path / "images"), num_samples=16, benchmark_time=0.02,
        calib=[f"npz:{tmp_path / 'set' / 'calibration.npz'}"],
    )  # fmt: skip
    worst = found.operations[0]
    assert worst.name == planted
    assert worst.activations.sqnr_db < 10 < worst.weights.sqnr_db
    assert worst.alone.sqnr_db == pytest.approx(worst.activations.sqnr_db, abs=3)
    assert worst.inputs[0].clipped_share[found.on] > 0.3
    assert planted in found.faults[0]
    assert "are clipped" in found.faults[0]
    # The measured price list: restoring this one operation brings the accuracy back.
    assert found.metric == "top1"
    assert found.int8.top1 < 0.9 < found.fp32.top1
    assert found.suggested == 0
    assert found.candidates[0].in_float == (planted,)
    assert found.candidates[0].top1 >= found.fp32.top1 - 0.01
    assert found.candidates[0].latency_p50_ms > 0
    assert ignore_options(found.candidates[0]) == f"--ignore {planted}"
    assert len(worst.inputs[0].counts) == len(found.sets) == 2
    jsonschema.validate(json.loads((tmp_path / "out/diagnosis.json").read_text()), schema("diagnosis"))
    assert planted in (tmp_path / "out/report.html").read_text()
    # Quantizing again mends it, and the command that is shown does just that.
    assert found.remedy == 0
    (remedy,) = found.remedies
    assert remedy.top1 >= found.fp32.top1 - 0.01
    _, _, *words = shlex.split(remedy.command)
    assert words == [
        fp32,
        "--calib",
        f"npz:{tmp_path / 'set' / 'calibration.npz'}",
        "--num-samples",
        "20",
        "--seed",
        "1",
    ]
    again = ovcalib.quantize(
        fp32, calib=words[2], num_samples=20, seed=1, eval=str(tmp_path / "images"), benchmark_time=0
    ).record  # fmt: skip
    assert (again.accuracy.int8.top1, again.agreement.nmse) == (remedy.top1, pytest.approx(remedy.nmse, rel=1e-4))
    assert remedy.command.replace("&", "&amp;") in html.unescape((tmp_path / "out/report.html").read_text())


def test_where_quantizing_again_is_not_enough_the_most_harmful_operations_stay_in_float(
    toy, toy_graph, int8, tmp_path, monkeypatch
) -> None:
    fp32, bad = write_pair(tmp_path, toy_graph, plant_narrow_range(int8, "fc", 0.02))
    toy.calibration(20).save(tmp_path / "set")

    def diagnosed(**more):
        return ovcalib.diagnose(
            fp32, bad, calib=[f"npz:{tmp_path / 'set' / 'calibration.npz'}"], num_samples=16, benchmark_time=0, **more
        )

    strict = diagnosed(max_drop=0)
    assert strict.fp32.agreement == 1
    assert [r.agreement == 1 for r in strict.remedies[:-1]] == [False] * (len(strict.remedies) - 1)
    assert strict.remedies[-1].agreement == 1 or len(strict.remedies) == 3
    best = max(r.agreement for r in strict.remedies)
    assert strict.remedies[strict.remedy].agreement == best > strict.int8.agreement

    def spoiled(graph, ranges, settings, **more):
        made = quantize_default(graph, ranges, settings, **more)
        return made if settings.ignored else plant_narrow_range(made, "fc", 0.02)

    monkeypatch.setattr(ovcalib.quantization.quantize, "quantize_default", spoiled)
    found = diagnosed()
    assert [("--ignore fc" in r.command) for r in found.remedies] == [False, True]
    assert found.remedy == 1
    assert found.remedies[1].agreement >= 0.99 > found.remedies[0].agreement


@pytest.mark.parametrize("possible", [True, False])
def test_where_that_is_not_enough_it_is_fine_tuned(toy, toy_graph, int8, tmp_path, monkeypatch, possible) -> None:
    harmed = plant_narrow_range(int8, "fc", 0.02)
    fp32, bad = write_pair(tmp_path, toy_graph, harmed)
    toy.calibration(20).save(tmp_path / "set")
    given, judges = [], {"fractal": toy.calibration(4).inputs()}
    monkeypatch.setattr(remedies, "judging_inputs", lambda model, calibration, progress: judges)

    def spoiled(options, settings, graph, *rest, judges):
        given.append((options.finetune, judges))
        made = quantize_graph(options, settings, graph, *rest)
        return made if options.finetune else replace(made, int8=harmed.clone())

    def refuse(graph, name):
        raise ModelError("unknown operations")

    monkeypatch.setattr(remedies, "quantize_graph", spoiled)
    if not possible:
        monkeypatch.setattr("ovcalib.quantization.finetuning.refuse_unknown_operations", refuse)
    found = ovcalib.diagnose(
        fp32, bad, calib=[f"npz:{tmp_path / 'set' / 'calibration.npz'}"], num_samples=16, benchmark_time=0
    )
    assert [("--finetune" in r.command) for r in found.remedies] == [False, False, *[True] * possible]
    assert given == [(False, None), (False, None), *[(True, judges)] * possible]
    assert found.remedy == (2 if possible else None)


def test_without_nncf_nothing_is_quantized_again(toy, toy_graph, int8, tmp_path, monkeypatch) -> None:
    fp32, bad = write_pair(tmp_path, toy_graph, plant_narrow_range(int8, "fc", 0.02))
    toy.calibration(20).save(tmp_path / "set")
    monkeypatch.setattr(ovcalib.diagnosis.diagnose, "can_quantize", lambda: False)
    found = ovcalib.diagnose(
        fp32, bad, calib=[f"npz:{tmp_path / 'set' / 'calibration.npz'}"], num_samples=16, benchmark_time=0
    )
    assert (found.remedies, found.remedy) == ((), None)
    assert "NNCF or scipy is not installed" in found.warnings[-1]


def test_a_sound_model_is_not_quantized_again(toy, toy_graph, int8, tmp_path) -> None:
    fp32, sound = write_pair(tmp_path, toy_graph, int8)
    toy.calibration(20).save(tmp_path / "set")
    found = ovcalib.diagnose(
        fp32,
        sound,
        calib=[f"npz:{tmp_path / 'set' / 'calibration.npz'}"],
        num_samples=16,
        benchmark_time=0,
        max_drop=0.2,
    )
    assert (found.remedies, found.remedy) == ((), None)


def test_instrumented_references_are_those_of_the_float_graph(toy, toy_graph, int8) -> None:
    names = [op.get_friendly_name() for op in quantized_operations(int8)]
    graph, probes = instrument(int8, toy_graph, names)
    core = ov.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    x = toy.spec.preprocessing.normalise(toy.images[0])[None]
    values = core.compile_model(graph, "CPU", config)(x)
    expected = core.compile_model(observe(toy_graph, names), "CPU", config)(x)
    for i, probe in enumerate(probes):
        assert values[probe.reference] == pytest.approx(expected[i], abs=1e-4), probe.name


def test_weights_and_activations_are_apart(toy, toy_graph, int8) -> None:
    names = [op.get_friendly_name() for op in quantized_operations(int8)]
    images = [toy.calibration(8)[i] for i in range(8)]
    found = operation_signals(toy_graph, int8, names, {"a": images}, Progress())
    assert set(found) == set(names)
    for name in names:
        entry = found[name]
        if entry["weights"] is not None:
            # Two independent errors add up, so neither alone is larger.
            assert entry["alone"].sqnr_db <= min(entry["weights"].sqnr_db, entry["activations"].sqnr_db) + 1
        assert entry["cumulative"].sqnr_db <= entry["alone"].sqnr_db + 3
        for one in entry["inputs"]:
            assert sum(one.counts["a"]) > 0
            assert one.clipped_share["a"] < 0.1


def test_large_networks_are_looked_at_in_groups(toy, toy_graph, int8, monkeypatch) -> None:
    names = [op.get_friendly_name() for op in quantized_operations(int8)]
    images = {"a": [toy.calibration(2)[i] for i in range(2)]}
    whole = operation_signals(toy_graph, int8, names, images, Progress())
    monkeypatch.setattr("ovcalib.runtime.GROUP_BYTES", 1)
    single = operation_signals(toy_graph, int8, names, images, Progress())
    for name in names:
        assert single[name]["alone"].sqnr_db == pytest.approx(whole[name]["alone"].sqnr_db, abs=0.1)


def test_harm_is_that_of_one_operation_alone(toy, toy_graph, int8) -> None:
    bad = plant_narrow_range(int8, "fc", 0.05)
    names = [op.get_friendly_name() for op in quantized_operations(bad)]
    harm = output_errors(toy_graph, bad, names, calibration_items(toy.calibration(8)), Progress())
    worst = max(harm, key=harm.get)
    assert layer_name(next(op for op in bad.get_ops() if op.get_friendly_name() == worst)) == "fc"
    assert sorted(harm.values())[-2] < harm[worst] / 10


def test_what_cannot_be_compared_is_refused(toy, toy_graph, int8, tmp_path) -> None:
    fp32, quantized = write_pair(tmp_path, toy_graph, int8)
    with pytest.raises(UsageError, match="no images were given"):
        ovcalib.diagnose(fp32, quantized)
    with pytest.raises(ModelError, match="no quantized operation"):
        ovcalib.diagnose(fp32, fp32, calib=["noise"])
    with pytest.raises(ModelError, match="quantized already"):
        ovcalib.diagnose(quantized, quantized, calib=["noise"])
    x = ov.opset13.parameter([1, 3, 16, 16], np.float32, name="x")
    other = ov.Model([ov.opset13.relu(x)], [x], "other")
    other.set_rt_info(toy.spec.model_dump_json(), ["ovcalib", "spec"])
    write_ir(other, tmp_path / "other.xml")
    with pytest.raises(ModelError, match="which the FP32 model has not"):
        ovcalib.diagnose(tmp_path / "other.xml", quantized, calib=["noise"])
