"""What does one step of BatchNorm inversion cost, beside the network itself and beside other implementations?

    python benchmarks/inversion_speed.py resnet20-cifar10 --images 128
    python benchmarks/inversion_speed.py my_module:factory --input-shape 3,224,224 --images 16 \
        --mct-python ../mct/bin/python

Loops over the same images in turns, A B C D A B C D ..., medians and their ratios:

    network   one forward pass and one backward pass to the pixels, nothing else: the floor
    ours      a step of ovcalib's engine (whole-set statistics, RAdam, as dgh without its pictures and output loss), in
              the precision that it chooses for this CPU; where that is bfloat16, ours-fp32 stands beside it
    hooks     what everybody writes first: forward hooks that keep x.mean and x.var of every BatchNorm input, Adam
    mct       a step of `pytorch_data_generation_experimental` of Sony's model-compression-toolkit, where --mct-python
              names the interpreter of an environment that has it; the model is passed as a pickled module

The time of a step of `mct` is that of `steps` iterations over that of one, so that its set-up does not count. With
--mct-images its pictures are kept, for benchmarks/calibration.py (`--arm npz:FILE`) to say what they are worth.
--race N times bn-inversion with N steps, from the first fractal to the last image, beside all of MCT's steps, each
after a run that warms up; calibration.py says what the images are worth (`--arm "bn-inversion steps=N"`, as many).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ovcalib import api
from ovcalib.calibration.bfloat16 import bfloat16_is_fast
from ovcalib.calibration.bn_taps import find_layers, large_blocks_kept, tapped
from ovcalib.calibration.dgh import Options
from ovcalib.calibration.inversion import Run, swinging
from ovcalib.calibration.inversion_options import resolve
from ovcalib.calibration.sources import Request, generate
from ovcalib.measurement.environment import environment
from ovcalib.models import load_model
from ovcalib.pipeline import model_options

MCT = """
import sys, time, numpy, torch
import model_compression_toolkit as mct
model = torch.load(sys.argv[1], weights_only=False).eval()
size, images, steps = (int(v) for v in sys.argv[2:5])
torch.set_num_threads(int(sys.argv[5]))
def run(n):
    config = mct.data_generation.get_pytorch_data_generation_config(
        n_iter=n, data_gen_batch_size=images, optimizer=torch.optim.RAdam)
    began = time.perf_counter()
    made = mct.data_generation.pytorch_data_generation_experimental(
        model=model, n_images=images, output_image_size=(size, size), data_generation_config=config)
    return time.perf_counter() - began, torch.cat(list(made)).numpy()
