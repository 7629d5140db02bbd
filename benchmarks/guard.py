"""Validation of the guard on ResNet-20 with artificially widened channels.

    python benchmarks/guard.py --calib real:imagefolder:cifar10-jpeg/train --eval imagefolder:cifar10-jpeg/test \
        --limit 1000 -o guard.json

After the first BatchNorm layer of every block, one channel is multiplied by a factor and the next layer's weights for
it are divided by the same factor, so that the function of the network stays the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import command
import torch

import ovcalib
from ovcalib.quantization.expected_noise import expected_sqnr
from ovcalib.quantization.selection import GUARD_IMAGES

MODEL = "resnet20-cifar10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--num-samples", type=command.positive, default=40)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 30, 100, 300, 1000])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    cells = []
    for factor in args.factors:
        model = ovcalib.load_model(MODEL)
        assert model.module is not None
        widen(model.module, factor)
        for guard in (False, True):
            result = ovcalib.quantize(
                model.module, calib=args.calib, num_samples=args.num_samples, eval=args.eval, limit=args.limit,
                guard=guard, benchmark_time=0, input_shape=model.spec.input_shape,
                mean=model.spec.preprocessing.mean, std=model.spec.preprocessing.std,
            )  # fmt: skip
            images = result.calibration.inputs(last=GUARD_IMAGES)
            accuracy = result.record.accuracy
            assert accuracy is not None
            cells.append({
                "factor": factor, "guard": guard, "fp32_top1": accuracy.fp32.top1, "int8_top1": accuracy.int8.top1,
                "lowest_sqnr_db": round(expected_sqnr(result.fp32, images)[0].sqnr_db, 1),
                "guarded": result.record.quantization.guarded,
            })  # fmt: skip
            print(json.dumps(cells[-1]), flush=True)
    record = {
        "model": MODEL, "calib": args.calib, "num_samples": args.num_samples, "eval": args.eval, "limit": args.limit,
        "environment": result.record.environment.model_dump(), "cells": cells,
    }  # fmt: skip
    args.output.write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def widen(module: torch.nn.Module, factor: float) -> None:
    """Widen the most used channel inside every block, in place, without changing the function."""
    for block in module.modules():
        if hasattr(block, "bn1") and hasattr(block, "conv2"):
            weight = block.get_parameter("bn1.weight")
            channel = int(weight.abs().argmax())
            weight[channel] *= factor
            block.get_parameter("bn1.bias")[channel] *= factor
            block.get_parameter("conv2.weight")[:, channel] /= factor


if __name__ == "__main__":
    command.run(main)
