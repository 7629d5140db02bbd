"""Where the raw heads of a detector end and the arithmetic of boxes begins, found from the graph.

Boxes are coordinates over the whole image: in 8 bits they lie on a grid of 256 positions. So everything from the last
layers with weights to the outputs stays in float, if it is arithmetic of boxes. It is where it ends in non-maximum
suppression; or where it takes exponentials of maps, or combines them with a constant that differs from position to
position, as anchors and grids do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino.passes import ConstantFolding, Manager

from ovcalib.graph.files import ensure_names
from ovcalib.graph.reading import MOVING, WEIGHTED, is_constant, signal_names, signals_of

# Exporters put suppression into control flow: by class, or for the case that there is no box at all.
SUPPRESSION = frozenset(
    {
        "DetectionOutput", "ExperimentalDetectronDetectionOutput", "If", "Loop", "MatrixNms", "MulticlassNms",
        "NonMaxSuppression", "NMSRotated", "Proposal", "TensorIterator",
    }
)  # fmt: skip
ELEMENTWISE = frozenset({"Add", "Divide", "Multiply", "Power", "Subtract"})


@dataclass(frozen=True)
class Detector:
    """A graph in two parts: `body` from the image to the raw heads, `tail` from them to the outputs.

    operations   of the arithmetic of boxes, by name
    """

    body: ov.Model
    tail: ov.Model
    operations: tuple[str, ...]

    def join(self, body: ov.Model) -> ov.Model:
        """The whole graph with another body: one that was quantized."""
        body, tail = body.clone(), self.tail.clone()
        for parameter, result in zip(tail.get_parameters(), body.get_results(), strict=True):
            for reader in parameter.output(0).get_target_inputs():
                reader.replace_source_output(result.input_value(0))
        whole = ov.Model(tail.get_results(), body.get_parameters(), body.get_friendly_name())
        ensure_names(whole)
        return whole


def split_detector(graph: ov.Model) -> Detector | None:
    """The two parts of a detector with batch 1; None for a graph without arithmetic of boxes."""
    folded = _with_computed_shapes(graph)
    heads, region = _heads(folded)
    if not heads or not _is_about_boxes(region):
        return None
    body = ov.Model(heads, folded.get_parameters(), graph.get_friendly_name())
    _name_heads(body)
    second = _with_computed_shapes(graph)
    parameters = []
    for value in _heads(second)[0]:
        parameter = ov.op.Parameter(value.get_element_type(), value.get_partial_shape())
        for reader in list(value.get_target_inputs()):
            reader.replace_source_output(parameter.output(0))
        parameters.append(parameter)
    tail = ov.Model(second.get_results(), parameters, f"{graph.get_friendly_name()}/boxes")
    return Detector(body, tail, tuple(op.get_friendly_name() for op in region))


def raw_heads(graph: ov.Model) -> ov.Model:
    """The graph up to the raw heads of a detector; a graph without arithmetic of boxes as it is."""
    found = split_detector(graph)
    return graph if found is None else found.body


def _with_computed_shapes(graph: ov.Model) -> ov.Model:
    """A copy in which sizes of maps, which anchors are made from, are constants."""
    copy = graph.clone()
    for op in copy.get_ops():
        shape = op.input_value(0).get_partial_shape() if op.get_type_name() == "ShapeOf" else None
        if shape is not None and shape.is_static:  # some are marked so that the pass leaves them alone
            size = np.array(list(shape.to_shape()), op.get_element_type().to_dtype())
            for reader in list(op.output(0).get_target_inputs()):
                reader.replace_source_output(ov.op.Constant(size).output(0))
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(copy)
    return copy


def _name_heads(body: ov.Model) -> None:
    for i, port in enumerate(body.outputs):
        if not port.get_names():
            port.get_tensor().set_names({f"head{i}"})


def _heads(graph: ov.Model) -> tuple[list[ov.Output], list[ov.Node]]:
    """The values that the outputs are computed from without further layers, and the operations that do it.

    Both are empty where the image itself is among them.
    """
    heads: dict[tuple[str, int], ov.Output] = {}
    region: dict[str, ov.Node] = {}
    signals = signal_names(graph)
    waiting = [result.input_value(0) for result in graph.get_results()]
    while waiting:
        value = waiting.pop(0)
        op = value.get_node()
        if op.get_name() not in signals or op.get_name() in region:
            continue
        if op.get_type_name() == "Parameter":
            return [], []
        if _ends_layer(op, signals):
            heads.setdefault((op.get_name(), value.get_index()), value)
            continue
        region[op.get_name()] = op
        waiting += op.input_values()
    return list(heads.values()), list(region.values())


def _ends_layer(op: ov.Node, signals: set[str]) -> bool:
    """Whether an operation is a layer with weights, or adds the bias of one."""
    if op.get_type_name() == "BatchNormInference":
        return True
    if op.get_type_name() == "Add":
        read = signals_of(op, signals)
        return len(read) == 1 and _is_layer(read[0].get_node())
    return _is_layer(op)


def _is_layer(op: ov.Node) -> bool:
    if op.get_type_name() not in WEIGHTED or not is_constant(op.input_value(1)):
        return False
    # A convolution after a softmax over bins computes the expected side of a box.
    source = op.input_value(0).get_node()
    while source.get_type_name() in MOVING:
        source = source.input_value(0).get_node()
    return str(source.get_type_name()) != "Softmax"


def _is_about_boxes(region: list[ov.Node]) -> bool:
    return any(op.get_type_name() in SUPPRESSION or _is_decoding(op) for op in region)


def _is_decoding(op: ov.Node) -> bool:
    rank = op.output(0).get_partial_shape().rank
    if rank.is_dynamic or rank.get_length() < 3:
        return False
    if op.get_type_name() == "Exp":
        return True
    return op.get_type_name() in ELEMENTWISE and any(_differs_by_position(constant) for constant in _constants(op))


def _constants(op: ov.Node) -> Iterator[np.ndarray]:
    for value in op.input_values():
        if value.get_node().get_type_name() == "Constant":
            yield np.array(value.get_node().get_data())


def _differs_by_position(constant: np.ndarray) -> bool:
    """Whether a constant has values that differ along two axes or more; those of a layer differ by channel alone."""
    axes = [axis for axis in range(constant.ndim) if constant.shape[axis] > 1]
    return sum(bool((np.diff(constant, axis=axis) != 0).any()) for axis in axes) >= 2
