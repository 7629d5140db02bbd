"""Simulated low-bit graphs against torch's own fake quantization, and their grids against exhaustive search."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovcalib.export.to_onnx import to_onnx
from ovcalib.graph.files import read_graph
from ovcalib.graph.reading import (
    activation_quantizers,
    constant_value,
    integer_weights,
    quantizable_operations,
    quantized_layers,
)
from ovcalib.kernels import without_saturation
from ovcalib.quantization.equalization import equalize
from ovcalib.quantization.low_bits import Bits, choose_range, choose_scale, fake_quantize, simulate, zero_on_grid
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import outputs_of


def test_zero_is_a_level_and_steps_are_kept(rng) -> None:
    low, high = -rng.uniform(0, 3, 50), rng.uniform(0.1, 3, 50)
    low[:5] = 0
    for levels in (4, 16, 256):
        found_low, found_high = zero_on_grid(low, high, levels)
        np.testing.assert_allclose(found_high - found_low, high - low)
        zero = -found_low / (found_high - found_low) * (levels - 1)
        np.testing.assert_allclose(zero, np.rint(zero), atol=1e-9)
        assert np.all(np.abs(found_low - low) <= (high - low) / (levels - 1))
        np.testing.assert_allclose(found_low[:5], 0)


def test_fake_quantize_is_torchs(rng) -> None:
    values = rng.normal(0, 2, (3, 1000))
    low, high = zero_on_grid(np.array([-1.0, -3.0, 0.0]), np.array([1.5, 2.0, 4.0]), 16)
    for i in range(3):
        step = (high[i] - low[i]) / 15
        expected = torch.fake_quantize_per_tensor_affine(
            torch.from_numpy(values[i]).float(), step, round(-low[i] / step), 0, 15
        )
        found = fake_quantize(values[i : i + 1], low[i : i + 1, None], high[i : i + 1, None], 16)[0]
        assert np.mean(np.abs(found - expected.numpy()) > 1e-5) < 0.003  # halves go either way


@pytest.mark.parametrize("ranges", ["mse", "power-of-two"])
def test_the_range_has_the_least_error_of_its_kind(rng, ranges) -> None:
    values = np.stack([rng.laplace(0, scale, 4000) for scale in (0.3, 2.0)])
    values[1] = np.abs(values[1])
    low, high = np.minimum(values.min(1), 0), values.max(1)
    found_low, found_high = choose_range(values, low, high, 16, ranges)
    error = np.mean((fake_quantize(values, found_low[:, None], found_high[:, None], 16) - values) ** 2, 1)
    for i in range(2):
        tried = []
        for k in range(1, 41) if ranges == "mse" else range(-8, 8):
            if ranges == "mse":
                ends = zero_on_grid(low[i : i + 1] * k / 40, high[i : i + 1] * k / 40, 16)
            else:
                step = 2.0**k / (16 if low[i] == 0 else 8)
                ends = np.array([0.0 if low[i] == 0 else -(2.0**k)]), np.array([2.0**k - step])
            tried.append(
                np.mean((fake_quantize(values[i : i + 1], ends[0][:, None], ends[1][:, None], 16) - values[i]) ** 2)
            )
        assert error[i] == pytest.approx(min(tried))
    if ranges == "power-of-two":
        steps = (found_high - found_low) / 15
        np.testing.assert_allclose(np.log2(steps), np.rint(np.log2(steps)))
        assert found_low[1] == 0


def test_scales_have_the_least_error_of_their_kind(rng) -> None:
    weights = rng.standard_t(3, (4, 200))

    def error(rows, scale):
        return np.sum((np.clip(np.rint(rows / scale), -7, 7) * scale - rows) ** 2)

    largest = np.abs(weights).max(1)
    np.testing.assert_allclose(choose_scale(weights, 7, "extremes", True), largest / 7)
    for row, scale in zip(weights, choose_scale(weights, 7, "mse", True), strict=True):
        shares = [np.abs(row).max() * k / 40 / 7 for k in range(1, 41)]
        assert error(row, scale) == pytest.approx(min(error(row, s) for s in shares))
    powers = choose_scale(weights, 7, "power-of-two", True)
    np.testing.assert_allclose(np.log2(powers), np.rint(np.log2(powers)))
    for row, scale in zip(weights, powers, strict=True):
        assert error(row, scale) == pytest.approx(min(error(row, 2.0**k) for k in range(-12, 6)))
    common = choose_scale(weights, 7, "mse", False)
    assert len(set(common)) == 1
    assert error(weights, common[0]) <= error(weights, largest.max() / 7)
    np.testing.assert_array_equal(choose_scale(np.zeros((2, 5)), 7, "mse", True), [1, 1])


class Small(torch.nn.Module):
    """Two convolutions and a classifier, so that the path of every value can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)
        self.last = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def small(toy, tmp_path_factory):
    torch.manual_seed(3)
    net = Small().eval()
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    to_onnx(net, (3, 16, 16), path)
    fp32 = read_graph(path)
    calibration = toy.calibration(16)
    settings = Settings(overflow_fix="disable", bias_correction="none")
    return net, fp32, quantize_default(fp32, calibration, settings), calibration.inputs()


