"""Block reconstruction: blocks by a brute-force search for values that everything passes through, and losses, steps and
schedules written down again."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovcalib.evaluation.metrics import nmse
from ovcalib.export.to_onnx import to_onnx
from ovcalib.graph.editing import float_activations, set_levels
from ovcalib.graph.files import read_graph
from ovcalib.graph.reading import (
    activation_quantizers,
    constant_value,
    integer_weights,
    quantizable_operations,
    quantized_layers,
    signal_names,
)
from ovcalib.kernels import without_saturation
from ovcalib.models.builtin import build
from ovcalib.quantization import reconstruction
from ovcalib.quantization.adaround import beta_at, softly, undecided
from ovcalib.quantization.low_bits import Bits, simulate
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.reconstruction import (
    Schedule,
    SoftRounding,
    blocks_of,
    part,
    reconstruct,
    reconstruction_loss,
)
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import outputs_of

PLAIN = Settings(overflow_fix="disable", bias_correction="none")


class Branched(torch.nn.Module):
    """A residual block, two layers in a row, two side by side, a gate that multiplies, and an end of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (torch.nn.Conv2d(a, 8, 3, padding=1) for a in (3, 8, 8))
        self.row, self.left, self.right = torch.nn.Conv2d(8, 8, 1), *(torch.nn.Conv2d(8, 8, 3, 2, 1) for _ in range(2))
        self.gate, self.out, self.side = (torch.nn.Linear(16, n) for n in (16, 5, 2))
        # Outputs of about 1, as a trained network has them: the error is weighed against a constant.
        for weight in (value for value in self.parameters() if value.ndim > 1):
            torch.nn.init.kaiming_normal_(weight)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        x = F.relu(self.row(x))
        pooled = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1).mean((2, 3))
        x = pooled * torch.sigmoid(self.gate(pooled))
        return self.out(x), self.side(x)


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A float graph and what nearest rounding at 4 bits makes of it, and images that it has seen and that it has not."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("branched") / "branched.onnx"
    to_onnx(Branched().eval(), (3, 16, 16), path)
    fp32 = read_graph(path)
    images = toy.calibration(64).inputs()
    int8 = quantize_default(fp32, toy.calibration(32), PLAIN)
    return fp32, simulate(fp32, int8, Bits(4, 4, "full"), images[:32]), images[:32], images[32:]


def stack(images):
    return torch.from_numpy(np.concatenate(images))


# Blocks ---------------------------------------------------------------------------------------


def separators(graph):
    """Names of the operations without whose one value no output is reached from the input, in order, by trying each."""
    signals = signal_names(graph)
    order = [op for op in graph.get_ordered_ops() if op.get_name() in signals]
    found = []
    for removed in order:
        reached = {op.get_name() for op in graph.get_parameters()} - {removed.get_name()}
        for op in order:
            if op.get_name() != removed.get_name() and any(
                value.get_node().get_name() in reached for value in op.input_values()
            ):
                reached.add(op.get_name())
        values = [port for port in removed.outputs() if port.get_target_inputs()]
        if len(values) == 1 and not any(result.get_name() in reached for result in graph.get_results()):
            found.append(removed.get_friendly_name())
    return found


def names_of(graph):
    return [op.name for op in quantizable_operations(graph) if op.weights is not None]


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv3_small", "shufflenetv2_x0_5", "vgg11_bn", "vit", None])
def test_blocks_lie_between_values_that_everything_passes_through(name, made, tmp_path) -> None:
    fp32 = made[0]
    if name is not None:
        to_onnx(build(f"{name}-cifar10").eval(), (3, 32, 32), tmp_path / "net.onnx")
        fp32 = read_graph(tmp_path / "net.onnx")
    layers, through = names_of(fp32), separators(fp32)
    order = [op.get_friendly_name() for op in fp32.get_ordered_ops()]
    position = {found: i for i, found in enumerate(order)}
    blocks = blocks_of(fp32, layers)
    assert [layer for block in blocks for layer in block.layers] == [name for name in order if name in layers]
    assert (blocks[0].first, blocks[-1].last) == (None, None)
    for block, after in itertools.pairwise(blocks):
        assert block.last == after.first
        # The last of the values in question before the next layer.
        behind, before = position[block.layers[-1]], position[after.layers[0]]
        assert block.last == [name for name in through if behind <= position[name] < before][-1]
    for block in blocks:
        for one, two in itertools.pairwise(block.layers):
            assert not [name for name in through if position[one] <= position[name] < position[two]]


