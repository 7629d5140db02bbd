"""`ovcalib gan`: train a teacher, collect its pairs, distil a student, score and show images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ovcalib.cli import DebugOpt, DownloadOpt, guarded, terminal

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
DeviceOpt = Annotated[str, typer.Option("-d", "--device", metavar="auto|cpu|cuda", help="Where torch computes.")]
TorchSeedOpt = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


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
        typer.Option("--kimg", help="Length in thousands of images shown.", show_default="the preset's"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Images a step, over all processes.", show_default="the preset's"),
    ] = None,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Pieces of a batch that fit into memory.")] = 1,
    precision: Annotated[
        str, typer.Option("--precision", metavar="auto|half|float32", help="Of the convolutions.")
    ] = "auto",
    path_length_weight: Annotated[
        float, typer.Option("--path-length-weight", help="Weight of the path length penalty; the paper has none.")
    ] = 0.0,
    r1_gamma: Annotated[float, typer.Option("--r1-gamma", help="Weight of the R1 penalty.")] = 0.01,
    device: DeviceOpt = "auto",
    seed: TorchSeedOpt = 0,
    download: DownloadOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Train StyleGAN2-ADA on labelled images. Start with `torchrun` for several GPUs."""
    from ovcalib.errors import UsageError, require

    require("torch", "quantize", "`ovcalib gan train-teacher`")
    from ovcalib.gan import teacher
    from ovcalib.gan.training import load_training_images

    recipe = teacher.preset(preset)
    given: dict[str, Any] = {
        "kimg": kimg, "batch": batch, "accumulate": accumulate, "precision": precision,
        "path_length_weight": path_length_weight, "r1_gamma": r1_gamma, "seed": seed,
    }  # fmt: skip
    recipe = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if precision not in ("auto", "half", "float32"):
        raise UsageError(f"--precision {precision}: expected auto, half or float32.")
    if recipe.kimg <= 0 or recipe.batch < 1 or recipe.accumulate < 1:
        raise UsageError("--kimg, --batch and --accumulate must be positive.")
    progress = terminal()
    images = load_training_images(data, download=bool(download))
    progress.say(f"{len(images.images)} images of {len(images.classes) or 'no'} classes")
    path = teacher.train_teacher(images, recipe, output, reference=data, device=device, progress=progress)
    print(f"wrote {path}")
