"""Tables of a sweep: mean and spread over seeds, and which source is best where that can be told."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from ovcalib.evaluation.metrics import t95, wilson_interval
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.result import Result
from ovcalib.reports.comparison import Section, write_comparison
from ovcalib.reports.markdown import mode as mode_of
from ovcalib.reports.tables import Table, escape_markdown

if TYPE_CHECKING:
    from ovcalib.records.sweep import Sweep, SweepCell

Better = Literal["less", "more"]

# Numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    std         sample standard deviation over the seeds; None for one seed
    low, high   95 % interval of the mean; None where nothing tells it
    count       seeds
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float], half_widths: Sequence[float] = ()) -> Estimate:
    """Mean and 95 % interval of one value a seed.

    half_widths   of the 95 % interval that each value has by itself, from its evaluation images. All seeds see the
                  same images, so this part does not shrink with their number; it is added to the spread over seeds in
                  quadrature.
    """
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 else None
    parts = [statistics.fmean(half_widths)] if half_widths else []
    if std is not None:
        parts.append(t95(len(values) - 1) * std / math.sqrt(len(values)))
    half = math.hypot(*parts) if parts else None
    return Estimate(
        mean, std, None if half is None else mean - half, None if half is None else mean + half, len(values)
    )


def best(column: Sequence[Estimate | None], better: Better) -> int | None:
    """Position of the value whose interval lies apart from all others, on the better side; None where there is none."""
    rivals = [(i, e) for i, e in enumerate(column) if e is not None]
    if len(rivals) < 2 or any(e.low is None or e.high is None for _, e in rivals):
        return None
    sign = 1 if better == "less" else -1
    intervals = {i: sorted((sign * e.low, sign * e.high)) for i, e in rivals}  # type: ignore[operator]
    winner = min(intervals, key=lambda i: intervals[i][1])
    apart = all(intervals[winner][1] < low for i, (low, _) in intervals.items() if i != winner)
    return winner if apart else None


# What is tabled -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A number of every result.

    value    of a result and its benchmark; None where it was not measured
    half     half the width of its own 95 % interval, or None
    better   which side is; None: neither, and nothing is marked
    """

    title: str
    value: Callable[[Result, Benchmark | None], float | None]
    half: Callable[[Result], float | None] = lambda result: None
    better: Better | None = None


def _half_drop(result: Result) -> float | None:
    if result.accuracy is None:
        return None
    low, high = result.accuracy.drop_ci95
    return (high - low) / 2


def _relative(result: Result, points: float | None) -> float | None:
    """Points as per cent of the FP32 accuracy."""
    if points is None or result.accuracy is None or result.accuracy.fp32.top1 == 0:
        return None
    return points / result.accuracy.fp32.top1


def _half_agreement(result: Result) -> float | None:
    agreement = result.agreement
    if agreement.top1 is None:
        return None
    low, high = wilson_interval(round(agreement.top1 * agreement.count), agreement.count)
    return 50 * (high - low)


DROP = Metric(
    "Drop of top-1 accuracy, points", lambda r, b: r.accuracy.drop_points if r.accuracy else None, _half_drop, "less"
)
RELATIVE = Metric(
    "Drop of top-1 accuracy, % of FP32",
    lambda r, b: _relative(r, r.accuracy.drop_points if r.accuracy else None),
    lambda r: _relative(r, _half_drop(r)),
    "less",
)
AGREEMENT = Metric(
    "Agreement with FP32, %",
    lambda r, b: None if r.agreement.top1 is None else 100 * r.agreement.top1,
    _half_agreement,
    "more",
)
NMSE = Metric("Output error (NMSE)", lambda r, b: r.agreement.nmse, better="less")
REVERTED = Metric("Operations reverted to float", lambda r, b: float(len(r.quantization.reverted)))
SECONDS = Metric("Seconds of quantization, with other cells at work", lambda r, b: r.quantization.seconds)
FP32 = Metric("FP32 top-1, %", lambda r, b: 100 * r.accuracy.fp32.top1 if r.accuracy else None)


def speedup(device: str) -> Metric:
    """Median latency of FP32 over that of INT8; an unreliable one is left out."""

    def value(result: Result, benchmark: Benchmark | None) -> float | None:
        found = [s.speedup for s in benchmark.speedups if s.device == device and not s.unreliable] if benchmark else []
        return found[0] if found else None

    return Metric(f"Speed-up on {device}, one image at a time", value, better="more")


