"""Lines of text on photographs: what a classifier of text orientation sees, and a text detector.

    python benchmarks/text_lines.py photos --count 500 --seed 1 -o runs/text-judge
    python benchmarks/text_lines.py photos --count 64 --seed 2 -o runs/text-calib
    ovcalib quantize ch_ppocr_mobile_v2.0_cls_mobile.onnx --input-shape 3,48,192 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 \\
        --calib bn-inversion --num-samples 64 --eval imagefolder:runs/text-judge --deploy-isa vnni --benchmark-time 0

The network is in the package `rapidocr` (rapidocr/models/); its licence stays with it. Images are 192 pixels wide and
48 high, in an image folder with the classes 0 (upright) and 1 (by 180 degrees). Random letters and digits in a dark or
light ink lie on a piece of a photograph, blended with one colour.

    python benchmarks/text_lines.py photos --count 500 --seed 1 --side 320 -o runs/scenes

makes photographs of 320x320 pixels with three such lines each, all upright and in the class 0.
"""

from __future__ import annotations

import argparse
import random
import string
from collections.abc import Sequence
from pathlib import Path

import command
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ovcalib.data.sets import IMAGE_SUFFIXES

WIDTH, HEIGHT = 192, 48
LINES = 3
LETTERS = string.ascii_letters + string.digits


def line(photographs: Sequence[Path], rng: random.Random) -> PIL.Image.Image:
    """One upright line."""
    with PIL.Image.open(rng.choice(photographs)) as opened:
        photograph = opened.convert("RGB")
    width, height = min(photograph.width, WIDTH), min(photograph.height, HEIGHT)
    left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
    piece = photograph.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT))
    colour = PIL.Image.new("RGB", piece.size, tuple(rng.randint(0, 255) for _ in range(3)))
    made = PIL.Image.blend(piece, colour, rng.uniform(0, 0.8))
    bright = made.convert("L").resize((1, 1)).getpixel((0, 0)) > 128  # type: ignore[operator]
    ink = tuple(rng.randint(0, 70) if bright else rng.randint(185, 255) for _ in range(3))
    text = "".join(rng.choice(LETTERS) if rng.random() > 0.15 else " " for _ in range(rng.randint(6, 14)))
    font = PIL.ImageFont.load_default(rng.randint(20, 34))
    PIL.ImageDraw.Draw(made).text((rng.randint(2, 12), rng.randint(2, 10)), text, ink, font=font)
    return made


def scene(photographs: Sequence[Path], rng: random.Random, side: int) -> PIL.Image.Image:
    """A photograph of side x side pixels with LINES lines of text, one below the other."""
    with PIL.Image.open(rng.choice(photographs)) as opened:
        made = opened.convert("RGB").resize((side, side))
    for number in range(LINES):
        text = line(photographs, rng)
        width = round(side * rng.uniform(0.3, 0.7))
        text = text.resize((width, width * HEIGHT // WIDTH))
        free = side // LINES - text.height
        made.paste(text, (rng.randint(0, side - width), number * side // LINES + rng.randint(0, free)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder of images, searched with its subfolders")
    parser.add_argument("--count", type=command.positive, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--side", type=command.positive, help="square photographs with several lines instead, in pixels"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    found = sorted(path for path in args.photographs.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        parser.error(
            f"no photographs in {args.photographs}; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    if args.side is not None and args.side < WIDTH:
        parser.error(f"--side is {args.side}, but must be at least {WIDTH}")
    if args.output.exists():
        parser.error(f"{args.output} exists; give a new folder")
    rng = random.Random(args.seed)
    for number in range(args.count):
        made, turned = (line(found, rng), number % 2) if args.side is None else (scene(found, rng, args.side), 0)
        folder = args.output / str(turned)
        folder.mkdir(parents=True, exist_ok=True)
        (made.rotate(180) if turned else made).save(folder / f"{number:05d}.png")


if __name__ == "__main__":
    command.run(main)
