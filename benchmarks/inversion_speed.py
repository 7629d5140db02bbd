"""Time of one step of BatchNorm inversion, compared with the network alone and with other implementations.

    python benchmarks/inversion_speed.py resnet20-cifar10 --images 128
    python benchmarks/inversion_speed.py my_module:factory --input-shape 3,224,224 --images 16 \
        --mct-python ../mct/bin/python

Measured in turns (A B C D A B C D ...); medians and their ratios:

    network   one forward pass and one backward pass to the pixels
    kept      the same, and the process keeps freed memory as ovcalib's does: the lower bound
    ours      a step of ovcalib's engine (whole-set statistics, RAdam, as dgh without image pipeline and output loss)
              in the precision that it selects for this CPU, and as ours-fp32 in float32, as ours-bf16 in bfloat16 on
              a CPU that has it
    hooks     the plain implementation: forward hooks that keep x.mean and x.var of every BatchNorm input, Adam
    mct       a step of `pytorch_data_generation_experimental` of Sony's model-compression-toolkit, if --mct-python
              names the interpreter of an environment that has it; the model is passed as a pickled module

`network`, `kept` and `hooks` have a process each, so that none profits from memory that another one left. The time of a
step of `ours` and of `mct` is the difference between a run with more steps and a run with one step, so that set-up is
not counted. --mct-images keeps the images of MCT for benchmarks/calibration.py (`--arm npz:FILE`).
--race N times a whole run of bn-inversion with N steps, after a warm-up run, to compare with all of MCT's steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import command
import numpy as np
import torch
from torch import Tensor, nn

import ovcalib
from ovcalib import machine
from ovcalib.calibration.bn_taps import large_blocks_kept
from ovcalib.measurement.environment import environment

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
        loss = torch.zeros(())
        for m, x in found:
            assert m.running_mean is not None
            assert m.running_var is not None
            loss = loss + (x.mean((0, 2, 3)) - m.running_mean).square().mean()
            loss = loss + (x.var((0, 2, 3)) - m.running_var).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


@cache
def plain_step(name: str, model: str, about: tuple[tuple[str, Any], ...], count: int) -> tuple[Callable[[], None], Any]:
    """What one of the ways without ovcalib repeats, and the setting of memory that it runs in."""
    loaded = ovcalib.load_model(model, **dict(about))
    assert loaded.module is not None
    shape = loaded.spec.input_shape
    module = loaded.module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.randn(count, *shape).contiguous(memory_format=torch.channels_last)
    step = (hooks_step if name == "hooks" else network_step)(module, images)
    return step, (lambda: large_blocks_kept(shape)) if name == "kept" else nullcontext


def plain_seconds(args: argparse.Namespace, name: str) -> float:
    """Seconds of a step of one of the ways without ovcalib, in this process."""
    step, memory = plain_step(name, args.model, tuple(args.about.items()), args.images)
    with memory():
        step()
        began = time.perf_counter()
        for _ in range(args.steps):
            step()
        return (time.perf_counter() - began) / int(args.steps)


def engine_seconds(args: argparse.Namespace, precision: str) -> float:
    """Seconds of a step of ovcalib's engine."""
    options = {"pipeline": "none", "output": "none", "clip": False, "batch": args.images, "precision": precision}
    few, many = (whole_run(args, "dgh", {**options, "steps": steps}) for steps in (1, 1 + args.steps))
    return (many - few) / int(args.steps)


def whole_run(args: argparse.Namespace, source: str, options: dict[str, object]) -> float:
    """Seconds of making all images."""
    began = time.perf_counter()
    ovcalib.generate(source, args.model, args.images, options=options, **args.about)
    return time.perf_counter() - began


def run_mct(python: str, script: str, module: nn.Module, folder: Path, *words: object) -> list[float]:
    """The numbers that a script prints last, in the environment of MCT; its first argument is the pickled module."""
    torch.save(module.requires_grad_(False), folder / "model.pt")
    found = subprocess.run(
        [python, "-c", script, str(folder / "model.pt"), *map(str, words)], capture_output=True, text=True
    )
    if found.returncode:
        raise SystemExit(f"mct failed:\n{found.stderr[-2000:]}")
    return [float(word) for word in found.stdout.splitlines()[-1].split()]


def measure(args: argparse.Namespace) -> dict[str, object]:
    with ExitStack() as stack:

        def apart(name: str) -> Callable[[], float]:
            pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            return lambda: pool.submit(plain_seconds, args, name).result()

        ways = {name: apart(name) for name in ("network", "kept", "hooks")}
        ways |= {"ours": lambda: engine_seconds(args, "auto"), "ours-fp32": lambda: engine_seconds(args, "fp32")}
        if machine.has_bfloat16():
            ways["ours-bf16"] = lambda: engine_seconds(args, "bf16")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.turns + 1):  # the first is warm-up
            for name, way in ways.items():
                seconds = way()
                if turn:
                    times[name].append(seconds)
    result = {name: float(np.median(values)) for name, values in times.items()}
    model = ovcalib.load_model(args.model, **args.about)
    assert model.module is not None
    if args.mct_python:
        with tempfile.TemporaryDirectory() as folder:
            numbers = (model.spec.input_shape[1], args.images, args.mct_steps, torch.get_num_threads())
            images = args.mct_images or Path(folder) / "images.npz"
            result["mct"], mct_seconds = run_mct(args.mct_python, MCT, model.module, Path(folder), *numbers, images)
    race = {steps: [whole_run(args, "bn-inversion", {"steps": steps}) for _ in range(2)][1] for steps in args.race}
    return {
        "model": model.spec.name, "images": args.images, "threads": torch.get_num_threads(),
        "seconds_a_step": {name: round(value, 4) for name, value in result.items()},
        "over_network": {name: round(value / result["network"], 2) for name, value in result.items()},
        "over_ours": {name: round(value / result["ours"], 2) for name, value in result.items()},
        "mct": {"steps": args.mct_steps + 1, "seconds": round(mct_seconds, 1)} if args.mct_python else None,
        "race": {f"bn-inversion steps={steps}": round(seconds, 2) for steps, seconds in race.items()},
        "environment": environment().model_dump(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--input-shape", metavar="C,H,W")
    parser.add_argument("--images", type=command.positive, default=16)
    parser.add_argument("--steps", type=command.positive, default=8, help="steps of a turn")
    parser.add_argument("--turns", type=command.positive, default=5)
    parser.add_argument("--mct-python", type=command.program, help="interpreter with model-compression-toolkit")
    parser.add_argument("--mct-steps", type=command.positive, default=5)
    parser.add_argument("--mct-images", help="npz file for the images that mct makes")
    parser.add_argument(
        "--race", type=command.positive, action="append", default=[], metavar="STEPS", help="repeatable"
    )
    parser.add_argument("-o", "--output", help="JSON file of the result")
    args = parser.parse_args()
    args.about = {key: getattr(args, key) for key in ("weights", "input_shape") if getattr(args, key)}
    result = measure(args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    command.run(main)
