"""The networks: sizes, reference outputs, and what must hold whatever the weights."""

import numpy as np
import pytest
import torch

from ovcalib.errors import ModelError
from ovcalib.gan import distylegan
from ovcalib.gan.distylegan import StudentConfig, StudentDiscriminator, StudentGenerator, load_student, save_student
from ovcalib.gan.sampling import from_pixels, one_hot, to_pixels, to_pixels_minmax
from ovcalib.gan.snapshot import discriminator_of, generator_of, read_snapshot
from ovcalib.gan.stylegan2 import (
    Discriminator,
    DiscriminatorConfig,
    Generator,
    minibatch_std,
    normalise_second_moment,
    resample_filter,
    upsample_image,
)
from tests.gan.snapshots import tiny_config


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        generator = Generator()
        assert size(generator) == 20_215_315
        assert size(generator.mapping) == 793_088
        assert len(generator.state_dict()) == 77
        assert size(Discriminator()) == 23_089_664
        assert size(StudentGenerator()) == 2_054_368
    assert size(StudentDiscriminator()) == 3_415_178


@pytest.mark.parametrize("name", ["tiny_protocol3.pkl", "tiny_protocol4.pkl"])
def test_outputs_are_those_of_the_official_networks(shared_data, name) -> None:
    path = shared_data / "stylegan2_ada" / name
    content = read_snapshot(path)
    generator, discriminator = generator_of(path, content), discriminator_of(path, content)
    with np.load(shared_data / "stylegan2_ada" / "tiny_reference.npz") as reference, torch.no_grad():
        z, c = torch.from_numpy(reference["z"]), torch.from_numpy(reference["c"])
        for psi, key in ((1.0, "psi1"), (0.7, "psi07")):
            assert np.abs(generator.styles(z, c, psi).numpy() - reference[f"ws_{key}"]).max() < 1e-4
            assert np.abs(generator(z, c, truncation=psi).numpy() - reference[f"img_{key}"]).max() < 1e-4
        assert np.abs(generator(z, c, noise="none").numpy() - reference["img_psi1_nonoise"]).max() < 1e-4
        logits = discriminator(torch.from_numpy(reference["img_psi1"]), c)
        assert np.abs(logits.numpy() - reference["d_logits"]).max() < 1e-4
        assert np.array_equal(to_pixels(torch.from_numpy(reference["img_psi1"])), reference["uint8_psi1"])


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    made = Generator(tiny_config(img_resolution=16)).eval().requires_grad_(False)
    made.mapping.w_avg.normal_()
    for name, parameter in made.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.3)
    return made


def test_full_truncation_is_one_image_for_all(generator) -> None:
    images = generator(torch.randn(6, 8), torch.eye(3).repeat(2, 1), truncation=0.0)
    assert (images - images[:1]).abs().max() < 1e-5


def test_truncation_can_stop_at_a_layer(generator) -> None:
    z, c = torch.randn(2, 8), torch.eye(3)[:2]
    whole, part = generator.styles(z, c, 0.5), generator.styles(z, c, 0.5, cutoff=2)
    assert torch.equal(part[:, :2], whole[:, :2])
    assert torch.equal(part[:, 2:], generator.styles(z, c)[:, 2:])


def test_the_length_of_z_does_not_matter_and_the_class_does(generator) -> None:
    z, c = torch.randn(3, 8), torch.eye(3)
    image = generator(z, c)
    assert (generator(7 * z, c) - image).abs().max() < 1e-5
    assert (generator(z, c.roll(1, 0)) - image).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert normalise_second_moment(z).square().mean(1) == pytest.approx([1, 1, 1], abs=1e-5)