def test_the_blocks_of_a_network_one_after_the_other_are_the_network(made) -> None:
    fp32, coarse, _, images = made
    blocks = blocks_of(fp32, names_of(fp32))
    assert [len(block.layers) for block in blocks] == [1, 2, 1, 2, 1, 2]
    for graph in (fp32, without_saturation(coarse)):
        values = images[:4]
        for block in blocks[:-1]:
            piece = part(graph, block)
            shape = list(piece.outputs[0].get_shape())
            values = [found.reshape(shape).astype(np.float32) for found in outputs_of(piece, values)]
        np.testing.assert_allclose(
            outputs_of(part(graph, blocks[-1]), values), outputs_of(graph, images[:4]), atol=1e-5
        )


# The losses and what is trained ---------------------------------------------------------------


def test_the_loss_sums_channels_and_averages_images_and_positions(rng) -> None:
    shapes = ((4, 3, 2, 2), (4, 5))
    found, wanted = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    expected = sum(
        sum(abs(a[n, c, i, j] - b[n, c, i, j]) ** 2.4 for c in range(3)) / (4 * 4)
        for a, b in ((found[0], wanted[0]),)
        for n, i, j in np.ndindex(4, 2, 2)
    ) + sum(abs(found[1][n, c] - wanted[1][n, c]) ** 2.4 / 4 for n, c in np.ndindex(4, 5))
    loss = reconstruction_loss(list(map(torch.from_numpy, found)), list(map(torch.from_numpy, wanted)), 2.4)
    assert float(loss) == pytest.approx(expected)


def test_what_is_left_to_decide_counts_by_adarounds_weight() -> None:
    v = torch.tensor([[-0.3, 0.0], [1.0, 9.0]])
    left = sum(1 - abs(2 * h - 1) ** 3 for h in softly(v).ravel().tolist())
    assert float(undecided(softly(v), 3.0)) == pytest.approx(0.01 * left)
    assert float(undecided(softly(v), None)) == 0


@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_starts_at_its_float_weights_and_ends_at_the_nearer_integers(rng, turned) -> None:
    exact, scale = rng.uniform(-2, 2, (1, 4, 6)), rng.uniform(0.4, 0.6, (1, 4))
    rounding: Any = SimpleNamespace(exact=exact, scale=scale, limit=7, turned=turned)
    module: Any = SimpleNamespace(state_dict=lambda: {"weight": torch.zeros(6, 4) if turned else torch.zeros(4, 6)})
    layer = SoftRounding(rounding, "weight", module)

    def weights():
        found = layer.tensors()["weight"].detach().numpy()
        return found.T if turned else found

    np.testing.assert_allclose(weights(), rounding.exact[0], atol=1e-5)
    layer.decide()
    nearest = np.rint(rounding.exact / rounding.scale[..., None])
    np.testing.assert_array_equal(layer.integers(), nearest)
    np.testing.assert_allclose(weights(), (nearest * rounding.scale[..., None])[0], rtol=1e-5)


def test_a_shorter_schedule_goes_as_far() -> None:
    assert Schedule() == Schedule(20_000, 5_000, 1e-3, 4e-4, 32)
    short = Schedule.shortened(200, 8)
    assert (short.weight_steps, short.range_steps, short.batch) == (200, 50, 8)
    assert (short.weight_rate, short.range_rate) == pytest.approx((0.1, 0.04))
    assert Schedule.shortened(1).range_steps == 1
    with pytest.raises(ValueError, match="0 steps, but there must be at least one"):
        Schedule.shortened(0)


class Watched:
    """The tasks of both phases, what is trained, and what was learned of it: before and after."""

    def __init__(self, monkeypatch) -> None:
        self.phases: dict[str, list[Any]] = {"learn_rounding": [], "learn_ranges": []}
        for name, seen in self.phases.items():
            original = getattr(reconstruction, name)
            monkeypatch.setattr(reconstruction, name, self.recording(seen, original))

    @staticmethod
    def recording(seen, original):
        def values(trained):
            return [getattr(one, "v" if hasattr(one, "v") else "growth").detach().clone() for one in trained]

        def learn(task, trained, steps, rate):
            before = values(trained)
            original(task, trained, steps, rate)
            seen.append((task, trained, before, values(trained)))

        return learn


