"""The process that runs one model for `ovcalib benchmark`: commands as JSON lines on stdin, answers on stdout.

A process of its own gives each model its own memory figures, and lets models take turns while both stay compiled.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ovcalib.errors import ModelError, OvcalibError
from ovcalib.measurement.counters import executed_times, random_input
from ovcalib.runtime import check_device, with_precision

# The latency has settled when the medians of two windows in a row differ by less than this share.
STEADY_SHARE = 0.05
STEADY_WINDOW = 20
MEMORY_REASON = "this system has no /proc/self/status"


def is_steady(durations: Sequence[float], window: int = STEADY_WINDOW, share: float = STEADY_SHARE) -> bool:
    """Whether the last two windows of durations have the same median, within a share of it."""
    if len(durations) < 2 * window:
        return False
    before, after = np.median(durations[-2 * window : -window]), np.median(durations[-window:])
    return bool(abs(after - before) <= share * before)


def memory_bytes() -> dict[str, int] | None:
    """Resident memory of this process now ("now") and at most ("peak")."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "VmRSS" not in fields or "VmHWM" not in fields:
        return None
    return {"now": 1024 * int(fields["VmRSS"].split()[0]), "peak": 1024 * int(fields["VmHWM"].split()[0])}


class Session:
    """One compiled model and the requests that run it."""

    def __init__(
        self,
        path: str,
        device: str,
        config: dict[str, Any],
        batch: int,
        api: str,
        requests: int | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.config, self.clock = device, with_precision(device, config), clock
        self.core = ov.Core()
        check_device(device)
        self.baseline = memory_bytes()
        began = clock()
        self.graph = self.core.read_model(path)
        set_batch(self.graph, batch)
        read = clock()
        try:
            self.compiled = self.core.compile_model(self.graph, device, self.config)
        except RuntimeError as error:
            raise ModelError(f"{device} cannot compile {path}: {str(error).strip().splitlines()[-1]}") from error
        compiled = clock()
        self.read_ms, self.compile_ms = 1000 * (read - began), 1000 * (compiled - read)
        optimal = int(self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self.synchronous = api == "sync"
        self.requests = 1 if self.synchronous else requests or optimal
        self.queue = ov.AsyncInferQueue(self.compiled, self.requests)
        rng = np.random.default_rng(0)
        for request in self.queue:
            for i, port in enumerate(self.compiled.inputs):
                request.set_input_tensor(i, ov.Tensor(random_input(port, rng)))
        began = clock()
        self.queue[0].infer()
        self.first_inference_ms = 1000 * (clock() - began)
        self.loaded = memory_bytes()

    def describe(self) -> dict[str, Any]:
        properties = {}
        for name in self.compiled.get_property("SUPPORTED_PROPERTIES"):
            if name not in ("SUPPORTED_PROPERTIES", "RUNTIME_REQUIREMENTS"):
                properties[str(name)] = as_text(self.compiled.get_property(name))
        nodes = []
        for op in self.compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            kind, precision, primitive = (
                info[key].astype(str) if key in info else ""
                for key in ("layerType", "runtimePrecision", "primitiveType")
            )
            nodes.append({"name": op.get_friendly_name(), "kind": kind, "precision": precision, "primitive": primitive})
        return {
            "read_ms": self.read_ms,
            "compile_ms": self.compile_ms,
            "first_inference_ms": self.first_inference_ms,
            "requests": self.requests,
            "effective": properties,
            "nodes": nodes,
        }

    def warm_up(self, limit_s: float) -> dict[str, Any]:
        """Infer until the latency has settled, or for `limit_s` seconds."""
        end = self.clock() + limit_s
        durations: list[float] = []
        while not is_steady(durations) and self.clock() < end:
            self.queue[0].infer()
            durations.append(self.queue[0].latency)
        # Of a slow model fewer inferences fit into the limit than two windows take.
        window = min(STEADY_WINDOW, max(len(durations) // 2, 3))
        return {"inferences": len(durations), "steady": is_steady(durations, window)}

    def measure(self, seconds: float, file: str) -> dict[str, Any]:
        """Infer for `seconds`; the latency of every inference, float32 ms, goes to `file`, for sync the calls' too."""
        run = self._one_by_one if self.synchronous else self._many_at_once
        latencies, calls, elapsed = run(seconds)
        # Four bytes an inference: a minute of the fastest network is some megabytes.
        np.savez(file, latency_ms=np.array(latencies, np.float32), call_ms=np.array(calls, np.float32))
        return {"inferences": len(latencies), "seconds": elapsed}

    def _one_by_one(self, seconds: float) -> tuple[list[float], list[float], float]:
        request, clock = self.queue[0], self.clock
        latencies, calls = [], []
        began = clock()
        end = began + seconds
        while True:
            before = clock()
            request.infer()
            after = clock()
            latencies.append(request.latency)
            calls.append(1000 * (after - before))
            if after >= end:
                return latencies, calls, after - began

    def _many_at_once(self, seconds: float) -> tuple[list[float], list[float], float]:
        queue, clock = self.queue, self.clock
        latencies: list[float] = []
        started: set[int] = set()
        began = clock()
        end = began + seconds
        # Whole rounds of requests, so that the device is full until the end.
        while clock() < end or (len(latencies) + len(started)) % self.requests:
            idle = queue.get_idle_request_id()
            if idle in started:
                latencies.append(queue[idle].latency)
            started.add(idle)
            queue.start_async()
        queue.wait_all()
        elapsed = clock() - began
        latencies += [queue[i].latency for i in started]
        return latencies, [], elapsed

    def memory(self) -> dict[str, Any]:
        """Resident memory of this process before, after loading, and at most."""
        last = memory_bytes()
        if not (self.baseline and self.loaded and last):
            return {"memory_bytes": None, "memory_reason": MEMORY_REASON}
        found = {"baseline": self.baseline["now"], "loaded": self.loaded["now"], "peak": last["peak"]}
        return {"memory_bytes": found, "memory_reason": None}

    def counters(self, seconds: float) -> dict[str, Any]:
        """Mean time of every executed node in one inference, microseconds, by name.

        Compiled anew, one request at a time: counting slows down what else is measured.
        """
        compiled = self.core.compile_model(self.graph, self.device, {**self.config, "PERF_COUNT": True})
        request = compiled.create_infer_request()
        for i in range(len(compiled.inputs)):
            request.set_input_tensor(i, self.queue[0].get_input_tensor(i))
        return {"mean_us": executed_times(request, seconds, self.clock)}

    def finish(self, compile_cached: bool) -> dict[str, Any]:
        """Memory, and then the compile time from a warm cache, because filling the cache costs memory."""
        memory = self.memory()
        cached, reason = None, None
        if not compile_cached:
            reason = "left out"
        elif "EXPORT_IMPORT" in self.core.get_property(self.device, "OPTIMIZATION_CAPABILITIES"):
            with tempfile.TemporaryDirectory() as folder:
                config = {**self.config, "CACHE_DIR": folder}
                ov.Core().compile_model(self.graph, self.device, config)
                core = ov.Core()
                core.get_property(self.device, "FULL_DEVICE_NAME")  # loads the plugin, which is no part of compiling
                began = self.clock()
                core.compile_model(self.graph, self.device, config)
                cached = 1000 * (self.clock() - began)
        else:
            reason = f"{self.device} cannot export compiled models"
        return {**memory, "compile_cached_ms": cached, "compile_cached_reason": reason}


def set_batch(graph: ov.Model, batch: int) -> None:
    """Give every input `batch` items.

    raises   ModelError where an input's other dimensions are open, or the graph refuses the batch
    """
    shapes = {}
    for port in graph.inputs:
        shape = port.get_partial_shape()
        if shape.rank.is_dynamic or any(d.is_dynamic for d in list(shape)[1:]):
            raise ModelError(f"The input {port.any_name!r} has the shape {shape}. Expected all but the batch fixed.")
        shapes[port] = ov.PartialShape([batch, *(d.get_length() for d in list(shape)[1:])])
    try:
        graph.reshape(shapes)
    except RuntimeError as error:
        raise ModelError(
            f"The model cannot run with batch {batch}: {str(error).strip().splitlines()[-1]} Use `batch=1`."
        ) from error


def as_text(value: Any) -> str:
    """A property of OpenVINO: types, enumerations, sets and plain values."""
    if isinstance(value, list | tuple | set):
        return " ".join(as_text(v) for v in value)
    if hasattr(value, "to_string"):
        return str(value.to_string())
    return str(getattr(value, "name", value))


def main() -> None:
    # Plugins may print to stdout, which belongs to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session: Session | None = None
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("command")
        try:
            if name == "load":
                session = Session(**command)
                answer = session.describe()
            else:
                assert session is not None
                answer = getattr(session, name)(**command)
        except OvcalibError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "kind": "RuntimeError"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