def rounded_weights(weights, bits):
    rows = weights.reshape(len(weights), -1)
    limit = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(1) / limit
    zero = torch.zeros(len(rows), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, -limit, limit).view_as(weights)


def rounded_values(x, ends, bits):
    low, high = ends
    step = (high - low) / (2**bits - 1)
    return torch.fake_quantize_per_tensor_affine(x, float(step), round(float(-low / step)), 0, 2**bits - 1)


def ends(values, bits):
    low, high = (np.array([float(end)]) for end in (values.min().clamp(max=0), values.max().clamp(min=0)))
    found = zero_on_grid(low, high, 2**bits)
    return found[0][0], found[1][0]


@pytest.mark.parametrize("edges", ["academic", "full"])
def test_the_graph_computes_what_torch_computes(small, edges) -> None:
    net, fp32, int8, inputs = small
    bits = Bits(weights=4, activations=5, edges=edges, ranges="extremes")
    graph = simulate(fp32, int8, bits, inputs)
    found = outputs_of(without_saturation(graph), inputs)
    x = torch.from_numpy(np.concatenate(inputs))
    with torch.no_grad():
        hidden = [F.relu(net.first(x))]
        hidden.append(F.relu(net.second(hidden[0])))
        pooled, outputs = hidden[1].mean((2, 3)), net(x)
        outer = 8 if edges == "academic" else 5
        outer_weights = 8 if edges == "academic" else 4

        # The range of the network's input is that of pixels.
        (read,) = [
            fq for fq in activation_quantizers(graph) if fq.input_value(0).get_node().get_type_name() == "Parameter"
        ]
        assert read.get_attributes()["levels"] == 2**outer
        low, high = (float(np.ravel(read.input_value(i).get_node().get_data())[0]) for i in (1, 2))
        y = F.conv2d(
            rounded_values(x, (low, high), outer), rounded_weights(net.first.weight, outer_weights), net.first.bias
        )
        y = rounded_values(F.relu(y), ends(hidden[0], 5), 5)
        y = F.conv2d(y, rounded_weights(net.second.weight, 4), net.second.bias)
        y = rounded_values(F.relu(y), ends(hidden[1], 5), 5)  # what the pooling reads
        y = rounded_values(y.mean((2, 3)), ends(pooled, outer), outer)
        y = F.linear(y, rounded_weights(net.last.weight, outer_weights), net.last.bias)
        if edges == "full":
            y = rounded_values(y, ends(outputs, 5), 5)
    difference = np.abs(found - y.numpy())
    assert np.median(difference) < 1e-4
    # A value between two levels is rounded either way, which moves outputs by about a step.
    assert difference.max() <= 1.5 * float(outputs.max() - outputs.min()) / 31