def test_each_block_learns_what_fp32_gives_from_what_quantized_blocks_give(made, monkeypatch) -> None:
    """Its weights behind rounded weights and float activations, its ranges behind everything as it is shipped."""
    fp32, coarse, images, _ = made
    watched = Watched(monkeypatch)
    result = reconstruct(fp32, coarse, images, Schedule(2, 2, 1.0, 0.2))
    blocks = blocks_of(fp32, names_of(fp32))
    # The first block has no range but that of pixels.
    phases = (
        ("learn_rounding", float_activations(result), blocks),
        ("learn_ranges", without_saturation(result), blocks[1:]),
    )
    for name, graph, own in phases:
        for block, (task, _, _, _) in zip(own, watched.phases[name], strict=True):
            wanted = outputs_of(part(fp32, reconstruction.Block((), None, block.last)), images)
            found = torch.cat([value.flatten(1) for value in task.wanted], 1)
            np.testing.assert_allclose(found, wanted, atol=1e-4)
            source = np.concatenate(images).reshape(len(images), -1)
            if block.first is not None:
                source = outputs_of(part(graph, reconstruction.Block((), None, block.first)), images)
            assert nmse(source, task.source.flatten(1).numpy()) < 1e-3


def test_one_step_is_adams_on_the_loss_of_a_block(made, monkeypatch) -> None:
    """Adam's first step moves by its rate against the sign of the gradient; without a regularizer in the first fifth."""
    fp32, coarse, images, _ = made
    watched = Watched(monkeypatch)
    reconstruct(fp32, coarse, images, Schedule(1, 1, 0.01, 0.02))
    for phase, power, rate in (("learn_rounding", 2, 0.01), ("learn_ranges", 2.4, 0.02)):
        for task, trained, values, moved in watched.phases[phase]:
            tensors, leaves = {}, [value.requires_grad_() for value in values]
            for one, leaf in zip(trained, leaves, strict=True):
                if phase == "learn_rounding":
                    h = (torch.sigmoid(leaf) * 1.2 - 0.1).clamp(0, 1)
                    exact, scale = (torch.from_numpy(v) for v in (one.rounding.exact, one.rounding.scale[..., None]))
                    weights = scale * ((exact / scale).floor() + h).clamp(-one.rounding.limit, one.rounding.limit)
                    tensors[one.key] = (weights[0].T if one.rounding.turned else weights).reshape(one.shape).float()
                else:
                    tensors |= {key: one.before * leaf.exp() for key in one.keys}
            found = torch.func.functional_call(task.student, tensors, (task.source,))
            found = found if isinstance(found, list) else [found]
            errors = [(a - b).abs() ** power for a, b in zip(found, task.wanted, strict=True)]
            sum(error.sum() / (error.numel() / error.shape[1]) for error in errors).backward()
            for leaf, end in zip(leaves, moved, strict=True):
                clear = leaf.grad.abs() > 1e-5
                torch.testing.assert_close(
                    (end - leaf.detach())[clear], -rate * leaf.grad[clear].sign(), rtol=0.02, atol=1e-5
                )
    assert len(watched.phases["learn_rounding"]) == 6


def test_a_step_has_as_many_images_as_the_schedule_says(made, monkeypatch) -> None:
    """And each step other ones."""
    fp32, coarse, images, _ = made
    steps = []
    original = reconstruction.block_outputs

    def watched(module, x, tensors):
        if torch.is_grad_enabled():
            steps.append(x.detach())
        return original(module, x, tensors)

    monkeypatch.setattr(reconstruction, "block_outputs", watched)
    reconstruct(fp32, coarse, images, Schedule(8, 1, 0.01, 0.02, 3))
    assert {len(x) for x in steps} == {3}
    assert len(torch.cat(steps[:8]).flatten(1).unique(dim=0)) > 3  # of the first block