run(1)
(one, _), (many, made) = run(1), run(1 + steps)
numpy.savez(sys.argv[6], images=made)
print((many - one) / steps, many)
"""


def network_step(module: nn.Module, images: Tensor) -> Callable[[], None]:
    def step() -> None:
        x = images.detach().requires_grad_()
        torch.autograd.grad(module(x).sum(), x)

    return step


def hooks_step(module: nn.Module, images: Tensor) -> Callable[[], None]:
    leaf = images.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], 0.1)

    def step() -> None:
        found: list[tuple[nn.BatchNorm2d, Tensor]] = []
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        hooks = [m.register_forward_hook(lambda m, inputs, _: found.append((m, inputs[0]))) for m in norms]
        module(leaf)
        for hook in hooks:
            hook.remove()
        loss = sum(
            (x.mean((0, 2, 3)) - m.running_mean).square().mean() + (x.var((0, 2, 3)) - m.running_var).square().mean()
            for m, x in found
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(args: argparse.Namespace) -> dict[str, object]:
    fields = {key: getattr(args, key) for key in ("weights", "input_shape") if getattr(args, key)}
    model = load_model(args.model, model_options(api.make_recipe(model=args.model, **fields)), print)
    assert model.module is not None
    module = model.module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    spec = model.spec
    options = resolve(
        Options(pipeline="none", output="none", clip=False, extra_pixels=0, batch=args.images, steps=10**6, rate=1.0),
        min(spec.input_shape[1:]),
    )
    images = torch.randn(args.images, *spec.input_shape).contiguous(memory_format=torch.channels_last)
    layers = find_layers(module, spec.name)
    fast = bfloat16_is_fast(torch.device("cpu"))
    precision = {"ours": "bf16", "ours-fp32": "fp32"} if fast else {"ours": "fp32"}
    times: dict[str, list[float]] = {name: [] for name in ("network", *precision, "hooks")}
    plain = {"network": network_step(module, images), "hooks": hooks_step(module, images)}
    request = Request(count=args.images, seed=0, spec=spec, module=module)
    with tapped(layers) as taps, swinging(module, False) as swing:
        run = Run(request, options, module, layers, taps, swing, None, torch.device("cpu"))
        run.open(0)
        with torch.no_grad():
            run.measure(run.final(run.batches[0].images))
            run.statistics.put(0, taps.moments)
        recording = {layer.name: layer.module.__dict__.pop("forward") for layer in layers}
        for turn in range(args.turns + 1):  # the first is warm-up
            for name in times:
                for layer in layers if name in precision else ():
                    layer.module.forward = recording[layer.name]
                run.options = dataclasses.replace(options, precision=precision.get(name, "auto"))
                # Keeping freed memory is part of our engine, and would speed the others up too.
                with large_blocks_kept() if name in precision else nullcontext():
                    began = time.perf_counter()
                    for _ in range(args.steps):
                        run.advance(0, 0) if name in precision else plain[name]()
                    seconds = (time.perf_counter() - began) / args.steps
                if turn:
                    times[name].append(seconds)
                for layer in layers:
                    layer.module.__dict__.pop("forward", None)
    result: dict[str, float] = {name: float(np.median(values)) for name, values in times.items()}
    if args.mct_python:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(module.to(memory_format=torch.contiguous_format), Path(folder) / "model.pt")
            command = [
                args.mct_python, "-c", MCT, str(Path(folder) / "model.pt"), str(spec.input_shape[1]), str(args.images),
                str(args.mct_steps), str(torch.get_num_threads()), args.mct_images or str(Path(folder) / "images.npz"),
            ]  # fmt: skip
            found = subprocess.run(command, capture_output=True, text=True)
            if found.returncode:
                raise SystemExit(f"mct failed:\n{found.stderr[-2000:]}")
            result["mct"], mct_seconds = (float(word) for word in found.stdout.split()[-2:])
    race = {steps: whole_run(request, steps) for steps in args.race}
    return {
        "model": spec.name, "images": args.images, "threads": torch.get_num_threads(), "precision": precision,
        "seconds_a_step": {name: round(value, 4) for name, value in result.items()},
        "over_network": {name: round(value / result["network"], 2) for name, value in result.items()},
        "over_ours": {name: round(value / result["ours"], 2) for name, value in result.items()},
        "mct": {"steps": args.mct_steps + 1, "seconds": round(mct_seconds, 1)} if args.mct_python else None,
        "race": {f"bn-inversion steps={steps}": round(seconds, 2) for steps, seconds in race.items()},
        "environment": environment().model_dump(),
    }  # fmt: skip


def whole_run(request: Request, steps: int) -> float:
    """Seconds of making all images; the first time warms up."""
    for _ in range(2):
        began = time.perf_counter()
        generate("bn-inversion", request, {"steps": str(steps)})
        seconds = time.perf_counter() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--input-shape", type=lambda text: tuple(map(int, text.split(","))), metavar="C,H,W")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--mct-python", help="interpreter with model-compression-toolkit")
    parser.add_argument("--mct-steps", type=int, default=5)
    parser.add_argument("--mct-images", help="npz file for the images that mct makes")
    parser.add_argument("--race", type=int, action="append", default=[], metavar="STEPS", help="repeatable")
    parser.add_argument("-o", "--output", help="JSON file of the result")
    args = parser.parse_args()
    result = measure(args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
