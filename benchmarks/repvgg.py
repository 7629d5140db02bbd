"""Why does RepVGG fall? One network in both forms, quantized in the ways that are suspected, on the CPU's own kernels
and on those of a CPU without a 32-bit INT8 dot product.

    python benchmarks/repvgg.py repvgg_a0-cifar10 --weights repvgg_a0-cifar10.safetensors \
        --calib real:imagefolder:cifar10-jpeg/train --num-samples 64 \
        --eval imagefolder:cifar10-jpeg/test --limit 2000 -o repvgg.json

`form` is the training form with three branches a block, or the re-parameterised one. `weights` have a scale for each
output channel, as NNCF gives them, or one for the whole tensor. `overflow` is NNCF's overflow fix. `avx2` is the same
IR on the kernels that oneDNN takes on AVX2, which add products in 16 bits and saturate (ONEDNN_MAX_CPU_ISA, in a
process of its own). Bias correction is left out, so that only this differs. `worst` is the lowest expected SQNR of an
operation, told before quantizing, in dB.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nncf
from nncf.quantization.advanced_parameters import QuantizationParameters

from ovcalib import api, pipeline
from ovcalib.calibration.sources import Request, generate
from ovcalib.evaluation.classification import agreement
from ovcalib.evaluation.metrics import hits
from ovcalib.evaluation.outputs import collect
from ovcalib.graph.files import read_graph, write_ir
from ovcalib.measurement.environment import environment
from ovcalib.models import load_model
from ovcalib.progress import Progress
from ovcalib.quantization.expected_noise import expected_sqnr
from ovcalib.quantization.selection import GUARD_IMAGES
from ovcalib.runtime import OpenVINORunner

FIXES = {
    "disable": nncf.OverflowFix.DISABLE,
    "first-layer": nncf.OverflowFix.FIRST_LAYER,
    "enable": nncf.OverflowFix.ENABLE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="repvgg_a0-cifar10, for example")
    parser.add_argument("--weights")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--score", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        print(json.dumps(score(args, *args.score)))
        return
    network, _, dataset = args.model.rpartition("-")
    cells = []
    with tempfile.TemporaryDirectory() as root:
        for form in ("training", "re-parameterised"):
            name = args.model if form == "training" else f"{network}_deploy-{dataset}"
            model = load_model(name, pipeline.model_options(api.make_recipe(model=name, weights=args.weights)), print)
            fp32 = Path(root, form, "fp32")
            graph, _ = pipeline.export(model, fp32, Progress())
            images = generate(
                args.calib, Request(count=args.num_samples, seed=0, spec=model.spec, module=model.module), {}
            )
            expected = expected_sqnr(graph, images.inputs(last=GUARD_IMAGES))[0]
            for per_channel in (True, False):
                for overflow, fix in FIXES.items():
                    with contextlib.redirect_stdout(io.StringIO()):
                        int8 = nncf.quantize(
                            graph.clone(),
                            nncf.Dataset([images[i] for i in range(len(images))]),
                            subset_size=len(images),
                            advanced_parameters=nncf.AdvancedQuantizationParameters(
                                overflow_fix=fix,
                                disable_bias_correction=True,
                                weights_quantization_params=QuantizationParameters(per_channel=per_channel),
                            ),
                        )
                    path = Path(root, form, f"int8-{per_channel}-{overflow}", "model.xml")
                    write_ir(int8, path)
                    cell = {
                        "form": form, "weights": "channel" if per_channel else "tensor", "overflow": overflow,
                        "worst": round(expected.sqnr_db, 1), "worst_operation": expected.name,
                        "own": score(args, fp32 / "model.xml", path), "avx2": on_avx2(fp32 / "model.xml", path),
                    }  # fmt: skip
                    print(json.dumps(cell), flush=True)
                    cells.append(cell)
    record = {
        "model": args.model, "calib": args.calib, "num_samples": args.num_samples, "eval": args.eval,
        "environment": environment().model_dump(), "cells": cells,
    }  # fmt: skip
    args.output.write_text(json.dumps(record, indent=1) + "\n")


def score(args: argparse.Namespace, fp32: Path, int8: Path) -> dict[str, float | None]:
    """Accuracy of both, and how they agree, on the kernels of this process."""
    recipe = api.make_recipe(model=str(fp32), eval=args.eval, limit=args.limit)
    model = load_model(str(fp32), pipeline.model_options(recipe), lambda text: None)
    items = pipeline.open_evaluation(recipe, args.eval, model.spec).items()
    reference, outputs = (collect(OpenVINORunner(read_graph(path)), items) for path in (fp32, int8))
    agreed = agreement(reference, outputs, args.eval, True)
    assert reference.labels is not None
    return {
        "fp32_top1": float(hits(reference.values, reference.labels).mean()),
        "top1": float(hits(outputs.values, reference.labels).mean()),
        "agreement": agreed.top1,
        "nmse": agreed.nmse,
    }


def on_avx2(fp32: Path, int8: Path) -> dict[str, float | None]:
    """The same in a process that has no AVX512; oneDNN reads the variable once, when it is loaded."""
    command = [sys.executable, *sys.argv, "--score", str(fp32), str(int8)]
    found = subprocess.run(
        command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
