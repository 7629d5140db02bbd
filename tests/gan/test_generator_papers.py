"""GDFQ, FDDA and ACQ against the formulas of their papers, written down once more in plain torch.

The losses of a batch are computed with forward hooks and a copy of the network in training mode, and share with the
sources the generator and the random numbers alone.
"""

import copy
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovcalib import ModelSpec, Preprocessing
from ovcalib.calibration import SOURCES, generator_training
from ovcalib.calibration.generator_options import resolve
from ovcalib.calibration.generator_training import FrozenNetwork, Training
from ovcalib.calibration.sources import Request, generate
from ovcalib.data.sets import choose
from ovcalib.errors import DataError, ModelError, UsageError
from ovcalib.evaluation.dataset import open_dataset, refuse_same_images
from ovcalib.gan import class_losses as losses
from ovcalib.gan.class_generator import LargeGenerator, SmallGenerator, class_generator
from ovcalib.gan.training import step_seed
from ovcalib.records.model import Weights
from ovcalib.records.options import EvaluationOptions
from tests.toy import ToyNet

SEED, SIDE, CLASSES, BATCH = 3, 12, 4, 6
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
METHODS = ("gdfq", "acq", "fdda")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = ToyNet()
    for i, norm in enumerate(norms(net)):
        count = norm.num_features
        norm.running_mean, norm.running_var = torch.linspace(-0.8, 1.1, count) + i / 9, torch.linspace(0.4, 2, count)
        norm.weight.data, norm.bias.data = torch.linspace(0.6, 1.4, count), torch.linspace(-0.2, 0.5, count)
        norm.num_batches_tracked += 7
    net.fc.weight.data *= 4  # so that probabilities differ
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two images of each of four classes."""
    return folder_of(tmp_path_factory.mktemp("photographs"), "abcd")


def folder_of(folder, names):
    rng = np.random.default_rng(1)
    for name, i in itertools.product(names, range(2)):
        (folder / name).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return f"imagefolder:{folder}"


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def asked(net, count=5, side=SIDE, **given):
    spec = ModelSpec(
        name="net", input_shape=(3, side, side), num_classes=CLASSES, classes=("a", "b", "c", "d"),
        weights=Weights(origin="random"), preprocessing=Preprocessing(height=side, width=side, mean=MEAN, std=STD),
    )  # fmt: skip
    return Request(count=count, seed=SEED, spec=spec, module=net, **given)


def prepared(monkeypatch, net, name, argument="", count=5, side=SIDE, **options):
    """(training, loss) of a source, as they are before the first step."""
    caught: list[Any] = []

    class CaughtError(Exception):
        pass

    def run(training, loss) -> None:
        caught.extend((training, loss))
        raise CaughtError

    monkeypatch.setattr(Training, "run", run)
    wanted = {"steps": 4, "train_batch": BATCH, "width": 8, **options}
    with pytest.raises(CaughtError):
        SOURCES[name].generate(asked(net, count, side, argument=argument), SOURCES[name].Options(**wanted))
    return caught


def made(name, net, photographs, count=5, resume=None, **given):
    options = {key: given.pop(key) for key in list(given) if key not in ("tick", "out_of_time")}
    wanted = {"steps": "3", "train_batch": "4", "width": "8", **{key: str(value) for key, value in options.items()}}
    reference = f"fdda:{photographs}" if name == "fdda" else name
    return generate(reference, asked(net, count, resume=resume, **given), wanted)


def seen(net, images):
    """(inputs of the BatchNorm layers, last feature map, logits)"""
    inputs, maps = [], []
    hooks = [norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for norm in norms(net)]
    hooks.append(net.top.register_forward_hook(lambda _, given, output: maps.append(output)))
    logits = net(images)
    for hook in hooks:
        hook.remove()
    return inputs, maps[0], logits


def in_training(net, images):
    """As `seen`, of a copy in training mode."""
    return seen(copy.deepcopy(net).train(), images)


def moments(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


def gap(inputs, targets):
    """(1/L) sum over layers of the squared distances, each divided by the number of channels."""
    total = 0
    for x, (mean0, var0) in zip(inputs, targets, strict=True):
        mean, var = moments(x)
        total = total + ((mean - mean0).norm() ** 2 + (var - var0).norm() ** 2) / x.shape[1]
    return total / len(inputs)


def stored(net):
    return [(norm.running_mean, norm.running_var) for norm in norms(net)]


def entropy(logits, labels):
    return -sum(logits[i].log_softmax(0)[label] for i, label in enumerate(labels)) / len(labels)


def numbers(seed=11):
    return torch.Generator().manual_seed(seed)


# The losses of a batch ---------------------------------------------------------------------------------------


def gdfq_loss(net, generator, draws):
    labels = torch.randint(CLASSES, (BATCH,), generator=draws)
    inputs, _, logits = seen(net, generator(torch.randn(BATCH, 100, generator=draws), labels))
    return entropy(logits, labels) + 0.1 * gap(inputs, stored(net))


def fdda_loss(net, generator, draws, centres):
    labels = torch.randint(CLASSES, (BATCH,), generator=draws)
    inputs, _, logits = seen(net, generator(torch.randn(BATCH, 100, generator=draws), labels))
    value = 0.5 * entropy(logits, labels) + 0.2 * gap(inputs, stored(net))
    c = int(torch.randint(CLASSES, (1,), generator=draws))
    same = torch.full((BATCH,), c)
    inputs, _, logits = seen(net, generator(torch.randn(BATCH, 100, generator=draws), same))
    value = value + 0.5 * entropy(logits, same)
    moved = []
    for mean, var in centres[c]:
        mean = mean + torch.randn(mean.shape, generator=draws) * 0.5
        moved.append((mean, var + torch.randn(var.shape, generator=draws) * 1.0))
    # 4 layers: the first of index int((4 + 1) / 2) - 2 = 0 is the first of all.
    return value + 0.9 * gap(inputs, moved) + 0.05 * gap(inputs, centres[c])


def attention_of(maps):
    rows = []
    for image in maps:
        energy = (image**2).sum(0)
        rows.append((energy - energy.min()) / (energy.max() - energy.min()))
    return torch.stack(rows)


def acq_loss(net, generator, draws, e1, e2, e3, alpha, beta, gamma):
    """For pairs of 3 classes and positions of a 6x6 map."""
    y, p = torch.randint(CLASSES, (3,), generator=draws), torch.randint(36, (3,), generator=draws)
    z = torch.randn(6, 100, generator=draws)
    labels, positions = torch.cat([y, y]), torch.cat([p, p])
    images = generator(z, labels, positions)
    inputs, maps, logits = seen(net, images)
    inputs_t, maps_t, logits_t = in_training(net, images)
    m, m_t = attention_of(maps), attention_of(maps_t)
    at = [m[i, int(position) // 6, int(position) % 6] for i, position in enumerate(positions)]
    cacm = sum(-torch.log((value + 0.2).clamp(max=1)) for value in at) / 6
    penalty = ((m_t - m).abs().mean() - 0.1).clamp(min=0)
    divergences = []
    for one, other in zip(logits[:3], logits[3:], strict=True):
        kept = [k for k in range(CLASSES) if k not in (int(one.argmax()), int(other.argmax()))]
        y1, y2 = one[kept].softmax(0), other[kept].softmax(0)
        middle = (y1 + y2) / 2
        divergences.append(((y1 * (y1 / middle).log()).sum() + (y2 * (y2 / middle).log()).sum()) / 2)
    pair = (z[:3] - z[3:]).abs().mean() / (sum(divergences) / 3 + 1e-3)
    classes = entropy(logits, labels) + e1 * entropy(logits_t, labels)
    statistics = gap(inputs, stored(net)) + e2 * gap(inputs_t, stored(net))
    return (classes + alpha * statistics + beta * (cacm + e3 * penalty) + gamma * pair), (cacm, penalty, pair)


def agree(found, expected) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-6)


def gradients(loss, generator):
    return torch.autograd.grad(loss, list(generator.parameters()), allow_unused=True)


def same_gradients(found, expected) -> None:
    largest = max(float(wanted.abs().max()) for wanted in expected)
    for ours, wanted in zip(found, expected, strict=True):
        # Biases before a normalisation have none but noise.
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=5e-5 * largest)


def test_gdfq_asks_for_classes_and_a_tenth_of_the_statistics(net, monkeypatch) -> None:
    training, loss = prepared(monkeypatch, net, "gdfq")
    found, expected = loss(numbers()), gdfq_loss(net, training.generator, numbers())
    agree(found, expected)
    same_gradients(gradients(found, training.generator), gradients(expected, training.generator))


def centres_of(net, photographs, seed=SEED):
    """The statistics of the image of each class that a seed chooses."""
    _, _, folder = photographs.partition(":")
    order = choose(np.repeat(np.arange(4), 2), 8, seed)
    files = [f"{folder}/{name}/{i}.png" for name in "abcd" for i in range(2)]
    centres = {}
    for index in order[:4]:
        pixels = np.asarray(PIL.Image.open(files[index])).astype(np.float32) / 255
        image = torch.from_numpy((pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)[
            None
        ]
        centres[index // 2] = [moments(x) for x in seen(net, image)[0]]
    assert len(centres) == 4
    return centres


def test_fdda_aligns_a_class_with_its_photograph_and_with_noise_around_it(net, photographs, monkeypatch) -> None:
    training, loss = prepared(monkeypatch, net, "fdda", photographs)
    centres = centres_of(net, photographs)
    for seed in range(4):  # of different classes
        found, expected = loss(numbers(seed)), fdda_loss(net, training.generator, numbers(seed), centres)
        agree(found, expected)
    same_gradients(gradients(found, training.generator), gradients(expected, training.generator))


def test_acq_adds_training_mode_attention_and_pairs(net, monkeypatch) -> None:
    training, loss = prepared(monkeypatch, net, "acq")
    expected, (cacm, penalty, pair) = acq_loss(net, training.generator, numbers(), 0.5, 1, 1, 0.5, 1, 1)
    assert min(cacm, penalty, pair) > 0.01
    found = loss(numbers())
    agree(found, expected)
    same_gradients(gradients(found, training.generator), gradients(expected, training.generator))


WEIGHTS = {"training_classes": 0.3, "training_bn": 0.7, "bn_weight": 0.2, "attention_weight": 1.5, "mode_weight": 2.0,
           "pair_weight": 0.4}  # fmt: skip


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_every_weight_of_acq_is_that_of_its_term(net, monkeypatch, name) -> None:
    weights = {**dict.fromkeys(WEIGHTS, 0.0), "attention_weight": float(name == "mode_weight"), name: WEIGHTS[name]}
    weights["bn_weight"] = weights["bn_weight"] or float(name == "training_bn")
    training, loss = prepared(monkeypatch, net, "acq", **weights)
    e1, e2, alpha, beta, e3, gamma = weights.values()
    agree(loss(numbers()), acq_loss(net, training.generator, numbers(), e1, e2, e3, alpha, beta, gamma)[0])


def test_acq_without_its_terms_is_gdfq(net, monkeypatch) -> None:
    off = dict.fromkeys(("training_classes", "training_bn", "attention_weight", "mode_weight", "pair_weight"), 0.0)
    training, loss = prepared(monkeypatch, net, "acq", bn_weight=0.1, **off)
    draws = numbers()
    y, p = torch.randint(CLASSES, (3,), generator=draws), torch.randint(36, (3,), generator=draws)
    labels = torch.cat([y, y])
    images = training.generator(torch.randn(6, 100, generator=draws), labels, torch.cat([p, p]))
    inputs, _, logits = seen(net, images)
    agree(loss(numbers()), entropy(logits, labels) + 0.1 * gap(inputs, stored(net)))


# One step of the optimiser -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"), [("cosine", [1, 0.8535533906, 0.5, 0.1464466094]), ("tenths", [1, 0.1, 0.01, 0.001])]
)
def test_steps_are_adams_with_the_published_momentum_and_a_falling_rate(net, monkeypatch, schedule, factors) -> None:
    training, loss = prepared(monkeypatch, net, "gdfq", schedule=schedule, rate=0.01)
    values = [p.detach().double() for p in training.generator.parameters()]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    for step in range(4):
        draws = numbers(step_seed(SEED, step))
        own = copy.deepcopy(training.generator)
        expected = gradients(gdfq_loss(net, own, draws), own)
        training.advance(loss)
        taken = [p.grad for p in training.generator.parameters()]
        same_gradients(taken, expected)
        for value, m, v, gradient in zip(values, first, second, taken, strict=True):
            m.mul_(0.5).add_(gradient, alpha=0.5)
            v.mul_(0.999).add_(gradient.double() ** 2, alpha=0.001)
            unbiased = m / (1 - 0.5 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            value -= 0.01 * factors[step] * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        for p, value in zip(training.generator.parameters(), values, strict=True):
            torch.testing.assert_close(p.detach().double(), value, rtol=1e-4, atol=1e-5)


def test_the_published_schedule_has_80000_steps_and_a_tenth_of_the_rate_every_20000() -> None:
    for name, (side, batch) in itertools.product(METHODS, ((32, 200), (224, 16))):
        o = resolve(SOURCES[name].Options(budget="paper"), side, 1000)
        assert (o.steps, o.train_batch, o.width, o.rate, o.schedule) == (80_000, batch, 128, 1e-3, "tenths")
    training = Training.__new__(Training)
    training.options = o
    found = []
    for step in (0, 19_999, 20_000, 39_999, 40_000, 59_999, 60_000, 79_999):
        training.step = step
        found.append(training.rate_factor())
    np.testing.assert_allclose(found, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_published_weights() -> None:
    named = ("training_classes", "training_bn", "mode_weight", "bn_weight", "attention_weight", "pair_weight")
    for classes, weights in {
        10: (0.5, 1, 1, 0.5, 1, 1), 100: (0.05, 1, 1, 0.1, 1, 1), 1000: (0.05, 0.5, 1, 0.1, 1, 0.5)
    }.items():  # fmt: skip
        o = resolve(SOURCES["acq"].Options(), 32, classes)
        assert tuple(getattr(o, name) for name in named) == weights
    o = SOURCES["fdda"].Options()
    assert (o.classes_weight, o.bn_weight, o.distorted_weight, o.centre_weight) == (0.5, 0.2, 0.9, 0.05)
    assert (o.mean_noise, o.variance_noise) == (0.5, 1.0)
    assert SOURCES["gdfq"].Options().bn_weight == 0.1


# The networks ------------------------------------------------------------------------------------------------

SMALL_SHAPES = {
    "label_emb.weight": (10, 100), "l1.0.weight": (8192, 100), "l1.0.bias": (8192,),
    "conv_blocks0.0.weight": (128,), "conv_blocks0.0.running_var": (128,),
    "conv_blocks1.0.weight": (128, 128, 3, 3), "conv_blocks1.0.bias": (128,), "conv_blocks1.1.weight": (128,),
    "conv_blocks2.0.weight": (64, 128, 3, 3), "conv_blocks2.1.bias": (64,), "conv_blocks2.3.weight": (3, 64, 3, 3),
    "conv_blocks2.5.running_mean": (3,),
}  # fmt: skip
LARGE_SHAPES = {
    "l1.0.weight": (128 * 56 * 56, 100), "conv_blocks0_0.weights.weight": (1000, 128),
    "conv_blocks0_0.biases.weight": (1000, 128), "conv_blocks0_0.running_mean": (128,),
    "conv_blocks1_0.weight": (128, 128, 3, 3), "conv_blocks1_1.weights.weight": (1000, 128),
    "conv_blocks2_0.weight": (64, 128, 3, 3), "conv_blocks2_1.biases.weight": (1000, 64),
    "conv_blocks2_3.weight": (3, 64, 3, 3), "conv_blocks2_5.num_batches_tracked": (),
}  # fmt: skip


@pytest.mark.parametrize(("classes", "side", "parameters", "shapes"), [
    (10, 32, 1_052_139, SMALL_SHAPES), (100, 32, 1_061_139, {}), (1000, 224, 41_405_315, LARGE_SHAPES),
])  # fmt: skip
def test_the_generators_are_the_published_ones(classes, side, parameters, shapes) -> None:
    with torch.device("meta"):
        generator = class_generator((3, side, side), classes, 100, 128, None)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    state = {name: tuple(value.shape) for name, value in generator.state_dict().items()}
    assert {name: state.get(name) for name in shapes} == shapes
    epsilons = [layer.eps for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert epsilons == [1e-5, 0.8, 0.8, 1e-5]
    assert "conv_blocks2_5.weight" not in state
    assert "conv_blocks2.5.weight" not in state


def batch_norm(x, eps):
    mean, var = moments(x)
    return (x - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()


def twice(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_a_small_generator_scales_latents_by_class_or_by_position(grid) -> None:
    torch.manual_seed(1)
    generator = SmallGenerator((3, 8, 12), 5, 7, 4, grid)
    z, y, p = torch.randn(6, 7), torch.arange(6) % 5, torch.arange(6) if grid else None
    w = generator.state_dict()
    entered = w["label_emb.weight"][y] * z
    if grid:
        entered = (w["label_emb.weight"][y] + z) * w["position_emb.weight"][p]
    x = (entered @ w["l1.0.weight"].T + w["l1.0.bias"]).reshape(6, 4, 2, 3)
    x = F.conv2d(twice(batch_norm(x, 1e-5)), w["conv_blocks1.0.weight"], w["conv_blocks1.0.bias"], padding=1)
    x = F.leaky_relu(batch_norm(x, 0.8), 0.2)
    x = F.conv2d(twice(x), w["conv_blocks2.0.weight"], w["conv_blocks2.0.bias"], padding=1)
    x = F.leaky_relu(batch_norm(x, 0.8), 0.2)
    x = F.conv2d(x, w["conv_blocks2.3.weight"], w["conv_blocks2.3.bias"], padding=1).tanh()
    torch.testing.assert_close(generator(z, y, p), batch_norm(x, 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_a_large_generator_normalises_by_class_and_adds_the_position(grid) -> None:
    torch.manual_seed(1)
    generator = LargeGenerator((3, 16, 24), 5, 7, 4, grid)
    for name, value in generator.named_parameters():
        if ".weights." in name or ".biases." in name:
            value.data += torch.randn(value.shape) / 2
    z, y, p = torch.randn(6, 7), torch.arange(6) % 5, torch.arange(6) if grid else None
    w = generator.state_dict()

    def conditional(x, name, eps):
        scale, shift = w[f"{name}.weights.weight"][y], w[f"{name}.biases.weight"][y]
        return batch_norm(x, eps) * scale[:, :, None, None] + shift[:, :, None, None]

    x = (z @ w["l1.0.weight"].T + w["l1.0.bias"]).reshape(6, 4, 4, 6)
    if grid:
        cells = x.reshape(6, 4, 2, 2, 3, 2)
        place = torch.full((6, 1, 2, 3), 0.1 / 6)
        for i in range(6):
            place[i, 0, i // 3, i % 3] += 0.9
        coarse = torch.cat([cells.amax((3, 5)), cells.mean((3, 5)), place], 1)
        x = x + twice(F.conv2d(coarse, w["place.weight"], w["place.bias"], padding=1))
    x = twice(conditional(x, "conv_blocks0_0", 1e-5))
    x = F.conv2d(x, w["conv_blocks1_0.weight"], w["conv_blocks1_0.bias"], padding=1)
    x = twice(F.leaky_relu(conditional(x, "conv_blocks1_1", 0.8), 0.2))
    x = F.conv2d(x, w["conv_blocks2_0.weight"], w["conv_blocks2_0.bias"], padding=1)
    x = F.leaky_relu(conditional(x, "conv_blocks2_1", 0.8), 0.2)
    x = F.conv2d(x, w["conv_blocks2_3.weight"], w["conv_blocks2_3.bias"], padding=1).tanh()
    torch.testing.assert_close(generator(z, y, p), batch_norm(x, 1e-5), rtol=1e-4, atol=1e-5)


def test_a_new_large_generator_treats_all_classes_alike() -> None:
    generator = LargeGenerator((3, 16, 16), 5, 7, 4)
    z = torch.randn(4, 7)
    torch.testing.assert_close(generator(z, torch.zeros(4).long()), generator(z, torch.tensor([1, 2, 3, 4])))


@pytest.mark.parametrize("side", [30, 32, 97, 100])
def test_images_have_any_size(side) -> None:
    generator = class_generator((1, side, side + 1), 3, 5, 4, (2, 2))
    assert isinstance(generator, SmallGenerator if side <= 96 else LargeGenerator)
    assert generator(torch.randn(2, 5), torch.tensor([0, 2]), torch.tensor([3, 1])).shape == (2, 1, side, side + 1)


# Statistics --------------------------------------------------------------------------------------------------


def test_the_network_in_training_mode_is_that_of_a_copy_and_keeps_every_buffer(net) -> None:
    images = torch.randn(5, 3, SIDE, SIDE, generator=numbers())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = FrozenNetwork(net, "net")(images, training=True)
    inputs, last_map, logits = in_training(net, images)
    agree(found.logits, logits)
    agree(found.last_map, last_map)
    for (mean, var), x in zip(found.found, inputs, strict=True):
        agree(mean, moments(x)[0])
        torch.testing.assert_close(var, moments(x)[1], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training


def test_both_modes_agree_where_the_batch_has_the_stored_statistics(net) -> None:
    images = torch.randn(5, 3, SIDE, SIDE, generator=numbers())
    own = copy.deepcopy(net)
    for norm in norms(own):
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for norm in norms(own):  # one after the other, as each changes what the next one sees
            norm.train()
            norm.reset_running_stats()
            own(images)
            inputs = seen(own.eval(), images)[0]
            norm.running_mean, norm.running_var = moments(inputs[norms(own).index(norm)])
    network = FrozenNetwork(own.eval(), "own")
    agree(network(images).logits, network(images, training=True).logits)
    assert losses.statistics_gap(network(images).found, network(images).stored) < 1e-8


def test_layers_below_half_are_aligned_from_the_published_index_on() -> None:
    published = {20: 8, 21: 9, 27: 12, 52: 24, 53: 25}
    assert {layers: losses.first_deep_layer(layers) for layers in published} == published
    assert [losses.first_deep_layer(layers) for layers in (1, 2, 3, 4, 5)] == [0, 0, 0, 0, 1]


class Deep(ToyNet):
    """Six BatchNorm layers, of which the first is no deep one."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Sequential(*[
            layer for _ in range(2) for layer in (nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        ])  # fmt: skip

    def forward(self, x):
        return self.fc(self.extra(self.top(self.down(self.block(self.stem(x))))).mean((2, 3)))