def test_noise_has_three_modes_and_can_be_given(generator) -> None:
    z, c = torch.randn(2, 8), torch.eye(3)[:2]
    layers = [layer for r in (4, 8, 16) for layer in getattr(generator.synthesis, f"b{r}").layers]
    given = [layer.noise_const.expand(2, 1, -1, -1) for layer in layers]
    assert torch.allclose(generator(z, c, noise=given), generator(z, c, noise="const"), atol=1e-6)
    draws = [generator(z, c, noise="random", rng=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(generator, half) -> None:
    z, c = torch.randn(4, 8), torch.eye(3)[[0, 1, 2, 0]]
    image = generator(z, c)
    near = {torch.float16: 0.02, torch.bfloat16: 0.1}[half]
    assert (generator(z, c, half=half) - image).abs().mean() < near * image.abs().mean()


def test_unconditional_networks_take_no_label() -> None:
    made = Generator(tiny_config(c_dim=0))
    assert "mapping.embed.weight" not in made.state_dict()
    image = made(torch.randn(2, 8))
    judge = Discriminator(DiscriminatorConfig(c_dim=0, img_resolution=8, channel_base=64, channel_max=4))
    assert judge(image).shape == (2, 1)


def test_resampling_keeps_constants_and_doubles_the_size() -> None:
    kernel = resample_filter()
    assert kernel.sum() == pytest.approx(1)
    assert (kernel * 64).tolist() == [[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]
    up = upsample_image(torch.full((1, 2, 6, 6), 0.7), kernel)
    assert up.shape == (1, 2, 12, 12)
    assert (up[..., 2:-2, 2:-2] - 0.7).abs().max() < 1e-6


def test_minibatch_std_by_hand() -> None:
    x = torch.tensor([0.0, 10, 2, 10]).reshape(4, 1, 1, 1)  # groups of two: images 0 and 2, and 1 and 3
    assert minibatch_std(x, 2)[:, 1, 0, 0].tolist() == pytest.approx([1, 1e-4, 1, 1e-4], abs=1e-6)


# Student ----------------------------------------------------------------------------------------

SHAPES = {
    "project.0.weight": (256, 512), "fc.0.weight": (8192, 138), "upsample1.1.weight": (256, 256, 3, 3),
    "upsample2.1.weight": (128, 128, 3, 3), "upsample3.1.weight": (64, 64, 3, 3), "img.0.weight": (3, 32, 3, 3),
}  # fmt: skip


def published_state():
    """Tensors with the names and shapes of the published generator.pt."""
    state = {name: torch.randn(shape) * 0.05 for name, shape in SHAPES.items()}
    for name in list(SHAPES)[:-1]:
        layer, index, _ = name.split(".")
        norm, width = f"{layer}.{int(index) + 1}", SHAPES[name][0]
        state |= {f"{norm}.{key}": torch.rand(width) + 0.5 for key in ("weight", "bias", "running_mean", "running_var")}
        state[f"{norm}.num_batches_tracked"] = torch.tensor(5)
    return state


def test_the_published_checkpoint_loads_and_survives_our_container(tmp_path) -> None:
    state = published_state()
    torch.save(state, tmp_path / "generator.pt")
    student = load_student(tmp_path / "generator.pt")
    assert student.generator.config == StudentConfig()
    assert set(student.generator.state_dict()) == set(state)
    save_student(student.generator, tmp_path / "s.safetensors", ("a", "b"), "CC0-1.0")
    assert (tmp_path / "s.safetensors").stat().st_size < 4.4e6
    again = load_student(tmp_path / "s.safetensors")
    assert (again.classes, again.licence) == (("a", "b"), "CC0-1.0")
    z, c = torch.randn(4, 512), torch.eye(10)[:4]
    first = student.generator(z, c)
    assert first.shape == (4, 3, 32, 32)
    assert first.abs().max() <= 1
    assert (again.generator(z, c) - first).abs().mean() < 5e-3
    assert student.generator(z[:0], c[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.0.weight"), "no DiStyleGAN generator"),
        (lambda s: s.pop("upsample2.2.bias"), r"missing \(upsample2\.2\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected"),
        (lambda s: s["img.0.weight"].fill_(np.nan), "not finite"),
    ],
)
def test_other_weights_are_refused(tmp_path, change, message) -> None:
    state = published_state()
    change(state)
    torch.save(state, tmp_path / "generator.pt")
    with pytest.raises(ModelError, match=message):
        load_student(tmp_path / "generator.pt")


def test_an_open_gate_passes_the_first_half() -> None:
    block = distylegan._upsample(2, 2).eval()
    x = torch.cat([torch.randn(1, 2, 4, 4), torch.full((1, 2, 4, 4), 50.0)], dim=1)
    assert torch.allclose(block[3](x), x[:, :2])


def test_the_discriminator_gives_a_logit_and_four_maps() -> None:
    logit, features = StudentDiscriminator(ndf=8)(torch.zeros(2, 3, 32, 32), torch.eye(10)[:2])
    assert logit.shape == (2, 1)
    assert [tuple(f.shape[1:]) for f in features] == [(8, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)]


# Pixels -------------------------------------------------------------------------------------------


def test_pixels() -> None:
    grey = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1)
    assert to_pixels(grey)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    images = torch.rand(3, 3, 4, 4) * 0.2 - 0.1
    stretched = to_pixels_minmax(images)
    assert stretched.min(axis=(1, 2, 3)).tolist() == [0] * 3
    assert stretched.max(axis=(1, 2, 3)).tolist() == [255] * 3
    assert from_pixels(np.array([[[[0, 255, 51]]]], np.uint8)).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
