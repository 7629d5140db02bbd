"""What `--calib auto` takes, beside every candidate in hindsight.

    python benchmarks/auto.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --limit 2000 --count 64 \\
        --others dgh noise -o auto-resnet20-cifar10.json

`auto` compares its candidates on their own images alone, and quantizes with the one that it takes. Then each of them,
and each of the other sources, calibrates the model by itself, with the default settings. Agreement and NMSE are those
of the evaluation images, and seconds those of making the images and of quantizing, of `auto` with its trials.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import command
from settings import about, add_model, save

import ovcalib
from ovcalib.records.result import Result


def recipe(args: argparse.Namespace, calib: str, seed: int, **more: Any) -> ovcalib.Recipe:
    asked = {"num_samples": args.count, "eval": args.eval, "limit": args.limit, **about(args), **more}
    return ovcalib.make_recipe(
        model=args.model, calib=calib, seed=seed, deploy_isa=args.deploy_isa, benchmark_time=0, **asked
    )


def result_of(record: Result) -> dict[str, Any]:
    """On the evaluation images, and the seconds of making the calibration images and of quantizing."""
    return {
        "agreement": record.agreement.top1,
        "agreement_nmse": record.agreement.nmse,
        "top1": record.accuracy and record.accuracy.int8.top1,
        "made_and_quantized_seconds": record.calibration.seconds + record.quantization.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--candidates", nargs="+", default=[], help="instead of the usual ones of `auto`")
    parser.add_argument("--others", nargs="+", default=[], help="sources that `auto` does not try")
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--seeds", type=command.positive, default=1)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--deploy-isa", default="vnni")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    ovcalib.run_recipe(recipe(args, "auto:noise,fractal", 0, num_samples=4))  # imports what all of them need
    auto = f"auto:{','.join(args.candidates)}" if args.candidates else "auto"
    runs = []
    for seed in range(args.seeds):
        record = ovcalib.run_recipe(recipe(args, auto, seed)).record
        tried = {trial.source: trial.model_dump() for trial in record.calibration.trials}
        cells = []
        for source in (*tried, *args.others):
            alone = ovcalib.run_recipe(recipe(args, source, seed)).record
            cells.append({**tried.get(source, {"source": source}), **result_of(alone)})
            print(json.dumps(cells[-1]), flush=True)
        own, taken = result_of(record), record.calibration.parts[0].source
        best = max(cells, key=lambda cell: cell["agreement"])
        print(
            f"seed {seed}: auto takes {taken}, agreement {100 * own['agreement']:.2f} %; best in "
            f"hindsight {best['source']}, {100 * best['agreement']:.2f} %"
        )
        runs.append({"seed": seed, "taken": taken, **own, "candidates": cells})
        save(args, runs=runs)


if __name__ == "__main__":
    command.run(main)
