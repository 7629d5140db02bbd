"""The pitfalls of the engine that concern us, each with what we do about it."""

import gc
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import openvino as ov
import pytest
import scipy.stats
from openvino import opset13 as ops

from ovcalib import Preprocessing
from ovcalib.api import make_recipe
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.split import split
from ovcalib.diagnosis.diagnose import saturation_fault
from ovcalib.errors import DeviceError, ModelError, UsageError
from ovcalib.evaluation.dataset import calibration_images
from ovcalib.evaluation.metrics import nmse
from ovcalib.graph.editing import before_softmax, float_activations, restore, restore_biases
from ovcalib.graph.files import batch_one, graph_sha256, is_quantized, read_graph, write_ir
from ovcalib.graph.probing import instrument
from ovcalib.graph.reading import (
    WEIGHTED,
    float_operations,
    integer_weights,
    layer_name,
    match_operations,
    quantizable_operations,
    quantized_layers,
    quantized_operations,
    smoothing,
)
from ovcalib.kernels import outputs_on, without_saturation
from ovcalib.progress import Progress
from ovcalib.quantization.accuracy_aware import restore_to_goal
from ovcalib.quantization.nncf_backend import _Items, quantize_default
from ovcalib.quantization.quantize import finetuned, quantize_graph
from ovcalib.quantization.rounding import compensated
from ovcalib.quantization.selection import (
    SATURATED_SHARE,
    Fitted,
    OutputError,
    QuantizedCandidate,
    WeightError,
    halved,
    select_activation_ranges,
    select_bias_correction,
    select_weight_range,
)
from ovcalib.quantization.settings import Settings, auto_fields, has_attention, resolve_overflow_fix, resolve_settings
from ovcalib.records.calibration import Provenance
from ovcalib.records.options import QuantizationOptions
from ovcalib.records.result import FineTuning
from ovcalib.runtime import Inference, check_device, outputs_of


def outputs(graph, toy):
    return outputs_of(graph, (toy.spec.preprocessing.normalise(image)[None] for image in toy.images))


def accuracy(graph, toy):
    return (outputs(graph, toy).argmax(1) == toy.labels).mean()


def test_int8_keeps_the_accuracy_and_shrinks_the_weights(toy, toy_graph, tmp_path) -> None:
    int8 = quantize_default(toy_graph, toy.calibration(), Settings())
    assert accuracy(toy_graph, toy) > 0.95
    assert accuracy(int8, toy) > accuracy(toy_graph, toy) - 0.02
    write_ir(int8, tmp_path / "q.xml")
    write_ir(toy_graph, tmp_path / "f.xml")
    assert (tmp_path / "q.bin").stat().st_size < 0.5 * (tmp_path / "f.bin").stat().st_size


def test_the_float_graph_stays_as_it_is(toy, toy_graph) -> None:
    before = graph_sha256(toy_graph)
    quantize_default(toy_graph, toy.calibration(), Settings())
    assert graph_sha256(toy_graph) == before
    assert not toy_graph.has_rt_info(["nncf"])


