"""INT8 only where it is faster: FP32, all operations in INT8, and what `--optimize-for latency` makes of that.

    python benchmarks/latency_search.py vit-cifar10 --eval imagefolder:cifar10-jpeg/test --limit 2000 -o latency.json

Both INT8 models are made from the same calibration images. Then the three are measured anew, each in a process of its
own, in turns (`ovcalib benchmark --hint latency`). Intervals are those of the ratio of medians over the rounds, 95 %.
Agreement and top-1 are those of the evaluation images. Each call adds a row to the output file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import command
from settings import about, add_model

import ovcalib
from ovcalib.evaluation.metrics import ratio_interval
from ovcalib.measurement.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--calib", default="bn-inversion")
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--time", type=float, default=10.0, help="seconds of measurement of each model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    made = ovcalib.generate(args.calib, args.model, args.count, seed=args.seed, **about(args))
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for goal in ("size", "latency"):
            recipe = ovcalib.make_recipe(
                model=args.model, calib=args.calib, num_samples=args.count, seed=args.seed, eval=args.eval,
                limit=args.limit, benchmark_time=0, optimize_for=goal, **about(args),
            )  # fmt: skip
            records[goal] = ovcalib.run_recipe(recipe, Path(root) / goal, calibration=made).record
        files = [Path(root) / part / "model.xml" for part in ("size/fp32", "size/int8", "latency/int8")]
        fp32, everything, chosen = ovcalib.benchmark(files, hint=["latency"], seconds=args.time).runs
    speed = records["latency"].quantization.speed
    row = {
        "model": args.model, "calib": args.calib, "count": args.count, "seed": args.seed,
        "p50_ms": {"fp32": fp32.latency_ms.p50, "all": everything.latency_ms.p50, "chosen": chosen.latency_ms.p50},
        "chosen over all": ratio_interval(everything.round_p50_ms, chosen.round_p50_ms),
        "chosen over fp32": ratio_interval(fp32.round_p50_ms, chosen.round_p50_ms),
        "all over fp32": ratio_interval(fp32.round_p50_ms, everything.round_p50_ms),
        "unreliable": sorted({*fp32.unreliable, *everything.unreliable, *chosen.unreliable}),
        "search": speed.model_dump(mode="json"),
        "int8_operations": {goal: record.quantization.int8_operations for goal, record in records.items()},
        "seconds": {goal: record.quantization.seconds for goal, record in records.items()},
        "size_bytes": {"fp32": records["size"].size_bytes.fp32, "all": records["size"].size_bytes.int8,
                       "chosen": records["latency"].size_bytes.int8},
        **{goal: {"nmse": record.agreement.nmse, "agreement": record.agreement.top1,
                  "top1": record.accuracy and record.accuracy.int8.top1,
                  "fp32_top1": record.accuracy and record.accuracy.fp32.top1} for goal, record in records.items()},
    }  # fmt: skip
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    args.output.write_text(
        json.dumps({"environment": environment().model_dump(), "rows": [*rows, row]}, indent=1) + "\n"
    )
    for name in ("p50_ms", "all over fp32", "chosen over fp32", "chosen over all", "size", "latency", "unreliable"):
        print(f"{name}: {row[name]}")
    print(f"in float: {speed.in_float}")


if __name__ == "__main__":
    command.run(main)