def test_bits_are_levels(small) -> None:
    _, fp32, int8, inputs = small
    graph = simulate(fp32, int8, Bits(weights=3, activations=4, edges="full", ranges="mse"), inputs)
    for layer in quantized_layers(graph):
        integers, _ = integer_weights(layer)
        assert np.abs(integers).max() == 3
    assert {fq.get_attributes()["levels"] for fq in activation_quantizers(graph)} == {16}
    same = simulate(fp32, int8, Bits(), inputs)
    np.testing.assert_array_equal(outputs_of(same, inputs), outputs_of(int8, inputs))
    academic = simulate(fp32, int8, Bits(weights=3, activations=4), inputs)
    largest = [np.abs(integer_weights(layer)[0]).max() for layer in quantized_layers(academic)]
    assert largest == [127, 3, 127]


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_that_hardware_shifts_by_are_powers_of_two(small, bits) -> None:
    _, fp32, int8, inputs = small
    graph = simulate(fp32, int8, Bits(bits, bits, "full", "power-of-two"), inputs)
    scales = [integer_weights(layer)[1] for layer in quantized_layers(graph)]
    for fq in activation_quantizers(graph):
        assert fq.get_attributes()["levels"] == 2**bits
        low, high = (constant_value(fq.input_value(i)) for i in (1, 2))
        scales.append((high - low) / (2**bits - 1))
    assert len(scales) == 3 + len(activation_quantizers(int8)) + 1  # the output's
    for scale in scales:
        exponents = np.log2(scale)
        np.testing.assert_allclose(exponents, np.rint(exponents), atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_has_one_scale_for_all_channels_where_that_is_asked(small, bits) -> None:
    net, fp32, int8, inputs = small
    graph = simulate(fp32, int8, Bits(bits, 8, "full", "extremes", "tensor"), inputs)
    limit = 2 ** (bits - 1) - 1
    for layer, module in zip(quantized_layers(graph), (net.first, net.second, net.last), strict=True):
        integers, scale = integer_weights(layer)
        weights = module.weight.detach().numpy()
        step = np.abs(weights).max() / limit
        np.testing.assert_allclose(scale, np.full_like(scale, step), rtol=1e-5)
        np.testing.assert_array_equal(integers.reshape(weights.shape), np.rint(weights / step))


@pytest.mark.parametrize("rounding", ["per-tensor", "dfq"])
def test_dfq_has_one_scale_for_the_weights_of_an_equalized_layer(small, toy, monkeypatch, rounding) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    benchmark = importlib.import_module("low_bits")
    _, fp32, int8, _ = small
    bits = Bits(4, 8, "full", "extremes")
    graph = benchmark.quantized(fp32, int8, toy.calibration(16), bits, rounding)
    own, equalized = (
        {op.name: op.weights for op in quantizable_operations(each)} for each in (fp32, equalize(fp32)[0])
    )
    assert any(not np.allclose(own[name], equalized[name]) for name in own)
    for layer in quantized_layers(graph):
        integers, scale = integer_weights(layer)
        weights = (equalized if rounding == "dfq" else own)[layer.name].reshape(-1)
        step = np.abs(weights).max() / 7
        np.testing.assert_allclose(scale, np.full_like(scale, step), rtol=1e-5)
        np.testing.assert_array_equal(np.sort(integers.reshape(-1)), np.sort(np.rint(weights / step)))


def test_outputs_are_quantized_with_8_bits_as_well(small) -> None:
    _, fp32, int8, inputs = small
    graph = simulate(fp32, int8, Bits(8, 8, "full"), inputs)
    assert len(activation_quantizers(graph)) == len(activation_quantizers(int8)) + 1
    assert len(np.unique(outputs_of(without_saturation(graph), inputs))) <= 256
    before = {fq.get_friendly_name(): constant_value(fq.input_value(2)) for fq in activation_quantizers(int8)}
    after = {fq.get_friendly_name(): constant_value(fq.input_value(2)) for fq in activation_quantizers(graph)}
    assert before == {name: value for name, value in after.items() if name in before}


def test_bits_are_refused_out_of_range() -> None:
    with pytest.raises(ValueError, match="weights has 1 bits, but must have 2 to 8"):
        Bits(weights=1)
