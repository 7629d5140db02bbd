"""Compare bias corrections on the same calibration sets.

    python benchmarks/bias_correction.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --count 128 --seeds 3 \
        --arm real:imagefolder:cifar10-jpeg/train --arm bn-inversion -o bias.json

Every arm is a calibration source, every seed a set of it; the ranges are the same for all corrections of a set.
`chosen` is the default of ovcalib: layerwise, or none where the output error on the last images of the set is smaller.
`--overflow-fix enable` gives weights half their range, as on CPUs without VNNI. `--activation-ranges` is as with
calibration.py, except that auto is min-max. Error and agreement are those of the evaluation images, seconds those of
the whole quantization. Cells that FILE already holds are not measured again.
"""

from __future__ import annotations

import argparse
from typing import Any

import command
import numpy as np
from calibration import finished_cells, make_set, quantize, run, spread, write

CORRECTIONS = ("none", "fast", "full", "layerwise", "chosen")


def measure(args: argparse.Namespace) -> None:
    cells = finished_cells(args)
    args.activation_ranges = "min-max" if args.activation_ranges == "auto" else args.activation_ranges
    for seed in range(args.seeds):
        for arm in args.arm:
            done = {cell["correction"] for cell in cells if cell["arm"] == arm and cell["seed"] == seed}
            for correction in (c for c in args.correction or CORRECTIONS if c not in done):
                folder, _ = make_set(args, arm, seed)
                asked = "auto" if correction == "chosen" else correction
                record = quantize(args, arm, seed, folder, bias_correction=asked, overflow_fix=args.overflow_fix).record
                cells.append({
                    "arm": arm, "seed": seed, "correction": correction,
                    "came_to": record.quantization.bias_correction,
                    "seconds": round(record.quantization.seconds, 1),
                    "agreement": record.agreement.top1, "nmse": record.agreement.nmse,
                    "top1": record.accuracy and record.accuracy.int8.top1,
                })  # fmt: skip
                write(args, record, cells, overflow_fix=args.overflow_fix)
    print(table(cells))


def table(cells: list[dict[str, Any]]) -> str:
    """Mean and, over seeds, the standard deviation."""
    lines = ["| calibration | bias correction | top-1 % | agreement % | NMSE | s |", "|---|---|---|---|---|---|"]
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        for correction in CORRECTIONS:
            own = [c for c in cells if c["arm"] == arm and c["correction"] == correction]
            if own:
                columns = [spread([100 * c[key] for c in own], 2) for key in ("top1", "agreement")]
                columns += [spread([c["nmse"] for c in own], 4), f"{np.median([c['seconds'] for c in own]):.0f}"]
                lines.append(f"| {arm} | {correction} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--correction", action="append", choices=CORRECTIONS, help="all by default; repeatable")
    parser.add_argument("--overflow-fix", default="disable")
    run(parser, measure)


if __name__ == "__main__":
    command.run(main)
