"""Distillation of a conditional GAN from pairs alone.

Masouris et al. 2022 ("DiStyleGAN"), with the objectives of Chang and Lu 2020 ("TinyGAN"): the student imitates the
teacher's image in the discriminator's features and in pixels, fools the discriminator on the teacher's pairs, and
fools it on real images with latents of its own.

The published code departs from the paper in its schedules. The defaults follow the paper; `pixel_decay`,
`lr_decay_from` and `eval_after_epoch` bring each departure back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ovcalib.errors import DataError, UnknownNameError, UsageError
from ovcalib.gan.distylegan import (
    RESOLUTION,
    Student,
    StudentConfig,
    StudentDiscriminator,
    StudentGenerator,
    initialise,
    save_student,
)
from ovcalib.gan.pairs import Pairs
from ovcalib.gan.pictures import grid, save_png, titled
from ovcalib.gan.sampling import balanced_labels, from_pixels, one_hot, to_pixels
from ovcalib.gan.training import (
    Clock,
    Log,
    TrainingImages,
    batch_indices,
    half_precision,
    load_checkpoint,
    on_device,
    open_training,
    pick_device,
    save_checkpoint,
    step_seed,
)
from ovcalib.progress import Progress
from ovcalib.rundir import file_sha256, write_json

FEATURE_WEIGHTS = (1 / 16, 1 / 8, 1 / 4, 1.0)  # from the finest map to the coarsest
SAVE_EVERY_S = 120.0


@dataclass(frozen=True)
class StudentRecipe:
    """The settings of a distillation; the defaults are the publication's.

    pixel_weight        lambda_1, lowered by pixel_step until nothing is left of it
    pixel_decay         per-epoch, as TinyGAN has it; per-step: the published code, where it is gone after 20 steps
    adversarial_weight  lambda_2, of the student's images for the teacher's pairs
    own_share           lambda_3 / lambda_2, of the student's images for latents of its own
    real_weight         lambda_4, of real images in the discriminator's loss
    adversarial_every   steps between those in which the adversarial terms reach the generator
    lr_decay_from       step from which the learning rate falls linearly to zero at the end; None keeps it. The
                        published code says 350,000 and ends before
    eval_after_epoch    the published code leaves the generator in evaluation mode for the first discriminator step of
                        every epoch but the first
    """

    epochs: int = 150
    batch: int = 128
    learning_rate: float = 2e-4
    pixel_weight: float = 0.2
    pixel_step: float = 0.01
    pixel_decay: Literal["per-epoch", "per-step"] = "per-epoch"
    adversarial_weight: float = 0.01
    own_share: float = 0.2
    real_weight: float = 0.2
    adversarial_every: int = 10
    lr_decay_from: int | None = None
    eval_after_epoch: bool = False
    ndf: int = 128
    precision: Literal["auto", "half", "float32"] = "float32"
    seed: int = 0


PRESETS: dict[str, StudentRecipe] = {
    "paper": StudentRecipe(),
    # The same student; half of the discriminator's width, smaller batches for more steps, and few passes.
    "cpu": StudentRecipe(epochs=8, batch=64, ndf=64, precision="auto"),
}


def preset(name: str) -> StudentRecipe:
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return PRESETS[name]


# Losses ---------------------------------------------------------------------------------------


def pixel_weight(recipe: StudentRecipe, epoch: int, step: int) -> float:
    """lambda_1 in this epoch and step, both counted from 0."""
    count = epoch if recipe.pixel_decay == "per-epoch" else step
    # Rounded, because 0.2 - 20 * 0.01 is not quite zero.
    return max(0.0, round(recipe.pixel_weight - recipe.pixel_step * count, 9))


def learning_rate(recipe: StudentRecipe, step: int, total: int) -> float:
    if recipe.lr_decay_from is None or step < recipe.lr_decay_from:
        return recipe.learning_rate
    return recipe.learning_rate * max(0, total - step) / max(1, total - recipe.lr_decay_from)


def feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean absolute difference of each feature map, weighted."""
    terms = [w * F.l1_loss(s, t.detach()) for w, s, t in zip(FEATURE_WEIGHTS, student, teacher, strict=True)]
    return torch.stack(terms).sum()


def hinge_real(logits: Tensor) -> Tensor:
    return F.relu(1 - logits.float()).mean()


def hinge_fake(logits: Tensor) -> Tensor:
    return F.relu(1 + logits.float()).mean()


# One training ---------------------------------------------------------------------------------


