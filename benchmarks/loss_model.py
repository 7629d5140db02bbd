"""The loss of top-1 from errors on images that were made: the coefficients of ovcalib/evaluation/predicted_loss.py.

    python benchmarks/loss_model.py loss-*.json

Each file holds the cells of one network, from `loss_cells.py`. For every probe and error, three lines are fitted: the
5 %, 50 % and 95 % quantiles of the loss, in points, over the error to the power B (Koenker & Bassett 1978; every
network has the same weight). Networks are left out in turn, and the tables show what the lines of the others say of the
one that is left out: how far the median is off, how often the loss lies within the interval, and how wide it is. The
measured loss has the noise of its evaluation images, which counts against the fit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

QUANTILES = (0.05, 0.5, 0.95)
POWERS = (0.5, 0.75, 1.0)
Cell = dict[str, Any]
# What each probe says; their joint error is the geometric mean.
PROBES = {
    "held-out": ("held-out",), "fractal": ("fractal",), "noise": ("noise",), "fractal + noise": ("fractal", "noise"),
    "fractal + held-out": ("fractal", "held-out"), "all three": ("fractal", "noise", "held-out"),
}  # fmt: skip
ERRORS: dict[str, Callable[[Cell], float]] = {
    "nmse": lambda probe: float(probe["nmse"]),
    "disagreement": lambda probe: 1 - probe["agreement"] + 0.5 / probe["count"],
    "expected loss": lambda probe: probe["expected_loss"] + 0.1 / probe["count"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--without", nargs="+", default=[], help="calibration sources to leave out")
    args = parser.parse_args()
    networks = {
        path.stem: [cell for cell in json.loads(path.read_text())["cells"] if cell["arm"] not in args.without]
        for path in args.files
    }
    found = []
    for probes in PROBES:
        for error in ERRORS:
            for power in POWERS:
                x = {name: errors(cells, probes, error) ** power for name, cells in networks.items()}
                y = {name: np.array([cell["loss_points"] for cell in cells]) for name, cells in networks.items()}
                found.append((left_out(x, y), probes, error, power, lines(x, y)))
    found.sort(key=lambda row: row[0]["pinball"])
    print("| probes | error | B | off by, points | within | width, points | pinball | lines: 5 %, 50 %, 95 % |")
    print("|---|---|---|---|---|---|---|---|")
    for measured, probes, error, power, fitted in found:
        shown = " ".join(f"{a:+.2f}{b:+.2f}x" for a, b in fitted)
        print(
            f"| {probes} | {error} | {power} | {measured['off']:.2f} | {100 * measured['within']:.0f} % | "
            f"{measured['width']:.2f} | {measured['pinball']:.3f} | {shown} |"
        )
    best = found[0]
    for name, row in best[0]["networks"].items():
        print(f"{name}: off by {row['off']:.2f}, within {100 * row['within']:.0f} %, width {row['width']:.2f}")


def errors(cells: list[Cell], probes: str, error: str) -> NDArray[np.float64]:
    """The joint error of each cell."""
    values = [[ERRORS[error](cell["probes"][probe]) for probe in PROBES[probes]] for cell in cells]
    return np.asarray(np.exp(np.log(np.maximum(values, 1e-9)).mean(1)))


def lines(x: dict[str, NDArray[np.float64]], y: dict[str, NDArray[np.float64]]) -> list[tuple[float, float]]:
    """Intercept and slope of each quantile; cells of a network share its weight."""
    weights = np.concatenate([np.full(len(values), 1 / len(values)) for values in x.values()])
    return [quantile_line(np.concatenate([*x.values()]), np.concatenate([*y.values()]), weights, q) for q in QUANTILES]


def quantile_line(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64], quantile: float
) -> tuple[float, float]:
    """The line a + b x of least pinball loss: a linear program in a, b and the two sides of each residual."""
    n = len(x)
    cost = np.concatenate([[0, 0], quantile * weights, (1 - quantile) * weights])
    design = np.hstack([np.ones((n, 1)), x[:, None], np.eye(n), -np.eye(n)])
    solved = linprog(cost, A_eq=design, b_eq=y, bounds=[(None, None)] * 2 + [(0, None)] * (2 * n))
    return float(solved.x[0]), float(solved.x[1])


def left_out(x: dict[str, NDArray[np.float64]], y: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """What the lines of all other networks say of each network; means over networks."""
    networks = {}
    for name in x:
        others = {other: values for other, values in x.items() if other != name}
        fitted = lines(others, {other: y[other] for other in others})
        low, middle, high = (a + b * x[name] for a, b in fitted)
        low, high = np.minimum(low, middle), np.maximum(high, middle)
        networks[name] = {
            "off": float(np.abs(y[name] - middle).mean()),
            "within": float(((low <= y[name]) & (y[name] <= high)).mean()),
            "width": float((high - low).mean()),
            "pinball": float(np.mean([
                np.maximum(q * (y[name] - line), (q - 1) * (y[name] - line)).mean()
                for q, line in zip(QUANTILES, (low, middle, high), strict=True)
            ])),
        }  # fmt: skip
    means = {key: float(np.mean([row[key] for row in networks.values()])) for key in next(iter(networks.values()))}
    return {**means, "networks": networks}


if __name__ == "__main__":
    main()
