"""The loss of top-1 from errors on images that were made: the coefficients of ovcalib/evaluation/predicted_loss.py.

    python benchmarks/loss_model.py loss-*.json [--only-test loss-mobilenet_v2.json ...]

Each file holds the cells of one network, from `loss_cells.py`. For every probe and error, three lines are fitted: the
2.5 %, 50 % and 97.5 % quantiles of the loss, in points, over the error to the power B (Koenker & Bassett 1978; every
network has the same weight). Networks are left out in turn, and the tables show what the lines of the others say of the
one that is left out: how far the median is off, how often the loss lies within the interval, and how wide it is. The
measured loss has the noise of its evaluation images, which counts against the fit. Networks with few evaluation images
are not fitted (`--only-test`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import command
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from ovcalib.evaluation.predicted_loss import LARGEST_NMSE

QUANTILES = (0.025, 0.5, 0.975)
POWERS = (0.5, 0.75, 1.0)
# What ovcalib predicts from: probes, error and B.
CHOSEN = ("fractal", "nmse", 1.0)
Cell = dict[str, Any]
Sides = tuple[NDArray[np.float64], NDArray[np.float64]]
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
    parser.add_argument("--only-test", nargs="+", default=[], type=Path, help="files that nothing is fitted to")
    parser.add_argument("--largest", type=float, default=LARGEST_NMSE, help="NMSE on fractals of the cells that count")
    parser.add_argument("--quantiles", nargs=3, type=float, default=QUANTILES, metavar="Q")
    args = parser.parse_args()
    quantiles = args.quantiles
    networks, unseen = ({path.stem: cells_of(path, args) for path in paths} for paths in (args.files, args.only_test))
    found = []
    for probes in PROBES:
        for error in ERRORS:
            for power in POWERS:
                both = {name: sides(cells, probes, error, power) for name, cells in networks.items()}
                found.append((left_out(both, quantiles), probes, error, power, lines([*both.values()], quantiles)))
    found.sort(key=lambda row: row[0]["pinball"])
    print("| probes | error | B | off by, points | within | width, points | pinball loss |")
    print("|---|---|---|---|---|---|---|")
    for measured, probes, error, power, _ in found:
        print(f"| {probes} | {error} | {power} | {row(measured)} | {measured['pinball']:.3f} |")
    (best,) = (entry for entry in found if entry[1:4] == CHOSEN)
    print(f"\nLINES = {tuple((round(a, 2), round(b, 1)) for a, b in best[4])}\n")
    print("| left out | cells | loss from, points | to | off by | within | width |")
    print("|---|---|---|---|---|---|---|")
    tested = {name: judged(best[4], *sides(cells, *CHOSEN), quantiles) for name, cells in unseen.items()}
    for name, measured in {**best[0]["networks"], **tested}.items():
        losses = [cell["loss_points"] for cell in {**networks, **unseen}[name]]
        print(f"| {name} | {len(losses)} | {min(losses):+.2f} | {max(losses):+.2f} | {row(measured)} |")


def cells_of(path: Path, args: argparse.Namespace) -> list[Cell]:
    """The cells that a prediction is made for: fractals say nothing of a model that is calibrated with them."""
    cells = json.loads(path.read_text())["cells"]
    return [c for c in cells if "fractal" not in c["arm"] and c["probes"]["fractal"]["nmse"] <= args.largest]


def row(measured: dict[str, float]) -> str:
    return f"{measured['off']:.2f} | {100 * measured['within']:.0f} % | {measured['width']:.2f}"


def sides(cells: list[Cell], probes: str, error: str, power: float) -> Sides:
    """The joint error of each cell to a power, and its loss in points."""
    values = [[ERRORS[error](cell["probes"][probe]) for probe in PROBES[probes]] for cell in cells]
    joint = np.exp(np.log(np.maximum(values, 1e-9)).mean(1))
    return joint**power, np.array([cell["loss_points"] for cell in cells])


def lines(networks: Sequence[Sides], quantiles: Sequence[float]) -> list[tuple[float, float]]:
    """Intercept and slope of each quantile; cells of a network share its weight."""
    weights = np.concatenate([np.full(len(x), 1 / len(x)) for x, _ in networks])
    x, y = (np.concatenate(values) for values in zip(*networks, strict=True))
    return [quantile_line(x, y, weights, quantile) for quantile in quantiles]


def quantile_line(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64], quantile: float
) -> tuple[float, float]:
    """The line a + b x of least pinball loss: a linear program in a, b and the two sides of each residual."""
    n = len(x)
    cost = np.concatenate([[0, 0], quantile * weights, (1 - quantile) * weights])
    design = np.hstack([np.ones((n, 1)), x[:, None], np.eye(n), -np.eye(n)])
    solved = linprog(cost, A_eq=design, b_eq=y, bounds=[(None, None)] * 2 + [(0, None)] * (2 * n))
    return float(solved.x[0]), float(solved.x[1])


def left_out(networks: dict[str, Sides], quantiles: Sequence[float]) -> dict[str, Any]:
    """What the lines of all other networks say of each network; means over networks."""
    rows = {
        name: judged(
            lines([both for other, both in networks.items() if other != name], quantiles), *networks[name], quantiles
        )
        for name in networks
    }
    means = {key: float(np.mean([row[key] for row in rows.values()])) for key in next(iter(rows.values()))}
    return {**means, "networks": rows}


def judged(
    fitted: list[tuple[float, float]], x: NDArray[np.float64], y: NDArray[np.float64], quantiles: Sequence[float]
) -> dict[str, float]:
    """What fitted lines say of the cells of a network."""
    low, middle, high = (a + b * x for a, b in fitted)
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    pinball = [
        np.maximum(q * (y - line), (q - 1) * (y - line)).mean()
        for q, line in zip(quantiles, (low, middle, high), strict=True)
    ]
    return {
        "off": float(np.abs(y - middle).mean()),
        "within": float(((low <= y) & (y <= high)).mean()),
        "width": float((high - low).mean()),
        "pinball": float(np.mean(pinball)),
    }


if __name__ == "__main__":
    command.run(main)
