"""What a result comes to, in sentences: a difference counts only where its interval leaves 0 out."""

from __future__ import annotations

import math

from ovcalib.records.result import (
    Accuracy,
    Agreement,
    BoxAgreement,
    CustomMetric,
    DetectionAccuracy,
    LatencyComparison,
    PredictedLoss,
    Result,
    SpeedSearch,
)

KERNELS = {"vnni": "32-bit sums (VNNI, AMX)", "avx2": "16-bit sums (AVX2)"}
TOO_NOISY = "not shown: the machine is too noisy"
# Below this agreement with FP32 a verdict is bad.
BAD_AGREEMENT = 0.9
# Above this share of FP32's outputs an error is bad.
BAD_NMSE = 0.1
# Instruction sets that INT8 gains from most.
FAST_INT8 = ("AMX-INT8", "AVX512-VNNI", "AVX-VNNI", "NEON-DOTPROD")


def points(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def execution(found: Agreement | Accuracy) -> str:
    """What INT8 ran on, for a sentence that ends there; nothing for records that do not say."""
    if found.kernels is None:
        return ""
    if found.emulated:
        return f"; INT8 emulated as on {KERNELS[found.kernels]}, which this CPU lacks"
    return f"; INT8 executed on {KERNELS[found.kernels]}"


def reliable_latency(result: Result) -> tuple[LatencyComparison | None, str]:
    """The latency that reports show, or None and the reason."""
    latency = result.benchmark
    if latency is None:
        return None, f"not measured: {result.benchmark_reason}"
    if latency.unreliable:
        return None, f"{TOO_NOISY} ({'; '.join(latency.unreliable)})"
    return latency, ""


def speedup(latency: LatencyComparison) -> str:
    """The speed-up as a figure, with its interval."""
    ci = latency.speedup_ci95
    return f"{latency.speedup:.2f}x" + (f" ({ci[0]:.2f} to {ci[1]:.2f})" if ci else "")


def result_verdict(result: Result) -> dict[str, str]:
    """The sentences that a reader takes away (`text`), with their mood (`css`): good, bad or unsure."""
    text, mood = _accuracy(result)
    speed, slower = _speed(result)
    speed = f"{speed}{_in_float_for_speed(result.quantization.speed)}"
    if slower and mood == "good":
        mood = "unsure"
    if result.outcome == "goal-missed":
        text, mood = f"The accuracy goal was missed. {text}", "bad"
    if result.outcome == "budget":
        text, mood = f"The budget ran out before the goal was reached. {text}", "bad"
    if result.fp32_fault is not None:
        text, mood = f"{result.fp32_fault} {text}", "bad"
    return {"text": f"{text} {speed}".strip().replace("INT8", result.quantization.precision), "css": mood}


def _accuracy(result: Result) -> tuple[str, str]:
    accuracy, agreed = result.accuracy, result.agreement
    if accuracy:
        text, mood = _drop(accuracy, 100 * result.recipe.quantization.max_drop)
        return (text if result.custom_metric is None else f"{text} {custom_metric(result.custom_metric)}"), mood
    run_on = execution(agreed) if agreed.emulated else ""
    own = " of the calibration set itself" if result.recipe.evaluation.eval is None else ""
    on = f"{agreed.count} images{own}{run_on}"
    if agreed.nmse is None:
        text, bad = f"INT8 gives outputs that are not finite, on {on}.", True
    elif agreed.top1 is not None:
        text, bad = f"INT8 names the same class as FP32 for {points(agreed.top1)} of {on}.", agreed.top1 < BAD_AGREEMENT
    elif agreed.boxes is not None and agreed.boxes.share is not None:
        text = f"{box_agreement(agreed.boxes)} On {on}."
        bad = agreed.boxes.share < BAD_AGREEMENT
    elif agreed.pixels is not None:
        text = f"INT8 names the same class as FP32 for {points(agreed.pixels)} of the pixels of {on}."
        bad = agreed.pixels < BAD_AGREEMENT
    else:
        text, bad = f"{output_error(agreed)}, on {on}.", agreed.nmse > BAD_NMSE
    if result.detection is not None:
        text = f"{mean_precision(result.detection)} {text}"
    if result.custom_metric is not None:
        return f"{custom_metric(result.custom_metric)} {text}", "bad" if bad else "unsure"
    unknown = "" if result.detection is not None else " Accuracy was not measured."
    if result.predicted_loss is not None:
        unknown = (
            f" Accuracy was not measured; expected loss of top-1, in points: {expected_loss(result.predicted_loss)}."
        )
    return f"{text}{unknown}", "bad" if bad else "unsure"


def box_agreement(found: BoxAgreement) -> str:
    """How many boxes INT8 and FP32 have in common, in a sentence."""
    which = f"scores of {found.score:g} or more, IoU {found.iou:g}"
    if found.share is None:
        return f"Neither model finds a box ({which}), so there is no box agreement."
    return (
        f"Box agreement {points(found.share)}: INT8 finds {found.int8} boxes, FP32 {found.fp32}, and both "
        f"{found.matched} of them ({which})."
    )


def mean_precision(found: DetectionAccuracy) -> str:
    """Mean average precision of both models, in a sentence."""
    return (
        f"mAP (COCO, IoU 0.50 to 0.95): FP32 {points(found.fp32.map)}, INT8 {points(found.int8.map)}, drop "
        f"{found.drop_points:+.2f} points; at IoU 0.50 {points(found.fp32.map50)} and {points(found.int8.map50)} "
        f"({found.boxes} boxes in {found.count} images)."
    )


def output_error(found: Agreement) -> str:
    """The error of all outputs, and of the worst of several."""
    text = f"Output error (NMSE) {'not finite' if found.nmse is None else f'{found.nmse:.4g}'}"
    if len(found.outputs) < 2:
        return text
    worst = max(found.outputs, key=lambda output: math.inf if output.nmse is None else output.nmse)
    error = "not finite" if worst.nmse is None else f"{worst.nmse:.4g}"
    return f"{text} over {len(found.outputs)} outputs, largest in {worst.name!r} ({error})"


def agreement_note(found: Agreement) -> str:
    """What agreement and output error came to, in the terms of what the outputs are."""
    images = f"{found.count} images of {found.on}"
    ends = f"{output_error(found)}{execution(found)}."
    if found.boxes is not None:
        return (
            f"{box_agreement(found.boxes)} Measured on {images}; that is agreement, not mean average precision. Of the "
            f"raw heads: {ends}"
        )
    if found.top1 is None and found.pixels is None:
        return f"INT8 was compared with FP32 on {images}, by the outputs' squared error over FP32's squares. {ends}"
    share, what = (found.top1, "") if found.top1 is not None else (found.pixels, "the pixels of ")
    return (
        f"INT8 names the class that FP32 names for {points(share)} of {what}{images}; that is agreement, not accuracy. "
        f"{ends}"
    )


def expected_loss(found: PredictedLoss) -> str:
    """The predicted loss as a figure, with its interval."""
    low, high = found.interval90
    return f"{found.points:.1f} ({low:.1f} to {high:.1f})"


def predicted_note(result: Result) -> str:
    """What loss was predicted and from what, or why none was; nothing for what has no top-1."""
    found, reason = result.predicted_loss, result.predicted_loss_reason
    if found is None:
        classifies = result.agreement.top1 is not None
        return f"The loss of top-1 on real images was not predicted: {reason}." if reason and classifies else ""
    text = (
        f"Expected loss of top-1 on real images: {expected_loss(found)} points, the interval for nine of ten models, "
        f"predicted from the output error on {found.probe.count} images of {found.probe.source} (NMSE "
        f"{found.probe.nmse:.4g})."
    )
    if result.accuracy is not None:
        text += f" Measured: {result.accuracy.drop_points:.1f} points."
    return text


def custom_metric(found: CustomMetric) -> str:
    """The user's own metric of both models."""
    return (
        f"{found.function}: FP32 {found.fp32:.4g}, INT8 {found.int8:.4g}, difference {found.difference:+.4g} "
        f"({found.count} images)."
    )


def _drop(accuracy: Accuracy, allowed: float) -> tuple[str, str]:
    """allowed   points that INT8 may lose"""
    low, high = accuracy.drop_ci95
    both = f"FP32 {points(accuracy.fp32.top1)}, INT8 {points(accuracy.int8.top1)}"
    on = f"{accuracy.count} images{execution(accuracy) if accuracy.emulated else ''}"
    mood = "good" if high <= allowed else "bad" if low > allowed else "unsure"
    if low > 0:
        return (
            f"INT8 loses {accuracy.drop_points:.2f} points of top-1 accuracy (95 % interval {low:.2f} to {high:.2f}; "
            f"{both}; {on}).",
            mood,
        )
    if high < 0:
        return (
            f"INT8 gains {-accuracy.drop_points:.2f} points of top-1 accuracy (95 % interval {-high:.2f} to "
            f"{-low:.2f}; {both}; {on}).",
            mood,
        )
    few = f" A loss of up to {high:.2f} points is not excluded: evaluate on more images." if mood == "unsure" else ""
    return (
        f"No measurable difference in top-1 accuracy ({both}; 95 % interval of the drop {low:.2f} to {high:.2f} "
        f"points; {on}).{few}",
        mood,
    )


def _speed(result: Result) -> tuple[str, bool]:
    """A sentence on the speed, and whether INT8 is slower."""
    latency, reason = reliable_latency(result)
    if latency is None:
        return (f"Speed is {reason}." if result.benchmark else ""), False
    if latency.speedup_ci95 is None:  # of an earlier version
        return (
            f"FP32 takes {latency.speedup:.2f} times the time of INT8 on {latency.device}, without an interval.",
            False,
        )
    low, high = latency.speedup_ci95
    interval = f"(95 % interval {low:.2f} to {high:.2f})"
    if low > 1:
        return f"INT8 is {latency.speedup:.2f} times as fast on {latency.device} {interval}.", False
    if high < 1:
        return (
            f"INT8 is slower than FP32 on {latency.device}: {latency.speedup:.2f} times its speed {interval}. "
            f"{_slower_advice(result)}",
            True,
        )
    return f"No measurable difference in speed on {latency.device} {interval}.", False


def _in_float_for_speed(found: SpeedSearch | None) -> str:
    if found is None:
        return ""
    if not found.in_float:
        return f" No operation is faster in float on {found.device}."
    low, high = found.over_int8_ci95
    return (
        f" {len(found.in_float)} operations are in float for speed: {found.over_int8:.2f} times as fast as all of them "
        f"in INT8 (95 % interval {low:.2f} to {high:.2f})."
    )


def _slower_advice(result: Result) -> str:
    way_out = "Leave the operations that lose in float with `--optimize-for latency`, or ship FP32 for this machine"
    if result.quantization.speed is not None:
        way_out = "Ship FP32 for this machine"
    if result.environment.isa in FAST_INT8:
        return f"{way_out}."
    return f"{way_out}: INT8 pays on CPUs with VNNI or AMX, which this one lacks."
