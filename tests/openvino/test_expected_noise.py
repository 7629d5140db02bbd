"""The expected noise of quantization, against quantization itself."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib.graph.reading import quantizable_operations
from ovcalib.quantization.expected_noise import (
    MIN_SQNR_DB,
    Channels,
    below_sqnr_limit,
    expected_sqnr,
    output_noise,
    rounding_noise,
)


def rounded(x, low, high):
    """Uniform quantization in 255 steps, with 0 a level: unsigned where nothing is negative, else symmetric."""
    step = (high if low >= 0 else 2 * max(high, -low)) / 255
    return np.round(x / step) * step


def chain(first, second):
    """Two convolutions with a ReLU between them; weights [O, I, 3, 3], or [G, O, I, 3, 3] for groups."""
    x = ops.parameter([1, 3, 12, 12], np.float32, "x")
    value = x
    for i, weights in enumerate((first, second)):
        make = ops.group_convolution if weights.ndim == 5 else ops.convolution
        value = make(value, ops.constant(weights.astype(np.float32)), [1, 1], [1, 1], [1, 1], [1, 1])
        value.set_friendly_name(f"conv{i}")
        if i == 0:
            value = ops.relu(value)
    return ov.Model([value], [x], "chain")


@pytest.fixture
def images(rng):
    return [rng.normal(size=(1, 3, 12, 12)).astype(np.float32) for _ in range(4)]


@pytest.fixture
def weights(rng):
    return rng.normal(size=(8, 3, 3, 3)), rng.normal(size=(5, 8, 3, 3))


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_rounding_noise_is_that_of_rounding(rng, shift) -> None:
    x = (rng.normal(size=(1, 6, 40, 40)) + shift).astype(np.float32)
    x = np.maximum(x, 0) if shift else x
    measured = np.square(rounded(x, x.min(), x.max()) - x).mean((0, 2, 3))
    np.testing.assert_allclose(rounding_noise(Channels.of(x, 1), False), measured, rtol=0.1)
    alone = [np.square(rounded(c, c.min(), c.max()) - c).mean() for c in x[0]]
    np.testing.assert_allclose(rounding_noise(Channels.of(x, 1), True), alone, rtol=0.1)


def test_zeros_are_not_rounded() -> None:
    x = np.zeros((1, 2, 4, 4), np.float32)
    x[0, 0, 0, 0] = 1.0
    noise = rounding_noise(Channels.of(x, 1), False)
    assert noise[0] == pytest.approx((1 / 255) ** 2 / 12 / 16)
    assert noise[1] == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_output_noise_is_that_of_a_layer(rng, groups) -> None:
    w = rng.normal(size=(groups, 7, 6, 1))
    x = rng.normal(size=(20_000, groups, 6)) * np.array([1, 5, 1, 1, 0.1, 1])
    step = 2 * np.abs(x).max() / 255
    error = rng.uniform(-step / 2, step / 2, x.shape)
    activations, from_weights = output_noise(w, np.full(groups * 6, step**2 / 12), np.square(x).mean(0).reshape(-1))
    measured = np.square(np.einsum("goik,ngi->ngo", w, error)).mean(0).sum()
    assert activations == pytest.approx(measured, rel=0.05)
    steps = 2 * np.abs(w).max((2, 3), keepdims=True) / 255
    # Many draws of the error, as one draw of a few weights is far from its mean.
    draws = [
        np.square(np.einsum("goik,ngi->ngo", rng.uniform(-0.5, 0.5, w.shape) * steps, x[:200])).mean(0).sum()
        for _ in range(300)
    ]
    assert from_weights == pytest.approx(np.mean(draws), rel=0.15)


def test_signals_of_several_images_are_one_signal(rng) -> None:
    parts = rng.normal(size=(3, 1, 4, 5, 5)).astype(np.float32)
    together = Channels.of(parts[0], 1).with_(Channels.of(parts[1], 1)).with_(Channels.of(parts[2], 1))
    np.testing.assert_allclose(together.variance, parts.var((0, 1, 3, 4)), rtol=1e-4)
    np.testing.assert_allclose(together.power, np.square(parts).mean((0, 1, 3, 4)), rtol=1e-4)


def test_a_wide_channel_is_seen_though_the_network_computes_the_same(images, weights) -> None:
    first, second = weights
    before = {e.name: e for e in expected_sqnr(chain(first, second), images)}
    assert below_sqnr_limit(list(before.values())) == []
    wide, narrow = first.copy(), second.copy()
    wide[2] *= 1000
    narrow[:, 2] /= 1000
    after = expected_sqnr(chain(wide, narrow), images)
    assert [e.name for e in below_sqnr_limit(after)] == ["conv1"]
    assert after[0].weights_share < 0.5  # its activations are at fault
    # The first layer has an output range of its own for each channel's weights, and its input is as it was.
    assert after[1].sqnr_db == pytest.approx(before["conv0"].sqnr_db, abs=6)


def test_a_large_weight_that_meets_a_silent_channel_is_seen(images, weights) -> None:
    first, second = weights
    first[2], second[:, 2] = 1e-3 * first[2], 1000 * second[:, 2]
    found = below_sqnr_limit(expected_sqnr(chain(first, second), images))
    assert [e.name for e in found] == ["conv1"]
    assert found[0].weights_share > 0.5


def test_a_depthwise_layer_bears_wide_channels(images, rng, weights) -> None:
    depthwise = rng.normal(size=(8, 1, 1, 3, 3))
    first = weights[0]
    before = {e.name: e.sqnr_db for e in expected_sqnr(chain(first, depthwise), images)}
    wide, narrow = first.copy(), depthwise.copy()
    wide[2] *= 1000
    narrow[2] /= 1000
    after = {e.name: e.sqnr_db for e in expected_sqnr(chain(wide, narrow), images)}
    assert after["conv1"] == pytest.approx(before["conv1"], abs=0.01)


def test_wider_ranges_of_single_channels_bring_more_noise_there_and_nowhere_else(images, rng, weights) -> None:
    graph = chain(weights[0], rng.normal(size=(8, 1, 1, 3, 3)))
    before = {e.name: e for e in expected_sqnr(graph, images)}
    after = {e.name: e.sqnr_db for e in expected_sqnr(graph, images, channel_headroom=2.0)}
    share = before["conv1"].weights_share
    noise = 4 * (1 - share) + share  # steps twice as large
    assert after["conv1"] == pytest.approx(before["conv1"].sqnr_db - 10 * np.log10(noise))
    assert after["conv0"] == pytest.approx(before["conv0"].sqnr_db)


def test_sums_and_matrix_products_are_looked_at(toy, toy_graph) -> None:
    found = {op.name: op for op in quantizable_operations(toy_graph)}
    kinds = sorted(
        "sum" if op.weights is None else f"{op.weights.shape[0]}x{op.weights.shape[1]}" for op in found.values()
    )
    assert kinds == ["1x16", "1x16", "1x4", "1x8", "1x8", "sum", "sum"]
    calibration = toy.calibration(4)
    expected = expected_sqnr(toy_graph, [calibration[i] for i in range(4)])
    assert len(expected) == 7
    assert min(e.sqnr_db for e in expected) > MIN_SQNR_DB + 10


def test_signals_that_do_not_fit_together_are_looked_at_in_groups(toy, toy_graph, monkeypatch) -> None:
    images = [toy.calibration(2)[i] for i in range(2)]
    whole = expected_sqnr(toy_graph, images)
    monkeypatch.setattr("ovcalib.runtime.GROUP_BYTES", 1)
    single = expected_sqnr(toy_graph, images)
    assert [e.name for e in single] == [e.name for e in whole]
    assert [e.sqnr_db for e in single] == pytest.approx([e.sqnr_db for e in whole], abs=1e-3)
