"""Cross-layer equalization against its closed form, and the equalized network against the one that it was made from."""

from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib.evaluation.metrics import nmse
from ovcalib.graph.reading import quantizable_operations
from ovcalib.quantization.equalization import equalization_scales, equalize
from ovcalib.quantization.expected_noise import MIN_SQNR_DB, expected_sqnr
from ovcalib.runtime import outputs_of

SIDE = 10


class Network:
    """A graph that grows by layers with random weights, whose channels have very different ranges."""

    def __init__(self, rng, shape=(1, 3, SIDE, SIDE)) -> None:
        self.rng = rng
        self.x = ops.parameter(list(shape), np.float32, "x")
        self.constants: dict[str, Any] = {}

    def weights(self, *shape, spread=(0,)):
        """Random numbers times 0.01 to 100, for each index of the axes `spread`."""
        values = self.rng.normal(size=shape)
        for axis in spread:
            values *= 10 ** self.rng.uniform(-2, 2, [n if i == axis else 1 for i, n in enumerate(shape)])
        return values.astype(np.float32)

    def conv(self, value, name, cin, cout, bias=True, weights=None):
        w = ops.constant(self.weights(cout, cin, 3, 3, spread=(0, 1))) if weights is None else weights
        out = ops.convolution(value, w, [1, 1], [1, 1], [1, 1], [1, 1])
        return self._named(out, name, cout, bias)

    def grouped(self, value, name, groups, each, bias=True):
        w = ops.constant(self.weights(groups, each, each, 3, 3, spread=(0, 1, 2)))
        out = ops.group_convolution(value, w, [1, 1], [1, 1], [1, 1], [1, 1])
        return self._named(out, name, groups * each, bias)

    def matmul(self, value, name, cin, cout, transposed=True):
        w = self.weights(*((cout, cin) if transposed else (cin, cout)), spread=(0, 1))
        out = ops.matmul(value, ops.constant(w), False, transposed)
        out.set_friendly_name(name)
        return ops.add(out, ops.constant(self.weights(*[1] * (len(out.get_output_shape(0)) - 1), cout)))

    def _named(self, out, name, channels, bias):
        out.set_friendly_name(name)
        return ops.add(out, ops.constant(self.weights(1, channels, 1, 1))) if bias else out

    def graph(self, *outputs):
        return ov.Model(list(outputs), [self.x], "network")


def images_for(graph, rng, count=3):
    return [rng.normal(size=list(graph.inputs[0].get_shape())).astype(np.float32) for _ in range(count)]


def ranges(graph, name, outputs):
    weights = next(op.weights for op in quantizable_operations(graph) if op.name == name)
    return np.abs(weights).max((2, 3) if outputs else (1, 3)).reshape(-1)


def chain(net, between=ops.relu, cin=3):
    return net.conv(between(net.conv(net.x, "first", cin, 8)), "second", 8, 5)


def depthwise_chain(net):
    value = ops.relu(net.conv(net.x, "first", 3, 8))
    value = ops.relu(net.grouped(value, "depthwise", 8, 1))
    return net.conv(value, "last", 8, 5)


def grouped_chain(net):
    value = ops.relu(net.conv(net.x, "first", 3, 8))
    return net.conv(ops.relu(net.grouped(value, "groups", 2, 4)), "last", 8, 5, bias=False)


def read_by_two(net):
    value = ops.relu(net.conv(net.x, "first", 3, 8))
    return ops.add(net.conv(value, "left", 8, 4), net.conv(value, "right", 8, 4))


def residual(net):
    value = ops.relu(net.conv(net.x, "stem", 3, 6))
    for i in range(2):
        inner = net.conv(ops.relu(net.conv(value, f"inner{i}", 6, 7)), f"outer{i}", 7, 6)
        value = ops.relu(ops.add(inner, value))
    return net.conv(value, "head", 6, 4)


