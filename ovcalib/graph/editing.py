"""Editing quantized OpenVINO graphs.

`restore` gives chosen operations their float inputs and weights back and leaves the others as they are; the
accuracy-aware mode and the layer diagnosis are both built on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from ovcalib.errors import UnknownNameError
from ovcalib.graph.reading import (
    MOVING,
    NULL_BIAS,
    WEIGHTED,
    Layer,
    _fold,
    _is_quantized,
    _node,
    _range,
    activation_quantizers,
    allow_folding,
    float_operations,
    is_constant,
    is_smoothing,
    quantized_layers,
    quantized_operations,
)


def restore(quantized: ov.Model, original: ov.Model, names: Iterable[str]) -> ov.Model:
    """A copy of `quantized` in which the named operations compute in float.

    quantized, original   the same network after and before quantization
    names                 friendly names of operations of `quantized`
    returns               a new graph: the named operations read unquantized activations and their original weights
                          and biases; values that other operations read are quantized as before
    """
    graph = quantized.clone()
    _restore_in_place(graph, original, names)
    return graph


def restore_biases(quantized: ov.Model, original: ov.Model) -> ov.Model:
    """A copy of `quantized` without bias correction: every layer has the bias that it has in `original`."""
    graph = quantized.clone()
    before = {op.get_friendly_name(): op for op in original.get_ops()}
    for op in quantized_operations(graph):
        if op.get_type_name() in WEIGHTED:
            _restore_bias(op, before)
    return graph


def float_activations(quantized: ov.Model) -> ov.Model:
    """A copy that computes in float, with the integer weights of the quantized graph.

    The weights of convolutions become constants when the model is compiled. Where they stay integers, beside float
    inputs, the CPU plugin (2026.4) takes those of another convolution now and then
    (benchmarks/results/weights_only.md). It keeps integers that one Convert makes real, so here two do.
    """
    graph = quantized.clone()
    for quantizer in activation_quantizers(graph):
        redirect(quantizer.output(0), quantizer.input_value(0))
    for op in float_operations(graph):
        if op.get_type_name() == "MatMul":
            continue
        convert = _node(op.input_value(1))
        while convert.get_type_name() in ("Reshape", "Multiply"):
            allow_folding(convert)
            convert = _node(convert.input_value(0))
        allow_folding(convert)
        if convert.get_type_name() == "Convert":
            convert.input(0).replace_source_output(ops.convert(convert.input_value(0), "i32").output(0))
    return graph


def before_softmax(graph: ov.Model) -> ov.Model:
    """The graph with the inputs of its final Softmax operations as outputs; the graph itself where it has none.

    Errors are compared there: where probabilities are near 0 and 1, they hide what INT8 does to the logits.
    """
    final = [i for i, r in enumerate(graph.get_results()) if r.input_value(0).get_node().get_type_name() == "Softmax"]
    if not final:
        return graph
    graph = graph.clone()
    for i in final:
        result = graph.get_results()[i]
        result.input(0).replace_source_output(result.input_value(0).get_node().input_value(0))
    graph.validate_nodes_and_infer_types()
    return graph


def set_weights(op: ov.Node, weights: NDArray[np.float64]) -> None:
    """Give a layer other weights, in place; a constant that it shared with other layers becomes its own.

    weights   [G, O, I, K], as in `Quantizable`
    """
    if op.get_type_name() == "MatMul" and not op.get_attributes()["transpose_b"]:
        weights = weights.swapaxes(1, 2)
    before = op.input_value(1)
    constant = ops.constant(weights.reshape(list(before.get_shape())).astype(np.float32))
    constant.set_friendly_name(before.get_node().get_friendly_name())
    op.input(1).replace_source_output(constant.output(0))


def set_integer_weights(layer: Layer, integers: NDArray[np.int8], scale: NDArray[np.float64]) -> None:
    """Replace the weights of a layer, in place.

    layer      one that has `integer_weights`
    integers   int8 in the layer's own shape
    scale      as many as NNCF gave it, in order: one, or one for each output channel
    """
    node = layer.op.input_value(1).get_node()
    if node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    convert = node.input_value(0).get_node()
    for reader, values in (
        (convert.input(0), integers.astype(np.int8)),
        (node.input(1), scale.astype(np.float32)),
    ):
        stored = reader.get_source_output()
        constant = ov.op.Constant(np.ascontiguousarray(values.reshape(list(stored.get_shape()))))
        constant.set_friendly_name(stored.get_node().get_friendly_name())
        reader.replace_source_output(constant.output(0))


def redirect(value: ov.Output, to: ov.Output) -> None:
    """Connect all readers of a value to another one."""
    for reader in value.get_target_inputs():
        reader.replace_source_output(to)


def fold_weights(layers: Iterable[Layer]) -> None:
    """Give layers their weights as one float constant each, in place."""
    for layer in layers:
        layer.op.input(1).replace_source_output(_fold(layer.op.input_value(1)))


def add_to_biases(graph: ov.Model, shifts: Mapping[str, NDArray[np.float64]]) -> None:
    """Add to the bias of layers, in place.

    shifts   [C] by friendly name
    """
    for layer in quantized_layers(graph):
        if layer.name not in shifts:
            continue
        rank = len(layer.op.output(0).get_partial_shape())
        shift = shifts[layer.name].reshape([-1 if axis == layer.channel_axis else 1 for axis in range(rank)])
        if layer.add is None:
            readers = layer.op.output(0).get_target_inputs()  # the new addition itself stays connected
            add = ops.add(layer.op, ops.constant(shift.astype(np.float32)))
            add.set_friendly_name(f"{layer.name}/{NULL_BIAS}")
            for reader in readers:
                reader.replace_source_output(add.output(0))
            continue
        for i, value in enumerate(layer.add.input_values()):
            if is_constant(value):
                before = np.array(_node(_fold(value)).get_data(), np.float64)
                after = before + (shift.reshape(before.shape) if before.size == shift.size else shift)
                layer.add.input(i).replace_source_output(ops.constant(after.astype(np.float32)).output(0))


def set_input_range(quantized: ov.Model, low: float, high: float) -> bool:
    """Let the quantizers that read the network's input span low..high; False where there are none.

    low, high   smallest and largest value of the input; 0 stays a quantized value exactly, as NNCF has it
    """
    found = [
        reader.get_node()
        for parameter in quantized.get_parameters()
        for reader in parameter.output(0).get_target_inputs()
        if reader.get_node().get_type_name() == "FakeQuantize"
    ]
    for fq in found:
        steps = fq.get_attributes()["levels"] - 1
        before, after = _range(fq)
        if low >= 0:
            ends = 0.0, high
        elif np.allclose(before, -after * (steps + 1) / (steps - 1)):  # symmetric
            largest = max(-low, high)
            ends = -largest * (steps + 1) / (steps - 1), largest
        else:
            step = (max(high, 0.0) - min(low, 0.0)) / steps
            first = -round(-min(low, 0.0) / step) * step
            ends = first, first + steps * step
        _set_range(fq, *(np.full(before.shape, value, np.float32) for value in ends))
    return bool(found)


def widen_channel_ranges(quantized: ov.Model, factor: float) -> None:
    """Let quantizers with a range for each channel span `factor` times as much, but no more than a Clamp lets through.

    The levels' zero stays where it is.
    """
    factors = {}
    for fq in activation_quantizers(quantized):
        low, high = _range(fq)
        if high.size == 1:
            continue
        wider = np.full(high.shape, factor, np.float32)
        source = _node(fq.input_value(0))
        if source.get_type_name() == "Clamp" and not low.any():
            bound = np.float32(source.get_attributes()["max"])
            wider = np.clip(np.divide(bound, high, out=wider.copy(), where=high > 0), 1, factor)
        factors[fq.get_friendly_name()] = wider
    scale_ranges(quantized, factors)


def scale_ranges(quantized: ov.Model, factors: Mapping[str, NDArray[np.float32]]) -> None:
    """Let quantizers of activations span so many times as much, in place; the level of 0 stays.

    factors   by friendly name, as many as the range has ends of one side
    """
    for fq in activation_quantizers(quantized):
        if (factor := factors.get(fq.get_friendly_name())) is not None:
            low, high = _range(fq)
            _set_range(fq, low * factor.reshape(low.shape), high * factor.reshape(high.shape))


def set_levels(fq: ov.Node, levels: int, low: NDArray[np.float32], high: NDArray[np.float32]) -> None:
    """Put a quantizer with other levels in the place of one."""
    ends = [ops.constant(end) for end in (low, high, low, high)]
    other = ops.fake_quantize(fq.input_value(0), *ends, levels)
    name = fq.get_friendly_name()
    redirect(fq.output(0), other.output(0))
    fq.set_friendly_name(f"{name}/before")
    other.set_friendly_name(name)


def quantize_outputs(graph: ov.Model, levels: int) -> list[ov.Node]:
    """Put a quantizer before every output of the network, in place, and return them; their range is 0..0."""
    found = []
    for result in graph.get_results():
        value = result.input_value(0)
        fq = ops.fake_quantize(value, *(ops.constant(np.zeros(1, np.float32)) for _ in range(4)), levels)
        fq.set_friendly_name(f"{value.get_node().get_friendly_name()}/output_quantizer")
        result.input(0).replace_source_output(fq.output(0))
        found.append(fq)
    return found


def _set_range(fq: ov.Node, low: NDArray[np.float32], high: NDArray[np.float32]) -> None:
    """Let a quantizer take and give low..high."""
    for i, ends in enumerate((low, high, low, high), start=1):
        fq.input(i).replace_source_output(ops.constant(ends).output(0))


def _restore_in_place(graph: ov.Model, original: ov.Model, names: Iterable[str]) -> None:
    before = {op.get_friendly_name(): op for op in original.get_ops()}
    wanted = set(names)
    for op in graph.get_ordered_ops():
        name = op.get_friendly_name()
        if name not in wanted:
            continue
        wanted.remove(name)
        for i, value in enumerate(op.input_values()):
            if is_constant(value):
                if name in before and op.get_type_name() in WEIGHTED:
                    op.input(i).replace_source_output(_fold(before[name].input_value(i)))
            else:
                op.input(i).replace_source_output(_unquantized(value))
        if op.get_type_name() in WEIGHTED:
            _restore_bias(op, before)
    if wanted:
        raise UnknownNameError(
            "operation", sorted(wanted)[0], [op.get_friendly_name() for op in quantized_operations(graph)]
        )
    graph.validate_nodes_and_infer_types()


def _unquantized(value: ov.Output) -> ov.Output:
    """The value before quantization and SmoothQuant.

    Moving operations on the way are copied, so that other readers keep theirs.
    """
    node = _node(value)
    if node.get_type_name() == "FakeQuantize":
        source = node.input_value(0)
        return _node(source).input_value(0) if is_smoothing(_node(source)) else source
    if node.get_type_name() in MOVING and _is_quantized(value):
        moved = node.input_values() if node.get_type_name() == "Concat" else node.input_values()[:1]
        inputs = [_unquantized(v) for v in moved] + node.input_values()[len(moved) :]
        arguments = [inputs] if node.get_type_name() == "Concat" else inputs
        copy = NodeFactory().create(node.get_type_name(), *_as_arguments(arguments), node.get_attributes())
        copy.set_friendly_name(f"{node.get_friendly_name()}/float")
        return copy.output(value.get_index())
    return value


def _as_arguments(arguments: list[object]) -> list[list[object]]:
    return [arguments[0]] if arguments and isinstance(arguments[0], list) else [arguments]


def _restore_bias(op: ov.Node, before: dict[str, ov.Node]) -> None:
    """Undo bias correction: the Add behind a layer gets its original constant back, or 0 where there was none."""
    for reader in op.output(0).get_target_inputs():
        add = reader.get_node()
        if add.get_type_name() != "Add":
            continue
        for i, value in enumerate(add.input_values()):
            if not is_constant(value):
                continue
            origin = before.get(add.get_friendly_name())
            if origin is not None and origin.get_input_size() == 2:
                add.input(i).replace_source_output(_fold(origin.input_value(i)))
            elif NULL_BIAS in add.get_friendly_name():
                zero = ov.op.Constant(np.zeros(list(value.get_shape()), np.float32))
                add.input(i).replace_source_output(zero.output(0))
