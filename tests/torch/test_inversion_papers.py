"""Every method of BatchNorm inversion against its paper's formulas, written down once more in plain torch.

The losses of the first steps and the images after them are computed with forward hooks and torch's own optimisers, and
share with the engine the random numbers alone.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovcalib import ModelSpec, Preprocessing
from ovcalib.calibration import SOURCES
from ovcalib.calibration import inversion as engine
from ovcalib.calibration.genie_generator import GeneratorRun, schedule
from ovcalib.calibration.inversion_options import resolve
from ovcalib.calibration.sources import Request, generate
from ovcalib.records.model import Weights

SEED, SIDE = 5, 16
MEAN, STD = 0.5, 0.25
LOW, HIGH = -MEAN / STD, (1 - MEAN) / STD


class Net(nn.Module):
    """Three BatchNorm layers, the second in a strided shortcut, whose order is that of execution."""

    def __init__(self, classes) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down, self.down_norm = nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.top, self.top_norm = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(self.down_norm(self.down(x)))
        x = F.relu(self.top_norm(self.top(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net(3)
    for norm in norms(net):
        count = norm.num_features
        norm.running_mean = torch.linspace(-1.5, 2, count)
        norm.running_var = torch.linspace(0.3, 2.5, count)
        norm.weight.data, norm.bias.data = torch.linspace(0.5, 1.5, count), torch.linspace(-0.3, 0.6, count)
    net.fc.weight.data *= 4  # so that probabilities differ
    return net.eval().requires_grad_(False)


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def asked(net, count):
    spec = ModelSpec(
        name="net", input_shape=(3, SIDE, SIDE), num_classes=net.fc.out_features, weights=Weights(origin="random"),
        preprocessing=Preprocessing(height=SIDE, width=SIDE, mean=(MEAN,) * 3, std=(STD,) * 3),
    )  # fmt: skip
    return Request(count=count, seed=SEED, spec=spec, module=net)


def engine_run(net, name, count, steps=3, **options):
    """(the loss at every step, the images, the run) of the engine."""
    spied = {}

    class Spy(GeneratorRun if name == "genie" else engine.Run):  # type: ignore[misc]
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.values: list[torch.Tensor] = []
            spied["run"] = self

        def check(self, loss, step) -> None:
            self.values.append(loss.detach().clone())

    wanted = SOURCES[name].Options(steps=steps, precision="fp32", **{"schedule": "plateau", "patience": 100, **options})
    made = engine.invert(asked(net, count), wanted, Spy)
    return spied["run"].values, torch.from_numpy(made.images), spied["run"]


def seen(net, images):
    """(inputs of the BatchNorm layers, input of the classifier, logits)"""
    inputs = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for module in (*norms(net), net.fc)
    ]
    logits = net(images)
    for hook in hooks:
        hook.remove()
    return inputs[:-1], inputs[-1], logits


def noise(first, count, side=SIDE):
    return torch.stack([
        torch.from_numpy(np.random.default_rng((SEED, 0, i)).standard_normal((3, side, side), dtype=np.float32))
        for i in range(first, first + count)
    ])  # fmt: skip


def draws(step, number):
    return np.random.default_rng((SEED, 2, step, number))


def agree(found, expected) -> None:
    assert len(found) == len(expected)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.view(-1), wanted.detach().view(-1), rtol=2e-4, atol=1e-6)


def same_pixels(found, expected, rate) -> None:
    """But for a few pixels: Adam turns a gradient near zero into a step of either sign."""
    assert ((found - expected).abs() < 0.02 * rate).float().mean() > 0.98


def descend(leaf, loss, optimizer) -> None:
    optimizer.zero_grad()
    (leaf.grad,) = torch.autograd.grad(loss, leaf)
    optimizer.step()


# Per-sample statistics: zeroq and dsg ------------------------------------------------------------------------


def squared_gaps(x, mean0, std0, free=(0.0, 0.0)):
    """[N]: squared distances, summed over channels, of each image's mean and standard deviation."""
    mean, std = x.mean((2, 3)), (x.var((2, 3), unbiased=True) + 1e-6).sqrt()
    return sum(
        F.relu((value - target).abs() - slack).square().sum(1)
        for value, target, slack in ((mean, mean0, free[0]), (std, std0, free[1]))
    )


