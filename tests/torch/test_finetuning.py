"""Fine-tuning against OpenVINO, against formulas written down again, and by what it is for."""

import itertools

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as ops
from torch.nn import functional as F

from ovcalib.errors import ModelError
from ovcalib.evaluation.metrics import nmse
from ovcalib.export.to_onnx import to_onnx
from ovcalib.graph.files import read_graph
from ovcalib.graph.reading import (
    activation_quantizers,
    constant_value,
    integer_weights,
    is_constant,
    quantized_layers,
    quantizers_by_range,
    scale_count,
)
from ovcalib.kernels import without_saturation
from ovcalib.models.graph_module import GraphModule, check_module
from ovcalib.quantization import finetuning
from ovcalib.quantization.finetuning import (
    Pair,
    TrainedRange,
    as_module,
    augmented,
    distillation_loss,
    finetune,
    refuse_unknown_operations,
    train,
)
from ovcalib.quantization.low_bits import Bits, simulate
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import outputs_of

PLAIN = Settings(overflow_fix="disable", bias_correction="none")


class Mixed(torch.nn.Module):
    """Layers of every kind that is trained: convolutions, grouped and depthwise ones, and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.depth = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        # OpenVINO (2026.4) crashes where ONEDNN_MAX_CPU_ISA=AVX2 and a LayerNorm's width is no multiple of 16.
        self.group = torch.nn.Conv2d(8, 16, 1, groups=2)
        self.norm, self.wide, self.out = torch.nn.LayerNorm(16), torch.nn.Linear(16, 20), torch.nn.Linear(20, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + F.relu(self.depth(x))
        x = self.group(x).mean((2, 3))
        return self.out(F.gelu(self.wide(self.norm(x))))


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A float graph and what quantization at 4 bits makes of it, and images that it has seen and that it has not."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("mixed") / "mixed.onnx"
    to_onnx(Mixed().eval(), (3, 16, 16), path)
    fp32 = read_graph(path)
    images = toy.calibration(64).inputs()
    int8 = quantize_default(fp32, toy.calibration(32), PLAIN)
    coarse = simulate(fp32, int8, Bits(weights=4, activations=8, edges="full"), images[:32])
    return fp32, coarse, images[:32], images[32:]


def bias_of(layer):
    (value,) = (value for value in layer.add.input_values() if is_constant(value))
    return constant_value(value).reshape(-1)


def ends_of(quantizer):
    return [constant_value(quantizer.input_value(i)) for i in (1, 2)]


def stack(images):
    return torch.from_numpy(np.concatenate(images))


# The graph in torch ---------------------------------------------------------------------------


def test_a_quantized_graph_computes_in_torch_what_it_computes_in_openvino(made) -> None:
    _, int8, _, images = made
    module = as_module(int8.clone())
    with torch.no_grad():
        (found,) = module.outputs(stack(images))
    expected = outputs_of(without_saturation(int8), images)
    # A value between two levels is rounded either way.
    assert np.median(np.abs(found.numpy() - expected)) < 1e-5
    assert nmse(expected, found.numpy()) < 1e-3


@pytest.mark.parametrize("by_channel", [False, True])
def test_values_are_quantized_as_by_openvino(rng, by_channel) -> None:
    x = ops.parameter([1, 4, 5, 5], np.float32)
    high = rng.uniform(0.5, 3, (1, 4, 1, 1) if by_channel else (1, 1, 1, 1)).astype(np.float32)
    low = (-high / 127 * 128).astype(np.float32)
    low[..., 0, 0].flat[0] = 0
    values = [ops.constant(end) for end in (low, high, low, high)]
    graph = ov.Model([ops.fake_quantize(x, *values, 256)], [x], "quantizer")
    image = rng.normal(0, 2, (1, 4, 5, 5)).astype(np.float32)
    with torch.no_grad():
        (found,) = GraphModule(graph, "quantizer").outputs(torch.from_numpy(image))
    expected = outputs_of(graph, [image]).reshape(image.shape)
    difference = np.abs(found.numpy() - expected)
    assert np.mean(difference > 1e-5) < 0.02
    assert np.all(difference <= (high - low) / 255 * 1.001)


@pytest.mark.parametrize("eps_mode", ["inside_sqrt", "outside_sqrt"])
def test_attention_shuffles_and_axes_without_a_batch_are_computed_for_batches(rng, eps_mode) -> None:
    """Shapes that OpenVINO folds for one image: a single axis that is taken apart and put together again."""
    x = ops.parameter([1, 6, 4, 4], np.float32)
    tokens = ops.transpose(ops.reshape(x, ops.constant(np.array([1, 6, 16])), False), ops.constant(np.array([0, 2, 1])))
    heads = ops.reshape(tokens, ops.constant(np.array([1, 2, 16, 3])), False)
    mask = ops.constant(rng.normal(size=(16, 16)).astype(np.float32))
    attended = ops.scaled_dot_product_attention(heads, heads, heads, mask, ops.constant(np.float32(0.3)))
    attended = ops.shuffle_channels(attended, 2, 4)
    normal = ops.mvn(attended, ops.constant(np.array([-1])), True, 0.1, eps_mode)
    flat = ops.reshape(normal, ops.constant(np.array([96])), False)
    order = ops.constant(np.arange(96)[::-1].reshape(1, 32, 3).copy())
    taken = ops.gather(ops.relu(flat), order, ops.constant(np.array(0)))
    graph = ov.Model([ops.softmax(taken, 1)], [x], "tokens")
    check_module(GraphModule(graph, "tokens"), graph, "tokens")


# The loss and what is trained -----------------------------------------------------------------


def test_the_loss_is_errors_in_units_of_variances(rng) -> None:
    found = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 3, 2, 2), (4, 5), (4, 7))]
    wanted = [rng.normal(size=value.shape).astype(np.float32) for value in found]
    powers = [0.5, 2.0, 3.0]
    first, second, output = (
        sum((a - b) ** 2 for a, b in zip(x.ravel(), y.ravel(), strict=True)) / x.size / power
        for x, y, power in zip(found, wanted, powers, strict=True)
    )
    loss = distillation_loss(list(map(torch.from_numpy, found)), list(map(torch.from_numpy, wanted)), powers, 1)
    assert float(loss) == pytest.approx((first + second) / 2 + 0.25 * output, rel=1e-5)


def test_what_hardly_varies_counts_by_its_square(rng) -> None:
    values = rng.normal(2, 0.5, (6, 3, 4)).astype(np.float32)
    assert finetuning.power_of(torch.from_numpy(values)) == pytest.approx(values.var(axis=0).mean(), rel=1e-5)
    steady = torch.full((6, 3), 2.0)
    assert finetuning.power_of(steady) == pytest.approx(0.001 * 4)
    assert finetuning.power_of(torch.zeros(6, 3)) == pytest.approx(1e-12)


def test_images_are_moved_and_flipped_and_nothing_else(rng) -> None:
    images = torch.from_numpy(rng.normal(size=(40, 3, 16, 16)).astype(np.float32))
    found = augmented(images, torch.Generator().manual_seed(0))
    seen = set()
    for image, other in zip(images.numpy(), found.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        ways = [
            (top, left, flip)
            for top, left, flip in itertools.product(range(5), range(5), (False, True))
            if np.array_equal(padded[:, top : top + 16, left : left + 16][:, :, :: -1 if flip else 1], other)
        ]
        assert len(ways) == 1
        seen.add(ways[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {False, True}


def test_a_layer_starts_at_its_integers_as_near_to_its_float_weights_as_they_allow(made) -> None:
    fp32, int8, _, _ = made
    pair = Pair.of(fp32, int8)
    assert [layer.rounding.layer.op.get_type_name() for layer in pair.layers] == [
        "Convolution", "GroupConvolution", "GroupConvolution", "MatMul", "MatMul",
    ]  # fmt: skip
    for layer in pair.layers:
        units, rounding = layer.units.detach().numpy(), layer.rounding
        np.testing.assert_array_equal(layer.integers(), rounding.plain)
        exact = rounding.exact / rounding.scale[..., None]
        near = np.abs(exact - rounding.plain) < 0.4
        np.testing.assert_allclose(units[near], exact[near], atol=1e-4)
        assert near.mean() > 0.6
        assert np.abs(units - rounding.plain).max() <= 0.4 + 1e-5
    for layer, quantized in zip(pair.layers, quantized_layers(int8), strict=True):
        integers, scale = integer_weights(quantized)
        weights, bias = layer.tensors().values()
        np.testing.assert_allclose(weights.detach().numpy().reshape(integers.shape), integers * scale, rtol=1e-5)
        assert layer.growth.numel() == scale_count(quantized)
        assert not layer.growth.any()
        torch.testing.assert_close(bias.detach(), layer.before)


def test_gradients_go_straight_through_and_end_at_the_limit(made) -> None:
    fp32, int8, _, _ = made
    layer = Pair.of(fp32, int8).layers[0]
    with torch.no_grad():
        layer.units.view(-1)[:2] = torch.tensor([7.8, -9.0])  # beyond the limit of 7
        layer.growth += 0.5
    weights, bias = layer.tensors().values()
    slope = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    ((weights * slope).sum() + bias.sum()).backward()
    expected = slope.reshape(layer.units.shape) * layer.scale * np.exp(0.5)
    inside = layer.units.detach().round().abs() <= layer.rounding.limit
    assert not inside.all()
    torch.testing.assert_close(layer.units.grad, torch.where(inside, expected, 0.0))
    torch.testing.assert_close(layer.shift.grad, torch.full_like(layer.shift, layer.unit))
    of_scales = (slope * weights.detach()).reshape(layer.units.shape).sum(2, keepdim=True)
    torch.testing.assert_close(layer.growth.grad, of_scales)


def test_a_range_grows_as_lsq_has_it(rng) -> None:
    """The gradient of a step is that of a level for values beyond the range, and of the rounding error for others."""
    x = ops.parameter([1, 2, 5, 5], np.float32)
    high = np.array([1.5, 0.7], np.float32).reshape(1, 2, 1, 1)
    low = (-high / 7 * 8).astype(np.float32)
    graph = ov.Model([ops.fake_quantize(x, *map(ops.constant, (low, high, low, high)), 16)], [x], "quantizer")
    module = GraphModule(graph, "quantizer")
    (key,) = (key for key in module.state_dict() if key.endswith("step"))
    image, slope = (rng.normal(size=(3, 2, 5, 5)).astype(np.float32) for _ in range(2))
    step = module.state_dict()[key].clone().requires_grad_()
    values = torch.from_numpy(image).requires_grad_()
    found = torch.func.functional_call(module, {key: step}, (values,))
    (found * torch.from_numpy(slope)).sum().backward()
    expected, passes = np.zeros(2), np.zeros(image.shape)
    for (n, c, i, j), value in np.ndenumerate(image):
        size = high[0, c, 0, 0] / 7
        units = value / size
        inside = -8 <= units <= 7
        level = np.clip(np.rint(units), -8, 7)
        expected[c] += slope[n, c, i, j] * (level - units * inside)
        passes[n, c, i, j] = inside
    np.testing.assert_allclose(step.grad.reshape(-1), expected, rtol=1e-4)
    np.testing.assert_allclose(values.grad, slope * passes, rtol=1e-5)
    assert 0 < passes.mean() < 1


def test_quantizers_of_one_range_keep_one_and_that_of_pixels_stays(rng) -> None:
    x = ops.parameter([1, 3, 8, 8], np.float32)

    def quantizer(value, high):
        return ops.fake_quantize(value, *(ops.constant(np.float32(end)) for end in (0, high, 0, high)), 256)

    seen = quantizer(x, 3.0)
    joined = ops.concat([quantizer(ops.relu(seen), 2.0), quantizer(ops.sigmoid(seen), 2.0)], 1)
    wide, empty = quantizer(ops.tanh(joined), 1.0), quantizer(ops.tanh(seen), 0.0)
    graph = ov.Model([ops.reduce_mean(wide, ops.constant(np.array([2, 3]))), empty], [x], "ranges")
    names = [[fq.get_friendly_name() for fq in group] for group in quantizers_by_range(graph)]
    concatenated = [value.get_node().get_friendly_name() for value in joined.input_values()]
    assert sorted(map(sorted, names)) == sorted([sorted(concatenated), [wide.get_friendly_name()]])
    module = GraphModule(graph, "ranges")
    keys = [module.tensors[value.get_node().get_name()] for value in joined.input_values()]
    one = TrainedRange(concatenated, keys, module)
    with torch.no_grad():
        one.growth.add_(np.log(1.5))
    steps = {key: float(value.detach()) for key, value in one.tensors().items()}
    assert steps == pytest.approx(dict.fromkeys(keys, 3 / 255))
    assert one.factors() == dict.fromkeys(concatenated, pytest.approx(1.5))


def test_one_step_is_adams_on_the_loss_of_all_layers(made, monkeypatch) -> None:
    """Adam's first step moves by its rate against the sign of the gradient."""
    fp32, int8, images, _ = made
    monkeypatch.setattr(finetuning, "augmented", lambda x, generator: x)
    pair, again = Pair.of(fp32, int8), Pair.of(fp32, int8)
    x = stack(images)
    assert train(pair, x, torch.Generator().manual_seed(0), 1, lambda done: None, lambda: False) == 1
    with torch.no_grad():
        wanted = again.teacher.outputs(x)
    power = [float(value.numpy().var(axis=0).mean()) for value in wanted]
    for layer, of_output in zip(again.layers, power, strict=False):
        layer.unit = of_output**0.5
    found = torch.func.functional_call(again.student, again.tensors(), (x,))
    errors = [((a - b) ** 2).mean() / of_output for a, b, of_output in zip(found, wanted, power, strict=True)]
    assert len(errors) == len(again.layers) + 1
    (sum(errors[:-1]) / len(again.layers) + 0.25 * errors[-1]).backward()
    for layer, start in zip(pair.layers, again.layers, strict=True):
        for name, rate in (("units", 0.005), ("growth", 0.01), ("shift", 0.0001)):
            gradient = getattr(start, name).grad
            moved = (getattr(layer, name) - getattr(start, name)).detach()
            clear = gradient.abs() > 1e-5
            assert clear.float().mean() > 0.8
            torch.testing.assert_close(moved[clear], -rate * gradient[clear].sign(), rtol=0.02, atol=1e-6)
        assert layer.unit == pytest.approx(start.unit)
    for one, same in zip(pair.ranges, again.ranges, strict=True):
        torch.testing.assert_close(one.growth.detach(), -0.01 * same.growth.grad.sign(), rtol=0.02, atol=1e-6)


