"""`ovcalib gan score`, `show` and `sample` as a user meets them."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from ovcalib.cli import app as cli
from ovcalib.gan import scores
from ovcalib.gan.snapshot import write_generator
from ovcalib.gan.stylegan2 import Generator
from ovcalib.models import builtin
from ovcalib.models.weights import save_state_dict
from tests.gan.snapshots import tiny_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("studies")
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for k, name in enumerate(builtin.CLASSES["cifar10"]):
        (root / "real" / name).mkdir(parents=True)
        for i in range(4):
            image = np.clip(rng.normal(20 + 20 * k, 10, (32, 32, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(image).save(root / "real" / name / f"{i}.png")
    save_state_dict(builtin.build("resnet20-cifar10").state_dict(), root / "weights.safetensors")
    write_generator(Generator(tiny_config(c_dim=10, img_resolution=32)), root / "teacher.safetensors")
    return root


@pytest.fixture(autouse=True)
def no_inception(monkeypatch) -> None:
    monkeypatch.setattr("ovcalib.gan.studies.find_inception", lambda given: given)


def run(*arguments):
    found = CliRunner().invoke(cli.app, ["gan", *map(str, arguments)])
    return found.exit_code, found.stdout, found.stderr


def test_scores_stand_between_floor_and_ceiling(place) -> None:
    code, out, err = run(
        "score", f"teacher=stylegan2-ada:{place / 'teacher.safetensors'}", f"same=imagefolder:{place / 'real'}",
        "--reference", f"imagefolder:{place / 'real'}", "--count", 20, "--weights", place / "weights.safetensors", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "measuring with the classifier" in err
    found = json.loads(out)
    assert list(found) == ["real (floor)", "teacher", "same", "noise (ceiling)"]
    assert found["same"]["fid-resnet20"] == pytest.approx(0, abs=1e-4)  # the very images of the reference
    assert not any(name in {"fid", "kid", "inception-score"} for row in found.values() for name in row)


def test_pictures_are_drawn(place, tmp_path) -> None:
    code, _, err = run(
        "show", f"teacher=stylegan2-ada:{place / 'teacher.safetensors'}", "--reference", f"imagefolder:{place / 'real'}",
        "-o", tmp_path / "out", "--each", 2, "--tsne", 12, "--weights", place / "weights.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"grid.png", "tsne.png", "request.json"}


def test_samples_are_written_by_class(place, tmp_path) -> None:
    code, out, _ = run(
        "sample", f"stylegan2-ada:{place / 'teacher.safetensors'}", "-o", tmp_path / "out", "--count", 12
    )
    assert code == 0
    assert "12 images of 32x32" in out
    assert len(list((tmp_path / "out" / "class-1").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "x=imagefolder:nowhere", "--reference", "imagefolder:nowhere"], "nowhere"),
        (["score", "fractal", "--reference", "REAL", "--classifier", "vgg99"], "built-in model"),
        (["score", "a=fractal", "a=noise", "--reference", "REAL", "--count", "5"], "same name"),
        (["sample", "fractal", "-o", "out"], "Expected stylegan2-ada:FILE"),
        (["train-teacher", "REAL", "-o", "out", "--preset", "papr"], "Did you mean 'paper'"),
        (
            ["train-teacher", "REAL", "-o", "out", "--precision", "low"],
            "--precision low: input should be 'auto', 'half' or 'float32'",
        ),
        (["train-teacher", "REAL", "-o", "out", "--kimg", "0"], "should be greater than or equal to 0.001"),
        (["distill", "nowhere", "-o", "out", "--batch", "1"], "should be greater than or equal to 2"),
        (["collect", "nowhere.pkl", "-o", "out"], "There is no generator"),
        (["distill", "nowhere", "-o", "out"], "no pairs at"),
        (["train-teacher", "REAL", "-o", "out", "-d", "cuda:77"], "CUDA devices"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(place, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*[str(a).replace("REAL", f"imagefolder:{place / 'real'}") for a in arguments])
    assert code in (2, 3, 4, 6)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_inception_needs_its_file(tmp_path) -> None:
    with pytest.raises(Exception, match="There is no file"):
        scores.find_inception(tmp_path / "nowhere.pth")
