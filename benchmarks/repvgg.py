"""Accuracy loss of RepVGG under INT8, by form, weight scales and overflow fix.

    python benchmarks/repvgg.py repvgg_a0-cifar10 --weights repvgg_a0-cifar10.safetensors \
        --calib real:imagefolder:cifar10-jpeg/train --num-samples 64 \
        --eval imagefolder:cifar10-jpeg/test --limit 2000 -o repvgg.json

`form` is the training form with three branches per block, or the re-parameterised one. `weights` have one scale per
output channel, which is NNCF's default, or one for the whole tensor. `overflow` is NNCF's overflow fix. `vnni` is the
INT8 model on a CPU with VNNI; `avx2` is the same model on the kernels that oneDNN selects for AVX2, which add products
in 16 bits and saturate. Each is emulated if this CPU does not have it. There is no bias correction.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import command
import nncf
import numpy as np
import openvino as ov
from nncf.quantization.advanced_parameters import QuantizationParameters

import ovcalib
from ovcalib.kernels import outputs_on
from ovcalib.measurement.environment import environment

FIXES = {
    "disable": nncf.OverflowFix.DISABLE,
    "first-layer": nncf.OverflowFix.FIRST_LAYER,
    "enable": nncf.OverflowFix.ENABLE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="for example repvgg_a0-cifar10")
    parser.add_argument("--weights")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--num-samples", type=command.positive, default=64)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive, default=1000, help="evaluation images, chosen class by class")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    network, _, dataset = args.model.rpartition("-")
    cells = []
    for form in ("training", "re-parameterised"):
        name = args.model if form == "training" else f"{network}_deploy-{dataset}"
        with tempfile.TemporaryDirectory() as folder:
            ovcalib.convert(name, Path(folder, "fp32"), weights=args.weights, to=["ir"])
            graph = ov.Core().read_model(Path(folder, "fp32", "model.xml"))
            images = ovcalib.generate(args.calib, name, args.num_samples, weights=args.weights)
            evaluation = ovcalib.generate(f"real:{args.eval}", name, args.limit, weights=args.weights)
            reference = outputs_on("vnni", graph, evaluation)
            for per_channel in (True, False):
                for overflow, fix in FIXES.items():
                    with contextlib.redirect_stdout(io.StringIO()):
                        int8 = nncf.quantize(
                            graph.clone(),
                            nncf.Dataset(list(images)),
                            subset_size=len(images),
                            advanced_parameters=nncf.AdvancedQuantizationParameters(
                                overflow_fix=fix,
                                disable_bias_correction=True,
                                weights_quantization_params=QuantizationParameters(per_channel=per_channel),
                            ),
                        )
                    cells.append({
                        "form": form, "weights": "channel" if per_channel else "tensor", "overflow": overflow,
                        "vnni": score(reference, outputs_on("vnni", int8, evaluation), evaluation.labels),
                        "avx2": score(reference, outputs_on("avx2", int8, evaluation), evaluation.labels),
                    })  # fmt: skip
                    print(json.dumps(cells[-1]), flush=True)
    record = {
        "model": args.model, "calib": args.calib, "num_samples": args.num_samples, "eval": args.eval,
        "limit": args.limit, "environment": environment().model_dump(), "cells": cells,
    }  # fmt: skip
    args.output.write_text(json.dumps(record, indent=1) + "\n")


def score(reference: np.ndarray, outputs: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """Accuracy of both, their agreement, and the NMSE of the logits.

    reference, outputs   logits of FP32 and INT8, float32 [N, K]
    """
    assert labels is not None, "the evaluation images have no labels of this model"
    return {
        "fp32_top1": float((reference.argmax(1) == labels).mean()),
        "top1": float((outputs.argmax(1) == labels).mean()),
        "agreement": float((outputs.argmax(1) == reference.argmax(1)).mean()),
        "nmse": float(((outputs - reference) ** 2).sum() / (reference**2).sum()),
    }


if __name__ == "__main__":
    command.run(main)