def test_rates_fall_along_a_cosine_and_every_image_is_augmented_once_a_round(made, monkeypatch) -> None:
    fp32, int8, images, _ = made
    monkeypatch.setattr(finetuning, "BATCH", 8)
    seen, rates, shown = [], [], []
    pair = Pair.of(fp32, int8)
    step, outputs = torch.optim.Adam.step, pair.teacher.outputs

    def to_nothing(x, generator):
        seen.append(x)
        return 0 * x

    def watched_step(self, *arguments):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments)

    def watched_outputs(x):
        shown.append(x)
        return outputs(x)

    monkeypatch.setattr(finetuning, "augmented", to_nothing)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    monkeypatch.setattr(pair.teacher, "outputs", watched_outputs)
    train(pair, stack(images), torch.Generator().manual_seed(0), 8, lambda done: None, lambda: False)
    cosine = [(1 + np.cos(np.pi * k / 8)) / 2 for k in range(8)]
    np.testing.assert_allclose(rates, np.outer(cosine, [0.005, 0.01, 0.0001, 0.01]), rtol=1e-6)
    assert not any(x.any() for x in shown[1:])  # those that are learned from
    for k in (0, 4):
        found = np.concatenate([x.numpy() for x in seen[k : k + 4]])
        assert sorted(image.sum() for image in found) == sorted(image.sum() for image in np.concatenate(images))
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))


