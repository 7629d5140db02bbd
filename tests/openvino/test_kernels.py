"""INT8 arithmetic: integer sums computed here, against graphs on this CPU's kernels, on others, and emulated."""

import json
import os
import subprocess
import sys

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib import kernels, machine
from ovcalib.errors import DeviceError
from ovcalib.evaluation.metrics import nmse
from ovcalib.graph.files import write_ir
from ovcalib.kernels import (
    AVX2Process,
    host_kernels,
    is_emulated,
    kernels_of,
    outputs_on,
    proof_kernels,
    runner_for,
    saturation_excess,
    without_saturation,
)
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.settings import Settings

needs_avx2 = pytest.mark.skipif("avx2" not in machine.cpu_flags(), reason="this CPU has no AVX2")
STEP, SCALE = 0.02, 0.01


def emulate_avx2(monkeypatch) -> None:
    """Let this CPU seem to have neither VNNI nor AVX2."""
    monkeypatch.setattr(kernels, "host_kernels", lambda: None)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"asimd"}))


class Layer:
    """One quantized layer with random integers, and its sums computed one product after the other."""

    def __init__(self, rng, kind, zero, channels=6, outputs=4, size=5, kernel=3, stride=1, dilation=1, pad=1) -> None:
        self.zero = zero
        ends = [(0 - zero) * STEP, (255 - zero) * STEP] * 2
        if kind == "matmul":
            shape, weights = [size, channels], rng.integers(-127, 128, (outputs, channels))
        else:
            shape = [1, channels, size, size]
            groups = {"conv": 1, "grouped": 2, "depthwise": channels}[kind]
            outputs = channels if kind == "depthwise" else outputs
            weights = rng.integers(-127, 128, (groups, outputs // groups, channels // groups, kernel, kernel))
        self.levels = rng.integers(0, 256, shape)
        x = ops.parameter(shape, np.float32, "x")
        axes = (1,) * len(shape)
        quantized = ops.fake_quantize(x, *(ops.constant(np.full(axes, end, np.float32)) for end in ends), 256)
        stored = weights[0] if kind == "conv" else weights
        scaled = ops.multiply(
            ops.convert(ops.constant(stored.astype(np.int8)), np.float32),
            ops.constant(np.full((*stored.shape[: 2 if kind in ("grouped", "depthwise") else 1], *(1,) * (stored.ndim - (2 if kind in ("grouped", "depthwise") else 1))), SCALE, np.float32)),
        )  # fmt: skip
        if kind == "matmul":
            layer = ops.matmul(quantized, scaled, False, True)
        else:
            make = ops.convolution if kind == "conv" else ops.group_convolution
            layer = make(quantized, scaled, [stride] * 2, [pad] * 2, [pad] * 2, [dilation] * 2)
        self.graph = ov.Model([layer], [x], "layer")
        self.input = ((self.levels - zero) * STEP).astype(np.float32)
        self.weights, self.kind = weights, kind
        self.geometry = kernel, stride, dilation, pad

    def sums(self, saturate):
        """The layer's output by loops over every product, in the layout of the graph's output."""
        limit = (lambda v: max(-(2**15), min(2**15 - 1, v))) if saturate else (lambda v: v)

        def dot(activations, weights):
            total = 0
            for i in range(0, len(weights), 2):
                total += limit(
                    sum(int(a) * int(w) for a, w in zip(activations[i : i + 2], weights[i : i + 2], strict=True))
                )
            return total - self.zero * int(sum(map(int, weights)))

        if self.kind == "matmul":
            return np.array([[dot(row, w) for w in self.weights] for row in self.levels]) * STEP * SCALE
        kernel, stride, dilation, pad = self.geometry
        groups, each, inputs = self.weights.shape[:3]
        padded = np.pad(self.levels[0], ((0, 0), (pad, pad), (pad, pad)), constant_values=self.zero)
        side = (padded.shape[1] - dilation * (kernel - 1) - 1) // stride + 1
        out = np.zeros((groups * each, side, side))
        for g in range(groups):
            for o in range(each):
                for y in range(side):
                    for x in range(side):
                        for i in range(kernel):
                            for j in range(kernel):
                                values = padded[g * inputs : (g + 1) * inputs, y * stride + i * dilation, x * stride + j * dilation]  # fmt: skip
                                out[g * each + o, y, x] += dot(values, self.weights[g, o, :, i, j])
        return out[None] * STEP * SCALE


LAYERS = [
    {"kind": "conv", "zero": 0},
    {"kind": "conv", "zero": 128},
    {"kind": "conv", "zero": 90, "kernel": 1, "pad": 0},
    {"kind": "conv", "zero": 0, "channels": 3, "stride": 2},
    {"kind": "conv", "zero": 128, "dilation": 2, "pad": 2, "size": 7},
    {"kind": "grouped", "zero": 0, "channels": 8},
    {"kind": "depthwise", "zero": 0},
    {"kind": "matmul", "zero": 0},
    {"kind": "matmul", "zero": 128, "channels": 7},
]
names = [" ".join(map(str, case.values())) for case in LAYERS]


def output(layer, how):
    (found,) = runner_for(layer.graph, how).run([layer.input])
    return found.reshape(layer.graph.outputs[0].get_shape())


@pytest.mark.parametrize("case", LAYERS, ids=names)
def test_sums_of_32_bits(rng, case) -> None:
    layer = Layer(rng, **case)
    np.testing.assert_allclose(output(layer, "vnni"), layer.sums(saturate=False), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", LAYERS, ids=names)
@pytest.mark.parametrize("emulated", [pytest.param(False, marks=needs_avx2), True])
def test_sums_of_16_bits(rng, case, emulated, monkeypatch) -> None:
    layer = Layer(rng, **case)
    if emulated:
        emulate_avx2(monkeypatch)
        assert is_emulated("avx2")
    exact, saturated = layer.sums(saturate=False), layer.sums(saturate=case["kind"] != "depthwise")
    np.testing.assert_allclose(output(layer, "avx2"), saturated, rtol=1e-4, atol=1e-3)
    assert case["kind"] == "depthwise" or np.abs(exact - saturated).max() > 0.1


def test_the_excess_is_that_of_neighbours(rng) -> None:
    values, weights = rng.integers(0, 256, (2, 5, 3)), rng.integers(-128, 128, (2, 4, 5))
    expected = np.zeros((4, 3), np.int64)
    for o in range(4):
        for n in range(3):
            for t in range(2):
                for pair in ((0, 1), (2, 3), (4,)):
                    total = sum(int(values[t, i, n] * weights[t, o, i]) for i in pair)
                    expected[o, n] += total - min(max(total, -(2**15)), 2**15 - 1)
    assert np.array_equal(saturation_excess(values, weights), expected)
    assert expected.any()


def test_this_process_knows_its_kernels() -> None:
    flags = machine.cpu_flags()
    if "ONEDNN_MAX_CPU_ISA" not in os.environ and flags:
        assert (host_kernels() == "vnni") == bool(flags & {"amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "asimd"})


@needs_avx2
def test_a_process_limited_to_avx2_knows_it() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "from ovcalib.kernels import host_kernels; print(host_kernels())"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "avx2\n"


def test_a_network_is_the_same_on_all_kernels_where_nothing_saturates(toy, toy_graph) -> None:
    int8 = quantize_default(toy_graph, toy.calibration(), Settings(overflow_fix="enable"))
    inputs = toy.calibration(16).inputs()
    own = outputs_on(host_kernels(), int8, inputs)
    assert nmse(own, outputs_on("vnni", int8, inputs)) < 1e-3
    assert nmse(own, outputs_on("avx2", int8, inputs)) < 1e-3


def test_a_network_emulated_as_on_avx2_is_that_of_the_kernels(toy, toy_graph, monkeypatch) -> None:
    int8 = quantize_default(toy_graph, toy.calibration(), Settings(overflow_fix="disable"))
    inputs = toy.calibration(16).inputs()
    if "avx2" not in machine.cpu_flags():
        pytest.skip("this CPU has no AVX2")
    executed = outputs_on("avx2", int8, inputs)
    emulate_avx2(monkeypatch)
    assert nmse(executed, outputs_on("avx2", int8, inputs)) < 1e-3


def test_no_integer_kernel_is_left_where_nothing_may_saturate(toy, toy_graph) -> None:
    int8 = quantize_default(toy_graph, toy.calibration(), Settings())
    compiled = ov.Core().compile_model(without_saturation(int8), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    layers = [i["runtimePrecision"].astype(str) for i in infos
              if i["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")]  # fmt: skip
    assert layers
    assert set(layers) == {"f32"}


@needs_avx2
def test_the_process_answers_in_order_and_for_any_number(toy, toy_graph) -> None:
    inputs = toy.calibration(40).inputs()
    for count in (0, 1, 40):
        found = list(AVX2Process(toy_graph).run(iter(inputs[:count])))
        assert len(found) == count
        for value, expected in zip(found, runner_for(toy_graph, host_kernels()).run(inputs[:count]), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3)


@needs_avx2
def test_an_error_of_the_images_is_theirs(toy, toy_graph) -> None:
    def inputs():
        yield toy.calibration(1)[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(AVX2Process(toy_graph).run(inputs()))


@needs_avx2
def test_a_process_that_dies_is_an_error(toy, toy_graph, monkeypatch, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os; print('no memory', file=__import__('sys').stderr); os._exit(9)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"code 9 after 0 images: no memory.*`deploy_isa`"):
        list(AVX2Process(toy_graph).run([toy.calibration(1)[0]]))


@pytest.mark.parametrize(
    ("isa", "wanted"),
    [("any", ("vnni", "avx2")), ("avx2", ("avx2",)), ("avx512", ("avx2",)), ("vnni", ("vnni",)), ("gpu", ("vnni",))],
)
@pytest.mark.parametrize("host", ["vnni", "avx2"])
def test_accuracy_is_measured_on_the_kernels_of_the_machine_that_was_named(monkeypatch, isa, wanted, host) -> None:
    monkeypatch.setattr(kernels, "host_kernels", lambda: host)
    assert kernels_of(isa) == wanted
    assert proof_kernels(isa) == (host if isa == "any" else wanted[0])
    assert kernels_of("host") == (host,)


@needs_avx2
def test_a_cpu_that_takes_bfloat16_benchmarks_with_the_kernels_of_another(toy_graph, tmp_path) -> None:
    write_ir(toy_graph, tmp_path / "model.xml")
    load = {
        "command": "load", "path": str(tmp_path / "model.xml"), "device": "CPU", "config": {}, "batch": 1,
        "api": "sync", "requests": None,
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "ovcalib.measurement.worker"], input=json.dumps(load) + "\n", text=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(run.stdout)["effective"]["INFERENCE_PRECISION_HINT"] == "f32"


@needs_avx2
@pytest.mark.parametrize(
    ("shape", "axes", "normalize_variance", "eps_mode"),
    [
        ([1, 5, 20], [-1], True, "inside_sqrt"),
        ([1, 5, 20], [2], True, "outside_sqrt"),
        ([1, 3, 7, 7], [2, 3], True, "inside_sqrt"),
        ([1, 3, 7, 7], [1, 2, 3], False, "inside_sqrt"),
    ],
)
def test_avx2_kernels_run_where_openvinos_mvn_would_crash(rng, shape, axes, normalize_variance, eps_mode) -> None:
    x = ops.parameter(shape, np.float32)
    graph = ov.Model([ops.mvn(ops.relu(x), ops.constant(axes), normalize_variance, 0.1, eps_mode)], [x], "mvn")
    image = rng.normal(1, 2, shape).astype(np.float32)
    (found,) = AVX2Process(graph).run([image])
    positive = np.maximum(image, 0)
    centred = positive - positive.mean(tuple(axes), keepdims=True)
    variance = (centred**2).mean(tuple(axes), keepdims=True)
    divisor = np.sqrt(variance + 0.1) if eps_mode == "inside_sqrt" else np.sqrt(variance) + 0.1
    np.testing.assert_allclose(found, (centred / divisor if normalize_variance else centred).reshape(-1), atol=1e-5)
    assert [op.get_type_name() for op in graph.get_ops()].count("MVN") == 1
