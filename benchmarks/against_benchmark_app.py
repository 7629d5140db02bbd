"""Compare `ovcalib benchmark` with OpenVINO's benchmark_app, model by model; they should agree within 5 %.

    python benchmarks/against_benchmark_app.py fp32/model.xml int8/model.xml [--time 5] [--rounds 5] [--json FILE]

Both run the same file on CPU with the same hint, in turns (A B A B), each in processes of its own; benchmark_app with
`-ip f32`, because otherwise it times another graph, whose input is u8. Compared are medians over the rounds: of the
median latency under the LATENCY hint (sync), and of the images a second under the THROUGHPUT hint (async). Both read
the latency that OpenVINO measures for a request; the dispatch from Python is in the images a second of both.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import command
import numpy as np

import ovcalib

LIMIT = 0.05
Hint = Literal["latency", "throughput"]
HINTS: tuple[Hint, ...] = get_args(Hint)


def benchmark_app(model: Path, hint: Hint, seconds: float) -> tuple[float, float]:
    """Median latency in ms and images a second, as it prints them."""
    program = shutil.which("benchmark_app", path=str(Path(sys.executable).parent)) or "benchmark_app"
    command = [
        program, "-m", str(model), "-d", "CPU", "-hint", hint, "-api", "sync" if hint == "latency" else "async",
        "-t", str(max(1, round(seconds))), "-ip", "f32",
    ]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    latency = re.search(r"Median:\s+([\d.]+) (ms|us)", printed)
    throughput = re.search(r"Throughput:\s+([\d.]+) FPS", printed)
    if latency is None or throughput is None:
        raise SystemExit(f"benchmark_app printed no result:\n{printed}")
    return float(latency[1]) / (1000 if latency[2] == "us" else 1), float(throughput[1])


def compare(model: Path, hint: Hint, seconds: float, rounds: int) -> dict[str, object]:
    ours: list[float] = []
    theirs: list[float] = []
    doubts: set[str] = set()
    metric = "latency_p50_ms" if hint == "latency" else "throughput_fps"
    for _ in range(rounds):
        found = ovcalib.benchmark(model, hint=[hint], seconds=seconds)
        run = found.runs[0]
        ours.append(run.latency_ms.p50 if hint == "latency" else run.throughput_fps)
        doubts.update(run.unreliable)
        theirs.append(benchmark_app(model, hint, seconds)[0 if hint == "latency" else 1])
    ratio = float(np.median(ours) / np.median(theirs))
    return {
        "model": f"{model.parent.name}/{model.name}",
        "hint": hint,
        "metric": metric,
        "ovcalib": round(float(np.median(ours)), 5),
        "benchmark_app": round(float(np.median(theirs)), 5),
        "ratio": round(ratio, 4),
        "ratio_min_max": [round(f([a / b for a, b in zip(ours, theirs, strict=True)]), 4) for f in (min, max)],
        "within_5_percent": abs(ratio - 1) <= LIMIT,
        "unreliable": sorted(doubts),
        "environment": found.environment.model_dump(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--time", type=float, default=5.0, help="seconds a round")
    parser.add_argument("--rounds", type=command.positive, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "against_benchmark_app.json")
    args = parser.parse_args()
    rows = [compare(model, hint, args.time, args.rounds) for model in args.models for hint in HINTS]
    environment = [row.pop("environment") for row in rows][-1]
    result = {"seconds": args.time, "rounds": args.rounds, "environment": environment, "results": rows}
    print(json.dumps(rows, indent=2))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main)
