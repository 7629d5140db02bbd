"""How long one fractal takes, against the loop of the generator that it follows.

    python benchmarks/fractal.py [--images 20]

The loop is the algorithm of Datumaro's FractalImageGenerator as it runs there, one point at a time in Python: choose a
map, apply it, paint a 3x3 patch. It is written here from its description, and its points agree with ours (tests/unit/
test_fractal.py). Both make 200,000 points an image; ours also colours the image, the loop leaves it grey.
Prints seconds an image and their ratio, loop and ours in turns.
"""

from __future__ import annotations

import argparse
import time

import command
import numpy as np

from ovcalib.calibration import fractal

POINTS = 200_000


def reference_image(rng: np.random.Generator, system: fractal.System, height: int, width: int) -> np.ndarray:
    """One grey image, one point at a time."""
    x = y = 0.0
    points = []
    area = np.abs(system.maps[:, 0] * system.maps[:, 3] - system.maps[:, 1] * system.maps[:, 2])
    cumulative = np.cumsum(area / (1e-5 + area.sum()))
    for _ in range(POINTS + 100):
        which = min(int(np.searchsorted(cumulative, rng.random())), len(system.maps) - 1)
        a, b, c, d, e, f = system.maps[which]
        x, y = a * x + b * y + e, c * x + d * y + f
        points.append((x, y))
    found = np.array(points[100:])
    found = found[np.isfinite(found).all(1)]
    low, high = found.min(0), found.max(0)
    pixels = ((found - low) / np.maximum(high - low, 1e-9) * (height - 12, width - 12) + 6).astype(np.uint16)
    image = np.zeros((height, width), np.uint8)
    patch = rng.integers(0, 2, (3, 3)).astype(np.uint8) * 127
    for row, column in pixels:
        region = image[row - 1 : row + 2, column - 1 : column + 2]
        np.maximum(region, patch, out=region)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=command.positive, default=20, help="images of ours; the loop makes a tenth as many"
    )
    images = parser.parse_args().images
    began = time.perf_counter()
    systems = [fractal.find_system(np.random.default_rng((0, 0, k))) for k in range(16)]
    print(f"finding a function system: {(time.perf_counter() - began) / 16:.3f} s (once for 64 of them)")
    for side in (32, 224):
        fields = fractal.noise_fields(0, *fractal.canvas_size(side, side))
        loop, ours = [], []
        for i in range(max(2, images // 10)):
            began = time.perf_counter()
            reference_image(np.random.default_rng(i), systems[i % 16], side, side)
            loop.append(time.perf_counter() - began)
            for k in range(10):
                rng = np.random.default_rng((0, 1, 10 * i + k))
                began = time.perf_counter()
                fractal.natural_fractal(rng, systems, fields, side, side, POINTS, layers=3)
                ours.append(time.perf_counter() - began)
        ratio = np.median(loop) / np.median(ours)
        print(
            f"{side}x{side}: loop {np.median(loop):.3f} s, ours {np.median(ours):.4f} s an image, "
            f"{ratio:.0f} times faster"
        )


if __name__ == "__main__":
    command.run(main)
