"""BatchNorm inversion: its losses against closed forms, its bookkeeping against brute force, its promises on a toy."""

import dataclasses
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ovcalib import machine
from ovcalib.calibration import SOURCES
from ovcalib.calibration import bn_losses as losses
from ovcalib.calibration import inversion as engine
from ovcalib.calibration.bfloat16 import in_bfloat16
from ovcalib.calibration.bn_taps import find_layers, large_blocks_kept, tapped
from ovcalib.calibration.inversion_options import InversionOptions, resolve
from ovcalib.calibration.parallel import on_all_cores
from ovcalib.calibration.score import range_coverage, score_set, statistics_distance
from ovcalib.calibration.sources import Request, generate
from ovcalib.errors import ModelError, UsageError
from tests.toy import ToyNet, with_statistics_of

# Those that invert the model itself; `prior` inverts another one and has tests of its own.
METHODS = [
    name
    for name in SOURCES
    if issubclass(SOURCES[name].Options, InversionOptions) and "argument" not in SOURCES[name].NEEDS
]


def request(toy, count=6, **fields):
    return Request(count=count, seed=0, spec=toy.spec, module=toy.net, **fields)


def made(name, toy, count=6, seed=0, resume=None, tick=None, **options):
    asked = dataclasses.replace(request(toy, count), seed=seed, resume=resume, tick=tick or (lambda d, n: None))
    options = {"steps": 4, "batch": 4, "precision": "fp32", **options}
    return generate(name, asked, {key: str(value) for key, value in options.items()})


def activations(net, images):
    """Inputs of the BatchNorm layers, the plain way."""
    found = []
    hooks = [
        m.register_forward_pre_hook(lambda _, x: found.append(x[0]))
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    net(images)
    for hook in hooks:
        hook.remove()
    return found


# Memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "inside", "after"), [(32, 2, 5), (260, 2, 5), (261, 0, 0)])
def test_memory_is_kept_for_images_of_the_usual_size_alone(monkeypatch, side, inside, after) -> None:
    told = []
    libc = SimpleNamespace(mallopt=lambda *given: told.append(given), malloc_trim=lambda *given: told.append(given))
    monkeypatch.setattr("ovcalib.calibration.bn_taps.ctypes.CDLL", lambda name: libc)
    with large_blocks_kept((3, side, side)):
        assert len(told) == inside
    assert len(told) == after


# Taps --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["all images", "one by one"])
def moments_one_by_one(request, monkeypatch) -> None:
    """Moments as of small layers, and as of large ones."""
    if request.param:
        monkeypatch.setattr("ovcalib.calibration.bn_taps.LARGE_IMAGE", 0)


@pytest.mark.usefixtures("moments_one_by_one")
def test_taps_give_the_moments_the_output_and_the_gradients_of_plain_autograd(toy, rng) -> None:
    images = torch.from_numpy(rng.standard_normal((3, 3, 16, 16), dtype=np.float32))

    def objective(moments, out):
        return sum((m.sin() + s.sqrt()).sum() for m, s in moments) + out.square().sum()

    plain = images.clone().requires_grad_()
    acts = activations(toy.net, plain)
    expected_out = toy.net(plain)
    expected = [(a.mean((2, 3)), a.square().mean((2, 3))) for a in acts]
    (expected_gradient,) = torch.autograd.grad(objective(expected, expected_out), plain)

    ours = images.clone().requires_grad_()
    with tapped(find_layers(toy.net, "toy")) as taps:
        out = toy.net(ours)
        moments = [(m.mean, m.square) for m in taps.moments]
        (gradient,) = torch.autograd.grad(objective(moments, out), ours)
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(moments, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("moments_one_by_one")
def test_in_bfloat16_the_moments_and_gradients_are_those_of_float32_but_for_rounding(toy, rng) -> None:
    images = torch.from_numpy(rng.standard_normal((3, 3, 16, 16), dtype=np.float32))
    found = {}
    for half in (False, True):
        ours = images.clone().requires_grad_()
        with tapped(find_layers(toy.net, "toy")) as taps, torch.autocast("cpu", torch.bfloat16, enabled=half):
            toy.net(ours)
            assert {m.mean.dtype for m in taps.moments} == {torch.float32}
            loss = torch.stack([m.mean.square().sum() + m.square.sum() for m in taps.moments]).sum()
            (gradient,) = torch.autograd.grad(loss, ours)
            found[half] = torch.cat([torch.cat((m.mean, m.square), 1) for m in taps.moments], 1), gradient
    for rounded, exact in zip(found[True], found[False], strict=True):
        assert (rounded - exact).norm() < 0.1 * exact.norm()
        assert not torch.equal(rounded, exact)


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("AuthenticAMD", {"avx512f", "avx512_bf16"}, "bf16"),
        ("GenuineIntel", {"avx512f", "avx512_bf16"}, "fp32"),
        ("GenuineIntel", {"avx512f", "avx512_bf16", "amx_bf16"}, "bf16"),
        ("AuthenticAMD", {"avx512f"}, "fp32"),
        (None, set(), "fp32"),
    ],
)
def test_bfloat16_is_chosen_where_it_is_fast(toy, monkeypatch, vendor, flags, precision) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(machine, "cpu_vendor", lambda: vendor)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert made("bn-inversion", toy, precision="auto").provenance.options["precision"] == precision


