"""Reading quantized OpenVINO graphs.

NNCF marks an INT8 operation by FakeQuantize on its activations and by integer weights that a Multiply scales back.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import openvino as ov
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from openvino.passes import ConstantFolding, Manager

from ovcalib.errors import UnknownNameError

T = TypeVar("T", bound=np.generic)

WEIGHTED = frozenset(
    {
        "Convolution",
        "GroupConvolution",
        "ConvolutionBackpropData",
        "GroupConvolutionBackpropData",
        "MatMul",
    }
)

# Operations that move values without computing on them: they run in whatever precision reaches them.
MOVING = frozenset(
    {
        "Concat", "DepthToSpace", "Gather", "MaxPool", "Pad", "Reshape", "ShuffleChannels", "Slice", "SpaceToDepth",
        "Split", "Squeeze", "StridedSlice", "Tile", "Transpose", "Unsqueeze", "VariadicSplit",
    }
)  # fmt: skip

# In the name of a bias that bias correction, ours or NNCF's, added to a layer without one.
NULL_BIAS = "null_bias"

# End of the name of a Multiply that SmoothQuant put before a layer whose weights it divided by the same.
SMOOTHING = "/nncf_smooth_quant"

# Operations of the quantization itself.
_PLUMBING = frozenset({"FakeQuantize", "Convert", "Constant", "Parameter", "Result", "ShapeOf"})


def layer_name(op: ov.Node | str) -> str:
    """The name under which users know an operation, or that of a friendly name."""
    return str(op if isinstance(op, str) else op.get_friendly_name()).removesuffix("/WithoutBiases")


def quantized_operations(graph: ov.Model) -> list[ov.Node]:
    """Operations that compute on quantized values, in execution order."""
    return [
        op
        for op in graph.get_ordered_ops()
        if op.get_type_name() not in _PLUMBING | MOVING
        and not _is_weight_scaling(op)
        and any(_is_quantized(value) and not _is_weight_scaling(_node(value)) for value in op.input_values())
    ]


def float_operations(graph: ov.Model) -> list[ov.Node]:
    """Convolutions and matrix products with constant weights that stayed in float."""
    quantized = {op.get_name() for op in quantized_operations(graph)}
    return [
        op
        for op in graph.get_ordered_ops()
        if op.get_type_name() in WEIGHTED and op.get_name() not in quantized and is_constant(op.input_value(1))
    ]


@dataclass(frozen=True)
class Quantizable:
    """An operation of a float graph that NNCF quantizes.

    inputs         the activations that it reads
    channel_axis   of its inputs and of its output
    by_channel     its input gets a range for each channel: a depthwise convolution
    weights        float64 [G, O, I, K]: groups, output and input channels of each, kernel positions; None for a sum
    """

    name: str
    inputs: tuple[ov.Output, ...]
    output: ov.Output
    channel_axis: int
    by_channel: bool
    weights: NDArray[np.float64] | None


def quantizable_operations(graph: ov.Model) -> list[Quantizable]:
    """Convolutions and matrix products with constant weights, and sums of two signals, in execution order."""
    found = []
    names = signal_names(graph)
    for op in graph.get_ordered_ops():
        kind, values = op.get_type_name(), op.input_values()
        constant = [_node(value).get_name() not in names for value in values]
        if kind in ("Convolution", "GroupConvolution", "MatMul") and constant == [False, True]:
            weights = _by_group(op, np.array(_node(_fold(values[1])).get_data(), np.float64))
        elif kind == "Add" and not any(constant):
            weights = None
        else:
            continue
        signals = [*(value for value, fixed in zip(values, constant, strict=True) if not fixed), op.output(0)]
        rank = len(op.output(0).get_partial_shape())
        if any(len(value.get_partial_shape()) != rank for value in signals) or (
            weights is not None and weights.ndim != 4
        ):
            continue  # an operand that is broadcast, or a matrix product of stacks
        by_channel = kind == "GroupConvolution" and weights is not None and weights.shape[1:3] == (1, 1)
        found.append(
            Quantizable(
                op.get_friendly_name(), tuple(signals[:-1]), signals[-1], _channel_axis(op), by_channel, weights
            )
        )
    return found


def exact_weights(graph: ov.Model) -> dict[str, NDArray[np.float64]]:
    """The weights of the layers among `quantizable_operations`, by name."""
    return {op.name: op.weights for op in quantizable_operations(graph) if op.weights is not None}


def _channel_axis(op: ov.Node) -> int:
    """Of the output: the last of a matrix product, the second of everything else that has as many."""
    rank = len(op.output(0).get_partial_shape())
    return rank - 1 if op.get_type_name() == "MatMul" or rank < 2 else 1


def _by_group(op: ov.Node, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of a layer as [G, O, I, K]; matrix products of stacks keep their shape."""
    if op.get_type_name() == "MatMul":
        if weights.ndim != 2:
            return weights
        return (weights if op.get_attributes()["transpose_b"] else weights.T)[None, :, :, None]
    grouped = weights if op.get_type_name() == "GroupConvolution" else weights[None]
    return grouped.reshape(*grouped.shape[:3], -1)