def test_the_regularizer_and_the_rates_follow_the_schedule(made, monkeypatch) -> None:
    fp32, coarse, images, _ = made
    betas, rates = [], []
    told: list[int] = []
    step = torch.optim.Adam.step

    def watched_undecided(h, beta):
        betas.append(beta)
        return undecided(h, beta)

    def watched_step(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(reconstruction, "undecided", watched_undecided)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    reconstruct(fp32, coarse, images, Schedule(10, 4, 0.01, 0.02), tick=told.append)
    of_layers = [len(block.layers) for block in blocks_of(fp32, names_of(fp32))]
    assert betas == [beta_at(i, 10) for layers in of_layers for i in range(10) for _ in range(layers)]
    cosine = [0.02 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)]
    np.testing.assert_allclose(rates, [*[0.01] * 60, *cosine * 5])
    assert told == list(range(1, 81))


# The whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(made):
    fp32, coarse, images, _ = made
    return reconstruct(fp32, coarse, images, Schedule.shortened(200))


def test_images_that_it_has_not_seen_have_a_smaller_error_than_with_nearest_rounding(made, learned) -> None:
    fp32, coarse, _, images = made
    before = outputs_of(fp32, images)
    nearest, ours = (nmse(before, outputs_of(without_saturation(graph), images)) for graph in (coarse, learned))
    assert ours < 0.7 * nearest


def test_every_weight_is_next_to_its_float_value(made, learned) -> None:
    fp32, coarse, _, _ = made
    exact = {op.name: op.weights for op in quantizable_operations(fp32)}
    moved = 0
    for layer, before in zip(quantized_layers(learned), quantized_layers(coarse), strict=True):
        integers, scale = integer_weights(layer)
        nearest, _ = integer_weights(before)
        weights = exact[layer.name]
        units = (weights[0, :, :, 0] if integers.ndim == 2 else weights.reshape(integers.shape)) / scale
        assert np.all((np.abs(integers - units) < 1) | (np.abs(integers) == 7))
        assert np.abs(integers).max() <= 7
        moved += int((integers != nearest).sum())
    assert moved > 0


def test_a_range_that_blocks_share_is_learned_once_and_stays_shared(made, monkeypatch) -> None:
    fp32, coarse, images, _ = made
    coarse = coarse.clone()
    quantizers = {fq.get_friendly_name(): fq for fq in activation_quantizers(coarse)}
    shared = ["Relu/fq_output_0", "ReduceMean/fq_output_0"]
    for name in shared:
        set_levels(quantizers[name], 16, *(np.full((1, 1, 1, 1), end, np.float32) for end in (0, 3)))
    watched = Watched(monkeypatch)
    result = reconstruct(fp32, coarse, images, Schedule(1, 3, 1e-3, 0.05))
    names = [name for _, ranges, _, _ in watched.phases["learn_ranges"] for one in ranges for name in one.names]
    assert sorted(names) == sorted(set(names))
    after = {fq.get_friendly_name(): constant_value(fq.input_value(2)).item() for fq in activation_quantizers(result)}
    assert len({after[name] for name in shared}) == 1
    assert after[shared[0]] != 3


def test_a_network_without_quantized_layers_stays_as_it_is(made) -> None:
    fp32, _, images, _ = made
    np.testing.assert_array_equal(outputs_of(reconstruct(fp32, fp32, images), images), outputs_of(fp32, images))


@pytest.mark.parametrize("quantized", [False, True])
def test_probabilities_are_compared_before_the_softmax_but_where_they_are_quantized(
    toy, tmp_path, monkeypatch, quantized
) -> None:
    head = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 196, 5)
    )
    to_onnx(torch.nn.Sequential(head, torch.nn.Softmax(1)).eval(), (3, 16, 16), tmp_path / "net.onnx")
    fp32, images = read_graph(tmp_path / "net.onnx"), toy.calibration(8).inputs()
    watched = Watched(monkeypatch)
    int8 = quantize_default(fp32, toy.calibration(8), PLAIN)
    reconstruct(
        fp32, simulate(fp32, int8, Bits(8, 8, "full" if quantized else "academic"), images), images, Schedule(1, 1)
    )
    with torch.no_grad():
        wanted = head(stack(images)).softmax(1) if quantized else head(stack(images))
    task, *_ = watched.phases["learn_rounding"][-1]
    torch.testing.assert_close(task.wanted[0], wanted, rtol=1e-4, atol=1e-5)
    (found,) = reconstruction.all_outputs(task.student, task.source, {})
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
