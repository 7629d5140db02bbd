"""Cross-layer equalization: scales channels to similar ranges without changing the function of the network.

A ReLU commutes with a positive factor. If layer 1 divides channel i of a signal by s_i and layer 2 multiplies its
weights for it by s_i, nothing changes in float, but a wide channel does not use up the levels of the others (Nagel, van
Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.1).

Scales follow from the weights alone, as in the paper. Scales from ranges of signals, as in SmoothQuant, would fit the
images that they are measured on; larger activations would then be clipped in all channels, not only in the widest.

Where a sum joins signals, all of them share the scales of their channels: those of all layers that write one, and of
all that read one. A signal that anything else reads or writes stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovcalib.graph.editing import set_weights
from ovcalib.graph.reading import (
    Quantizable,
    constant_value,
    layer_name,
    quantizable_operations,
    signal_names,
    signals_of,
)
from ovcalib.records.result import Equalized

# f(x / s) = f(x) / s in every channel, for s > 0. Not a Clamp: its bound would need a value for each channel, and the
# CPU runs a Minimum with such a constant in float, behind INT8 convolutions that could have ended in a Clamp.
HOMOGENEOUS = frozenset({"AvgPool", "MaxPool", "Multiply", "PRelu", "Relu"})
# A layer between two signals takes part in the scales of both, so they are computed repeatedly until they converge.
MAX_SWEEPS = 200
CONVERGED = 1e-4

Key = tuple[str, int]


def equalization_scales(
    producers: Sequence[NDArray[np.float64]], consumers: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The scales that make r1 / s equal to s * r2: s = sqrt(r1 * r2) / r2, equation 11 of Nagel et al.

    producers   ranges [C] of the weights for each channel, in the layers that write it; r1 is their geometric mean
    consumers   the same in the layers that read it; r2 is their geometric mean
    returns     [C]; the geometric mean of the others for a channel without weights in one of the layers
    """
    used = np.all(np.stack([*producers, *consumers]) > 0, axis=0)
    if not used.any():
        return np.ones(len(used))
    r1, r2 = (np.log(np.stack(ranges)[:, used]).mean(0) for ranges in (producers, consumers))
    s = np.full(len(used), np.exp((r1 - r2).mean() / 2))
    s[used] = np.exp((r1 - r2) / 2)
    return s


def equalize(graph: ov.Model) -> tuple[ov.Model, tuple[Equalized, ...]]:
    """A copy of a float graph that computes the same, with equalized channels, and what was equalized.

    Operations keep their friendly names. A constant that layers shared becomes one for each of them.
    """
    graph = graph.clone()
    groups = _groups(graph)
    layers = {layer.name: layer for group in groups for layer in (*group.producers, *group.consumers)}
    weights = {name: layer.weights for name, layer in layers.items() if layer.weights is not None}
    scales = [np.ones(group.channels) for group in groups]
    before = [_ratio(group, weights) for group in groups]
    for _ in range(MAX_SWEEPS):
        moved = 0.0
        for i, group in enumerate(groups):
            step = equalization_scales(*_ranges(group, weights))
            for layer in group.producers:
                own = weights[layer.name]
                weights[layer.name] = own / step.reshape(*own.shape[:2], 1, 1)
            for layer in group.consumers:
                own = weights[layer.name]
                weights[layer.name] = own * step.reshape(own.shape[0], 1, own.shape[2], 1)
            scales[i] = scales[i] * step
            moved = max(moved, float(np.abs(np.log(step)).max()))
        if moved < CONVERGED:
            break
    nodes = {op.get_friendly_name(): op for op in graph.get_ops()}
    for name, values in weights.items():
        set_weights(nodes[name], values)
    for group, s in zip(groups, scales, strict=True):
        for addition in group.additions:
            addition.divide(s)
    graph.validate_nodes_and_infer_types()
    return graph, tuple(
        Equalized(
            producers=tuple(layer_name(layer.name) for layer in group.producers),
            consumers=tuple(layer_name(layer.name) for layer in group.consumers),
            ratio_before=ratio,
            ratio_after=_ratio(group, weights),
        )
        for group, ratio in zip(groups, before, strict=True)
    )


