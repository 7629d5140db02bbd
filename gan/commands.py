"""`ovcalib gan`: train a teacher, collect its pairs, distil a student, score and show images."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ovcalib.cli import INTERRUPTED, DebugOpt, DownloadOpt, JsonOpt, OverwriteOpt, guarded, print_table, terminal

app = typer.Typer(
    help="Generators as calibration sources: train, distil, score.", no_args_is_help=True, rich_markup_mode=None
)

DataArg = Annotated[
    str, typer.Argument(metavar="DATA", help="imagefolder:DIR, cifar10[:ROOT], ...", show_default=False)
]
FolderOpt = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="DIR", help="Output folder; continues what it holds.", show_default=False),
]
OutputOpt = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default=False)]
DeviceOpt = Annotated[str, typer.Option("-d", "--device", metavar="auto|cpu|cuda", help="Where torch computes.")]
TorchSeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.", min=0)]
Precision = Literal["auto", "half", "float32"]


ClassifierOpt = Annotated[
    str,
    typer.Option(
        "--classifier", metavar="MODEL", help="Its features are used where Inception's weights are not there."
    ),
]
WeightsOpt = Annotated[
    str | None,
    typer.Option("--weights", metavar="shipped|published|FILE", help="Of the classifier.", show_default="the model's"),
]
InceptionOpt = Annotated[
    Path | None,
    typer.Option("--inception-weights", metavar="FILE", help="Of torch-fidelity.", show_default="its cache"),
]


def resumable(train: Callable[[], Path]) -> Path:
    """Run a training; an interruption says how to go on."""
    try:
        return train()
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command("train-teacher")
@guarded
def train_teacher(
    data: DataArg,
    output: FolderOpt,
    preset: Annotated[
        str, typer.Option("--preset", metavar="paper|small|cpu", help="Width of the networks, length and batch.")
    ] = "small",
    kimg: Annotated[
        float | None,
        typer.Option("--kimg", help="Length in thousands of images shown.", min=0.001, show_default="the preset's"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Images a step, over all processes.", min=1, show_default="the preset's"),
    ] = None,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Pieces of a batch that fit into memory.", min=1)] = 1,
    precision: Annotated[Precision, typer.Option("--precision", help="Of the convolutions.")] = "auto",
    path_length_weight: Annotated[
        float, typer.Option("--path-length-weight", help="Weight of the path length penalty; the paper has none.")
    ] = 0.0,
    r1_gamma: Annotated[float, typer.Option("--r1-gamma", help="Weight of the R1 penalty.")] = 0.01,
    score_every: Annotated[
        float,
        typer.Option("--score-every", metavar="KIMG", help="Between points of the FID curve; 0 leaves it out.", min=0),
    ] = 50.0,
    score_count: Annotated[
        int, typer.Option("--score-count", metavar="N", help="Images of each point.", min=10)
    ] = 2_000,
    inception_weights: InceptionOpt = None,
    classifier: ClassifierOpt = "resnet20-cifar10",
    weights: WeightsOpt = None,
    device: DeviceOpt = "auto",
    seed: TorchSeedOpt = 0,
    download: DownloadOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Train StyleGAN2-ADA on labelled images. Start with `torchrun` for several GPUs."""
    from ovcalib.errors import require

    require("torch", "quantize", "`ovcalib gan train-teacher`")
    from ovcalib.gan import studies, teacher
    from ovcalib.gan.training import load_training_images

    recipe = teacher.preset(preset)
    given: dict[str, Any] = {
        "kimg": kimg, "batch": batch, "accumulate": accumulate, "precision": precision,
        "path_length_weight": path_length_weight, "r1_gamma": r1_gamma, "seed": seed,
    }  # fmt: skip
    recipe = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
    progress = terminal()
    images = load_training_images(data, download=bool(download))
    progress.say(f"{len(images.images)} images of {len(images.classes) or 'no'} classes")
    score = None
    if score_every:
        score = studies.progress_score(
            images.images, images.labels, score_count, classifier, weights, inception_weights, progress
        )
    path = resumable(
        lambda: teacher.train_teacher(
            images, recipe, output, reference=data, device=device, score=score, score_every=score_every or 50.0,
            progress=progress,
        )
    )  # fmt: skip
    print(f"wrote {path}")


