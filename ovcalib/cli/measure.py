"""`ovcalib evaluate`, `benchmark`, `diagnose` and `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovcalib.cli.options import Common, Option, add_command
from ovcalib.cli.plan import show
from ovcalib.cli.quantize import warn
from ovcalib.cli.tables import print_table
from ovcalib.errors import DeviceError, UsageError
from ovcalib.records.base import Shown, checked
from ovcalib.records.options import BenchmarkOptions, DiagnosisOptions, EvaluateOptions, ModelOptions

if TYPE_CHECKING:
    from ovcalib.records.benchmark import Benchmark

# Finished files contain their weights.
OF_FILES = ("reference", "weights", "trust_remote_code", "dynamic_batch")
FORMATS = ("html", "md", "csv")


def evaluate(given: dict[str, Any], common: Common) -> None:
    """Measure the accuracy of a model on labelled images, or the mean average precision of a detector."""
    from ovcalib import api
    from ovcalib.reports.verdict import points

    found = api.evaluate(given.pop("model"), given.pop("data"), progress=common.progress, **given)
    warn((found.fault,) if found.fault else (), common)
    if common.as_json:
        print(found.model_dump_json(indent=2))
        return
    row = {"model": found.model}
    if found.accuracy is not None:
        low, high = found.accuracy.ci95
        row |= {
            "top-1": points(found.accuracy.top1),
            "95 % interval": f"{points(low)} to {points(high)}",
            "top-5": points(found.accuracy.top5),
        }
    if found.detection is not None:
        row |= {"mAP": points(found.detection.map), "AP50": points(found.detection.map50), "boxes": str(found.boxes)}
    row |= {"images": str(found.count), "device": f"{found.device} {found.precision or 'default'}"}
    print_table([row])
    print(f"\nmeasured on {found.protocol}")


def benchmark(given: dict[str, Any], common: Common) -> int:
    """Measure speed and memory of models, and prove that INT8 ran.

    Every model runs in a process of its own, in turns with the others. Needs the base installation alone.

    MODEL is FILE.xml or FILE.onnx, or a result folder, which stands for its FP32 and INT8 models.
    """
    from ovcalib import api

    target = common.target("benchmark")
    if common.dry_run:
        from ovcalib.rehearsal import plan_benchmark

        models = given.pop("models")
        asked = checked(BenchmarkOptions, api.model_options("", given)[1])
        return show(plan_benchmark(models, asked, target, common.overwrite, common.progress), common)
    found = api.benchmark(given.pop("models"), target, overwrite=common.overwrite, progress=common.progress, **given)
    doubts = dict.fromkeys(reason for run in found.runs for reason in run.unreliable)
    warn((*found.warnings, *doubts), common)
    if common.as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_benchmark(found)
        print(f"\nwrote {target / 'report.html'}")
    for entry in found.parity:
        if not entry.agrees:
            print(
                f"error: {entry.model} on {entry.device} ({entry.precision}) disagrees with CPU in f32: correlation "
                f"{entry.correlation}, same class {entry.agreement}. Try --precision f32.",
                file=sys.stderr,
            )
    return 0 if all(entry.agrees for entry in found.parity) else DeviceError.exit_code


def print_benchmark(found: Benchmark) -> None:
    """The runs as a table, the slowest operations where they were counted, and the verdicts."""
    from ovcalib.reports.benchmark import by_setting, operation_table

    print_table(
        [
            {
                "model": r.model,
                "device": r.device,
                "hint": r.hint,
                "precision": f"{r.precision} ({r.effective.get('INFERENCE_PRECISION_HINT', '-')})",
                "p50 ms": f"{r.latency_ms.p50:.4g}",
                "p99 ms": f"{r.latency_ms.p99:.4g}",
                "images/s": f"{r.throughput_fps:.4g}",
                "INT8 layers": f"{r.int8_nodes}/{sum(r.compute_nodes.values())}",
                "peak MB": f"{r.memory_bytes.peak / 1e6:.0f}" if r.memory_bytes else "-",
                "reliable": "no" if r.unreliable else "yes",
            }
            for r in found.runs
        ]
    )
    for runs in by_setting(found).values():
        operations = operation_table(runs, rows=12)
        if operations.rows:
            print()
            print_table([dict(zip(operations.columns, row, strict=True)) for row in operations.rows])
    print()
    for s in found.speedups:
        print(f"{s.hint}, {s.precision}: {s.verdict}{' (unreliable)' if s.unreliable else ''}")


def diagnose(given: dict[str, Any], common: Common) -> None:
    """Find the operations with which INT8 loses accuracy.

    Shows the error of every quantized operation, the ranges behind it, and what to leave in float. Where INT8 loses
    more than --max-drop, the model is quantized again with the first --calib, and the command that mends it is shown
    with what it gives back. FP32 is FILE.xml or FILE.onnx; INT8 is FILE.xml, quantized from it.
    """
    from ovcalib import api
    from ovcalib.reports.diagnosis import candidate_table, ignore_options, operation_table, remedy_lines

    target = common.target("diagnosis")
    found = api.diagnose(
        given.pop("fp32"), given.pop("int8"), target, overwrite=common.overwrite, progress=common.progress, **given
    )
    warn(found.warnings, common)
    if common.as_json:
        print(found.model_dump_json(indent=2))
        return
    operations = operation_table(found)
    print_table([dict(zip(operations.columns[:7], row[:7], strict=True)) for row in operations.rows[:12]])
    print()
    candidates = candidate_table(found)
    print_table([dict(zip(candidates.columns, row, strict=True)) for row in candidates.rows])
    print()
    for line in found.faults:
        print(line)
    if found.suggested is not None:
        print(f"\nto quantize without them: {ignore_options(found.candidates[found.suggested])}")
    for note, command in remedy_lines(found):
        print(f"\n{note}:\n    {command}")
    print(f"\nwrote {target / 'report.html'}")


def report(given: dict[str, Any], common: Common) -> None:
    """Write the report of a result, or compare several results.

    RESULT is a folder that ovcalib wrote, or its JSON file. A result is shown with its benchmark and diagnosis.
    """
    from ovcalib import api

    formats = [part.strip() for part in given.get("format", ",".join(FORMATS)).split(",") if part.strip()]
    if not formats or set(formats) - set(FORMATS):
        raise UsageError(f"--format {given['format']}: expected html, md, csv, with commas.")
    written = api.report(
        given["results"], common.output, formats=formats, latency=not given.get("no_latency")
    )  # fmt: skip
    for path in written:
        print(f"wrote {path}")


def argument(name: str, metavar: str, many: bool = False) -> click.Argument:
    kind = click.Path(path_type=Path) if many else None
    return click.Argument([name], metavar=metavar, nargs=-1 if many else 1, required=True, type=kind)


def add_to(app: click.Group) -> None:
    add_command(
        app, evaluate, (EvaluateOptions, ModelOptions), leave_out=("dynamic_batch",), common=("json",),
        renamed={"data": Shown(("--data",), metavar="DATA")},
    )  # fmt: skip
    add_command(
        app, benchmark, (BenchmarkOptions, ModelOptions), leave_out=OF_FILES,
        extra=[argument("models", "MODEL...", many=True)], common=("output", "overwrite", "dry-run", "json"),
    )  # fmt: skip
    add_command(
        app, diagnose, (DiagnosisOptions, ModelOptions), leave_out=OF_FILES,
        extra=[argument("fp32", "FP32"), argument("int8", "INT8")],
    )  # fmt: skip
    add_command(
        app,
        report,
        extra=[
            argument("results", "RESULT...", many=True),
            Option(["--format"], metavar="html,md,csv", help="What to write.  [default: html,md,csv]"),
            Option(
                ["--no-latency"],
                is_flag=True,
                default=None,
                help="Leave latency out, to compare results of different machines.",
            ),
            Option(
                ["-o", "--output", "output"],
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Where to write.  [default: the folder of the result; for several, the current one]",
            ),
        ],
        common=(),
    )
