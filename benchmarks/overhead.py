"""Time of ovcalib over a plain NNCF script, and whether both give the same INT8 model.

    python benchmarks/overhead.py fp32/model.xml calibration.npz [--rounds 5] [--json FILE]

`fp32/model.xml` and `calibration.npz` are those of any result of `ovcalib quantize` (300 images). Both scripts read
them, quantize with the same settings and write the IR; ovcalib also checks the images and the spread of the
activations, measures agreement and writes its result. They are timed after imports, in turns, in one process. Then the
two INT8 models are benchmarked. `bare` and `ovcalib` use NNCF's defaults with its full bias correction, so that the
models are equal; for the same reason NNCF gets the images that ovcalib takes ranges from, and images that were made
count as the user's own. `default` is ovcalib with its own defaults, `bare-fast` is NNCF with its default, the fast
correction.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import command
import nncf
import numpy as np
import openvino as ov

import ovcalib
from ovcalib.calibration.split import CHOICE_IMAGES, CHOICE_SHARE
from ovcalib.graph.files import graph_sha256, read_graph
from ovcalib.quantization.arm_search import ARMS


def bare(model: Path, images: Path, folder: Path, preprocessing: ovcalib.Preprocessing, fast: bool = False) -> None:
    """What the NNCF documentation shows."""
    graph = ov.Core().read_model(model)
    pixels = np.load(images)["images"]
    pixels = pixels[: len(pixels) - min(CHOICE_IMAGES, round(CHOICE_SHARE * len(pixels)))]
    inputs = [preprocessing.normalise(x)[None] if x.dtype == np.uint8 else x[None] for x in pixels]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = nncf.Dataset(inputs)
        quantized = nncf.quantize(graph, dataset, subset_size=len(inputs), fast_bias_correction=fast)
    ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)


def toolkit(model: Path, images: Path, folder: Path, as_nncf: bool = False) -> None:
    count = len(np.load(images)["images"])
    changes = ARMS["NNCF, full bias correction"] if as_nncf else {}
    ovcalib.quantize(str(model), folder / "out", calib=f"npz:{images}", num_samples=count, benchmark_time=0, **changes)


def as_own(images: Path, folder: Path) -> Path:
    """The images as a user's own: of made ones ovcalib knows the range of the input, which NNCF measures."""
    file = folder / "images.npz"
    np.savez(file, images=np.load(images)["images"])
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=command.positive, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    spec = ovcalib.load_model(str(args.model)).spec
    plain = functools.partial(bare, preprocessing=spec.preprocessing)
    ways: dict[str, Callable[[Path, Path, Path], None]] = {
        "bare": plain, "bare-fast": functools.partial(plain, fast=True), "default": toolkit,
        "ovcalib": functools.partial(toolkit, as_nncf=True),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as root:
        images = as_own(args.images, Path(root))
        for turn in range(args.rounds + 1):
            for name, run in ways.items():
                folder = Path(root) / name
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                began = time.perf_counter()
                run(args.model, images, folder)
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(seconds["bare"], seconds["ovcalib"], strict=True)]
        defaults = [b / a for a, b in zip(seconds["bare"], seconds["default"], strict=True)]
        files = [Path(root) / part / "model.xml" for part in ("bare", "ovcalib/out/int8")]
        hashes = [graph_sha256(read_graph(file)) for file in files]
        latency = [run.latency_ms.p50 for run in ovcalib.benchmark(files, hint=["latency"], seconds=5).runs]
        result = {
            "model": spec.name,
            "seconds_bare": round(float(np.median(seconds["bare"])), 3),
            "seconds_bare_fast": round(float(np.median(seconds["bare-fast"])), 3),
            "seconds_ovcalib": round(float(np.median(seconds["ovcalib"])), 3),
            "seconds_default": round(float(np.median(seconds["default"])), 3),
            "ratio": round(float(np.median(ratios)), 3),
            "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "default_ratio": round(float(np.median(defaults)), 3),
            "default_ratio_min_max": [round(min(defaults), 3), round(max(defaults), 3)],
            "same_int8_graph": hashes[0] == hashes[1],
            "latency_bare_over_ovcalib": round(latency[0] / latency[1], 3),
        }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main)
