"""Latency of models on a device, taken in turns so that the machine's drift cancels.

`benchmark` is the proof: a process for each model, hints, devices, memory, the executed graph, and a word on whether
the machine was quiet enough. `measure_pair` is the same for the two models of `quantize` under one setting, and
`interleaved_latency` and `race` a quick look at several graphs in this process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib import __version__, errors, machine
from ovcalib.errors import DeviceError, ModelError, OvcalibError
from ovcalib.evaluation.metrics import mean_interval, ratio_interval
from ovcalib.graph.files import is_quantized, read_graph
from ovcalib.measurement.counters import set_random_input
from ovcalib.measurement.environment import environment
from ovcalib.progress import Progress
from ovcalib.records.benchmark import Benchmark, BenchmarkRun, Distribution, ExecutedNode, Noise, Power, Speedup
from ovcalib.records.options import BenchmarkOptions, MeasurementOptions
from ovcalib.records.result import Latency, LatencyComparison, Memory
from ovcalib.rundir import file_sha256
from ovcalib.runtime import check_device, compile_graph

WARMUP_RUNS = 10
ROUNDS = 5
# Of a race: short turns meet the same disturbances.
RACE_ROUNDS = 15
HISTOGRAM_BINS = 60
WARMUP_LIMIT_S = 5.0
# Below this many inferences the 99.9th percentile is a guess.
P999_INFERENCES = 1000

# Beyond these a run is called unreliable; it is reported all the same.
BUSY_LIMIT = 0.2  # of the processor time used by others before the benchmark began
BUSY_WINDOW_S = 1.0
STEAL_LIMIT = 0.01
VARIATION_LIMIT = 0.05  # coefficient of variation of the rounds' medians

# Below these a median of a round says little.
ROUND_INFERENCES = 5

# Layer types of executed graphs that do the work, on CPU and GPU.
COMPUTE_KINDS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "Fullyconnected", "MatMul", "Gemm"})
INT8_PRECISIONS = frozenset({"i8", "u8"})

K = TypeVar("K", bound=str | int)
Kind = Literal["fp32", "int8"]


def summarise(durations_ms: NDArray[np.float64], precision: str | None = None) -> Latency:
    """Percentiles by linear interpolation between order statistics."""
    p50, p90, p99 = np.percentile(durations_ms, [50, 90, 99])
    edges, counts = histogram(durations_ms, float(p99))
    return Latency(
        p50=float(p50), p90=float(p90), p99=float(p99), mean=float(durations_ms.mean()),
        min=float(durations_ms.min()), max=float(durations_ms.max()), n=len(durations_ms), precision=precision,
        edges=edges, counts=counts,
    )  # fmt: skip


def histogram(values: NDArray[np.floating[Any]], high: float) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges and counts of HISTOGRAM_BINS equal bins from the smallest value to `high`."""
    low = float(values.min())
    counts, edges = np.histogram(values, HISTOGRAM_BINS, (low, max(high, low * (1 + 1e-6))))
    return tuple(float(f"{e:.6g}") for e in edges), tuple(int(c) for c in counts)


