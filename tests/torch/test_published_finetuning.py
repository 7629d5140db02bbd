"""The fine-tuning of publications: its loss and its steps written down again, and by what it is for."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from ovcalib.evaluation.metrics import nmse
from ovcalib.export.to_onnx import to_onnx
from ovcalib.graph.files import read_graph
from ovcalib.graph.reading import integer_weights, quantized_layers
from ovcalib.kernels import without_saturation
from ovcalib.quantization import finetuning, published_finetuning
from ovcalib.quantization.finetuning import Pair, finetune, train
from ovcalib.quantization.low_bits import Bits, simulate
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.published_finetuning import GDFQ, INTRAQ
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import outputs_of

RECIPES = pytest.mark.parametrize(
    ("recipe", "weight", "classes"), [(GDFQ, 1, 5), (INTRAQ, 20, 1)], ids=["gdfq", "intraq"]
)


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A float graph, what quantization at 3 bits of weights makes of it, and images that it has seen or not."""
    torch.manual_seed(1)
    head = torch.nn.Linear(16, 5)
    head.weight.data *= 20  # logits as large as those of a trained classifier
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("published") / "network.onnx"
    to_onnx(network.eval(), (3, 16, 16), path)
    fp32 = read_graph(path)
    images = toy.calibration(64).inputs()
    int8 = quantize_default(fp32, toy.calibration(32), Settings(overflow_fix="disable", bias_correction="none"))
    coarse = simulate(fp32, int8, Bits(weights=3, activations=8, edges="full"), images[:32])
    return fp32, coarse, images[:32], images[32:]


def loss_of(found, wanted, weight, classes):
    """Classes by FP32's own, and KL(wanted || found) at T = 20, over `classes`."""
    cross_entropy = -np.mean([row[k] for row, k in zip(log_softmax(found, 1), wanted.argmax(1), strict=True)])
    target = softmax(wanted / 20, 1)
    divergence = (target * (np.log(target) - log_softmax(found / 20, 1))).sum(1).mean()
    return cross_entropy + weight * 400 / classes * divergence


@RECIPES
def test_the_loss_is_that_of_classes_and_of_soft_logits(rng, recipe, weight, classes) -> None:
    found, wanted = rng.normal(0, 4, (2, 6, 5))
    layers = rng.normal(size=(2, 6, 3))  # what layers give does not count
    ours = recipe.loss(
        [torch.from_numpy(value) for value in (layers[0], found)],
        [torch.from_numpy(value) for value in (layers[1], wanted)], [1.0, 7.0], 1,
    )  # fmt: skip
    assert float(ours) == pytest.approx(loss_of(found, wanted, weight, classes), rel=1e-6)


@RECIPES
def test_two_steps_are_those_of_nesterov_on_weights_that_start_as_in_fp32(
    made, monkeypatch, recipe, weight, classes
) -> None:
    """Against weights, biases and momentum of their own, in units of weights."""
    fp32, int8, images, _ = made
    monkeypatch.setattr(finetuning, "augmented", lambda x, generator: x)
    monkeypatch.setattr(published_finetuning, "RATE", 0.01)  # far above what float32 resolves
    x = torch.from_numpy(np.concatenate(images))
    pair, own = Pair.of(fp32, int8), Pair.of(fp32, int8)
    train(pair, x, torch.Generator().manual_seed(0), 2, lambda done: None, lambda: False, recipe)

    weights = [torch.from_numpy(layer.rounding.exact).float().requires_grad_() for layer in own.layers]
    biases = [layer.before.clone().requires_grad_() for layer in own.layers]
    values = [*weights, *biases]
    momentum = [torch.zeros_like(value) for value in values]
    with torch.no_grad():
        wanted = own.teacher.outputs(x)[-1]
    for rate in (0.01, 0.005):  # a cosine over two steps
        tensors = {key: value for one in own.ranges for key, value in one.tensors().items()}
        for layer, w, b in zip(own.layers, weights, biases, strict=True):
            limit = layer.rounding.limit
            units = w / layer.scale
            rounded = units + (units.round().clamp(-limit, limit) - units).detach()
            # Beyond the limits there is no gradient.
            rounded = torch.where(units.round().abs() <= limit, rounded, rounded.detach())
            tensors |= {layer.keys[0]: (layer.scale * rounded).reshape(layer.shape), layer.keys[1]: b}
            if layer.rounding.turned:
                tensors[layer.keys[0]] = (layer.scale * rounded)[0].T.reshape(layer.shape)
        found = torch.func.functional_call(own.student, tensors, (x,))[-1]
        target = (wanted / 20).softmax(1)
        divergence = (target * (target.log() - (found / 20).log_softmax(1))).sum(1).mean()
        loss = torch.nn.functional.cross_entropy(found, wanted.argmax(1)) + weight * 400 / classes * divergence
        gradients = torch.autograd.grad(loss, values)
        with torch.no_grad():
            for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
                decayed = gradient + (1e-4 * value if i < len(weights) else 0)
                momentum[i] = 0.9 * momentum[i] + decayed
                value -= rate * (decayed + 0.9 * momentum[i])
    for layer, w, b in zip(pair.layers, weights, biases, strict=True):
        start = torch.from_numpy(layer.rounding.exact).float()
        moved, expected = layer.scale * layer.units.detach() - start, w.detach() - start
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(moved, expected, rtol=0.02, atol=1e-6)
        shift = b.detach() - layer.before
        torch.testing.assert_close(layer.shift.detach(), shift, rtol=0.02, atol=1e-6)
        assert not layer.growth.any()
    assert not any(one.growth.any() for one in pair.ranges)


def test_it_reduces_the_error_on_images_that_it_has_not_seen(made) -> None:
    fp32, int8, images, unseen = made
    tuned, steps = finetune(fp32, int8, images, 100, recipe=INTRAQ)
    assert steps == 100
    reference = outputs_of(fp32, unseen)
    old, new = (nmse(reference, outputs_of(without_saturation(graph), unseen)) for graph in (int8, tuned))
    assert new < 0.9 * old
    for before, after in zip(quantized_layers(int8), quantized_layers(tuned), strict=True):
        (_, scale), (integers, same) = integer_weights(before), integer_weights(after)
        np.testing.assert_array_equal(scale, same)
        assert np.abs(integers).max() <= 3
