"""Augmentation, losses, schedules, and that an interrupted training ends where an uninterrupted one does."""

import dataclasses
import json
import socket
import threading
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from torch.multiprocessing.spawn import spawn

from ovcalib import machine
from ovcalib.cli import app as cli
from ovcalib.errors import DataError, UsageError
from ovcalib.gan import augment, distillation, teacher
from ovcalib.gan.distillation import StudentRecipe, StudentTraining, pixel_weight
from ovcalib.gan.pairs import Pairs, load_pairs
from ovcalib.gan.stylegan2 import DiscriminatorConfig
from ovcalib.gan.teacher import TeacherRecipe, TeacherTraining, ema_beta
from ovcalib.gan.training import TrainingImages, Workers, batch_indices, half_precision, load_training_images, workers
from tests.conftest import toy_images
from tests.gan.snapshots import tiny_config

CPU = torch.device("cpu")
ALONE = Workers(0, 1, CPU)


# Augmentation ---------------------------------------------------------------------------------


@pytest.fixture
def picture():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack([torch.sin(x / 6), torch.cos(y / 7), torch.sin((x + y) / 9)])[None]


def test_the_controller_moves_one_fixed_step() -> None:
    assert augment.adjust_probability(0.1, 0.7, 256) == pytest.approx(0.1 + 256 / 500_000)
    assert augment.adjust_probability(0.1, 0.5, 256) == pytest.approx(0.1 - 256 / 500_000)
    assert augment.adjust_probability(0.0, 0.5, 256) == 0
    assert augment.adjust_probability(1.0, 0.9, 256) == 1
    assert augment.adjust_probability(0.3, 0.6, 256) == 0.3


def test_geometry_moves_pixels_where_it_says(picture) -> None:
    def move(**entries):
        matrix = torch.eye(3)[None].clone()
        for key, value in entries.items():
            matrix[0, int(key[1]), int(key[2])] = value
        return augment.apply_geometry(picture, matrix)

    assert (move() - picture).abs().max() < 1e-5
    assert (move(m02=3.0)[..., :29] - picture[..., 3:]).abs().max() < 1e-5
    assert (move(m00=-1.0) - picture.flip(3)).abs()[..., 4:-4].max() < 0.02
    turned = move(m00=0.0, m01=-1.0, m10=1.0, m11=0.0)
    assert (turned - picture.rot90(1, (2, 3))).abs()[..., 4:-4, 4:-4].max() < 0.02


def test_colour_keeps_what_each_step_keeps(picture) -> None:
    colour = augment.draw_colour(200, 1.0, torch.Generator().manual_seed(0))
    grey = torch.full((200, 3, 1, 1), 0.3)
    changed = augment.apply_colour(grey, colour)
    assert (changed - changed.mean(1, keepdim=True)).abs().max() < 1e-5  # grey stays grey
    assert augment.draw_colour(1, 0.0, torch.Generator()).tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]


