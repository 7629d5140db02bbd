"""`report.html`, `report.md` and `report.csv` of results, benchmarks, diagnoses and comparisons.

A page is one file that loads nothing: style, script, charts and images are inside. Templates escape everything.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovcalib import __version__
from ovcalib.report import charts
from ovcalib.report.markdown import (
    escape_markdown,
    execution,
    markdown_report,
    megabytes,
    points,
    quantization_facts,
)
from ovcalib.report.tables import Table, shown
from ovcalib.rundir import write_atomically
from ovcalib.types import (
    STEERING_FIELDS,
    Benchmark,
    BenchmarkRun,
    Candidate,
    Diagnosis,
    Noise,
    OperationDiagnosis,
    Recipe,
    Result,
    option_of,
)

FORMATS = ("html", "md", "csv")
# On the page; the JSON and the CSV hold all of them.
RANKED = 12
CLASSES = 30
RANGE_CHARTS = 3

Writers = Mapping[str, Callable[[], str]]


@functools.cache
def _templates() -> Any:
    import jinja2

    def load(name: str) -> str | None:
        file = importlib.resources.files(__package__).joinpath("templates", name)
        return file.read_text() if file.is_file() else None

    return jinja2.Environment(
        autoescape=True, loader=jinja2.FunctionLoader(load), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def render(template: str, **context: Any) -> str:
    from markupsafe import Markup

    files = importlib.resources.files(__package__).joinpath("templates")
    own = {
        "style": Markup(files.joinpath("style.css").read_text()),
        "script": Markup(files.joinpath("sort.js").read_text()),
        "version": __version__,
    }
    return str(_templates().get_template(template).render(**{"created": None, **own, **context}))


def write(folder: Path, writers: Writers, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write report.<format> into a folder, each whole or not at all."""
    written = []
    for form in formats:
        path = folder / f"report.{form}"
        content = writers[form]()
        write_atomically(path, lambda partial, content=content: partial.write_text(content))  # type: ignore[misc]
        written.append(path)
    return written


# A result -------------------------------------------------------------------------------------


def write_result_report(
    result: Result,
    folder: Path,
    formats: Sequence[str] = FORMATS,
    benchmarks: Sequence[Benchmark] = (),
    diagnoses: Sequence[Diagnosis] = (),
    preview: Path | None = None,
) -> list[Path]:
    """The report of a run of `quantize`.

    benchmarks, diagnoses   of the same model, shown on the same page
    preview                 the picture of the calibration set
    """
    writers = {
        "html": lambda: result_page(result, benchmarks, diagnoses, preview),
        "md": lambda: "\n\n".join(
            [markdown_report(result), *map(benchmark_markdown, benchmarks), *map(diagnosis_markdown, diagnoses)]
        ),
        "csv": lambda: results_table([result]).csv(),
    }
    return write(folder, writers, formats)


