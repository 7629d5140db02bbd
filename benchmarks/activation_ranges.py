"""Whether calibration images tell which activation ranges are better on real images: extremes, or their mean.

    python benchmarks/activation_ranges.py resnet20-cifar10 --judge real:imagefolder:cifar10-jpeg/test --judged 1000 \
        --count 64 --seeds 2 --arm real:imagefolder:cifar10-jpeg/train --arm bn-inversion --arm fractal -o ranges.json

An arm is a source with its options. Both kinds of ranges are always tried, whatever the error, with weights rounded to
the nearest; the rest is the default for a machine with VNNI. Prints the error of a calibration image with the mean over
that with the extremes, with its 95 % interval, by which the default chooses; what it chooses; and the NMSE of the
judging images with either.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import command
import openvino as ov
from calibration import source_of

import ovcalib
from ovcalib.calibration.make import export_once
from ovcalib.calibration.split import Split, split
from ovcalib.measurement.environment import environment
from ovcalib.quantization import selection
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.selection import OutputError, QuantizedCandidate, RangesCompared, select_activation_ranges
from ovcalib.quantization.settings import Settings, resolve_settings
from ovcalib.records.options import QuantizationOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--input-shape", metavar="C,H,W")
    parser.add_argument("--mean", metavar="A,B,C")
    parser.add_argument("--std", metavar="A,B,C")
    parser.add_argument("--short-side", type=command.positive)
    parser.add_argument("--judge", required=True, metavar="SOURCE", help="real images that no arm calibrates with")
    parser.add_argument("--judged", type=command.positive, default=500, help="number of judging images")
    parser.add_argument("--count", type=command.positive, default=64, help="images of every arm")
    parser.add_argument("--seeds", type=command.positive, default=1)
    parser.add_argument("--arm", action="append", required=True, help='SOURCE, or "SOURCE key=value ..."')
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    selection.SUSPECT_NMSE = 0.0  # so that the mean is tried where the error is small, too
    keys = ("weights", "input_shape", "mean", "std", "short_side")
    about = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    fp32 = export_once(ovcalib.load_model(args.model, **about))
    settings = resolve_settings(QuantizationOptions(deploy_isa="vnni"), fp32)
    judge = OutputError(fp32, ovcalib.generate(args.judge, args.model, args.judged, **about).inputs())
    cells = []
    print("| calibration | seed | ratio | taken | NMSE, extremes | mean |\n|---|---|---|---|---|---|")
    for seed in range(args.seeds):
        for arm in args.arm:
            source, options = source_of(arm)
            images = ovcalib.generate(source, args.model, args.count, seed=seed, options=options, **about)
            candidates, taken, compared = both(fp32, settings, split(images))
            extremes, mean = (judge.nmse(candidate.int8) for candidate in candidates)
            cells.append({
                "arm": arm, "seed": seed, "ratio": compared.ratio, "held_out_nmse": compared.nmse, "chosen": taken,
                "judge_nmse": (extremes, mean),
            })  # fmt: skip
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*compared.ratio)
            print(f"| {arm} | {seed} | {ratio} | {taken} | {extremes:.4f} | {mean:.4f} |", flush=True)
            about_run = {key: value for key, value in vars(args).items() if key != "output"}
            record = {**about_run, "environment": environment().model_dump(), "cells": cells}
            args.output.write_text(json.dumps(record, indent=1) + "\n")


def both(
    fp32: ov.Model, settings: Settings, parts: Split
) -> tuple[tuple[QuantizedCandidate, QuantizedCandidate], str, RangesCompared]:
    """The candidates with the extremes and with their mean, the ranges that the default takes, and why."""
    output, seen = (OutputError(fp32, images.inputs()) for images in (parts.choices, parts.corrections))

    def make(settings: Settings) -> QuantizedCandidate:
        int8 = quantize_default(fp32, parts.ranges, settings, corrections=parts.corrections)
        return QuantizedCandidate(int8, settings, output)

    extremes, mean = make(settings), make(dataclasses.replace(settings, activation_ranges="mean-min-max"))
    chosen, compared = select_activation_ranges(extremes, lambda settings: mean, seen)
    assert compared is not None
    return (extremes, mean), chosen.settings.activation_ranges, compared


if __name__ == "__main__":
    command.run(main)