# The whole ------------------------------------------------------------------------------------


def test_it_reduces_the_error_on_images_that_it_has_not_seen(made) -> None:
    fp32, int8, images, unseen = made
    before = [integer_weights(layer) for layer in quantized_layers(int8)]
    done: list[int] = []
    tuned, steps = finetune(fp32, int8, images, steps=60, tick=done.append)
    assert steps == 60
    assert done == list(range(1, 61))
    reference = outputs_of(fp32, unseen)
    old, new = (nmse(reference, outputs_of(without_saturation(graph), unseen)) for graph in (int8, tuned))
    assert new < 0.6 * old
    changed = 0
    for layer, (integers, scale) in zip(quantized_layers(tuned), before, strict=True):
        own, same = integer_weights(layer)
        np.testing.assert_allclose(same, scale, rtol=0.2)  # `test_what_is_written_is_what_was_trained` has them exactly
        assert (same != scale).any()
        assert np.abs(own).max() <= 7
        changed += int((own != integers).sum())
    assert changed > 0
    for layer, (integers, _) in zip(quantized_layers(int8), before, strict=True):
        np.testing.assert_array_equal(integer_weights(layer)[0], integers)


def test_what_is_written_is_what_was_trained(made) -> None:
    fp32, int8, images, unseen = made
    pair = Pair.of(fp32, int8)
    train(pair, stack(images), torch.Generator().manual_seed(finetuning.SEED), 5, lambda done: None, lambda: False)
    with torch.no_grad():
        found = torch.func.functional_call(pair.student, pair.tensors(), (stack(unseen),))[-1].numpy()
    tuned, _ = finetune(fp32, int8, images, steps=5)
    written = outputs_of(without_saturation(tuned), unseen)
    assert nmse(written, found) < 1e-3
    assert nmse(outputs_of(without_saturation(int8), unseen), found) > 4 * nmse(written, found)
    for layer, before, after in zip(pair.layers, quantized_layers(int8), quantized_layers(tuned), strict=True):
        gained = bias_of(after) - (0 if before.add is None else bias_of(before))
        np.testing.assert_allclose(gained, layer.unit * layer.shift.detach().numpy(), atol=1e-5)
        assert np.abs(gained).max() > 0
        factor = np.exp(layer.growth.detach().numpy()).reshape(-1)
        scales = [integer_weights(one)[1].reshape(len(factor), -1)[:, 0] for one in (before, after)]
        np.testing.assert_allclose(scales[1], scales[0] * factor, rtol=1e-5)
        assert (factor != 1).all()
    own = {name: factor for one in pair.ranges for name, factor in one.factors().items()}
    for before, after in zip(activation_quantizers(int8), activation_quantizers(tuned), strict=True):
        ends = [np.stack(ends_of(fq)) for fq in (before, after)]
        factor = own.pop(before.get_friendly_name(), np.float32(1))
        np.testing.assert_allclose(ends[1], ends[0] * factor, rtol=1e-6)
    assert not own