@pytest.mark.parametrize("fields", [{}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"groups": 2, "bias": False}])
def test_a_depthwise_convolution_in_bfloat16_is_that_of_float32_but_for_rounding(fields, rng) -> None:
    conv = nn.Conv2d(8, 8, 3, **{"groups": 8, **fields}).requires_grad_(False)
    x = torch.from_numpy(rng.standard_normal((2, 8, 9, 9), dtype=np.float32)).requires_grad_()
    exact = conv(x)
    weight = torch.from_numpy(rng.standard_normal(exact.shape, dtype=np.float32))
    (expected,) = torch.autograd.grad((exact * weight).sum(), x)
    with in_bfloat16(torch.device("cpu")):
        rounded = conv(x)
    assert rounded.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad((rounded.float() * weight).sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)
    assert conv(x).dtype == torch.float32


def test_layers_are_as_they_were_even_after_a_failure(toy) -> None:
    layers = find_layers(toy.net, "toy")
    with pytest.raises(RuntimeError, match="stop"), tapped(layers):
        raise RuntimeError("stop")
    assert all("forward" not in vars(layer.module) for layer in layers)


# A network in parallel ---------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    """So that the machine has nothing to say in it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def everything(network, images):
    """Outputs, moments, and the gradient of something that depends on them and the images."""
    ours = images.clone().requires_grad_()
    done = network(ours.square())
    weighted = sum((tensor.sin() * (1 + i)).sum() for i, tensor in enumerate(done.tensors()))
    return [*done.tensors(), *torch.autograd.grad(weighted, ours)]


@pytest.mark.parametrize("count", [2, 5])
def test_copies_of_a_network_give_the_outputs_moments_and_gradients_of_one(toy, rng, two_threads, count) -> None:
    images = torch.from_numpy(rng.standard_normal((count, 3, 16, 16), dtype=np.float32))
    with on_all_cores(toy.net, "toy", half=False, copies=1) as one:
        assert len(one.copies) == 1
        expected = everything(one, images)
    with on_all_cores(toy.net, "toy", half=False) as two:
        assert len(two.copies) == 2
        found = everything(two, images)
        with torch.no_grad():
            assert not two(images).outputs[0].requires_grad
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert torch.get_num_threads() == 2


def test_outputs_that_the_loss_ignores_do_no_harm_in_parallel(toy, rng, two_threads) -> None:
    images = torch.from_numpy(rng.standard_normal((4, 3, 16, 16), dtype=np.float32))
    found: list[torch.Tensor] = []
    for copies in (1, 2):
        ours = images.clone().requires_grad_()
        with on_all_cores(toy.net, "toy", half=False, copies=copies) as network:
            found += torch.autograd.grad(network(ours).moments[0].square.sum(), ours)
    torch.testing.assert_close(*found)


def test_copies_share_weights_but_not_what_a_pass_leaves_in_attributes(rng, two_threads) -> None:
    class Remembering(nn.Module):
        def __init__(self, net) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            self.seen = x
            if barrier:
                barrier.wait(timeout=20)  # both threads are here
            return self.net(self.seen)

    barrier = None
    net = Remembering(net_with(trained(nn.BatchNorm2d(8)))).eval().requires_grad_(False)
    images = torch.from_numpy(rng.standard_normal((4, 3, 8, 8), dtype=np.float32))
    expected = net(images)
    barrier = threading.Barrier(2)
    with on_all_cores(net, "net", half=False) as network:
        torch.testing.assert_close(network(images).outputs[0], expected)
        first, second = (copy.state_dict() for copy, *_ in network.copies)
        assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)