def test_p9_p10_p13_the_dataset_is_sized_repeatable_and_of_batch_one(toy) -> None:
    seen: list[int] = []
    items = _Items(toy.calibration(10), seen.append)
    assert len(items) == 10
    first, second = list(items), list(items)
    assert all(x.shape == (1, 3, 16, 16) and x.dtype == np.float32 for x in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(items[3], first[3])
    assert max(seen) == 10


def test_p9_every_image_is_used(toy, toy_graph, tmp_path) -> None:
    seen: list[int] = []
    quantize_default(toy_graph, toy.calibration(37), Settings(), seen.append)
    assert max(seen) == 37


def test_p11_a_second_call_is_not_changed_by_the_first(toy, toy_graph) -> None:
    settings = Settings()
    first = quantize_default(toy_graph, toy.calibration(), settings)
    second = quantize_default(toy_graph, toy.calibration(), settings)
    assert graph_sha256(first) == graph_sha256(second)


def test_the_garbage_collector_is_left_as_it_was(toy, toy_graph) -> None:
    quantize_default(toy_graph, toy.calibration(), Settings())
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as servers do before they fork
    try:
        quantize_default(toy_graph, toy.calibration(), Settings())
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_p15_quantizing_twice_is_refused(toy, toy_graph, tmp_path) -> None:
    int8 = quantize_default(toy_graph, toy.calibration(), Settings())
    with pytest.raises(ModelError, match="already quantized"):
        quantize_default(int8, toy.calibration(), Settings())
    # Nor does it help to lose NNCF's mark: the operations themselves tell.
    write_ir(int8, tmp_path / "q.xml")
    text = (tmp_path / "q.xml").read_text()
    (tmp_path / "q.xml").write_text(text.replace("<nncf>", "<other>").replace("</nncf>", "</other>"))
    assert is_quantized(read_graph(tmp_path / "q.xml")) not in (None, "nncf/quantization")


@pytest.mark.parametrize(
    ("isa", "fix"),
    [("any", "first-layer"), ("avx2", "enable"), ("avx512", "enable"), ("vnni", "disable"), ("amx", "disable")],
)
def test_p17_the_overflow_fix_follows_the_machine_that_was_named(isa, fix) -> None:
    assert resolve_overflow_fix("auto", isa) == fix
    assert resolve_overflow_fix("enable", isa) == "enable"


@pytest.mark.parametrize(("kernels", "fix"), [("vnni", "disable"), ("avx2", "enable")])
def test_p17_the_build_machine_counts_only_when_asked(monkeypatch, kernels, fix) -> None:
    monkeypatch.setattr("ovcalib.quantization.settings.host_kernels", lambda: kernels)
    assert resolve_overflow_fix("auto", "host") == fix
    assert resolve_overflow_fix("auto", "any") == "first-layer"


def test_p17_the_overflow_fix_reaches_nncf(toy, toy_graph) -> None:
    graphs = {fix: graph_sha256(quantize_default(toy_graph, toy.calibration(), Settings(overflow_fix=fix)))
              for fix in ("disable", "first-layer", "enable")}  # fmt: skip
    assert len(set(graphs.values())) == 3


def test_presets_and_bias_correction_reach_nncf(toy, toy_graph) -> None:
    base = graph_sha256(quantize_default(toy_graph, toy.calibration(), Settings()))
    for other in (Settings(preset="mixed"), Settings(bias_correction="fast")):
        assert graph_sha256(quantize_default(toy_graph, toy.calibration(), other)) != base


def test_ignored_operations_stay_in_float(toy, toy_graph) -> None:
    found = match_operations(toy_graph, ["top.conv"])["top.conv"]
    name = next(op.get_friendly_name() for op in found if op.get_type_name() in WEIGHTED)
    int8 = quantize_default(toy_graph, toy.calibration(), Settings(ignored=(name,)))
    assert [layer_name(op) for op in float_operations(int8)] == ["top.conv"]


def constant(value):
    """What a constant expression of a graph comes to."""
    (found,) = ov.compile_model(ov.Model([value], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([]).values()
    return np.array(found, np.float64)


def converted(op):
    """The values that Converts before the weights of an operation give."""
    node = op.input_value(1).get_node()
    while node.get_type_name() != "Constant":
        if node.get_type_name() == "Convert":
            yield node.output(0)
        node = node.input_value(0).get_node()


def test_float_activations_keep_the_rounded_weights(toy, toy_graph) -> None:
    ignored = next(op.get_friendly_name() for op in float_operations(toy_graph))
    settings = Settings(overflow_fix="disable", bias_correction="none", ignored=(ignored,))
    int8 = quantize_default(toy_graph, toy.calibration(), settings)
    compressed = float_activations(int8)
    assert quantized_operations(int8)
    before = {op.get_friendly_name(): op for op in float_operations(toy_graph)}
    after = {op.get_friendly_name(): op for op in float_operations(compressed)}
    assert before.keys() == after.keys()
    assert not quantized_operations(compressed)
    assert is_quantized(compressed) is not None
    for name, op in after.items():
        weights, rounded = (constant(ops_by_name[name].input_value(1)) for ops_by_name in (before, after))
        if name == ignored:
            assert np.array_equal(rounded, weights)
            continue
        if op.get_type_name() != "MatMul":  # the CPU plugin would keep the integers that one Convert makes real
            assert {"i32", "f32"} == {found.get_element_type().to_string() for found in converted(op)}
        outputs = {"Convolution": (0,), "GroupConvolution": (0, 1), "MatMul": (0,)}[op.get_type_name()]
        others = tuple(i for i in range(weights.ndim) if i not in outputs)
        step = np.abs(weights).max(others, keepdims=True) / 127
        assert (np.abs(rounded - weights) <= 0.51 * step).all()
        assert (np.abs(rounded - weights).max(others, keepdims=True) > 0.1 * step).mean() > 0.5
    images = toy.calibration(8)
    reference, found = (outputs_of(graph, images.inputs()) for graph in (toy_graph, compressed))
    assert nmse(reference, found) < nmse(reference, outputs_of(int8, images.inputs()))
    assert WeightError(toy_graph, images.inputs()).nmse(int8) == pytest.approx(nmse(reference, found), rel=1e-3)


def test_p18_p37_the_device_is_always_named() -> None:
    check_device("CPU")
    check_device("AUTO")
    check_device("AUTO:CPU")
    with pytest.raises(DeviceError, match=r"Unknown device 'GPUU'.*AUTO, CPU"):
        check_device("GPUU")


def test_p28_identical_runs_give_identical_weights(toy, toy_graph, tmp_path) -> None:
    for name in ("a", "b"):
        write_ir(quantize_default(toy_graph, toy.calibration(), Settings()), tmp_path / f"{name}.xml")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_p31_nncf_does_not_write_to_stdout(toy, toy_graph, capsys) -> None:
    quantize_default(toy_graph, toy.calibration(), Settings())
    assert capsys.readouterr().out == ""


def test_p31_what_nncf_says_goes_to_the_log(toy, toy_graph, tmp_path) -> None:
    with (tmp_path / "log").open("w") as log:
        quantize_default(toy_graph, toy.calibration(), Settings(), log=log)
    assert "Statistics collection" in (tmp_path / "log").read_text()


def test_p35_an_error_of_nncf_becomes_ours(toy, toy_graph) -> None:
    with pytest.raises(ModelError, match=r"NNCF cannot quantize the model: .*nothing-of-the-kind"):
        quantize_default(toy_graph, toy.calibration(), Settings(ignored=("nothing-of-the-kind",)))


def test_p36_telemetry_is_off() -> None:
    """In a process of its own, because NNCF recognises a test run and is silent in it anyway."""
    code = (
        "import ovcalib, openvino.tools.ovc.telemetry_utils as ovc, nncf.telemetry.wrapper as nncf;"
        "print(ovc.tm.__name__, type(nncf.telemetry).__name__)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CI", "NNCF", "PYTEST"))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "MagicMock"]


SMOOTHED = Settings(transformer=True, preset="mixed", smooth_quant=True, bias_correction="none")


@pytest.fixture(scope="module")
def smoothed(toy):
    """A float graph with attention and a few large channels, and its INT8 with SmoothQuant."""
    graph = attention_graph()
    return graph, quantize_default(graph, toy.calibration(16), SMOOTHED)


def attention_graph():
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, stride=4)
            with torch.no_grad():
                self.patch.weight.mul_(torch.logspace(0, 1.5, 16)[:, None, None, None])
            self.qkv = nn.Linear(16, 48)
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.fc(((q @ k.transpose(1, 2) / 4).softmax(-1) @ v).mean(1))

    torch.manual_seed(0)
    graph = ov.convert_model(Block().eval(), example_input=torch.zeros(1, 3, 16, 16), input=[1, 3, 16, 16])
    graph.inputs[0].get_tensor().set_names({"input"})
    graph.outputs[0].get_tensor().set_names({"logits"})
    return graph


