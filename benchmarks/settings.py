"""INT8 error by quantization settings, on the same calibration set.

    python benchmarks/settings.py resnet20-cifar10 --calib bn-inversion --count 64 \\
        --eval imagefolder:cifar10-jpeg/test --limit 2000 --deploy-isa vnni avx2 \\
        --arm rounding=nearest bias_correction=none --arm rounding=nearest bias_correction=full \\
        --arm rounding=nearest --arm rounding=compensated -o settings.json

Each `--arm` lists keywords of `ovcalib.quantize`. `--factor` widens channels of a ResNet first, as guard.py does:

    python benchmarks/settings.py resnet20-cifar10 --factor 100 --calib fractal --count 64 \\
        --eval imagefolder:cifar10-jpeg/test --limit 2000 --deploy-isa vnni \\
        --arm guard=False equalize=off --arm equalize=off --arm equalize=on -o equalization.json

Agreement, NMSE and top-1 are those of the evaluation images, in the arithmetic of each ISA: executed where this CPU has
it, else emulated. `in float` counts the layers left in float. Finished cells are kept in the output file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import command
from guard import widen

import ovcalib
from ovcalib.measurement.environment import environment

COLUMNS = ("isa", "arm", "seed", "nmse", "agreement", "top1", "fp32_top1", "in float", "seconds")


def numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model and its input, which `about` gives to ovcalib."""
    parser.add_argument("model")
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--input-shape", type=numbers, metavar="C,H,W")
    parser.add_argument("--mean", type=numbers, metavar="A,B,C")
    parser.add_argument("--std", type=numbers, metavar="A,B,C")


def about(args: argparse.Namespace) -> dict[str, Any]:
    return {"weights": args.weights, "input_shape": args.input_shape, "mean": args.mean, "std": args.std}


def save(args: argparse.Namespace, **found: Any) -> None:
    """Write what was found to `args.output`, with the arguments and the machine."""
    given = {name: str(value) for name, value in vars(args).items()}
    args.output.write_text(json.dumps({**given, "environment": environment().model_dump(), **found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--factor", type=float)
    parser.add_argument("--calib", default="fractal")
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--seeds", type=command.positive, default=1)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--deploy-isa", nargs="+", default=["vnni", "avx2"])
    parser.add_argument("--arm", action="append", nargs="+", required=True, metavar="KEYWORD=VALUE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    given = about(args)
    loaded = ovcalib.load_model(args.model, **given)
    model: Any = args.model
    if args.factor is not None:
        model = loaded.module
        widen(model, args.factor)
        pre = loaded.spec.preprocessing
        given = {"input_shape": loaded.spec.input_shape, "mean": pre.mean, "std": pre.std}
    cells = json.loads(args.output.read_text())["cells"] if args.output.exists() else []
    done = {(cell["isa"], cell["arm"], cell["seed"]) for cell in cells}
    for seed in range(args.seeds):
        wanted = [(isa, arm) for isa in args.deploy_isa for arm in args.arm if (isa, " ".join(arm), seed) not in done]
        if not wanted:
            continue
        made = ovcalib.generate(args.calib, model, args.count, seed=seed, **given)
        for isa, arm in wanted:
            recipe = ovcalib.make_recipe(
                model=args.model, calib=args.calib, num_samples=args.count, seed=seed, eval=args.eval,
                limit=args.limit, deploy_isa=isa, benchmark_time=0, **given,
                **dict(entry.split("=", 1) for entry in arm),
            )  # fmt: skip
            module = None if isinstance(model, str) else model
            record = ovcalib.run_recipe(recipe, module=module, calibration=made).record
            accuracy = record.accuracy
            cells.append({
                "isa": isa, "arm": " ".join(arm), "seed": seed, "nmse": record.agreement.nmse,
                "agreement": record.agreement.top1, "top1": accuracy and accuracy.int8.top1,
                "fp32_top1": accuracy and accuracy.fp32.top1,
                "in float": record.quantization.float_operations, "seconds": record.quantization.seconds,
                "emulated": record.agreement.emulated, "quantization": record.quantization.model_dump(mode="json"),
            })  # fmt: skip
            print("  ".join(f"{cells[-1][name]}" for name in COLUMNS), flush=True)
            save(args, cells=cells)


if __name__ == "__main__":
    command.run(main)