def result_page(
    result: Result,
    benchmarks: Sequence[Benchmark] = (),
    diagnoses: Sequence[Diagnosis] = (),
    preview: Path | None = None,
) -> str:
    calibration, accuracy, latency = result.calibration, result.accuracy, result.benchmark
    return render(
        "result.html.j2",
        title=f"{result.model.name} in INT8",
        kicker=f"INT8 report · calibrated with {calibration['source']}",
        heading=result.model.name,
        created=result.created,
        verdict=result_verdict(result),
        tiles=result_tiles(result, benchmarks),
        warnings=result.warnings,
        accuracy_chart=charts.intervals(
            "Top-1 accuracy with 95 % intervals",
            [
                (name, 100 * top.top1, 100 * top.ci95[0], 100 * top.ci95[1])
                for name, top in (("FP32", accuracy.fp32), ("INT8", accuracy.int8))
            ],
            "%",
        )
        if accuracy
        else None,
        accuracy_note=f"Top-1 in %, 95 % intervals (Wilson), on {accuracy.protocol}. The drop of "
        f"{accuracy.drop_points:.2f} points has the paired 95 % interval {accuracy.drop_ci95[0]:.2f} to "
        f"{accuracy.drop_ci95[1]:.2f}{execution(accuracy)}."
        if accuracy
        else f"Accuracy was not measured: {result.accuracy_reason}.",
        agreement_note=f"INT8 names the class that FP32 names for {points(result.agreement.top1)} of "
        f"{result.agreement.count} images of {result.agreement.on}; that is agreement, not accuracy. Output error "
        f"(NMSE): {shown(result.agreement.nmse)}{execution(result.agreement)}.",
        classes=class_table(result),
        confusions=confusion_table(result),
        source=calibration["source"],
        calibration=calibration_facts(result),
        preview=data_uri(preview) if preview and preview.is_file() else None,
        quantization=[("outcome", result.outcome), *quantization_facts(result.quantization)],
        latency_chart=charts.steps(
            f"Latency on {latency.device}",
            {name.upper(): (v.edges, v.counts, v.p50) for name, v in latency.latency_ms.items()},
            "ms",
        )
        if latency and all(v.counts for v in latency.latency_ms.values())
        else None,
        latency_note=f"One image at a time on {latency.device}, both models in turns, at the device's defaults; up to "
        "the 99th percentile, each curve to its own peak."
        if latency
        else f"Latency was not measured: {result.benchmark_reason}.",
        latency=Table(
            ["", "p50 ms", "p90 ms", "p99 ms", "mean ms", "min ms", "max ms", "inferences", "float parts in"],
            [
                [name.upper(), v.p50, v.p90, v.p99, v.mean, v.min, v.max, v.n, v.precision]
                for name, v in latency.latency_ms.items()
            ]
            if latency
            else [],
        ),
        benchmarks=[benchmark_context(b) for b in benchmarks],
        diagnoses=[diagnosis_context(d) for d in diagnoses],
        machine=machine_facts(result.environment),
        command=quantize_command(result.recipe),
        recipe=[(key, shown(value)) for key, value in result.recipe.model_dump(mode="json").items()],
        files=sorted(result.files.items()),
    )


def result_verdict(result: Result) -> dict[str, str]:
    """The one sentence that a reader takes away, with its mood: good, bad or unsure."""
    accuracy, latency = result.accuracy, result.benchmark
    if accuracy:
        low, high = accuracy.drop_ci95
        allowed = 100 * result.recipe.max_drop
        text = f"INT8 loses {accuracy.drop_points:.2f} points of top-1 accuracy (95 % interval {low:.2f} to {high:.2f})"
        mood = "good" if high <= allowed else "bad" if low > allowed else "unsure"
        if accuracy.drop_points < 0:
            text = f"INT8 gains {-accuracy.drop_points:.2f} points (95 % interval {-high:.2f} to {-low:.2f})"
    elif result.agreement.top1 is not None:
        text = (
            f"INT8 agrees with FP32 on {points(result.agreement.top1)} of {result.agreement.count} images; "
            "accuracy was not measured"
        )
        mood = "bad" if result.agreement.top1 < 0.9 else "unsure"
    else:
        text, mood = f"Output error (NMSE) {shown(result.agreement.nmse)}; accuracy was not measured", "unsure"
    if result.agreement.emulated:
        text += ", emulated for a CPU other than this one"
    if latency:
        text += f", and is {latency.speedup:.2f} times as fast on {latency.device}"
        mood = "unsure" if latency.speedup < 1 and mood == "good" else mood
    if result.outcome == "goal-missed":
        text, mood = f"The accuracy goal was missed. {text}", "bad"
    if result.outcome == "budget":
        text, mood = f"The budget ran out before the goal was reached. {text}", "bad"
    return {"text": f"{text}.", "css": mood}


