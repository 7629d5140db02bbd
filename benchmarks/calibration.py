"""Compare calibration sources on one model: what does INT8 lose with each, and does the score without data foresee it?

    python benchmarks/calibration.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --count 128 --seeds 3 \
        --arm real:imagefolder:cifar10-jpeg/train --arm fractal --arm noise --arm bn-inversion --arm "dgh output=none" \
        -o benchmarks/results/calibration-resnet20.json

An arm is a source with its options. All arms have the same number of images to make, the same evaluation images and
the same settings: deployment on vnni, the instruction set of the machine of the committed results, else the default's
unless `--activation-ranges` or `--bias-correction` name others (`bias_correction.py` compares the latter). Finished
cells are kept in the output file, and a run that is started again goes on after them. Agreement is with FP32; NMSE is
the squared error of the logits over the squared logits of FP32. Rank correlations over all cells tell how each part of
the score orders them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.stats import spearmanr

from ovcalib import api, pipeline
from ovcalib.calibration.score import score_set
from ovcalib.calibration.sets import CalibrationSet, read_set
from ovcalib.calibration.sources import Request, generate
from ovcalib.evaluation.classification import accuracy, agreement
from ovcalib.evaluation.outputs import collect
from ovcalib.measurement.environment import environment
from ovcalib.models import load_model
from ovcalib.progress import Progress
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.selection import Judge, quantize_by_outputs
from ovcalib.quantization.settings import ActivationRanges, BiasCorrection
from ovcalib.records.recipe import Recipe
from ovcalib.runtime import OpenVINORunner

SCORES = ("bn_distance", "range_coverage", "diversity", "output_range_distance")


def measure(args: argparse.Namespace) -> None:
    out = Path(args.output)
    cells: list[dict[str, Any]] = json.loads(out.read_text())["cells"] if out.exists() else []
    recipe = model_recipe(args, bias_correction=args.bias_correction)
    model = load_model(args.model, pipeline.model_options(recipe), print)
    with tempfile.TemporaryDirectory() as folder:
        fp32, _ = pipeline.export(model, Path(folder), Progress())
    evaluation = pipeline.open_evaluation(recipe, args.eval, model.spec)
    items = evaluation.items()
    reference = collect(OpenVINORunner(fp32), items)
    baseline = accuracy(reference.values, reference.labels).top1 if reference.labels is not None else None
    settings = pipeline.resolve_settings(recipe, fp32)
    for seed in range(args.seeds):
        for arm in args.arm:
            if any(cell["arm"] == arm and cell["seed"] == seed for cell in cells):
                continue
            source, *options = arm.split()
            request = Request(count=args.count, seed=seed, spec=model.spec, module=model.module)
            made, cpu_seconds = make_set(source, dict(option.split("=", 1) for option in options), request, args.keep)
            quantize = functools.partial(quantize_default, fp32, made, log=io.StringIO())
            chosen = quantize_by_outputs(quantize, settings, pipeline.left_open(recipe, settings), Judge(fp32, made))
            outputs = collect(OpenVINORunner(chosen.int8), items)
            agreed = agreement(reference, outputs, args.eval, True)
            score = score_set(model.module, made, model.spec.name) if model.module is not None else None
            cells.append({
                "arm": arm, "seed": seed,
                "seconds": round(made.provenance.seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
                "top1": accuracy(outputs.values, outputs.labels).top1 if outputs.labels is not None else None,
                "agreement": agreed.top1, "nmse": agreed.nmse, "activation_ranges": chosen.settings.activation_ranges,
                "bias_correction": chosen.settings.bias_correction,
                **(score.model_dump() if score else {}),
            })  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
            out.write_text(json.dumps({
                "model": args.model, "eval": args.eval, "evaluated": len(reference), "count": args.count,
                "activation_ranges": recipe.activation_ranges, "bias_correction": recipe.bias_correction,
                "fp32_top1": baseline,
                "environment": environment().model_dump(), "torch_threads": os.environ.get("OMP_NUM_THREADS"),
                "cells": cells,
            }, indent=1) + "\n")  # fmt: skip
    print(table(args.arm, cells, baseline))


def make_set(source: str, options: dict[str, str], request: Request, keep: str | None) -> tuple[CalibrationSet, float]:
    """A calibration set and the CPU seconds that it took; from `keep`, where an earlier run left it."""
    key = json.dumps([source, options, request.count, request.seed, request.spec.name])
    folder = Path(keep, hashlib.sha256(key.encode()).hexdigest()[:16]) if keep else None
    if folder and (folder / "cpu_seconds.json").is_file():  # written last
        return read_set(folder), json.loads((folder / "cpu_seconds.json").read_text())
    began = time.process_time()
    made = generate(source, request, options)
    cpu_seconds = time.process_time() - began
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        made.save(folder)
        (folder / "cpu_seconds.json").write_text(json.dumps(cpu_seconds))
    return made, cpu_seconds


def table(arms: Iterable[str], cells: list[dict[str, Any]], baseline: float | None) -> str:
    """Mean and, over seeds, the standard deviation."""
    lines = [
        f"FP32 top-1 {'-' if baseline is None else f'{100 * baseline:.2f} %'}", "",
        "| calibration | top-1 INT8 % | agreement % | NMSE | CPU s | seeds |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in arms:
        own = [cell for cell in cells if cell["arm"] == arm]
        if own:
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks that compare calibration sets have in common."""
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--input-shape", type=lambda text: tuple(map(int, text.split(","))), metavar="C,H,W")
    parser.add_argument("--mean", type=lambda text: tuple(map(float, text.split(","))), metavar="A,B,C")
    parser.add_argument("--std", type=lambda text: tuple(map(float, text.split(","))), metavar="A,B,C")
    parser.add_argument("--eval", required=True, help="data reference of the evaluation images")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--count", type=int, default=128, help="images of every arm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arm", action="append", required=True, help='SOURCE, or "SOURCE key=value key=value"')
    parser.add_argument("--activation-ranges", default="auto", choices=("auto", *get_args(ActivationRanges)))
    parser.add_argument("--keep", help="folder of the sets, so that a run with other settings does not make them again")
    parser.add_argument("-o", "--output", required=True)


def model_recipe(args: argparse.Namespace, **more: Any) -> Recipe:
    given = "weights", "input_shape", "mean", "std", "activation_ranges"
    fields = {key: getattr(args, key) for key in given if getattr(args, key)}
    return api.make_recipe(model=args.model, eval=args.eval, limit=args.limit, deploy_isa="vnni", **fields, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--bias-correction", default="auto", choices=("auto", *get_args(BiasCorrection)))
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
