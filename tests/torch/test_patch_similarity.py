"""patch-similarity: its loss against loops over pairs, its taps against attention written by hand, and its loop."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from torch import nn
from torch.nn import functional as F

from ovcalib.calibration import SOURCES, patch_losses, patch_run
from ovcalib.calibration.attention_taps import attended, has_attention
from ovcalib.calibration.auto import usual_candidates
from ovcalib.calibration.inversion_options import resolve
from ovcalib.calibration.make import default_source
from ovcalib.calibration.sources import Request, generate
from ovcalib.errors import ModelError
from ovcalib.models.vit import CifarViT
from ovcalib.records.model import ModelSpec, Weights
from ovcalib.records.preprocessing import Preprocessing
from tests.toy import ToyNet

SIDE, CLASSES, BANDWIDTH = 16, 5, 0.05
SPEC = ModelSpec(
    name="small", input_shape=(3, SIDE, SIDE), num_classes=CLASSES, weights=Weights(origin="random"),
    preprocessing=Preprocessing(height=SIDE, width=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3),
)  # fmt: skip


class Small(nn.Module):
    """Patches of 4x4 pixels, tokens in front of them, one attention written in one of several ways, a classifier."""

    def __init__(self, way, extra=1, heads=2, width=8) -> None:
        super().__init__()
        self.way, self.heads = way, heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, extra, width))
        self.positions = nn.Parameter(torch.randn(1, extra + 16, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        nn.init.normal_(self.attention.out_proj.bias)  # zero in a new one
        self.drop, self.softmax = nn.Dropout(0.3), nn.Softmax(-1)
        self.head = nn.Linear(width, CLASSES)

    def tokens(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.extra.expand(len(x), -1, -1), x], 1) + self.positions

    def heads_of(self, x):
        """Query, key, value, [N, heads, tokens, D] each."""
        qkv = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)]

    def attend(self, x):
        if self.way == "multi-head":
            return self.attention(x, x, x, need_weights=False)[0]
        if self.way == "multi-head with weights":
            return self.attention(x, x, x)[0]
        q, k, v = self.heads_of(x)
        if self.way == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if self.way == "operator":
                mixed = self.drop(self.softmax(scores)) @ v
            elif self.way == "method":
                mixed = scores.double().softmax(dim=-1).type_as(v).matmul(v)
            elif self.way == "einsum":
                mixed = torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, -1), v)
        return self.attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = self.tokens(x)
        return self.head((x + self.attend(x)).mean(1))


WAYS = ("multi-head", "multi-head with weights", "fused", "operator", "method", "einsum")


def small(way="fused", **given):
    torch.manual_seed(0)
    return Small(way, **given).eval().requires_grad_(False)


def images(count, side=SIDE, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3, side, side), dtype=np.float32))


def by_hand(query, key, value):
    """softmax(QK^T / sqrt(D))V, averaged over heads, in float64."""
    q, k, v = (part.double().numpy() for part in (query, key, value))
    scores = np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.einsum("bhij,bhjd->bhid", weights, v).mean(1)


# Attention, found by its calls


@pytest.mark.parametrize("way", WAYS)
def test_attention_is_seen_however_it_is_written(way) -> None:
    net, x = small(way), images(3)
    with torch.no_grad():
        outputs, found = attended(net, x)
        expected = by_hand(*net.heads_of(net.tokens(x)))
        plain = net(x)
    assert [tuple(block.shape) for block in found] == [(3, 1, 17, 4)]
    np.testing.assert_allclose(found[0][:, 0], expected, atol=1e-5)
    torch.testing.assert_close(outputs[0], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_comes_through_the_taps(way) -> None:
    x = images(2).requires_grad_()
    (found,) = attended(small(way), x)[1]
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_blocks_of_a_timm_vit_agree_with_attention_by_hand() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=4
    ).eval()
    inputs = []
    for block in net.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        _, found = attended(net, images(2, 32))
        for block, x, ours in zip(net.blocks, inputs, found, strict=True):
            heads = [part.unflatten(-1, (3, 8)).transpose(1, 2) for part in block.attn.qkv(x).chunk(3, -1)]
            np.testing.assert_allclose(ours[:, 0], by_hand(*heads), atol=1e-5)


def test_blocks_of_a_torchvision_vit_agree_with_attention_by_hand() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4).eval()
    inputs = []
    for layer in net.encoder.layers:
        layer.ln_1.register_forward_hook(lambda _, given, out: inputs.append(out))
    with torch.no_grad():
        outputs, found = attended(net, images(2, 32))
        torch.testing.assert_close(outputs[0], net(images(2, 32)), rtol=1e-5, atol=1e-6)
        for layer, x, ours in zip(net.encoder.layers, inputs, found, strict=False):
            qkv = F.linear(x, layer.self_attention.in_proj_weight, layer.self_attention.in_proj_bias)
            heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in qkv.chunk(3, -1)]
            np.testing.assert_allclose(ours[:, 0], by_hand(*heads), atol=1e-5)


def test_windows_of_swin_stay_with_their_image() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.SwinTransformer([4, 4], 12, [2], [3], [4, 4], num_classes=4).eval()
    x = images(2, 32)
    with torch.no_grad():
        both = attended(net, x)[1]
        alone = attended(net, x[1:])[1]
    assert [tuple(block.shape) for block in both] == [(2, 4, 16, 4)] * 2
    for pair, single in zip(both, alone, strict=True):
        torch.testing.assert_close(pair[1:], single, rtol=1e-4, atol=1e-5)


def test_a_classifier_is_no_attention_and_its_mode_is_kept() -> None:
    net = ToyNet().train()
    assert not has_attention(net, (3, 16, 16))
    assert net.training
    assert net.block.bn.training
    assert has_attention(small(), (3, SIDE, SIDE))
    assert not has_attention(small(), (3, 8, 8))  # it does not run


# The loss


@pytest.mark.parametrize(
    ("tokens", "height", "width", "extra"),
    [
        (196, 224, 224, 0), (197, 224, 224, 1), (198, 224, 224, 2), (261, 224, 224, 5), (49, 224, 224, 0),
        (50, 224, 224, 1), (99, 112, 224, 1), (98, 112, 224, 0), (64, 32, 32, 0), (65, 32, 32, 1), (49, 224, 448, 0),
        (30, 224, 224, 5), (31, 224, 224, 0),
    ],
)  # fmt: skip
def test_tokens_that_are_no_patches(tokens, height, width, extra) -> None:
    assert patch_losses.extra_tokens(tokens, height, width) == extra


def entropy_by_hand(samples, bandwidth):
    """scipy's kernel density of the samples at ten points, and the integral of -p log p by trapezoids."""
    density = gaussian_kde(samples, bw_method=bandwidth / samples.std(ddof=1))
    points = np.linspace(samples.min(), samples.max(), 10)
    p = density(points) + 1e-4
    values = -p * np.log(p)
    return sum((points[i + 1] - points[i]) * (values[i] + values[i + 1]) / 2 for i in range(9))


