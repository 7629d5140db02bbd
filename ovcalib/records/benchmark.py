"""`benchmark.json`."""

from __future__ import annotations

from typing import Literal

from ovcalib.records.base import Frozen
from ovcalib.records.environment import Environment
from ovcalib.records.result import Memory


class Distribution(Frozen):
    """Durations in milliseconds, over every one of `n` inferences.

    p999             None below 1000 inferences, which do not tell it
    edges, counts    histogram from min to p99 in equal steps; what is slower is in `beyond`
    """

    p50: float
    p90: float
    p95: float
    p99: float
    p999: float | None
    mean: float
    std: float
    min: float
    max: float
    n: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    beyond: int


class ExecutedNode(Frozen):
    """One node of the graph that a device really runs; `precision` and `primitive` in the device's own words.

    mean_us   its time in one inference, microseconds, from the device's counters, which slow inference down a little;
              None where they were not asked for, or the device does not count this node
    """

    name: str
    kind: str
    precision: str
    primitive: str
    mean_us: float | None = None


class Power(Frozen):
    """Energy of the whole processor package while a model ran, by RAPL."""

    package_watts: float
    joules_per_inference: float


class BenchmarkRun(Frozen):
    """One model on one device with one set of settings.

    model              FOLDER/NAME of the file; `kind` is what its graph says
    hint               performance hint; latency runs one request, throughput as many as the device wants
    latency_ms         of a request, as OpenVINO measures it; under throughput, many are in flight at once
    call_p50_ms        sync: median of the whole call, dispatch from Python included
    throughput_fps     images a second, mean of the rounds, with the 95 % interval over them
    round_p50_ms       median latency of each round
    compile_ms         cold; compile_cached_ms from the device's cache
    steady             the warm-up ended because the latency had settled, not because its time was over
    compute_nodes      convolutions and matrix products of the executed graph, by runtime precision
    int8_nodes         those of them that ran on 8-bit integers
    unreliable         reasons to distrust this run
    """

    model: str
    sha256: str
    kind: Literal["fp32", "fp16", "int8"]
    size_bytes: int
    device: str
    hint: Literal["latency", "throughput"]
    api: Literal["sync", "async"]
    precision: str
    batch: int
    requests: int
    requested: dict[str, str]
    effective: dict[str, str]
    latency_ms: Distribution
    call_p50_ms: float | None
    round_p50_ms: tuple[float, ...]
    throughput_fps: float
    throughput_ci95: tuple[float, float]
    round_fps: tuple[float, ...]
    read_ms: float
    compile_ms: float
    compile_cached_ms: float | None
    compile_cached_reason: str | None
    first_inference_ms: float
    warmup_inferences: int
    steady: bool
    memory_bytes: Memory | None
    memory_reason: str | None
    power: Power | None
    power_reason: str | None
    compute_nodes: dict[str, int]
    int8_nodes: int
    nodes: tuple[ExecutedNode, ...]
    unreliable: tuple[str, ...]


class Speedup(Frozen):
    """How much faster one run was than another, measured in turns with it.

    metric    latency: p50 of `against` over p50 of `model`; throughput: the inverse ratio of images a second
    ci95      from the ratios of the rounds
    verdict   in words
    """

    model: str
    against: str
    device: str
    hint: Literal["latency", "throughput"]
    precision: str
    speedup: float
    ci95: tuple[float, float]
    verdict: str
    unreliable: tuple[str, ...]


class DeviceParity(Frozen):
    """The outputs of a model on one device and precision against the same model on CPU in f32.

    correlation     Pearson's, over all outputs of all images; None where an output is constant or not finite
    agreement       share of the images with the same class; None without class logits
    worst_sample    position of the image with the largest absolute difference `worst_abs`
    effective       precision that the device says it used
    """

    model: str
    device: str
    precision: str
    effective: str | None
    on: str
    count: int
    correlation: float | None
    agreement: float | None
    worst_sample: int
    worst_abs: float | None
    agrees: bool


class Noise(Frozen):
    """What else the machine did, and under which conditions; None is what the system does not tell.

    busy_before        share of the processor time that other work took in the second before the start
    steal_share        share of the processor time that the host took away, during the measurement
    throttled          how often a core was slowed down for heat
    governor           what decides the clock of the cores
    clock_limits_mhz   slowest and fastest clock that they may take
    temperature_c      the hottest sensor before and after the measurement
    power_source       mains or battery; None also where there is no battery
    """

    busy_before: float | None
    steal_share: float | None
    throttled: int | None
    governor: str | None = None
    clock_limits_mhz: tuple[float, float] | None = None
    temperature_c: tuple[float | None, float | None] = (None, None)
    power_source: Literal["mains", "battery"] | None = None


class Benchmark(Frozen):
    """`benchmark.json`. Every number comes from processes that ran one model each, in turns."""

    schema_version: Literal[1] = 1
    created: str
    ovcalib: str
    seconds: float
    rounds: int
    input: str
    environment: Environment
    noise: Noise
    runs: tuple[BenchmarkRun, ...]
    speedups: tuple[Speedup, ...]
    parity: tuple[DeviceParity, ...]
    warnings: tuple[str, ...]
