"""`report.md` and the table on the terminal. Not measured prints as "-", never as 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ovcalib.records.result import (
    Agreement,
    Arm,
    ArmSearch,
    FineTuning,
    KernelsError,
    OutputAgreement,
    Quantization,
    Result,
    SpeedSearch,
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
from ovcalib.reports.tables import Table, escape_markdown
from ovcalib.reports.verdict import (
    KERNELS,
    agreement_note,
    custom_metric,
    execution,
    expected_loss,
    mean_precision,
    points,
    predicted_note,
    reliable_latency,
    result_verdict,
    speedup,
)


def mode(quantization: Quantization) -> str:
    return quantization.precision if quantization.mode == "simulated" else quantization.mode


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def summary(result: Result) -> dict[str, str]:
    """The line that the terminal shows, column by column; agreement is never called accuracy."""
    latency, _ = reliable_latency(result)
    row = {
        "model": result.model.name,
        "source": f"{result.calibration.source} x {result.calibration.num_samples}",
        "mode": mode(result.quantization),
    }
    if result.accuracy:
        low, high = result.accuracy.int8.ci95
        row["top-1 FP32"] = points(result.accuracy.fp32.top1)
        emulated = " (emulated)" if result.accuracy.emulated else ""
        row[f"top-1 {result.quantization.precision}"] = (
            f"{points(result.accuracy.int8.top1)} ±{50 * (high - low):.2f}{emulated}"
        )
        row["drop, points"] = f"{result.accuracy.drop_points:+.2f}"
    if result.detection:
        row["mAP"] = f"{points(result.detection.fp32.map)} -> {points(result.detection.int8.map)}"
    if result.custom_metric:
        row[result.custom_metric.function] = f"{result.custom_metric.fp32:.4g} -> {result.custom_metric.int8:.4g}"
    if result.accuracy is None and result.predicted_loss is not None:
        row["expected loss, points"] = expected_loss(result.predicted_loss)
    name, value = agreement_figure(result.agreement)
    row[name] = value + (" (emulated)" if result.agreement.emulated else "")
    row["size MB"] = f"{megabytes(result.size_bytes.fp32)} -> {megabytes(result.size_bytes.int8)}"
    fp32, int8 = (latency.latency_ms[kind].p50 for kind in ("fp32", "int8")) if latency else (None, None)
    row["p50 ms"] = "-" if latency is None else f"{fp32:.3g} -> {int8:.3g}"
    return row


def agreement_figure(found: Agreement) -> tuple[str, str]:
    """The name and the value of the figure that says most about two models without labels."""
    if found.top1 is not None:
        return "agreement", points(found.top1)
    if found.boxes is not None and found.boxes.share is not None:
        return "box agreement", points(found.boxes.share)
    if found.pixels is not None:
        return "pixel agreement", points(found.pixels)
    return "output error (NMSE)", "-" if found.nmse is None else f"{found.nmse:.3g}"


def output_row(found: OutputAgreement) -> list[str]:
    """Name, shape, error and agreement of pixels of one output."""
    error = "not finite" if found.nmse is None else f"{found.nmse:.4g}"
    return [found.name, " x ".join(map(str, found.shape)), error, points(found.pixels)]


def quantization_facts(quantization: Quantization) -> list[tuple[str, str]]:
    """How INT8 was made, and why so."""
    if quantization.mode == "weight-only":
        return [
            ("mode", "weight-only: weights in 8 bits, a scale for each output channel; it computes in float"),
            ("rounding", rounding(quantization)),
            ("bias correction", bias_correction(quantization)),
            ("layers", str(quantization.float_operations)),
            ("ignored", ", ".join(quantization.ignored) or "none"),
            ("seconds", f"{quantization.seconds:.1f}"),
        ]
    if quantization.mode == "simulated":
        bits = f"{quantization.weight_bits} bits of weights and {quantization.activation_bits} of activations"
        edges = "also in the first and the last layer and in outputs"
        if quantization.edges == "academic":
            edges = "8 in the first and the last layer, outputs in float"
        return [
            ("mode", f"simulated: {bits}, {edges}; it computes in float"),
            ("preset", quantization.preset),
            ("activation ranges", f"{activation_ranges(quantization)}, then those of least squared error"),
            ("rounding", rounding(quantization)),
            ("bias correction", bias_correction(quantization)),
            *finetuning_facts(quantization.finetuning),
            ("layers", str(quantization.int8_operations)),
            ("ignored", ", ".join(quantization.ignored) or "none"),
            ("seconds", f"{quantization.seconds:.1f}"),
        ]
    facts = [
        ("mode", quantization.mode),
        ("preset", quantization.preset),
        ("overflow fix", overflow_fix(quantization)),
        *([("SmoothQuant", smooth_quant(quantization))] if quantization.transformer else []),
        ("activation ranges", activation_ranges(quantization)),
        ("rounding", rounding(quantization)),
        ("bias correction", bias_correction(quantization)),
        ("equalization", equalization(quantization)),
        *((f"output error on {KERNELS[e.kernels]}", kernels_error(e)) for e in quantization.output_error),
        ("operations in INT8", str(quantization.int8_operations)),
        ("layers left in float", str(quantization.float_operations)),
        ("ignored", ", ".join(quantization.ignored) or "none"),
    ]
    facts += finetuning_facts(quantization.finetuning)
    found = quantization.restoration
    if found:
        facts += [
            (
                "goal",
                f"{found.metric} on {found.count} images of {found.on} at most {100 * found.max_drop:.2f} points under "
                f"FP32; FP32 {points(found.baseline)}, INT8 {points(found.value)}, after {found.validations} "
                "validations",
            ),
            ("reverted to float", ", ".join(quantization.reverted) or "none"),
        ]
    if quantization.speed is not None:
        facts += speed_facts(quantization.speed)
    return [*facts, ("seconds", f"{quantization.seconds:.1f}")]


def speed_facts(found: SpeedSearch) -> list[tuple[str, str]]:
    """Which operations compute in float because that is faster, and what that won."""
    times = "{:.2f} times (95 % interval {:.2f} to {:.2f})"
    return [
        ("in float for speed", ", ".join(found.in_float) or "none"),
        (
            f"speed on {found.device}",
            f"{times.format(found.over_int8, *found.over_int8_ci95)} that of all in INT8, "
            f"{times.format(found.over_fp32, *found.over_fp32_ci95)} that of FP32",
        ),
    ]


ARM_COLUMNS = (
    "way", "output error (NMSE)", "difference to the defaults (95 % interval)", "agreement %", "p50 ms", "MB",
    "seconds", "",
)  # fmt: skip


def arm_rows(search: ArmSearch) -> list[list[Any]]:
    """The ways to quantize that were compared, a row of ARM_COLUMNS each."""
    worse = dominated(search.arms)
    rows: list[list[Any]] = []
    for arm in search.arms:
        errors = [error.nmse for error in arm.output_error]
        interval = arm.difference_ci95
        remark = "chosen" if arm.name == search.chosen else "dominated" * (arm.name in worse)
        rows.append([
            arm.name,
            "not finite" if None in errors else max(error for error in errors if error is not None),
            None if interval is None or not arm.changes else "{:+.2g} to {:+.2g}".format(*interval),
            None if arm.agreement is None else 100 * arm.agreement, arm.latency_ms, arm.size_bytes / 1e6, arm.seconds,
            remark,
        ])  # fmt: skip
    return rows


def arms_note(search: ArmSearch) -> str:
    """On what the ways were compared, and which were not tried."""
    text = f"Compared on {search.count} calibration images that none of them was made from; “{search.chosen}” is used."
    if search.left_out:
        text += f" Left out, because they would undo options that were given: {', '.join(search.left_out)}."
    weights = [arm for arm in search.arms if arm.changes.get("mode") == "weight-only"]
    if weights and weights[0].name != search.chosen:
        text += f" “{weights[0].name}” computes in float, and is used where a measured latency shows no loss of time."
    if search.late:
        text += f" Not tried, for want of time: {', '.join(search.late)}."
    return text


def dominated(arms: Sequence[Arm]) -> frozenset[str]:
    """Arms that another one is no worse than in error, latency and size, and better in one: off the Pareto front."""

    def figures(arm: Arm) -> tuple[float, float, float]:
        errors = [math.inf if e.nmse is None else e.nmse for e in arm.output_error]
        return max(errors), arm.latency_ms or 0.0, float(arm.size_bytes)

    def beats(one: Arm, other: Arm) -> bool:
        pairs = list(zip(figures(one), figures(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return frozenset(arm.name for arm in arms if any(beats(other, arm) for other in arms))


def equalization(quantization: Quantization) -> str:
    """How many groups of signals were equalized, and what that changed."""
    groups = len(quantization.equalized)
    what = f"{groups} groups of signals" if groups else "none"
    if quantization.equalization_nmse is None:
        return what
    return "{} (NMSE {} without it and {} with it)".format(what, *map(figure, quantization.equalization_nmse))


def finetuning_facts(found: FineTuning | None) -> list[tuple[str, str]]:
    """How long the model learned, and what that changed."""
    if found is None:
        return []
    errors = f"NMSE {before_and_after(found.nmse)}"
    for source, judged in found.judged_nmse.items():
        errors += f"; on {source} images {before_and_after(judged)}"
    taken = "" if found.kept else ", not taken"
    how = f"{found.steps} steps on {found.images} images in {found.seconds:.0f} s"
    return [("fine-tuning", f"{how}{taken} ({errors})")]


def before_and_after(errors: Sequence[float | None]) -> str:
    return ", then ".join(map(figure, errors))


def figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def kernels_error(found: KernelsError) -> str:
    """NMSE on the last calibration images, and whether this CPU executed it."""
    return f"NMSE {figure(found.nmse)} ({'emulated' if found.emulated else 'executed'})"


def overflow_fix(quantization: Quantization) -> str:
    """What the overflow fix came to, and why."""
    reasons = [f"deployment ISA: {quantization.deploy_isa}"]
    if quantization.saturation_nmse is not None:
        reasons.append("NMSE {} with VNNI and {} without".format(*map(figure, quantization.saturation_nmse)))
    if quantization.halved_nmse is not None:
        reasons.append(f"{quantization.halved_nmse:.2g} with half the range of weights")
    return f"{quantization.overflow_fix} ({', '.join(reasons)})"


def smooth_quant(quantization: Quantization) -> str:
    """Whether SmoothQuant was used, and why so."""
    # Records of earlier versions have it for transformers.
    chosen = "off" if quantization.smooth_quant is False else "on"
    if quantization.smooth_nmse is None:
        return chosen
    return "{} (NMSE {} without it and {} with it)".format(chosen, *map(figure, quantization.smooth_nmse))


def activation_ranges(quantization: Quantization) -> str:
    """What the ranges of activations came to, and why."""
    chosen = quantization.activation_ranges
    if quantization.channel_headroom != 1:
        chosen += f", {quantization.channel_headroom:g} times as wide for single channels"
    if quantization.ranges_nmse is None:
        return chosen
    compared = "NMSE {} with min-max and {} with mean-min-max".format(*map(figure, quantization.ranges_nmse))
    if quantization.ranges_ratio is not None:
        ratio = "{:.2g} times that with min-max, 95 % interval {:.2g} to {:.2g}".format(*quantization.ranges_ratio)
        compared += f"; with the latter an image's error is {ratio}"
    return f"{chosen} ({compared})"


def rounding(quantization: Quantization) -> str:
    """How weights were rounded, and why so."""
    if quantization.rounding_nmse is None:
        return quantization.rounding
    return "{} (NMSE {} with nearest and {} with compensated)".format(
        quantization.rounding, *map(figure, quantization.rounding_nmse)
    )


def bias_correction(quantization: Quantization) -> str:
    """What bias correction came to, and why."""
    if quantization.bias_nmse is None:
        return quantization.bias_correction
    return "{} (NMSE {} with it and {} without)".format(
        quantization.bias_correction, *map(figure, quantization.bias_nmse)
    )


def model_card(result: Result) -> list[str]:
    """The lines of a model card's metadata; accuracy is there only where it was measured."""
    import yaml

    model, accuracy = result.model, result.accuracy
    card: dict[str, object] = {
        "library_name": "openvino",
        "tags": ["openvino", "int8", "ovcalib"],
        "license": model.weights.licence.lower() if model.weights.licence else "unknown",
    }
    if result.agreement.top1 is not None:  # outputs are class logits
        card["pipeline_tag"] = "image-classification"
    if accuracy:
        metric = {"type": "accuracy", "name": "INT8 top-1", "value": round(accuracy.int8.top1, 6)}
        found = {
            "task": {"type": "image-classification"},
            "dataset": {"name": accuracy.protocol, "type": accuracy.data_sha256},
            "metrics": [metric, {**metric, "name": "FP32 top-1", "value": round(accuracy.fp32.top1, 6)}],
        }
        card["model-index"] = [{"name": model.name, "results": [found]}]
    return ["---", yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=1000).rstrip(), "---", ""]


