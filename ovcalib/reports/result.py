"""The report of a run of `quantize`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovcalib.quantization.expected_noise import MIN_SQNR_DB
from ovcalib.records.base import flags_of
from ovcalib.records.base import shown as shown_as
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.diagnosis import Diagnosis
from ovcalib.records.recipe import STAGES, Recipe
from ovcalib.records.result import Result
from ovcalib.reports import charts
from ovcalib.reports.benchmark import benchmark_context, benchmark_markdown
from ovcalib.reports.comparison import results_table
from ovcalib.reports.diagnosis import diagnosis_context, diagnosis_markdown
from ovcalib.reports.markdown import (
    ARM_COLUMNS,
    agreement_figure,
    arm_rows,
    arms_note,
    markdown_report,
    megabytes,
    output_row,
    quantization_facts,
)
from ovcalib.reports.provenance import (
    MODEL_API,
    calibration_facts,
    images_inside,
    input_facts,
    model_facts,
    snippet,
    without_paths,
)
from ovcalib.reports.render import FORMATS, data_uri, machine_facts, render, tile, write
from ovcalib.reports.tables import Table, shown
from ovcalib.reports.verdict import (
    agreement_note,
    custom_metric,
    execution,
    mean_precision,
    predicted_note,
    reliable_latency,
    result_verdict,
    speedup,
)

CLASSES = 30


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
    command = quantize_command(result.recipe)
    result = without_paths(result)
    calibration, accuracy = result.calibration, result.accuracy
    searched = result.quantization.search
    expected = list(result.quantization.expected_sqnr.items())
    latency, no_latency = reliable_latency(result)
    return render(
        "result.html.j2",
        title=f"{result.model.name} in INT8",
        kicker=f"INT8 report · calibrated with {calibration.source}",
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
        else f"{mean_precision(result.detection)} On {result.detection.protocol}."
        if result.detection
        else f"Accuracy was not measured: {result.accuracy_reason}.",
        agreement_note=agreement_note(result.agreement),
        predicted_note=predicted_note(result),
        custom_note=custom_metric(result.custom_metric) if result.custom_metric else None,
        outputs=Table(
            ["output", "shape", "NMSE", "pixels of the same class"], [*map(output_row, result.agreement.outputs)]
        ),
        classes=class_table(result),
        confusions=confusion_table(result),
        source=calibration.source,
        calibration=calibration_facts(result),
        source_options=[(key, shown(value)) for key, value in calibration.options.items()],
        images_inside=images_inside(result),
        preview=data_uri(preview) if preview and preview.is_file() else None,
        sqnr_chart=charts.profile("Expected SQNR of each layer in INT8", expected, "dB", MIN_SQNR_DB)
        if expected
        else None,
        sqnr_note="Signal to quantization noise of each layer alone, expected from its weights and the calibration "
        f"images. Layers below {MIN_SQNR_DB:g} dB stay in float, unless the guard is off.",
        ways=Table(ARM_COLUMNS, arm_rows(searched)) if searched else None,
        ways_note=arms_note(searched) if searched else None,
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
        else f"Latency is {no_latency}.",
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
        command=command,
        timed=result.quantization.speed is not None,
        recipe=[(key, shown(value)) for key, value in result.recipe.flat().items()],
        # A page cannot hold its own hash.
        files=[(name, digest) for name, digest in sorted(result.files.items()) if not name.startswith("report.")],
        model=model_facts(result),
        input=input_facts(result.model.input) if result.model.input else [],
        snippet=snippet(result.model.input.preprocessing) if result.model.input else None,
        model_api=MODEL_API,
    )


def result_tiles(result: Result, benchmarks: Sequence[Benchmark]) -> list[dict[str, str]]:
    accuracy, size = result.accuracy, result.size_bytes
    latency, no_latency = reliable_latency(result)
    if accuracy:
        half = 50 * (accuracy.int8.ci95[1] - accuracy.int8.ci95[0])
        first = tile(
            "top-1 accuracy", f"{100 * accuracy.fp32.top1:.2f} → {100 * accuracy.int8.top1:.2f} %",
            f"±{half:.2f} points, {accuracy.count} images",
        )  # fmt: skip
    else:
        own = "calibration images" if result.recipe.evaluation.eval is None else "images"
        name, value = agreement_figure(result.agreement)
        first = tile(
            name if result.agreement.top1 is None else "agreement with FP32", value, f"{result.agreement.count} {own}"
        )
    tiles = [first]
    if latency:
        fp32, int8 = latency.latency_ms["fp32"], latency.latency_ms["int8"]
        tiles.append(
            tile("latency p50", f"{fp32.p50:.3g} → {int8.p50:.3g} ms", f"{speedup(latency)} on {latency.device}")
        )
    else:
        tiles.append(tile("latency p50", "-", no_latency.partition(" (")[0]))
    tiles.append(
        tile(
            "size",
            f"{megabytes(size.fp32)} → {megabytes(size.int8)} MB",
            f"{size.fp32 / size.int8:.1f} times smaller" if size.int8 <= size.fp32 else "larger than FP32",
        )
    )
    memory = result.benchmark.memory_bytes if result.benchmark else None
    if memory:
        used = {name: m.peak - m.baseline for name, m in memory.items()}
        tiles.append(
            tile("memory", f"{megabytes(used['fp32'])} → {megabytes(used['int8'])} MB", "peak, over OpenVINO itself")
        )
    else:
        tiles.append(
            tile("memory", "-", (result.benchmark.memory_reason if result.benchmark else None) or "not measured")
        )
    return tiles


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


def quantize_command(recipe: Recipe) -> str:
    """The command line that this recipe is the resolution of; defaults are left out.

    Paths in the current folder are relative.
    """
    words = ["ovcalib", "quantize", recipe.model.reference]
    for stage in STAGES:
        options = getattr(recipe, stage)
        for name, field in type(options).model_fields.items():
            value = getattr(options, name)
            if name == "reference" or value == field.get_default(call_default_factory=True):
                continue
            flag = flags_of(type(options), name)[-1]
            if isinstance(value, dict):
                words += [word for key, text in value.items() for word in (flag, f"{key}={text}")]
            elif shown_as(type(options), name).repeat:
                words += [word for entry in value for word in (flag, entry)]
            elif isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    here = f"{Path.cwd()}{os.sep}"
    return shlex.join(word.replace(here, "") for word in words)
