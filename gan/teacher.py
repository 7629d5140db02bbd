"""Training of the teacher, StyleGAN2-ADA.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix C, configuration `cifar`:
non-saturating logistic loss, R1 penalty every 16th step, exponential moving average of the generator, adaptive
augmentation of everything that the discriminator sees. `cpu` and `small` are narrower networks of the same recipe.

Everything random in a step comes from (seed, step, process): a training that was stopped continues as if it had not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovcalib.errors import UnknownNameError, UsageError
from ovcalib.gan.augment import adjust_probability, augment
from ovcalib.gan.pictures import grid, save_png
from ovcalib.gan.sampling import balanced_labels, from_pixels, one_hot
from ovcalib.gan.snapshot import Teacher, write_generator
from ovcalib.gan.stylegan2 import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from ovcalib.gan.training import (
    Clock,
    Log,
    TrainingImages,
    Workers,
    batch_indices,
    half_precision,
    load_checkpoint,
    on_device,
    open_training,
    save_checkpoint,
    step_seed,
    workers,
)
from ovcalib.progress import Progress
from ovcalib.rundir import file_sha256, write_json

BETAS = (0.0, 0.99)
PATH_DECAY = 0.01
SAVE_EVERY_S = 120.0
PATH_BATCH_SHARE = 2  # path lengths are measured on half of the batch


@dataclass(frozen=True)
class TeacherRecipe:
    """The settings of a training; the defaults are the published `cifar` configuration.

    kimg                 length, in thousands of real images shown
    batch                images a step, over all processes
    accumulate           pieces in which each process computes its share of the batch
    r1_gamma             weight of the R1 penalty, applied every r1_interval steps
    path_length_weight   weight of the path length penalty, applied every path_interval steps; the published
                         configuration has none
    ema_kimg             half-life of the averaged generator, but at most ema_rampup of the images seen so far
    ada_target           share of sure decisions on real images, E[sign D], that augmentation steers to
    ada_kimg             thousands of images in which the strength may go from 0 to 1
    precision            of the convolutions: auto (half where the hardware gains by it), half, float32
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    kimg: float = 100_000
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 0.0025
    r1_gamma: float = 0.01
    r1_interval: int = 16
    path_length_weight: float = 0.0
    path_interval: int = 4
    ema_kimg: float = 500.0
    ema_rampup: float = 0.05
    ada_target: float = 0.6
    ada_interval: int = 4
    ada_kimg: float = 500.0
    precision: Literal["auto", "half", "float32"] = "auto"
    seed: int = 0


def _narrow(base: int, widest: int, w_dim: int, mapping_layers: int, clamp: float | None) -> dict[str, Any]:
    shared: dict[str, Any] = {"channel_base": base, "channel_max": widest, "conv_clamp": clamp}
    return {
        "generator": GeneratorConfig(w_dim=w_dim, **shared),
        "discriminator": DiscriminatorConfig(mapping_layers=mapping_layers, **shared),
    }


PRESETS: dict[str, TeacherRecipe] = {
    "paper": TeacherRecipe(),
    # 128 channels at 32x32: an hour or two on one recent GPU.
    "small": TeacherRecipe(**_narrow(4096, 256, 512, 8, 256.0), kimg=5_000),
    # 24 channels at 32x32, and bfloat16, which needs no clamp: what one core of a CPU does in hours.
    "cpu": TeacherRecipe(**_narrow(768, 96, 128, 2, None), kimg=400, batch=32),
}


def preset(name: str) -> TeacherRecipe:
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return PRESETS[name]


def fitted(recipe: TeacherRecipe, resolution: int, classes: int) -> TeacherRecipe:
    """The recipe for images of this size and so many classes."""
    return replace(
        recipe,
        generator=replace(recipe.generator, img_resolution=resolution, c_dim=classes),
        discriminator=replace(recipe.discriminator, img_resolution=resolution, c_dim=classes),
    )


