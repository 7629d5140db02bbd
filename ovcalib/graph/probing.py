"""Graphs whose outputs are the signals at single operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from ovcalib.graph.editing import _as_arguments, _restore_in_place
from ovcalib.graph.reading import (
    WEIGHTED,
    _bias,
    _node,
    _quantizers,
    _range,
    is_constant,
    layer_name,
    quantized_operations,
    smoothing,
)


@dataclass(frozen=True)
class ProbedInput:
    """An activation that an operation reads quantized.

    value       index of the output that holds it before quantization
    low, high   range of its FakeQuantize, float32, broadcastable to the value
    """

    source: str
    value: int
    low: NDArray[np.float32]
    high: NDArray[np.float32]


@dataclass(frozen=True)
class Probe:
    """Which outputs of an instrumented graph belong to one quantized operation; indices, None where there is no such.

    reference     the operation in float, with its bias
    alone         the same float input, quantized, with quantized weights and the corrected bias
    weights       only the weights quantized, with the corrected bias
    activations   only the input quantized, with the float weights and bias
    """

    name: str
    kind: str
    reference: int
    alone: int
    weights: int | None
    activations: int | None
    inputs: tuple[ProbedInput, ...]


def instrument(quantized: ov.Model, original: ov.Model, names: Iterable[str]) -> tuple[ov.Model, list[Probe]]:
    """A float graph in which each named operation is computed again beside itself, quantized.

    What is quantized at one operation does not reach the next, so each is seen alone, and all in one inference.
    names     friendly names of quantized operations of `quantized`
    """
    graph = quantized.clone()
    wanted = set(names)
    operations = quantized_operations(graph)
    # The quantized values are stored before the operations are connected to the float ones.
    quantized_inputs = {op.get_friendly_name(): op.input_values() for op in operations}
    corrected = {op.get_friendly_name(): _bias(op) for op in operations}
    smoothed = {op.get_friendly_name(): smoothing(op) for op in operations}
    _restore_in_place(graph, original, list(quantized_inputs))
    results: list[ov.Output] = []

    def output(value: ov.Output) -> int:
        results.append(value)
        return len(results) - 1

    def variant(op: ov.Node, values: list[ov.Output], bias: ov.Output | None) -> int:
        copy = NodeFactory().create(op.get_type_name(), *_as_arguments(list(values)), op.get_attributes())
        return output(copy.output(0) if bias is None else ops.add(copy, bias).output(0))

    probes = []
    for op in operations:
        name = op.get_friendly_name()
        if name not in wanted:
            continue
        plain, rounded = op.input_values(), quantized_inputs[name]
        constant = [is_constant(value) for value in rounded]
        factor = smoothed[name]
        comparable = rounded if factor is None else _not_smoothed(op, rounded, factor)
        bias = _bias(op)
        had_bias = corrected[name]
        fixed_bias = had_bias.value if had_bias else None
        float_bias = bias.value if bias else None
        weighted = op.get_type_name() in WEIGHTED and any(constant)
        probes.append(
            Probe(
                name=name,
                kind=op.get_type_name(),
                reference=output(bias.add.output(0) if bias else op.output(0)),
                alone=variant(op, rounded, fixed_bias),
                weights=variant(op, _pick(comparable, plain, constant), fixed_bias) if weighted else None,
                activations=variant(op, _pick(plain, comparable, constant), float_bias) if weighted else None,
                inputs=tuple(
                    ProbedInput(layer_name(_node(fq.input_value(0))), output(fq.input_value(0)), *_range(fq))
                    for value, fixed in zip(rounded, constant, strict=True)
                    if not fixed
                    for fq in _quantizers(value)
                ),
            )
        )
    return ov.Model(results, graph.get_parameters(), "instrumented"), probes


def quantized_inputs(quantized: ov.Model, original: ov.Model, names: Iterable[str]) -> ov.Model:
    """The float network with what the named layers read as its only outputs, each quantized where it is read.

    What is quantized for one layer does not reach the next.
    """
    graph = quantized.clone()
    operations = {op.get_friendly_name(): op for op in graph.get_ops()}
    # Stored before the operations are connected to the float values.
    values = [operations[name].input_value(0) for name in names]
    _restore_in_place(graph, original, [op.get_friendly_name() for op in quantized_operations(graph)])
    return ov.Model(values, graph.get_parameters(), "quantized inputs")


def quantizer_inputs(quantized: ov.Model, original: ov.Model, names: Iterable[str]) -> ov.Model:
    """The float network with what the named quantizers of activations read as its only outputs."""
    graph = quantized.clone()
    quantizers = {op.get_friendly_name(): op for op in graph.get_ops()}
    values = [quantizers[name].input_value(0) for name in names]
    _restore_in_place(graph, original, [op.get_friendly_name() for op in quantized_operations(graph)])
    return ov.Model(values, graph.get_parameters(), "quantizer inputs")


def observe(graph: ov.Model, names: Iterable[str]) -> ov.Model:
    """The graph with the named operations' outputs, bias included, as its only outputs, in the order of `names`."""
    graph = graph.clone()
    operations = {op.get_friendly_name(): op for op in graph.get_ops()}
    points = []
    for name in names:
        bias = _bias(operations[name])
        points.append((bias.add if bias else operations[name]).output(0))
    return ov.Model(points, graph.get_parameters(), "observed")


def _not_smoothed(op: ov.Node, values: list[ov.Output], factor: NDArray[np.float64]) -> list[ov.Output]:
    """A quantized input and weights on the scale that they have in the float network; see `smoothing`."""
    if op.get_type_name() == "MatMul":
        attributes = op.get_attributes()
        behind = int(attributes["transpose_a"]), int(not attributes["transpose_b"])
    else:
        behind = (len(op.output(0).get_partial_shape()) - 2,) * 2
    of_input, of_weights = (factor.reshape(-1, *[1] * axes) for axes in behind)
    return [
        ops.multiply(value, ops.constant(scale.astype(np.float32))).output(0)
        for value, scale in zip(values, (1 / of_input, of_weights), strict=True)
    ]


def _pick(constants: list[ov.Output], others: list[ov.Output], constant: list[bool]) -> list[ov.Output]:
    return [c if fixed else o for c, o, fixed in zip(constants, others, constant, strict=True)]