def _ranges(
    group: _Group, weights: dict[str, NDArray[np.float64]]
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """The largest weight for each channel [C] in every producer, and in every consumer, of weights [G, O, I, K]."""
    return (
        [np.abs(weights[layer.name]).max((2, 3)).reshape(-1) for layer in group.producers],
        [np.abs(weights[layer.name]).max((1, 3)).reshape(-1) for layer in group.consumers],
    )


def _ratio(group: _Group, weights: dict[str, NDArray[np.float64]]) -> float:
    ratios = []
    written, read = _ranges(group, weights)
    for ranges in (*written, *read):
        used = ranges[ranges > 0]
        ratios.append(float(used.max() / np.exp(np.log(used).mean())) if used.size else 1.0)
    return max(ratios)


# Which signals go together -------------------------------------------------------------------


@dataclass(frozen=True)
class _Addition:
    """An Add of a constant, its input `index`, to a signal whose channels lie on an axis."""

    op: ov.Node
    axis: int
    index: int

    def divide(self, s: NDArray[np.float64]) -> None:
        """Divide the constant by [C], in place."""
        rank = len(self.op.output(0).get_partial_shape())
        by_channel = s.reshape([-1 if axis == self.axis else 1 for axis in range(rank)])
        constant = ops.constant((constant_value(self.op.input_value(self.index)) / by_channel).astype(np.float32))
        self.op.input(self.index).replace_source_output(constant.output(0))


@dataclass
class _Group:
    """Signals whose channels have to share their scales.

    producers, consumers   layers that write and that read one of them
    additions              of constants to one of them
    """

    channels: int
    producers: list[Quantizable] = field(default_factory=list)
    consumers: list[Quantizable] = field(default_factory=list)
    additions: list[_Addition] = field(default_factory=list)


class _Joined:
    """Values in disjoint sets, some of which are fixed: their channels cannot be scaled."""

    def __init__(self) -> None:
        self.parents: dict[Key, Key] = {}
        self.fixed: list[ov.Output] = []

    def of(self, value: ov.Output) -> Key:
        """What stands for the set of a value; it changes when sets are joined."""
        key = _key(value)
        while (parent := self.parents.setdefault(key, key)) != key:
            key = parent
        return key

    def join(self, one: ov.Output, other: ov.Output) -> None:
        self.parents[self.of(one)] = self.of(other)

    def fix(self, value: ov.Output) -> None:
        self.fixed.append(value)


def _groups(graph: ov.Model) -> list[_Group]:
    """The signals of a graph that can be equalized, by the scales that they share."""
    operations = {op.name: op for op in quantizable_operations(graph)}
    layers: list[Quantizable] = []
    additions: list[_Addition] = []
    axes: dict[Key, int] = {}  # of channels, where they are known
    joined = _Joined()
    names = signal_names(graph)
    for op in graph.get_ordered_ops():
        signals = signals_of(op, names)
        layer = operations.get(op.get_friendly_name())
        if not signals:
            continue
        known = [axes.get(_key(value)) for value in signals]
        if layer is not None and layer.weights is not None and not op.get_attributes().get("transpose_a"):
            layers.append(layer)
            axes[_key(layer.output)] = layer.channel_axis
            if known != [layer.channel_axis]:
                joined.fix(signals[0])
            continue
        axis = known[0] if known and len(set(known)) == 1 else None
        behind = _axis_behind(op, signals, axis) if axis is not None else None
        if behind is None:
            for value in (*signals, *op.outputs()):
                joined.fix(value)
            continue
        axes[_key(op.output(0))] = behind
        for value in signals:
            joined.join(value, op.output(0))
        if op.get_type_name() == "Add" and len(signals) == 1:
            additions.append(_Addition(op, behind, int(_key(signals[0]) == _key(op.input_value(0)))))
    groups: dict[Key, _Group] = {}

    def group_of(value: ov.Output) -> _Group:
        channels = int(value.get_shape()[axes[_key(value)]])
        return groups.setdefault(joined.of(value), _Group(channels))

    fixed = {joined.of(value) for value in joined.fixed}
    for layer in layers:
        if joined.of(layer.output) not in fixed:
            group_of(layer.output).producers.append(layer)
        if joined.of(layer.inputs[0]) not in fixed:
            group_of(layer.inputs[0]).consumers.append(layer)
    for addition in additions:
        if joined.of(addition.op.output(0)) not in fixed:
            group_of(addition.op.output(0)).additions.append(addition)
    return list(groups.values())


def _axis_behind(op: ov.Node, signals: Sequence[ov.Output], axis: int) -> int | None:
    """Where the channels are behind an operation through which a factor of each passes; None for other operations.

    axis   of the channels of `signals`, which all that is not constant among the inputs
    """
    kind, before, after = op.get_type_name(), signals[0].get_partial_shape(), op.output(0).get_partial_shape()
    if before.is_dynamic or after.is_dynamic or any(out.get_target_inputs() for out in op.outputs()[1:]):
        return None
    channels, shape = before.to_shape()[axis], list(after.to_shape())
    if kind == "Add":
        return axis if all(value.get_partial_shape() == after for value in signals) else None
    if kind in HOMOGENEOUS and len(signals) == 1:
        return axis if len(shape) == len(before) and shape[axis] == channels else None
    if kind == "ReduceMean":
        over = {int(i) % len(before) for i in constant_value(op.input_value(1)).reshape(-1)}
        kept = op.get_attributes()["keep_dims"]
        return None if axis in over else axis if kept else axis - sum(i < axis for i in over)
    if kind in ("Reshape", "Squeeze", "Unsqueeze") and len(signals) == 1:
        # Nothing but channels is there.
        alone = [n for n in before.to_shape() if n > 1] == [channels] == [n for n in shape if n > 1]
        return shape.index(channels) if alone else None
    return None


def _key(value: ov.Output) -> Key:
    return value.get_node().get_name(), value.get_index()
