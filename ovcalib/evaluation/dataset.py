"""Images that a model is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.calibration.sources import parts_of
from ovcalib.data.objects import ObjectImages, refuse_shuffling
from ovcalib.data.sets import ImageData, Reader, box_classes, choose, class_names, model_labels, open_data
from ovcalib.errors import DataError, UnknownNameError, UsageError
from ovcalib.evaluation.outputs import Items, calibration_items, items_of, object_items, pixel_hash
from ovcalib.records.model import ModelSpec
from ovcalib.records.options import CALIBRATION, EvaluationOptions, QuantizationOptions

# Images of the calibration set on which agreement is measured without other images.
AGREEMENT_IMAGES = 100
# Classes keep their shares of a limited set; which images of them are taken never depends on a run's seed.
ORDER_SEED = 0
# Sources whose images are those of a data set, and those that make images from what they learned of it.
TAKE_FROM = ("real", "npz")
LEARN_FROM = ("fdda",)


@dataclass(frozen=True)
class Images:
    """Images with a name, `on`: `count` items, the same in every iteration."""

    on: str
    count: int
    items: Items


@dataclass(frozen=True)
class DataSet:
    """A labelled or unlabelled data set, and which of its images count.

    labels   int64 [N] for all images, or None; of a model without class logits those of the data set as they are
    order    indices of the images that count
    box_classes   see ovcalib.data.sets.box_classes; None for a set without boxes, or a model that is no detector
    """

    data: ImageData
    spec: ModelSpec
    labels: Any
    order: Sequence[int]
    box_classes: Any = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def reference(self) -> str:
        return self.data.reference

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return class_names(self.data, self.spec)

    @property
    def protocol(self) -> str:
        """The data, the number of its images, and their preprocessing."""
        pre = self.spec.preprocessing
        fit = f"short side {pre.short_side}, centre crop" if pre.short_side else "scaled to"
        return (
            f"{len(self)} of {len(self.data)} images of {self.reference}, "
            f"{fit} {pre.height}x{pre.width}, {pre.interpolation}"
        )

    def images(self, forbidden: frozenset[bytes] = frozenset()) -> Images:
        """forbidden   pixel hashes of images that must not turn up, else DataError"""
        items = Items(
            lambda: items_of(Reader(self.data, self.spec, self.labels, self.order, self.box_classes), forbidden)
        )
        return Images(self.reference, len(self), items)


class ObjectSet:
    """The images of a Python object, in place of a `DataSet`.

    labels   None where the first image has none
    """

    def __init__(self, source: Any, spec: ModelSpec, limit: int | None = None) -> None:
        refuse_shuffling(source)
        self.spec, self.found = spec, ObjectImages(source, spec)
        self.total = len(self.found)
        self.count = self.total if limit is None else min(limit, self.total)
        self.order = None if limit is None else choose(self.found.labels, self.total, ORDER_SEED)[:limit]
        first = next(iter(self.found.read()), None)
        self.labels = None if first is None or first.label is None else (first.label,)

    def __len__(self) -> int:
        return self.count

    @property
    def reference(self) -> str:
        return self.found.reference

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.spec.classes

    @property
    def protocol(self) -> str:
        return f"{self.count} of {self.total} images of {self.reference}"

    def images(self, forbidden: frozenset[bytes] = frozenset()) -> Images:
        """As of a `DataSet`."""
        found, pre = self.found, self.spec.preprocessing
        items = Items(lambda: object_items(islice(found.read(self.order), self.count), pre, forbidden))
        return Images(self.reference, self.count, items)


EvaluationSet = DataSet | ObjectSet


def open_dataset(reference: str, spec: ModelSpec, limit: int | None = None, download: bool = False) -> DataSet:
    """The images that a data reference names.

    limit    at most so many of them, chosen class by class
    raises   DataError where labels are there but do not fit the model, or all are of one class
    """
    data = open_data(reference, split="test", download=download)
    labels = data.labels
    if labels is not None and spec.num_classes is not None:
        labels = model_labels(data, spec)
        present = len(set(labels.tolist()))
        if present < min(2, spec.num_classes):
            name = data.class_names[0] if data.class_names else str(labels[0])
            raise DataError(
                f"{reference!r} holds images of one class ({name!r}), but {spec.name} has {spec.num_classes}. "
                "Accuracy on one class is not the model's accuracy: give a folder with all classes."
            )
    order = range(len(data)) if limit is None else choose(labels, len(data), ORDER_SEED)[:limit]
    return DataSet(data, spec, labels, order, box_classes(data, spec) if spec.task == "detection" else None)


def open_evaluation(options: EvaluationOptions, spec: ModelSpec, source: Any = None) -> EvaluationSet | None:
    """The images that the result is measured on; None without `eval`.

    source   a Python object that holds them
    """
    if source is not None:
        return ObjectSet(source, spec, options.limit)
    return None if options.eval is None else open_dataset(options.eval, spec, options.limit, options.download)


def open_validation(
    quantization: QuantizationOptions,
    options: EvaluationOptions,
    evaluation: EvaluationSet | None,
    spec: ModelSpec,
) -> EvaluationSet | None:
    """The images that steer accuracy-aware quantization; None where there are none but those of the calibration set.

    raises   DataError also where they have no labels, and the metric needs some
    """
    if quantization.mode == "default" or quantization.validate_on == CALIBRATION:
        return None
    validation = evaluation
    if quantization.validate_on is not None:
        try:
            validation = open_dataset(quantization.validate_on, spec, options.limit, options.download)
        except UnknownNameError as error:
            if error.name != quantization.validate_on:
                raise
            known = [*error.known, CALIBRATION]
            raise UnknownNameError("images for `validate_on`:", error.name, known) from error
    if validation is not None:
        require_labels(quantization.metric, validation.labels, validation.reference)
    return validation


def require_task(metric: str | None, spec: ModelSpec) -> None:
    """Raise UsageError where a metric needs class logits, or the classes of pixels, and the model gives neither."""
    fits = {"top1": ("classification",), "expected-top1": ("classification",),
            "agreement": ("classification", "segmentation")}  # fmt: skip
    if metric in fits and spec.task not in fits[metric]:
        raise UsageError(
            f"`metric={metric}` needs outputs that are {' or '.join(fits[metric])} logits, and those of {spec.name} "
            f"are taken for {spec.task} (`task`). Use `metric=nmse`."
        )


def require_labels(metric: str | None, labels: Any, on: str) -> None:
    """Raise DataError where the metric is top-1 and there are no labels."""
    if metric == "top1" and labels is None:
        raise DataError(
            f"`metric=top1` needs labels, and {on} has none. Use `metric=expected-top1` or `metric=agreement`, or "
            "labelled images."
        )


def calibration_images(calibration: CalibrationSet, limit: int | None = None) -> Images:
    """The images of a calibration set, with the labels that came with them.

    limit   at most so many, from the first on
    """
    count = len(calibration) if limit is None else min(len(calibration), limit)
    on = f"the calibration set ({calibration.provenance.source})"
    return Images(on, count, Items(lambda: islice(calibration_items(calibration), count)))


def refuse_same_images(calib: str | None, evaluation: EvaluationSet | None, options: EvaluationOptions) -> None:
    """Raise DataError where calibration takes its images from the very set that is evaluated.

    Images that two sets have in common show only when they are read; this is known before anything is made. Of a part
    of a set (`limit`) the images may be others, but what a source learned of them never shows.
    """
    if calib is None or options.allow_overlap or not isinstance(evaluation, DataSet):
        return
    sources = LEARN_FROM if options.limit is not None else (*LEARN_FROM, *TAKE_FROM)
    if any(_is_of(source, evaluation.reference, sources) for source in parts_of(calib)):
        raise DataError(
            f"The calibration images come out of the evaluation set ({evaluation.reference}), so the accuracy would be "
            "flattered. Use separate images, or pass `allow_overlap=True`."
        )


def _is_of(source: str, data: str, sources: Sequence[str]) -> bool:
    """Whether it is one of some sources, and its images are those of a data set."""
    name, _, own = source.partition(":")
    plain = [reference.removeprefix("imagefolder:").removeprefix("npz:") for reference in (own, data)]
    # CIFAR-10 has a half for each.
    return name in sources and not own.startswith("cifar10") and Path(plain[0]).resolve() == Path(plain[1]).resolve()


def proof_images(evaluation: EvaluationSet | None, calibration: CalibrationSet, allow_overlap: bool) -> Images:
    """The images that the result is proven on: without others, the first of the calibration set itself."""
    if evaluation is None:
        return calibration_images(calibration, AGREEMENT_IMAGES)
    return evaluation.images(frozenset() if allow_overlap else calibration_hashes(calibration))


def calibration_hashes(calibration: CalibrationSet) -> frozenset[bytes]:
    """Pixel hashes of a set that may hold real images."""
    if calibration.domain != "pixels" and not calibration.provenance.real:
        return frozenset()
    return frozenset(pixel_hash(calibration.pixels(i)) for i in range(len(calibration)))
