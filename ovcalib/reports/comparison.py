"""Several results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ovcalib.records.result import Result
from ovcalib.reports import charts
from ovcalib.reports.render import FORMATS, render, write
from ovcalib.reports.tables import Table
from ovcalib.reports.verdict import reliable_latency

RESULT_COLUMNS = (
    "model", "source", "images", "mode", "outcome", "seed", "top-1 FP32 %", "top-1 INT8 %", "drop, points", "drop from",
    "drop to", "agreement %", "NMSE", "FP32 MB", "INT8 MB", "FP32 p50 ms", "INT8 p50 ms", "speed-up",
)  # fmt: skip


def results_table(results: Sequence[Result], latency: bool = True) -> Table:
    """One line a result."""
    cells = []
    for r in results:
        a, b = r.accuracy, reliable_latency(r)[0] if latency else None
        cells.append(
            [
                r.model.name, r.calibration.source, r.calibration.num_samples, r.quantization.mode, r.outcome,
                r.calibration.seed,
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
            lead=f"{len({r.model.name for r in results})} models, {len({r.calibration.source for r in results})} "
            f"calibration sources, {len({r.quantization.mode for r in results})} modes. Every column sorts.",
            chart=charts.bars(
                "Drop of top-1 accuracy",
                [
                    (charts.shortened(f"{r.model.name}, {r.calibration.source}, {r.quantization.mode}"),
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