def stored(net):
    return [(norm.running_mean, (norm.running_var + 1e-6).sqrt()) for norm in norms(net)]


def zeroq_loss(net, images):
    inputs = seen(net, images)[0]
    layers = [squared_gaps(x, *target) for x, target in zip(inputs, stored(net), strict=True)]
    return sum(layers) + squared_gaps(images, torch.zeros(3), torch.ones(3))


def dsg_loss(net, images):
    noisy = seen(net, noise(10**6, 256))[0]
    layers = []
    for x, x0, (mean0, std0) in zip(seen(net, images)[0], noisy, stored(net), strict=True):
        free = [
            torch.quantile((value - target).abs(), 0.9)
            for value, target in ((x0.mean((0, 2, 3)), mean0), (x0.std((0, 2, 3)), std0))
        ]
        layers.append(squared_gaps(x, mean0, std0, free))
    total = sum(layers) + squared_gaps(images, torch.zeros(3), torch.ones(3))
    # Image j counts layer j twice.
    extra = torch.stack([layers[j % len(layers)][j] for j in range(len(images))])
    return (total + extra) / len(layers)


@pytest.mark.parametrize(("name", "loss"), [("zeroq", zeroq_loss), ("dsg", dsg_loss)])
def test_each_image_descends_on_its_own_statistics(net, name, loss) -> None:
    found, images, _ = engine_run(net, name, 5, rate=0.5, batch=5)
    leaf = noise(0, 5).requires_grad_()
    optimizer = torch.optim.Adam([leaf], 0.5)
    expected = []
    for _ in range(3):
        expected.append(loss(net, leaf))
        descend(leaf, expected[-1].sum(), optimizer)
    agree(found, expected)
    same_pixels(images, leaf, 0.5)


# Statistics of a batch: intraq -------------------------------------------------------------------------------


def test_intraq_asks_for_its_targets_and_keeps_features_at_a_distance(net) -> None:
    # Batches of classes 0 1, 2 0, 1 2: of the second one image has a predecessor.
    options = {"rate": 0.5, "batch": 2, "pipeline": "none"}
    found, images, run = engine_run(net, "intraq", 6, **options)
    assert (run.options.confidence, run.options.lower, run.options.upper) == (0.95, 0.05, 0.8)
    labels, expected, hinges = torch.arange(6) % 3, [], []
    centres: dict[int, list[torch.Tensor]] = {}
    for number in range(3):
        own = labels[2 * number : 2 * number + 2]
        targets = run.soft_targets(number).float()
        leaf = noise(2 * number, 2).requires_grad_()
        optimizer = torch.optim.Adam([leaf], 0.5)
        for _ in range(3):
            inputs, features, logits = seen(net, leaf)
            statistics = sum(
                ((x.mean((0, 2, 3)) - norm.running_mean) ** 2).mean()
                + ((x.var((0, 2, 3), unbiased=False) - norm.running_var) ** 2).mean()
                for x, norm in zip(inputs, norms(net), strict=True)
            ) / len(inputs)
            inception = torch.stack([
                (logits[i].softmax(0)[label] - targets[i]) ** 2 for i, label in enumerate(own)
            ]).mean()  # fmt: skip
            known = [
                1 - F.cosine_similarity(features[i], torch.stack(centres[int(label)]).mean(0), dim=0)
                for i, label in enumerate(own) if int(label) in centres
            ]  # fmt: skip
            distance = sum(F.relu(0.05 - d) + F.relu(d - 0.8) for d in known) / max(len(known), 1)
            hinges.append((len(known), float(torch.as_tensor(distance).detach())))
            expected.append(statistics + inception + distance)
            descend(leaf, expected[-1], optimizer)
        same_pixels(images[2 * number : 2 * number + 2], leaf, 0.5)
        for label, feature in zip(own.tolist(), seen(net, images[2 * number : 2 * number + 2])[1], strict=True):
            centres.setdefault(label, []).append(feature)
    assert [count for count, _ in hinges] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(hinge > 1e-3 for _, hinge in hinges[3:])
    agree(found, expected)