def result_tiles(result: Result, benchmarks: Sequence[Benchmark]) -> list[dict[str, str]]:
    accuracy, latency, size = result.accuracy, result.benchmark, result.size_bytes
    if accuracy:
        half = 50 * (accuracy.int8.ci95[1] - accuracy.int8.ci95[0])
        first = tile(
            "top-1 accuracy", f"{100 * accuracy.fp32.top1:.2f} → {100 * accuracy.int8.top1:.2f} %",
            f"±{half:.2f} points, {accuracy.count} images",
        )  # fmt: skip
    else:
        first = tile("agreement with FP32", points(result.agreement.top1), f"{result.agreement.count} images")
    tiles = [first]
    if latency:
        fp32, int8 = latency.latency_ms["fp32"], latency.latency_ms["int8"]
        tiles.append(
            tile("latency p50", f"{fp32.p50:.3g} → {int8.p50:.3g} ms", f"{latency.speedup:.2f}x on {latency.device}")
        )
    else:
        tiles.append(tile("latency p50", "-", result.benchmark_reason or "not measured"))
    tiles.append(
        tile(
            "size",
            f"{megabytes(size.fp32)} → {megabytes(size.int8)} MB",
            f"{size.fp32 / size.int8:.1f} times smaller" if size.int8 <= size.fp32 else "larger than FP32",
        )
    )
    memory = latency.memory_bytes if latency else None
    if memory:
        used = {name: m.peak - m.baseline for name, m in memory.items()}
        tiles.append(
            tile("memory", f"{megabytes(used['fp32'])} → {megabytes(used['int8'])} MB", "peak, over OpenVINO itself")
        )
    else:
        tiles.append(tile("memory", "-", (latency.memory_reason if latency else None) or "not measured"))
    return tiles


def tile(name: str, value: str, note: str) -> dict[str, str]:
    # A number keeps its unit on its line.
    return {"name": name, "value": value.replace(" %", "\u00a0%").replace(" M", "\u00a0M"), "note": note}


def calibration_facts(result: Result) -> list[tuple[str, str]]:
    """The calibration statement; a score is there when the source gave one."""
    c = result.calibration
    facts = [
        ("source", c["source"]),
        ("images", f"{c['num_samples']} of {c['requested']} asked for"),
        ("seed", c["seed"]),
        ("licence of the images", c.get("licence") or "not stated"),
        ("labels", c.get("labels") or "none"),
        ("domain", {"pixels": "8-bit pixels", "network": "network inputs"}.get(c["domain"], c["domain"])),
        ("made in", f"{c['seconds']:.1f} s"),
        *((key, shown(value)) for key, value in c.get("options", {}).items()),
    ]
    score = c.get("score")
    if isinstance(score, Mapping):
        facts += [(f"score: {key}", shown(value)) for key, value in score.items() if not isinstance(value, list | dict)]
    elif score is not None:
        facts.append(("score", shown(score)))
    return [(name, str(value)) for name, value in facts]


def class_table(result: Result) -> Any:
    """Accuracy by class, largest drop first; on the page the first CLASSES of them."""
    per_class = result.accuracy.per_class if result.accuracy else ()
    worst = sorted(per_class, key=lambda c: (c.int8_top1 - c.fp32_top1, c.label))
    lost = sum(c.int8_top1 < c.fp32_top1 for c in per_class)
    note = f"{lost} of {len(per_class)} lose accuracy"
    if len(worst) > CLASSES:
        note += f"; the {CLASSES} that lose most"
    table = Table(
        ["class", "images", "FP32 %", "INT8 %", "change, points"],
        [
            [c.name or str(c.label), c.count, 100 * c.fp32_top1, 100 * c.int8_top1, 100 * (c.int8_top1 - c.fp32_top1)]
            for c in worst[:CLASSES]
        ],
    )
    return {"columns": table.columns, "rows": table.rows, "note": note}


def confusion_table(result: Result) -> Table:
    confusions = result.accuracy.confusions if result.accuracy else ()
    return Table(
        ["class", "taken for", "FP32", "INT8"],
        [
            [c.name or str(c.label), c.predicted_name or str(c.predicted), c.fp32, c.int8]
            for c in confusions
        ],
    )  # fmt: skip