# Losses ---------------------------------------------------------------------------------------


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: -log sigmoid(D(G(z)))."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic: -log sigmoid(D(x)) - log(1 - sigmoid(D(G(z))))."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """Half the squared length of the gradient at real images (Mescheder et al. 2018, equation 9)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean() / 2


def path_lengths(images: Tensor, ws: Tensor, rng: torch.Generator) -> Tensor:
    """How far a random direction in the image reaches in w (Karras et al. 2020a, section 3.2). [N]"""
    direction = torch.randn(images.shape, generator=rng, device=images.device)
    direction = direction / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * direction).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def ema_beta(batch: int, images: int, kimg: float, rampup: float) -> float:
    """What one step leaves of the averaged generator, when `images` were seen before."""
    half_life = min(kimg * 1000, max(images, batch) * rampup)
    return float(0.5 ** (batch / max(half_life, 1e-8)))


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, beta: float) -> None:
    """Parameters move towards the current ones; buffers are copied."""
    for mean, value in zip(average.parameters(), current.parameters(), strict=True):
        mean.lerp_(value, 1 - beta)
    for kept, buffer in zip(average.buffers(), current.buffers(), strict=True):
        kept.copy_(buffer)


def lazy_adam(module: nn.Module, learning_rate: float, interval: int) -> torch.optim.Adam:
    """Adam as if the penalty that is applied every `interval` steps were part of every step."""
    ratio = interval / (interval + 1)
    betas = (BETAS[0] ** ratio, BETAS[1] ** ratio)
    return torch.optim.Adam(module.parameters(), lr=learning_rate * ratio, betas=betas, eps=1e-8)


# One training ---------------------------------------------------------------------------------


class TeacherTraining:
    """The state of a training, and its steps."""

    def __init__(self, recipe: TeacherRecipe, data: TrainingImages, team: Workers) -> None:
        self.recipe, self.data, self.team = recipe, data, team
        share = team.count * recipe.accumulate
        if recipe.batch % share:
            raise UsageError(
                f"A batch of {recipe.batch} cannot be split into {team.count} processes of {recipe.accumulate} pieces."
            )
        self.piece = recipe.batch // share
        group = min(recipe.discriminator.mbstd_group_size, self.piece)
        if self.piece % group:
            raise UsageError(f"{self.piece} images at a time is no multiple of the discriminator's groups of {group}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            generator, discriminator = Generator(recipe.generator), Discriminator(recipe.discriminator)
        self.generator = on_device(generator, team.device)
        self.discriminator = on_device(discriminator, team.device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.optimizer_g = lazy_adam(self.generator, recipe.learning_rate, recipe.path_interval)
        self.optimizer_d = lazy_adam(self.discriminator, recipe.learning_rate, recipe.r1_interval)
        self.half = half_precision(recipe.precision, team.device)
        self.steps = 0
        self.p = 0.0
        self.path_mean = 0.0
        self.sign_sum, self.sign_count = 0.0, 0

    @property
    def images(self) -> int:
        return self.steps * self.recipe.batch

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return math.ceil(self.recipe.kimg * 1000 / self.recipe.batch)

    def state(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(), "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(), "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(), "steps": self.steps, "p": self.p,
            "path_mean": self.path_mean, "sign_sum": self.sign_sum, "sign_count": self.sign_count,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("generator", "discriminator", "average", "optimizer_g", "optimizer_d"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("steps", "p", "path_mean", "sign_sum", "sign_count"):
            setattr(self, name, state[name])

    def step(self) -> dict[str, float]:
        """One step of the generator and one of the discriminator. Returns the losses of this process."""
        recipe, step = self.recipe, self.steps
        seed = step_seed(recipe.seed, step, self.team.rank)
        rng_host = torch.Generator().manual_seed(seed)
        rng = torch.Generator(self.team.device).manual_seed(seed)
        report = {"loss_g": self._generator_step(rng_host, rng)}
        if recipe.path_length_weight and step % recipe.path_interval == 0:
            report["path_length"] = self._path_step(rng_host, rng)
        real, c = self._real_batch()
        report["loss_d"], sign = self._discriminator_step(real, c, rng_host, rng)
        if step % recipe.r1_interval == 0:
            report["r1"] = self._r1_step(real, c, rng_host)
        beta = ema_beta(recipe.batch, self.images, recipe.ema_kimg, recipe.ema_rampup)
        update_average(self.average, self.generator, beta)
        self.sign_sum, self.sign_count = self.sign_sum + sign, self.sign_count + 1
        if (step + 1) % recipe.ada_interval == 0:
            mean = torch.tensor(self.sign_sum / self.sign_count, dtype=torch.float64, device=self.team.device)
            seen = recipe.batch * recipe.ada_interval
            self.p = adjust_probability(
                self.p, float(self.team.average(mean)), seen, recipe.ada_target, recipe.ada_kimg
            )
            self.sign_sum, self.sign_count = 0.0, 0
        self.steps += 1
        return {**report, "sign_real": sign, "p": self.p}

    def _draw(self, count: int, rng_host: torch.Generator) -> tuple[Tensor, Tensor | None]:
        z = torch.randn(count, self.recipe.generator.z_dim, generator=rng_host)
        if self.data.labels is None:
            return z.to(self.team.device), None
        index = torch.randint(len(self.data.labels), (count,), generator=rng_host)
        c = one_hot(self.data.labels[index.numpy()], len(self.data.classes))
        return z.to(self.team.device), c.to(self.team.device)

    def _styles(self, z: Tensor, c: Tensor | None) -> Tensor:
        ws = self.generator.styles(z, c)
        with torch.no_grad():
            average = self.generator.mapping.w_avg
            mean = self.team.average(ws[:, 0].detach().mean(dim=0))
            average.lerp_(mean, 1 - self.recipe.generator.w_avg_beta)
        return ws

    def _fake(self, count: int, rng_host: torch.Generator, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        z, c = self._draw(count, rng_host)
        image: Tensor = self.generator.synthesis(self._styles(z, c), "random", self.half, rng)
        return image, c

    def _judge(self, images: Tensor, c: Tensor | None, rng_host: torch.Generator) -> Tensor:
        seen = augment(images, self.p, rng_host).contiguous(memory_format=torch.channels_last)
        return self.discriminator(seen, c, self.half)  # type: ignore[no-any-return]

    def _real_batch(self) -> tuple[Tensor, Tensor | None]:
        index = batch_indices(len(self.data.images), self.recipe.batch, self.steps, self.recipe.seed)
        index = index[self.team.rank :: self.team.count]
        real = from_pixels(self.data.images[index]).to(self.team.device)
        if self.data.labels is None:
            return real, None
        return real, one_hot(self.data.labels[index], len(self.data.classes)).to(self.team.device)

    def _generator_step(self, rng_host: torch.Generator, rng: torch.Generator) -> float:
        self.discriminator.requires_grad_(False)
        total = 0.0
        for _ in range(self.recipe.accumulate):
            fake, c = self._fake(self.piece, rng_host, rng)
            loss = generator_loss(self._judge(fake, c, rng_host))
            (loss / self.recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / self.recipe.accumulate
        self._apply(self.generator, self.optimizer_g)
        self.discriminator.requires_grad_(True)
        return total

    def _path_step(self, rng_host: torch.Generator, rng: torch.Generator) -> float:
        recipe, total = self.recipe, 0.0
        for _ in range(recipe.accumulate):
            z, c = self._draw(max(1, self.piece // PATH_BATCH_SHARE), rng_host)
            ws = self._styles(z, c)
            lengths = path_lengths(self.generator.synthesis(ws, "random", self.half, rng), ws, rng)
            mean = self.team.average(lengths.detach().mean())
            self.path_mean += PATH_DECAY * (float(mean) - self.path_mean)
            penalty = (lengths - self.path_mean).square().mean() * recipe.path_length_weight
            (penalty * recipe.path_interval / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            total += penalty.item() / recipe.accumulate
        self._apply(self.generator, self.optimizer_g)
        return total

    def _discriminator_step(
        self, real: Tensor, c: Tensor | None, rng_host: torch.Generator, rng: torch.Generator
    ) -> tuple[float, float]:
        total = sign = 0.0
        for i in range(self.recipe.accumulate):
            part = slice(i * self.piece, (i + 1) * self.piece)
            with torch.no_grad():
                fake, fake_c = self._fake(self.piece, rng_host, rng)
            real_logits = self._judge(real[part], None if c is None else c[part], rng_host)
            loss = discriminator_loss(real_logits, self._judge(fake, fake_c, rng_host))
            (loss / self.recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / self.recipe.accumulate
            sign += real_logits.sign().mean().item() / self.recipe.accumulate
        self._apply(self.discriminator, self.optimizer_d)
        return total, sign

    def _r1_step(self, real: Tensor, c: Tensor | None, rng_host: torch.Generator) -> float:
        recipe, total = self.recipe, 0.0
        for i in range(recipe.accumulate):
            part = slice(i * self.piece, (i + 1) * self.piece)
            images = real[part].detach().requires_grad_()
            penalty = r1_penalty(images, self._judge(images, None if c is None else c[part], rng_host))
            (penalty * (recipe.r1_gamma * recipe.r1_interval / recipe.accumulate)).backward()  # type: ignore[no-untyped-call]
            total += penalty.item() / recipe.accumulate
        self._apply(self.discriminator, self.optimizer_d)
        return total

    def _apply(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.team.average_gradients(module)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def request_of(data: TrainingImages, recipe: TeacherRecipe, reference: str) -> dict[str, Any]:
    """What a training is known by, in the request.json of its folder."""
    return {"command": "gan train-teacher", "data": reference, "images": len(data.images),
            "classes": list(data.classes), **asdict(recipe)}  # fmt: skip


def train_teacher(
    data: TrainingImages,
    recipe: TeacherRecipe,
    folder: Path,
    *,
    reference: str,
    device: str = "auto",
    report_every: float = 2.0,
    score: Callable[[Generator], dict[str, float]] | None = None,
    score_every: float = 50.0,
    progress: Progress | None = None,
) -> Path:
    """Train until `recipe.kimg`, continuing what the folder holds; returns the path of the generator.

    reference      where the data come from, for the record
    report_every   thousands of images between lines of the log; checkpoint, weights and sample grid follow with the
                   first line after two minutes
    score          measures the averaged generator, every `score_every` thousand images
    """
    progress = progress or Progress()
    recipe = fitted(recipe, data.images.shape[1], len(data.classes))
    request = request_of(data, recipe, reference)
    path = folder / "generator.safetensors"
    with workers(device) as team:
        if team.main:
            open_training(folder, request)
        team.average(torch.zeros(1, device=team.device))  # the others wait until the folder is there
        training = TeacherTraining(recipe, data, team)
        earlier = load_checkpoint(folder, team.device)
        if earlier is not None:
            training.restore(earlier)
            progress.say(f"continuing after {training.images / 1000:.1f} kimg")
        clock = Clock(earlier["seconds"] if earlier else 0.0)
        log = Log(folder, "kimg", training.images / 1000) if team.main else None
        total = training.total
        report_steps, score_steps = (max(1, round(k * 1000 / recipe.batch)) for k in (report_every, score_every))
        saved = clock.seconds
        sums: dict[str, list[float]] = {}
        with progress.task("training the teacher", total, "a smaller `preset`, or fewer `kimg`.") as tick:
            if earlier is not None:
                tick(training.steps)
            while training.steps < total:
                for name, value in training.step().items():
                    sums.setdefault(name, []).append(value)
                done = training.steps
                tick(done, f"D {sums['loss_d'][-1]:.3f}, p {training.p:.3f}")
                last = done == total
                if log is None or not (last or done % report_steps == 0 or done % score_steps == 0):
                    continue
                entry = {"kimg": training.images / 1000, "seconds": round(clock.seconds, 1)}
                entry |= {name: round(float(np.mean(values)), 5) for name, values in sorted(sums.items())}
                sums = {}
                if score is not None and (last or done % score_steps == 0):
                    entry |= score(training.average)
                log.add(entry)
                if last or clock.seconds - saved > SAVE_EVERY_S:
                    saved = clock.seconds
                    write_generator(training.average, path, data.classes)
                    save_png(sample_grid(training.average), folder / f"samples-{training.images // 1000:06}k.png")
                    log.draw()
                    # Last: a training that goes on from its end finds everything else there.
                    save_checkpoint(folder, {**training.state(), "seconds": clock.seconds})
        if log is not None:
            result = {"kimg": training.images / 1000, "seconds": round(clock.seconds, 1), "sha256": file_sha256(path),
                      "device": str(team.device), "processes": team.count, "torch": torch.__version__,
                      "last": log.entries[-1] if log.entries else None}  # fmt: skip
            write_json(folder / "result.json", result)
    return path


def sample_grid(generator: Generator, each: int = 8) -> Any:
    """Images of every class, one row a class (eight rows without classes)."""
    rows = generator.config.c_dim or 8
    labels = np.sort(balanced_labels(rows * each, rows))
    drawer = Teacher(generator).drawer(seed=0)
    return grid(drawer.draw(range(rows * each), labels if drawer.classes else None), each, scale=2)