def test_p24_transformers_are_recognised_and_quantized(toy, toy_graph) -> None:
    assert not has_attention(toy_graph)
    graph = attention_graph()
    assert has_attention(graph)
    int8 = quantize_default(graph, toy.calibration(16), Settings(transformer=True, preset="mixed"))
    assert quantized_operations(int8)


def test_p24_a_crash_of_smooth_quant_says_how_to_omit_it(toy, monkeypatch) -> None:
    import nncf

    real, calls = nncf.quantize, []

    def crashing(*args, advanced_parameters, **kwargs):
        calls.append(advanced_parameters.smooth_quant_alphas.matmul)
        if advanced_parameters.smooth_quant_alphas.matmul > 0:
            raise RuntimeError("shared weights")
        return real(*args, advanced_parameters=advanced_parameters, **kwargs)

    monkeypatch.setattr(nncf, "quantize", crashing)
    assert quantized_operations(quantize_default(attention_graph(), toy.calibration(8), Settings(transformer=True)))
    with pytest.raises(ModelError, match="shared weights. Omit `smooth_quant=on`"):
        quantize_default(attention_graph(), toy.calibration(8), SMOOTHED)
    assert calls == [-1, 0.95]


def test_smooth_quant_scales_the_inputs_of_matrix_products_and_divides_their_weights(smoothed) -> None:
    graph, int8 = smoothed
    exact = {op.name: op.weights for op in quantizable_operations(graph)}
    layers = [layer for layer in quantized_layers(int8) if layer.op.get_type_name() == "MatMul"]
    factors = [smoothing(layer.op) for layer in layers]
    assert [f is not None for f in factors] == [True, True]
    assert factors[0].max() / factors[0].min() > 5
    for layer, factor in zip(layers, factors, strict=True):
        integers, scale = integer_weights(layer)
        step = scale if layer.op.get_attributes()["transpose_b"] else scale.T
        own = integers * scale if layer.op.get_attributes()["transpose_b"] else (integers * scale).T
        assert np.abs(own - exact[layer.name][0, :, :, 0] / factor).max() <= 0.51 * step.max()