def test_half_of_the_soft_targets_are_one_and_the_others_uniform_up_to_it(net) -> None:
    run = engine_run(net, "intraq", 4000, steps=1, batch=4000, pipeline="none")[2]
    targets = run.soft_targets(0)
    assert torch.equal(targets, run.soft_targets(0))
    soft = targets[targets < 1]
    assert 0.47 < len(soft) / 4000 < 0.53
    assert soft.min() >= 0.95
    assert soft.mean().item() == pytest.approx(0.975, abs=0.001)


def test_intraq_takes_the_margins_of_its_data_and_says_when_they_concern_nobody(net) -> None:
    options = SOURCES["intraq"].Options()
    published = {10: (0.95, 0.05, 0.8), 100: (0.6, 0.02, 1.0), 1000: (1.0, 0.0, 2.0)}
    for classes, wanted in published.items():
        found = resolve(options, (32, 32), classes)
        assert (found.confidence, found.lower, found.upper) == wanted
    assert resolve(dataclasses.replace(options, lower=0.3), (32, 32), 1000).lower == 0.3

    def warnings(count, batch, **margins):
        given = {"steps": "1", "batch": str(batch), **margins}
        return generate("intraq", asked(net, count), given).provenance.warnings

    assert warnings(6, 3) == ()
    assert "counts for 0 of 6 images" in warnings(6, 6)[0]
    assert "counts for 2 of 5 images" in warnings(5, 3)[0]
    assert warnings(5, 3, lower="0", upper="2") == warnings(5, 3, distance_weight="0") == ()


def test_local_object_reinforcement_enlarges_a_part_of_every_image_and_may_flip_it() -> None:
    # Bilinear sampling of a ramp is a ramp: its slope tells the width of the part, its sign the flip.
    ramp = torch.linspace(0, 15, 16)
    images = torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16)]).expand(64, 2, 16, 16)
    kept, flipped, areas = 0, [], []
    for seed in range(40):
        out = engine.local_object(images, np.random.default_rng(seed), 0.5)
        if torch.equal(out, images):
            kept += 1
            continue
        width, height = out[:, 0, 8, 9] - out[:, 0, 8, 8], out[:, 1, 9, 8] - out[:, 1, 8, 8]
        assert (height > 0).all()
        flipped += (width < 0).tolist()
        areas += (width.abs() * height).tolist()
        ratio = width.abs() / height
        assert ((ratio > 0.74) & (ratio < 1.35)).all()
    assert 10 < kept < 30
    assert 0.4 < np.mean(flipped) < 0.6
    assert min(areas) > 0.43  # below 0.5 where a part of 4:3 would be wider than the image
    assert np.mean(areas) == pytest.approx(0.74, abs=0.03)


# Statistics of the whole set: dgh and bn-inversion -----------------------------------------------------------


def blur(images):
    line = torch.tensor([np.exp(-1 / (2 * 1.25**2)), 1.0, np.exp(-1 / (2 * 1.25**2))]).float()
    kernel = line[:, None] * line / line.sum() ** 2
    return torch.cat([F.conv2d(plane, kernel[None, None], padding=1) for plane in images.split(1, 1)], 1)


def clipped(images):
    return images + (images.clamp(LOW, HIGH) - images).detach()


def prepared(images, rng):
    """Blur, one flip and one crop for the batch, clip."""
    out = blur(images)
    if rng.random() < 0.5:
        out = out.flip(3)
    top, left = rng.integers(3), rng.integers(3)
    return clipped(out[:, :, top : top + SIDE, left : left + SIDE])


def finalised(images):
    return clipped(blur(images)[:, :, 1 : 1 + SIDE, 1 : 1 + SIDE])


def moments(net, images, with_images):
    """[(mean, mean square)] over the batch, of each layer and, where it is asked for, of the images."""
    maps = [*seen(net, images)[0], images] if with_images else seen(net, images)[0]
    return [(x.mean((0, 2, 3)), x.square().mean((0, 2, 3))) for x in maps]


