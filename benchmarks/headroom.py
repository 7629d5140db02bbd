"""Output error of INT8 by the headroom of single channels, whose ranges the inputs of depthwise convolutions have.

    python benchmarks/headroom.py efficientnet_lite:lite0 --input-shape 3,224,224 --mean 0.485,0.456,0.406 \\
        --std 0.229,0.224,0.225 --calib bn-inversion --count 64 --data imagefolder:imagenet-1k-samples \\
        --skip 500 --limit 200 -o headroom.json

The images are those that `--eval DATA --limit SKIP` leaves out, so that a factor is not chosen on evaluation images.
Weights are rounded to the nearest level of the full range, biases corrected layerwise; sums do not saturate.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import command
from settings import about, add_model, numbers, save

import ovcalib
from ovcalib.calibration.make import export_once
from ovcalib.calibration.split import split
from ovcalib.evaluation.dataset import open_dataset
from ovcalib.evaluation.metrics import nmse
from ovcalib.kernels import without_saturation
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import outputs_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--data", required=True)
    parser.add_argument("--skip", type=int, default=500)
    parser.add_argument("--limit", type=command.positive, default=200)
    parser.add_argument("--factors", type=numbers, default=(1.0, 1.25, 1.5, 2.0, 3.0))
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    given = about(args)
    model = ovcalib.load_model(args.model, **given)
    fp32 = export_once(model)
    parts = split(ovcalib.generate(args.calib, args.model, args.count, **given))
    data = open_dataset(args.data, model.spec, args.skip + args.limit)
    unused = dataclasses.replace(data, order=list(data.order)[args.skip :])
    inputs = [item.input for item in unused.images().items]
    reference = outputs_of(fp32, inputs)
    cells = []
    for ranges in ("min-max", "mean-min-max"):
        for factor in args.factors:
            settings = Settings(overflow_fix="disable", activation_ranges=ranges, channel_headroom=factor)
            int8 = quantize_default(fp32, parts.ranges, settings, corrections=parts.corrections)
            error = nmse(reference, outputs_of(without_saturation(int8), inputs))
            cells.append({"activation_ranges": ranges, "channel_headroom": factor, "nmse": error})
            print(f"{ranges}  {factor:g}  {error:.4f}", flush=True)
    save(args, cells=cells)


if __name__ == "__main__":
    command.run(main)
