"""Error of simulated low-bit quantization by calibration source.

    python benchmarks/low_bits.py resnet20-cifar10 --eval imagefolder:cifar10-jpeg/test --limit 2000 --count 64 \\
        --arm real:imagefolder:cifar10-jpeg/train --arm bn-inversion --arm fractal --arm noise --seeds 3 \\
        --bits 6/6 4/4 --rounding nearest compensated -o low-bits.json

Bits are WEIGHTS/ACTIVATIONS. Ranges of weights and activations have the least squared error (`--ranges`); `--edges
academic` leaves the first and the last layer at 8 bits, `full` quantizes them and the outputs too. `nearest` rounds
each weight to the nearest level and corrects biases layer by layer; `per-tensor` does so with one scale for a layer's
weights, and `dfq` equalizes the network before that (Nagel et al. 2019); `adaround` learns whether to round up or down
(ovcalib.quantization.adaround), and `brecq` learns it block by block, and ranges too
(ovcalib.quantization.reconstruction); `compensated` rounds by ovcalib.quantization.rounding, and `finetuned` goes on
from there by ovcalib.quantization.finetuning. `gdfq-finetuned` and `intraq-finetuned` learn classes and logits instead,
from FP32's weights on (ovcalib.quantization.published_finetuning). `{seed}` in an arm is the seed, for sets that were
made before. All arms have the same number of images. Prints top-1, agreement with FP32 and the NMSE of the outputs, as
mean ± standard deviation over seeds; finished cells are kept in the output file.
Graphs compute in float32 with values on the low-bit grids, on any CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import command
import numpy as np
from calibration import source_of, spread
from numpy.typing import NDArray
from settings import about, add_model

import ovcalib
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.split import split
from ovcalib.evaluation.dataset import open_dataset
from ovcalib.evaluation.metrics import hits, nmse, same_class
from ovcalib.export.convert import export
from ovcalib.kernels import without_saturation
from ovcalib.measurement.environment import environment
from ovcalib.progress import Progress
from ovcalib.quantization.adaround import choose_adaround
from ovcalib.quantization.equalization import equalize
from ovcalib.quantization.finetuning import BY_LAYER, finetune
from ovcalib.quantization.low_bits import Bits, simulate
from ovcalib.quantization.nncf_backend import fit_weights, quantize_default
from ovcalib.quantization.published_finetuning import GDFQ, INTRAQ
from ovcalib.quantization.reconstruction import Schedule, reconstruct
from ovcalib.quantization.rounding import compensated
from ovcalib.quantization.settings import Settings
from ovcalib.records.model import ModelSpec
from ovcalib.records.options import QuantizationOptions
from ovcalib.runtime import outputs_of

KEY = ("arm", "seed", "bits", "edges", "rounding")
STEPS = QuantizationOptions().finetune_steps
RECIPES = {"finetuned": BY_LAYER, "gdfq-finetuned": GDFQ, "intraq-finetuned": INTRAQ}
ROUNDINGS = ("nearest", "per-tensor", "dfq", "adaround", "brecq", "compensated", *RECIPES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arms(parser)
    parser.add_argument("--bits", nargs="+", type=weights_and_activations, default=["4/4"], metavar="W/A")
    parser.add_argument("--edges", nargs="+", choices=["academic", "full"], default=["academic"])
    parser.add_argument("--ranges", choices=["extremes", "mse", "power-of-two"], default="mse")
    parser.add_argument("--rounding", nargs="+", choices=ROUNDINGS, default=["nearest"])
    parser.add_argument("--finetune-steps", type=command.positive, default=STEPS)
    parser.add_argument(
        "--brecq-steps", type=command.positive, default=Schedule().weight_steps, help="of the weights of each block"
    )
    parser.add_argument(
        "--brecq-batch", type=command.positive, default=Schedule().batch, help="images of one of these steps"
    )
    args = parser.parse_args()
    given, brecq = about(args), Schedule.shortened(args.brecq_steps, args.brecq_batch)
    cells = json.loads(args.output.read_text())["cells"] if args.output.exists() else []
    done = {tuple(cell[name] for name in KEY) for cell in cells}
    _, fp32, inputs, labels = opened(args)
    reference = outputs_of(fp32, inputs)
    top1 = float(hits(reference, labels).mean())
    print(f"FP32 top-1 {100 * top1:.2f} %")
    for seed in range(args.seeds):
        for arm in args.arm:
            settings = itertools.product(args.bits, args.edges, args.rounding)
            wanted = [cell for setting in settings if (cell := (arm, seed, *setting)) not in done]
            if not wanted:
                continue
            source, options = source_of(arm.replace("{seed}", str(seed)))
            made = ovcalib.generate(source, args.model, args.count, seed=seed, options=options, **given)
            int8 = int8_of(fp32, made)
            for _, _, bits, edges, rounding in wanted:
                weights, activations = map(int, bits.split("/"))
                grid = Bits(weights, activations, edges, args.ranges)
                graph = quantized(fp32, int8, made, grid, rounding, args.finetune_steps, brecq)
                found = outputs_of(without_saturation(graph), inputs)
                cells.append({
                    "arm": arm, "seed": seed, "bits": bits, "edges": edges, "rounding": rounding,
                    "top1": float(hits(found, labels).mean()),
                    "agreement": float(same_class(reference, found).mean()), "nmse": nmse(reference, found),
                })  # fmt: skip
                print("  ".join(str(value) for value in cells[-1].values()), flush=True)
            args.output.write_text(json.dumps({
                **{name: str(value) for name, value in vars(args).items()}, "fp32_top1": top1,
                "evaluated": len(inputs), "environment": environment().model_dump(), "cells": cells,
            }, indent=1) + "\n")  # fmt: skip
    print(table(args, cells))


def add_arms(parser: argparse.ArgumentParser) -> None:
    """The model, the evaluation images, the calibration sets to compare, and where finished cells are kept."""
    add_model(parser)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--limit", type=command.positive)
    parser.add_argument("--count", type=command.positive, default=64)
    parser.add_argument("--arm", action="append", required=True, help='SOURCE, or "SOURCE key=value ..."')
    parser.add_argument("--seeds", type=command.positive, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)


def weights_and_activations(text: str) -> str:
    """The type of `--bits`."""
    try:
        weights, activations = map(int, text.split("/"))
        Bits(weights, activations)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no WEIGHTS/ACTIVATIONS of 2 to 8 bits each, as 4/4") from None
    return text


def opened(args: argparse.Namespace) -> tuple[ModelSpec, Any, list[NDArray[np.float32]], NDArray[np.int64]]:
    """The model and its float graph, and inputs and labels of the evaluation images."""
    model = ovcalib.load_model(args.model, **about(args))
    with tempfile.TemporaryDirectory() as folder:
        fp32 = export(model, Path(folder), Progress()).graph
    items = open_dataset(args.eval, model.spec, args.limit).images().items
    return model.spec, fp32, [item.input for item in items], np.array([item.label for item in items])


def int8_of(fp32: Any, made: CalibrationSet) -> Any:
    """The graph of 8 bits that the simulated graphs of a calibration set are derived from."""
    return quantize_default(fp32, split(made).ranges, Settings(overflow_fix="disable", bias_correction="none"))


def quantized(
    fp32: Any, int8: Any, made: CalibrationSet, bits: Bits, rounding: str, finetune_steps: int = STEPS,
    brecq: Schedule | None = None,
) -> Any:  # fmt: skip
    """The simulated graph of one cell."""
    if rounding == "dfq":
        fp32, _ = equalize(fp32)
        int8 = int8_of(fp32, made)
    if rounding in ("per-tensor", "dfq"):
        bits = dataclasses.replace(bits, scales="tensor")
    parts = split(made)
    graph = simulate(fp32, int8, bits, parts.ranges.inputs())
    if rounding in ("nearest", "per-tensor", "dfq"):
        return fit_weights(fp32, graph, Settings(), parts.corrections)
    if rounding == "adaround":
        return compensated(fp32, [graph], parts.corrections.inputs(), choose_adaround)[0]
    if rounding == "brecq":
        return reconstruct(fp32, graph, made.inputs(), brecq)
    if rounding in ("compensated", "finetuned"):
        graph = fit_weights(fp32, graph, Settings(rounding="compensated"), parts.corrections)
    if rounding == "compensated":
        return graph
    return finetune(fp32, graph, parts.ranges.inputs(), finetune_steps, recipe=RECIPES[rounding])[0]


def table(args: argparse.Namespace, cells: list[dict[str, Any]]) -> str:
    lines = [
        "| bits | edges | rounding | calibration | top-1 % | agreement % | NMSE | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for *setting, arm in itertools.product(args.bits, args.edges, args.rounding, args.arm):
        own = [c for c in cells if [c["bits"], c["edges"], c["rounding"], c["arm"]] == [*setting, arm]]
        columns = [spread([100 * c[k] for c in own], 2) for k in ("top1", "agreement")]
        columns += [spread([c["nmse"] for c in own], 4), str(len(own))]
        lines.append(f"| {' | '.join([*setting, arm, *columns])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