def set_loss(net, table, shares, view, form):
    """Statistics of all batches together, and output stretching on the one that is seen."""
    targets = [*stored(net), (torch.zeros(3), torch.ones(3))]
    total = torch.zeros(())
    for layer in range(len(table[0])):
        mean, square = (sum(share * part[layer][k] for share, part in zip(shares, table, strict=True)) for k in (0, 1))
        std = (square - mean**2 + 1e-6).sqrt()
        gap = ((mean - targets[layer][0]) ** 2).mean() + form["spread"] * ((std - targets[layer][1]) ** 2).mean()
        gap = gap / (targets[layer][1] ** 2).mean() if form.get("relative") else gap
        total = total + (form["input"] * gap if layer == 3 else gap)
    inputs, _, logits = seen(net, view)
    reach = logits.max(1).values - logits.min(1).values
    stretching = -(reach**2) if form["squared"] else -reach
    if form["leash"]:
        last, (mean0, std0) = inputs[-1], stored(net)[-1]
        mean, std = last.mean((2, 3)), (last.var((2, 3)) + 1e-6).sqrt()
        limits = [F.relu(((a - b) ** 2).mean(1) - 0.5) for a, b in ((mean, mean0), (std, std0))]
        assert all((limit > 0).any() for limit in limits)
        stretching = stretching + sum(limits)
    return total / len(table[0]) + form["weight"] * stretching.mean()


def whole_set(net, leaves, optimizers, form, view, final):
    """Three iterations over all batches: the losses in their order, and the images."""
    count = sum(len(leaf) for leaf in leaves)
    shares = [len(leaf) / count for leaf in leaves]
    table = [moments(net, final(leaf.detach()), form["input"] > 0) for leaf in leaves]
    found = []
    for iteration in range(3):
        for number in np.random.default_rng((SEED, 1, iteration)).permutation(len(leaves)).tolist():
            leaf, rng = leaves[number], draws(iteration, number)
            images = view(leaf, rng)
            table[number] = moments(net, images, form["input"] > 0)
            found.append(set_loss(net, table, shares, images, form))
            descend(leaf, found[-1], optimizers[number])
            with torch.no_grad():
                table[number] = moments(net, view(leaf, rng) if form["refresh"] else images, form["input"] > 0)
    return found, torch.cat([final(leaf.detach()) for leaf in leaves])


DGH = {
    "leashed": {"refresh": False, "squared": False, "leash": True, "spread": 1, "input": 1, "weight": 1e-5},
    "paper": {"refresh": True, "squared": True, "leash": True, "spread": 10, "input": 1, "weight": 3e-7},
    "product": {"refresh": False, "squared": False, "leash": False, "spread": 1, "input": 3, "weight": 1e-5},
}


@pytest.mark.parametrize("variant", DGH)
def test_dgh_matches_the_whole_set_in_three_forms(net, variant) -> None:
    options = resolve(SOURCES["dgh"].Options(variant=variant), (SIDE, SIDE))
    form = {**DGH[variant], "weight": 5.0}  # the published one is too small to be seen in a float32
    assert options.output_weight == DGH[variant]["weight"]
    # The rate is small enough that the fourth decimal of the loss means something.
    found, images, _ = engine_run(
        net, "dgh", 5, batch=3, variant=variant, output_weight=5.0, rate=4.0, schedule="plateau-reset"
    )
    leaves = [part.clone().requires_grad_() for part in noise(0, 5, SIDE + 2).split(3)]
    optimizers = [torch.optim.RAdam([leaf], 4.0) for leaf in leaves]
    expected, wanted = whole_set(net, leaves, optimizers, form, prepared, finalised)
    agree(found, expected)
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3)


def test_bn_inversion_matches_the_whole_set(net) -> None:
    options = SOURCES["bn-inversion"].Options()
    assert (options.init, options.output_weight) == ("fractal", 3e-4)
    found, images, _ = engine_run(net, "bn-inversion", 5, batch=3, rate=0.05, output_weight=0.05, init="gaussian")
    leaves = [part.clone().requires_grad_() for part in noise(0, 5).split(3)]
    optimizers = [torch.optim.Adam([leaf], 0.05) for leaf in leaves]
    form = {**DGH["leashed"], "input": 0, "weight": 0.05, "relative": True}
    expected, wanted = whole_set(net, leaves, optimizers, form, lambda leaf, rng: leaf.clone(), torch.clone)
    agree(found, expected)
    same_pixels(images, wanted, 0.05)


# A generator: genie ------------------------------------------------------------------------------------------


