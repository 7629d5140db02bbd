"""AdaRound: whether each weight is rounded up or down is learned (Nagel et al., "Up or Down? Adaptive Rounding for
Post-Training Quantization", ICML 2020), as an alternative to compensated rounding.

A layer's squared output error, averaged over calibration images, is a quadratic form of its rounding errors, so all
images take part in every step, and none is read more than once:

    sum over rows of e H e^T + LAMBDA * sum(1 - |2 h - 1|^beta),    e = W - s (floor(W / s) + h)

H is the covariance of the layer's inputs, since a shift of the bias takes what their mean would add. Layers are
independent of each other: x is the input in the FP32 network, quantized ("symmetric reconstruction").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovcalib.quantization.compensation import Moments
from ovcalib.quantization.rounding import RoundedLayer, Rounding, output_power, relative_error

STEPS, RATE = 10_000, 1e-3
# Equation 23 of the paper: the sigmoid is stretched beyond 0 and 1, so that it reaches both.
ZETA, GAMMA = 1.1, -0.1
LAMBDA = 0.01
# Equation 24: beta falls, after steps without the regularizer.
FIRST_BETA, LAST_BETA, WARM_UP = 20.0, 2.0, 0.2


def softly(v: Tensor) -> Tensor:
    """h, how much of a level each weight is rounded up by, in 0..1."""
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def start(rest: Tensor) -> Tensor:
    """v for which h is `rest`, the part of W / s above its floor."""
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def beta_at(step: int, steps: int) -> float | None:
    """None while the regularizer is off."""
    first = WARM_UP * steps
    if step < first:
        return None
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * max(0.0, 1 - (step - first) / (steps - first))


def undecided(h: Tensor, beta: float | None) -> Tensor:
    """What is left to decide of h, equation 24; nothing while the regularizer is off."""
    return h.new_zeros(()) if beta is None else LAMBDA * (1 - (2 * h - 1).abs() ** beta).sum()


def adaround_loss(error: Tensor, h: Tensor, hessian: Tensor, beta: float | None) -> Tensor:
    """The error [..., O, I] of weights by H [..., I, I], and what is left to decide of h."""
    return ((error @ hessian) * error).sum() + undecided(h, beta)


def adaround(
    weights: NDArray[np.float64], scale: NDArray[np.float64], hessian: NDArray[np.float64], limit: int,
    steps: int,
) -> NDArray[np.int8]:  # fmt: skip
    """Integers int8 [..., O, I] in -limit..limit, each next to its weight.

    weights   float64 [..., O, I]
    scale     float64 [..., O]
    hessian   float64 [..., I, I], covariance of the inputs
    """
    target = torch.from_numpy(weights.astype(np.float32))
    step = torch.from_numpy(scale.astype(np.float32))[..., None]
    form = torch.from_numpy(hessian.astype(np.float32))
    floor = torch.floor(target / step)
    v = start(target / step - floor).requires_grad_()
    optimizer = torch.optim.Adam([v], RATE)
    for i in range(steps):
        h = softly(v)
        error = target - step * torch.clamp(floor + h, -limit, limit)
        loss = adaround_loss(error, h, form, beta_at(i, steps))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = torch.clamp(floor + (v.detach() >= 0), -limit, limit)
    return found.numpy().astype(np.int8)


def choose_adaround(
    roundings: Sequence[Rounding], fitted: Moments, unseen: Moments
) -> list[tuple[RoundedLayer, NDArray[np.int8], NDArray[np.float64]]]:
    """Learned rounding of a layer, in the place of `ovcalib.quantization.rounding.choose_rounding`."""
    power, chosen = output_power(roundings[0], unseen), []
    for rounding in roundings:
        integers = adaround(rounding.exact, rounding.scale, fitted.covariance.matrix(), rounding.limit, STEPS)
        plain, learned = (
            relative_error(rounding, found, rounding.scale, fitted, unseen, power)
            for found in (rounding.plain, integers)
        )
        chosen.append((RoundedLayer(rounding.layer.name, plain, learned, 0.0, False), integers, rounding.scale))
    return chosen