def test_shallow_layers_have_no_centre(net, photographs, monkeypatch) -> None:
    torch.manual_seed(2)
    deep = Deep()
    deep.load_state_dict(net.state_dict(), strict=False)
    off = {"bn_weight": 0.0, "classes_weight": 0.0, "distorted_weight": 0.0, "centre_weight": 1.0}
    training, loss = prepared(monkeypatch, deep.eval(), "fdda", photographs, **off)
    draws, centres = numbers(), centres_of(deep, photographs)
    torch.randint(CLASSES, (BATCH,), generator=draws), torch.randn(BATCH, 100, generator=draws)
    c = int(torch.randint(CLASSES, (1,), generator=draws))
    images = training.generator(torch.randn(BATCH, 100, generator=draws), torch.full((BATCH,), c))
    agree(loss(numbers()), gap(seen(deep, images)[0][1:], centres[c][1:]))


def test_a_photograph_is_its_own_centre(net) -> None:
    image = torch.randn(1, 3, SIDE, SIDE, generator=numbers())
    found = FrozenNetwork(net, "net")(image)
    for (mean, var), x in zip(found.found, seen(net, image)[0], strict=True):
        agree(mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(var, x.var((0, 2, 3), unbiased=False), rtol=1e-3, atol=1e-5)
    assert losses.statistics_gap(found.found, found.found) == 0


def test_noise_around_a_centre_adds_its_variance_to_the_gap() -> None:
    shapes = (4, 9, 16)
    centre = [(torch.randn(n), torch.rand(n)) for n in shapes]
    found = [(torch.randn(n), torch.rand(n)) for n in shapes]
    draws = numbers()
    at_centre = float(losses.statistics_gap(found, centre))
    values = [
        float(losses.statistics_gap(found, losses.distorted(centre, 0.5, 1.0, draws))) for _ in range(1500)
    ]  # fmt: skip
    assert np.mean(values) == pytest.approx(at_centre + 0.5**2 + 1.0**2, abs=0.05)
    assert losses.statistics_gap(centre, losses.distorted(centre, 0, 0, draws)) == 0
    one, other = (losses.distorted(centre, 0.5, 1.0, draws)[0][0] for _ in range(2))
    assert not torch.equal(one, other)


# Attention and pairs -----------------------------------------------------------------------------------------


def test_attention_is_one_at_its_largest_and_its_loss_falls_towards_it() -> None:
    maps = torch.randn(5, 6, 3, 4, generator=numbers())
    found = losses.attention(maps)
    assert found.shape == (5, 12)
    assert torch.equal(found.amax(1), torch.ones(5))
    assert torch.equal(found.amin(1), torch.zeros(5))
    peak = found.argmax(1)
    assert losses.attention_at(found, peak, 0.2) == 0
    for row, column in itertools.product(range(3), range(4)):
        one = torch.zeros(1, 6, 3, 4)
        one[0, 2, row, column] = 3
        assert losses.attention(one).argmax() == row * 4 + column
    at = torch.linspace(0, 1, 11)
    values = torch.stack([losses.attention_at(value.view(1, 1), torch.zeros(1).long(), 0.2) for value in at])
    assert (values.diff()[:8] < 0).all()
    assert (values[8:] == 0).all()
    assert float(values[0]) == pytest.approx(-math.log(0.2))
    flat = losses.attention(torch.ones(2, 3, 4, 4, requires_grad=True))
    assert torch.isfinite(torch.autograd.grad(flat.sum(), flat, retain_graph=True)[0]).all()
    assert (flat == 0).all()


def test_the_difference_of_attentions_is_free_up_to_a_tenth() -> None:
    one = torch.rand(3, 8, generator=numbers())
    assert losses.attention_difference(one, one + 0.09, 0.1) == 0
    agree(losses.attention_difference(one, one - 0.35, 0.1), torch.tensor(0.25))


def test_the_divergence_of_a_pair_is_symmetric_and_at_most_ln_2() -> None:
    one, other = (torch.randn(50, 7, generator=numbers(i)).softmax(1) for i in (1, 2))
    agree(losses.jensen_shannon(one, other), losses.jensen_shannon(other, one))
    assert (losses.jensen_shannon(one, one) == 0).all()
    assert (losses.jensen_shannon(one, other) > 0).all()
    apart = losses.jensen_shannon(torch.eye(4)[:1], torch.eye(4)[1:2])
    assert float(apart) == pytest.approx(math.log(2))
    assert losses.jensen_shannon(one, other).max() < math.log(2)


def test_the_classes_that_a_pair_is_taken_for_do_not_matter() -> None:
    z1, z2 = torch.randn(6, 5), torch.randn(6, 5)
    one, other = torch.randn(6, 8), torch.randn(6, 8)
    value = losses.pair_similarity(z1, z2, one, other)
    assert value > 0
    for logits, taken in ((one, other), (other, one)):
        changed = logits.clone()
        changed[torch.arange(6), logits.argmax(1)] += 100
        given = (changed, other) if logits is one else (one, changed)
        agree(losses.pair_similarity(z1, z2, *given), value)
        changed = logits.clone()
        own = taken.argmax(1)
        changed[torch.arange(6), own] -= 50  # it stays the other's choice, but is not this one's
        given = (changed, other) if logits is one else (one, changed)
        if (changed.argmax(1) == logits.argmax(1)).all():
            agree(losses.pair_similarity(z1, z2, *given), value)
    assert losses.pair_similarity(2 * z1, 2 * z2, one, other) > 1.5 * value
    assert losses.pair_similarity(z1, z2, one, one) > 100  # alike


@pytest.mark.parametrize("classes", [2, 3])
def test_a_pair_of_few_classes_has_no_divergence_and_a_gradient(classes) -> None:
    one = torch.eye(classes)[:1].requires_grad_()
    value = losses.pair_similarity(torch.zeros(1, 2), torch.ones(1, 2), one, torch.eye(classes)[1:2])
    value.backward()
    assert value.item() == pytest.approx(1000, rel=1e-3)
    assert torch.isfinite(one.grad).all()


# The sources -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_images_are_normalised_and_classes_take_turns(net, photographs, name) -> None:
    found = made(name, net, photographs, count=90)
    assert found.labels.tolist() == [i % CLASSES for i in range(90)]
    assert found.provenance.labels == "method"
    assert found.provenance.domain == "network"
    np.testing.assert_allclose(found.images.mean((0, 2, 3)), 0, atol=0.15)
    np.testing.assert_allclose(found.images.std((0, 2, 3)), 1, atol=0.15)


def test_an_image_does_not_depend_on_those_that_are_drawn_with_it(net, monkeypatch) -> None:
    whole = made("acq", net, "").images
    monkeypatch.setattr(generator_training, "BATCH_PIXELS", 2 * SIDE * SIDE)
    np.testing.assert_allclose(made("acq", net, "").images, whole, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss(net, photographs, name) -> None:
    notes = []
    made(name, net, photographs, steps=60, rate=0.01, bn_weight=5.0, tick=lambda done, note: notes.append(note))
    values = [float(note.removeprefix("loss ")) for note in notes if note.startswith("loss")]
    assert len(values) == 60
    assert np.mean(values[-10:]) < 0.97 * np.mean(values[:10])


@pytest.mark.parametrize("name", METHODS)
def test_large_images_take_the_other_form(net, photographs, name) -> None:
    options = {"steps": "1", "train_batch": "2", "width": "4"}
    reference = f"fdda:{photographs}" if name == "fdda" else name
    found = generate(reference, asked(net, 3, side=98), options)
    assert found.images.shape == (3, 3, 98, 98)
    assert np.isfinite(found.images).all()


@pytest.mark.parametrize("name", METHODS)
def test_time_is_asked_for_before_every_step(net, photographs, name) -> None:
    for steps in (0, 2):
        clock = itertools.count()
        found = made(name, net, photographs, steps=5, out_of_time=lambda clock=clock, n=steps: next(clock) >= n)
        assert found.images.shape == (5, 3, SIDE, SIDE)
        assert found.provenance.warnings == (
            f"out of time: the generator was trained for {steps} of 5 steps. Allow more time, or ask for fewer steps",
        )


def test_an_interruption_within_a_step_keeps_the_state_before_it_and_other_states_are_left_alone(
    net, tmp_path, monkeypatch
) -> None:
    whole = made("gdfq", net, "")
    step, calls = torch.optim.Adam.step, itertools.count()

    def broken(self, *given):
        step(self, *given)
        if next(calls) == 1:  # weights have moved, but the step is not counted
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    monkeypatch.setattr(generator_training, "SAVE_EVERY_S", -1)  # at every step
    with pytest.raises(KeyboardInterrupt):
        made("gdfq", net, "", resume=tmp_path)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    notes = []
    found = made("gdfq", net, "", resume=tmp_path, tick=lambda done, note: notes.append(note))
    assert np.array_equal(found.images, whole.images)
    assert notes[0] == "taken up again"
    assert len(notes) == 1 + 2 + 1
    # A state of other options is not taken up, and neither is a damaged one.
    other = made("gdfq", net, "", rate=0.01)
    assert np.array_equal(made("gdfq", net, "", rate=0.01, resume=tmp_path).images, other.images)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"PK broken")
    assert np.array_equal(made("gdfq", net, "", resume=tmp_path).images, whole.images)


@pytest.mark.parametrize("option", [
    {"train_batch": 6}, {"width": 6}, {"latent": 9}, {"rate": 0.1}, {"schedule": "tenths"}, {"bn_weight": 2.0},
])  # fmt: skip
def test_every_shared_option_does_something(net, option) -> None:
    assert not np.array_equal(made("gdfq", net, "").images, made("gdfq", net, "", **option).images)


@pytest.mark.parametrize(("name", "option"), [
    *(("acq", {option: value}) for option, value in {**WEIGHTS, "free_attention": 0.9, "free_difference": 5.0}.items()),
    *(("fdda", {option: 3.0}) for option in ("classes_weight", "distorted_weight", "centre_weight", "mean_noise",
                                             "variance_noise")),
])  # fmt: skip
def test_every_option_of_a_method_does_something(net, photographs, name, option) -> None:
    assert not np.array_equal(made(name, net, photographs).images, made(name, net, photographs, **option).images)


def test_photographs_are_named_in_the_licence_and_a_missing_class_in_a_warning(net, photographs, tmp_path) -> None:
    found = made("fdda", net, photographs).provenance
    assert found.licence == (
        "made from the weights of net (whose licence is not stated) and, through their BatchNorm statistics, from 4 "
        f"real images of {photographs} (whose licence is not stated)"
    )
    assert not found.real
    assert found.warnings == ()
    few = made("fdda", net, folder_of(tmp_path, "bd"))
    assert few.labels.tolist() == [0, 1, 2, 3, 0]
    (warning,) = few.provenance.warnings
    assert "2 of the model's 4 classes" in warning
    for name in ("gdfq", "acq"):
        assert made(name, net, "").provenance.licence.startswith("made without photographs")


def test_a_class_without_photograph_is_asked_for_as_a_class_alone(net, tmp_path, monkeypatch) -> None:
    off = {"bn_weight": 0.0, "classes_weight": 0.0}
    _, loss = prepared(monkeypatch, net, "fdda", folder_of(tmp_path, "bd"), **off)
    for seed in range(8):
        draws = numbers(seed)
        torch.randint(CLASSES, (BATCH,), generator=draws), torch.randn(BATCH, 100, generator=draws)
        c = int(torch.randint(CLASSES, (1,), generator=draws))
        assert (loss(numbers(seed)).item() > 0) == (c in (1, 3))


def test_photographs_of_the_evaluation_set_are_refused(net, photographs) -> None:
    data = open_dataset(photographs, asked(net).spec, None)
    with pytest.raises(DataError, match="come out of the evaluation set"):
        refuse_same_images(f"fdda:{photographs}", data, EvaluationOptions())


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_trained_against_is_refused(net, photographs, name) -> None:
    reference = f"fdda:{photographs}" if name == "fdda" else name
    no_classes = asked(net)
    spec = no_classes.spec.model_copy(update={"num_classes": None, "classes": None})
    with pytest.raises(ModelError, match="net has no class logits"):
        generate(reference, dataclasses.replace(no_classes, spec=spec))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    with pytest.raises(ModelError, match=r"calibrate with patch-similarity \(ViT\), fractal or real:DATA"):
        generate(reference, asked(plain))


def test_a_network_without_feature_maps_has_no_attention(net) -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(3 * SIDE * SIDE), nn.Linear(3 * SIDE * SIDE, CLASSES)
            self.norm.running_mean += 1

        def forward(self, x):
            return self.fc(self.norm(x.flatten(1)))

    vectors = Vectors().eval()
    with pytest.raises(ModelError, match="no feature map with more than one position"):
        made("acq", vectors, "")
    assert made("gdfq", vectors, "").images.shape == (5, 3, SIDE, SIDE)


@pytest.mark.parametrize(("name", "option", "message"), [
    ("gdfq", {"steps": 0}, "steps is 0"), ("gdfq", {"train_batch": 1}, "train_batch is 1"),
    ("gdfq", {"width": 1}, "width is 1"), ("gdfq", {"rate": 0}, "rate is 0"), ("fdda", {"mean_noise": -1}, "mean_noise"),
    ("acq", {"train_batch": 5}, "train_batch is 5, but must be even"), ("acq", {"free_attention": 0}, "free_attention"),
    ("acq", {"pair_weight": "nan"}, "pair_weight is nan"), ("gdfq", {"budget": "slow"}, "quick, standard, paper"),
])  # fmt: skip
def test_options_out_of_range_are_refused(net, photographs, name, option, message) -> None:
    with pytest.raises(UsageError, match=message):
        made(name, net, photographs, **option)


@pytest.mark.parametrize(("classes", "message"), [("", "has no labels"), ("abx", "has the classes a, b, x")])
def test_photographs_need_labels_of_the_model(net, tmp_path, classes, message) -> None:
    reference = folder_of(tmp_path, classes)
    if not classes:
        PIL.Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match=message):
        made("fdda", net, reference)
