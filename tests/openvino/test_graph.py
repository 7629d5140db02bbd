import dataclasses

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib.errors import UnknownNameError
from ovcalib.graph.editing import restore, set_input_range, widen_channel_ranges
from ovcalib.graph.files import read_graph, write_ir
from ovcalib.graph.reading import constant_value, float_operations, layer_name, match_operations, quantized_operations
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import OpenVINORunner


@pytest.fixture(scope="module")
def int8(toy, toy_graph):
    return quantize_default(toy_graph, toy.calibration(), Settings())


def outputs(graph, toy):
    return np.stack(list(OpenVINORunner(graph).run(toy.spec.preprocessing.normalise(i)[None] for i in toy.images[:50])))


def test_quantized_operations_are_the_layers_and_what_joins_them(int8, toy_graph) -> None:
    names = [layer_name(op) for op in quantized_operations(int8)]
    assert [n for n in names if n in ("stem.0", "block.conv", "down.0", "top.conv", "fc")] == [
        "stem.0", "block.conv", "down.0", "top.conv", "fc",
    ]  # fmt: skip
    assert float_operations(int8) == []
    assert quantized_operations(toy_graph) == []
    assert len(float_operations(toy_graph)) == 5


def test_counts_survive_writing_and_reading(int8, tmp_path) -> None:
    write_ir(int8, tmp_path / "m.xml")
    again = read_graph(tmp_path / "m.xml")
    assert len(quantized_operations(again)) == len(quantized_operations(int8))


def test_restoring_everything_gives_the_float_model(toy, toy_graph, int8) -> None:
    everything = [op.get_friendly_name() for op in quantized_operations(int8)]
    restored = restore(int8, toy_graph, everything)
    assert quantized_operations(restored) == []
    assert np.abs(outputs(restored, toy) - outputs(toy_graph, toy)).max() < 1e-4


def test_restoring_nothing_changes_nothing(toy, toy_graph, int8) -> None:
    assert np.array_equal(outputs(restore(int8, toy_graph, []), toy), outputs(int8, toy))


def test_restoring_one_leaves_the_others_quantized(toy_graph, int8) -> None:
    name = next(op.get_friendly_name() for op in quantized_operations(int8) if layer_name(op) == "down.0")
    restored = restore(int8, toy_graph, [name])
    assert [layer_name(op) for op in float_operations(restored)] == ["down.0"]
    assert len(quantized_operations(restored)) == len(quantized_operations(int8)) - 1
    # The quantized model itself is untouched.
    assert float_operations(int8) == []


def test_a_float_layer_before_the_rest_of_the_network_is_exact(toy, toy_graph, int8) -> None:
    """The first layer alone in float computes what it computes in the float model."""
    name = next(op.get_friendly_name() for op in quantized_operations(int8) if layer_name(op) == "stem.0")
    restored = restore(int8, toy_graph, [name])

    def first_relu(graph):
        clone = graph.clone()
        relu = next(op for op in clone.get_ordered_ops() if op.get_type_name() == "Relu")
        return ov.Model([relu.output(0)], clone.get_parameters(), "head")

    assert np.abs(outputs(first_relu(restored), toy) - outputs(first_relu(toy_graph), toy)).max() < 1e-5


def test_unknown_operations_are_named(toy_graph, int8) -> None:
    with pytest.raises(UnknownNameError, match="Unknown operation 'stem.9'"):
        restore(int8, toy_graph, ["stem.9"])