@app.command()
@guarded
def collect(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="FILE.pkl (official) or FILE.safetensors.")],
    output: OutputOpt,
    count: Annotated[int, typer.Option("--count", metavar="N", help="Pairs.", min=1)] = 50_000,
    truncation: Annotated[
        float, typer.Option("--truncation", metavar="PSI", help="1 leaves it out.", min=0, max=2)
    ] = 1.0,
    noise: Annotated[
        Literal["const", "random", "none"], typer.Option("--noise", help="Noise of the layers.")
    ] = "const",
    z: Annotated[
        Literal["gaussian", "uniform01"], typer.Option("--z", help="uniform01 is what the publication drew.")
    ] = "gaussian",
    device: DeviceOpt = "auto",
    seed: TorchSeedOpt = 0,
    overwrite: OverwriteOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write pairs (z, class, image) of a teacher, which are all that a student learns from."""
    from ovcalib.errors import require
    from ovcalib.rundir import REQUEST, RunDir, write_json

    require("torch", "quantize", "`ovcalib gan collect`")
    from ovcalib.gan.pairs import collect_pairs, save_pairs
    from ovcalib.gan.snapshot import load_teacher
    from ovcalib.gan.training import pick_device
    from ovcalib.models.weights import file_sha256

    progress = terminal()
    loaded = load_teacher(Path(teacher))
    loaded.generator.to(pick_device(device))
    drawer = loaded.drawer(seed, truncation, None, noise, z)
    request = {
        "command": "gan collect", "teacher": teacher, "sha256": file_sha256(Path(teacher)), "count": count,
        "truncation": truncation, "noise": noise, "z": z, "seed": seed,
    }  # fmt: skip
    with RunDir(output, overwrite) as run, progress.task("collecting pairs", count) as tick:
        write_json(run.path / REQUEST, request)
        pairs = collect_pairs(drawer, count, seed, loaded.generator.config.z_dim, z, tick)
        save_pairs(pairs, run.path, request)
        run.finish()
    print(f"{len(pairs)} pairs of {pairs.class_count} classes; wrote {output}")


@app.command()
@guarded
def distill(
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS", help="A folder of `ovcalib gan collect`, or the like.")],
    output: FolderOpt,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DATA", help="Real images for the adversarial term.", show_default="those of the pairs"
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", metavar="paper|cpu", help="Length, batch and discriminator.")
    ] = "paper",
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes.", min=1, show_default="the preset's")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Pairs a step.", min=2, show_default="the preset's")
    ] = None,
    pixel_decay: Annotated[
        Literal["per-epoch", "per-step"],
        typer.Option("--pixel-decay", help="per-step is a slip of the published code."),
    ] = "per-epoch",
    lr_decay_from: Annotated[
        int | None,
        typer.Option(
            "--lr-decay-from", metavar="STEP", help="Learning rate falls to zero from there.", show_default="never"
        ),
    ] = None,
    eval_after_epoch: Annotated[
        bool,
        typer.Option(
            "--eval-after-epoch", help="Evaluation mode in each epoch's first step, as published code has it."
        ),
    ] = False,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="Autocast.", show_default="the preset's")
    ] = None,
    device: DeviceOpt = "auto",
    seed: TorchSeedOpt = 0,
    download: DownloadOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Train a DiStyleGAN student on the pairs of a teacher."""
    from ovcalib.errors import require

    require("torch", "quantize", "`ovcalib gan distill`")
    from ovcalib.gan import distillation
    from ovcalib.gan.pairs import load_pairs
    from ovcalib.gan.training import load_training_images

    given: dict[str, Any] = {
        "epochs": epochs, "batch": batch, "pixel_decay": pixel_decay, "lr_decay_from": lr_decay_from,
        "eval_after_epoch": eval_after_epoch, "precision": precision, "seed": seed,
    }  # fmt: skip
    recipe = dataclasses.replace(
        distillation.preset(preset), **{key: value for key, value in given.items() if value is not None}
    )
    progress = terminal()
    real = load_training_images(data, download=bool(download)) if data else None
    path = resumable(
        lambda: distillation.distil(
            load_pairs(pairs), recipe, output, reference=str(pairs), real=real, real_reference=data, device=device,
            progress=progress,
        )
    )  # fmt: skip
    print(f"wrote {path}")