def signals_of(op: ov.Node, names: set[str]) -> list[ov.Output]:
    """The inputs of an operation that depend on the network's input.

    names   `signal_names` of its graph
    """
    return [value for value in op.input_values() if _node(value).get_name() in names]


def constant_value(value: ov.Output) -> NDArray[np.float64]:
    """The value of an output that depends on constants alone."""
    return np.array(_node(_fold(value)).get_data(), np.float64)


def literal_pattern(name: str) -> str:
    """The pattern that matches one name alone: wildcard characters stand for themselves."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def match_operations(graph: ov.Model, patterns: Iterable[str]) -> dict[str, list[ov.Node]]:
    """Operations of a float graph by wildcard pattern on their names, or by `type:Convolution`.

    raises   UnknownNameError for a pattern that matches nothing
    """
    ops = [op for op in graph.get_ordered_ops() if op.get_type_name() not in ("Constant", "Parameter", "Result")]
    found = {}
    for pattern in patterns:
        kind, colon, wanted = pattern.partition(":")
        if colon and kind == "type":
            found[pattern] = [op for op in ops if op.get_type_name().lower() == wanted.lower()]
            known = {f"type:{op.get_type_name()}" for op in ops}
        else:
            found[pattern] = [
                op for op in ops
                if fnmatch.fnmatchcase(layer_name(op), pattern) or fnmatch.fnmatchcase(op.get_friendly_name(), pattern)
            ]  # fmt: skip
            known = {layer_name(op) for op in ops if op.get_type_name() in WEIGHTED}
        if not found[pattern]:
            raise UnknownNameError("operation pattern", pattern, known)
    return found


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with constant weights.

    add            the Add of its bias, None where it has none
    channel_axis   of its output
    """

    name: str
    op: ov.Node
    add: ov.Node | None
    channel_axis: int

    @staticmethod
    def of(op: ov.Node) -> Layer:
        bias = _bias(op)
        return Layer(op.get_friendly_name(), op, bias.add if bias else None, _channel_axis(op))


