"""What ovcalib costs over a bare NNCF script, and whether its INT8 model is the same.

    python benchmarks/overhead.py fp32/model.xml calibration.npz [--rounds 5] [--json FILE]

`fp32/model.xml` and `calibration.npz` are those of any result of `ovcalib quantize` (300 images). Both ways read them,
quantize with the same settings and write the IR; ovcalib also checks the images and the spread of the activations,
measures agreement and writes its result. They are timed after imports, in turns, in one process. The two INT8 models
are then timed in turns. Activation ranges and bias correction (full) are NNCF's, so that the models can be the same;
timed beside are ovcalib with its own (`default`) and NNCF with its fast one, which is NNCF's default (`bare-fast`).
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
from pathlib import Path

import nncf
import numpy as np
import openvino as ov

import ovcalib
from ovcalib.graph.files import graph_sha256, read_graph, stored_spec
from ovcalib.measurement.benchmark import compare_latency


def bare(model: Path, images: Path, folder: Path, fast: bool = False) -> None:
    """What the NNCF documentation shows."""
    graph = ov.Core().read_model(model)
    spec = stored_spec(graph)
    assert spec is not None
    pixels = np.load(images)["images"]
    inputs = [spec.preprocessing.normalise(x)[None] for x in pixels]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = nncf.Dataset(inputs)
        quantized = nncf.quantize(graph, dataset, subset_size=len(inputs), fast_bias_correction=fast)
    ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)


def toolkit(model: Path, images: Path, folder: Path, **settings: str) -> None:
    count = len(np.load(images)["images"])
    ovcalib.quantize(
        str(model), folder / "out", calib=f"npz:{images}", num_samples=count, benchmark_time=0,
        **settings,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ways = {
        "bare": bare, "bare-fast": functools.partial(bare, fast=True), "default": toolkit,
        "ovcalib": functools.partial(toolkit, bias_correction="full", activation_ranges="mean-min-max"),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as root:
        for turn in range(args.rounds + 1):
            for name, run in ways.items():
                folder = Path(root) / name
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                began = time.perf_counter()
                run(args.model, args.images, folder)
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(seconds["bare"], seconds["ovcalib"], strict=True)]
        defaults = [b / a for a, b in zip(seconds["bare"], seconds["default"], strict=True)]
        graphs = [read_graph(Path(root) / p / "model.xml") for p in ("bare", "ovcalib/out/int8")]
        latency = compare_latency(*graphs, device="CPU", seconds=5)
        result = {
            "model": stored_spec(graphs[1]).name,  # type: ignore[union-attr]
            "seconds_bare": round(float(np.median(seconds["bare"])), 3),
            "seconds_bare_fast": round(float(np.median(seconds["bare-fast"])), 3),
            "seconds_ovcalib": round(float(np.median(seconds["ovcalib"])), 3),
            "seconds_default": round(float(np.median(seconds["default"])), 3),
            "ratio": round(float(np.median(ratios)), 3),
            "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "default_ratio": round(float(np.median(defaults)), 3),
            "default_ratio_min_max": [round(min(defaults), 3), round(max(defaults), 3)],
            "same_int8_graph": graph_sha256(graphs[0]) == graph_sha256(graphs[1]),
            "latency_bare_over_ovcalib": round(latency.speedup, 3),
        }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
