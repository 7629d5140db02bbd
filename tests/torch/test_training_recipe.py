"""The recipe of the CIFAR-10 networks keeps what it says of itself."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ovcalib.models.weights import load_state_dict


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import train_cifar10

        yield train_cifar10


def test_cutout_hides_one_square_of_each_image_and_is_centred_anywhere(recipe) -> None:
    images = torch.ones(2000, 3, 32, 32)
    hidden = recipe.cutout(images, 12, torch.Generator().manual_seed(0)) == 0
    assert (hidden == hidden[:, :1]).all()
    area = hidden[:, 0].sum((1, 2))
    assert area.max() == 144
    assert area.min() >= 36  # a centre on a corner leaves a quarter
    # In the middle of the image every one of the 144 centres around a pixel hides it.
    assert hidden[:, 0, 12:20, 12:20].float().mean().item() == pytest.approx(144 / 1024, rel=0.1)


def test_augmentation_moves_and_flips_but_invents_nothing(recipe) -> None:
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).reshape(2, 3, 32, 32)
    moved = recipe.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    for before, after in zip(images, moved, strict=True):
        assert torch.isin(after, before).all()


def test_the_rate_warms_up_and_ends_at_nothing(recipe) -> None:
    rates = [recipe.learning_rate(step, 10, 4, 0.1) for step in range(40)]
    assert rates[9] == pytest.approx(0.1)
    assert rates[:9] == sorted(rates[:9])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert recipe.learning_rate(40, 10, 4, 0.1) == pytest.approx(0)


def test_half_the_file_holds_the_very_weights_that_are_measured(recipe) -> None:
    torch.manual_seed(0)
    convolution, norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
    torch.nn.init.constant_(norm.running_var, 1e-9)  # nothing, in float16
    net = torch.nn.Sequential(convolution, norm)
    before = convolution.weight.clone()
    state = recipe.stored(net, half=True)
    assert state["0.weight"].dtype == torch.float16
    assert torch.equal(state["0.weight"].float(), convolution.weight)
    assert not torch.equal(before, convolution.weight)
    assert {state[name].dtype for name in ("0.bias", "1.weight", "1.running_var")} == {torch.float32}
    assert state["1.running_var"].min() > 0
    assert all(t.dtype != torch.float16 for t in recipe.stored(net, half=False).values())


def test_a_stopped_training_goes_on_to_the_same_weights_and_a_restart_begins_from_others(
    recipe, rng, tmp_path, monkeypatch
) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, images=rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8), labels=np.arange(64) % 10)

    def run(out, *more):
        command = ["train", "resnet20-cifar10", "--train", f"npz:{data}", "--test", f"npz:{data}", "-o", str(tmp_path / out),
                   "--epochs", "2", "--batch", "32", "--cutout", "8", "--device", "cpu", *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        recipe.main()
        file = tmp_path / out / "resnet20-cifar10.safetensors"
        return load_state_dict(file) if file.is_file() else None

    whole = run("whole")
    assert run("parts", "--stop-after", "1") is None
    parts = run("parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    again = run("again", "--init", str(tmp_path / "whole/resnet20-cifar10.safetensors"))
    assert not torch.equal(whole["fc.weight"], again["fc.weight"])
