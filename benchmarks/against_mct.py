"""INT8 error over the time that a calibration set takes: Sony's model-compression-toolkit (MCT) and bn-inversion.

    python benchmarks/against_mct.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --limit 5000 --count 64 \
        --mct-python ../mct/bin/python --mct-steps 30 125 500 --steps 5 20 120 --seeds 3 -o against-mct.json

Both in float32, whole runs after a warm-up run, one after the other. `pytorch_data_generation_experimental` of MCT has
its defaults, but for the number of images and of steps (500 by default, and its schedule follows them). `--mct-python`
names the interpreter of an environment that has MCT and ovcalib; the model is passed as a pickled module.
`bn-inversion` has its defaults, but for the steps. Every set is quantized with ovcalib's defaults. Finished cells are
kept in the output file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import command
import torch
from calibration import spread
from inversion_speed import run_mct
from settings import about, add_model

import ovcalib
from ovcalib.evaluation.dataset import open_dataset
from ovcalib.measurement.environment import environment

MCT = """
import sys, time, numpy, torch
import model_compression_toolkit as mct
model = torch.load(sys.argv[1], weights_only=False).eval()
size, images, steps, seed, threads = (int(v) for v in sys.argv[2:7])
torch.set_num_threads(threads)
def run(n):
    config = mct.data_generation.get_pytorch_data_generation_config(n_iter=n)
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    began = time.perf_counter()
    made = mct.data_generation.pytorch_data_generation_experimental(
        model=model, n_images=images, output_image_size=(size, size), data_generation_config=config)
    return time.perf_counter() - began, torch.cat(list(made)).numpy()
run(1)
seconds, made = run(steps)
numpy.savez(sys.argv[7], images=made)
print(seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--mct-python", type=command.program, required=True, help="interpreter of its environment")
    parser.add_argument("--mct-steps", nargs="+", type=command.positive, default=[500])
    parser.add_argument("--steps", nargs="+", type=command.positive, default=[20], help="of bn-inversion")
    parser.add_argument("--seeds", type=command.positive, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    cells = json.loads(args.output.read_text())["cells"] if args.output.exists() else []
    done = {(cell["method"], cell["steps"], cell["seed"]) for cell in cells}
    methods = {"mct": (args.mct_steps, by_mct), "bn-inversion": (args.steps, by_inversion)}
    open_dataset(args.eval, ovcalib.load_model(args.model, **about(args)).spec, args.limit)  # refused before any work
    ovcalib.generate("bn-inversion", args.model, args.count, options={"steps": "1"}, **about(args))  # a warm-up
    for seed in range(args.seeds):
        for method, (all_steps, make) in methods.items():
            for steps in all_steps:
                if (method, steps, seed) in done:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    seconds, source = make(args, steps, seed, Path(folder))
                    record = ovcalib.quantize(
                        args.model, calib=source, num_samples=args.count, eval=args.eval, limit=args.limit,
                        deploy_isa="vnni", benchmark_time=0, **about(args),
                    ).record  # fmt: skip
                cells.append({
                    "method": method, "steps": steps, "seed": seed, "seconds": round(seconds, 2),
                    "top1": record.accuracy and record.accuracy.int8.top1, "agreement": record.agreement.top1,
                    "nmse": record.agreement.nmse,
                })  # fmt: skip
                print("  ".join(map(str, cells[-1].values())), flush=True)
                args.output.write_text(json.dumps({
                    **{name: str(value) for name, value in vars(args).items() if name != "mct_python"},
                    "threads": torch.get_num_threads(), "evaluated": record.agreement.count,
                    "fp32_top1": record.accuracy and record.accuracy.fp32.top1,
                    "environment": environment().model_dump(), "cells": cells,
                }, indent=1) + "\n")  # fmt: skip
    print(table({method: steps for method, (steps, _) in methods.items()}, cells))


def by_mct(args: argparse.Namespace, steps: int, seed: int, folder: Path) -> tuple[float, str]:
    """Seconds of one run of MCT, and its images as a calibration source."""
    model = ovcalib.load_model(args.model, **about(args))
    assert model.module is not None
    numbers = (model.spec.input_shape[1], args.count, steps, seed, torch.get_num_threads())
    images = folder / "images.npz"
    (seconds,) = run_mct(args.mct_python, MCT, model.module, folder, *numbers, images)
    return seconds, f"npz:{images}"


def by_inversion(args: argparse.Namespace, steps: int, seed: int, folder: Path) -> tuple[float, str]:
    """Seconds of one run of bn-inversion, and its images as a calibration source."""
    options = {"steps": str(steps), "precision": "fp32"}
    began = time.perf_counter()
    made = ovcalib.generate("bn-inversion", args.model, args.count, seed=seed, options=options, **about(args))
    seconds = time.perf_counter() - began
    made.save(folder)
    return seconds, f"npz:{folder / 'calibration.npz'}"


def table(methods: dict[str, list[int]], cells: list[dict[str, Any]]) -> str:
    lines = [
        "| method | steps | seconds | top-1 INT8 % | agreement % | NMSE | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, all_steps in methods.items():
        for steps in all_steps:
            own = [cell for cell in cells if (cell["method"], cell["steps"]) == (method, steps)]
            columns = [spread([cell["seconds"] for cell in own], 1)]
            columns += [spread([100 * cell[name] for cell in own], 2) for name in ("top1", "agreement")]
            columns += [spread([cell["nmse"] for cell in own], 4), str(len(own))]
            lines.append(f"| {method} | {steps} | {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
