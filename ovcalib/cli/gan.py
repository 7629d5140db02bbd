"""`ovcalib gan`: train a teacher, collect its pairs, distil a student, score and show images."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import Field

from ovcalib.cli.guard import INTERRUPTED
from ovcalib.cli.options import Common, add_command
from ovcalib.cli.plan import show as show_plan
from ovcalib.cli.tables import print_table
from ovcalib.errors import UsageError, require
from ovcalib.records.base import Frozen, Shown, checked

IMAGES = "imagefolder:DIR, cifar10[:ROOT], datumaro:FORMAT:DIR or npz:FILE"
Device = Annotated[str, Shown(("-d", "--device"), metavar="auto|cpu|cuda[:N]")]
Output = Annotated[Path, Shown(("-o", "--output"), metavar="DIR")]
File = Annotated[Path | None, Shown(metavar="FILE", default="that of its cache")]
Seed = Annotated[int, Shown(metavar="N")]


class Trained(Frozen):
    """Training"""

    output: Output = Field(description="Output folder; the training goes on from what it holds.")
    device: Device = Field(default="auto", description="Where torch computes.")
    seed: Seed = Field(default=0, ge=0, description="Seed of everything random.")
    download: bool = Field(default=False, description="Allow the CIFAR-10 data set to be downloaded.")


class Scoring(Frozen):
    """Features"""

    inception_weights: File = Field(default=None, description="Weights of torch-fidelity's Inception network.")
    classifier: Annotated[str, Shown(metavar="MODEL")] = Field(
        default="resnet20-cifar10", description="Its features are used where Inception's weights are missing."
    )
    weights: Annotated[str | None, Shown(metavar="shipped|published|FILE", default="the model's")] = Field(
        default=None, description="Weights of the classifier."
    )


class TrainTeacher(Trained, Scoring):
    """Training"""

    data: Annotated[str, Shown(("DATA",))] = Field(description=f"Labelled images: {IMAGES}.")
    preset: Annotated[str, Shown(metavar="paper|small|cpu")] = Field(
        default="small", description="Width of the networks, length and batch."
    )
    kimg: Annotated[float | None, Shown(metavar="NUMBER", default="the preset's")] = Field(
        default=None, ge=0.001, description="Length in thousands of images shown."
    )
    batch: Annotated[int | None, Shown(metavar="N", default="the preset's")] = Field(
        default=None, ge=1, description="Images a step, over all processes."
    )
    accumulate: int = Field(default=1, ge=1, description="Pieces of a batch that fit into memory.")
    precision: Literal["auto", "half", "float32"] = Field(default="auto", description="Of the convolutions.")
    path_length_weight: float = Field(
        default=0.0, ge=0, description="Weight of the path length penalty; the paper has none."
    )
    r1_gamma: float = Field(default=0.01, ge=0, description="Weight of the R1 penalty.")
    score_every: Annotated[float, Shown(metavar="KIMG")] = Field(
        default=50.0, ge=0, description="Between points of the FID curve; 0 leaves it out."
    )
    score_count: int = Field(default=2_000, ge=10, description="Images of each point.")


class Collect(Frozen):
    """Pairs"""

    teacher: Annotated[Path, Shown(("TEACHER",))] = Field(description="FILE.pkl (official) or FILE.safetensors.")
    output: Output = Field(description="Output folder.")
    count: int = Field(default=50_000, ge=1, description="Pairs.")
    truncation: Annotated[float, Shown(metavar="PSI")] = Field(default=1.0, ge=0, le=2, description="1 leaves it out.")
    noise: Literal["const", "random", "none"] = Field(default="const", description="Noise of the layers.")
    z: Literal["gaussian", "uniform01"] = Field(
        default="gaussian", description="Distribution of latent vectors; the publication drew uniform01."
    )
    device: Device = Field(default="auto", description="Where torch computes.")
    seed: Seed = Field(default=0, ge=0, description="Seed of everything random.")


class Distill(Trained):
    """Training"""

    pairs: Annotated[Path, Shown(("PAIRS",))] = Field(description="A folder of `ovcalib gan collect`.")
    data: Annotated[str | None, Shown(metavar="DATA", default="those of the pairs")] = Field(
        default=None, description="Real images for the adversarial term."
    )
    preset: Annotated[str, Shown(metavar="paper|cpu")] = Field(
        default="paper", description="Length, batch and discriminator."
    )
    epochs: Annotated[int | None, Shown(metavar="N", default="the preset's")] = Field(
        default=None, ge=1, description="Passes over the pairs."
    )
    batch: Annotated[int | None, Shown(metavar="N", default="the preset's")] = Field(
        default=None, ge=2, description="Pairs a step."
    )
    pixel_decay: Literal["per-epoch", "per-step"] = Field(
        default="per-epoch", description="per-step is a slip of the published code."
    )
    lr_decay_from: Annotated[int | None, Shown(metavar="STEP", default="never")] = Field(
        default=None, ge=0, description="The learning rate falls to zero from there."
    )
    eval_after_epoch: bool = Field(
        default=False, description="Evaluation mode in each epoch's first step, as in the published code."
    )
    precision: Annotated[Literal["auto", "half", "float32"] | None, Shown(default="the preset's")] = Field(
        default=None, description="Autocast."
    )


class Compared(Scoring):
    """Image sets"""

    sets: Annotated[tuple[str, ...], Shown(("SET...",))] = Field(
        min_length=1, description="NAME=REFERENCE: a calibration source, or imagefolder:DIR, npz:FILE."
    )
    reference: Annotated[str, Shown(("--reference",), metavar="DATA")] = Field(description="Real images.")
    seed: Seed = Field(default=0, ge=0, description="Seed of everything random.")
    download: bool = Field(default=False, description="Allow the CIFAR-10 data set to be downloaded.")


class Score(Compared):
    """Image sets"""

    count: int = Field(default=5_000, ge=2, description="Images of each set.")


class Show(Compared):
    """Image sets"""

    output: Output = Field(description="Output folder.")
    each: int = Field(default=8, ge=1, description="Images of a class in the grid.")
    tsne: int = Field(default=0, ge=0, description="Images of each set in the t-SNE; 0 leaves it out.")


class Sample(Frozen):
    """Images"""

    generator: Annotated[str, Shown(("SOURCE",))] = Field(description="stylegan2-ada:FILE or distylegan[:FILE].")
    output: Output = Field(description="Output folder.")
    count: int = Field(default=100, ge=1, description="Images.")
    seed: Seed = Field(default=0, ge=0, description="Seed of everything random.")


def resumable(train: Callable[[], Path]) -> int:
    """Run a training; after an interruption, say how to continue it."""
    try:
        path = train()
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last state that was saved", file=sys.stderr)
        return INTERRUPTED
    print(f"wrote {path}")
    return 0


def overrides(options: Frozen, *names: str) -> dict[str, Any]:
    """The fields that are set, which replace those of a preset."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def train_teacher(given: dict[str, Any], common: Common) -> int:
    """Train StyleGAN2-ADA on labelled images. Start with `torchrun` for several GPUs."""
    options = checked(TrainTeacher, given)
    require("torch", "quantize", "`ovcalib gan train-teacher`")
    from ovcalib.gan import studies, teacher
    from ovcalib.gan.training import load_training_images

    recipe = dataclasses.replace(
        teacher.preset(options.preset),
        **overrides(options, "kimg", "batch", "accumulate", "precision", "path_length_weight", "r1_gamma", "seed"),
    )
    images = load_training_images(options.data, download=options.download)
    common.progress.say(f"{len(images.images)} images of {len(images.classes) or 'no'} classes")
    if common.dry_run:
        from ovcalib.rehearsal import plan_teacher

        return show_plan(
            plan_teacher(
                images, recipe, options.output, options.data, options.device, options.score_every, common.progress
            ),
            common,
        )
    score = None
    if options.score_every:
        score = studies.progress_score(
            images.images, images.labels, options.score_count, options.classifier, options.weights,
            options.inception_weights, common.progress,
        )  # fmt: skip
    return resumable(
        lambda: teacher.train_teacher(
            images, recipe, options.output, reference=options.data, device=options.device, score=score,
            score_every=options.score_every or 50.0, progress=common.progress,
        )
    )  # fmt: skip


