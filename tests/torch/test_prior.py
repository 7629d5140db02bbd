"""Inversion with another network's statistics."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovcalib.calibration import prior as source
from ovcalib.calibration.joint import JointNetwork
from ovcalib.calibration.sources import Request, generate
from ovcalib.errors import ModelError, UsageError
from ovcalib.models.load import Model, load_model
from ovcalib.records.options import ModelOptions
from ovcalib.records.preprocessing import Preprocessing
from tests.toy import ToyNet


def plain(channels=3, classes=4):
    """A classifier without BatchNorm."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    ).eval()


@pytest.fixture
def remembered(toy, monkeypatch):
    """The toy network as what `prior:toy` names; what its options were."""
    asked: list[ModelOptions] = []

    def load(options):
        asked.append(options)
        if options.reference == "toy":
            return Model(toy.spec, toy.net)
        return load_model(options)

    monkeypatch.setattr("ovcalib.models.load.load_model", load)
    return asked


def request(toy, module, count=12, argument="toy", **spec):
    return Request(count=count, seed=0, spec=toy.spec.model_copy(update=spec), module=module, argument=argument)


def statistics_loss(net, images):
    """Squared distance of the set's means and standard deviations from those in every BatchNorm layer."""
    seen: dict[Any, torch.Tensor] = {}
    layers: list[Any] = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda m, x: seen.__setitem__(m, x[0])) for m in layers]
    with torch.no_grad():
        net(torch.as_tensor(images))
    for hook in hooks:
        hook.remove()
    gaps = [
        (x.mean((0, 2, 3)) - m.running_mean).square().mean()
        + (x.std((0, 2, 3), correction=0) - m.running_var.sqrt()).square().mean()
        for m, x in seen.items()
    ]
    return float(sum(gaps))


def test_the_images_get_the_statistics_of_the_prior(toy, remembered) -> None:
    made = {
        steps: source.generate(
            request(toy, plain()), source.Options(steps=steps, batch=4, rate=0.05, output_weight=0.0)
        )
        for steps in (1, 80)
    }
    losses = {steps: statistics_loss(toy.net, found.images) for steps, found in made.items()}
    assert losses[80] < 0.1 * losses[1]


def test_each_image_is_of_its_class_for_the_model(toy, remembered) -> None:
    net = plain()
    options = source.Options(steps=80, batch=4, output_weight=100.0, rate=0.2)
    found = source.generate(request(toy, net), options)
    np.testing.assert_array_equal(found.labels, np.arange(12) % 4)
    assert found.label_origin == "method"

    def hits(images):
        with torch.no_grad():
            return float((net(torch.from_numpy(images)).argmax(1).numpy() == found.labels).mean())

    without = source.generate(request(toy, net), dataclasses.replace(options, output="none"))
    assert hits(found.images) > 0.7  # a new network has a class that no image gets
    assert hits(without.images) < 0.4


@pytest.mark.parametrize("missing", ["module", "classes"])
def test_without_classes_or_a_module_the_statistics_alone_count(toy, remembered, missing) -> None:
    asked = request(toy, None) if missing == "module" else request(toy, plain(), num_classes=None)
    found = source.generate(asked, source.Options(steps=2, batch=4))
    assert found.labels is None
    assert found.options["output"] == "none"
    assert found.images.shape == (12, 3, 16, 16)


def test_the_licence_names_both_networks(toy, remembered) -> None:
    assert source.generate(request(toy, plain()), source.Options(steps=1)).licence == (
        "made without photographs, from the weights of toy (whose licence is not stated) and toy (whose licence is not "
        "stated)"
    )


# What the prior sees --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_prior_sees_the_same_pixels_in_its_own_preprocessing(toy, rng, order) -> None:
    own = Preprocessing(height=16, width=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), channel_order=order)
    theirs = Preprocessing(height=16, width=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    prior = Model(toy.spec.model_copy(update={"preprocessing": theirs}), toy.net)
    pixels = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    joint = JointNetwork(prior, plain(), own)
    found = joint.as_prior(torch.from_numpy(own.normalise(pixels)))
    np.testing.assert_allclose(found.numpy(), theirs.normalise(pixels), atol=1e-5)


def test_the_prior_sees_its_own_size(toy, rng) -> None:
    own = Preprocessing(height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    joint = JointNetwork(Model(toy.spec, toy.net), plain(), own)
    images = torch.from_numpy(rng.standard_normal((2, 3, 32, 32), np.float32))
    # To half the size, antialiased bilinear interpolation weighs four neighbours 1, 3, 3, 1.
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(weights, weights).expand(3, 1, 4, 4)
    expected = F.conv2d(images, kernel, stride=2, padding=1, groups=3)
    found = joint.as_prior(images)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=1e-5)


def test_the_outputs_are_those_of_the_model(toy) -> None:
    net, images = plain(classes=7), torch.randn(2, 3, 16, 16)
    joint = JointNetwork(Model(toy.spec, toy.net), net, toy.spec.preprocessing)
    torch.testing.assert_close(joint(images), net(images))


def test_a_factory_is_given_the_input_of_the_model(toy) -> None:
    found = source.load_prior(request(toy, plain(), argument="tests.torch.test_prior:trained"))
    assert found.spec.input_shape == (3, 16, 16)
    assert found.spec.preprocessing.mean == (0.5, 0.5, 0.5)


def trained():
    net = ToyNet().train()
    with torch.no_grad():
        net(torch.randn(8, 3, 16, 16) + 1)
    return net


def test_networks_that_cannot_be_a_prior(toy) -> None:
    with pytest.raises(ModelError, match="vit-cifar10 has no BatchNorm layer"):
        source.load_prior(request(toy, plain(), argument="vit-cifar10"))
    grey = toy.spec.model_copy(update={"input_shape": (1, 16, 16)})
    with pytest.raises(UsageError, match="takes 3 channels, and toy takes 1"):
        source.load_prior(Request(count=1, seed=0, spec=grey, argument="resnet20-cifar10"))
    with pytest.raises(UsageError, match="Unknown model 'resnet21'|resnet21"):
        source.load_prior(request(toy, plain(), argument="resnet21"))
    with pytest.raises(UsageError, match="expected prior:MODEL"):
        generate("prior", request(toy, plain(), argument=""))
