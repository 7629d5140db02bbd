"""Scores of a calibration set for a model, without real data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ovcalib.calibration import bn_losses as losses
from ovcalib.calibration.bn_taps import Layer, Moments, find_layers, tapped
from ovcalib.calibration.network_outputs import flat_outputs, network_outputs
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.records.calibration import SetScore

# A training image's activations lie within so many standard deviations of the mean in almost every channel.
REACH = 3.0
SCORED_IMAGES = 64
BATCH = 4
# Below this a channel is constant, and its statistics say nothing.
SMALLEST_STD = 1e-3


def score_set(module: nn.Module, calibration: CalibrationSet, name: str) -> SetScore:
    """Compare a calibration set with the statistics in the network's BatchNorm layers.

    calibration   the first 64 images are read
    raises        ModelError for a network without usable BatchNorm layers
    """
    module = module.eval()
    layers = find_layers(module, name)
    count = min(len(calibration), SCORED_IMAGES)
    images = torch.from_numpy(np.concatenate([calibration[i] for i in range(count)]))
    means: dict[str, list[Tensor]] = {}
    squares: dict[str, list[Tensor]] = {}
    by_name: dict[str, Moments] = {}
    outputs = []
    with torch.no_grad(), extremes(layers) as found, tapped(layers) as taps:
        for part in torch.split(images, BATCH):
            taps.clear()
            outputs.append(torch.cat(flat_outputs(network_outputs(module, part)), 1))
            for m in taps.moments:
                means.setdefault(m.layer.name, []).append(m.mean)
                squares.setdefault(m.layer.name, []).append(m.square)
                by_name[m.layer.name] = m
        ranges = dict(found)  # before the next passes, whose activations are not the set's
        expected = remembered_outputs(module, images[: 4 * BATCH], by_name)
    distances, coverages, spreads = [], [], []
    for layer, m in by_name.items():
        mean, square = torch.cat(means[layer]), torch.cat(squares[layer])
        std0 = m.layer.var0.sqrt().clamp_min(SMALLEST_STD)
        std = losses.variance(mean.mean(0), square.mean(0), 1, False).sqrt()
        distances.append(statistics_distance(mean.mean(0), std, m.layer.mean0, std0))
        coverages.append(range_coverage(*ranges[layer], m.layer.mean0, std0))
        spreads.append((mean.std(0, unbiased=False) / std0).square().mean().item())
    measured = losses.output_range(torch.cat(outputs)).mean().item()
    return SetScore(
        images=count,
        bn_distance=float(np.mean(distances)),
        range_coverage=float(np.mean(coverages)),
        diversity=float(np.sqrt(np.mean(spreads))),
        output_range=measured,
        output_range_distance=abs(float(np.log(max(measured, 1e-12) / max(expected, 1e-12)))),
    )


def statistics_distance(mean: Tensor, std: Tensor, mean0: Tensor, std0: Tensor) -> float:
    """Distance of two Gaussians a channel, averaged: squared 2-Wasserstein distance over the stored variance, rooted.

    mean, std      [C] of the set; mean0, std0 [C] stored
    returns        0 for equal statistics; 1 is off by about one stored standard deviation
    """
    return float((((mean - mean0) / std0).square() + (std / std0 - 1).square()).mean().sqrt())


def range_coverage(low: Tensor, high: Tensor, mean0: Tensor, std0: Tensor) -> float:
    """Agreement of activation ranges with stored ones: intersection over union, averaged over channels, 0..1.

    low, high   [C] smallest and largest value of the set; the stored range is mean0 +- 3 std0
    Too narrow a range clips, too wide a one wastes levels; both lower the value.
    """
    low0, high0 = mean0 - REACH * std0, mean0 + REACH * std0
    shared = (torch.minimum(high, high0) - torch.maximum(low, low0)).clamp_min(0)
    union = torch.maximum(high, high0) - torch.minimum(low, low0)
    return float((shared / union.clamp_min(1e-12)).mean())


@contextmanager
def extremes(layers: list[Layer]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Smallest and largest input of each layer and channel of all passes so far, by layer name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def read(name: str, x: Tensor) -> None:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        low, high = x.amin(axes), x.amax(axes)
        if name in found:
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = low, high

    hooks = [
        layer.module.register_forward_pre_hook(lambda _, inputs, name=layer.name: read(name, inputs[0]))
        for layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def remembered_outputs(module: nn.Module, images: Tensor, by_name: dict[str, Moments]) -> float:
    """Range of the outputs if the input of the last BatchNorm layer has the stored statistics.

    Its input is replaced by Gaussian values of the stored mean and variance, one for each image and channel, the same
    at every position: objects are larger than the receptive field of a position.
    """
    last = list(by_name.values())[-1].layer
    rng = np.random.default_rng(0)

    def replace(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        noise = torch.from_numpy(rng.standard_normal((len(x), x.shape[1]), dtype=np.float32)).to(x)
        values = last.mean0 + noise * last.var0.sqrt()
        return (values.view(*values.shape, *[1] * (x.ndim - 2)).expand_as(x), *inputs[1:])

    hook = last.module.register_forward_pre_hook(replace)
    try:
        outputs = [torch.cat(flat_outputs(network_outputs(module, part)), 1) for part in torch.split(images, BATCH)]
    finally:
        hook.remove()
    return losses.output_range(torch.cat(outputs)).mean().item()