def markdown_report(result: Result) -> str:
    """The whole result as Markdown, after a model card's metadata in YAML.

    The metadata has the keys of the Hugging Face Hub, which reads it from a repository's README.md.
    """
    result = without_paths(result)
    row = summary(result)
    quantization, calibration = result.quantization, result.calibration
    lines = [
        *model_card(result),
        f"# {result.model.name}: INT8, calibrated with {calibration.source}",
        "",
        "| " + " | ".join(row) + " |",
        "|" + "---|" * len(row),
        "| " + " | ".join(escape_markdown(value) for value in row.values()) + " |",
        "",
        f"Outcome: **{result.outcome}**. {escape_markdown(result_verdict(result)['text'])}",
        "",
    ]
    if result.accuracy:
        accuracy, (low, high) = result.accuracy, result.accuracy.drop_ci95
        lines += [
            f"Accuracy was measured on {escape_markdown(accuracy.protocol)}{execution(accuracy)}. The drop has the "
            f"95 % interval {low:+.2f} to {high:+.2f} points (paired).",
        ]
    elif result.detection:
        lines += [
            f"{escape_markdown(mean_precision(result.detection))} On {escape_markdown(result.detection.protocol)}."
        ]
    else:
        lines += [f"Accuracy was not measured: {escape_markdown(result.accuracy_reason or '')}."]
    lines += [escape_markdown(agreement_note(result.agreement)), ""]
    if predicted := predicted_note(result):
        lines += [escape_markdown(predicted), ""]
    if result.custom_metric:
        lines += [escape_markdown(custom_metric(result.custom_metric)), ""]
    if len(result.agreement.outputs) > 1:
        lines += [
            "| output | shape | NMSE | pixels of the same class |",
            "|---|---|---|---|",
            *(f"| {' | '.join(map(escape_markdown, row))} |" for row in map(output_row, result.agreement.outputs)),
            "",
        ]
    if result.warnings:
        lines += ["## Warnings", "", *(f"- {escape_markdown(warning)}" for warning in result.warnings), ""]
    lines += [
        "## Calibration",
        "",
        *(f"- {name}: {escape_markdown(value)}" for name, value in calibration_facts(result)),
        *(f"- option {key}: {value}" for key, value in calibration.options.items()),
        "",
        escape_markdown(images_inside(result)),
        "",
        "## Quantization",
        "",
        *(f"- {name}: {escape_markdown(value)}" for name, value in quantization_facts(quantization)),
    ]
    if quantization.search is not None:
        ways = Table(ARM_COLUMNS, arm_rows(quantization.search))
        lines += ["", escape_markdown(arms_note(quantization.search)), "", ways.markdown()]
    latency, no_latency = reliable_latency(result)
    if latency is None:
        lines += ["", "## Latency", "", f"Latency is {escape_markdown(no_latency)}."]
    else:
        fp32, int8 = (latency.latency_ms[name] for name in ("fp32", "int8"))
        lines += [
            "",
            f"## Latency on {latency.device}",
            "",
            f"| | p50 ms | p90 ms | p99 ms | n | float parts in |\n|---|---|---|---|---|---|\n"
            f"| FP32 | {fp32.p50:.4g} | {fp32.p90:.4g} | {fp32.p99:.4g} | {fp32.n} | {fp32.precision or '-'} |\n"
            f"| INT8 | {int8.p50:.4g} | {int8.p90:.4g} | {int8.p99:.4g} | {int8.n} | {int8.precision or '-'} |",
            "",
            f"One image at a time, models in turns, device defaults. Speed-up {speedup(latency)}.",
        ]
    lines += ["", "## Model", "", *(f"- {name}: {escape_markdown(value)}" for name, value in model_facts(result))]
    if result.model.input:
        given = result.model.input
        lines += [
            *(f"- input, {name}: {escape_markdown(value)}" for name, value in input_facts(given)),
            "",
            "```python",
            snippet(given.preprocessing),
            "```",
            "",
            MODEL_API,
        ]
    lines += [
        "",
        "## Machine",
        "",
        f"- {result.environment.cpu} ({result.environment.isa or 'ISA unknown'}), "
        f"{result.environment.cpus} CPUs"
        f"{', virtual machine' if result.environment.virtual_machine else ''}",
        f"- {', '.join(f'{name} {value}' for name, value in result.environment.versions.items() if value)}",
        "",
        "Run it again: `ovcalib quantize -c request.json -o DIR`",
        "",
    ]
    return "\n".join(lines)
