"""Whether FP32 itself works on the images, and what is wrong where it does not.

INT8 can agree with a model that answers at random; such a result proves nothing. The cause is nearly always one of a
few, which are tried: normalisation, channel order, resizing, or the order of the classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.boxes import Boxes
from ovcalib.data.sets import choose
from ovcalib.evaluation.dataset import ORDER_SEED, DataSet, EvaluationSet
from ovcalib.evaluation.detection import SHOWN_SCORE, matches, mean_precision
from ovcalib.evaluation.metrics import hits
from ovcalib.evaluation.outputs import Outputs, collect
from ovcalib.progress import Progress
from ovcalib.records.model import ModelSpec
from ovcalib.records.preprocessing import IMAGENET_MEAN, IMAGENET_STD, USUAL_CROP, Preprocessing
from ovcalib.runtime import Runner

# Images on which preprocessing is tried.
TRIED = 64
# Fewer images, or objects, than this say nothing about chance.
ENOUGH, ENOUGH_OBJECTS = 20, 100
# A detector that works has more mean average precision than this, whatever it detects.
WORKING_MAP = 0.01
# A published accuracy of which less than this share is left was measured on other images, or with other preprocessing.
PUBLISHED_SHARE = 1 / 3
# Share of the images that a mapping of classes must explain, with so many images a class.
EXPLAINED, PER_CLASS = 0.5, 3

Change = dict[str, str]


def works_from(spec: ModelSpec) -> float:
    """The top-1 below which a model does not work: three times chance, or a third of the published figure.

    With few classes three times chance is more than a good model has; there it is chance and a quarter of the rest.
    """
    assert spec.num_classes is not None
    chance = 1 / spec.num_classes
    least = min(3 * chance, chance + (1 - chance) / 4)
    return max(least, PUBLISHED_SHARE * (spec.weights.top1 or 0.0))


def fp32_fault(start: Callable[[], Runner], dataset: EvaluationSet, outputs: Outputs, progress: Progress) -> str | None:
    """What is wrong with FP32 on labelled images, in words; None where it works, or there are too few to tell.

    start     compiles the FP32 model, where the cause has to be looked for
    outputs   what it said about the images of the data set
    """
    spec, labels = dataset.spec, outputs.labels
    if outputs.boxes is not None and outputs.found is not None:
        return box_fault(outputs.boxes, outputs.found, spec)
    if labels is None or spec.num_classes is None or len(outputs) < ENOUGH:
        return None
    top1, least = float(hits(outputs.values, labels).mean()), works_from(spec)
    if top1 >= least:
        return None
    against = f"chance is {1 / spec.num_classes:.2%}"
    if spec.weights.top1:
        against += f", published {spec.weights.top1:.2%}"
    named = outputs.values.argmax(1)
    cause = (
        class_order(labels, named, spec)
        or (preprocessing_cause(start(), dataset, least, progress) if isinstance(dataset, DataSet) else None)
        or (
            "None of the usual normalisations, channel orders and sizes helps: are the weights trained, and on these "
            "classes?"
            if isinstance(dataset, DataSet)
            else "Are the images normalised as in training, and the weights trained on these classes?"
        )
    )
    return f"FP32 itself is at {top1:.2%} top-1 ({against}): preprocessing or classes are wrong. {cause}"


def one_class_warning(outputs: Outputs, spec: ModelSpec, on: str) -> str | None:
    """That FP32 tells no images apart, in words, where no labels say whether it works; None where it does.

    on   whose images they are
    """
    if (spec.num_classes or 1) == 1 or len(outputs) < ENOUGH:
        return None
    named = np.unique(outputs.values.argmax(1))
    if len(named) > 1:
        return None
    return (
        f"FP32 names class {named[0]} for all {len(outputs)} images of {on}, so agreement on them says little. Is the "
        "model trained, with its weights loaded, and is its input normalised as in training? If so, measure on other "
        "images (`eval`)."
    )


def box_fault(truth: Sequence[Boxes], found: Sequence[Boxes], spec: ModelSpec, who: str = "FP32 itself") -> str | None:
    """What is wrong with a detector, in words; None where it works, or there are too few objects to tell."""
    objects = sum(map(len, truth))
    if objects < ENOUGH_OBJECTS:
        return None
    precision = mean_precision(truth, found).map
    if precision >= WORKING_MAP:
        return None
    labels: list[int] = []
    named: list[int] = []
    for there, boxes in zip(truth, found, strict=True):
        shown = boxes.above(SHOWN_SCORE)
        for i, j in matches(_of_one_class(there), _of_one_class(shown)):
            labels.append(int(there.labels[i]))
            named.append(int(shown.labels[j]))
    cause = f"It finds {len(labels)} of them as any class: are images normalised as in training, and weights trained?"
    if len(labels) >= EXPLAINED * objects:
        order = class_order(np.array(labels), np.array(named), spec, "objects that it finds", "categories")
        cause = order or f"It finds {len(labels)} of them, but as other classes: was it trained on these?"
        if order and spec.classes is None and spec.box_labels is None:
            cause += (
                " Categories are counted from 0 in the order of their ids; a first category `background` moves them."
            )
    return f"{who} is at {precision:.2%} mAP on {objects} objects: preprocessing or classes are wrong. {cause}"


def _of_one_class(boxes: Boxes) -> Boxes:
    return dataclasses.replace(boxes, labels=np.zeros_like(boxes.labels))


def class_order(
    labels: NDArray[np.int64], named: NDArray[np.int64], spec: ModelSpec, of: str = "images", by: str = "folders"
) -> str | None:
    """Whether the model is right but for the numbers of the classes.

    of, by   what has labels, and what has the names of the classes
    """
    shift = max((-1, 1), key=lambda shift: float((named == labels + shift).mean()))
    shifted = float((named == labels + shift).mean())
    present = np.unique(labels)
    renumbered = 0.0
    if len(labels) >= PER_CLASS * len(present):
        common = {int(label): int(np.bincount(named[labels == label]).argmax()) for label in present}
        if len(set(common.values())) == len(common):
            renumbered = float(np.mean([named[i] == common[int(label)] for i, label in enumerate(labels)]))
    if max(shifted, renumbered) < EXPLAINED:
        return None
    if shifted >= renumbered:
        return (
            f"The labels are off by one: the model names class {shift:+d} for {shifted:.0%} of the {of}. One of them "
            "counts a background class."
        )
    other = next(label for label in common if common[label] != label)
    a, b = (spec.classes[i] if spec.classes else f"class {i}" for i in (other, common[other]))
    return (
        f"The classes are in another order: {renumbered:.0%} of the {of} come out right if they are renumbered, "
        f"for example {a!r} as {b!r}. Name or number the {by} in the order of the model's outputs."
    )


def preprocessing_cause(runner: Runner, dataset: DataSet, least: float, progress: Progress) -> str | None:
    """What to change in the preprocessing so that the model works, tried on a few images."""
    # The images of the set may be in the order of their classes.
    usable = set(dataset.order)
    order = [i for i in choose(dataset.labels, len(dataset.data), ORDER_SEED) if i in usable][:TRIED]

    def right(preprocessing: Preprocessing) -> int:
        spec = dataset.spec.model_copy(update={"preprocessing": preprocessing})
        outputs = collect(runner, dataclasses.replace(dataset, spec=spec, order=order).images().items)
        assert outputs.labels is not None
        return int(hits(outputs.values, outputs.labels).sum())

    given = dataset.spec.preprocessing
    now = best = right(given)
    fixed: tuple[Preprocessing, Change] = (given, {})
    attempts = list(values(given))
    with progress.task("looking for the cause", len(attempts)) as tick:
        for done, (candidate, change) in enumerate(attempts, 1):
            found = right(candidate)
            if found > best:
                best, fixed = found, (candidate, change)
            tick(done)
        for candidate, change in sizes(fixed[0]):
            found = right(candidate)
            if found > best:
                best, fixed = found, (candidate, {**fixed[1], **change})
    if best < max(least * len(order), 2 * now + PER_CLASS):
        return None
    options = " ".join(f"`{name}={value}`" for name, value in fixed[1].items())
    return f"With {options}, {best} of {len(order)} images come out right instead of {now}: pass {options}."


def values(given: Preprocessing) -> Iterator[tuple[Preprocessing, Change]]:
    """Usual normalisations in both channel orders, and how they are asked for; not what is given already."""
    channels = given.channels
    normalisations = [
        (given.mean, given.std),
        ((0.0,) * channels, (1.0,) * channels),
        ((0.5,) * channels, (0.5,) * channels),
        ((0.0,) * channels, (1 / 255,) * channels),  # bytes as they are
        *([(IMAGENET_MEAN, IMAGENET_STD)] if channels == 3 else []),
    ]
    orders = (given.channel_order, "BGR" if given.channel_order == "RGB" else "RGB") if channels == 3 else ("RGB",)
    for order in orders:
        for mean, std in normalisations:
            change: Change = {}
            if (mean, std) != (given.mean, given.std):
                change = {name: ",".join(f"{v:.7g}" for v in value) for name, value in (("mean", mean), ("std", std))}
            if order != given.channel_order:
                change["channel_order"] = order
            if change:
                yield given.model_copy(update={"mean": mean, "std": std, "channel_order": order}), change


def sizes(given: Preprocessing) -> Iterator[tuple[Preprocessing, Change]]:
    """The whole image instead of a crop, or the usual crop instead of the whole image."""
    short = None if given.short_side else round(min(given.height, given.width) / USUAL_CROP)
    yield given.model_copy(update={"short_side": short}), {"short_side": str(short or 0)}