def pooled(net):
    value = ops.max_pool(ops.relu(net.conv(net.x, "first", 3, 8)), [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    value = ops.avg_pool(net.conv(value, "second", 8, 6), [1, 1], [0, 0], [0, 0], [2, 2], True)
    value = ops.reshape(ops.reduce_mean(value, [2, 3], True), [1, 6], False)
    return net.matmul(ops.relu(net.matmul(value, "fc1", 6, 9)), "fc2", 9, 4, transposed=False)


def without_kept_axes(net):
    value = ops.multiply(net.conv(net.x, "first", 3, 8), ops.constant(net.weights(1, 8, 1, 1)))
    return net.matmul(ops.reduce_mean(value, [-1, 2], False), "fc", 8, 4)


def shared(net):
    w = ops.constant(net.weights(8, 8, 3, 3, spread=(0, 1)))
    value = ops.relu(net.conv(net.x, "first", 3, 8))
    return net.conv(ops.relu(net.conv(value, "second", 8, 8, weights=w)), "third", 8, 8, weights=w)


NETWORKS = {
    "relu": chain,
    "nothing": lambda net: chain(net, lambda value: value),
    "prelu": lambda net: chain(net, lambda value: ops.prelu(value, ops.constant(net.weights(8)))),
    "leaky": lambda net: chain(net, lambda value: ops.prelu(value, ops.constant(np.array([0.1], np.float32)))),
    "depthwise": depthwise_chain,
    "groups": grouped_chain,
    "read by two": read_by_two,
    "residual": residual,
    "pools": pooled,
    "pooled": without_kept_axes,
    "shared": shared,
}
EQUALIZED = {"depthwise": 2, "groups": 2, "residual": 3, "pools": 3, "shared": 2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_network_computes_what_it_did(kind, seed) -> None:
    rng = np.random.default_rng(seed)
    net = Network(rng)
    graph = net.graph(NETWORKS[kind](net))
    images = images_for(graph, rng)
    before, names = outputs_of(graph, images), {op.get_friendly_name() for op in graph.get_ops()}
    equalized, found = equalize(graph)
    assert nmse(before, outputs_of(equalized, images)) < 1e-10
    np.testing.assert_array_equal(outputs_of(graph, images), before)  # it was not equalized in place
    assert len(found) == EQUALIZED.get(kind, 1)
    operations = [op for op in equalized.get_ops() if op.get_type_name() != "Constant"]
    assert {op.get_friendly_name() for op in operations} <= names
    again = equalize(equalized)[1]
    for one, two in zip(found, again, strict=True):  # it stays as it is
        assert two.ratio_before == pytest.approx(one.ratio_after, rel=1e-2)
        assert two.ratio_after == pytest.approx(two.ratio_before, rel=1e-2)


def test_scales_are_those_of_the_closed_form(rng) -> None:
    r1, r2 = np.exp(rng.normal(size=(2, 20)))
    s = equalization_scales([r1], [r2])
    np.testing.assert_allclose(s, np.sqrt(r1 * r2) / r2)
    np.testing.assert_allclose(r1 / s, r2 * s)
    np.testing.assert_allclose((r1 / s) * (r2 * s), r1 * r2)


def test_scales_of_several_layers_stand_between_them(rng) -> None:
    a, b, c = np.exp(rng.normal(size=(3, 20)))
    s = equalization_scales([a, b], [c])
    np.testing.assert_allclose(np.sqrt(a / s * b / s), c * s)


def test_a_channel_without_weights_gets_the_mean_scale() -> None:
    s = equalization_scales([np.array([16.0, 0.0, 1.0, 1.0])], [np.array([1.0, 1.0, 0.0, 1.0])])
    np.testing.assert_allclose(s, [4, 2, 2, 1])
    np.testing.assert_array_equal(equalization_scales([np.zeros(3)], [np.ones(3)]), np.ones(3))


def test_two_layers_have_the_same_ranges_afterwards(rng) -> None:
    net = Network(rng)
    graph = net.graph(chain(net))
    product = ranges(graph, "first", True) * ranges(graph, "second", False)
    (equalized, (found,)) = equalize(graph)
    r1, r2 = ranges(equalized, "first", True), ranges(equalized, "second", False)
    np.testing.assert_allclose(r1, r2, rtol=1e-3)
    np.testing.assert_allclose(r1 * r2, product, rtol=1e-3)
    assert (found.producers, found.consumers) == (("first",), ("second",))
    assert found.ratio_before > found.ratio_after > 1


def test_three_layers_come_to_the_cube_root_of_their_product(rng) -> None:
    """As in the paper: with a depthwise layer in the middle, all three have the range (r1 r2 r3)^(1/3)."""
    net = Network(rng)
    graph = net.graph(depthwise_chain(net))
    names = ("first", True), ("depthwise", True), ("last", False)
    root = np.cbrt(np.prod([ranges(graph, *name) for name in names], axis=0))
    equalized, _ = equalize(graph)
    for name in names:
        np.testing.assert_allclose(ranges(equalized, *name), root, rtol=2e-3)


def test_a_sum_joins_its_layers(rng) -> None:
    net = Network(rng)
    _, found = equalize(net.graph(residual(net)))
    (joined,) = [e for e in found if len(e.producers) > 1]
    assert joined.producers == ("stem", "outer0", "outer1")
    assert joined.consumers == ("inner0", "inner1", "head")


def inside_read(net):
    value = ops.relu(net.conv(net.x, "first", 3, 8))
    return net.conv(value, "second", 8, 4), value


def sigmoid_reads(net):
    value = ops.relu(net.conv(net.x, "first", 3, 8))
    return ops.add(net.conv(value, "second", 8, 8), ops.sigmoid(value))


def sigmoid_reads_first(net):
    value = net.conv(net.x, "first", 3, 8)
    return ops.add(net.conv(ops.relu(value), "second", 8, 8), ops.sigmoid(value))


LEFT_ALONE = {
    "an output of the network": inside_read,
    "read by a sigmoid": sigmoid_reads,
    "read by a sigmoid before its ReLU": sigmoid_reads_first,
    "averaged over channels": lambda net: net.conv(
        ops.reduce_mean(net.conv(net.x, "first", 3, 8), [1], True), "second", 1, 4
    ),
    "spread over channels": lambda net: net.conv(
        ops.add(net.conv(net.x, "first", 3, 1), ops.constant(net.weights(1, 8, 1, 1))), "second", 8, 4
    ),
    "along another axis": lambda net: net.matmul(net.conv(net.x, "first", 3, 8), "second", SIDE, 5),
    "through a sigmoid": lambda net: chain(net, ops.sigmoid),
    "through a clamp": lambda net: chain(net, lambda value: ops.clamp(value, 0, 6)),
    "over channels": lambda net: chain(net, lambda value: ops.add(value, ops.reduce_mean(value, [1], True))),
    "of the input": lambda net: net.conv(ops.relu(net.x), "only", 3, 4),
    "joined with the input": lambda net: net.conv(ops.add(net.conv(net.x, "first", 3, 3), net.x), "second", 3, 4),
    "flattened": lambda net: net.matmul(
        ops.reshape(net.conv(net.x, "first", 3, 2), [1, 2 * SIDE * SIDE], False), "fc", 2 * SIDE * SIDE, 3
    ),
    "transposed": lambda net: net.conv(
        ops.transpose(net.conv(net.x, "first", 3, SIDE), [0, 2, 1, 3]), "second", SIDE, 3
    ),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_no_factor_passes_through_is_left_alone(rng, kind) -> None:
    net = Network(rng)
    made = LEFT_ALONE[kind](net)
    graph = net.graph(*(made if isinstance(made, tuple) else (made,)))
    equalized, found = equalize(graph)
    assert found == ()
    images = images_for(graph, rng)
    np.testing.assert_array_equal(outputs_of(graph, images), outputs_of(equalized, images))


@pytest.mark.parametrize("transposed", [True, False])
def test_matrix_products_of_sequences(rng, transposed) -> None:
    net = Network(rng, (1, 7, 6))
    value = ops.relu(net.matmul(net.x, "first", 6, 8, transposed))
    graph = net.graph(net.matmul(value, "second", 8, 5, transposed))
    images = images_for(graph, rng)
    equalized, found = equalize(graph)
    assert len(found) == 1
    assert nmse(outputs_of(graph, images), outputs_of(equalized, images)) < 1e-10
    np.testing.assert_allclose(ranges(equalized, "first", True), ranges(equalized, "second", False), rtol=1e-3)


def test_the_mean_of_a_sequence(rng) -> None:
    net = Network(rng, (1, 7, 6))
    value = ops.reduce_mean(ops.relu(net.matmul(net.x, "first", 6, 8)), [1], False)
    graph = net.graph(net.matmul(value, "second", 8, 5))
    images = images_for(graph, rng)
    equalized, found = equalize(graph)
    assert len(found) == 1
    assert nmse(outputs_of(graph, images), outputs_of(equalized, images)) < 1e-10


def test_int8_can_hold_it_then(rng) -> None:
    """A channel that drowns the others is brought back to the SQNR of the network before it was made wide."""
    first, second = rng.normal(size=(8, 3, 3, 3)), rng.normal(size=(5, 8, 3, 3))

    def worst(first, second, equal):
        net = Network(rng)
        first, second = (ops.constant(w.astype(np.float32)) for w in (first, second))
        value = ops.relu(net.conv(net.x, "first", 3, 8, False, first))
        graph = net.graph(net.conv(value, "second", 8, 5, False, second))
        images = images_for(graph, np.random.default_rng(1))
        return expected_sqnr(equalize(graph)[0] if equal else graph, images)[0].sqnr_db

    normal = worst(first, second, False)
    first[2] *= 1000
    second[:, 2] /= 1000
    assert worst(first, second, False) < MIN_SQNR_DB
    assert worst(first, second, True) > normal - 1


def test_a_trained_network(toy, toy_graph) -> None:
    equalized, found = equalize(toy_graph)
    assert found
    images = toy.calibration(8).inputs()
    assert nmse(outputs_of(toy_graph, images), outputs_of(equalized, images)) < 1e-10
