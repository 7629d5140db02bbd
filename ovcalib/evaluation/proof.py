"""INT8 against FP32 on the same images: accuracy where there are labels, agreement in any case."""

from __future__ import annotations

from dataclasses import dataclass

import openvino as ov

from ovcalib.errors import DataError
from ovcalib.evaluation.classification import agreement, compare
from ovcalib.evaluation.dataset import EvaluationSet, Images
from ovcalib.evaluation.detection import Decoder, box_agreement, decoded, detection_accuracy
from ovcalib.evaluation.outputs import Outputs, collect
from ovcalib.evaluation.sanity import one_class_warning
from ovcalib.kernels import is_emulated, runner_for
from ovcalib.progress import Progress
from ovcalib.records.model import ModelSpec
from ovcalib.records.result import Accuracy, Agreement, DetectionAccuracy, Kernels
from ovcalib.runtime import OpenVINORunner, output_ports

SHORTER = "evaluate on a part of the images (`limit`)."
# Below this agreement with FP32 the INT8 model is another model.
COLLAPSED_AGREEMENT = 0.8


@dataclass(frozen=True)
class Proof:
    """The result of the comparison; `accuracy_reason` says why `accuracy` is None.

    outputs   of INT8
    """

    accuracy: Accuracy | None
    accuracy_reason: str | None
    agreement: Agreement
    detection: DetectionAccuracy | None
    outputs: Outputs
    warnings: tuple[str, ...]


def reference_outputs(fp32: ov.Model, images: Images, progress: Progress, decode: Decoder | None = None) -> Outputs:
    """The outputs of the FP32 model (batch 1).

    decode   from the outputs of one image to boxes, for a detector
    raises   DataError where an image is in the calibration set too
    """
    with progress.task("evaluating FP32", images.count, SHORTER) as tick:
        outputs = collect(OpenVINORunner(fp32), images.items, tick)
    if decode is not None:
        outputs.found = decoded(outputs, output_ports(fp32), decode)
    return outputs


def prove(
    reference: Outputs,
    int8: ov.Model,
    images: Images,
    evaluation: EvaluationSet | None,
    spec: ModelSpec,
    kernels: Kernels | None,
    progress: Progress,
    decode: Decoder | None = None,
) -> Proof:
    """Compare an INT8 model (batch 1) with the outputs of FP32.

    evaluation   the data set that the images are of; None for calibration images, which say nothing of accuracy
    kernels      on which INT8 runs, or is emulated; None for what computes in float
    decode       of the reference
    """
    with progress.task("evaluating INT8", images.count, SHORTER) as tick:
        outputs = collect(runner_for(int8, kernels), images.items, tick)
    if outputs.digest != reference.digest:
        raise DataError(
            f"{images.on} gave other images, or another order, the second time, so the models cannot be compared. "
            "Leave out random transforms and shuffling."
        )
    where = {"kernels": kernels, "emulated": is_emulated(kernels)}
    agreed = agreement(reference, outputs, images.on, spec.task, output_ports(int8)).model_copy(update=where)
    warnings = []
    detection = None
    if decode is not None and reference.found is not None:
        outputs.found = decoded(outputs, output_ports(int8), decode)
        agreed = agreed.model_copy(update={"boxes": box_agreement(reference.found, outputs.found)})
        if evaluation is not None and reference.boxes is not None:
            detection = detection_accuracy(
                reference.boxes, reference.found, outputs.found, evaluation.protocol, reference.digest
            )
    shares = {"": agreed.top1, "the pixels of ": agreed.pixels}
    for what, share in shares.items():
        if share is None or share >= COLLAPSED_AGREEMENT:
            continue
        warnings.append(
            f"agreement collapsed: INT8 names another class than FP32 for {1 - share:.1%} of {what}{images.on}. "
            "Calibrate with another source, or use `mode=accuracy-aware`."
        )
    if agreed.nmse is None:
        warnings.append("The INT8 model gives non-finite outputs.")
    accuracy = reason = None
    if evaluation is None:
        reason = "no evaluation images were given (`eval`)"
    elif spec.num_classes is None:
        reason = f"the outputs of {spec.name} are no class logits"
    elif reference.labels is None:
        reason = f"{evaluation.reference} has no labels"
    else:
        accuracy = compare(reference, outputs, evaluation.protocol, evaluation.class_names)
    if accuracy is None and (alike := one_class_warning(reference, spec, images.on)) is not None:
        warnings.append(alike)
    accuracy = accuracy and accuracy.model_copy(update=where)
    return Proof(accuracy, reason, agreed, detection, outputs, tuple(warnings))
