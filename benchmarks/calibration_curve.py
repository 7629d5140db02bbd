"""Plot INT8 error over the CPU time of making the calibration set, from results of benchmarks/calibration.py.

    python benchmarks/calibration.py MODEL ... --arm "dgh steps=10" --arm "dgh steps=30" --arm "dgh steps=90" -o x.json
    python benchmarks/calibration_curve.py x.json -o x.svg

One line per source, one point per arm: the NMSE of the logits, mean over seeds, over the CPU seconds of making the set.
Sources with a single arm are points, and the dashed line is real images.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import command
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    found = [json.loads(path.read_text()) for path in args.results]
    arms: dict[str, list[dict[str, float]]] = defaultdict(list)
    for result in found:
        for cell in result["cells"]:
            arms[cell["arm"]].append(cell)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for arm, cells in arms.items():
        point = tuple(float(np.mean([cell[key] for cell in cells])) for key in ("cpu_seconds", "nmse"))
        lines[arm.split()[0].partition(":")[0]].append(point)  # type: ignore[arg-type]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for source, points in lines.items():
        if source == "real":
            axes.axhline(points[0][1], linestyle="--", color="black", label="real images")
        elif all(seconds > 0 for seconds, _ in points):  # a set that was there before has no place on this axis
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=source)
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds of making the set", ylabel="NMSE of the INT8 logits")
    axes.set_title(f"{found[0]['model']}, {found[0]['count']} images")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    # Neither date nor random names, so that the same results give the same file.
    plt.rcParams["svg.hashsalt"] = "ovcalib"
    figure.savefig(args.output, metadata={"Date": None} if args.output.endswith(".svg") else None)


if __name__ == "__main__":
    command.run(main)