def test_weights_that_have_inputs_first_are_written_as_they_lie(rng, toy, monkeypatch) -> None:
    monkeypatch.setattr(finetuning, "WEIGHT_RATE", 0.05)  # a few steps do
    x = ops.parameter([1, 3, 16, 16], np.float32, "x")
    weights = rng.normal(size=(768, 6)).astype(np.float32)
    product = ops.matmul(ops.reshape(x, ops.constant(np.array([1, 768])), False), ops.constant(weights), False, False)
    product.set_friendly_name("product")
    fp32 = ov.Model([product], [x], "product")
    int8 = quantize_default(fp32, toy.calibration(8), PLAIN)
    (layer,) = Pair.of(fp32, int8).layers
    assert layer.rounding.turned
    images = toy.calibration(16).inputs()
    coarse = simulate(fp32, int8, Bits(weights=3, edges="full"), images)
    tuned, _ = finetune(fp32, coarse, images, steps=30)
    assert integer_weights(quantized_layers(tuned)[0])[0].shape == weights.shape
    reference = outputs_of(fp32, images)
    old, new = (nmse(reference, outputs_of(without_saturation(graph), images)) for graph in (coarse, tuned))
    assert new < 0.8 * old


def test_a_small_memory_makes_small_batches(made, monkeypatch) -> None:
    fp32, int8, images, _ = made
    pair = Pair.of(fp32, int8)
    assert finetuning.batch_size(pair) == finetuning.BATCH
    values = 8 * 8 * 8 + 8 * 8 * 8 + 16 * 8 * 8 + 20 + 5
    monkeypatch.setattr(finetuning, "BATCH_BYTES", 4 * finetuning.COPIES * values * 3)
    assert finetuning.batch_size(pair) == 3
    monkeypatch.setattr(finetuning, "BATCH_BYTES", 1)
    assert finetune(fp32, int8, images, steps=1)[1] == 1


def test_time_that_is_up_ends_it(made) -> None:
    fp32, int8, images, _ = made
    asked = iter([False, False, True])
    tuned, steps = finetune(fp32, int8, images, 300, out_of_time=lambda: next(asked))
    assert steps == 2
    assert len(quantized_layers(tuned)) == len(quantized_layers(int8))


def test_what_torch_does_not_know_is_refused_before_anything_else(made) -> None:
    fp32, _, images, _ = made
    refuse_unknown_operations(fp32, "mixed")
    x = ops.parameter([1, 3, 8, 8], np.float32)
    graph = ov.Model([ops.reverse_sequence(x, ops.constant(np.array([4])), 0, 2)], [x], "odd")
    with pytest.raises(
        ModelError, match=r"odd: the operation ReverseSequence .* cannot be fine-tuned. Omit `finetune`"
    ):
        refuse_unknown_operations(graph, "odd")
    with pytest.raises(ModelError, match="No layer computes in INT8"):
        finetune(fp32, fp32, images, 1)
