"""Bias correction against what it is defined to do, layer by layer, and against a plain loop."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib import bias_correction
from ovcalib.bias_correction import channel_means, correct_biases
from ovcalib.export.to_openvino import graph_sha256
from ovcalib.graph import NULL_BIAS, float_operations, layer_name, quantized_layers, quantized_operations, restore
from ovcalib.quantization import Settings, quantize_default
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


def without_quantizers(graph):
    graph = graph.clone()
    for op in graph.get_ops():
        if op.get_type_name() == "FakeQuantize":
            for reader in op.output(0).get_target_inputs():
                reader.replace_source_output(op.input_value(0))
    return graph


@pytest.mark.parametrize("biased", [True, False])
def test_the_median_error_of_every_channel_is_gone(rng, images, biased):
    fp32 = network(rng, biased)
    int8 = coarse(fp32, rng)
    names = [layer.name for layer in quantized_layers(int8)]
    assert sorted(names) == ["dense0", "dense1", "fc", "point0", "point1", "stem"]
    before = channel_means(without_quantizers(int8), names, images)
    correct_biases(fp32, int8, images)
    wanted, after = channel_means(fp32, names, images), channel_means(without_quantizers(int8), names, images)
    for name, w, b, a in zip(names, wanted, before, after, strict=True):
        assert np.abs(np.median(w - a, 0)).max() < 1e-5, name
        assert np.abs(np.median(w - b, 0)).max() > 1e-3, name


def test_it_is_what_a_plain_loop_over_whole_networks_does(rng, images):
    """Layer after layer, each time through the whole network, nothing held."""
    fp32 = network(rng)
    int8 = coarse(fp32, rng)
    plain = int8.clone()
    for layer in quantized_layers(plain):
        wanted = channel_means(fp32, [layer.name], images)[0]
        given = channel_means(without_quantizers(plain), [layer.name], images)[0]
        bias_correction.add_to_biases(plain, {layer.name: np.median(wanted - given, 0)})
    correct_biases(fp32, int8, images)
    np.testing.assert_allclose(outputs_of(int8, images), outputs_of(plain, images), atol=1e-4)


def test_equal_networks_are_left_as_they_are(rng, images):
    fp32 = network(rng)
    same = coarse(fp32, rng)
    for op in same.get_ops():
        if op.get_type_name() in ("Convolution", "MatMul"):
            origin = next(o for o in fp32.get_ops() if o.get_friendly_name() == op.get_friendly_name())
            op.input(1).replace_source_output(ops.constant(origin.input_value(1).get_node().get_data()).output(0))
    expected = outputs_of(same, [images[0]])
    correct_biases(fp32, same, images)
    np.testing.assert_allclose(outputs_of(same, [images[0]]), expected, atol=1e-5)


def test_one_image_that_is_far_off_does_not_decide(rng, images):
    fp32 = network(rng)
    calm, disturbed = coarse(fp32, rng), coarse(fp32, rng)
    correct_biases(fp32, calm, images)
    correct_biases(fp32, disturbed, [*images, 1000 * images[0]])
    difference = outputs_of(calm, [images[1]]) - outputs_of(disturbed, [images[1]])
    assert np.abs(difference).max() < 1.0  # a mean over the images would have moved by hundreds


def test_fewer_images_are_taken_where_memory_ends(rng, images, monkeypatch):
    fp32 = network(rng)
    few, all_ = coarse(fp32, rng), coarse(fp32, rng)
    correct_biases(fp32, few, images[:3])
    monkeypatch.setattr(bias_correction, "ACTIVATION_BYTES", 3 * 4 * 8 * 8 * 8)
    correct_biases(fp32, all_, images)
    assert graph_sha256(few) == graph_sha256(all_)


def test_a_layer_that_had_no_bias_loses_it_again_in_float(rng, images):
    fp32 = network(rng, biased=False)
    int8 = coarse(fp32, rng)
    correct_biases(fp32, int8, images)
    assert sum(NULL_BIAS in op.get_friendly_name() for op in int8.get_ops()) == 6
    everything = [op.get_friendly_name() for op in quantized_operations(int8)]
    restored = restore(int8, fp32, everything)
    np.testing.assert_allclose(outputs_of(restored, [images[0]]), outputs_of(fp32, [images[0]]), atol=1e-5)


def test_a_quantized_network(toy, toy_graph):
    plain = quantize_default(toy_graph, toy.calibration(), Settings(bias_correction="none"))
    calibration = toy.calibration(16)
    correct_biases(toy_graph, plain, [calibration[i] for i in range(16)])
    assert float_operations(plain) == []
    assert layer_name(quantized_layers(plain)[0].op) == "stem.0"