def test_smoothed_layers_get_their_own_input_and_weights_back(smoothed, toy) -> None:
    graph, int8 = smoothed
    x = toy.calibration(4).inputs()
    names = [op.get_friendly_name() for op in quantized_operations(int8)]
    back = outputs_of(restore(int8, graph, names), x)
    np.testing.assert_allclose(back, outputs_of(graph, x), rtol=1e-4, atol=1e-4)
    whole = nmse(outputs_of(graph, x), outputs_of(int8, x))
    for name in names:
        assert nmse(outputs_of(graph, x), outputs_of(restore(int8, graph, [name]), x)) < 3 * whole


def test_the_variants_of_a_smoothed_layer_are_on_the_scale_of_fp32(smoothed, toy) -> None:
    graph, int8 = smoothed
    names = [layer.name for layer in quantized_layers(int8) if smoothing(layer.op) is not None]
    instrumented, probes = instrument(int8, graph, names)
    values = Inference(instrumented)(toy.calibration(4).inputs()[0])
    assert len(probes) == 2
    for probe in probes:
        for index in (probe.alone, probe.weights, probe.activations):
            assert nmse(values[probe.reference].reshape(1, -1), values[index].reshape(1, -1)) < 0.05


def test_compensated_rounding_keeps_smoothed_layers(smoothed, toy) -> None:
    graph, int8 = smoothed
    images = toy.calibration(32).inputs()
    plain, other = (nmse(outputs_of(graph, images), outputs_of(without_saturation(each), images))
                    for each in (int8, compensated(graph, [int8], images)[0]))  # fmt: skip
    assert other < 1.2 * plain


def test_a_dynamic_batch_is_quantized_at_batch_one(toy, toy_graph) -> None:
    graph = toy_graph.clone()
    graph.reshape({graph.inputs[0]: ov.PartialShape([-1, 3, 16, 16])})
    fixed = batch_one(graph, toy.spec)
    assert list(fixed.inputs[0].get_shape()) == [1, 3, 16, 16]
    assert graph.inputs[0].get_partial_shape().is_dynamic


# Accuracy-aware, on the real engine --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(toy, toy_graph):
    """INT8 with one bad layer: the range of one activation is a hundredth of what it should be."""
    int8 = quantize_default(toy_graph, toy.calibration(), Settings())
    convolution = next(op for op in quantized_operations(int8) if layer_name(op) == "top.conv")
    fq = convolution.input_value(0).get_node()
    for i in (2, 4):
        bound = np.array(fq.input_value(i).get_node().get_data(), np.float32)
        fq.input(i).replace_source_output(ov.op.Constant(np.asarray(bound / 100, np.float32)).output(0))
    return int8


def search(toy, toy_graph, int8, **fields):
    options = QuantizationOptions(mode="accuracy-aware", **fields)
    images = calibration_images(toy.calibration(images=toy.images))
    return restore_to_goal(options, toy_graph, int8, images, "classification", lambda: False, Progress())


