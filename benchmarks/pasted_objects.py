"""A labelled detection set that needs no download: small photographs pasted on fractals, in COCO's format.

    python benchmarks/pasted_objects.py imagefolder:cifar10-jpeg/test --count 1000 --seed 1000 -o pasted

One to four CIFAR-10 images of 1 to 3 times their size lie on a fractal of 160x160 pixels, with an IoU below 0.2. Whole
tiles of 32x32 pixels are pasted, so a box is that of its tile and not the outline of the object. Image i depends on
the tiles and (seed, i) alone. `train_detector.py` trains on such images, of other tiles and another seed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import command
import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ovcalib.calibration import fractal
from ovcalib.data.boxes import Boxes
from ovcalib.data.sets import load_images, open_data
from ovcalib.models import builtin

SIDE = 160  # of an image, pixels
TILE = 32
OBJECTS = 4  # in an image at most
SCALES = (1.0, 3.0)
MAX_IOU = 0.2
# Places that are tried for an object before it is left out.
TRIES = 16
TILES = builtin.spec("resnet20-cifar10")
CLASSES = TILES.classes or ()


@dataclass(frozen=True)
class Scenes:
    """What lies where in B images; later objects cover earlier ones.

    tile       int64 [B, OBJECTS]
    mirrored   bool [B, OBJECTS]
    corners    int64 [B, OBJECTS, 4]: left, top, right, bottom, in pixels
    there      bool [B, OBJECTS]; the other entries stand for nothing
    """

    tile: NDArray[np.int64]
    mirrored: NDArray[np.bool_]
    corners: NDArray[np.int64]
    there: NDArray[np.bool_]


def draw(rng: np.random.Generator, count: int, tiles: int) -> Scenes:
    """Scenes of `count` images with objects from so many tiles.

    The larger objects come first, so that a small one is never hidden.
    """
    shape = (count, OBJECTS)
    tile, mirrored = rng.integers(0, tiles, shape), rng.random(shape) < 0.5
    there = np.arange(OBJECTS) < rng.integers(1, OBJECTS + 1, (count, 1))
    side = np.round(TILE * rng.uniform(*SCALES, shape)).astype(np.int64)
    side = -np.sort(-np.where(there, side, 0), 1)
    spot = rng.random((count, OBJECTS, TRIES, 2))
    corners = np.zeros((*shape, 4), np.int64)
    for k in range(OBJECTS):
        size = side[:, k, None, None]
        low = (spot[:, k] * (SIDE - size + 1)).astype(np.int64)
        places = np.concatenate([low, low + size], -1)
        free = (_iou(places, corners[:, :k]) * there[:, None, :k]).max(-1, initial=0) < MAX_IOU
        first = free.argmax(1)
        corners[:, k] = places[np.arange(count), first]
        there[:, k] &= free[np.arange(count), first]
    return Scenes(tile, mirrored, corners, there)


def _iou(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of boxes [B, n, 4] and [B, m, 4], float64 [B, n, m]; 0 for empty boxes."""
    a, b = a[:, :, None], b[:, None]
    both = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    return np.asarray(both / np.maximum(union, 1))


def paint(backgrounds: Tensor, tiles: Tensor, scenes: Scenes) -> Tensor:
    """The images, uint8 [B, 3, SIDE, SIDE], on the device of the tiles; tiles are scaled with bilinear resampling.

    backgrounds   uint8 [B, 3, SIDE, SIDE]
    tiles         uint8 [N, 3, TILE, TILE]
    """
    device = tiles.device

    def sent(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    tile, corners, there = sent(scenes.tile), sent(scenes.corners), sent(scenes.there)
    sign = sent(np.where(scenes.mirrored, -1, 1))
    image = backgrounds.float()
    centre = torch.arange(SIDE, device=device) + 0.5
    for k in range(OBJECTS):
        low, high = corners[:, k, :2, None], corners[:, k, 2:, None]
        # Of each pixel in the tile: -1 and 1 are its edges, [B, 2, SIDE].
        place = 2 * (centre - low) / (high - low).clamp(min=1) - 1
        inside = (place.abs() < 1) & there[:, k, None, None]
        x, y = sign[:, k, None] * place[:, 0], place[:, 1]
        grid = torch.stack([x[:, None].expand(-1, SIDE, -1), y[:, :, None].expand(-1, -1, SIDE)], -1)
        pasted = F.grid_sample(tiles[tile[:, k]].float(), grid, padding_mode="border", align_corners=False)
        image = torch.where((inside[:, 0, None] & inside[:, 1, :, None])[:, None], pasted, image)
    return (image + 0.5).to(torch.uint8)


def read_tiles(reference: str) -> tuple[Tensor, NDArray[np.int64]]:
    """The tiles of a data reference, uint8 [N, 3, TILE, TILE], and their labels, int64 [N].

    Labels count from 1, as torchvision's do: 0 is the background.
    """
    images, labels = load_images(open_data(reference), TILES)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels + 1


def backgrounds(seed: int, indices: Sequence[int]) -> Tensor:
    """Fractals, uint8 [N, 3, SIDE, SIDE]; number i depends on (seed, i) alone."""
    spec = TILES.model_copy(update={"input_shape": (3, SIDE, SIDE)})
    make = partial(fractal.pictures, spec, seed, options=fractal.Options())
    workers = min(8, os.cpu_count() or 1, -(-len(indices) // 64))
    if workers == 1:
        made = make(indices)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            made = np.concatenate(list(pool.map(make, [list(part) for part in np.array_split(indices, workers)])))
    return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()


def images(tiles: Tensor, labels: NDArray[np.int64], seed: int, count: int) -> Iterator[tuple[Tensor, Boxes]]:
    """The images of a set, uint8 [3, SIDE, SIDE], and their objects.

    tiles    uint8 [N, 3, TILE, TILE]
    labels   int64 [N]
    """
    for i, background in enumerate(backgrounds(seed, range(count))):
        scene = draw(np.random.default_rng((seed, i)), 1, len(tiles))
        there = scene.there[0]
        (image,) = paint(background[None], tiles, scene)
        yield image, Boxes(scene.corners[0, there].astype(np.float64), labels[scene.tile[0, there]])


def write(folder: Path, made: Iterator[tuple[Tensor, Boxes]]) -> None:
    """Images and annotations in COCO's layout, as `--eval datumaro:coco:FOLDER` reads it."""
    (folder / "images" / "test").mkdir(parents=True)
    (folder / "annotations").mkdir()
    listed: list[dict[str, object]] = []
    objects: list[dict[str, object]] = []
    for number, (image, boxes) in enumerate(made, 1):
        name = f"{number:05d}.png"
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "images" / "test" / name)
        listed.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for (left, top, right, bottom), label in zip(boxes.corners.tolist(), boxes.labels.tolist(), strict=True):
            width, height = right - left, bottom - top
            objects.append({"id": len(objects) + 1, "image_id": number, "category_id": label, "iscrowd": 0,
                            "bbox": [left, top, width, height], "area": width * height,
                            "segmentation": []})  # fmt: skip
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
    (folder / "annotations" / "instances_test.json").write_text(
        json.dumps({"images": listed, "annotations": objects, "categories": categories}) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", metavar="DATA", help="data reference of CIFAR-10 images, with labels")
    parser.add_argument("--count", type=command.positive, default=1000, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; give a new folder")
    write(args.output, images(*read_tiles(args.objects), args.seed, args.count))


if __name__ == "__main__":
    command.run(main)
