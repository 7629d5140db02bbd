"""Several ways to quantize, compared on calibration images that none of them has seen.

Every arm goes through `quantize_graph` with options of its own. ovcalib's defaults stay unless an arm has a smaller
output error beyond the 95 % interval over the images; so NNCF's defaults, which are an arm, are never better beyond it.
Weights alone in 8 bits have the least error of all, but compute in float: they are taken where that costs no time.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib import __version__
from ovcalib.calibration.sets import CalibrationSet
from ovcalib.errors import UsageError
from ovcalib.evaluation.metrics import mean_interval, nmse_by_item, ratio_interval, same_class
from ovcalib.graph.editing import before_softmax
from ovcalib.graph.files import graph_sha256, ir_bytes, read_graph, write_ir
from ovcalib.kernels import host_kernels, kernels_of, outputs_on
from ovcalib.measurement.benchmark import race
from ovcalib.progress import Progress
from ovcalib.quantization.quantize import Quantized, quantize_graph
from ovcalib.quantization.selection import kernels_error
from ovcalib.quantization.settings import resolve_settings
from ovcalib.records.model import Task
from ovcalib.records.options import WEIGHT_FIELDS, QuantizationOptions
from ovcalib.records.result import Arm, ArmSearch, KernelsError
from ovcalib.runtime import outputs_of

DEFAULTS = "defaults"
WEIGHTS = "weights only"
_NNCF: dict[str, Any] = {
    "activation_ranges": "mean-min-max", "bias_correction": "fast", "rounding": "nearest",
    "overflow_fix": "first-layer", "guard": False, "equalize": "off",
}  # fmt: skip
# What each arm changes. `NNCF` is `nncf.quantize` as its documentation calls it.
ARMS: dict[str, dict[str, Any]] = {
    DEFAULTS: {},
    "NNCF": _NNCF,
    "NNCF, full bias correction": _NNCF | {"bias_correction": "full"},
    "histogram ranges": {"activation_ranges": "histogram"},
    "mixed preset": {"preset": "mixed"},
    "equalized": {"equalize": "on"},
    WEIGHTS: {"mode": "weight-only"},
}
# The time of weights alone over that of another arm, up to which it has not cost any.
SAME_TIME = 1.05
# Images that arms are compared on: a quarter of the set, but no more than that.
JUDGE_SHARE = 0.25
JUDGE_IMAGES = 32
SMALLEST_SET = 16


def arms_of(options: QuantizationOptions, transformer: bool) -> tuple[dict[str, QuantizationOptions], tuple[str, ...]]:
    """The options of every arm, and the names of those left out, because they would undo what the user asked for."""
    usual = {name: field.get_default() for name, field in QuantizationOptions.model_fields.items()}
    arms, left_out = {}, []
    for name, changes in ARMS.items():
        if "NNCF" in name and transformer:
            changes = changes | {"smooth_quant": "on"}
        given = {key: getattr(options, key) for key in changes}
        undone = any(given[key] not in (usual[key], value) for key, value in changes.items())
        if name == WEIGHTS:  # suits every machine
            alike = options.model_copy(update={"search": False, "deploy_isa": "any", "max_time": None})
            undone = undone or alike.beyond(WEIGHT_FIELDS) is not None
        if undone:
            left_out.append(name)
        elif not changes or changes != given:
            alone = {"search": False, "finetune": False, "optimize_for": "size", "mode": "default"}
            steering = dict.fromkeys(("metric", "validate_on", "max_time", "max_iterations"))
            arms[name] = options.model_copy(update=alone | steering | changes)
    return arms, tuple(left_out)


def search(
    options: QuantizationOptions,
    fp32: ov.Model,
    calibration: CalibrationSet,
    task: Task,
    out_of_time: Callable[[], bool],
    progress: Progress,
    log: TextIO | None = None,
    device: str | None = None,
    resume: Path | None = None,
) -> tuple[QuantizationOptions, ArmSearch]:
    """The options of the best arm, in place of those that search.

    fp32     float, batch 1
    device   on which the arms' latency is measured; None leaves it out
    resume   folder in which finished arms are kept until the run has ended
    returns  the options with what the chosen arm changes, and all arms as they were judged
    raises   UsageError for too few calibration images, ModelError
    """
    count = len(calibration)
    refuse_small_set(count)
    judges = min(JUDGE_IMAGES, round(JUDGE_SHARE * count))
    seen, fresh = calibration.subset(range(count - judges)), calibration.subset(range(count - judges, count))
    settings = resolve_settings(options, fp32)
    arms, left_out = arms_of(options, settings.transformer)
    if settings.preset == "mixed":
        arms.pop("mixed preset", None)
    judge = Judge(fp32, fresh, options)
    kept = KeptArms(resume, fp32, seen)
    made: dict[str, Made] = {}
    late: list[str] = []
    for name, asked in arms.items():
        if made and out_of_time():
            late.append(name)
            continue
        progress.say(f"trying {name}")
        made[name] = kept.read(asked) or kept.add(asked, quantize_graph(
            asked, resolve_settings(asked, fp32), fp32, seen, None, task, lambda: False, progress, log
        ))  # fmt: skip
        judge(name, made[name].int8, asked.mode == "weight-only")
    times = {} if device is None else race({name: found.int8 for name, found in made.items()}, device, 1.0)
    chosen = best({name: errors for name, errors in judge.errors.items() if name != WEIGHTS})
    if cost_no_time(times, chosen) and judge.errors[WEIGHTS].mean() < judge.errors[chosen].mean():
        chosen = WEIGHTS
    record = ArmSearch(
        arms=tuple(
            Arm(
                name=name, changes={key: str(value) for key, value in ARMS[name].items()},
                output_error=judge.by_kernels[name], difference_ci95=difference(judge.errors, name),
                agreement=judge.agreement(name) if task == "classification" else None,
                size_bytes=written_bytes(found.int8),
                latency_ms=float(np.median(times[name])) if times else None, seconds=found.seconds,
            )
            for name, found in made.items()
        ),
        chosen=chosen, count=len(fresh), left_out=left_out, late=tuple(late),
    )  # fmt: skip
    changes = {key: getattr(arms[chosen], key) for key in ARMS[chosen]} if chosen != DEFAULTS else {}
    return options.model_copy(update=changes), record


def refuse_small_set(count: int) -> None:
    if count < SMALLEST_SET:
        raise UsageError(
            f"`num_samples={count}`: `search` keeps a quarter of the images for the comparison. Expected at least "
            f"{SMALLEST_SET}."
        )


def cost_no_time(times: Mapping[str, Sequence[float]], chosen: str) -> bool:
    """Whether weights alone take no longer than an arm: at most SAME_TIME, at the upper end of the 95 % interval."""
    return WEIGHTS in times and ratio_interval(times[WEIGHTS], times[chosen])[2] <= SAME_TIME


@dataclass(frozen=True)
class Made:
    """The graph of an arm, and how long it took to make."""

    int8: ov.Model
    seconds: float


class KeptArms:
    """Arms that were finished, in a folder; each is found by the hash of all that it was made from.

    folder   None keeps nothing
    """

    def __init__(self, folder: Path | None, fp32: ov.Model, images: CalibrationSet) -> None:
        self.folder, self.fp32, self.images = folder, fp32, images

    @functools.cached_property
    def made_from(self) -> list[str]:
        versions = [importlib.metadata.version(name) for name in ("openvino", "nncf")]
        return [graph_sha256(self.fp32), images_sha256(self.images), __version__, *versions, host_kernels()]

    def _place(self, options: QuantizationOptions) -> Path | None:
        if self.folder is None:
            return None
        key = "\n".join([*self.made_from, options.model_dump_json()])
        return self.folder / "arms" / hashlib.sha256(key.encode()).hexdigest()[:32]

    def read(self, options: QuantizationOptions) -> Made | None:
        place = self._place(options)
        if place is None or not place.is_dir():
            return None
        return Made(read_graph(place / "model.xml"), float((place / "seconds").read_text()))

    def add(self, options: QuantizationOptions, quantized: Quantized) -> Made:
        place = self._place(options)
        if place is not None and not place.exists():
            partial = place.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_ir(quantized.int8.clone(), partial / "model.xml")
            (partial / "seconds").write_text(str(quantized.record.seconds))
            partial.rename(place)
        return Made(quantized.int8, quantized.record.seconds)


def images_sha256(images: CalibrationSet) -> str:
    """A hash of everything of a calibration set that quantization reads."""
    digest = hashlib.sha256(repr((images.images.shape, images.input_range, images.preprocessing)).encode())
    digest.update(images.images.tobytes())
    return digest.hexdigest()


class Judge:
    """Squared errors of the outputs of each arm against FP32, by image, on the kernels where they are largest.

    errors       float64 [N] by arm, as shares of the mean square of FP32's outputs: their mean is the NMSE
    by_kernels   the NMSE on each of the kernels that the model is for
    """

    def __init__(self, fp32: ov.Model, images: CalibrationSet, options: QuantizationOptions) -> None:
        self.inputs, self.wanted = images.inputs(), kernels_of(options.deploy_isa)
        self.reference = outputs_of(before_softmax(fp32), self.inputs)
        self.errors: dict[str, NDArray[np.float64]] = {}
        self.by_kernels: dict[str, tuple[KernelsError, ...]] = {}
        self.outputs: dict[str, NDArray[np.float32]] = {}

    def __call__(self, name: str, int8: ov.Model, in_float: bool = False) -> None:
        """Measure an arm; one that computes in float has the same error on all kernels.

        OpenVINO takes layers with 8-bit weights to kernels of this CPU, which a process of AVX2 alone does not have.
        """
        found = {}
        graph = before_softmax(int8)
        for kernels in self.wanted:
            outputs = outputs_on(None if in_float else kernels, graph, self.inputs)
            found[kernels] = nmse_by_item(self.reference, outputs), outputs
        self.by_kernels[name] = tuple(
            kernels_error(kernels, float(errors.mean())) for kernels, (errors, _) in found.items()
        )
        self.errors[name], self.outputs[name] = max(found.values(), key=lambda pair: float(pair[0].mean()))

    def agreement(self, name: str) -> float:
        return float(same_class(self.reference, self.outputs[name]).mean())


def difference(errors: Mapping[str, NDArray[np.float64]], name: str) -> tuple[float, float] | None:
    """95 % interval of an arm's NMSE minus that of the defaults, paired by image; None where one is not finite."""
    between = errors[name] - errors[DEFAULTS]
    if not np.isfinite(between).all():
        return None
    return mean_interval(between)


def best(errors: Mapping[str, NDArray[np.float64]]) -> str:
    """The arm with the smallest error of those that beat the defaults beyond the interval; the defaults without any."""
    if not np.isfinite(errors[DEFAULTS]).all():
        return min(errors, key=lambda name: float(errors[name].mean()))
    intervals = {name: difference(errors, name) for name in errors}
    better = [name for name, interval in intervals.items() if interval is not None and interval[1] < 0]
    return min(better, key=lambda name: float(errors[name].mean()), default=DEFAULTS)


def written_bytes(graph: ov.Model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_ir(graph.clone(), Path(folder) / "model.xml")
        return ir_bytes(Path(folder))
