"""Quantized graphs in the INT8 arithmetic of another CPU.

There are two kinds of INT8 kernels (Intel, oneDNN developer guide, "Nuances of int8 computations"):

    vnni   products are summed in 32 bits: AVX-VNNI, AVX512-VNNI, AMX, NEON with dot products, GPU, NPU
    avx2   the products of two neighbouring input channels are summed in 16 bits, which saturate: AVX2, and AVX-512
           without VNNI. Depthwise convolutions have no neighbours and do not saturate

`runner_for` runs a graph on the kernels asked for, whatever this CPU has:

    its own                executed
    vnni                   emulated in float32: weights become float constants, activations keep their FakeQuantize
    avx2, on x86           the AVX2 kernels of oneDNN, which chooses kernels once a process, in a process of its own
    avx2, elsewhere        emulated: `saturation_excess` is taken from the float32 result of every layer

The emulations equal the kernels in every layer, up to float32 rounding. Over a deep network, values that lie between
two levels are rounded either way, as they are between two fusions of one graph; on ResNet-20 that moves outputs by an
NMSE of 1e-3, and the error against FP32 by a hundredth of itself.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovcalib import machine
from ovcalib.errors import DeviceError
from ovcalib.graph.editing import fold_weights
from ovcalib.graph.files import read_graph, write_ir
from ovcalib.graph.reading import Layer, Levels, Window, activation_levels, integer_weights, quantized_layers
from ovcalib.records.options import DeployISA
from ovcalib.records.result import Kernels
from ovcalib.runtime import OpenVINORunner, Runner

LOWEST, HIGHEST = -(2**15), 2**15 - 1


class KernelsFailedError(DeviceError):
    """The process that runs the kernels of AVX2 ended without an answer."""


@functools.cache
def host_kernels() -> Kernels:
    """The kernels of this process, told by a sum that is 129,540 in 32 bits and 65,534 in saturated 16."""
    x = ops.parameter([1, 4, 4, 4], np.float32)
    ends = [ops.constant(np.full((1, 1, 1, 1), value, np.float32)) for value in (0, 255, 0, 255)]
    integers = ops.convert(ops.constant(np.full((4, 4, 1, 1), 127, np.int8)), np.float32)
    weights = ops.multiply(integers, ops.constant(np.ones((4, 1, 1, 1), np.float32)))
    conv = ops.convolution(ops.fake_quantize(x, *ends, 256), weights, [1, 1], [0, 0], [0, 0], [1, 1])
    (found,) = OpenVINORunner(ov.Model([conv], [x], "probe")).run([np.full((1, 4, 4, 4), 255, np.float32)])
    return "vnni" if found.min() > 100_000 else "avx2"


def kernels_of(deploy_isa: DeployISA) -> tuple[Kernels, ...]:
    """The kernels of the machines that a model is for; this machine matters only for "host"."""
    if deploy_isa == "any":
        return "vnni", "avx2"
    if deploy_isa == "host":
        return (host_kernels(),)
    return ("avx2",) if deploy_isa in ("avx2", "avx512") else ("vnni",)


def proof_kernels(deploy_isa: DeployISA) -> Kernels:
    """The kernels on which accuracy is measured: this CPU's own where the model is for it too."""
    wanted = kernels_of(deploy_isa)
    return host_kernels() if host_kernels() in wanted else wanted[0]


def is_emulated(kernels: Kernels | None) -> bool:
    """Whether this CPU lacks the kernels, so that `runner_for` emulates them."""
    return kernels not in (None, host_kernels()) and (kernels == "vnni" or not _has_avx2())


def runner_for(graph: ov.Model, kernels: Kernels | None) -> Runner:
    """What runs a quantized graph on the CPU in f32, in the arithmetic of `kernels`.

    graph     batch 1; float graphs run as they are
    kernels   None for what computes in float, the same on all of them
    """
    if kernels in (None, host_kernels()):
        return OpenVINORunner(graph)
    if kernels == "vnni":
        return OpenVINORunner(without_saturation(graph))
    return AVX2Process(graph) if _has_avx2() else _emulated_avx2(graph)