def cosines_by_hand(patches):
    return np.array([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a in patches for b in patches])


def test_the_entropy_of_a_block_is_that_of_all_pairs_of_its_patches() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((3, 2, 17, 5)).astype(np.float32)
    blocks[:, :, 0] *= 100  # a class token in front, which does not count
    blocks[1] += 1  # one image is more alike than the others
    ours = patch_losses.patch_entropy(torch.from_numpy(blocks), SIDE, SIDE, BANDWIDTH)
    expected = [
        entropy_by_hand(np.concatenate([cosines_by_hand(window[1:]) for window in image.astype(float)]), BANDWIDTH)
        for image in blocks
    ]
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert len(set(np.round(expected, 3))) == 3


def test_the_entropy_of_a_normal_distribution_is_the_known_one() -> None:
    """0.5 log(2 pi e (std^2 + bandwidth^2)), as kernels widen it; ten points and the ends cost a little."""
    quantiles = torch.distributions.Normal(0.0, 0.3).icdf(torch.linspace(0.0005, 0.9995, 4000))
    found = patch_losses.differential_entropy(quantiles[None], 0.1)
    assert found.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * (0.3**2 + 0.1**2)), abs=0.03)


def test_total_variation() -> None:
    x = images(2, 6)
    pairs = [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((1, 0), (0, 1)), ((0, 0), (1, 1))]
    for image, ours in zip(x.double().numpy(), patch_losses.total_variation(x), strict=True):
        total = 0.0
        for (y1, x1), (y2, x2) in pairs:
            squares = [
                (image[c, i + y1, j + x1] - image[c, i + y2, j + x2]) ** 2
                for c in range(3) for i in range(6 - max(y1, y2)) for j in range(6 - max(x1, x2))
            ]  # fmt: skip
            total += math.sqrt(sum(squares))
        assert ours.item() == pytest.approx(total, rel=1e-5)


