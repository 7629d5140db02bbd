"""Bias correction against its closed form, layer by layer."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib.graph.editing import redirect, restore
from ovcalib.graph.reading import (
    NULL_BIAS,
    activation_quantizers,
    float_operations,
    layer_name,
    quantized_layers,
    quantized_operations,
)
from ovcalib.quantization.bias_correction import correct_biases, weight_errors
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import outputs_of


def network(rng, biased=True):
    """Two branches and a shortcut, as in RepVGG's training form, with a matrix product behind them."""
    x = ops.parameter([1, 3, 8, 8], np.float32, "x")

    def conv(value, cin, cout, kernel, name):
        weights = (rng.normal(size=(cout, cin, kernel, kernel)) / np.sqrt(cin * kernel**2)).astype(np.float32)
        out = ops.convolution(value, ops.constant(weights), [1, 1], [kernel // 2] * 2, [kernel // 2] * 2, [1, 1])
        out.set_friendly_name(name)
        if not biased:
            return out
        return ops.add(out, ops.constant(rng.normal(size=(1, cout, 1, 1)).astype(np.float32)))

    value = ops.relu(conv(x, 3, 8, 3, "stem"))
    for i in range(2):
        branches = ops.add(conv(value, 8, 8, 3, f"dense{i}"), conv(value, 8, 8, 1, f"point{i}"))
        value = ops.relu(ops.add(branches, value))
    pooled = ops.reduce_mean(value, [2, 3])
    out = ops.matmul(pooled, ops.constant(rng.normal(size=(5, 8)).astype(np.float32)), False, True)
    out.set_friendly_name("fc")
    return ov.Model([out], [x], "branches")


def coarse(graph, rng):
    """The graph with weights rounded to four levels and activations that pass a FakeQuantize, as NNCF inserts them."""
    graph = graph.clone()
    for op in graph.get_ordered_ops():
        if op.get_type_name() not in ("Convolution", "MatMul"):
            continue
        weights = op.input_value(1).get_node().get_data()
        step = np.abs(weights).max() / 4
        op.input(1).replace_source_output(ops.constant((np.round(weights / step) * step).astype(np.float32)).output(0))
        low, high = ops.constant(np.float32(-20)), ops.constant(np.float32(20))
        quantized = ops.fake_quantize(op.input_value(0), low, high, low, high, 256)
        op.input(0).replace_source_output(quantized.output(0))
    return graph


@pytest.fixture
def images(rng):
    return [rng.normal(size=(1, 3, 8, 8)).astype(np.float32) for _ in range(7)]


@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_mean_of_the_rounding_error_times_the_input(rng, images, biased) -> None:
    """eps E[x], by hand: for a matrix product over pooled features, and for the first convolution at every position."""
    fp32 = network(rng, biased)
    int8 = coarse(fp32, rng)
    errors = weight_errors(fp32, int8, images)
    assert sorted(errors) == ["dense0", "dense1", "fc", "point0", "point1", "stem"]
    before, after = ({op.get_friendly_name(): op for op in graph.get_ops()} for graph in (fp32, int8))
    eps = {name: after[name].input_value(1).get_node().get_data() - before[name].input_value(1).get_node().get_data()
           for name in errors}  # fmt: skip
    pooled = outputs_of(ov.Model([before["fc"].input_value(0)], fp32.get_parameters(), "pooled"), images)
    np.testing.assert_allclose(errors["fc"], eps["fc"] @ pooled.mean(0), atol=1e-5)
    padded = np.pad(np.concatenate(images), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3)).mean((0, 2, 3))
    np.testing.assert_allclose(errors["stem"], np.einsum("oikl,ikl->o", eps["stem"], windows), atol=1e-5)


def test_the_channels_of_a_matrix_product_over_tokens_are_its_last_axis(rng) -> None:
    x = ops.parameter([1, 6, 4], np.float32, "x")
    weights = rng.normal(size=(5, 4)).astype(np.float32)
    product = ops.matmul(x, ops.constant(weights), False, True)
    product.set_friendly_name("tokens")
    fp32 = ov.Model([product], [x], "tokens")
    int8 = coarse(fp32, rng)
    images = [1 + rng.normal(size=(1, 6, 4)).astype(np.float32) for _ in range(3)]
    (rounded,) = (op.input_value(1).get_node().get_data() for op in int8.get_ops() if op.get_type_name() == "MatMul")
    expected = (rounded - weights) @ np.concatenate(images).mean((0, 1))
    np.testing.assert_allclose(weight_errors(fp32, int8, images)["tokens"], expected, atol=1e-5)


def test_the_mean_error_of_every_channel_is_gone_behind_exact_inputs(rng, images) -> None:
    """Where only one layer is rounded, the outputs are right on average."""
    fp32 = network(rng)
    whole = coarse(fp32, rng)
    names = [op.get_friendly_name() for op in quantized_operations(whole)]
    one = restore(whole, fp32, [name for name in names if name != "fc"])

    def error():  # of weights; what rounding does to activations has no mean over many images
        exact = one.clone()
        for quantizer in activation_quantizers(exact):
            redirect(quantizer.output(0), quantizer.input_value(0))
        return np.abs((outputs_of(exact, images) - outputs_of(fp32, images)).mean(0)).max()

    before = error()
    correct_biases(fp32, one, images)
    assert before > 0.1
    assert error() < 1e-5


def test_a_layer_is_corrected_alone(rng, images) -> None:
    """So what is given back to float takes its correction with it, and leaves the others right."""
    fp32 = network(rng)
    whole = coarse(fp32, rng)
    one = restore(whole, fp32, [name for name in weight_errors(fp32, whole, images) if name != "dense1"])
    np.testing.assert_allclose(
        weight_errors(fp32, one, images)["dense1"], weight_errors(fp32, whole, images)["dense1"], atol=1e-6
    )


def test_equal_networks_are_left_as_they_are(rng, images) -> None:
    fp32 = network(rng)
    same = coarse(fp32, rng)
    for op in same.get_ops():
        if op.get_type_name() in ("Convolution", "MatMul"):
            origin = next(o for o in fp32.get_ops() if o.get_friendly_name() == op.get_friendly_name())
            op.input(1).replace_source_output(ops.constant(origin.input_value(1).get_node().get_data()).output(0))
    expected = outputs_of(same, [images[0]])
    correct_biases(fp32, same, images)
    np.testing.assert_allclose(outputs_of(same, [images[0]]), expected, atol=1e-5)


def test_a_layer_that_had_no_bias_loses_it_again_in_float(rng, images) -> None:
    fp32 = network(rng, biased=False)
    int8 = coarse(fp32, rng)
    correct_biases(fp32, int8, images)
    assert sum(NULL_BIAS in op.get_friendly_name() for op in int8.get_ops()) == 6
    everything = [op.get_friendly_name() for op in quantized_operations(int8)]
    restored = restore(int8, fp32, everything)
    np.testing.assert_allclose(outputs_of(restored, [images[0]]), outputs_of(fp32, [images[0]]), atol=1e-5)


def test_a_quantized_network(toy, toy_graph) -> None:
    plain = quantize_default(toy_graph, toy.calibration(), Settings(bias_correction="none"))
    calibration = toy.calibration(16)
    correct_biases(toy_graph, plain, [calibration[i] for i in range(16)])
    assert float_operations(plain) == []
    assert layer_name(quantized_layers(plain)[0].op) == "stem.0"