@dataclass(frozen=True)
class Window:
    """What each output position of a convolution reads, along the spatial axes. shape is that of the output."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(layer: Layer) -> Window | None:
        """None for a matrix product."""
        if layer.op.get_type_name() == "MatMul":
            return None
        attributes, shape = layer.op.get_attributes(), tuple(layer.op.output(0).get_shape()[2:])
        kernel = tuple(layer.op.input_value(1).get_shape()[-len(shape) :])
        strides, dilations, before, after = (
            tuple(attributes[name]) for name in ("strides", "dilations", "pads_begin", "pads_end")
        )
        return Window(kernel, strides, dilations, before, after, shape)

    def reads(self, x: NDArray[T], border: int = 0) -> NDArray[T]:
        """A view [C, output axes, kernel axes] of an image [C, spatial axes] that is padded with `border`."""
        padding = [(0, 0), *zip(self.before, self.after, strict=True)]
        padded = np.pad(x, padding, constant_values=border)
        spread = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        every = (slice(None), *(slice(None, None, step) for step in (*self.strides, *self.dilations)))
        views: NDArray[T] = sliding_window_view(padded, spread, tuple(range(1, x.ndim)))[every]
        return views


def quantized_layers(graph: ov.Model) -> list[Layer]:
    """The layers that compute with quantized weights, in execution order."""
    names = signal_names(graph)
    return [
        Layer.of(op)
        for op in quantized_operations(graph)
        if op.get_type_name() in WEIGHTED
        and [_node(value).get_name() in names for value in op.input_values()][:2] == [True, False]
    ]


def activation_quantizers(graph: ov.Model) -> list[ov.Node]:
    names = signal_names(graph)
    return [op for op in graph.get_ops() if op.get_type_name() == "FakeQuantize" and op.get_name() in names]


def quantizers_by_range(graph: ov.Model) -> list[list[ov.Node]]:
    """Quantizers of activations with the same range together, such as those of the inputs of a concatenation.

    Those of the network's input, whose range is that of pixels, and those without a range are left out.
    """
    found: dict[tuple[bytes, bytes], list[ov.Node]] = {}
    for fq in activation_quantizers(graph):
        low, high = _range(fq)
        if (low < high).all() and _node(fq.input_value(0)).get_type_name() != "Parameter":
            found.setdefault((low.tobytes(), high.tobytes()), []).append(fq)
    return list(found.values())


def integer_weights(layer: Layer) -> tuple[NDArray[np.int8], NDArray[np.float64]] | None:
    """The weights of a layer as integers, and their scale for each output channel; None for any other form.

    returns   int8 in the layer's own shape, and float64 broadcastable to it; their product is what the layer computes
              with
    """
    value = layer.op.input_value(1)
    shape = list(value.get_shape())
    node = _node(value)
    if node.get_type_name() == "Reshape":
        node = _node(node.input_value(0))
    if node.get_type_name() != "Multiply" or _node(node.input_value(0)).get_type_name() != "Convert":
        return None
    constant = _node(_node(node.input_value(0)).input_value(0))
    scale = np.array(_node(_fold(node.input_value(1))).get_data(), np.float64)
    if constant.get_type_name() != "Constant" or constant.get_element_type().to_string() != "i8":
        return None
    integers = np.array(constant.get_data(), np.int8)
    return integers.reshape(shape), np.broadcast_to(scale, integers.shape).reshape(shape)


def is_smoothing(node: ov.Node) -> bool:
    """Whether an operation is NNCF's scaling of a signal for SmoothQuant; its first input is the signal."""
    return node.get_type_name() == "Multiply" and str(node.get_friendly_name()).endswith(SMOOTHING)


def smoothing(op: ov.Node) -> NDArray[np.float64] | None:
    """What SmoothQuant multiplies the input of a quantized layer by, [I]; its weights are divided by it.

    returns   None where the layer was not smoothed
    """
    quantizer = _node(op.input_value(0))
    if quantizer.get_type_name() != "FakeQuantize" or not is_smoothing(_node(quantizer.input_value(0))):
        return None
    return constant_value(_node(quantizer.input_value(0)).input_value(1)).reshape(-1)


def scale_count(layer: Layer) -> int:
    """How many scales the weights of a layer have that has `integer_weights`."""
    node = _node(layer.op.input_value(1))
    if node.get_type_name() == "Reshape":
        node = _node(node.input_value(0))
    return int(np.prod(list(node.input_value(1).get_shape())))


@dataclass(frozen=True)
class Levels:
    """The levels of a quantized activation: value = step * (level - zero), level in 0..255."""

    step: float
    zero: int


def activation_levels(value: ov.Output) -> Levels | None:
    """The levels of a value that was quantized with one range a tensor, seen through moving operations; else None."""
    quantizers = _quantizers(value)
    if not quantizers:
        return None
    low, high = _range(quantizers[0])
    if low.size > 1 or quantizers[0].get_attributes()["levels"] != 256:
        return None
    step = (float(high.item()) - float(low.item())) / 255
    return Levels(step, round(-float(low.item()) / step))


@dataclass(frozen=True)
class _Bias:
    add: ov.Node
    value: ov.Output


