"""Accuracy of classifiers, of one model and of two on the same images, and their agreement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovcalib.evaluation.metrics import hits, nmse, paired_drop, same_class, same_pixels, wilson_interval
from ovcalib.evaluation.outputs import Outputs
from ovcalib.records.model import Task, is_class_map
from ovcalib.records.result import Accuracy, Agreement, ClassAccuracy, Confusion, OutputAgreement, Top
from ovcalib.runtime import Port

MAX_CONFUSIONS = 20


def accuracy(values: NDArray[np.float32], labels: NDArray[np.int64]) -> Top:
    """Top-1 with its Wilson interval, and top-5 where there are more than five classes."""
    right = hits(values, labels)
    return Top(
        top1=float(right.mean()),
        top5=float(hits(values, labels, 5).mean()) if values.shape[1] > 5 else None,
        ci95=wilson_interval(int(right.sum()), len(right)),
    )


def agreement(
    reference: Outputs, other: Outputs, on: str, task: Task = "classification", ports: Sequence[Port] = ()
) -> Agreement:
    """How well a model agrees with the reference on the same items.

    task    decides what besides the output error means something: the class of logits, the classes of pixels
    ports   the outputs, to compare each of them
    """
    expected, found = reference.by_name(ports), other.by_name(ports)
    outputs = tuple(
        OutputAgreement(
            name=port.name,
            shape=port.shape,
            nmse=nmse(expected[port.name], found[port.name]),
            pixels=same_pixels(expected[port.name], found[port.name])
            if task == "segmentation" and is_class_map(port.shape)
            else None,
        )
        for port in ports
    )
    return Agreement(
        count=len(reference),
        top1=float(same_class(reference.values, other.values).mean()) if task == "classification" else None,
        pixels=next((output.pixels for output in outputs if output.pixels is not None), None),
        nmse=nmse(reference.values, other.values),
        on=on,
        outputs=outputs,
    )


def per_class(
    before: NDArray[np.bool_],
    after: NDArray[np.bool_],
    labels: NDArray[np.int64],
    classes: Sequence[str] | None = None,
) -> tuple[ClassAccuracy, ...]:
    """Accuracy of both models on each class that has images."""
    return tuple(
        ClassAccuracy(
            label=int(label),
            name=classes[label] if classes else None,
            count=int(own.sum()),
            fp32_top1=float(before[own].mean()),
            int8_top1=float(after[own].mean()),
        )
        for label in np.unique(labels)
        for own in [labels == label]
    )


def new_confusions(
    reference: NDArray[np.int64],
    other: NDArray[np.int64],
    labels: NDArray[np.int64],
    classes: Sequence[str] | None = None,
) -> tuple[Confusion, ...]:
    """The mistakes that `other` makes more often than `reference`, most added first.

    reference, other   int64 [N], classes that the two models name
    """
    counts: dict[tuple[int, int], list[int]] = {}
    for model, predicted in enumerate((reference, other)):
        for pair in zip(labels.tolist(), predicted.tolist(), strict=True):
            if pair[0] != pair[1]:
                counts.setdefault(pair, [0, 0])[model] += 1
    added = sorted((entry for entry in counts.items() if entry[1][1] > entry[1][0]), key=lambda e: e[1][0] - e[1][1])
    return tuple(
        Confusion(
            label=label,
            name=classes[label] if classes else None,
            predicted=predicted,
            predicted_name=classes[predicted] if classes else None,
            fp32=fp32,
            int8=int8,
        )
        for (label, predicted), (fp32, int8) in added[:MAX_CONFUSIONS]
    )


def compare(reference: Outputs, other: Outputs, protocol: str, classes: Sequence[str] | None = None) -> Accuracy | None:
    """Accuracy of both models and the paired drop, in points; None without labels.

    classes   names in class order, where they are known
    """
    if reference.labels is None or other.labels is None:
        return None
    before, after = hits(reference.values, reference.labels), hits(other.values, other.labels)
    drop, low, high = paired_drop(before, after)
    return Accuracy(
        protocol=protocol,
        count=len(reference),
        data_sha256=reference.digest,
        fp32=accuracy(reference.values, reference.labels),
        int8=accuracy(other.values, other.labels),
        drop_points=100 * drop,
        drop_ci95=(100 * low, 100 * high),
        per_class=per_class(before, after, reference.labels, classes),
        confusions=new_confusions(reference.values.argmax(1), other.values.argmax(1), reference.labels, classes),
    )
