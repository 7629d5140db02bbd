"""What `--calib auto` takes, beside every candidate in hindsight.

    python benchmarks/auto.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --limit 2000 --count 64 \\
        --candidates bn-inversion dgh distylegan fractal noise -o auto-resnet20-cifar10.json

Candidates are compared as `auto` compares them, on their own images alone. Then every one of them calibrates the model
with the default settings, and agreement and NMSE are measured on the evaluation images, which `auto` never sees.
Seconds are those of making the images: of `auto` with its trials, of a candidate alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from settings import about, add_model, save

import ovcalib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--candidates", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--deploy-isa", default="vnni")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    given = about(args)
    runs = []
    for seed in range(args.seeds):
        auto = ovcalib.generate(f"auto:{','.join(args.candidates)}", args.model, args.count, seed=seed, **given)
        cells = []
        for trial in auto.provenance.trials:
            made = ovcalib.generate(trial.source, args.model, args.count, seed=seed, **given)
            recipe = ovcalib.make_recipe(
                model=args.model, calib=trial.source, num_samples=args.count, seed=seed, eval=args.eval,
                limit=args.limit, deploy_isa=args.deploy_isa, benchmark_time=0, **given,
            )  # fmt: skip
            record = ovcalib.run_recipe(recipe, calibration=made).record
            cells.append({
                **trial.model_dump(), "agreement": record.agreement.top1, "agreement_nmse": record.agreement.nmse,
                "top1": record.accuracy and record.accuracy.int8.top1, "alone_seconds": made.provenance.seconds,
            })  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
        taken = auto.provenance.parts[0].source
        best = max(cells, key=lambda cell: cell["agreement"])
        own = next(cell for cell in cells if cell["source"] == taken)
        print(
            f"seed {seed}: auto takes {taken}, agreement {100 * own['agreement']:.2f} %; best in hindsight "
            f"{best['source']}, {100 * best['agreement']:.2f} %"
        )
        runs.append({"seed": seed, "taken": taken, "seconds": auto.provenance.seconds, "candidates": cells})
        save(args, runs=runs)


if __name__ == "__main__":
    main()