def test_as_many_images_change_as_p_says(picture) -> None:
    batch = picture.repeat(400, 1, 1, 1)
    assert augment.augment(batch, 0.0, torch.Generator()) is batch
    changed = augment.augment(batch, 0.05, torch.Generator().manual_seed(0))
    share = ((changed - batch).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean().item()
    assert 0.25 < share < 0.55  # twelve gates, of which a few may draw what changes nothing: 1 - 0.95^12 = 0.46


def test_augmentation_can_be_differentiated_twice(picture) -> None:
    small = picture[:, :, :8, :8].double().repeat(2, 1, 1, 1)

    def run(x):
        return augment.augment(x, 0.9, torch.Generator().manual_seed(3))

    x = small.clone().requires_grad_()
    weight = torch.randn(run(x).shape, dtype=torch.double)
    (gradient,) = torch.autograd.grad((run(x) * weight).sum(), x, create_graph=True)
    assert torch.autograd.gradcheck(run, (small[:1].requires_grad_(),), eps=1e-3, atol=1e-4, nondet_tol=1e-8)
    # The map is linear, so moving the image does not change the gradient.
    y = (small + 1).requires_grad_()
    assert torch.allclose(torch.autograd.grad((run(y) * weight).sum(), y)[0], gradient)


# Teacher --------------------------------------------------------------------------------------


def toy_data(count=64):
    images, labels = toy_images(count, 0)
    return TrainingImages(images, labels, ("a", "b", "c", "d"))


def tiny_recipe(**changed):
    return TeacherRecipe(**{
        "generator": tiny_config(), "kimg": 0.1, "batch": 8, "precision": "float32", "path_length_weight": 2.0,
        "discriminator": DiscriminatorConfig(channel_base=64, channel_max=4, mapping_layers=1), **changed,
    })  # fmt: skip


def tiny_teacher(team=ALONE, **changed):
    return TeacherTraining(teacher.fitted(tiny_recipe(**changed), 16, 4), toy_data(), team)


def test_losses_have_known_values() -> None:
    zero = torch.zeros(4, 1)
    assert teacher.generator_loss(zero).item() == pytest.approx(np.log(2))
    assert teacher.discriminator_loss(zero, zero).item() == pytest.approx(2 * np.log(2))
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    assert teacher.r1_penalty(images, 2 * images.sum(dim=(1, 2, 3))).item() == pytest.approx(4 * 48 / 2)


def test_averaging_follows_the_half_life() -> None:
    assert ema_beta(64, 10**9, 500, 0.05) == pytest.approx(0.5 ** (64 / 500_000))
    assert ema_beta(64, 10_000, 500, 0.05) == pytest.approx(0.5 ** (64 / 500))


def test_every_image_is_seen_once_a_pass() -> None:
    seen = np.concatenate([batch_indices(10, 4, step, 0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(batch_indices(10, 4, 3, 0)) == list(seen[12:16])


def test_a_resumed_teacher_equals_an_uninterrupted_one() -> None:
    straight, first = tiny_teacher(), tiny_teacher()
    reports = [straight.step() for _ in range(6)]
    for _ in range(3):
        first.step()
    second = tiny_teacher()
    second.restore(first.state())
    again = [second.step() for _ in range(3)]
    assert again == reports[3:]
    for name in ("generator", "discriminator", "average"):
        for one, other in zip(
            getattr(straight, name).state_dict().values(), getattr(second, name).state_dict().values(), strict=True
        ):
            assert torch.equal(one, other)


@dataclasses.dataclass(frozen=True)
class Threads(Workers):
    """What two processes are to come to: their sums, made by threads that wait for each other."""

    barrier: threading.Barrier = dataclasses.field(default_factory=lambda: threading.Barrier(2))
    parts: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def average(self, values):
        self.parts[self.rank] = values.clone()
        self.barrier.wait()
        values.copy_((self.parts[0] + self.parts[1]) / 2)
        self.barrier.wait()
        return values


def steps_of(training, count):
    return [training.step() for _ in range(count)]


def steps_in_a_process(rank, folder, port) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        torch.set_num_threads(1)
        with workers("cpu") as team:
            training = tiny_teacher(team)
            steps_of(training, 4)
            torch.save(training.average.state_dict(), folder / f"{rank}.pt")


def test_two_processes_train_one_network(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(steps_in_a_process, (tmp_path, port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    barrier = threading.Barrier(2)
    parts: dict[int, torch.Tensor] = {}
    trainings = [tiny_teacher(Threads(rank, 2, CPU, barrier, parts)) for rank in (0, 1)]
    threads = [threading.Thread(target=partial(steps_of, training, 4)) for training in trainings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = tiny_teacher()
    steps_of(alone, 4)
    for name, value in trainings[0].average.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    # Each process draws its own noise, so two of them are not one.
    assert any(not torch.equal(first[name], value) for name, value in alone.average.state_dict().items())


def test_the_published_settings() -> None:
    paper = teacher.preset("paper")
    assert (paper.batch, paper.learning_rate, paper.r1_gamma, paper.path_length_weight) == (64, 0.0025, 0.01, 0)
    optimizer = teacher.lazy_adam(torch.nn.Linear(1, 1), 0.0025, 16)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0025 * 16 / 17)
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.0, 0.99 ** (16 / 17)))


def test_accumulation_sees_the_same_number_of_images() -> None:
    parts = tiny_teacher(accumulate=2)
    assert parts.piece == 4
    assert set(parts.step()) == {"loss_g", "loss_d", "path_length", "r1", "sign_real", "p"}
    with pytest.raises(UsageError, match="cannot be split"):
        tiny_teacher(accumulate=3)


def write_folder(root, count=24):
    images, labels = toy_images(count, 0)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / "abcd"[label]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(folder / f"{i:03}.png")
    return root


@pytest.fixture
def tiny_presets(monkeypatch) -> None:
    monkeypatch.setitem(teacher.PRESETS, "cpu", tiny_recipe(kimg=0.032))
    small = dataclasses.replace(distillation.PRESETS["cpu"], epochs=1, batch=8, ndf=4, precision="float32")
    monkeypatch.setitem(distillation.PRESETS, "cpu", small)


def run(*arguments):
    found = CliRunner().invoke(cli.app, ["gan", *map(str, arguments)])
    return found.exit_code, found.output + (found.stderr or "")


def test_the_commands_from_data_to_a_trained_teacher(tmp_path, tiny_presets) -> None:
    data, out = write_folder(tmp_path / "data"), tmp_path / "teacher"
    command = ("train-teacher", f"imagefolder:{data}", "--preset", "cpu", "-o", out, "-d", "cpu")
    assert run(*command)[0] == 0
    assert {"request.json", "result.json", "log.jsonl", "checkpoint.pt", "generator.safetensors", "curves.png"} <= {
        p.name for p in out.iterdir()
    }
    assert json.loads((out / "result.json").read_text())["kimg"] == pytest.approx(0.032)
    assert run(*command, "--kimg", "0.064")[0] == 0  # taken further
    assert [json.loads(line)["kimg"] for line in (out / "log.jsonl").read_text().splitlines()] == [0.032, 0.064]
    code, output = run(*command, "--seed", "1")
    assert code == 2
    assert "holds a training with seed = 0, but 1 was asked for" in output
    code, output = run("collect", out / "generator.safetensors", "-o", tmp_path / "pairs", "--count", 9, "-d", "cpu")
    assert code == 0, output
    pairs = load_pairs(tmp_path / "pairs")
    assert (pairs.z.shape, pairs.images.shape, pairs.classes) == ((9, 8), (9, 16, 16, 3), ("a", "b", "c", "d"))
    assert pairs.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert run("distill", tmp_path / "pairs", "-o", tmp_path / "s", "--preset", "cpu")[0] == 4  # 16x16


def test_bad_images_are_named(tmp_path) -> None:
    root = write_folder(tmp_path / "data", 4)
    PIL.Image.new("RGB", (20, 16)).save(root / "a" / "odd.png")
    with pytest.raises(DataError, match="different sizes"):
        load_training_images(f"imagefolder:{root}")
    (tmp_path / "flat").mkdir()
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "x.png")
    with pytest.raises(DataError, match="20x20"):
        load_training_images(f"imagefolder:{tmp_path / 'flat'}")


# Student --------------------------------------------------------------------------------------


def toy_pairs(count=24):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    base = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]], np.uint8)[labels]
    return Pairs(rng.standard_normal((count, 8), dtype=np.float32), labels,
                 np.broadcast_to(base[:, None, None], (count, 32, 32, 3)).copy(), ("r", "g", "b"))  # fmt: skip


def tiny_student(**changed):
    return StudentTraining(StudentRecipe(**{"epochs": 4, "batch": 8, "ndf": 4, **changed}), toy_pairs(), None, CPU)


def test_the_published_weights_of_the_objectives() -> None:
    recipe = StudentRecipe()
    assert sum(distillation.FEATURE_WEIGHTS) == 1.4375
    assert recipe.own_share * recipe.adversarial_weight == pytest.approx(0.002)
    assert (recipe.pixel_weight, recipe.adversarial_weight, recipe.real_weight) == (0.2, 0.01, 0.2)


def test_the_pixel_weight_ends_at_zero_exactly() -> None:
    recipe = StudentRecipe()
    assert [pixel_weight(recipe, e, 400 * e) for e in (0, 1, 19, 20, 21)] == [0.2, 0.19, 0.01, 0, 0]
    slip = dataclasses.replace(recipe, pixel_decay="per-step")
    assert pixel_weight(slip, 0, 20) == 0


def test_the_learning_rate_decays_only_when_asked() -> None:
    assert distillation.learning_rate(StudentRecipe(), 10**6, 100) == 2e-4
    late = StudentRecipe(lr_decay_from=50)
    assert [distillation.learning_rate(late, s, 100) for s in (49, 50, 75, 100)] == pytest.approx([2e-4, 2e-4, 1e-4, 0])
    assert distillation.learning_rate(StudentRecipe(lr_decay_from=350_000), 10, 20) == 2e-4


def test_equal_images_cost_nothing() -> None:
    maps = [torch.randn(2, 3, 4, 4) for _ in range(4)]
    assert distillation.feature_loss(maps, maps) == 0
    assert distillation.feature_loss([m + 1 for m in maps], maps).item() == pytest.approx(1.4375)
    assert distillation.hinge_real(torch.zeros(3)) == distillation.hinge_fake(torch.zeros(3)) == 1


@pytest.mark.parametrize("changed", [{}, {"eval_after_epoch": True, "pixel_decay": "per-step", "adversarial_every": 2}])
def test_a_resumed_student_equals_an_uninterrupted_one(changed) -> None:
    straight, first, second = (tiny_student(**changed) for _ in range(3))
    reports = [straight.step() for _ in range(5)]
    for _ in range(2):
        first.step()
    second.restore(first.state())
    assert [second.step() for _ in range(3)] == reports[2:]
    for one, other in zip(
        straight.generator.state_dict().values(), second.generator.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def stopped_at(monkeypatch, module, name, call, after) -> list[str]:
    """Ctrl-C before or after a function has run, at one of its calls, counted from 1; returns the calls so far."""
    calls: list[str] = []
    function = getattr(module, name)

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        function(*args, **kwargs)
        if len(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, name, stopping)
    return calls


def train_student(folder):
    recipe = StudentRecipe(epochs=2, batch=8, ndf=4, precision="float32")
    return distillation.distil(toy_pairs(), recipe, folder, reference="pairs", device="cpu", report_every=1)


def train_small_teacher(folder):
    return teacher.train_teacher(
        toy_data(), tiny_recipe(kimg=0.016), folder, reference="images", device="cpu", report_every=0.008
    )


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("module", "train", "name"),
    [(distillation, train_student, name) for name in ("save_student", "save_png", "save_checkpoint")]
    + [(teacher, train_small_teacher, name) for name in ("write_generator", "save_png", "save_checkpoint")],
)
def test_a_training_stopped_while_it_saves_its_end_ends_with_the_same_files(
    tmp_path, monkeypatch, module, train, name, after
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as counting:
        calls = stopped_at(counting, module, name, None, after)
        expected = train(tmp_path / "whole").read_bytes()
    with monkeypatch.context() as broken:
        stopped_at(broken, module, name, len(calls), after)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    assert train(tmp_path / "stopped").read_bytes() == expected
    for file in ("result.json", "log.jsonl", "checkpoint.pt"):
        assert (tmp_path / "stopped" / file).is_file()


def test_the_slip_of_the_published_code_changes_the_training() -> None:
    plain, slipped = tiny_student(), tiny_student(eval_after_epoch=True)
    for _ in range(5):
        one, other = plain.step(), slipped.step()
    assert one != other


def test_published_pair_folders_are_read(tmp_path) -> None:
    for label in range(2):
        folder = tmp_path / f"class_{label}"
        folder.mkdir()
        for i in range(2):
            PIL.Image.new("RGB", (32, 32), (label * 200, 0, i)).save(folder / f"image_{i}.png")
            torch.save(torch.full((5,), float(10 * label + i)), folder / f"noise_{i}.pt")
    pairs = load_pairs(tmp_path)
    assert pairs.labels.tolist() == [0, 0, 1, 1]
    assert pairs.z[:, 0].tolist() == [0, 1, 10, 11]
    assert pairs.images[:, 0, 0, 0].tolist() == [0, 0, 200, 200]
    (tmp_path / "class_1" / "noise_1.pt").unlink()
    with pytest.raises(DataError, match="no latent beside it"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": np.zeros((3, 4), np.float32)}, "'z' of the pairs"),
        ({"labels": np.zeros(4)}, "'labels' of the pairs"),
        ({"images": np.zeros((4, 3, 8, 8), np.float32)}, "'images' of the pairs"),
        ({"z": np.full((4, 4), np.nan, np.float32)}, "not finite"),
    ],
)
def test_pairs_that_do_not_fit_say_so(tmp_path, change, message) -> None:
    arrays = {"z": np.zeros((4, 4), np.float32), "labels": np.zeros(4, int), "images": np.zeros((4, 8, 8, 3), np.uint8)}
    np.savez(tmp_path / "pairs.npz", **{**arrays, **change})
    with pytest.raises(DataError, match=message):
        load_pairs(tmp_path)


@pytest.mark.slow
def test_teacher_and_student_learn_colours_of_classes() -> None:
    """200 steps of the teacher, or 100 of the student, give each class its own colour."""
    from ovcalib.gan.distylegan import Student
    from ovcalib.gan.snapshot import Teacher

    pairs = toy_pairs(48)
    data = TrainingImages(pairs.images[:, ::2, ::2].copy(), pairs.labels, pairs.classes)
    recipe = tiny_recipe(
        generator=tiny_config(channel_max=16, w_dim=16), batch=16, path_length_weight=0.0, ema_kimg=0.5,
        discriminator=DiscriminatorConfig(channel_base=512, channel_max=32, mapping_layers=1),
    )  # fmt: skip
    training = TeacherTraining(teacher.fitted(recipe, 16, 3), data, ALONE)
    for _ in range(200):
        training.step()
    student = StudentTraining(StudentRecipe(epochs=100, batch=16, ndf=8), pairs, None, CPU)
    for _ in range(100):
        student.step()

    labels = np.arange(30) % 3
    colours = np.stack([pairs.images[pairs.labels == label].mean(axis=(0, 1, 2)) for label in range(3)])
    teacher_drawer = Teacher(training.average).drawer(0)
    student_drawer = Student(student.generator.eval(), pairs.classes).drawer(0)
    for drawer, near in ((teacher_drawer, 40), (student_drawer, 100)):  # of 255 between two colours
        images = drawer.draw(range(30), labels)
        made = np.stack([images[labels == label].mean(axis=(0, 1, 2)) for label in range(3)])
        distances = np.linalg.norm(made[:, None] - colours, axis=2)
        assert distances.argmin(axis=1).tolist() == [0, 1, 2]
        assert distances.diagonal().max() < near


@pytest.mark.parametrize(
    ("precision", "device", "fast", "expected"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, None),
        ("half", "cpu", False, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("float32", "cuda", True, None),
    ],
)
def test_half_precision_is_taken_where_it_is_fast(monkeypatch, precision, device, fast, expected) -> None:
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda: fast)
    assert half_precision(precision, torch.device(device)) == expected