def test_genie_trains_generator_and_latents_with_the_rates_of_its_code(net) -> None:
    found, images, _ = engine_run(net, "genie", 4, batch=4, rate=None, schedule="plateau", budget="paper")
    torch.manual_seed(int(np.random.default_rng((SEED, 3, 0)).integers(2**63)))
    generator = nn.Sequential(
        nn.Linear(256, 128 * 4 * 4), nn.Unflatten(1, (128, 4, 4)), nn.BatchNorm2d(128),
        nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2), nn.Conv2d(64, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False),
    )  # fmt: skip
    z = torch.stack([
        torch.from_numpy(np.random.default_rng((SEED, 0, i)).standard_normal(256)).float() for i in range(4)
    ]).requires_grad_()  # fmt: skip
    latents, weights = torch.optim.Adam([z], 0.1), torch.optim.Adam(generator.parameters(), 0.01)
    expected = []
    for step in range(3):
        rng = draws(step, 0)

        def swung(module, given, rng=rng):
            top, left = rng.integers(0, 3, 2)
            x = given[0]
            return F.pad(x, (1, 1, 1, 1), mode="reflect")[..., top : top + x.shape[2], left : left + x.shape[3]]

        hook = net.down.register_forward_pre_hook(swung)
        made = generator(z)
        terms = [
            ((x.mean((0, 2, 3)) - mean0) ** 2).mean() + ((x.std((0, 2, 3)) - std0) ** 2).mean()
            for x, (mean0, std0) in zip(seen(net, made)[0], stored(net), strict=True)
        ]
        hook.remove()
        # Of the images each one alone, its three channels added up; over the batch this term would be zero.
        own = ((made.mean((2, 3)) ** 2).sum(1) + ((made.std((2, 3)) - 1) ** 2).sum(1)).mean()
        assert own > 0.01
        expected.append((sum(terms) + own) / 4)
        latents.zero_grad()
        weights.zero_grad()
        expected[-1].backward()
        latents.step()
        weights.step()
    agree(found, expected)
    with torch.no_grad():
        assert ((images - generator(z)).abs() < 0.02).float().mean() > 0.95


def test_the_rates_of_genie_fall_as_in_its_code() -> None:
    options = resolve(SOURCES["genie"].Options(budget="paper"), (SIDE, SIDE))
    latents, weights = (torch.optim.Adam([nn.Parameter(torch.zeros(1))], rate) for rate in (0.1, 0.01))
    follow = schedule(options, latents, weights, 4000)
    latents.step()
    weights.step()
    for step in range(250):
        assert weights.param_groups[0]["lr"] == pytest.approx(0.01 * 0.95 ** (step // 100))
        # The loss never improves on the first: after 101 more steps the rate of the latents is a tenth.
        assert latents.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1 ** (max(step - 1, 0) // 101))
        follow(1.0)


# Published lengths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant", "published"), [
    ("zeroq", {}, {"steps": 500, "rate": 0.5, "patience": 100, "schedule": "plateau", "factor": 0.1, "optimizer": "adam"}),
    ("dsg", {}, {"steps": 500, "rate": 0.5, "patience": 100, "schedule": "plateau", "factor": 0.1, "slack": 0.9}),
    ("intraq", {}, {"steps": 1000, "batch": 256, "rate": 0.5, "patience": 50, "schedule": "plateau", "enlarge": 0.5,
                    "pipeline": "local-object", "optimizer": "adam"}),
    ("genie", {}, {"steps": 4000, "batch": 128, "rate": 0.1, "generator_rate": 0.01, "decay": 0.95, "patience": 100,
                   "schedule": "plateau", "latent": 256, "swing": True}),
    ("dgh", {"variant": "paper"}, {"steps": 1000, "batch": 128, "rate": 16.0, "patience": 20, "factor": 0.5,
                                   "schedule": "plateau-reset", "optimizer": "radam", "extra_pixels": 32}),
    ("dgh", {"variant": "product"}, {"steps": 500, "batch": 32, "rate": 16.0, "patience": 10, "factor": 0.5,
                                     "schedule": "plateau-reset", "optimizer": "radam", "extra_pixels": 32}),
])  # fmt: skip
def test_the_budget_paper_is_the_published_one(name, variant, published) -> None:
    options = resolve(SOURCES[name].Options(budget="paper", **variant), (224, 224), 10)
    assert {key: getattr(options, key) for key in published} == published
    steps = [
        resolve(SOURCES[name].Options(budget=b, **variant), (224, 224), 10).steps
        for b in ("quick", "standard", "paper")
    ]
    assert steps == sorted(steps)