class StudentTraining:
    """The state of a distillation, and its steps.

    real   real images for the adversarial loss; without any, the images of the pairs
    """

    def __init__(self, recipe: StudentRecipe, pairs: Pairs, real: TrainingImages | None, device: torch.device) -> None:
        if real is not None and real.classes and not pairs.classes:
            pairs = replace(pairs, classes=real.classes)
        self.recipe, self.pairs, self.device = recipe, pairs, device
        if pairs.images.shape[1:3] != (RESOLUTION, RESOLUTION):
            raise DataError(
                f"The pairs hold images of {pairs.images.shape[1]}x{pairs.images.shape[2]}, but DiStyleGAN makes "
                f"{RESOLUTION}x{RESOLUTION}. Collect them from a teacher of that resolution."
            )
        self.real_images, self.real_labels = pairs.images, pairs.labels
        if real is not None:
            if real.labels is None or len(real.classes) != pairs.class_count:
                raise DataError(
                    f"The real images have {len(real.classes)} classes, but the pairs have {pairs.class_count}."
                )
            if real.images.shape[1:] != pairs.images.shape[1:]:
                raise DataError(f"The real images are {real.images.shape[1:3]}, the pairs {pairs.images.shape[1:3]}.")
            self.real_images, self.real_labels = real.images, real.labels
        self.steps_per_epoch = min(len(pairs), len(self.real_images)) // recipe.batch
        if not self.steps_per_epoch:
            raise UsageError(f"{len(pairs)} pairs make no batch of {recipe.batch}. Collect more, or lower `batch`.")
        config = StudentConfig(z_dim=pairs.z.shape[1], c_dim=pairs.class_count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            generator, discriminator = StudentGenerator(config), StudentDiscriminator(recipe.ndf, config.c_dim)
            initialise(generator)
            initialise(discriminator)
        self.generator = on_device(generator, device)
        self.discriminator = on_device(discriminator, device)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), recipe.learning_rate, betas=(0.5, 0.999))
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), recipe.learning_rate, betas=(0.5, 0.999))
        self.half = half_precision(recipe.precision, device)
        # float16 needs its small gradients scaled up; bfloat16 has the range of float32.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half == torch.float16)
        self.steps = 0

    def request(self, reference: str, real_reference: str | None) -> dict[str, Any]:
        """What a training is known by, in the request.json of its folder."""
        return {
            "command": "gan distill", "pairs": reference, "pair_count": len(self.pairs), "data": real_reference,
            "classes": list(self.pairs.classes), "student": asdict(self.generator.config), **asdict(self.recipe),
        }  # fmt: skip

    @property
    def epoch(self) -> int:
        return self.steps // self.steps_per_epoch

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.recipe.epochs * self.steps_per_epoch

    def state(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(), "discriminator": self.discriminator.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(), "optimizer_d": self.optimizer_d.state_dict(),
            "scaler": self.scaler.state_dict(), "steps": self.steps,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("generator", "discriminator", "optimizer_g", "optimizer_d", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.steps = state["steps"]

    def step(self) -> dict[str, float]:
        """One step of the discriminator and one of the generator. Returns their losses."""
        recipe, step = self.recipe, self.steps
        inside = step % self.steps_per_epoch
        for optimizer in (self.optimizer_g, self.optimizer_d):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, self.total)
        z, c, teacher = self._pairs_batch()
        real, real_c = self._real_batch()
        rng = torch.Generator().manual_seed(step_seed(recipe.seed, step))
        adversarial = (inside + 1) % recipe.adversarial_every == 0
        # Each step has latents and forward passes of its own, as published: they decide how BatchNorm's running
        # statistics mix images of the pairs' latents with those of the student's own.
        self.generator.train(not (recipe.eval_after_epoch and inside == 0 and self.epoch > 0))
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            with torch.no_grad():
                student = self.generator(z, c)
                own = self.generator(torch.randn(z.shape, generator=rng).to(self.device), real_c)
            loss_d, teacher_features = self._discriminator_step(c, teacher, student, real, real_c, own)
        self.generator.train()
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            student = self.generator(z, c)
            own = self.generator(torch.randn(z.shape, generator=rng).to(self.device), real_c) if adversarial else None
            report = self._generator_step(c, teacher, student, teacher_features, own, real_c)
        self.scaler.update()
        self.steps += 1
        return {"loss_d": loss_d, **report}

    def _pairs_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        recipe, inside = self.recipe, self.steps % self.steps_per_epoch
        # Every epoch drops what does not fill a batch, so its order is drawn for itself.
        index = batch_indices(len(self.pairs), recipe.batch, inside, step_seed(recipe.seed, self.epoch, 1))
        c = one_hot(self.pairs.labels[index], self.pairs.class_count)
        z, images = torch.from_numpy(self.pairs.z[index]), from_pixels(self.pairs.images[index])
        return z.to(self.device), c.to(self.device), images.to(self.device, memory_format=torch.channels_last)

    def _real_batch(self) -> tuple[Tensor, Tensor]:
        recipe, inside = self.recipe, self.steps % self.steps_per_epoch
        index = batch_indices(len(self.real_images), recipe.batch, inside, step_seed(recipe.seed, self.epoch, 2))
        c = one_hot(self.real_labels[index], self.pairs.class_count)
        images = from_pixels(self.real_images[index])
        return images.to(self.device, memory_format=torch.channels_last), c.to(self.device)

    def _discriminator_step(
        self, c: Tensor, teacher: Tensor, student: Tensor, real: Tensor, real_c: Tensor, own: Tensor
    ) -> tuple[float, list[Tensor]]:
        """Also returns the features of the teacher's images, from before the step, as the publication takes them."""
        teacher_logits, features = self.discriminator(teacher, c)
        pairs_loss = hinge_real(teacher_logits) + hinge_fake(self.discriminator(student, c)[0])
        real_loss = hinge_real(self.discriminator(real, real_c)[0]) + hinge_fake(self.discriminator(own, real_c)[0])
        loss = pairs_loss + self.recipe.real_weight * real_loss
        self._apply(loss, self.optimizer_d)
        return loss.item(), [feature.detach() for feature in features]

    def _generator_step(
        self, c: Tensor, teacher: Tensor, student: Tensor, features: list[Tensor], own: Tensor | None, real_c: Tensor
    ) -> dict[str, float]:
        recipe = self.recipe
        self.discriminator.requires_grad_(False)
        logits, student_features = self.discriminator(student, c)
        in_features, in_pixels = feature_loss(student_features, features), F.l1_loss(student, teacher)
        loss = in_features + pixel_weight(recipe, self.epoch, self.steps) * in_pixels
        if own is not None:
            own_term = recipe.own_share * self.discriminator(own, real_c)[0].mean()
            loss = loss - recipe.adversarial_weight * (logits.mean() + own_term)
        self._apply(loss, self.optimizer_g)
        self.discriminator.requires_grad_(True)
        return {"loss_g": loss.item(), "features": in_features.item(), "pixels": in_pixels.item()}

    def _apply(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(optimizer)


def distil(
    pairs: Pairs,
    recipe: StudentRecipe,
    folder: Path,
    *,
    reference: str,
    real: TrainingImages | None = None,
    real_reference: str | None = None,
    device: str = "auto",
    report_every: int = 50,
    progress: Progress | None = None,
) -> Path:
    """Train a student until `recipe.epochs`, continuing what the folder holds; returns the path of its weights.

    reference, real_reference   where pairs and real images come from, for the record
    report_every                steps between lines of the log
    """
    progress = progress or Progress()
    training = StudentTraining(recipe, pairs, real, pick_device(device))
    pairs = training.pairs
    open_training(folder, training.request(reference, real_reference))
    earlier = load_checkpoint(folder, training.device)
    if earlier is not None:
        training.restore(earlier)
        progress.say(f"continuing after step {training.steps}")
    clock = Clock(earlier["seconds"] if earlier else 0.0)
    log = Log(folder, "step", training.steps)
    path = folder / "distylegan.safetensors"
    saved = clock.seconds
    sums: dict[str, list[float]] = {}
    with progress.task("distilling", training.total, "a smaller `preset`, or fewer `epochs`.") as tick:
        if earlier is not None:
            tick(training.steps)
        while training.steps < training.total:
            for name, value in training.step().items():
                sums.setdefault(name, []).append(value)
            done = training.steps
            tick(done, f"features {sums['features'][-1]:.3f}, pixels {sums['pixels'][-1]:.3f}")
            last = done == training.total
            if not last and done % report_every:
                continue
            entry = {
                "step": done,
                "epoch": round(done / training.steps_per_epoch, 3),
                "seconds": round(clock.seconds, 1),
            }
            log.add({**entry, **{name: round(float(np.mean(values)), 5) for name, values in sorted(sums.items())}})
            sums = {}
            if last or clock.seconds - saved > SAVE_EVERY_S:
                saved = clock.seconds
                save_student(training.generator, path, pairs.classes)
                save_png(comparison(training), folder / "samples.png")
                log.draw()
                # Last: a training that goes on from its end finds everything else there.
                save_checkpoint(folder, {**training.state(), "seconds": clock.seconds})
    if not path.is_file():
        save_student(training.generator, path, pairs.classes)
    write_json(folder / "result.json", {
        "steps": training.steps, "seconds": round(clock.seconds, 1), "sha256": file_sha256(path),
        "device": str(training.device), "torch": torch.__version__, "last": log.entries[-1] if log.entries else None,
    })  # fmt: skip
    return path


def comparison(training: StudentTraining, each: int = 8) -> Any:
    """The teacher's images, the student's for the same latents, and the student's for latents of its own."""
    pairs, classes = training.pairs, training.pairs.class_count
    chosen = np.concatenate([np.flatnonzero(pairs.labels == k)[:each] for k in range(classes)])
    labels = np.sort(balanced_labels(classes * each, classes))
    training.generator.eval()

    @torch.no_grad()
    def draw(z: Tensor, c: Tensor) -> Any:
        return to_pixels(training.generator(z.to(training.device), c.to(training.device)))

    same = draw(torch.from_numpy(pairs.z[chosen]), one_hot(pairs.labels[chosen], classes))
    own = Student(training.generator, pairs.classes).drawer(seed=0).draw(range(len(labels)), labels)
    training.generator.train()
    panels = {"teacher": pairs.images[chosen], "student, same z": same, "student, own z": own}
    return titled({name: grid(images, each, scale=2) for name, images in panels.items()})
