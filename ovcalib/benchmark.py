"""Latency of models on a device, taken in turns so that the machine's drift cancels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib.runtime import compile_graph
from ovcalib.types import Latency, LatencyComparison

WARMUP_RUNS = 10
ROUNDS = 5

K = TypeVar("K", bound=str)


def summarise(durations_ms: NDArray[np.float64], precision: str | None = None) -> Latency:
    """Percentiles by linear interpolation between order statistics."""
    p50, p90, p99 = np.percentile(durations_ms, [50, 90, 99])
    return Latency(
        p50=float(p50), p90=float(p90), p99=float(p99), mean=float(durations_ms.mean()),
        min=float(durations_ms.min()), max=float(durations_ms.max()), n=len(durations_ms), precision=precision,
    )  # fmt: skip


def interleave(
    runs: Mapping[K, Callable[[], object]],
    seconds: float,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[K, NDArray[np.float64]]:
    """Durations in ms of each callable, run for seconds / rounds in turn: A B A B ...

    seconds   for each callable, all rounds together; at least one inference a round is made
    """
    durations: dict[K, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(WARMUP_RUNS):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            end = clock() + seconds / rounds
            while True:
                began = clock()
                run()
                done = clock()
                durations[name].append(1000 * (done - began))
                if done >= end:
                    break
    return {name: np.array(values) for name, values in durations.items()}


def compare_latency(fp32: ov.Model, int8: ov.Model, device: str, seconds: float) -> LatencyComparison:
    """Single-stream latency (LATENCY hint, one synchronous request) with batch 1, at the device's defaults.

    seconds   of measurement for each model
    """
    runs: dict[Literal["fp32", "int8"], Callable[[], object]] = {}
    precision = {}
    graphs: dict[Literal["fp32", "int8"], ov.Model] = {"fp32": fp32, "int8": int8}
    for name, graph in graphs.items():
        compiled = compile_graph(graph, device, {"PERFORMANCE_HINT": "LATENCY"})
        request = compiled.create_infer_request()
        shape = [1, *(d.get_length() for d in list(graph.inputs[0].get_partial_shape())[1:])]
        request.set_input_tensor(ov.Tensor(np.random.default_rng(0).standard_normal(shape, dtype=np.float32)))
        runs[name] = request.infer
        precision[name] = effective_precision(compiled)
    durations = interleave(runs, seconds)
    latency = {name: summarise(values, precision[name]) for name, values in durations.items()}
    return LatencyComparison(device=device, latency_ms=latency, speedup=latency["fp32"].p50 / latency["int8"].p50)


def effective_precision(compiled: ov.CompiledModel) -> str | None:
    """In which precision a device runs what is not INT8; None where it does not tell."""
    try:
        return str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    except (RuntimeError, AttributeError):
        return None
