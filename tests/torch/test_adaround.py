"""Learned rounding against its formulas, and against all ways to round up or down."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from ovcalib.quantization import adaround as module
from ovcalib.quantization.adaround import adaround, adaround_loss, beta_at, choose_adaround, softly, start
from ovcalib.quantization.compensation import FullCovariance, Moments, output_error


def lost(weights, scale, hessian, integers):
    errors = weights - scale[:, None] * integers
    return float(np.einsum("oi,ij,oj->", errors, hessian, errors))


def correlated(rng, inputs):
    x = rng.normal(size=(4 * inputs, inputs)) @ rng.normal(size=(inputs, inputs))
    return x.T @ x / len(x)


def test_it_starts_at_the_float_weights() -> None:
    rest = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(softly(start(rest)), rest)
    assert torch.equal(softly(torch.tensor([-9.0, 9.0])), torch.tensor([0.0, 1.0]))


def test_beta_falls_from_20_to_2_after_a_fifth_of_the_steps() -> None:
    assert [beta_at(i, 100) for i in (0, 19)] == [None, None]
    assert [beta_at(i, 100) for i in (20, 60, 100)] == pytest.approx([20, 11, 2])


def test_the_loss_is_the_output_error_and_what_is_left_to_decide(rng) -> None:
    """Of inputs without a mean, written down image by image."""
    x = rng.normal(size=(50, 6))
    error, h = rng.normal(size=(3, 6)), rng.uniform(0, 1, (3, 6))
    outputs = sum(np.sum((error @ image) ** 2) for image in x) / len(x)
    left = sum(1 - abs(2 * value - 1) ** 4 for value in h.ravel())
    a, b, c = (torch.from_numpy(value) for value in (error, h, x.T @ x / len(x)))
    assert float(adaround_loss(a, b, c, None)) == pytest.approx(outputs)
    assert float(adaround_loss(a, b, c, 4.0)) == pytest.approx(outputs + 0.01 * left)


def test_it_lies_between_plain_rounding_and_the_best_way_to_round_up_or_down(rng, monkeypatch) -> None:
    """The best by exhaustive search; on average a third of the way, with every integer next to its weight."""
    monkeypatch.setattr(module, "RATE", 1e-2)
    found = []
    for _ in range(10):
        weights, scale, hessian = rng.normal(size=(1, 6)), np.full(1, 0.3), correlated(rng, 6)
        floor = np.floor(weights / scale[:, None])
        best = min(lost(weights, scale, hessian, floor + np.array([up])) for up in itertools.product((0, 1), repeat=6))
        integers = adaround(weights, scale, hessian, 127, steps=1000)
        assert np.all(np.isin(integers - floor, (0, 1)))
        plain = lost(weights, scale, hessian, np.rint(weights / scale[:, None]))
        found.append([best, lost(weights, scale, hessian, integers), plain])
    best, ours, plain = np.mean(found, axis=0)
    assert best <= ours < plain
    assert ours - best < 0.67 * (plain - best)


def test_integers_stay_within_the_limit(rng) -> None:
    integers = adaround(3 * rng.normal(size=(2, 4, 5)), np.full((2, 4), 0.5), np.stack([np.eye(5)] * 2), 3, steps=20)
    assert integers.dtype == np.int8
    assert np.abs(integers).max() == 3


def test_a_layer_is_rounded_by_it(rng, monkeypatch) -> None:
    class Layer:
        name = "conv"

    class OneLayer:
        layer, limit = Layer, 7
        exact, scale = rng.normal(size=(1, 4, 6)), np.full((1, 4), 0.4)
        plain = np.clip(np.rint(exact / 0.4), -7, 7).astype(np.int8)

        def errors(self, integers, scale):
            yield self.exact - scale[..., None] * integers

    monkeypatch.setattr(module, "STEPS", 5)
    fitted, unseen = (Moments(rng.normal(size=(1, 6)), FullCovariance(correlated(rng, 6)[None])) for _ in range(2))
    layer: Any = OneLayer()
    ((record, integers, scale),) = choose_adaround([layer], fitted, unseen)
    assert scale is OneLayer.scale
    power = np.sum((OneLayer.exact @ unseen.covariance.matrix()) * OneLayer.exact)
    for found, error in ((integers, record.compensated), (OneLayer.plain, record.plain)):
        (rows,) = OneLayer().errors(found, scale)
        assert error == pytest.approx(output_error(rows, fitted, unseen) / power)
