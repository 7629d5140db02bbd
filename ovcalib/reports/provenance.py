"""Where a model comes from, what it takes, and how to run it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TypeVar

from ovcalib.calibration.sets import PREVIEW_IMAGES
from ovcalib.records.calibration import Provenance, SetScore, Trial
from ovcalib.records.model import ModelInput
from ovcalib.records.preprocessing import Preprocessing
from ovcalib.records.result import Result

P = TypeVar("P", bound=Provenance)

MODEL_API = (
    "The file holds its preprocessing and labels as metadata, so OpenVINO Model API and DL Streamer load it as it "
    'is: Model.create_model("int8/model.xml").'
)


# A file two folders deep or deeper; what follows a URL's // is none.
ABSOLUTE_PATH = re.compile(r"(?<![\w./\\])(?:[A-Za-z]:\\|/(?!/))(?:[^\s/\\:,;'\"]+[\\/]){2,}[^\s/\\:,;'\"]+")


def images_inside(result: Result) -> str:
    """Which images the output folder and the report hold, for who passes them on."""
    calibration = result.calibration
    holders = [f"calibration.npz holds all {calibration.num_samples}"] if "calibration.npz" in result.files else []
    if "preview.png" in result.files:
        shown = min(calibration.num_samples, PREVIEW_IMAGES)
        holders.append(f"preview.png and report.html show {shown}")
    if not holders:
        return "Calibration images: none in this folder."
    if not calibration.real:
        return f"Calibration images: {', '.join(holders)}; they are made, not photographs."
    return (
        f"Calibration images: {', '.join(holders)}; they are real images. To leave them out of what you pass on, use "
        "`keep_images=False`, or `preview=False` for the preview alone."
    )


def calibration_facts(result: Result) -> list[tuple[str, str]]:
    """The calibration statement; a score is there when the source gave one."""
    c = result.calibration
    facts = [
        ("source", c.source),
        ("images", f"{c.num_samples} of {c.requested} asked for"),
        ("seed", str(c.seed)),
        ("licence of the images", c.licence or "not stated"),
        ("labels", c.labels or "none"),
        ("values", {"pixels": "8-bit pixels", "network": "network inputs"}[c.domain]),
        ("made in", f"{c.seconds:.1f} s"),
        *((f"of {part.source}", f"{part.num_samples} images") for part in c.parts),
    ]
    if c.trials:
        facts.append(("INT8 error on all candidates' images, times the least", compared(c.trials)))
    return facts + (score_facts(c.score) if c.score else [])


def compared(trials: Sequence[Trial]) -> str:
    """The candidates of `auto`, the best one first."""
    return ", ".join(f"{trial.source} {trial.excess:.3g}" for trial in sorted(trials, key=lambda trial: trial.excess))


def score_facts(score: SetScore) -> list[tuple[str, str]]:
    """What the score of a set means; limits after benchmarks/results/calibration.md, "Scores of sets"."""
    distance = "near" if score.bn_distance < 0.5 else "some way from" if score.bn_distance < 0.8 else "far from"
    alike = (
        "alike" if score.diversity < 0.15 else "less varied than photographs" if score.diversity < 0.25 else "varied"
    )
    factor = math.exp(score.output_range_distance)
    return [
        (
            "distance from the BatchNorm statistics",
            f"{score.bn_distance:.2f}: {distance} the training images (0 is equal, 1 is noise)",
        ),
        ("diversity", f"{score.diversity:.2f}: the images are {alike} (photographs 0.4 to 0.5, noise below 0.1)"),
        ("range coverage", f"{100 * score.range_coverage:.0f} % of the activation ranges that the statistics suggest"),
        ("range of the outputs", f"{score.output_range:.3g}, a factor of {factor:.1f} from the expected one"),
    ]


def without_paths(result: Result) -> Result:
    """A copy for readers, in which folders of the author's machine are cut from the texts."""
    accuracy, weights = result.accuracy, result.model.weights
    return result.model_copy(
        update={
            "calibration": _without_paths(result.calibration),
            "agreement": result.agreement.model_copy(update={"on": short_paths(result.agreement.on)}),
            "accuracy": accuracy and accuracy.model_copy(update={"protocol": short_paths(accuracy.protocol)}),
            "model": result.model.model_copy(
                update={"weights": weights.model_copy(update={"origin": short_paths(weights.origin)})}
            ),
            "warnings": tuple(map(short_paths, result.warnings)),
        }
    )