def machine_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = environment.get("versions", {})
    return [
        ("processor", str(environment.get("cpu") or "unknown")),
        ("instruction set", str(environment.get("isa") or "unknown")),
        ("CPUs", str(environment.get("cpus"))),
        ("memory", f"{environment['memory_gib']:g} GiB" if environment.get("memory_gib") else "unknown"),
        ("virtual machine", "yes" if environment.get("virtual_machine") else "no"),
        ("system", str(environment.get("system"))),
        ("devices", ", ".join(f"{k}: {v}" for k, v in environment.get("devices", {}).items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
    ]


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


def quantize_command(recipe: Recipe) -> str:
    """The command line that this recipe is the resolution of; defaults are left out."""
    words = ["ovcalib", "quantize", recipe.model]
    silent = {"model", *(STEERING_FIELDS if recipe.mode == "default" else ())}
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if name in silent or value == field.default:
            continue
        option = option_of(name)
        if name == "options":
            for key, text in value.items():
                words += ["-O", f"{key}={text}"]
        elif name == "ignore":
            for pattern in value:
                words += [option, pattern]
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def data_uri(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


# Several results ------------------------------------------------------------------------------

RESULT_COLUMNS = (
    "model", "source", "images", "mode", "outcome", "seed", "top-1 FP32 %", "top-1 INT8 %", "drop, points", "drop from",
    "drop to", "agreement %", "NMSE", "FP32 MB", "INT8 MB", "FP32 p50 ms", "INT8 p50 ms", "speed-up",
)  # fmt: skip


def results_table(results: Sequence[Result], latency: bool = True) -> Table:
    """One line a result."""
    cells = []
    for r in results:
        a, b = r.accuracy, r.benchmark if latency else None
        cells.append(
            [
                r.model.name, r.calibration["source"], r.calibration["num_samples"], r.quantization.mode, r.outcome,
                r.calibration["seed"],
                *((100 * a.fp32.top1, 100 * a.int8.top1, a.drop_points, *a.drop_ci95) if a else (None,) * 5),
                None if r.agreement.top1 is None else 100 * r.agreement.top1, r.agreement.nmse,
                r.size_bytes.fp32 / 1e6, r.size_bytes.int8 / 1e6,
                *((b.latency_ms["fp32"].p50, b.latency_ms["int8"].p50, b.speedup) if b else (None,) * 3),
            ]
        )  # fmt: skip
    return Table(RESULT_COLUMNS, cells)


def write_comparison(
    results: Sequence[Result], folder: Path, formats: Sequence[str] = FORMATS, latency: bool = True
) -> list[Path]:
    """One page that sets results side by side; without `latency` its columns are empty."""
    table = results_table(results, latency)
    sets = {r.accuracy.data_sha256 for r in results if r.accuracy}
    notes = (
        ["The accuracies come from different images, so they are not comparable with each other."]
        if len(sets) > 1
        else []
    )
    if not latency:
        notes.append("Latency is left out.")

    def html() -> str:
        proven = [r for r in results if r.accuracy]
        return render(
            "comparison.html.j2",
            title=f"{len(results)} INT8 results",
            kicker="INT8 comparison",
            heading=f"{len(results)} results side by side",
            lead=f"{len({r.model.name for r in results})} models, {len({r.calibration['source'] for r in results})} "
            f"calibration sources, {len({r.quantization.mode for r in results})} modes. Every column sorts.",
            chart=charts.bars(
                "Drop of top-1 accuracy",
                [
                    (charts.shortened(f"{r.model.name}, {r.calibration['source']}, {r.quantization.mode}"),
                     max(r.accuracy.drop_points, 0.0))
                    for r in proven if r.accuracy
                ],
                "points",
            )
            if proven
            else None,
            table=table,
            warnings=notes,
        )  # fmt: skip

    def markdown() -> str:
        return "\n\n".join([f"# {len(results)} INT8 results", table.markdown(), *notes]) + "\n"

    return write(folder, {"html": html, "md": markdown, "csv": table.csv}, formats)


# A diagnosis ----------------------------------------------------------------------------------


def write_diagnosis_report(diagnosis: Diagnosis, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    writers = {
        "html": lambda: diagnosis_page(diagnosis),
        "md": lambda: diagnosis_markdown(diagnosis),
        "csv": lambda: operation_table(diagnosis).csv(),
    }
    return write(folder, writers, formats)


def diagnosis_page(d: Diagnosis) -> str:
    worst = d.operations[0]
    clipped = max((entry.clipped_share[d.on] for entry in worst.inputs), default=0.0)
    tiles = [
        tile(
            metric_name(d),
            f"{metric(d, d.fp32).removesuffix(' %')} → {metric(d, d.int8)}",
            f"FP32 → INT8, {d.count} images",
        ),
        tile("most harmful", worst.name, f"{worst.kind}, alone {worst.alone.sqnr_db:.1f} dB"),
        tile("its input clipped", f"{100 * clipped:.2f} %", f"of the values on {charts.shortened(d.on, 30)}"),
    ]
    if d.suggested is not None:
        best = d.candidates[d.suggested]
        tiles.append(
            tile(
                "back in float",
                f"{len(best.in_float)} operations",
                f"{metric_name(d)} {metric(d, best)}{price(d, best)}",
            )
        )
    return render(
        "diagnosis.html.j2",
        title=f"Diagnosis of {d.model}",
        kicker="INT8 diagnosis",
        heading=d.model,
        created=d.created,
        verdict=diagnosis_verdict(d),
        tiles=tiles,
        warnings=d.warnings,
        d=diagnosis_context(d),
    )


def diagnosis_verdict(d: Diagnosis) -> dict[str, str]:
    name = d.operations[0].name
    text = f"{metric_name(d).capitalize()} goes from {metric(d, d.fp32)} to {metric(d, d.int8)}; most harm: {name}"
    before, after = getattr(d.fp32, d.metric), getattr(d.int8, d.metric)
    lost = None if before is None or after is None else (after - before if d.metric == "nmse" else before - after)
    return {"text": f"{text}.", "css": "bad" if lost is None or lost > d.max_drop else "good"}


def metric_name(d: Diagnosis) -> str:
    return {"top1": "top-1 accuracy", "agreement": "agreement", "nmse": "output error (NMSE)"}[d.metric]


def metric(d: Diagnosis, candidate: Candidate) -> str:
    value = getattr(candidate, d.metric)
    return shown(value) if d.metric == "nmse" else points(value)


def price(d: Diagnosis, candidate: Candidate) -> str:
    """What a candidate costs in latency, as words."""
    if candidate.latency_p50_ms is None or d.int8.latency_p50_ms is None:
        return ""
    return f", {candidate.latency_p50_ms - d.int8.latency_p50_ms:+.2g} ms"


def worth(d: Diagnosis, candidate: Candidate) -> str:
    """What a candidate gives and costs, in words."""
    count = len(candidate.in_float)
    return f"{count} operations in float give {metric_name(d)} {metric(d, candidate)}{price(d, candidate)}"


def ignore_options(candidate: Candidate) -> str:
    """The operations of a candidate as options of `ovcalib quantize`; wildcard characters stand for themselves."""
    words: list[str] = []
    for name in candidate.in_float:
        words += ["--ignore", "".join(f"[{c}]" if c in "*?[" else c for c in name)]
    return shlex.join(words)


def diagnosis_context(d: Diagnosis) -> dict[str, Any]:
    best = d.candidates[d.suggested] if d.suggested is not None else None
    return {
        "lead": f"Signals were compared on {d.signal_count} images of {d.on}, the outcome on {d.count}. "
        f"Ranges of the FP32 activations are shown under: {', '.join(d.sets)}.",
        "faults": d.faults,
        "ranges": range_charts(d),
        "ranking": charts.bars(
            "Output error by operation",
            [(f"{o.name} ({o.kind})", o.output_nmse or 0.0) for o in d.operations[:RANKED]],
            "NMSE",
            logarithmic=True,
        ),
        "candidates": candidate_table(d),
        "operations": operation_table(d),
        "ignore": ignore_options(best) if best else None,
        "ignore_note": worth(d, best) if best else None,
    }


def range_charts(d: Diagnosis) -> list[dict[str, Any]]:
    """Histograms of the worst input of the most harmful operations, each source once."""
    found: dict[str, dict[str, Any]] = {}
    for operation in d.operations:
        for entry in sorted(operation.inputs, key=lambda e: -e.clipped_share[d.on])[:1]:
            if entry.source in found or len(found) == RANGE_CHARTS:
                continue
            channel = entry.worst_channel
            low, high = (channel.low, channel.high) if channel else (entry.low, entry.high)
            which = f", channel {channel.channel} (the worst of them)" if channel else ""
            found[entry.source] = {
                "chart": charts.ranges(f"Input of {operation.name}", entry.edges, entry.counts, low, high),
                "caption": f"What {operation.name} reads from {entry.source}{which}, in FP32. The band is the "
                f"quantized range {low:.3g} to {high:.3g}; what lies outside is clipped. Counts are logarithmic.",
            }
    return list(found.values())


def candidate_table(d: Diagnosis) -> Table:
    rows = [("none (INT8)", d.int8), *((str(len(c.in_float)), c) for c in d.candidates), ("all (FP32)", d.fp32)]
    return Table(
        ["back in float", "top-1 %", "agreement %", "NMSE", "p50 ms"],
        [
            [name, None if c.top1 is None else 100 * c.top1, None if c.agreement is None else 100 * c.agreement, c.nmse,
             c.latency_p50_ms]
            for name, c in rows
        ],
    )  # fmt: skip


def operation_table(d: Diagnosis) -> Table:
    def cells(o: OperationDiagnosis) -> list[Any]:
        worst = max(o.inputs, key=lambda e: e.clipped_share[d.on], default=None)
        return [
            o.name, o.kind, o.output_nmse, o.alone.sqnr_db, o.weights.sqnr_db if o.weights else None,
            o.activations.sqnr_db if o.activations else None, o.cumulative.sqnr_db, o.alone.cosine, o.cumulative.cosine,
            *((100 * worst.clipped_share[d.on], 100 * worst.used_share[d.on], worst.low, worst.high, *worst.seen[d.on])
              if worst else (None,) * 6),
        ]  # fmt: skip

    return Table(
        ["operation", "type", "output NMSE", "alone dB", "weights dB", "activations dB", "cumulative dB",
         "alone cosine", "cumulative cosine", "clipped %", "range used %", "range from", "range to",
         "seen from", "seen to"],
        [cells(o) for o in d.operations],
    )  # fmt: skip


def diagnosis_markdown(d: Diagnosis) -> str:
    context = diagnosis_context(d)
    lines = [
        f"# Diagnosis of {escape_markdown(d.model)}",
        f"**{escape_markdown(diagnosis_verdict(d)['text'])}** {escape_markdown(context['lead'])}",
        "\n".join(f"- {escape_markdown(line)}" for line in d.faults),
        "## What restoring operations gives back",
        candidate_table(d).markdown(),
    ]
    if context["ignore"]:
        lines += [f"{escape_markdown(context['ignore_note'])}:", f"    {context['ignore']}"]
    lines += ["## Operations, most harmful first", operation_table(d).markdown()]
    return "\n\n".join(line for line in lines if line) + "\n"


# A benchmark ----------------------------------------------------------------------------------


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


def benchmark_context(b: Benchmark) -> dict[str, Any]:
    groups: dict[tuple[str, str, str], list[BenchmarkRun]] = {}
    for run in b.runs:
        groups.setdefault((run.device, run.hint, run.precision), []).append(run)
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
