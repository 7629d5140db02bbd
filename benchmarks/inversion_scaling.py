"""Time and memory of BatchNorm inversion by number of images and steps.

    python benchmarks/inversion_scaling.py resnet20-cifar10 --counts 64,512,4096 --steps 1,2,4

Each run has its own process, because peak memory is measured per process. Time should be linear in images times steps.
Memory should grow with the state of each image (pixels, two moments of the optimiser, the finished image) and the
moments of its batch, not with activations.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import command
import numpy as np

import ovcalib
from ovcalib.measurement.environment import environment


def run(args: argparse.Namespace, count: int, steps: int) -> dict[str, float]:
    """One set, in this process: CPU seconds of the generation and peak memory."""
    about = {key: getattr(args, key) for key in ("weights", "input_shape") if getattr(args, key)}
    # The first call also loads kernels and draws the palette of fractals.
    ovcalib.generate(args.source, args.model, 8, options={"steps": 1}, **about)
    began = time.process_time()
    made = ovcalib.generate(args.source, args.model, count, options={"steps": steps}, **about)
    return {
        "images": count, "steps": steps, "cpu_seconds": round(time.process_time() - began, 3),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "mib_of_images": round(np.asarray(made.images).nbytes / 2**20, 2),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, object]:
    counts, steps = ([int(part) for part in text.split(",")] for text in (args.counts, args.steps))
    pairs = [(count, steps[0]) for count in counts] + [(counts[0], more) for more in steps[1:]]
    cells = []
    for count, number in pairs:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{count},{number}"]
        cells.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(json.dumps(cells[-1]), flush=True)
    small, large = cells[0], cells[len(counts) - 1]
    extra = large["images"] - small["images"]
    # Time is a constant plus a rate: the exponent between the two largest runs is 1 if it is linear.
    before = cells[len(counts) - 2]
    exponent = np.log(large["cpu_seconds"] / before["cpu_seconds"]) / np.log(large["images"] / before["images"])
    return {
        "model": args.model, "source": args.source, "cells": cells,
        "images_memory_factor": round(
            (large["peak_mib"] - small["peak_mib"]) / (large["mib_of_images"] - small["mib_of_images"]), 2
        ),
        "kib_an_image": round(1024 * (large["peak_mib"] - small["peak_mib"]) / extra, 2),
        "time_exponent_images": round(float(exponent), 3),
        "environment": environment().model_dump(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--input-shape", metavar="C,H,W")
    parser.add_argument("--source", default="bn-inversion")
    parser.add_argument("--counts", default="64,512,4096", help="images; the first of --steps each")
    parser.add_argument("--steps", default="1,2,4", help="steps; the first of --counts each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", help="JSON file of the result")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args, *(int(part) for part in args.one.split(",")))))
        return
    text = json.dumps(measure(args), indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    command.run(main)
