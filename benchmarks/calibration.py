"""INT8 error by calibration source, and its rank correlation with the data-free score.

    python benchmarks/calibration.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --count 128 --seeds 3 \
        --arm real:imagefolder:cifar10-jpeg/train --arm fractal --arm noise --arm bn-inversion --arm "dgh output=none" \
        -o benchmarks/results/calibration-resnet20.json

An arm is a source with its options. All arms have the same number of images, the same evaluation images and the same
settings: deployment on vnni, the instruction set of the machine of the committed results; otherwise the defaults,
unless `--activation-ranges` or `--bias-correction` are given (`bias_correction.py` compares the latter). Finished cells
are kept in the output file, and a run that is started again continues after them. Agreement is with FP32; NMSE is the
squared error of the logits over the squared logits of FP32. CPU seconds include loading the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import command
import numpy as np
from scipy.stats import spearmanr

import ovcalib
from ovcalib.calibration.sets import read_set

SCORES = ("bn_distance", "range_coverage", "diversity", "output_range_distance")


def measure(args: argparse.Namespace) -> None:
    cells = finished_cells(args)
    ovcalib.load_model(args.model, **args.about)  # imports, which belong to no arm
    for seed in range(args.seeds):
        for arm in args.arm:
            if any(cell["arm"] == arm and cell["seed"] == seed for cell in cells):
                continue
            folder, cpu_seconds = make_set(args, arm, seed)
            score = ovcalib.generate(f"npz:{folder / 'calibration.npz'}", args.model, score=True, **args.about)
            record = quantize(args, arm, seed, folder, bias_correction=args.bias_correction).record
            cells.append({
                "arm": arm, "seed": seed,
                "seconds": round(record.calibration.seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
                "top1": record.accuracy and record.accuracy.int8.top1,
                "agreement": record.agreement.top1, "nmse": record.agreement.nmse,
                "activation_ranges": record.quantization.activation_ranges,
                "bias_correction": record.quantization.bias_correction,
                **(score.provenance.score.model_dump() if score.provenance.score else {}),
            })  # fmt: skip
            write(args, record, cells, bias_correction=args.bias_correction,
                  torch_threads=os.environ.get("OMP_NUM_THREADS"))  # fmt: skip
    print(table(args.arm, cells))


def finished_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of an earlier run."""
    return json.loads(args.output.read_text())["cells"] if args.output.exists() else []


def make_set(args: argparse.Namespace, arm: str, seed: int) -> tuple[Path, float]:
    """The folder of a calibration set in `args.keep`, and the CPU seconds of making it."""
    key = json.dumps([arm, args.count, seed, args.model, args.about])
    folder = Path(args.keep, hashlib.sha256(key.encode()).hexdigest()[:16])
    if not (folder / "cpu_seconds.json").is_file():  # written last
        source, options = source_of(arm)
        began = time.process_time()
        made = ovcalib.generate(source, args.model, args.count, seed=seed, options=options, **args.about)
        cpu_seconds = time.process_time() - began
        made.save(folder)
        (folder / "cpu_seconds.json").write_text(json.dumps(cpu_seconds))
    return folder, json.loads((folder / "cpu_seconds.json").read_text())


def quantize(args: argparse.Namespace, arm: str, seed: int, folder: Path, **more: Any) -> ovcalib.QuantizationResult:
    """The result with a calibration set that was made before."""
    source, options = source_of(arm)
    settings = {"activation_ranges": args.activation_ranges, "deploy_isa": "vnni", "benchmark_time": 0,
                "allow_overlap": args.allow_overlap, **more}  # fmt: skip
    recipe = ovcalib.make_recipe(
        model=args.model, calib=source, options=options, num_samples=args.count, seed=seed, eval=args.eval,
        limit=args.limit, **args.about, **settings,
    )  # fmt: skip
    return ovcalib.run_recipe(recipe, calibration=read_set(folder))


def source_of(arm: str) -> tuple[str, dict[str, str]]:
    source, *options = arm.split()
    return source, dict(option.split("=", 1) for option in options)


def write(args: argparse.Namespace, record: Any, cells: list[dict[str, Any]], **settings: Any) -> None:
    """Print the newest cell and write all of them."""
    print(json.dumps(cells[-1]), flush=True)
    content = {
        "model": args.model, "eval": args.eval, "evaluated": record.agreement.count, "count": args.count,
        "activation_ranges": args.activation_ranges, **settings,
        "fp32_top1": record.accuracy and record.accuracy.fp32.top1,
        "environment": record.environment.model_dump(), "cells": cells,
    }  # fmt: skip
    args.output.write_text(json.dumps(content, indent=1) + "\n")


def table(arms: Iterable[str], cells: list[dict[str, Any]]) -> str:
    """Mean and, over seeds, the standard deviation."""
    lines = ["| calibration | top-1 INT8 % | agreement % | NMSE | CPU s | seeds |", "|---|---|---|---|---|---|"]
    for arm in arms:
        own = [cell for cell in cells if cell["arm"] == arm]
        columns = [spread([100 * c[k] for c in own], 2) for k in ("top1", "agreement")]
        columns += [spread([c["nmse"] for c in own], 4), spread([c["cpu_seconds"] for c in own], 0), str(len(own))]
        lines.append(f"| {arm} | " + " | ".join(columns) + " |")
    lines += ["", "Spearman rank correlation with the NMSE of the logits, over all cells:", ""]
    for key in SCORES:
        if len(cells) > 2 and all(key in cell for cell in cells):
            rho = spearmanr([cell[key] for cell in cells], [cell["nmse"] for cell in cells]).statistic
            lines.append(f"- {key}: {rho:+.2f}")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation; one value has none."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def run(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], None]) -> None:
    """Measure with the options that the benchmarks of calibration sets have in common."""
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--input-shape", metavar="C,H,W")
    parser.add_argument("--mean", metavar="A,B,C")
    parser.add_argument("--std", metavar="A,B,C")
    parser.add_argument("--eval", required=True, help="data reference of the evaluation images")
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--count", type=command.positive, default=128, help="images of every arm")
    parser.add_argument("--seeds", type=command.positive, default=1)
    parser.add_argument("--arm", action="append", required=True, help='SOURCE, or "SOURCE key=value ..."')
    parser.add_argument("--activation-ranges", default="auto")
    parser.add_argument(
        "--allow-overlap", action="store_true", help="judge even on images of the sets, which flatters them"
    )
    parser.add_argument("--keep", help="folder of the sets, for runs with other settings")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.about = {key: getattr(args, key) for key in ("weights", "input_shape", "mean", "std") if getattr(args, key)}
    with tempfile.TemporaryDirectory() as folder:
        args.keep = args.keep or folder
        measure(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bias-correction", default="auto")
    run(parser, measure)


if __name__ == "__main__":
    command.run(main)