def outputs_on(kernels: Kernels | None, graph: ov.Model, inputs: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Outputs [N, K] of a graph in the arithmetic of `kernels`.

    raises   KernelsFailedError
    """
    return np.stack(list(runner_for(graph, kernels).run(inputs)))


def without_saturation(graph: ov.Model) -> ov.Model:
    """A copy that computes in float32 what a CPU with VNNI computes in integers.

    No integer kernel takes a layer whose weights are a float constant; its activations stay quantized.
    """
    copy = graph.clone()
    fold_weights(quantized_layers(copy))
    return copy


def _has_avx2() -> bool:
    return "avx2" in machine.cpu_flags()


# The kernels of AVX2 --------------------------------------------------------------------------


class AVX2Process:
    """A process in which oneDNN takes the kernels of a CPU that has AVX2 and nothing newer.

    It reads network inputs as bytes on stdin, and writes the length of an output and then the outputs to stdout.
    """

    def __init__(self, graph: ov.Model) -> None:
        self.graph = graph

    def run(self, inputs: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        with tempfile.TemporaryDirectory() as folder, Path(folder, "errors").open("w+") as errors:
            write_ir(without_mvn(self.graph), Path(folder, "model.xml"))
            process = subprocess.Popen(
                [sys.executable, "-m", "ovcalib.kernels", str(Path(folder, "model.xml"))],
                env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            sent: list[int] = []
            failed: list[BaseException] = []

            def send(pipe: Any = process.stdin) -> None:
                try:
                    with pipe:
                        for x in inputs:
                            pipe.write(np.ascontiguousarray(x, np.float32).tobytes())
                            sent.append(1)
                except BrokenPipeError:
                    pass  # the process has ended, which is told by its code
                except BaseException as error:
                    failed.append(error)

            writer = threading.Thread(target=send, daemon=True)
            writer.start()
            received = 0
            try:
                size = int(np.frombuffer(process.stdout.read(8) or bytes(8), np.int64)[0])
                while size and len(answer := process.stdout.read(4 * size)) == 4 * size:
                    received += 1
                    yield np.frombuffer(answer, np.float32)
                code = process.wait()
                writer.join()
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
            if failed:
                raise failed[0]
            if code != 0 or received != len(sent):
                errors.seek(0)
                lines = errors.read().strip().splitlines()
                raise KernelsFailedError(
                    f"The process that runs AVX2 kernels ended with code {code} after {received} images"
                    f"{f': {lines[-1]}' if lines else ''}. Name the machine that the model is for with `deploy_isa`; "
                    "vnni, amx, gpu and npu need no such process."
                )


def without_mvn(graph: ov.Model) -> ov.Model:
    """A copy with LayerNorm and InstanceNorm (MVN) as arithmetic that OpenVINO does not fuse.

    OpenVINO (2026.4) runs MVN with AVX-512 whatever oneDNN is limited to, and crashes where it normalises a number of
    values that is no multiple of 16.
    """
    copy = graph.clone()
    # With axes as its second input, unlike the first version of the operation, which no exporter writes any more.
    for op in [op for op in copy.get_ordered_ops() if op.get_type_name() == "MVN" and op.get_input_size() == 2]:
        attributes, (x, axes) = op.get_attributes(), op.input_values()
        result = ops.subtract(x, ops.reduce_mean(x, axes, keep_dims=True))
        if attributes["normalize_variance"]:
            count = ops.reduce_prod(ops.gather(ops.shape_of(x), axes, ops.constant(0)), ops.constant(0))
            deviation = ops.divide(
                ops.reduce_l2(result, axes, keep_dims=True), ops.sqrt(ops.convert(count, np.float32))
            )
            eps = ops.constant(np.float32(attributes["eps"]))
            if attributes["eps_mode"].lower() == "inside_sqrt":
                divisor = ops.sqrt(ops.add(ops.multiply(deviation, deviation), eps))
            else:
                divisor = ops.add(deviation, eps)
            result = ops.divide(result, divisor)
        for reader in op.output(0).get_target_inputs():
            reader.replace_source_output(result.output(0))
    return copy


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries
    graph = read_graph(Path(sys.argv[1]))
    shape = [int(n) for n in graph.inputs[0].get_shape()]

    def inputs() -> Iterator[NDArray[np.float32]]:
        while len(x := sys.stdin.buffer.read(4 * int(np.prod(shape)))):
            yield np.frombuffer(x, np.float32).reshape(shape).copy()

    for i, output in enumerate(OpenVINORunner(graph).run(inputs())):
        answers.write((np.int64(output.size).tobytes() if i == 0 else b"") + output.astype(np.float32).tobytes())
    answers.close()


# Their emulation ------------------------------------------------------------------------------


def saturation_excess(values: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """What a sum of products loses where neighbours are summed in 16 bits.

    values    [T, I, N]: kernel positions, input channels, output positions; levels in 0..255
    weights   [T, O, I], in -128..127
    returns   [O, N]: the sum in 32 bits minus the sum of the saturated sums of channels 0 and 1, 2 and 3, and so on
    """
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1), (0, 0)))
        weights = np.pad(weights, ((0, 0), (0, 0), (0, 1)))
    left, right = weights[:, :, 0::2], weights[:, :, 1::2]
    excess = np.zeros((weights.shape[1], values.shape[2]), np.int64)
    # Most pairs cannot saturate, whatever their activations are.
    top = 255 * (np.maximum(left, 0) + np.maximum(right, 0))
    bottom = 255 * (np.minimum(left, 0) + np.minimum(right, 0))
    for t, o, pair in np.argwhere((top > HIGHEST) | (bottom < LOWEST)):
        total = left[t, o, pair] * values[t, 2 * pair] + right[t, o, pair] * values[t, 2 * pair + 1]
        excess[o] += total - np.clip(total, LOWEST, HIGHEST)
    return excess


def _emulated_avx2(graph: ov.Model) -> Runner:
    # The plugin's fusion of element-wise operations (2026.4) refuses graphs that hold operations written in Python.
    return OpenVINORunner(with_saturation(graph), config={"SNIPPETS_MODE": "DISABLE"})


def with_saturation(graph: ov.Model) -> ov.Model:
    """A copy that computes in float32, on any CPU, what a CPU with AVX2 computes in integers."""
    copy = graph.clone()
    layers = quantized_layers(copy)
    excesses = []
    for layer in layers:
        weights, levels = integer_weights(layer), activation_levels(layer.op.input_value(0))
        if weights is not None and levels is not None:
            excesses.append((layer.op, LayerSums.of(layer, *weights, levels)))
    fold_weights(layers)
    for op, sums in excesses:
        readers = op.output(0).get_target_inputs()
        saturated = ops.subtract(op, SaturationExcess(op.input_value(0), sums))
        for reader in readers:
            reader.replace_source_output(saturated.output(0))
    copy.validate_nodes_and_infer_types()
    return copy


@dataclass(frozen=True)
class LayerSums:
    """The integer weights, scales and levels of a layer.

    integers    int64 [G, T, O, I]: groups, kernel positions, output and input channels of each
    scale       float64 [G * O] of an integer result
    window      None for a matrix product
    shape       of the output, batch 1
    """

    integers: NDArray[np.int64]
    scale: NDArray[np.float64]
    levels: Levels
    window: Window | None
    shape: tuple[int, ...]

    @staticmethod
    def of(layer: Layer, integers: NDArray[np.int8], scale: NDArray[np.float64], levels: Levels) -> LayerSums:
        shape = tuple(layer.op.output(0).get_shape())
        if layer.op.get_type_name() == "MatMul":
            if not layer.op.get_attributes()["transpose_b"]:
                integers, scale = integers.T, scale.T
            return LayerSums(integers[None, None].astype(np.int64), scale[:, 0] * levels.step, levels, None, shape)
        if layer.op.get_type_name() == "Convolution":
            integers, scale = integers[None], scale[None]
        flat = integers.reshape(*integers.shape[:3], -1).astype(np.int64)
        per_output = scale.reshape(flat.shape)[:, :, 0, 0].reshape(-1) * levels.step
        return LayerSums(flat.transpose(0, 3, 1, 2), per_output, levels, Window.of(layer), shape)

    def excess(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The saturation excess of a quantized input, in the layer's output shape."""
        levels = np.clip(np.rint(x / self.levels.step).astype(np.int64) + self.levels.zero, 0, 255)
        if self.window is None:
            values = levels.reshape(-1, levels.shape[-1]).T[None]
            lost = saturation_excess(values, self.integers[0]) * self.scale[:, None]
            return lost.T.reshape(self.shape).astype(np.float32)
        read = self.window.reads(levels[0], border=self.levels.zero)
        values = np.moveaxis(read.reshape(len(read), -1, int(np.prod(self.window.kernel))), 2, 0)  # [T, C, N]
        groups = np.split(values, len(self.integers), axis=1)
        excess = np.concatenate([saturation_excess(v, w) for v, w in zip(groups, self.integers, strict=True)])
        return (excess * self.scale[:, None]).reshape(self.shape).astype(np.float32)


class SaturationExcess(ov.Op):  # type: ignore[misc]
    """`LayerSums.excess` as an operation of a graph."""

    def __init__(self, value: ov.Output, sums: LayerSums) -> None:
        super().__init__(self)
        self.sums = sums
        self.set_arguments([value])
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, ov.Type.f32, ov.PartialShape(list(self.sums.shape)))

    def clone_with_new_inputs(self, inputs: list[ov.Output]) -> SaturationExcess:
        return SaturationExcess(inputs[0], self.sums)

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: list[ov.Tensor], inputs: list[ov.Tensor]) -> bool:
        outputs[0].data[...] = self.sums.excess(inputs[0].data)
        return True


if __name__ == "__main__":
    main()