def collect(given: dict[str, Any], common: Common) -> None:
    """Write pairs (z, class, image) of a teacher.

    A student is trained on them.
    """
    from ovcalib.rundir import RunDir, file_sha256

    options = checked(Collect, given)
    require("torch", "quantize", "`ovcalib gan collect`")
    from ovcalib.gan.pairs import collect_pairs, save_pairs
    from ovcalib.gan.snapshot import load_teacher
    from ovcalib.gan.training import pick_device

    loaded = load_teacher(options.teacher)
    loaded.generator.to(pick_device(options.device))
    drawer = loaded.drawer(options.seed, options.truncation, None, options.noise, options.z)
    request = {
        "command": "gan collect", "sha256": file_sha256(options.teacher),
        **options.model_dump(mode="json", exclude={"output", "device"}),
    }  # fmt: skip
    with (
        RunDir(options.output, common.overwrite, request) as run,
        common.progress.task("collecting pairs", options.count) as tick,
    ):
        z_dim = loaded.generator.config.z_dim
        pairs = collect_pairs(drawer, options.count, options.seed, z_dim, options.z, tick)
        save_pairs(pairs, run.path, request)
        run.finish()
    print(f"{len(pairs)} pairs of {pairs.class_count} classes; wrote {options.output}")


def distill(given: dict[str, Any], common: Common) -> int:
    """Train a DiStyleGAN student on the pairs of a teacher."""
    options = checked(Distill, given)
    require("torch", "quantize", "`ovcalib gan distill`")
    from ovcalib.gan import distillation
    from ovcalib.gan.pairs import load_pairs
    from ovcalib.gan.training import load_training_images

    recipe = dataclasses.replace(
        distillation.preset(options.preset),
        **overrides(
            options, "epochs", "batch", "pixel_decay", "lr_decay_from", "eval_after_epoch", "precision", "seed"
        ),
    )
    real = load_training_images(options.data, download=options.download) if options.data else None
    if common.dry_run:
        from ovcalib.rehearsal import plan_student

        return show_plan(
            plan_student(
                load_pairs(options.pairs), recipe, options.output, str(options.pairs), real, options.data,
                options.device, common.progress,
            ),
            common,
        )  # fmt: skip
    return resumable(
        lambda: distillation.distil(
            load_pairs(options.pairs), recipe, options.output, reference=str(options.pairs), real=real,
            real_reference=options.data, device=options.device, progress=common.progress,
        )
    )  # fmt: skip