def _bias(op: ov.Node) -> _Bias | None:
    """The constant that the only reader of a layer adds to it."""
    readers = [reader.get_node() for reader in op.output(0).get_target_inputs()]
    if op.get_type_name() not in WEIGHTED or len(readers) != 1 or readers[0].get_type_name() != "Add":
        return None
    constants = [value for value in readers[0].input_values() if is_constant(value)]
    return _Bias(readers[0], constants[0]) if constants else None


def _quantizers(value: ov.Output) -> list[ov.Node]:
    """The FakeQuantize operations that a quantized value went through, seen through moving operations."""
    node = _node(value)
    if node.get_type_name() == "FakeQuantize":
        return [node]
    if node.get_type_name() in MOVING:
        data = node.input_values() if node.get_type_name() == "Concat" else node.input_values()[:1]
        return [fq for v in data for fq in _quantizers(v)]
    return []


def _range(fq: ov.Node) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    low, high = (np.array(_node(_fold(fq.input_value(i))).get_data(), np.float32) for i in (1, 2))
    return low, high


def _node(value: ov.Output) -> ov.Node:
    return value.get_node()


def _is_quantized(value: ov.Output) -> bool:
    """Whether a value was quantized, seen through operations that only move values."""
    node = _node(value)
    if node.get_type_name() == "FakeQuantize":
        return True
    if node.get_type_name() in MOVING:
        data = node.input_values() if node.get_type_name() == "Concat" else node.input_values()[:1]
        return all(_is_quantized(v) for v in data)
    return _is_weight_scaling(node)


def _is_weight_scaling(node: ov.Node) -> bool:
    """Multiply(Convert(integer constant) [- zero point], scale): weights in the form that NNCF compresses them to."""
    if node.get_type_name() == "Reshape":
        return _is_weight_scaling(_node(node.input_value(0)))
    if node.get_type_name() != "Multiply":
        return False
    source = _node(node.input_value(0))
    if source.get_type_name() == "Subtract":
        source = _node(source.input_value(0))
    return (
        source.get_type_name() == "Convert"
        and _node(source.input_value(0)).get_type_name() == "Constant"
        and source.input_value(0).get_element_type().to_string() in ("i8", "u8", "i4", "u4")
    )


def is_constant(value: ov.Output) -> bool:
    """Whether a value depends on constants alone."""
    waiting, seen = [_node(value)], set()
    while waiting:  # detectors are deeper than Python recurses
        node = waiting.pop()
        if node.get_type_name() == "Constant" or node.get_name() in seen:
            continue
        if node.get_input_size() == 0:
            return False
        seen.add(node.get_name())
        waiting += [_node(v) for v in reversed(node.input_values())]
    return True


def signal_names(graph: ov.Model) -> set[str]:
    """The names of all operations that depend on the network's input: `is_constant` of a whole graph in one pass."""
    found: set[str] = set()
    for op in graph.get_ordered_ops():
        sources = [_node(value) for value in op.input_values()]
        if any(source.get_name() in found for source in sources) or (not sources and op.get_type_name() != "Constant"):
            found.add(op.get_name())
    return found


def allow_folding(op: ov.Node) -> None:
    """Let an operation be folded, from which NNCF keeps compressed weights."""
    for key in [key for key in op.get_rt_info() if key.startswith("DisableConstantFolding")]:
        del op.get_rt_info()[key]


def _fold(value: ov.Output) -> ov.Output:
    """A constant with the value that a constant expression of another graph has."""
    node = _node(value)
    if node.get_type_name() == "Constant":
        data = node.get_data()
    else:
        graph = ov.Model([value], [], "fold").clone()  # folding is in place
        for op in graph.get_ops():
            allow_folding(op)
        manager = Manager()
        manager.register_pass(ConstantFolding())
        manager.run_passes(graph)
        folded = _node(graph.get_results()[0].input_value(0))
        if folded.get_type_name() == "Constant":
            data = folded.get_data()
        else:  # OpenVINO leaves a few operations, though none depends on an input
            data = next(iter(ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({}).values()))
    constant = ov.op.Constant(np.array(data))
    constant.set_friendly_name(f"{node.get_friendly_name()}/float")
    return constant.output(0)
