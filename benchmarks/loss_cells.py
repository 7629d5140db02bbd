"""The loss of top-1 by quantization, and what can be known of it without real images: the cells of `loss_model.py`.

    python benchmarks/loss_cells.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --limit 4000 \\
        --arm real:imagefolder:cifar10-jpeg/train --arm bn-inversion --arm fractal --arm noise \\
        --bits 8 7 6 5 --seeds 1 -o loss-resnet20-cifar10.json

Every cell is one calibration set and one number of bits, simulated as in `low_bits.py` with weights rounded to the
nearest and the extremes of the images as ranges. It has the loss of top-1 on the evaluation images, and on each probe
(the held-out images of the calibration set, fractals, noise) the errors that `ovcalib quantize` computes. Finished
cells are kept in the output file.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import command
from calibration import source_of
from low_bits import add_arms, int8_of, opened, quantized
from settings import about

import ovcalib
from ovcalib.calibration.probe import probe_inputs
from ovcalib.calibration.split import split
from ovcalib.evaluation.metrics import hits, nmse, same_class
from ovcalib.evaluation.predicted_loss import probe_error
from ovcalib.kernels import without_saturation
from ovcalib.measurement.environment import environment
from ovcalib.quantization.low_bits import Bits
from ovcalib.runtime import outputs_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arms(parser)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 7, 6, 5])
    args = parser.parse_args()
    given = about(args)
    cells = json.loads(args.output.read_text())["cells"] if args.output.exists() else []
    done = {(cell["arm"], cell["seed"], cell["bits"]) for cell in cells}
    spec, fp32, inputs, labels = opened(args)
    reference = outputs_of(fp32, inputs)
    right = hits(reference, labels)
    probes = {source: probe_inputs(spec, source) for source in ("fractal", "noise")}
    for seed in range(args.seeds):
        for arm in args.arm:
            wanted = [bits for bits in args.bits if (arm, seed, bits) not in done]
            if not wanted:
                continue
            source, options = source_of(arm)
            made = ovcalib.generate(source, args.model, args.count, seed=seed, options=options, **given)
            seen = {"held-out": split(made).choices.inputs(), **probes}
            expected = {name: outputs_of(fp32, images) for name, images in seen.items()}
            int8 = int8_of(fp32, made)
            for bits in wanted:
                kind = Bits(bits, bits, "academic", "extremes")
                graph = without_saturation(quantized(fp32, int8, made, kind, "nearest"))
                found = outputs_of(graph, inputs)
                cells.append({
                    "arm": arm, "seed": seed, "bits": bits,
                    "loss_points": 100 * float(right.mean() - hits(found, labels).mean()),
                    "score": made.provenance.score and made.provenance.score.model_dump(),
                    "agreement": float(same_class(reference, found).mean()), "nmse": nmse(reference, found),
                    "probes": {
                        name: probe_error(name, expected[name], outputs_of(graph, images)).model_dump()
                        for name, images in seen.items()
                    },
                })  # fmt: skip
                shown: dict[str, Any] = {name: round(probe["nmse"], 5) for name, probe in cells[-1]["probes"].items()}
                print(
                    arm, seed, bits, round(cells[-1]["loss_points"], 2), round(cells[-1]["nmse"], 5), shown, flush=True
                )
                args.output.write_text(json.dumps({
                    **{name: str(value) for name, value in vars(args).items()}, "fp32_top1": float(right.mean()),
                    "evaluated": len(inputs), "environment": environment().model_dump(), "cells": cells,
                }, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    command.run(main)
