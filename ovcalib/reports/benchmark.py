"""The report of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovcalib.records.benchmark import Benchmark, BenchmarkRun, Noise
from ovcalib.reports import charts
from ovcalib.reports.render import FORMATS, machine_facts, render, tile, write
from ovcalib.reports.tables import Table, escape_markdown


def condition_facts(noise: Noise) -> list[tuple[str, str]]:
    """Under which conditions a benchmark ran; what the system does not tell is said to be so."""
    unknown = "the system does not tell"
    clock, (before, after) = noise.clock_limits_mhz, noise.temperature_c
    return [
        ("other work", unknown if noise.busy_before is None else f"{noise.busy_before:.0%} of the processor time"),
        ("taken by the host", unknown if noise.steal_share is None else f"{noise.steal_share:.1%} of the time"),
        ("slowed down for heat", unknown if noise.throttled is None else f"{noise.throttled} times"),
        ("temperature", unknown if before is None or after is None else f"{before:.0f} to {after:.0f} °C"),
        ("governor", noise.governor or unknown),
        ("clock limits", f"{clock[0]:.0f} to {clock[1]:.0f} MHz" if clock else unknown),
        ("power source", noise.power_source or "no battery found"),
    ]


def write_benchmark_report(benchmark: Benchmark, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    writers = {
        "html": lambda: benchmark_page(benchmark),
        "md": lambda: benchmark_markdown(benchmark),
        "csv": lambda: run_table(benchmark).csv(),
    }
    return write(folder, writers, formats)


def benchmark_page(b: Benchmark) -> str:
    first = b.runs[0]
    tiles = [
        tile(
            f"latency p50, {r.kind.upper()}", f"{r.latency_ms.p50:.3g} ms", f"{r.hint}, {r.throughput_fps:.4g} images/s"
        )
        for r in b.runs
        if (r.device, r.hint, r.precision) == (first.device, first.hint, first.precision)
    ]
    tiles += [tile("layers in INT8", f"{r.int8_nodes} of {sum(r.compute_nodes.values())}", r.model)
              for r in b.runs if r.kind == "int8"][:1]  # fmt: skip
    return render(
        "benchmark.html.j2",
        title=f"Benchmark on {first.device}",
        kicker="Benchmark",
        heading=f"{len({r.model for r in b.runs})} models on {', '.join(dict.fromkeys(r.device for r in b.runs))}",
        created=b.created,
        tiles=tiles,
        warnings=(*b.warnings, *dict.fromkeys(reason for run in b.runs for reason in run.unreliable)),
        b=benchmark_context(b),
        machine=machine_facts(b.environment) + condition_facts(b.noise),
    )


def by_setting(b: Benchmark) -> dict[tuple[str, str, str], list[BenchmarkRun]]:
    """The runs that were measured in turns, by device, hint and precision."""
    groups: dict[tuple[str, str, str], list[BenchmarkRun]] = {}
    for run in b.runs:
        groups.setdefault((run.device, run.hint, run.precision), []).append(run)
    return groups


def benchmark_context(b: Benchmark) -> dict[str, Any]:
    groups = by_setting(b)
    return {
        "comparisons": [
            {
                "verdict": f"{s.verdict} ({s.hint} hint, precision {s.precision})",
                "css": "unsure" if s.unreliable else "good" if s.ci95[0] > 1 else "bad" if s.ci95[1] < 1 else "unsure",
                "unreliable": "; ".join(s.unreliable),
            }
            for s in b.speedups
        ],
        "charts": [
            {
                "svg": charts.steps(
                    f"Latency on {device}, {hint} hint",
                    {
                        charts.shortened(r.model, 24): (r.latency_ms.edges, r.latency_ms.counts, r.latency_ms.p50)
                        for r in runs
                    },
                    "ms",
                ),
                "caption": f"{device}, {hint} hint, precision {precision}: latency of every inference up to the 99th "
                "percentile, each curve to its own peak.",
            }
            for (device, hint, precision), runs in groups.items()
        ],
        "runs": run_table(b),
        "parity": parity_table(b),
        "operations": [
            (f"{device}, {hint} hint, precision {precision}", table)
            for (device, hint, precision), runs in groups.items()
            if (table := operation_table(runs)).rows
        ],
        "settings": Table(
            ["model", "device", "hint", "requested", "effective"],
            [
                [r.model, r.device, r.hint, pairs(r.requested),
                 pairs({k: r.effective[k] for k in TELLING if k in r.effective})]
                for r in b.runs
            ],
        ),
    }  # fmt: skip


# Effective settings that explain a speed; the JSON holds all of them.
TELLING = ("INFERENCE_PRECISION_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS", "OPTIMAL_NUMBER_OF_INFER_REQUESTS",
           "EXECUTION_DEVICES")  # fmt: skip


def pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def over_baseline(run: BenchmarkRun, at: str) -> float | None:
    """Megabytes of resident memory beyond OpenVINO itself."""
    memory = run.memory_bytes
    return None if memory is None else (getattr(memory, at) - memory.baseline) / 1e6


RUN_COLUMNS: dict[str, Callable[[BenchmarkRun], Any]] = {
    "model": lambda r: r.model,
    "kind": lambda r: r.kind,
    "device": lambda r: r.device,
    "hint": lambda r: r.hint,
    "api": lambda r: r.api,
    "precision": lambda r: r.precision,
    "batch": lambda r: r.batch,
    "requests": lambda r: r.requests,
    "p50 ms": lambda r: r.latency_ms.p50,
    "p90 ms": lambda r: r.latency_ms.p90,
    "p95 ms": lambda r: r.latency_ms.p95,
    "p99 ms": lambda r: r.latency_ms.p99,
    "p99.9 ms": lambda r: r.latency_ms.p999,
    "min ms": lambda r: r.latency_ms.min,
    "max ms": lambda r: r.latency_ms.max,
    "inferences": lambda r: r.latency_ms.n,
    "images/s": lambda r: r.throughput_fps,
    "images/s from": lambda r: r.throughput_ci95[0],
    "images/s to": lambda r: r.throughput_ci95[1],
    "layers in INT8": lambda r: r.int8_nodes,
    "layers": lambda r: sum(r.compute_nodes.values()),
    "compile ms": lambda r: r.compile_ms,
    "compile cached ms": lambda r: r.compile_cached_ms,
    "first inference ms": lambda r: r.first_inference_ms,
    "memory MB": lambda r: over_baseline(r, "loaded"),
    "peak MB": lambda r: over_baseline(r, "peak"),
    "J per inference": lambda r: r.power.joules_per_inference if r.power else None,
    "unreliable": lambda r: "; ".join(r.unreliable),
}


def run_table(b: Benchmark) -> Table:
    return Table(list(RUN_COLUMNS), [[value(r) for value in RUN_COLUMNS.values()] for r in b.runs])


def parity_table(b: Benchmark) -> Table:
    return Table(
        ["model", "device", "precision", "effective", "images", "correlation", "same class %", "worst image",
         "its difference", "agrees"],
        [
            [p.model, p.device, p.precision, p.effective, p.count, p.correlation,
             None if p.agreement is None else 100 * p.agreement, p.worst_sample, p.worst_abs,
             "yes" if p.agrees else "no"]
            for p in b.parity
        ],
    )  # fmt: skip


def operation_table(runs: Sequence[BenchmarkRun], rows: int = 20) -> Table:
    """Where the time goes: the slowest operations of models that ran under one setting, side by side.

    An operation has the same name in FP32 and INT8; conversions between them are in one of the two alone. The last row
    is the sum over all operations. Empty without counters.
    """
    nodes = [{node.name: node for node in run.nodes if node.mean_us is not None} for run in runs]
    times = [{name: node.mean_us for name, node in own.items() if node.mean_us is not None} for own in nodes]
    slowest = {name: max(own.get(name, 0.0) for own in times) for own in times for name in own}
    cells = []
    for name in sorted(slowest, key=lambda name: -slowest[name])[:rows]:
        kind = next(own[name].kind for own in nodes if name in own)
        row: list[Any] = [name, kind]
        for own in nodes:
            row += [own[name].mean_us, own[name].precision] if name in own else [None, None]
        cells.append(row)
    if cells:
        cells.append(["all operations", "", *(cell for own in times for cell in (sum(own.values()), None))])
    return Table(
        ["operation", "kind", *(f"{run.model}, {column}" for run in runs for column in ("µs", "precision"))], cells
    )


def benchmark_markdown(b: Benchmark) -> str:
    lines = ["# Benchmark"]
    lines += [
        f"- {s.verdict} ({s.hint} hint, precision {s.precision}){' - unreliable' if s.unreliable else ''}"
        for s in b.speedups
    ]
    lines += [f"- warning: {escape_markdown(line)}" for line in b.warnings]
    lines += ["", run_table(b).markdown()]
    if b.parity:
        lines += ["", "## Do devices agree?", "", parity_table(b).markdown()]
    for (device, hint, precision), runs in by_setting(b).items():
        if (table := operation_table(runs)).rows:
            lines += ["", f"## Where the time goes: {device}, {hint} hint, precision {precision}", "", table.markdown()]
    lines += [
        "",
        "## Machine",
        "",
        *(
            f"- {name}: {escape_markdown(value)}"
            for name, value in machine_facts(b.environment) + condition_facts(b.noise)
        ),
    ]
    return "\n".join(lines) + "\n"