def metrics_of(sweep: Sweep, mode: str) -> list[Metric]:
    """The metrics that a mode has."""
    chosen = [DROP, RELATIVE] if sweep.recipe.eval else []
    chosen += [AGREEMENT, NMSE]
    if mode == "accuracy-aware":
        chosen += [REVERTED, SECONDS]
    if mode != "simulated":  # whose latency is that of float
        chosen += [speedup(device) for device in sweep.recipe.timed_devices]
    return chosen


def described(sweep: Sweep, mode: str, results: Mapping[str, Result]) -> str:
    """The name of a mode, with the bits that it simulates."""
    done = (results[cell.key] for cell in sweep.cells if cell.mode == mode and cell.key in results)
    return next((mode_of(result.quantization) for result in done), mode)


# Tables ---------------------------------------------------------------------------------------

Results = Mapping[str, Result]
Benchmarks = Mapping[str, Benchmark]


def over_seeds(cells: Sequence[SweepCell], metric: Metric, results: Results, benchmarks: Benchmarks) -> Estimate | None:
    """A metric over the finished ones of some cells; None where none has it."""
    done = [results[cell.key] for cell in cells if cell.key in results]
    found = [metric.value(results[c.key], benchmarks.get(c.key)) for c in cells if c.key in results]
    values = [value for value in found if value is not None and math.isfinite(value)]
    if not values or len(values) < len(found):
        return None  # a mean over some of the seeds would hide those that broke
    halves = [half for half in map(metric.half, done) if half is not None]
    return estimate(values, halves)


def group(sweep: Sweep, model: str, source: str, mode: str) -> list[SweepCell]:
    """The cells that differ in their seed alone."""
    return [c for c in sweep.cells if (c.model, c.source, c.mode) == (model, source, mode)]


def state_of(cells: Sequence[SweepCell]) -> str:
    """Why some cells have no number: "failed" or "not run"; empty where one is done."""
    states = {cell.state for cell in cells}
    return "" if "done" in states else "failed" if "failed" in states else "not run"


def shown_estimate(value: Estimate | None, cells: Sequence[SweepCell]) -> str:
    """Mean ± standard deviation over seeds, or why there is no number."""
    if value is None:
        return state_of(cells) or "-"
    text = f"{_digits(value.mean)}" + (f" ± {_digits(value.std)}" if value.std is not None else "")
    return f"{text} ({value.count} of {len(cells)} seeds)" if value.count < len(cells) else text


def _digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


