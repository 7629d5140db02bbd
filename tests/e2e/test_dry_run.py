"""--dry-run of every long command: it tells what the command then does, and writes nothing."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from ovcalib import progress
from ovcalib.cli import app as cli
from ovcalib.gan import distillation, training
from ovcalib.gan import teacher as gan_teacher
from ovcalib.gan.pairs import Pairs, save_pairs
from ovcalib.gan.stylegan2 import DiscriminatorConfig
from ovcalib.gan.teacher import TeacherRecipe
from ovcalib.rundir import folder_bytes
from tests.gan.snapshots import tiny_config
from tests.toy import ToyNet

MODEL = ["tests.toy:ToyNet", "--input-shape", "3,16,16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
INVERSION = ["-O", "init=gaussian", "-O", "steps=4000", "--count", "8"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty current folder, and rehearsals of a moment."""
    monkeypatch.setattr(progress, "REHEARSAL_S", 0.2)
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def weights(place):
    """Of a ToyNet whose BatchNorm layers have seen something."""
    torch.manual_seed(0)
    net = ToyNet()
    for _ in range(10):
        net(2 * torch.randn(8, 3, 16, 16))
    torch.save(net.state_dict(), place / "toy.pt")
    return place / "toy.pt"


@pytest.fixture
def images(place):
    for name in ("a", "b"):
        (place / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(place / "images" / name / f"{i}.png")
    return f"imagefolder:{place / 'images'}"


@pytest.fixture
def pairs(place):
    rng = np.random.default_rng(0)
    (place / "pairs").mkdir()
    labels = np.arange(256) % 2
    found = Pairs(
        rng.standard_normal((256, 16), np.float32), labels, rng.integers(0, 256, (256, 32, 32, 3), np.uint8), ("a", "b")
    )
    save_pairs(found, place / "pairs", {})
    return place / "pairs"


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Presets of networks that are narrower still."""
    sides = {"channel_base": 128, "channel_max": 8}
    teacher = TeacherRecipe(generator=tiny_config(), discriminator=DiscriminatorConfig(mapping_layers=1, **sides))
    monkeypatch.setitem(gan_teacher.PRESETS, "cpu", teacher)
    monkeypatch.setitem(distillation.PRESETS, "cpu", distillation.StudentRecipe(ndf=8))


def planned(*arguments):
    found = run(*arguments, "--dry-run", "--json")
    assert found.exit_code == 0, found.stderr
    assert not [*Path().iterdir()]
    return json.loads(found.stdout)


def test_generate_tells_what_it_then_writes() -> None:
    command = ["generate", "noise", "--model", *MODEL, "--count", 40, "-o", "set"]
    plan = planned(*command)
    assert plan["recipe"]["calibration"]["num_samples"] == 40
    (stage,) = plan["stages"]
    assert (stage["what"], stage["why"]) == ("make 40 images with noise", "measured")
    assert plan["memory_bytes"] > 10**7
    assert run(*command).exit_code == 0
    # npz adds its headers.
    assert plan["disk_bytes"] <= Path("set/calibration.npz").stat().st_size <= plan["disk_bytes"] + 4096


def test_long_work_is_measured_on_its_beginning(weights) -> None:
    plan = planned("generate", "bn-inversion", "--model", *MODEL, "--weights", weights, *INVERSION)
    (stage,) = plan["stages"]
    assert re.fullmatch(r"measured on [\d.e-]+ % of it", stage["why"])
    assert stage["seconds"] > 1  # of 0.2 seconds of work
    assert plan["seconds"] == stage["seconds"]
    assert plan["disk_bytes"] == 8 * 3 * 16 * 16 * 4
    assert plan["writes"].startswith("runs/0001-bn-inversion")


def test_quantize_adds_up_its_stages(place, weights) -> None:
    evaluated = place / "eval.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(evaluated, images=pixels, labels=np.arange(40) % 4)
    plan = planned(
        "quantize", *MODEL, "--weights", weights, "--calib", "noise", "--num-samples", 5, "--eval",
        evaluated, "--benchmark-time", 3, "--ignore", "stem.*",
    )  # fmt: skip
    known = [stage["seconds"] for stage in plan["stages"] if stage["seconds"] is not None]
    assert [stage["what"].split()[0] for stage in plan["stages"]] == [
        "load",
        "make",
        "evaluate",
        "quantize,",
        "measure",
    ]
    assert len(known) == 4
    assert plan["seconds"] == pytest.approx(sum(known))
    (ignored,) = plan["ignored"]
    assert ignored.startswith("stem.*: stem.0 (Convolution)")


def test_benchmark_multiplies_its_settings(place) -> None:
    assert run("convert", *MODEL, "-o", place / "model").exit_code == 0
    plan = planned("benchmark", place / "model/model.xml", "-t", 30, "--precision", "default,f32")
    starting, measuring = plan["stages"]
    assert measuring["seconds"] == 30 * 4  # two hints, two precisions
    assert starting["seconds"] > 0
    assert plan["memory_bytes"] > 10**7
    missing = run("benchmark", place / "model/model.xml", "-d", "NPU", "--dry-run")
    assert missing.exit_code == 6


def test_train_teacher_tells_its_steps_and_what_is_left(images, narrow, monkeypatch) -> None:
    command = ["gan", "train-teacher", images, "--preset", "cpu", "--batch", 8, "--score-every", 0, "-o", "teacher"]
    found = run(*command, "--kimg", 40, "--dry-run")
    assert found.exit_code == 0, found.stderr
    assert "train the teacher, 5000 steps" in found.stdout
    assert not [*Path().iterdir()]
    assert run(*command, "--kimg", "0.016").exit_code == 0
    (megabytes,) = re.findall(r"disk:   about ([\d,.]+) MB in teacher", found.stdout)
    written = folder_bytes(Path("teacher"))
    assert 0.3 < written / (1e6 * float(megabytes.replace(",", ""))) < 1.5
    before = {path: path.read_bytes() for path in Path("teacher").iterdir()}
    again = run(*command, "--kimg", 40, "--dry-run")
    assert "train the teacher, 4998 steps" in again.stdout
    assert before == {path: path.read_bytes() for path in Path("teacher").iterdir()}
    other = run(*command, "--kimg", 40, "--r1-gamma", 1, "--dry-run")
    assert other.exit_code == 2
    assert "r1_gamma" in other.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in run(*command, "--kimg", 40, "--dry-run").stderr


def test_a_training_on_a_gpu_tells_its_memory(pairs, narrow, monkeypatch) -> None:
    """As far as that goes without a GPU: what torch tells of one is shown, and nothing is said of it on a CPU."""
    command = ["gan", "distill", pairs, "--preset", "cpu", "--batch", 4, "-o", "student", "--dry-run"]
    assert "GPU:" not in run(*command).stdout
    ask = training.gpu_memory
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**9, 80 * 10**9))
    monkeypatch.setattr(training, "gpu_memory", lambda device: ask(torch.device("cuda")))
    assert "GPU:    about 3,000.0 MB; 7,000 MB are free" in run(*command).stdout


def test_distill_tells_its_steps(pairs, narrow) -> None:
    found = run("gan", "distill", pairs, "--preset", "cpu", "--batch", 4, "--epochs", 100, "-o", "student", "--dry-run")
    assert found.exit_code == 0, found.stderr
    assert "train the student, 6400 steps" in found.stdout
    assert re.search(r"time:   about \d+ (min|h)", found.stdout)
    assert not [*Path().iterdir()]


@pytest.mark.parametrize(
    "command", [["generate", "noise", "--model", *MODEL], ["quantize", *MODEL, "--calib", "noise"]]
)
def test_what_would_be_refused_is_refused(command) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    found = run(*command, "-o", "mine", "--overwrite", "--dry-run")
    assert found.exit_code == 2
    assert "did not write" in found.stderr
    assert [*Path("mine").iterdir()] == [Path("mine/letter.txt")]


def test_an_interrupted_run_keeps_its_state() -> None:
    state = Path("runs/.0001-noise-tests.toy-ToyNet.resume")
    state.mkdir(parents=True)
    Path("runs/0001-other").mkdir()
    assert run("generate", "noise", "--model", *MODEL, "--count", 2, "--dry-run").exit_code == 0
    assert state.is_dir()
