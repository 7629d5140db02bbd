"""Grids and curves, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import NDArray

from ovcalib.rundir import write_atomically

Pixels = NDArray[np.uint8]
COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
           (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207))  # fmt: skip
MARGIN = 2
TEXT = 14


def grid(images: Pixels, columns: int, scale: int = 1) -> Pixels:
    """Images side by side, row by row. uint8 [N, H, W, 3] -> uint8 [rows * H, columns * W, 3], with thin gaps"""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows, columns, height + MARGIN, width + MARGIN, channels), 255, np.uint8)
    canvas.reshape(-1, height + MARGIN, width + MARGIN, channels)[:n, :height, :width] = images
    flat = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * (height + MARGIN), columns * (width + MARGIN), channels)
    return flat.repeat(scale, axis=0).repeat(scale, axis=1)


def by_class(images: Pixels, labels: NDArray[np.int64], each: int, classes: int) -> Pixels:
    """The first `each` images of every class, one row a class; missing ones are white. uint8 [classes * each, ...]"""
    chosen = np.full((classes, each, *images.shape[1:]), 255, np.uint8)
    for label in range(classes):
        found = images[labels == label][:each]
        chosen[label, : len(found)] = found
    return chosen.reshape(classes * each, *images.shape[1:])


def save_png(pixels: Pixels, path: Path) -> None:
    write_atomically(path, lambda partial: PIL.Image.fromarray(pixels).save(partial, format="png"))


def titled(panels: Mapping[str, Pixels]) -> Pixels:
    """Pictures of one height beside each other, each under its name."""
    height = max(panel.shape[0] for panel in panels.values()) + TEXT + MARGIN
    parts = []
    for title, panel in panels.items():
        part = PIL.Image.new("RGB", (panel.shape[1] + 4 * MARGIN, height), "white")
        PIL.ImageDraw.Draw(part).text((0, 0), title, fill="black")
        part.paste(PIL.Image.fromarray(panel), (0, TEXT + MARGIN))
        parts.append(np.asarray(part))
    return np.concatenate(parts, axis=1)


def scatter(points: NDArray[np.floating], groups: Sequence[str], side: int = 720) -> Pixels:
    """Points in the plane, one colour a group, with a legend. [N, 2] and N names"""
    low, high = points.min(axis=0), points.max(axis=0)
    placed = (points - low) / np.maximum(high - low, 1e-12) * (side - 20) + 10
    image = PIL.Image.new("RGB", (side, side + TEXT * 2), "white")
    draw = PIL.ImageDraw.Draw(image)
    names = list(dict.fromkeys(groups))
    for (x, y), group in zip(placed, groups, strict=True):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=COLOURS[names.index(group) % len(COLOURS)])
    for i, name in enumerate(names):
        draw.text((10 + i * side // len(names), side + TEXT // 2), name, fill=COLOURS[i % len(COLOURS)])
    return np.asarray(image)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], width: int = 640, height: int = 160) -> Pixels:
    """One chart below another, (x, y) points each, with the range of y written beside the name."""
    image = PIL.Image.new("RGB", (width, height * max(1, len(series))), "white")
    draw = PIL.ImageDraw.Draw(image)
    for row, (name, points) in enumerate(series.items()):
        values = np.array([p for p in points if np.isfinite(p).all()], dtype=float).reshape(-1, 2)
        top = row * height
        if not len(values):
            continue
        low, high = values.min(axis=0), values.max(axis=0)
        span = np.maximum(high - low, 1e-12)
        draw.text((4, top + 2), f"{name}: {low[1]:.4g} to {high[1]:.4g}, last {values[-1, 1]:.4g}", fill="black")
        unit = (values - low) / span
        xs, ys = 4 + unit[:, 0] * (width - 8), top + height - 6 - unit[:, 1] * (height - TEXT - 12)
        line = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        draw.line(line if len(line) > 1 else line * 2, fill=COLOURS[row % len(COLOURS)], width=2)
    return np.asarray(image)