def _without_paths(made: P) -> P:
    parts = tuple(map(_without_paths, made.parts))
    trials = tuple(t.model_copy(update={"source": short_paths(t.source)}) for t in made.trials)
    licence = made.licence and short_paths(made.licence)
    return made.model_copy(
        update={"source": short_paths(made.source), "licence": licence, "parts": parts, "trials": trials}
    )


def short_paths(text: str) -> str:
    """A text with the first folders of absolute paths left out: /home/ann/work/photos/val becomes …/photos/val."""
    return ABSOLUTE_PATH.sub(lambda found: "…/" + "/".join(re.split(r"[\\/]", found.group())[-2:]), text)


def model_facts(result: Result) -> list[tuple[str, str]]:
    """The model, its weights and whether the written graph computes the same."""
    model, weights = result.model, result.model.weights
    facts = [
        ("parameters", f"{model.parameters:,}"),
        ("SHA-256 of the weights", model.sha256),
        ("weights from", " ".join(part for part in (weights.origin, weights.url or "") if part)),
        ("licence of the weights", weights.licence or "not stated"),
    ]
    if weights.top1 is not None:
        facts.append(("published top-1", f"{100 * weights.top1:.2f} % ({weights.source})"))
    parity = result.parity
    if parity.torch_vs_ir_max_abs is None:
        facts.append(("parity with torch", f"not measured: {result.parity_reason}"))
    else:
        onnx = f"ONNX {parity.torch_vs_onnx_max_abs:.2g}, " if parity.torch_vs_onnx_max_abs is not None else ""
        facts.append(
            (
                "largest difference from torch",
                f"{onnx}IR {parity.torch_vs_ir_max_abs:.2g}, of outputs up to {parity.output_max_abs:.3g}",
            )
        )
    return facts


def input_facts(given: ModelInput) -> list[tuple[str, str]]:
    """The specification of the input."""
    pre = given.preprocessing
    shape = ", ".join("any" if size < 0 else str(size) for size in given.shape)
    colour = pre.channel_order if pre.channels == 3 else f"{pre.channels} channel(s)"
    resize = f"short side {pre.short_side}, then centre crop" if pre.short_side else "whole image"
    return [
        ("tensor", f"{given.name}, {given.dtype} [{shape}], {given.layout}"),
        ("colours", colour),
        ("normalisation", f"not inside the model: (pixel / 255 - {_row(pre.mean)}) / {_row(pre.std)}"),
        ("size", f"{resize} to {pre.height}x{pre.width}, {pre.interpolation}"),
    ]


def snippet(pre: Preprocessing) -> str:
    """Python that runs int8/model.xml on image.jpg and prints the class."""
    method = f"Image.Resampling.{pre.interpolation.upper()}"
    lines = [
        "import numpy as np, openvino as ov",
        "from PIL import Image",
        f'image = Image.open("image.jpg").convert("{"RGB" if pre.channels == 3 else "L"}")',
    ]
    if pre.short_side is None:
        lines.append(f"image = image.resize(({pre.width}, {pre.height}), {method})")
    else:
        lines += [
            f"short = {pre.short_side}",
            f"image = image.resize([max(short, int(short / min(image.size) * s)) for s in image.size], {method})",
            f"left, top = round((image.width - {pre.width}) / 2), round((image.height - {pre.height}) / 2)",
            f"image = image.crop((left, top, left + {pre.width}, top + {pre.height}))",
        ]
    channels = "[..., ::-1]" if pre.channel_order == "BGR" else "" if pre.channels == 3 else "[..., None]"
    lines += [
        f"x = (np.asarray(image){channels} / 255 - {_row(pre.mean)}) / {_row(pre.std)}",
        'model = ov.Core().compile_model("int8/model.xml", "CPU")',
        "print(model(x.transpose(2, 0, 1)[None].astype(np.float32))[0].argmax())",
    ]
    return "\n".join(lines)


def _row(numbers: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"