def score(given: dict[str, Any], common: Common) -> None:
    """Score sets of images against real ones.

    The scores of real images and of noise are the lower and the upper limit.
    """
    from ovcalib.gan import studies

    options = checked(Score, given)
    study = studies.prepare(
        options.sets, options.reference, options.count, options.classifier, options.weights, options.seed,
        options.download, common.progress,
    )  # fmt: skip
    found = studies.score_sets(study, options.inception_weights, common.progress)
    if common.as_json:
        print(json.dumps(found, indent=2))
        return
    print_table([{"set": name, **{key: f"{value:.4g}" for key, value in row.items()}} for name, row in found.items()])
    print(f"\n{study.count} images of each set against as many of {options.reference}")


def show(given: dict[str, Any], common: Common) -> None:
    """Draw grids of real and made images, and their t-SNE."""
    from ovcalib.gan import studies
    from ovcalib.rundir import RunDir

    options = checked(Show, given)
    request = {"command": "gan show", **options.model_dump(mode="json", exclude={"output"})}
    with RunDir(options.output, common.overwrite, request) as run:
        study = studies.prepare(
            options.sets, options.reference, max(options.each * studies.CLASSES_SHOWN, options.tsne),
            options.classifier, options.weights, options.seed, options.download, common.progress,
        )  # fmt: skip
        studies.draw(study, run.path, options.each, options.tsne)
        run.finish()
    print(f"wrote {options.output}")


def sample(given: dict[str, Any], common: Common) -> None:
    """Write images of a generator as PNG, and a grid.

    They have its own resolution, and are called class-<k>/image-<i>.png.
    """
    from ovcalib.rundir import RunDir

    options = checked(Sample, given)
    require("torch", "quantize", "`ovcalib gan sample`")
    from ovcalib.gan import distylegan, snapshot, studies
    from ovcalib.gan.sampling import draw_images

    name, _, file = options.generator.partition(":")
    if name not in ("stylegan2-ada", "distylegan") or (name == "stylegan2-ada" and not file):
        raise UsageError(f"{options.generator!r} is no generator. Expected stylegan2-ada:FILE or distylegan[:FILE].")
    if name == "stylegan2-ada":
        drawer = snapshot.load_teacher(Path(file)).drawer(options.seed)
    else:
        drawer = (distylegan.load_student(Path(file)) if file else distylegan.shipped_student()).drawer(options.seed)
    request = {"command": "gan sample", **options.model_dump(mode="json", exclude={"output"})}
    with (
        RunDir(options.output, common.overwrite, request) as run,
        common.progress.task("drawing", options.count) as tick,
    ):
        studies.write_images(*draw_images(drawer, options.count, tick), run.path)
        run.finish()
    print(f"{options.count} images of {drawer.resolution}x{drawer.resolution}; wrote {options.output}")


def add_to(app: click.Group) -> None:
    group = click.Group("gan", help="Generators as calibration sources: train, distil, score.", no_args_is_help=True)
    add_command(group, train_teacher, (TrainTeacher,), common=("dry-run",))
    add_command(group, collect, (Collect,), common=("overwrite",))
    add_command(group, distill, (Distill,), common=("dry-run",))
    add_command(group, score, (Score,), common=("json",))
    add_command(group, show, (Show,), common=("overwrite",))
    add_command(group, sample, (Sample,), common=("overwrite",))
    app.add_command(group)