class Tokens(nn.Module):
    """Its BatchNorm sees every position as a row of its own, and one of its outputs is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = trained(nn.BatchNorm1d(3))

    def forward(self, x):
        rows = self.norm(x.flatten(2).transpose(1, 2).flatten(0, 1))
        return rows.view(len(x), -1), torch.ones(len(x), 2)


def test_rows_of_positions_and_constant_outputs_go_through_copies(rng, two_threads) -> None:
    images = torch.from_numpy(rng.standard_normal((3, 3, 4, 4), dtype=np.float32))
    net = Tokens().eval().requires_grad_(False)
    found: list[tuple[torch.Tensor, ...]] = []
    for copies in (1, 2):
        with on_all_cores(net, "net", half=False, copies=copies) as network:
            found.append(everything(network, images))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_network_that_cannot_be_copied_goes_alone(rng, two_threads) -> None:
    net = Tokens().eval().requires_grad_(False)
    vars(net)["lock"] = threading.Lock()
    images = torch.from_numpy(rng.standard_normal((3, 3, 4, 4), dtype=np.float32))
    with on_all_cores(net, "net", half=False) as network:
        assert len(network.copies) == 1
        assert network(images).outputs[0].shape == (3, 48)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["bn-inversion", "dgh", "intraq"])
def test_the_number_of_threads_changes_nothing_but_rounding(toy, two_threads, name) -> None:
    many = made(name, toy)
    torch.set_num_threads(1)
    np.testing.assert_allclose(made(name, toy).images, many.images, atol=2e-3)


# Losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
def test_variance_is_that_of_torch(rng, unbiased) -> None:
    x = torch.from_numpy(rng.standard_normal((5, 4, 6, 6), dtype=np.float32) + 3)
    mean, square = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
    torch.testing.assert_close(
        losses.variance(mean, square, 5 * 36, unbiased), x.var((0, 2, 3), unbiased=unbiased), rtol=1e-4, atol=1e-5
    )


def test_slack_is_the_square_at_zero_and_nothing_at_the_margin() -> None:
    value, target = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5, 0.5])
    assert losses.sum_over_channels(losses.slack_gap(value, target, 0.0)).item() == pytest.approx(0.25 + 6.25)
    edge = torch.tensor([[1.0]], requires_grad=True)
    loss = losses.slack_gap(edge, torch.tensor([0.5]), 0.5).square().sum()
    loss.backward()
    assert loss.item() == 0
    assert edge.grad is not None
    assert edge.grad.item() == 0
    outside = torch.tensor([[2.0]], requires_grad=True)
    losses.slack_gap(outside, torch.tensor([0.5]), 0.5).square().sum().backward()
    assert outside.grad is not None
    assert outside.grad.item() > 0  # descending goes towards the target


def test_both_reductions_differ_by_the_number_of_channels(rng) -> None:
    gap = torch.from_numpy(rng.standard_normal((3, 7)))
    torch.testing.assert_close(losses.sum_over_channels(gap), 7 * losses.mean_over_channels(gap))


def test_enhancement_counts_one_layer_of_each_image_twice() -> None:
    weights = losses.enhancement(4, torch.arange(6))
    torch.testing.assert_close(weights.sum(1), torch.full((6,), 5 / 4))
    terms = torch.rand(6, 4, requires_grad=True)
    (weights * terms).sum().backward()
    assert terms.grad is not None
    for image in range(6):
        others = [terms.grad[image, j].item() for j in range(4) if j != image % 4]
        assert len(set(others)) == 1
        assert terms.grad[image, image % 4].item() == 2 * others[0]


def test_stretching_rewards_range_and_is_leashed_by_the_last_layer(rng) -> None:
    outputs = torch.from_numpy(rng.standard_normal((4, 10)))
    reach = outputs.max(1).values - outputs.min(1).values
    torch.testing.assert_close(losses.stretch(outputs, False), -reach)
    torch.testing.assert_close(losses.stretch(3 * outputs, True), -9 * reach**2)
    mean0, std0 = torch.zeros(5), torch.ones(5)
    assert losses.leash(mean0.expand(4, 5), std0.expand(4, 5), mean0, std0, 0.5).tolist() == [0] * 4
    assert losses.leash(mean0.expand(4, 5) + 2, std0.expand(4, 5), mean0, std0, 0.5).tolist() == [3.5] * 4


def test_soft_inception_is_zero_at_its_target() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    probability = logits.softmax(1)[:, 1]
    assert losses.soft_inception(logits, torch.tensor([1]), probability).item() == pytest.approx(0)


def test_marginal_distance_is_free_between_its_margins() -> None:
    centre = torch.tensor([[1.0, 0.0]])
    near, between, far = torch.tensor([[1.0, 0.01]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, 0.0]])
    known = torch.tensor([True])
    assert losses.marginal_distance(near, centre, known, 0.05, 0.8).item() == pytest.approx(0.05, abs=1e-3)
    assert losses.marginal_distance(between, centre, known, 0.05, 0.8).item() == 0
    assert losses.marginal_distance(far, centre, known, 0.05, 0.8).item() == pytest.approx(1.2)
    assert losses.marginal_distance(far, centre, ~known, 0.05, 0.8).item() == 0


# Statistics of the whole set ---------------------------------------------------------------------------------


def moments_of(net, images):
    with tapped(find_layers(net, "toy")) as taps:
        net(images)
        return list(taps.moments)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 4, 1)])
def test_the_statistics_of_the_set_are_those_of_all_images_at_once(toy, rng, sizes) -> None:
    images = torch.from_numpy(rng.standard_normal((sum(sizes), 3, 16, 16), dtype=np.float32))
    statistics = engine.SetStatistics(sum(sizes))
    parts = images.split(sizes)
    for _ in range(2):  # an entry that is put again replaces its first
        for number, part in enumerate(parts):
            statistics.put(number, moments_of(toy.net, part))
    merged = [statistics.with_live(1, i, m) for i, m in enumerate(moments_of(toy.net, parts[1]))]
    for (mean, square), act in zip(merged, activations(toy.net, images), strict=True):
        var, expected = torch.var_mean(act, (0, 2, 3), unbiased=False)
        torch.testing.assert_close(mean[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses.variance(mean, square, 1, False)[0], var, rtol=1e-3, atol=1e-4)
    # Plain means over batches are not exact where the batches differ in size.
    plain = torch.stack([moments_of(toy.net, part)[0].mean.mean(0) for part in parts]).mean(0)
    exact = activations(toy.net, images)[0].mean((0, 2, 3))
    assert torch.allclose(plain, exact, atol=1e-5) == (len(set(sizes)) == 1)


def test_a_batch_has_its_share_of_the_gradient_of_the_whole_set(toy, rng) -> None:
    images = torch.from_numpy(rng.standard_normal((6, 3, 16, 16), dtype=np.float32))
    statistics = engine.SetStatistics(6)
    for number, part in enumerate(images.split(2)):
        statistics.put(number, moments_of(toy.net, part))
    live = images[2:4].clone().requires_grad_()
    with tapped(find_layers(toy.net, "toy")) as taps:
        toy.net(live)
        live_moments = [statistics.with_live(1, i, m) for i, m in enumerate(taps.moments)]
    value = torch.stack([(mean.square() + square.sin()).sum() for mean, square in live_moments]).sum()
    (found,) = torch.autograd.grad(value, live)
    whole = images.clone().requires_grad_()
    acts = activations(toy.net, whole)
    value = sum((a.mean((0, 2, 3)).square() + a.square().mean((0, 2, 3)).sin()).sum() for a in acts)
    (expected,) = torch.autograd.grad(value, whole)
    torch.testing.assert_close(found, expected[2:4], rtol=1e-3, atol=1e-6)


# Pictures ----------------------------------------------------------------------------------------------------


def test_smoothing_keeps_a_constant_image_and_its_kernel_is_symmetric() -> None:
    assert engine.SMOOTHING.sum().item() == pytest.approx(1)
    assert torch.equal(engine.SMOOTHING, engine.SMOOTHING.T)
    assert engine.SMOOTHING[0, 0].item() == pytest.approx(0.087681, abs=2e-5)
    assert engine.SMOOTHING[1, 1].item() == pytest.approx(0.166285, abs=2e-5)
    smoothed = engine.smooth(torch.full((1, 3, 6, 6), 2.0))
    torch.testing.assert_close(smoothed[..., 1:-1, 1:-1], torch.full((1, 3, 4, 4), 2.0))


def test_clipping_passes_the_gradient_straight_through() -> None:
    x = torch.tensor([[[[-5.0, 0.2, 9.0]]]], requires_grad=True)
    out = engine.clip_straight_through(x, torch.tensor(-1.0), torch.tensor(1.0))
    torch.testing.assert_close(out.detach(), torch.tensor([[[[-1.0, 0.2, 1.0]]]]))
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_the_enlarged_part_has_the_size_of_the_image_and_comes_from_it(rng) -> None:
    images = torch.from_numpy(rng.random((4, 3, 16, 16), dtype=np.float32))
    changed = 0
    for seed in range(8):
        out = engine.local_object(images, np.random.default_rng(seed), 0.5)
        assert out.shape == images.shape
        assert out.min() >= images.min() - 1e-6
        assert out.max() <= images.max() + 1e-6
        changed += not torch.equal(out, images)
    assert 0 < changed < 8


def test_swinging_moves_the_inputs_of_strided_convolutions_by_at_most_a_pixel(rng) -> None:
    conv = nn.Conv2d(1, 1, 1, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.arange(64.0).view(1, 1, 8, 8)
    seen = set()
    with engine.swinging(conv, True) as swing:
        assert torch.equal(conv(x), x[..., ::2, ::2])
        for seed in range(200):
            with swing.drawn_from(np.random.default_rng(seed)):
                seen.add(conv(x)[0, 0, 1, 1].item())
    assert seen == {x[0, 0, 2 + dy, 2 + dx].item() for dy, dx in itertools.product((-1, 0, 1), repeat=2)}
    assert not conv._forward_pre_hooks


# Optimisers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("radam", torch.optim.RAdam)])
def test_the_optimisers_are_those_of_torch(name, kind, rng) -> None:
    start = torch.from_numpy(rng.standard_normal((2, 1, 3, 3)))
    batch = engine.new_batch(start.clone(), [0, 1], 0.1, per_image=False)
    batch.rate = batch.rate.double()
    reference = nn.Parameter(start.clone())
    optimizer = kind([reference], lr=0.1)
    for step in range(12):
        gradient = torch.sin(start * (step + 1))
        reference.grad = gradient
        optimizer.step()
        engine.descend(batch, gradient, name, 1.0)
    torch.testing.assert_close(batch.images, reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reset", [True, False])
def test_the_rate_is_cut_on_a_plateau_image_by_image(reset) -> None:
    batch = engine.new_batch(torch.zeros(2, 1, 2, 2), [0, 1], 1.0, per_image=True)
    for value in (5.0, 4.0, 3.0, 2.0, 1.0):
        engine.cut_on_plateau(batch, torch.tensor([value, 5.0]), 2, 0.5, 1e-4, reset)
    assert batch.rate.tolist() == [1.0, 0.5]
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.5, patience=2, min_lr=1e-4)
    single = engine.new_batch(torch.zeros(1, 1, 2, 2), [0], 1.0, per_image=True)
    for step in range(30):
        value = 5.0 - min(step, 4)
        scheduler.step(value)
        engine.cut_on_plateau(single, torch.tensor([value]), 2, 0.5, 1e-4, reset=False)
    assert single.rate.item() == pytest.approx(reference.param_groups[0]["lr"])


# The methods on a toy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_network_inputs_with_the_answers_of_the_model_as_labels(toy, name) -> None:
    """What every source promises is in test_source_contract.py."""
    found = made(name, toy)
    assert found.domain == "network"
    assert found.provenance.options["steps"] == 4
    assert found.provenance.labels == ("method" if name == "intraq" else "pseudo")
    if name == "intraq":
        assert found.labels.tolist() == [0, 1, 2, 3, 0, 1]
    else:
        with torch.no_grad():
            assert found.labels.tolist() == toy.net(torch.from_numpy(found.images)).argmax(1).tolist()


@pytest.mark.parametrize("name", [name for name in METHODS if SOURCES[name].Options().scope == "sample"])
def test_images_of_their_own_do_not_depend_on_the_batch_or_the_count(toy, name) -> None:
    one_by_one = made(name, toy, batch=1)
    np.testing.assert_allclose(made(name, toy, batch=4).images, one_by_one.images, atol=2e-3)
    np.testing.assert_allclose(made(name, toy, count=9, batch=3).images[:6], one_by_one.images, atol=2e-3)


def bn_loss(toy, images):
    """The whole-set loss, by brute force."""
    with torch.no_grad():
        acts = activations(toy.net, torch.from_numpy(images))
    layers = find_layers(toy.net, "toy")
    return sum(
        ((a.mean((0, 2, 3)) - la.mean0).square().mean() + (a.std((0, 2, 3)) - la.var0.sqrt()).square().mean()).item()
        for a, la in zip(acts, layers, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bn-inversion", {"steps": 80, "rate": 0.05}),
        ("bn-inversion", {"steps": 80, "rate": 0.05, "precision": "bf16"}),
        ("dgh", {"steps": 250, "patience": 10}),
    ],
)
def test_the_statistics_of_the_set_approach_those_stored(toy, name, options) -> None:
    start = engine.start(resolve(SOURCES[name].Options(), (16, 16)), request(toy, 12), range(12))
    before = bn_loss(toy, engine.centre_crop(start, 16, 16).numpy())
    found = made(name, toy, count=12, **options)
    assert bn_loss(toy, found.images) < 0.1 * before


def test_clipped_methods_stay_between_black_and_white(toy) -> None:
    low, high = toy.spec.preprocessing.input_range()
    found = made("dgh", toy)
    assert (found.images >= low[:, None, None] - 1e-6).all()
    assert (found.images <= high[:, None, None] + 1e-6).all()


def test_slack_of_zero_is_zeroq(toy) -> None:
    plain = made("zeroq", toy, rate=0.5)
    np.testing.assert_array_equal(made("dsg", toy, rate=0.5, slack=0, enhance=False).images, plain.images)
    assert not np.allclose(made("dsg", toy, rate=0.5, enhance=False).images, plain.images)


def test_margins_grow_with_the_slack_and_cover_noise_at_the_top(toy) -> None:
    def margins(slack):
        options = resolve(SOURCES["dsg"].Options(slack=slack), (16, 16))
        with on_all_cores(toy.net, "toy", half=False) as network:
            run = engine.Run(request(toy), options, network, engine.Swing(), None, torch.device("cpu"))
            assert run.margins is not None
            return torch.tensor(run.margins)

    low, high, top = margins(0.3), margins(0.9), margins(0.999999)
    assert (low >= 0).all()
    assert (high >= low).all()
    assert (top >= high).all()


def test_one_batch_makes_the_whole_set_and_the_batch_the_same(toy) -> None:
    whole = made("bn-inversion", toy, count=4, batch=4, init="gaussian")
    batch = made("bn-inversion", toy, count=4, batch=4, init="gaussian", scope="batch")
    np.testing.assert_allclose(whole.images, batch.images, atol=1e-4)


@pytest.mark.parametrize("axis", [
    {"refresh": True}, {"spread": "var"}, {"reduction": "sum"}, {"relative": False}, {"spread_weight": 10}, {"input_weight": 1}, {"init": "uniform"},
    {"optimizer": "radam"}, {"schedule": "plateau", "patience": 1}, {"pipeline": "smooth-augment"}, {"output": "none"}, {"rate": 0.2},
    {"swing": True}, {"scope": "sample"}, {"pipeline": "local-object"}, {"precision": "bf16"},
])  # fmt: skip
def test_every_option_does_something(toy, axis) -> None:
    plain = made("bn-inversion", toy, steps=8)
    assert not np.array_equal(plain.images, made("bn-inversion", toy, steps=8, **axis).images)


@pytest.mark.parametrize("axis", [
    {"optimizer": "radam"}, {"schedule": "plateau"}, {"schedule": "plateau", "patience": 1, "factor": 0.5}, {"rate": 0.2},
    {"generator_rate": 0.02}, {"latent": 64}, {"swing": False},
])  # fmt: skip
def test_every_option_of_genie_does_something(toy, axis) -> None:
    plain = made("genie", toy, steps=8)
    assert not np.array_equal(plain.images, made("genie", toy, steps=8, **axis).images)


def test_small_images_go_through_the_network_in_larger_batches() -> None:
    for name in METHODS:
        options = SOURCES[name].Options()
        assert resolve(options, (224, 224)).batch == resolve(options, (260, 260)).batch == 8
        # As many pixels as eight images of 260 times 260 have.
        assert resolve(options, (320, 320)).batch == 5
        assert resolve(options, (260, 1040)).batch == 2
        assert resolve(options, (4000, 4000)).batch == 1
        assert resolve(options, (32, 32)).batch >= 32
        assert resolve(dataclasses.replace(options, batch=5), (32, 32)).batch == 5


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(("name", "when"), [("bn-inversion", 7), ("dgh", 5), ("zeroq", 5), ("intraq", 7), ("genie", 6)])
def test_an_interrupted_run_goes_on_to_the_same_images(toy, tmp_path, name, when) -> None:
    whole = made(name, toy, count=12)
    calls = itertools.count()

    def stop(done, note) -> None:
        if next(calls) == when:
            raise Stop

    with pytest.raises(Stop):
        made(name, toy, count=12, resume=tmp_path, tick=stop)
    assert (tmp_path / "inversion.pt").is_file()
    steps = []
    again = made(name, toy, count=12, resume=tmp_path, tick=lambda done, note: steps.append(done))
    assert np.array_equal(again.images, whole.images)
    assert len(steps) < 12  # not from the beginning
    # A state of other options is not taken up, and neither is a damaged one.
    other = made(name, toy, count=12, steps=3)
    assert np.array_equal(made(name, toy, count=12, steps=3, resume=tmp_path).images, other.images)
    (tmp_path / "inversion.pt").write_bytes(b"PK broken")
    assert np.array_equal(made(name, toy, count=12, resume=tmp_path).images, whole.images)


def after(steps):
    """A clock that has run out once it was asked so many times."""
    asked = itertools.count()
    return lambda: next(asked) >= steps


def test_joint_steps_end_when_time_is_up_with_all_images_and_a_warning(toy) -> None:
    ticks = []
    asked = request(toy, 6, out_of_time=after(5), tick=lambda done, note: ticks.append(done))
    found = generate("bn-inversion", asked, {"steps": "4", "batch": "4"})
    assert len(ticks) == 5
    assert found.images.shape == (6, 3, 16, 16)
    (warning,) = found.provenance.warnings
    assert warning.startswith("out of time: 6 of 6 images were made, with 5 of 8 steps")
    assert not np.array_equal(found.images, made("bn-inversion", toy).images)
    assert made("bn-inversion", toy).provenance.warnings == ()


@pytest.mark.parametrize(("name", "steps"), [("intraq", 5), ("zeroq", 5), ("genie", 5)])
def test_batches_that_were_not_begun_are_left_out_when_time_is_up(toy, name, steps) -> None:
    # Asked before every step, and once more before the second and the third batch.
    asked = request(toy, 12, out_of_time=after(steps + 1))
    found = generate(name, asked, {"steps": "4", "batch": "4", "precision": "fp32"})
    assert len(found.images) == 8
    assert found.labels is not None
    assert len(found.labels) == 8
    assert f"8 of 12 images were made, with {steps} of 12 steps" in found.provenance.warnings[0]
    np.testing.assert_array_equal(found.images[:4], made(name, toy, count=12).images[:4])


def test_something_is_made_even_without_any_time(toy) -> None:
    for name in ("bn-inversion", "zeroq"):
        found = generate(name, request(toy, 6, out_of_time=lambda: True), {"steps": "4", "batch": "4"})
        assert len(found.images) >= 4
        assert np.isfinite(found.images).all()
        assert "with 0 of 8 steps" in found.provenance.warnings[0]


def test_progress_rises_with_every_step_and_ends_with_the_last(toy) -> None:
    for name in ("bn-inversion", "zeroq", "genie"):
        ticks: list[int] = []
        made(name, toy, count=8, tick=lambda done, note, ticks=ticks: ticks.append(done))
        assert ticks == list(range(1, 9)), name


# What cannot be inverted -------------------------------------------------------------------------------------


def net_with(norm):
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def trained(norm):
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name)
        value.copy_(torch.linspace(0.5, 1.5, len(value)))
    return norm


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, track_running_stats=False)])
def test_networks_without_stored_statistics_are_refused_with_a_way_out(norm) -> None:
    with pytest.raises(ModelError, match=r"calibrate with patch-similarity \(ViT\), fractal or real:DATA"):
        find_layers(net_with(norm), "net")


def test_a_network_that_was_never_trained_is_refused() -> None:
    with pytest.raises(ModelError, match="never trained"):
        find_layers(ToyNet(), "net")


def test_other_kinds_of_batch_norm_are_read() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    for norm in (nn.SyncBatchNorm(8), nn.BatchNorm2d(8, affine=False), FrozenBatchNorm2d(8)):
        net = net_with(trained(norm)).eval()
        x = torch.randn(2, 3, 8, 8)
        (layer,) = find_layers(net, "net")
        expected = net(x) if not isinstance(norm, nn.SyncBatchNorm) else None
        with tapped([layer]) as taps:
            out = net(x)
        if expected is not None:
            torch.testing.assert_close(out, expected)
        assert len(taps.moments) == 0  # cleared at the end
    one = nn.Sequential(nn.Conv1d(3, 8, 3), trained(nn.BatchNorm1d(8))).eval()
    x = torch.randn(2, 3, 9)
    with tapped(find_layers(one, "net")) as taps:
        torch.testing.assert_close(one(x), nn.Sequential(*one)(x))
        assert taps.moments[0].positions == 7


def test_repvgg_is_inverted_in_training_form_and_refused_in_deployed_form() -> None:
    from ovcalib.models import builtin
    from ovcalib.models.repvgg import CifarRepVGG, reparameterise

    net = builtin.build("repvgg_a0-cifar10").eval()
    assert isinstance(net, CifarRepVGG)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            trained(module)
    assert find_layers(net, "repvgg")
    with pytest.raises(ModelError, match="training form"):
        find_layers(reparameterise(net), "repvgg")


def test_impossible_options_are_refused(toy) -> None:
    for options, message in (
        ({"slack": 1.5}, "slack is 1.5"), ({"rate": -1}, "rate is -1"), ({"extra_pixels": 3}, "pipeline=smooth-augment"),
        ({"enhance": True}, "scope=sample"), ({"refresh": True, "scope": "batch"}, "scope=set"), ({"steps": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            made("bn-inversion", toy, **options)
    with pytest.raises(UsageError, match="needs scope=set"):
        made("dgh", toy, variant="paper", scope="batch")
    with pytest.raises(UsageError, match="expected batch"):
        made("genie", toy, scope="set")
    for name, value in (("init", "fractal"), ("schedule", "plateau-reset")):
        with pytest.raises(UsageError, match="genie starts from gaussian latent vectors"):
            made("genie", toy, **{name: value})
    with pytest.raises(ModelError, match="Lower the rate"):
        made("bn-inversion", toy, steps=20, rate=1e30)


def test_a_budget_fills_in_what_was_not_said() -> None:
    options = resolve(dataclasses.replace(SOURCES["dgh"].Options(), steps=7, budget="standard"), (224, 224))
    assert (options.steps, options.batch, options.extra_pixels) == (7, 16, 32)
    assert all(set(SOURCES[name].Options.BUDGETS) == {"quick", "standard", "paper"} for name in METHODS)
    assert InversionOptions.BUDGETS == {}


# Score -------------------------------------------------------------------------------------------------------


def test_distance_and_coverage_have_their_closed_forms() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert statistics_distance(zero, one, zero, one) == 0
    assert statistics_distance(zero + 1, one, zero, one) == pytest.approx(1)
    assert statistics_distance(zero, one * 3, zero, one) == pytest.approx(2)
    assert range_coverage(zero - 3, zero + 3, zero, one) == pytest.approx(1)
    assert range_coverage(zero, zero + 3, zero, one) == pytest.approx(0.5)  # clips half
    assert range_coverage(zero - 6, zero + 6, zero, one) == pytest.approx(0.5)  # wastes half
    assert range_coverage(zero + 4, zero + 5, zero, one) == 0


def test_the_score_tells_training_images_from_noise_and_copies(toy) -> None:
    real = score_set(toy.net, toy.calibration(), "toy")
    values = np.random.default_rng(0).standard_normal((32, 3, 16, 16)).astype(np.float32)
    noise = score_set(toy.net, toy.calibration(images=values), "toy")
    one = toy.calibration().images[:1]
    copies = score_set(toy.net, toy.calibration(images=np.repeat(one, 32, 0)), "toy")
    assert real.bn_distance < 0.5 * noise.bn_distance
    assert real.range_coverage > noise.range_coverage
    assert copies.diversity == pytest.approx(0, abs=1e-3)
    assert real.diversity > 0.1


# Detectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ssdlite320_mobilenet_v3_large",
        "fcos_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
    ],
)
def test_detectors_give_all_their_output_maps_to_the_loss(name, toy) -> None:
    from torchvision.models import get_model

    from ovcalib.calibration.network_outputs import flat_outputs, network_outputs
    from ovcalib.models.detectors import RawHeads

    torch.manual_seed(0)
    net = RawHeads(get_model(name, weights=None, weights_backbone=None).eval(), (3, 96, 96))
    with_statistics_of(net, lambda net: network_outputs(net, torch.randn(4, 3, 96, 96)))
    maps = flat_outputs(network_outputs(net, torch.randn(2, 3, 96, 96)))
    assert len(maps) >= 2  # boxes and scores, at least
    assert all(len(values) == 2 for values in maps)
    spec = toy.spec.model_copy(update={
        "name": name, "input_shape": (3, 96, 96), "num_classes": None, "classes": None,
        "preprocessing": toy.spec.preprocessing.model_copy(update={"height": 96, "width": 96})})  # fmt: skip
    asked = Request(count=2, seed=0, spec=spec, module=net)
    few = {"steps": "2", "batch": "2"}
    plain = generate("dgh", asked, {**few, "output": "none"})
    stretched = generate("dgh", asked, {**few, "output_weight": "0.1"})
    assert np.isfinite(stretched.images).all()
    assert stretched.labels is None
    assert not np.array_equal(plain.images, stretched.images)
    with pytest.raises(ModelError, match="no class logits"):
        generate("intraq", asked, few)