# The loop


def request(net, count=4, **given):
    return Request(count=count, seed=3, spec=SPEC, module=net, **given)


def run_of(net, **options):
    given = resolve(SOURCES["patch-similarity"].Options(budget="paper", batch=2, rate=0.2, **options), (SIDE, SIDE))
    return patch_run.PatchRun(request(net), given, net, torch.arange(4) % CLASSES, torch.device("cpu"))


def loss_by_hand(net, x, indices):
    """Li et al. 2022, equations 8 to 11, per image: -H + cross-entropy + 0.05 |TV - t|, as for 32 images like it."""
    heads = net.heads_of(net.tokens(x))
    mixed = (torch.softmax(heads[0] @ heads[1].mT / 2, -1) @ heads[2]).mean(1)[:, 1:]
    size = math.sqrt(SIDE * SIDE / 224**2)
    values = []
    for image, logits, patches, index in zip(x, net(x), mixed, indices, strict=True):
        cosines = F.cosine_similarity(patches[:, None], patches[None], dim=2).flatten()
        points = torch.linspace(cosines.min().item(), cosines.max().item(), 10)
        kernels = torch.exp(-((points[:, None] - cosines) ** 2) / (2 * 0.01**2)) / math.sqrt(2 * math.pi * 0.01**2)
        p = kernels.mean(1) + 1e-4
        entropy = torch.trapezoid(-p * p.log(), points)
        target = np.random.default_rng((3, 5, index)).uniform(2500, 3000)
        variation = patch_losses.total_variation(image.expand(32, -1, -1, -1))[:1]  # tested above
        variation = variation * math.sqrt(32)
        values.append(-entropy - logits.log_softmax(0)[index % CLASSES] + 0.05 * (variation - size * target).abs())
    return torch.cat(values)


def test_the_loss_is_the_published_one() -> None:
    net, x = small(), images(2)
    torch.testing.assert_close(run_of(net).loss(x, [2, 3]), loss_by_hand(net, x, [2, 3]), rtol=1e-4, atol=1e-4)


def test_the_first_steps_are_those_of_adam() -> None:
    net = small()
    run = run_of(net, steps=20)
    run.open(1)
    start = run.batches[1].images.clone()
    assert torch.equal(start, torch.stack([
        torch.from_numpy(np.random.default_rng((3, 0, i)).standard_normal((3, SIDE, SIDE), dtype=np.float32))
        for i in (2, 3)
    ]))  # fmt: skip
    leaf = start.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.0, betas=(0.5, 0.9))
    for step in range(3):  # differences in the last digit grow tenfold a step
        run.advance(1)
        rng = np.random.default_rng((3, 2, step))
        offset, flip = int(rng.integers(-1, 2)), rng.random() < 0.5  # 15 pixels of 224 are one of 16
        view = torch.roll(leaf, (offset, offset), (2, 3))
        view = torch.flip(view, (3,)) if flip else view
        adam.param_groups[0]["lr"] = 0.2 * [0.5, 1.0, 1.0][step]
        (leaf.grad,) = torch.autograd.grad(loss_by_hand(net, view, [2, 3]).sum(), leaf)
        adam.step()
        with torch.no_grad():
            leaf.clamp_(-2, 2)  # black and white
    moved = (run.batches[1].images - leaf).abs() < 2e-3
    assert moved.float().mean() > 0.98  # Adam turns a gradient near zero into a step of either sign
    assert (leaf - start).abs().mean() > 0.1