def test_values_behind_moving_operations_are_unquantized_for_one_reader_only() -> None:
    """fq -> reshape -> two matrix products: restoring one must leave the other's input quantized."""
    rng = np.random.default_rng(0)
    x = ops.parameter([1, 4, 4], np.float32, name="x")
    low, high = np.float32(-1), np.float32(1)
    fq = ops.fake_quantize(x, low, high, low, high, 4)  # coarse, so that it shows
    flat = ops.reshape(fq, np.array([1, 16]), False)
    weights = [rng.standard_normal((16, 3)).astype(np.float32) for _ in range(2)]
    products = [ops.matmul(flat, ops.constant(w), False, False, name=f"mm{i}") for i, w in enumerate(weights)]
    graph = ov.Model([ops.result(p) for p in products], [x], "two")
    restored = restore(graph, graph, ["mm1"])
    value = rng.uniform(-1, 1, (1, 4, 4)).astype(np.float32)
    both = ov.Core().compile_model(restored, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(value)
    coarse = np.round((value + 1) * 1.5) / 1.5 - 1
    assert np.abs(both[0] - coarse.reshape(1, 16) @ weights[0]).max() < 1e-4
    assert np.abs(both[1] - value.reshape(1, 16) @ weights[1]).max() < 1e-4


def test_patterns_match_by_name_and_by_type(toy_graph) -> None:
    found = match_operations(toy_graph, ["stem.*", "type:matmul"])
    assert {layer_name(op) for op in found["stem.*"]} >= {"stem.0"}
    assert [layer_name(op) for op in found["type:matmul"]] == ["fc"]
    with pytest.raises(UnknownNameError, match="Did you mean 'stem.0'"):
        match_operations(toy_graph, ["stem.1"])
    with pytest.raises(UnknownNameError, match="type:Convolution"):
        match_operations(toy_graph, ["type:conv"])


# The range of the input -----------------------------------------------------------------------


def input_quantizer(graph):
    (reader,) = graph.get_parameters()[0].output(0).get_target_inputs()
    fq = reader.get_node()
    assert fq.get_type_name() == "FakeQuantize"
    ends = [float(fq.input_value(i).get_node().get_data().reshape(-1)[0]) for i in (1, 2, 3, 4)]
    assert ends[:2] == ends[2:]
    return ends[:2]


def quantizer_of(low, high):
    x = ops.parameter([1, 3, 4, 4], np.float32, name="x")
    ends = [np.full((1, 1, 1, 1), v, np.float32) for v in (low, high, low, high)]
    return ov.Model([ops.relu(ops.fake_quantize(x, *ends, 256))], [x])


@pytest.mark.parametrize(
    ("before", "span", "expected"),
    [
        ((-1.28, 1.27), (-2.1, 2.7), (-2.7 * 128 / 127, 2.7)),  # symmetric stays so
        ((-1.28, 1.27), (-3.0, 2.7), (-3.0 * 128 / 127, 3.0)),
        ((0.0, 0.5), (0.0, 2.7), (0.0, 2.7)),
    ],
)
def test_the_input_spans_the_range_that_is_given(before, span, expected) -> None:
    graph = quantizer_of(*before)
    assert set_input_range(graph, *span)
    assert input_quantizer(graph) == pytest.approx(expected, rel=1e-6)


def test_images_that_were_never_dark_do_not_cut_off_the_dark() -> None:
    graph = quantizer_of(0.0, 0.5)
    set_input_range(graph, -2.1, 2.7)
    low, high = input_quantizer(graph)
    assert low <= -2.1 + 0.02
    assert high >= 2.7 - 0.02


@pytest.mark.parametrize("span", [(-2.1, 2.7), (-1.0, 3.0), (-2.0, -1.0)])
def test_zero_stays_exact_in_an_asymmetric_range(span) -> None:
    graph = quantizer_of(-1.0, 2.0)
    set_input_range(graph, *span)
    low, high = input_quantizer(graph)
    step = (high - low) / 255
    assert low / step == pytest.approx(round(low / step), abs=1e-3)
    assert low <= min(span[0], 0) + step
    assert high >= max(span[1], 0) - step


def test_a_float_graph_has_no_range_to_set(toy_graph) -> None:
    assert not set_input_range(toy_graph.clone(), 0, 1)


def channel_quantizer(low, high, clamp=None):
    x = ops.parameter([1, len(high), 4, 4], np.float32, name="x")
    source = x if clamp is None else ops.clamp(x, 0.0, clamp)
    ends = [np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (low, high, low, high)]
    return ov.Model([ops.relu(ops.fake_quantize(source, *ends, 256))], [x])


@pytest.mark.parametrize(
    ("low", "high", "clamp", "expected"),
    [
        ([0, 0], [1.0, 3.0], None, [2.0, 6.0]),
        ([0, 0, 0, 0], [1.0, 4.0, 6.0, 0.0], 6.0, [2.0, 6.0, 6.0, 0.0]),  # no more than a Clamp lets through
        ([-1.28, -2.56], [1.27, 2.54], None, [2.54, 5.08]),
        ([0], [1.0], None, [1.0]),  # one range for all channels has no need of it
    ],
)
def test_ranges_of_single_channels_are_widened_and_zero_stays_where_it_is(low, high, clamp, expected):
    graph = channel_quantizer(low, high, clamp)
    widen_channel_ranges(graph, 2.0)
    graph.validate_nodes_and_infer_types()
    (fq,) = [op for op in graph.get_ops() if op.get_type_name() == "FakeQuantize"]
    lows, highs, *out = (fq.input_value(i).get_node().get_data().reshape(-1) for i in (1, 2, 3, 4))
    assert highs == pytest.approx(expected)
    assert [list(lows), list(highs)] == [list(values) for values in out]
    for before, after in zip(zip(low, high, strict=True), zip(lows, highs, strict=True), strict=True):
        assert after[0] * before[1] == pytest.approx(before[0] * after[1], rel=1e-6)


@pytest.mark.parametrize("preset", ["performance", "mixed"])
def test_made_images_need_not_reach_black_and_white_but_the_input_does(toy, toy_graph, preset) -> None:
    pale = toy.calibration()
    pale = dataclasses.replace(pale, images=(pale.images // 4 + 96).astype(np.uint8))
    own = dataclasses.replace(pale, provenance=pale.provenance.model_copy(update={"real": True}))
    low, high = toy.spec.preprocessing.input_range()
    made, measured = (
        input_quantizer(quantize_default(toy_graph, images, Settings(preset=preset))) for images in (pale, own)
    )
    assert made[0] <= low.min() + 0.02
    assert made[1] >= high.max() - 0.02
    assert measured[0] > 0.6 * low.min()
    assert measured[1] < 0.6 * high.max()


def test_constant_expressions_are_folded_as_they_are_computed(rng) -> None:
    """Compressed weights, which are marked not to be folded, and those behind a FakeQuantize."""
    integers = rng.integers(-127, 128, (4, 3)).astype(np.int8)
    convert = ops.convert(ops.constant(integers), np.float32)
    convert.get_rt_info()["DisableConstantFolding_0"] = ""
    scale = rng.uniform(0.01, 0.1, (4, 1)).astype(np.float32)
    compressed = ops.multiply(convert, ops.constant(scale))
    np.testing.assert_array_equal(constant_value(compressed.output(0)), integers * scale)
    assert "DisableConstantFolding_0" in convert.get_rt_info()

    weights = rng.normal(size=(4, 3)).astype(np.float32)
    ends = [ops.constant(np.float32(end)) for end in (-1, 1, -1, 1)]
    quantized = ops.fake_quantize(ops.constant(weights), *ends, 255)
    expected = np.rint((np.clip(weights, -1, 1) + 1) / 2 * 254) / 254 * 2 - 1
    np.testing.assert_allclose(constant_value(quantized.output(0)), expected, atol=1e-6)