def interleave(
    runs: Mapping[K, Callable[[], object]],
    seconds: float,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[K, list[NDArray[np.float64]]]:
    """Durations in ms of each callable by round, run for seconds / rounds in turn: A B A B ...

    seconds   for each callable, all rounds together; at least one inference a round is made
    """
    durations: dict[K, list[NDArray[np.float64]]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(WARMUP_RUNS):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            taken = []
            end = clock() + seconds / rounds
            while True:
                began = clock()
                run()
                done = clock()
                taken.append(1000 * (done - began))
                if done >= end:
                    break
            durations[name].append(np.array(taken))
    return durations


def measure_pair(
    options: MeasurementOptions, folder: Path, progress: Progress
) -> tuple[LatencyComparison | None, str | None]:
    """Single-stream latency with batch 1 and memory of both models, or None and the reason.

    folder   holds fp32/model.xml and int8/model.xml
    """
    if options.benchmark_time == 0:
        return None, "left out (`benchmark_time=0`)"
    progress.say(f"measuring latency on {options.device}")
    files = {"fp32": folder / "fp32" / "model.xml", "int8": folder / "int8" / "model.xml"}
    runs, _ = measured(
        files, [Setting(options.device)], options.benchmark_time, lambda done: None, compile_cached=False
    )
    (speedup,) = speedups(runs)
    fp32, int8 = runs
    memory: dict[Kind, Memory] | None = None
    if fp32.memory_bytes is not None and int8.memory_bytes is not None:
        memory = {"fp32": fp32.memory_bytes, "int8": int8.memory_bytes}
    found = LatencyComparison(
        device=options.device,
        latency_ms={"fp32": latency_of(fp32), "int8": latency_of(int8)},
        speedup=speedup.speedup,
        speedup_ci95=speedup.ci95,
        unreliable=speedup.unreliable,
        memory_bytes=memory,
        memory_reason=fp32.memory_reason or int8.memory_reason,
    )
    return found, None


def latency_of(run: BenchmarkRun) -> Latency:
    """What a result keeps of a run."""
    d = run.latency_ms
    return Latency(
        p50=d.p50, p90=d.p90, p99=d.p99, mean=d.mean, min=d.min, max=d.max, n=d.n,
        precision=run.effective.get("INFERENCE_PRECISION_HINT"), edges=d.edges, counts=d.counts,
    )  # fmt: skip


def interleaved_latency(graphs: Mapping[K, ov.Model], device: str, seconds: float) -> dict[K, Latency]:
    """Single-stream latency of several graphs with batch 1, measured in turns for `seconds` each."""
    compiled = {name: compile_graph(graph, device, {"PERFORMANCE_HINT": "LATENCY"}) for name, graph in graphs.items()}
    durations = interleave({name: _single_stream(model) for name, model in compiled.items()}, seconds)
    return {
        name: summarise(np.concatenate(rounds), effective_precision(compiled[name]))
        for name, rounds in durations.items()
    }


def race(graphs: Mapping[K, ov.Model], device: str, seconds: float) -> dict[K, list[float]]:
    """Median single-stream latency in ms of each round, measured in turns for `seconds` each; see `ratio_interval`."""
    runs = {
        name: _single_stream(compile_graph(graph, device, {"PERFORMANCE_HINT": "LATENCY"}))
        for name, graph in graphs.items()
    }
    durations = interleave(runs, seconds, RACE_ROUNDS)
    return {name: [float(np.median(r)) for r in rounds] for name, rounds in durations.items()}


def _single_stream(compiled: ov.CompiledModel) -> Callable[[], object]:
    request = compiled.create_infer_request()
    set_random_input(request)
    return request.infer  # type: ignore[no-any-return]


def effective_precision(compiled: ov.CompiledModel) -> str | None:
    """In which precision a device runs what is not INT8; None where it does not tell."""
    try:
        return str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    except (RuntimeError, AttributeError):
        return None


# The benchmark --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How to run a model; None leaves a choice to the device."""

    device: str = "CPU"
    hint: Literal["latency", "throughput"] = "latency"
    precision: str = "default"
    batch: int = 1
    api: Literal["sync", "async"] | None = None
    streams: int | None = None
    threads: int | None = None
    requests: int | None = None

    @property
    def resolved_api(self) -> Literal["sync", "async"]:
        return self.api or ("sync" if self.hint == "latency" else "async")

    def config(self) -> dict[str, Any]:
        """The properties to compile with."""
        config: dict[str, Any] = {"PERFORMANCE_HINT": self.hint.upper()}
        if self.precision != "default":
            config["INFERENCE_PRECISION_HINT"] = self.precision
        if self.streams is not None:
            config["NUM_STREAMS"] = str(self.streams)
        if self.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.threads
        return config


def benchmark(models: Sequence[Path], options: BenchmarkOptions, progress: Progress) -> Benchmark:
    """Measure models against each other: each in its own process, in turns, under every setting.

    models    FILE.xml or FILE.onnx, or a result folder, which stands for its fp32/ and int8/ models
    raises    DeviceError naming the devices that are missing and those that exist; ModelError
    """
    settings, seconds = all_settings(options), options.seconds
    refuse_missing_devices(settings)
    files = model_files(models)
    with progress.task("benchmarking", len(settings) * ROUNDS, "less time (`seconds`), or fewer settings.") as tick:
        runs, noise = measured(files, settings, seconds, tick, counters=options.counters)
    return Benchmark(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), ovcalib=__version__,
        seconds=seconds, rounds=ROUNDS, input="seeded standard normal values, as of normalised images",
        environment=environment(), noise=noise, runs=tuple(runs), speedups=speedups(runs), parity=(),
        warnings=proof_warnings(runs),
    )  # fmt: skip


def refuse_missing_devices(settings: Sequence[Setting]) -> None:
    """Raise DeviceError naming the devices that are missing and those that exist."""
    missing = []
    for device in dict.fromkeys(setting.device for setting in settings):
        try:
            check_device(device)
        except DeviceError as error:
            missing.append(str(error))
    if missing:
        raise DeviceError(" ".join(missing))


def measured(
    files: Mapping[str, Path],
    settings: Sequence[Setting],
    seconds: float,
    tick: Callable[[int], None],
    compile_cached: bool = True,
    counters: bool = False,
) -> tuple[list[BenchmarkRun], Noise]:
    """Every file under every setting, and what else the machine did meanwhile, which makes the runs doubtful.

    tick             receives the number of finished rounds, over all settings
    compile_cached   measure compiling from a cache too, which costs one more compilation of each model
    counters         measure every operation too, for as long as one round
    """
    about = {label: describe_file(path) for label, path in files.items()}
    earlier = machine.processor_ticks()
    time.sleep(BUSY_WINDOW_S)
    ticks, throttled, temperature = machine.processor_ticks(), machine.throttle_count(), machine.temperature_celsius()
    runs: list[BenchmarkRun] = []
    for i, setting in enumerate(settings):
        count = lambda done, i=i: tick(i * ROUNDS + done)  # noqa: E731
        runs += turns(files, about, setting, seconds, count, compile_cached, counters)
    noise = Noise(
        busy_before=machine.busy_share(earlier, ticks),
        steal_share=machine.steal_share(ticks, machine.processor_ticks()),
        throttled=None if throttled is None else (machine.throttle_count() or 0) - throttled,
        governor=machine.governor(),
        clock_limits_mhz=machine.clock_limits_mhz(),
        temperature_c=(temperature, machine.temperature_celsius()),
        power_source=machine.power_source(),
    )
    shared = machine_doubts(noise)
    return [run.model_copy(update={"unreliable": (*run.unreliable, *shared)}) for run in runs], noise


def model_files(models: Sequence[Path]) -> dict[str, Path]:
    """Label -> file; a result folder stands for its two models."""
    files: list[Path] = []
    for path in models:
        if path.is_dir():
            found = [path / kind / "model.xml" for kind in ("fp32", "int8") if (path / kind / "model.xml").is_file()]
            if not found:
                raise ModelError(
                    f"The folder {str(path)!r} holds no fp32/model.xml or int8/model.xml. Expected a result of "
                    "`ovcalib quantize`, or name the model files."
                )
            files += found
        elif path.suffix in (".xml", ".onnx"):
            files.append(path)
        else:
            raise ModelError(f"{str(path)!r} is no model that can be timed. Expected FILE.xml, FILE.onnx or a folder.")
    short = {path: f"{path.resolve().parent.name}/{path.stem}" for path in files}
    if len(set(short.values())) < len(short):
        short = {path: str(path) for path in files}
    return {short[path]: path for path in files}


def describe_file(path: Path) -> dict[str, Any]:
    """The fields of BenchmarkRun about a model file."""
    graph = read_graph(path)
    kind = "fp32"
    if is_quantized(graph) is not None:
        kind = "int8"
    elif any(op.get_type_name() == "Constant" and op.get_element_type().to_string() == "f16" for op in graph.get_ops()):
        kind = "fp16"
    weights = path.with_suffix(".bin") if path.suffix == ".xml" else path
    size = path.stat().st_size + (weights.stat().st_size if weights != path else 0)
    return {"kind": kind, "sha256": file_sha256(weights), "size_bytes": size}


class Worker:
    """A process that holds one model; see ovcalib.measurement.worker."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ovcalib.measurement.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.send(command, **arguments)
        return self.receive()

    def load(self, path: Path, setting: Setting) -> dict[str, Any]:
        """Compile a model, and infer once."""
        return self(
            "load", path=str(path), device=setting.device, config=setting.config(), batch=setting.batch,
            api=setting.resolved_api, requests=setting.requests,
        )  # fmt: skip

    def send(self, command: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive() says what happened
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the last command; errors of the process are raised here."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ModelError(
                f"The process that ran the model ended with code {self.process.wait()}. It may have run out of memory: "
                "try `batch=1`, or fewer models at once."
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["kind"], ModelError)
            raise (kind if issubclass(kind, OvcalibError) else ModelError)(answer["error"])
        return answer

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@contextlib.contextmanager
def workers(labels: Sequence[K]) -> Iterator[dict[K, Worker]]:
    started = {}
    try:
        for label in labels:
            started[label] = Worker()
        yield started
    finally:
        for worker in started.values():
            worker.stop()


def turns(
    files: Mapping[str, Path],
    about: Mapping[str, Mapping[str, Any]],
    setting: Setting,
    seconds: float,
    tick: Callable[[int], None],
    compile_cached: bool = True,
    counters: bool = False,
) -> list[BenchmarkRun]:
    """All models under one setting: A B A B ..., one model at work at a time."""
    with workers(list(files)) as started, tempfile.TemporaryDirectory() as folder:
        loaded = {label: worker.load(files[label], setting) for label, worker in started.items()}
        warm = {label: worker("warm_up", limit_s=WARMUP_LIMIT_S) for label, worker in started.items()}
        rounds: dict[str, list[dict[str, Any]]] = {label: [] for label in files}
        for turn in range(ROUNDS):
            for i, (label, worker) in enumerate(started.items()):
                file = Path(folder) / f"{i}-{turn}.npz"
                energy = machine.package_energy_joules()
                measured = worker("measure", seconds=seconds / ROUNDS, file=str(file))
                after = machine.package_energy_joules()
                with np.load(file) as arrays:
                    measured |= {name: arrays[name] for name in arrays.files}
                measured["joules"] = None if energy is None or after is None else after - energy
                rounds[label].append(measured)
            tick(turn + 1)
        finished = {label: worker("finish", compile_cached=compile_cached) for label, worker in started.items()}
        if counters:
            for label, worker in started.items():
                finished[label] |= worker("counters", seconds=seconds / ROUNDS)
    return [
        summarise_run(label, about[label], setting, loaded[label], warm[label], rounds[label], finished[label])
        for label in files
    ]


def summarise_run(
    label: str,
    about: Mapping[str, Any],
    setting: Setting,
    loaded: Mapping[str, Any],
    warm: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    finished: Mapping[str, Any],
) -> BenchmarkRun:
    """A run from what its process answered; pure."""
    round_p50 = tuple(float(np.median(r["latency_ms"])) for r in rounds)
    round_fps = tuple(setting.batch * r["inferences"] / r["seconds"] for r in rounds)
    calls = np.concatenate([r["call_ms"] for r in rounds])
    power = power_of(rounds)
    times = finished.get("mean_us", {})
    nodes = tuple(ExecutedNode(**node, mean_us=times.get(node["name"])) for node in loaded["nodes"])
    compute: dict[str, int] = {}
    for node in nodes:
        if node.kind in COMPUTE_KINDS:
            compute[node.precision] = compute.get(node.precision, 0) + 1
    variation = float(np.std(round_p50) / np.mean(round_p50))
    doubts = []
    if not warm["steady"]:
        doubts.append(f"the latency of {label} had not settled after {WARMUP_LIMIT_S:g} s of warm-up")
    if min(r["inferences"] for r in rounds) < ROUND_INFERENCES:
        doubts.append(f"fewer than {ROUND_INFERENCES} inferences of {label} fit into a round; measure for longer")
    if variation > VARIATION_LIMIT:
        doubts.append(
            f"the median latency of {label} varies by {variation:.1%} between rounds (limit {VARIATION_LIMIT:.0%})"
        )
    return BenchmarkRun(
        model=label, **about, device=setting.device, hint=setting.hint, api=setting.resolved_api,
        precision=setting.precision, batch=setting.batch, requests=loaded["requests"],
        requested={key: str(value) for key, value in setting.config().items()}, effective=loaded["effective"],
        latency_ms=distribution(np.concatenate([r["latency_ms"] for r in rounds])),
        call_p50_ms=float(np.median(calls)) if len(calls) else None,
        round_p50_ms=round_p50, throughput_fps=float(np.mean(round_fps)), throughput_ci95=mean_interval(round_fps),
        round_fps=round_fps, read_ms=loaded["read_ms"], compile_ms=loaded["compile_ms"],
        compile_cached_ms=finished["compile_cached_ms"], compile_cached_reason=finished["compile_cached_reason"],
        first_inference_ms=loaded["first_inference_ms"], warmup_inferences=warm["inferences"], steady=warm["steady"],
        memory_bytes=Memory(**finished["memory_bytes"]) if finished["memory_bytes"] else None,
        memory_reason=finished["memory_reason"], power=power, power_reason=None if power else machine.RAPL_REASON,
        compute_nodes=compute, int8_nodes=sum(n for p, n in compute.items() if p in INT8_PRECISIONS), nodes=nodes,
        unreliable=tuple(doubts),
    )  # fmt: skip


def distribution(durations_ms: NDArray[np.floating[Any]]) -> Distribution:
    """Percentiles by linear interpolation between order statistics, and a histogram up to the 99th."""
    values = durations_ms.astype(np.float64)
    p50, p90, p95, p99, p999 = (float(p) for p in np.percentile(values, [50, 90, 95, 99, 99.9]))
    edges, counts = histogram(values, p99)
    return Distribution(
        p50=p50, p90=p90, p95=p95, p99=p99, p999=p999 if len(values) >= P999_INFERENCES else None,
        mean=float(values.mean()), std=float(values.std()), min=float(values.min()), max=float(values.max()),
        n=len(values), edges=edges, counts=counts, beyond=len(values) - sum(counts),
    )  # fmt: skip


def power_of(rounds: Sequence[Mapping[str, Any]]) -> Power | None:
    joules = [r["joules"] for r in rounds]
    # A counter that wrapped round shows as negative.
    if any(j is None or j < 0 for j in joules):
        return None
    return Power(
        package_watts=sum(joules) / sum(r["seconds"] for r in rounds),
        joules_per_inference=sum(joules) / sum(r["inferences"] for r in rounds),
    )


def machine_doubts(noise: Noise) -> tuple[str, ...]:
    """What makes every run on this machine doubtful."""
    doubts = []
    if noise.busy_before is not None and noise.busy_before > BUSY_LIMIT:
        doubts.append(f"other work took {noise.busy_before:.0%} of the processor time before the start")
    if noise.steal_share is not None and noise.steal_share > STEAL_LIMIT:
        doubts.append(f"the host took {noise.steal_share:.1%} of the processor time away")
    if noise.throttled:
        doubts.append(f"cores were slowed down for heat {noise.throttled} times")
    if noise.power_source == "battery":
        doubts.append("the machine ran on its battery, which may lower the clock")
    return tuple(doubts)


def speedups(runs: Sequence[BenchmarkRun]) -> tuple[Speedup, ...]:
    """Each setting's models against its first float model; without one there is nothing to compare with."""
    found = []
    for key in dict.fromkeys((r.device, r.hint, r.precision, r.batch) for r in runs):
        group = [r for r in runs if (r.device, r.hint, r.precision, r.batch) == key]
        base = next((r for r in group if r.kind == "fp32"), next((r for r in group if r.kind == "fp16"), None))
        for run in group:
            if base is None or run is base:
                continue
            if run.hint == "latency":
                value, low, high = ratio_interval(base.round_p50_ms, run.round_p50_ms)
            else:
                value, low, high = ratio_interval(run.round_fps, base.round_fps)
            found.append(
                Speedup(
                    model=run.model,
                    against=base.model,
                    device=run.device,
                    hint=run.hint,
                    precision=run.precision,
                    speedup=value,
                    ci95=(low, high),
                    verdict=verdict(run.kind, run.device, value, low, high),
                    unreliable=tuple(dict.fromkeys((*base.unreliable, *run.unreliable))),
                )
            )
    return tuple(found)


def verdict(kind: str, device: str, speedup: float, low: float, high: float) -> str:
    """The speed-up in words; only an interval on one side of 1 says anything."""
    size = f"{speedup:.2f}x (95 % interval {low:.2f} to {high:.2f})"
    if low > 1:
        return f"{kind.upper()} is faster on {device}: {size}"
    if high < 1:
        return f"{kind.upper()} is slower on {device}: {size}. Do not ship {kind.upper()} here"
    return f"no measurable difference on {device}: {size}"


def proof_warnings(runs: Sequence[BenchmarkRun]) -> tuple[str, ...]:
    """Quantized models of which nothing ran in INT8."""
    return tuple(
        dict.fromkeys(
            f"{run.model} is quantized, but {run.device} ran none of its layers in INT8"
            for run in runs
            if run.kind == "int8" and run.compute_nodes and not run.int8_nodes
        )
    )


def all_settings(options: BenchmarkOptions) -> list[Setting]:
    """Every combination of devices, hints and precisions."""
    return [
        Setting(
            device=device, hint=hint, precision=precision, batch=options.batch, api=options.api,
            streams=options.streams, threads=options.threads, requests=options.requests,
        )
        for device, hint, precision in product(options.device, options.hint, options.precision)
    ]  # fmt: skip