SetsArg = Annotated[
    list[str],
    typer.Argument(metavar="SET...", help="NAME=REFERENCE: a calibration source, or imagefolder:DIR, npz:FILE."),
]


@app.command()
@guarded
def score(
    sets: SetsArg,
    reference: Annotated[str, typer.Option("--reference", metavar="DATA", help="Real images to compare with.")],
    count: Annotated[int, typer.Option("--count", metavar="N", help="Images of each set.", min=2)] = 5_000,
    inception_weights: InceptionOpt = None,
    classifier: ClassifierOpt = "resnet20-cifar10",
    weights: WeightsOpt = None,
    seed: TorchSeedOpt = 0,
    download: DownloadOpt = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Score sets of images against real ones; real against real is the floor, noise the ceiling."""
    from ovcalib.gan import studies

    study = studies.prepare(sets, reference, count, classifier, weights, seed, bool(download), terminal())
    found = studies.score_sets(study, inception_weights, terminal())
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_table([{"set": name, **{key: f"{value:.4g}" for key, value in row.items()}} for name, row in found.items()])
    print(f"\n{study.count} images of each set against as many of {reference}")


@app.command()
@guarded
def show(
    sets: SetsArg,
    reference: Annotated[str, typer.Option("--reference", metavar="DATA", help="Real images to show beside them.")],
    output: OutputOpt,
    each: Annotated[int, typer.Option("--each", metavar="N", help="Images of a class in the grid.", min=1)] = 8,
    tsne: Annotated[
        int, typer.Option("--tsne", metavar="N", help="Images of each set in the t-SNE; 0 leaves it out.", min=0)
    ] = 0,
    classifier: ClassifierOpt = "resnet20-cifar10",
    weights: WeightsOpt = None,
    seed: TorchSeedOpt = 0,
    download: DownloadOpt = None,
    overwrite: OverwriteOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Draw grids of real and made images by class, and t-SNE of their features."""
    from ovcalib.gan import studies
    from ovcalib.rundir import REQUEST, RunDir, write_json

    progress = terminal()
    with RunDir(output, overwrite) as run:
        request = {
            "command": "gan show",
            "sets": sets,
            "reference": reference,
            "each": each,
            "tsne": tsne,
            "seed": seed,
        }
        write_json(run.path / REQUEST, request)
        study = studies.prepare(
            sets,
            reference,
            max(each * studies.CLASSES_SHOWN, tsne),
            classifier,
            weights,
            seed,
            bool(download),
            progress,
        )
        studies.draw(study, run.path, each, tsne)
        run.finish()
    print(f"wrote {output}")


@app.command()
@guarded
def sample(
    generator: Annotated[
        str, typer.Argument(metavar="SOURCE", help="stylegan2-ada:FILE or distylegan[:FILE].", show_default=False)
    ],
    output: OutputOpt,
    count: Annotated[int, typer.Option("--count", metavar="N", help="Images.", min=1)] = 100,
    seed: TorchSeedOpt = 0,
    overwrite: OverwriteOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write images of a generator at its own resolution: class-<k>/image-<i>.png, and a grid."""
    from ovcalib.errors import UsageError, require
    from ovcalib.rundir import REQUEST, RunDir, write_json

    require("torch", "quantize", "`ovcalib gan sample`")
    from ovcalib.gan import distylegan, snapshot, studies
    from ovcalib.gan.sampling import draw_images

    name, _, file = generator.partition(":")
    if name not in ("stylegan2-ada", "distylegan") or (name == "stylegan2-ada" and not file):
        raise UsageError(f"{generator!r} is no generator. Expected stylegan2-ada:FILE or distylegan[:FILE].")
    if name == "stylegan2-ada":
        drawer = snapshot.load_teacher(Path(file)).drawer(seed)
    else:
        drawer = (distylegan.load_student(Path(file)) if file else distylegan.shipped_student()).drawer(seed)
    with RunDir(output, overwrite) as run, terminal().task("drawing", count) as tick:
        write_json(run.path / REQUEST, {"command": "gan sample", "source": generator, "count": count, "seed": seed})
        studies.write_images(*draw_images(drawer, count, tick), run.path)
        run.finish()
    print(f"{count} images of {drawer.resolution}x{drawer.resolution}; wrote {output}")
