"""The report of a diagnosis."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovcalib.graph.reading import literal_pattern
from ovcalib.records.diagnosis import Candidate, Diagnosis, Metrics, OperationDiagnosis
from ovcalib.reports import charts
from ovcalib.reports.render import FORMATS, render, tile, write
from ovcalib.reports.tables import Table, escape_markdown, shown
from ovcalib.reports.verdict import points

# On the page; the JSON and the CSV hold all of them.
RANKED = 12

RANGE_CHARTS = 3


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


def metric(d: Diagnosis, found: Metrics) -> str:
    value = getattr(found, d.metric)
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


def remedy_lines(d: Diagnosis) -> list[tuple[str, str]]:
    """What was tried against the loss and what came of it, and the command that does it; the best one last."""
    order = sorted(range(len(d.remedies)), key=lambda i: i == d.remedy)
    return [
        (
            f"{'mends it' if i == d.remedy else 'tried'}: {metric_name(d)} {metric(d, d.remedies[i])} "
            f"(INT8 as it is {metric(d, d.int8)}, FP32 {metric(d, d.fp32)})",
            d.remedies[i].command,
        )
        for i in order
    ]


def ignore_options(candidate: Candidate) -> str:
    """The operations of a candidate as options of `ovcalib quantize`; wildcard characters stand for themselves."""
    words: list[str] = []
    for name in candidate.in_float:
        words += ["--ignore", literal_pattern(name)]
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
        "remedies": remedy_lines(d),
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
    if d.remedies:
        lines.append("## Quantizing again")
    for note, command in remedy_lines(d):
        lines += [f"{escape_markdown(note)}:", f"    {command}"]
    lines += ["## Operations, most harmful first", operation_table(d).markdown()]
    return "\n\n".join(line for line in lines if line) + "\n"