def test_p4_a_planted_layer_is_found_and_the_outcome_is_true(toy, toy_graph, planted) -> None:
    assert accuracy(planted, toy) < 0.9
    found, record = search(toy, toy_graph, planted, metric="agreement", max_drop=0.02)
    assert found.outcome == "goal-met"
    assert record.ranking[0][0] in ("top.conv", "top/Add")
    assert 1 <= len(found.reverted) <= 3
    assert accuracy(found.model, toy) > accuracy(toy_graph, toy) - 0.03
    assert record.baseline - record.value <= 0.02
    json.dumps(record.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize("metric", ["agreement", "expected-top1"])
def test_p3_nan_never_meets_a_goal(toy, toy_graph, planted, metric) -> None:
    """A model whose outputs are NaN names nothing, so every operation at fault is reverted or the goal missed."""
    broken = planted.clone()
    bias = next(op for op in broken.get_ordered_ops() if op.get_type_name() == "Add")
    constant = bias.input_value(1).get_node()
    bias.input(1).replace_source_output(ov.op.Constant(np.full_like(constant.get_data(), np.nan)).output(0))
    found, record = search(toy, toy_graph, broken, metric=metric, max_drop=0.02)
    assert (found.outcome == "goal-met") == (record.value >= record.baseline - 0.02)


def test_p6_zero_iterations_are_refused_before_anything_runs() -> None:
    from ovcalib.errors import UsageError

    with pytest.raises(UsageError, match=r"max_iterations=0"):
        make_recipe(model="toy", mode="accuracy-aware", max_iterations=0)


def test_biases_without_correction_are_those_that_nncf_gives(toy, toy_graph) -> None:
    plain = quantize_default(toy_graph, toy.calibration(), Settings(bias_correction="none"))
    corrected = quantize_default(toy_graph, toy.calibration(), Settings())
    assert graph_sha256(plain) != graph_sha256(corrected)
    assert outputs(restore_biases(corrected, toy_graph), toy) == pytest.approx(outputs(plain, toy), abs=1e-5)


def test_bias_correction_is_left_out_where_it_harms(toy, toy_graph) -> None:
    settings = Settings()
    int8 = quantize_default(toy_graph, toy.calibration(), settings)
    harmed = int8.clone()
    add = next(op for op in harmed.get_ordered_ops() if op.get_type_name() == "Add")
    value = add.input_value(1).get_node().get_data()
    add.input(1).replace_source_output(ov.op.Constant(np.array(value + 1.0)).output(0))
    output = OutputError(toy_graph, toy.calibration().inputs())
    found = select_bias_correction(Fitted(QuantizedCandidate(harmed, settings, output)))
    chosen, (corrected, plain) = found.best, found.bias_nmse or (0, 0)
    assert chosen.settings == replace(settings, bias_correction="none")
    assert corrected > 10 * plain
    assert outputs(chosen.int8, toy) == pytest.approx(outputs(restore_biases(int8, toy_graph), toy), abs=1e-5)
    # Where the outputs are no closer without it, it stays.
    already = QuantizedCandidate(restore_biases(int8, toy_graph), settings, output)
    kept = select_bias_correction(Fitted(already))
    assert kept.bias_nmse == (already.error, already.error)
    assert kept.best is already


def test_outputs_of_a_final_softmax_are_compared_before_it(toy, toy_graph) -> None:
    """Probabilities near 0 and 1 hide what INT8 does to the logits."""
    sharp = toy_graph.clone()
    result = sharp.get_results()[0]
    logits = result.input_value(0)
    large = ov.opset13.multiply(logits, np.float32(1000))
    result.input(0).replace_source_output(ov.opset13.softmax(large, 1).output(0))
    sharp.validate_nodes_and_infer_types()
    calibration, settings = toy.calibration(), Settings()
    plain, hidden = (quantize_default(graph, calibration, settings) for graph in (toy_graph, sharp))
    expected = OutputError(toy_graph, calibration.inputs()).nmse(plain)
    error = OutputError(sharp, calibration.inputs())
    assert error.nmse(hidden) == pytest.approx(expected, rel=1e-3)
    assert error.on("vnni", hidden) == pytest.approx(expected, rel=1e-3)
    images = calibration.inputs()
    assert nmse(outputs_of(sharp, images), outputs_of(hidden, images)) < expected / 10
    assert before_softmax(toy_graph) is toy_graph


def maker(graph, calibration):
    """What makes the candidates of a graph."""
    output = OutputError(graph, calibration.inputs(max(0, len(calibration) - 32)))
    return lambda settings: QuantizedCandidate(quantize_default(graph, calibration, settings), settings, output)


def network_set(images):
    """A calibration set of network inputs, float32 [N, C, H, W]."""
    count, channels, height, width = images.shape
    return CalibrationSet(
        images, None, Preprocessing(height=height, width=width, mean=(0.0,) * channels, std=(1.0,) * channels),
        Provenance(source="npz:x", options={}, num_samples=count, requested=count, seed=0, seconds=0.0,
                   domain="network", labels=None),
    )  # fmt: skip


def positive_convolution(rng, channels=8):
    """A graph of one convolution and ReLU whose weights are positive."""
    x = ops.parameter([1, channels, 8, 8], np.float32, "x")
    weights = rng.uniform(0.5, 1.0, (channels, channels, 1, 1)).astype(np.float32)
    conv = ops.convolution(x, ops.constant(weights), [1, 1], [0, 0], [0, 0], [1, 1])
    return ov.Model([ops.relu(conv)], [x], "positive")


def top_of_input(int8):
    """Largest value of the quantizer of the network's input."""
    (quantizer,) = (t.get_node() for t in int8.get_parameters()[0].output(0).get_target_inputs())
    return float(quantizer.input_value(2).get_node().get_data().max())


def test_activation_ranges_are_those_of_all_images(rng) -> None:
    graph = positive_convolution(rng)
    images = rng.uniform(0, 1, (10, 8, 8, 8)).astype(np.float32)
    images *= np.arange(1, 11, dtype=np.float32).reshape(-1, 1, 1, 1) / images.max(axis=(1, 2, 3), keepdims=True)
    top = {
        ranges: top_of_input(quantize_default(graph, network_set(images), Settings(activation_ranges=ranges)))
        for ranges in ("min-max", "mean-min-max", "histogram")
    }
    assert top["min-max"] == pytest.approx(10)
    assert top["mean-min-max"] == pytest.approx(5.5)
    assert 5.5 < top["histogram"] <= 10.1


def test_a_channel_that_is_larger_in_other_images_is_not_clipped(rng) -> None:
    x = ops.parameter([1, 8, 8, 8], np.float32, "x")
    weights = rng.normal(size=(8, 1, 1, 3, 3)).astype(np.float32)
    depthwise = ops.group_convolution(ops.relu(x), ops.constant(weights), [1, 1], [0, 0], [0, 0], [1, 1])
    graph = ov.Model([depthwise], [x], "depthwise")
    calibration = network_set(rng.uniform(0, 1, (16, 8, 8, 8)).astype(np.float32))
    others = list(rng.uniform(0, 1.5, (16, 1, 8, 8, 8)).astype(np.float32))
    expected = outputs_of(graph, others)

    def error(**given):
        settings = resolve_settings(QuantizationOptions(**given), graph)
        return nmse(expected, outputs_of(without_saturation(quantize_default(graph, calibration, settings)), others))

    assert error() < error(activation_ranges="min-max") / 20


def test_one_image_far_beyond_the_others_does_not_spoil_the_ranges(rng) -> None:
    graph = positive_convolution(rng)
    images = rng.uniform(0, 1, (300, 8, 8, 8)).astype(np.float32)
    settings = Settings(bias_correction="none")

    def choose(calibration):
        make = maker(graph, calibration)
        return select_activation_ranges(make(settings), make, None)

    kept, errors = choose(network_set(images))
    assert (kept.settings, errors) == (settings, None)
    images[17] *= 1000
    chosen, compared = choose(network_set(images))
    extremes, mean = compared.nmse
    assert chosen.settings == replace(settings, activation_ranges="mean-min-max")
    assert chosen.error == mean < extremes / 10


@pytest.mark.parametrize(("count", "held_out"), [(32, 8), (6, 0)])
def test_ranges_are_compared_on_images_they_were_taken_from_and_held_out_ones_once_each(
    rng, monkeypatch, count, held_out
) -> None:
    monkeypatch.setattr("ovcalib.quantization.selection.SUSPECT_NMSE", 0.0)
    graph = positive_convolution(rng)
    images = rng.uniform(0, 1, (count, 8, 8, 8)).astype(np.float32)
    images[2] *= 1000
    options = QuantizationOptions(bias_correction="none", overflow_fix="disable", rounding="nearest", guard=False)
    settings = resolve_settings(options, graph)
    record = quantize_graph(
        options, settings, graph, network_set(images), None, "classification", lambda: False, Progress()
    ).record
    everything = list(images[:, None])
    expected = outputs_of(graph, everything).reshape(count, -1)

    def errors(ranges):
        int8 = quantize_default(
            graph, network_set(images[: count - held_out]), replace(settings, activation_ranges=ranges)
        )
        return ((outputs_of(without_saturation(int8), everything).reshape(count, -1) - expected) ** 2).sum(1)

    logs = np.log(errors("mean-min-max") / errors("min-max"))
    interval = scipy.stats.t.interval(0.95, count - 1, logs.mean(), scipy.stats.sem(logs))
    assert record.ranges_ratio == pytest.approx(np.exp([logs.mean(), *interval]), rel=1e-3)
    assert record.activation_ranges == ("mean-min-max" if interval[1] < 0 else "min-max")


@pytest.fixture
def saturating(rng):
    """A graph whose products VNNI adds in 32 bits, 255 x 127 twice being more than 16 bits hold; and its images."""
    x = ops.parameter([1, 64, 8, 8], np.float32, "x")
    weights = np.ones((64, 64, 3, 3), np.float32)
    conv = ops.convolution(x, ops.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    graph = ov.Model([ops.relu(conv)], [x], "saturating")
    inputs = [rng.uniform(0.5, 1.0, (1, 64, 8, 8)).astype(np.float32) for _ in range(8)]
    return graph, network_set(np.concatenate(inputs))


def test_the_kernels_of_avx2_saturate_and_half_the_range_does_not(saturating) -> None:
    graph, calibration = saturating
    inputs = calibration.inputs()
    expected = outputs_of(graph, inputs)
    errors = {}
    for fix in ("disable", "enable"):
        int8 = quantize_default(graph, calibration, Settings(overflow_fix=fix, bias_correction="none"))
        errors[fix] = nmse(expected, outputs_on("avx2", int8, inputs))
        assert nmse(expected, outputs_on("vnni", int8, inputs)) < 1e-3
    assert errors["enable"] < 1e-3
    assert errors["disable"] > 0.05


def test_weights_take_half_their_range_where_the_full_one_saturates(saturating) -> None:
    make = maker(*saturating)
    settings = Settings(overflow_fix="disable", bias_correction="none")

    full = make(settings)
    assert full.saturates(SATURATED_SHARE)
    found, saturation = select_weight_range(Fitted(full), Fitted(make(halved(settings))))
    chosen = found.best
    assert chosen.settings == replace(settings, overflow_fix="enable")
    assert graph_sha256(chosen.int8) == graph_sha256(make(chosen.settings).int8)
    assert saturation.halved == chosen.larger_error < saturation.avx2
    assert saturation.avoided
    assert f"{saturation.avx2:.2g}" in saturation.warning()
    assert "`deploy_isa`" in saturation.warning()
    # What is safe already stays as it is.
    assert not chosen.saturates(SATURATED_SHARE)
    kept, saturation = select_weight_range(found, None)
    assert kept is found
    assert not saturation.avoided


def test_settings_that_were_named_are_not_ours_to_choose(toy_graph) -> None:
    def ours(**given):
        options = QuantizationOptions(**given)
        return auto_fields(options, resolve_settings(options, toy_graph))

    everything = {"activation_ranges", "overflow_fix", "rounding", "bias_correction"}
    assert ours() == everything
    assert ours(deploy_isa="vnni") == {"activation_ranges", "rounding", "bias_correction"}
    assert ours(activation_ranges="min-max", overflow_fix="disable", bias_correction="fast") == set()
    assert ours(model_type="transformer") == {"smooth_quant", *everything}
    assert ours(model_type="transformer", smooth_quant="on") == everything
    assert resolve_settings(QuantizationOptions(model_type="transformer", smooth_quant="on"), toy_graph).smooth_quant
    with pytest.raises(UsageError, match="no attention"):
        resolve_settings(QuantizationOptions(smooth_quant="on"), toy_graph)


def test_what_runs_is_what_nncf_makes_so_that_the_latency_is_the_same(toy, toy_graph) -> None:
    calibration = toy.calibration()
    bare = quantize_default(toy_graph, calibration, Settings(activation_ranges="mean-min-max", bias_correction="none"))
    ours = quantize_default(
        toy_graph, calibration, Settings(rounding="compensated", channel_headroom=1.5, overflow_fix="first-layer")
    )
    kinds, own = (Counter(op.get_type_name() for op in graph.get_ops()) for graph in (bare, ours))
    assert own == kinds
    assert ops_with_their_inputs(ours) == ops_with_their_inputs(bare)


def ops_with_their_inputs(graph):
    return sorted(
        (op.get_type_name(), [value.get_node().get_type_name() for value in op.input_values()])
        for op in graph.get_ops()
    )


def test_choices_do_not_heed_the_saturation_of_this_cpu(saturating) -> None:
    graph, calibration = saturating
    output = OutputError(graph, calibration.inputs())
    int8 = quantize_default(graph, calibration, Settings(overflow_fix="disable", bias_correction="none"))
    assert output.nmse(int8) < 1e-3
    assert output.on("avx2", int8) > 0.05
    found = {error.kernels: error.nmse for error in output.by_kernels(int8, ("vnni", "avx2"))}
    assert found["vnni"] < 1e-3
    assert found["avx2"] > 0.05


def test_a_diagnosis_names_saturation(saturating) -> None:
    graph, calibration = saturating
    found = {
        fix: saturation_fault(
            graph,
            quantize_default(graph, calibration, Settings(overflow_fix=fix, bias_correction="none")),
            calibration.inputs(),
        )
        for fix in ("disable", "enable")
    }
    assert "saturate on CPUs without VNNI" in found["disable"]
    assert found["enable"] is None


@pytest.mark.parametrize(
    ("asked", "halved"),
    [({"deploy_isa": "any"}, True), ({"deploy_isa": "vnni"}, False), ({"overflow_fix": "disable"}, False)],
)  # fmt: skip
@pytest.mark.parametrize("kept", [True, False])
def test_finetuning_starts_from_sums_that_cannot_saturate(toy, toy_graph, monkeypatch, asked, halved, kept) -> None:
    options = QuantizationOptions(finetune=True, guard=False, **asked)
    seen = []

    def watched(output, before, start, *_):
        seen.extend([before, start])
        return start if kept else before, FineTuning(
            steps=1, images=1, nmse=(1, 1), judged_nmse={}, kept=kept, seconds=0
        )

    monkeypatch.setattr("ovcalib.quantization.quantize.finetuned", watched)
    monkeypatch.setattr("ovcalib.quantization.selection.SATURATED_SHARE", math.inf)  # so that the full range is taken
    made = quantize_graph(
        options, resolve_settings(options, toy_graph), toy_graph, toy.calibration(), None, "classification",
        lambda: False, Progress(),
    )  # fmt: skip

    def largest(graph):
        layers = quantized_layers(graph)[1:]
        return max(int(np.abs(integer_weights(layer)[0].astype(int)).max()) for layer in layers)

    # Of all layers: a single one may round its largest weight down.
    assert [largest(graph) for graph in seen] == [127, 64 if halved else 127]
    assert made.int8 is seen[1 if kept else 0]
    fix = {"any": "first-layer", "vnni": "disable"}[options.deploy_isa] if options.overflow_fix == "auto" else "disable"
    assert made.record.overflow_fix == ("enable" if kept and halved else fix)


@pytest.mark.parametrize(
    ("held_out", "one", "other", "kept"),
    [((2.0, 1.0), (3.0, 2.0), (5.0, 4.0), True), ((2.0, 1.0), (3.0, 3.0), (5.0, 5.0), True),
     ((2.0, 1.0), (3.0, 4.0), (5.0, 4.0), False), ((2.0, 1.0), (3.0, 2.0), (5.0, 6.0), False),
     ((2.0, 2.0), (3.0, 2.0), (5.0, 4.0), False), ((2.0, 1.0), None, (5.0, 4.0), True),
     ((2.0, 1.0), None, (5.0, 6.0), False), ((2.0, 1.0), None, None, True),
     ((2.0, math.inf), (3.0, 2.0), (5.0, 4.0), False)],
)  # fmt: skip
def test_finetuning_must_not_get_worse_on_images_of_other_sources(
    toy, toy_graph, monkeypatch, held_out, one, other, kept
) -> None:
    before, after = toy_graph.clone(), toy_graph.clone()
    start = toy_graph.clone()
    made = lambda fp32, int8, images, steps, **k: (after, steps - 2 if int8 is start else 0)  # noqa: E731
    monkeypatch.setattr("ovcalib.quantization.finetuning.finetune", made)
    parts, images = split(toy.calibration(16)), toy.calibration(4).inputs()
    output = OutputError(toy_graph, parts.choices.inputs())

    judged = []

    def error(judge, graph):
        judged.append(judge.inputs)
        found = held_out if judge is output else {id(images[0]): one, id(images[2]): other}[id(judge.inputs[0])]
        return found[0] if graph is before else found[1]

    # Those that FP32 itself fails on do not count.
    broken = np.zeros_like(images[0])
    monkeypatch.setattr(
        "ovcalib.quantization.quantize.compared_outputs",
        lambda fp32, images: np.array([[np.nan if image is broken else 0.0] for image in images]),
    )
    judges = {
        "fractal": (broken, *(images[:2] if one else ())), "bn-inversion": (broken, *(images[2:] if other else ()))
    }  # fmt: skip
    taken, record = finetuned(output, before, start, parts, 9, judges, error, lambda: False, Progress())
    assert taken is (after if kept else before)
    assert record.kept == kept
    assert (record.steps, record.images) == (7, len(parts.ranges))
    assert record.nmse == (held_out[0], None if math.isinf(held_out[1]) else held_out[1])
    found = {"fractal": one, "bn-inversion": other}
    assert record.judged_nmse == {source: errors for source, errors in found.items() if errors}
    assert not any(image is broken for images in judged for image in images)