def test_two_rounds_warm_up_and_end_at_zero() -> None:
    rates = np.array([patch_run.rate_at(step, 1000) for step in range(1000)])
    np.testing.assert_allclose(rates[:100], np.arange(1, 101) / 100)
    np.testing.assert_allclose(rates[100:500], 0.5 * (1 + np.cos(np.pi * np.arange(400) / 400)))
    np.testing.assert_allclose(rates[500:], rates[:500])
    assert all(0 < patch_run.rate_at(step, steps) <= 1 for steps in range(1, 30) for step in range(steps))


def test_the_entropy_rises_and_the_class_is_seen() -> None:
    torch.manual_seed(0)
    net = CifarViT(depth=2, width=32, heads=2, num_classes=CLASSES).eval().requires_grad_(False)
    # So that images differ in the attention and in their class.
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        for part, factor in (("patches", 2), ("qkv", 3), ("head", 5)):
            weight.mul_(factor if part in name else 1)
    preprocessing = SPEC.preprocessing.model_copy(update={"height": 32, "width": 32})
    spec = SPEC.model_copy(update={"input_shape": (3, 32, 32), "preprocessing": preprocessing})
    made = generate(
        "patch-similarity",
        dataclasses.replace(request(net), spec=spec),
        # So few steps reach the class whatever the CPU only where it weighs more than published.
        {"budget": "paper", "steps": "40", "batch": "4", "class_weight": "3"},
    )
    found, start = torch.from_numpy(made.images), images(4, 32)

    def entropy(x):
        blocks = attended(net, x)[1]
        assert len(blocks) == 2
        return torch.stack([patch_losses.patch_entropy(block, 32, 32, 0.01) for block in blocks]).sum(0)

    assert (entropy(found) > entropy(start) + 0.1).all()
    assert net(found).argmax(1).tolist() == made.labels.tolist() == [0, 1, 2, 3]
    assert made.provenance.labels == "method"
    assert made.provenance.options["rate"] == 0.2
    assert (np.abs(made.images) <= 2).all()  # black and white


def test_windows_take_the_published_rate_of_swin() -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.SwinTransformer([4, 4], 12, [2], [3], [2, 2], num_classes=CLASSES).eval()
    made = generate("patch-similarity", request(net, 1), {"budget": "paper", "steps": "1", "batch": "1"})
    assert made.provenance.options["rate"] == 0.25


def test_without_logits_there_is_no_class() -> None:
    spec = SPEC.model_copy(update={"num_classes": None})
    made = generate(
        "patch-similarity", dataclasses.replace(request(small(), 2), spec=spec), {"steps": "1", "batch": "2"}
    )
    assert made.labels is None
    assert made.provenance.labels is None


def test_a_network_without_attention_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"small has no attention.*Calibrate with bn-inversion"):
        generate("patch-similarity", request(ToyNet()), {"steps": "1"})


# The default


def test_the_default_is_by_what_the_network_has() -> None:
    assert default_source(small(), SPEC)[0] == "patch-similarity"
    assert usual_candidates(request(small())) == ("patch-similarity", "fractal")
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    source, why = default_source(plain, SPEC)
    assert source == "fractal"
    assert "no BatchNorm" in why
    torch.manual_seed(0)
    net = ToyNet()
    net(images(8))
    assert default_source(net.eval(), SPEC) == ("bn-inversion", None)