@dataclass(frozen=True)
class MetricTable:
    """A metric of one mode, sources down, models across.

    rows   the source, then (text, whether it is the best of its column, where that can be told) for each model
    """

    title: str
    models: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, bool]]]]

    def markdown(self) -> str:
        """The best of a column in bold."""
        lines = [["source", *map(escape_markdown, self.models)], ["---"] * (1 + len(self.models))]
        lines += [
            [escape_markdown(source), *(f"**{text}**" if marked else text for text, marked in cells)]
            for source, cells in self.rows
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def section(self, heading: str) -> Section:
        """The same for a page."""
        strong = Markup("<strong>{}</strong>")
        rows = [
            [source, *(strong.format(text) if marked else text for text, marked in cells)]
            for source, cells in self.rows
        ]
        return Section(heading, ["source", *self.models], rows)


def metric_table(sweep: Sweep, mode: str, metric: Metric, results: Results, benchmarks: Benchmarks) -> MetricTable:
    """Means and spreads over seeds."""
    sources = [source.label for source in sweep.recipe.sources]
    rows: list[tuple[str, list[tuple[str, bool]]]] = [(source, []) for source in sources]
    for model in sweep.recipe.models:
        groups = [group(sweep, model.label, source, mode) for source in sources]
        column = [over_seeds(cells, metric, results, benchmarks) for cells in groups]
        marked = best(column, metric.better) if metric.better else None
        for i, (value, cells) in enumerate(zip(column, groups, strict=True)):
            rows[i][1].append((shown_estimate(value, cells), i == marked))
    return MetricTable(metric.title, [model.label for model in sweep.recipe.models], rows)


NOTES = (
    "Mean ± standard deviation over seeds; one seed has no spread. Bold is the best of a column, marked only where its "
    "95 % interval overlaps no other. That interval holds the spread over seeds (Student's t) and, for accuracy and "
    "agreement, what the number of evaluation images leaves open. Agreement is how often INT8 names the class that "
    "FP32 names; it is not accuracy."
)


def markdown_report(sweep: Sweep, results: Results, benchmarks: Benchmarks) -> str:
    """`report.md` of a sweep."""
    done = sum(cell.state == "done" for cell in sweep.cells)
    recipe = sweep.recipe
    lines = [
        "# Sweep",
        "",
        f"{len(recipe.models)} models x {len(recipe.sources)} calibration sources x "
        f"{len(recipe.modes)} modes x {len(recipe.seeds)} seeds: {done} of {len(sweep.cells)} cells are done, "
        f"{len(sweep.failed)} failed. Seeds: {', '.join(map(str, recipe.seeds))}.",
        "",
        NOTES,
    ]
    protocols = sorted({r.accuracy.protocol for r in results.values() if r.accuracy})
    lines += [f"\nAccuracy was measured on {escape_markdown(protocol)}." for protocol in protocols]
    for mode in sweep.recipe.modes:
        lines += ["", f"## Mode {described(sweep, mode, results)}"]
        for metric in metrics_of(sweep, mode):
            lines += ["", f"### {metric.title}", "", metric_table(sweep, mode, metric, results, benchmarks).markdown()]
    if sweep.failed:
        lines += ["", "## Failed cells", ""]
        lines += [f"- {escape_markdown(name)}: {escape_markdown(error)}" for name, error in failures(sweep)]
    return "\n".join(lines) + "\n"


def write_page(folder: Path, sweep: Sweep, results: Results, benchmarks: Benchmarks) -> None:
    """report.html of a sweep: the tables, then every cell by the names of the recipe."""
    cells = [cell for cell in sweep.cells if cell.key in results]
    names = [f"{c.model}, {c.source}, {c.mode}, seed {c.seed}" for c in cells]
    sections = [
        metric_table(sweep, mode, metric, results, benchmarks).section(
            f"{metric.title} ({described(sweep, mode, results)})"
        )
        for mode in sweep.recipe.modes
        for metric in metrics_of(sweep, mode)
    ]
    write_comparison(
        [results[c.key] for c in cells], folder, ("html",), latency=False, names=names, sections=sections,
        failures=[f"{name}: {error}" for name, error in failures(sweep)],
    )  # fmt: skip


def failures(sweep: Sweep) -> list[tuple[str, str]]:
    """(model, source, mode and seed; error) of the failed cells, one line for those of a model that failed alike."""
    together: dict[tuple[str, str], list[SweepCell]] = {}
    for cell in sweep.failed:
        together.setdefault((cell.model, cell.error or ""), []).append(cell)
    return [
        (
            f"{model}, {len(cells)} cells"
            if len(cells) > 1
            else f"{model}, {cells[0].source}, {cells[0].mode}, seed {cells[0].seed}",
            error,
        )
        for (model, error), cells in together.items()
    ]


def csv_report(sweep: Sweep, results: Results, benchmarks: Benchmarks) -> str:
    """`report.csv`: one line for each model, source and mode, with all digits."""
    metrics = list({m.title: m for mode in sweep.recipe.modes for m in (FP32, *metrics_of(sweep, mode))}.values())
    columns = ["model", "source", "mode", "seeds", "done", "failed"]
    columns += [f"{metric.title}: {part}" for metric in metrics for part in ("mean", "std", "from", "to")]
    rows = []
    for model in sweep.recipe.models:
        for source in sweep.recipe.sources:
            for mode in sweep.recipe.modes:
                cells = group(sweep, model.label, source.label, mode)
                states = [cell.state for cell in cells]
                row = [model.label, source.label, mode, len(cells), states.count("done"), states.count("failed")]
                for metric in metrics:
                    found = over_seeds(cells, metric, results, benchmarks)
                    row += [None] * 4 if found is None else [found.mean, found.std, found.low, found.high]
                rows.append(row)
    return Table(columns, rows).csv()
