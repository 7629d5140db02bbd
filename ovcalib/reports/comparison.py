"""Several results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovcalib.records.result import Result
from ovcalib.reports import charts
from ovcalib.reports.provenance import short_paths
from ovcalib.reports.render import FORMATS, render, write
from ovcalib.reports.tables import Table
from ovcalib.reports.verdict import reliable_latency

RESULT_COLUMNS = (
    "model", "source", "images", "mode", "outcome", "seed", "top-1 FP32 %", "top-1 INT8 %", "drop, points", "drop from",
    "drop to", "expected loss, points", "expected from", "expected to", "agreement %", "NMSE", "FP32 MB", "INT8 MB",
    "FP32 p50 ms", "INT8 p50 ms", "speed-up",
)  # fmt: skip


def results_table(results: Sequence[Result], latency: bool = True) -> Table:
    """One line a result."""
    cells = []
    for r in results:
        a, b, e = r.accuracy, reliable_latency(r)[0] if latency else None, r.predicted_loss
        cells.append(
            [
                r.model.name, r.calibration.source, r.calibration.num_samples, r.quantization.mode, r.outcome,
                r.calibration.seed,
                *((100 * a.fp32.top1, 100 * a.int8.top1, a.drop_points, *a.drop_ci95) if a else (None,) * 5),
                *((e.points, *e.interval90) if e else (None,) * 3),
                None if r.agreement.top1 is None else 100 * r.agreement.top1, r.agreement.nmse,
                r.size_bytes.fp32 / 1e6, r.size_bytes.int8 / 1e6,
                *((b.latency_ms["fp32"].p50, b.latency_ms["int8"].p50, b.speedup) if b else (None,) * 3),
            ]
        )  # fmt: skip
    return Table(RESULT_COLUMNS, cells)


# What the page shows beside the name of a result: the figures that decide first.
PAGE_COLUMNS = (
    "drop, points", "drop from", "drop to", "expected loss, points", "agreement %", "NMSE", "INT8 p50 ms", "speed-up",
    "INT8 MB", "top-1 INT8 %", "top-1 FP32 %", "mode", "outcome", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A table of a page, with its heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def name_of(result: Result) -> str:
    """A result in a few words."""
    mode = "" if result.quantization.mode == "default" else f", {result.quantization.mode}"
    return f"{result.model.name}, {short_paths(result.calibration.source)} x {result.calibration.num_samples}{mode}"


def page_table(table: Table, names: Sequence[str]) -> Table:
    """The results by name, with the columns of a page."""
    chosen = [table.columns.index(column) for column in PAGE_COLUMNS]
    rows = [[name, *(cells[i] for i in chosen)] for name, cells in zip(names, table.cells, strict=True)]
    return Table(("model, calibration", *PAGE_COLUMNS), rows)


def drop_chart(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any] | None:
    """Drops of top-1 accuracy with their intervals, over a line at 0."""
    rows = [
        (charts.shortened(name), r.accuracy.drop_points, *r.accuracy.drop_ci95)
        for name, r in zip(names, results, strict=True)
        if r.accuracy
    ]
    if not rows:
        return None
    return {
        "title": "Drop of top-1 accuracy",
        "svg": charts.intervals("Drop of top-1 accuracy, INT8 under FP32", rows, "points", zero=True),
        "caption": "Points that INT8 lies under FP32, with paired 95 % intervals. An interval that contains 0 shows no "
        "measurable difference.",
    }


def tradeoff_chart(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any] | None:
    """Accuracy against latency of both models of every result; None where fewer than two were measured."""
    dots = []
    for name, r in zip(names, results, strict=True):
        latency = reliable_latency(r)[0]
        if r.accuracy and latency:
            for kind, top, ms in (
                ("FP32", r.accuracy.fp32, latency.latency_ms["fp32"]),
                ("INT8", r.accuracy.int8, latency.latency_ms["int8"]),
            ):
                dots.append((f"{kind}: {charts.shortened(name, 32)}", ms.p50, 100 * top.top1))
    if len(dots) < 2:
        return None
    return {
        "title": "Accuracy against latency",
        "svg": charts.scatter("Top-1 accuracy against median latency", dots, "p50 ms", "top-1 %"),
        "caption": "Joined are the models that no other beats in both. Intervals of the accuracies are in the table.",
    }


def write_comparison(
    results: Sequence[Result],
    folder: Path,
    formats: Sequence[str] = FORMATS,
    latency: bool = True,
    *,
    names: Sequence[str] | None = None,
    sections: Sequence[Section] = (),
    failures: Sequence[str] = (),
) -> list[Path]:
    """One page that sets results side by side.

    latency    without it, its columns are empty
    names      of the results; None: model and calibration
    sections   tables that stand before that of the results
    failures   lines on what has no result
    """
    table = results_table(results, latency)
    names = names or [name_of(r) for r in results]
    sets = {r.accuracy.data_sha256 for r in results if r.accuracy}
    notes = (
        ["The accuracies come from different images, so they are not comparable with each other."]
        if len(sets) > 1
        else []
    )
    if not latency:
        notes.append("Latency is left out.")

    def html() -> str:
        found = [drop_chart(results, names), tradeoff_chart(results, names) if latency and len(sets) == 1 else None]
        return render(
            "comparison.html.j2",
            title=f"{len(results)} INT8 results",
            kicker="INT8 comparison",
            heading=f"{len(results)} results side by side",
            lead=f"{len({r.model.name for r in results})} models, {len({r.calibration.source for r in results})} "
            f"calibration sources, {len({r.quantization.mode for r in results})} modes. Every "
            "column of the results sorts.",
            charts=[chart for chart in found if chart],
            sections=sections,
            table=page_table(table, names),
            warnings=notes,
            failures=failures,
            wide=True,
        )

    def markdown() -> str:
        return "\n\n".join([f"# {len(results)} INT8 results", table.markdown(), *notes]) + "\n"

    return write(folder, {"html": html, "md": markdown, "csv": table.csv}, formats)
