"""What each bias correction is worth, on the same calibration sets.

    python benchmarks/bias_correction.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --count 128 --seeds 3 \
        --arm real:imagefolder:cifar10-jpeg/train --arm bn-inversion -o bias.json

Every arm is a calibration source, every seed a set of it; the ranges are the same for all corrections of a set. Here
`chosen` is the default of ovcalib: layerwise, or none where that is closer to FP32 on the last images of the set.
`--overflow-fix enable` gives weights half their range, as on CPUs without VNNI; `--activation-ranges` is as with
calibration.py, but nothing is chosen by the outputs, and auto is min-max. Error and agreement are those of the
evaluation images, seconds those of the whole quantization. Cells that FILE holds already are not measured again.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from calibration import add_model_options, make_set, model_recipe, spread

from ovcalib import pipeline
from ovcalib.calibration.sources import Request
from ovcalib.evaluation.classification import agreement
from ovcalib.evaluation.metrics import hits
from ovcalib.evaluation.outputs import collect
from ovcalib.measurement.environment import environment
from ovcalib.models import load_model
from ovcalib.progress import Progress
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.selection import Judge, quantize_by_outputs
from ovcalib.quantization.settings import BiasCorrection, OverflowFix
from ovcalib.runtime import OpenVINORunner

CORRECTIONS = (*get_args(BiasCorrection), "chosen")


def measure(args: argparse.Namespace) -> None:
    out = Path(args.output)
    cells: list[dict[str, Any]] = json.loads(out.read_text())["cells"] if out.exists() else []
    recipe = model_recipe(args)
    model = load_model(args.model, pipeline.model_options(recipe), print)
    with tempfile.TemporaryDirectory() as folder:
        fp32, _ = pipeline.export(model, Path(folder), Progress())
    items = pipeline.open_evaluation(recipe, args.eval, model.spec).items()
    reference = collect(OpenVINORunner(fp32), items)
    settings = replace(pipeline.resolve_settings(recipe, fp32), overflow_fix=args.overflow_fix)
    for seed in range(args.seeds):
        for arm in args.arm:
            done = {cell["correction"] for cell in cells if cell["arm"] == arm and cell["seed"] == seed}
            if done.issuperset(args.correction):
                continue
            source, *options = arm.split()
            request = Request(count=args.count, seed=seed, spec=model.spec, module=model.module)
            made, _ = make_set(source, dict(option.split("=", 1) for option in options), request, args.keep)
            for correction in (c for c in args.correction if c not in done):
                began = time.perf_counter()
                asked = replace(settings, bias_correction="layerwise" if correction == "chosen" else correction)
                quantize = functools.partial(quantize_default, fp32, made, log=io.StringIO())
                ours = {"bias_correction"} if correction == "chosen" else ()
                chosen = quantize_by_outputs(quantize, asked, ours, Judge(fp32, made))
                seconds = time.perf_counter() - began
                outputs = collect(OpenVINORunner(chosen.int8), items)
                agreed = agreement(reference, outputs, args.eval, True)
                cells.append({
                    "arm": arm, "seed": seed, "correction": correction, "came_to": chosen.settings.bias_correction,
                    "seconds": round(seconds, 1), "agreement": agreed.top1, "nmse": agreed.nmse,
                    "top1": None if outputs.labels is None else float(hits(outputs.values, outputs.labels).mean()),
                })  # fmt: skip
                print(json.dumps(cells[-1]), flush=True)
                out.write_text(json.dumps({
                    "model": args.model, "eval": args.eval, "evaluated": len(reference), "count": args.count,
                    "overflow_fix": args.overflow_fix, "activation_ranges": settings.activation_ranges,
                    "fp32_top1": None if reference.labels is None
                    else float(hits(reference.values, reference.labels).mean()),
                    "environment": environment().model_dump(), "cells": cells,
                }, indent=1) + "\n")  # fmt: skip
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
    add_model_options(parser)
    parser.add_argument("--correction", action="append", choices=CORRECTIONS, help="all, unless named")
    parser.add_argument("--overflow-fix", choices=get_args(OverflowFix), default="disable")
    args = parser.parse_args()
    args.correction = args.correction or CORRECTIONS
    measure(args)


if __name__ == "__main__":
    main()
