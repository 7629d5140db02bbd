"""Accuracy with its interval, and agreement with FP32, which is not accuracy.

Statistics are pure functions of outputs; `collect` runs a model over samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.data.sets import Reader
from ovcalib.errors import DataError
from ovcalib.runtime import Runner
from ovcalib.types import Accuracy, Agreement, ClassAccuracy, Confusion, Top

Z95 = 1.959963984540054
# Outputs of a reference are kept for the comparison; large output maps are compared on fewer items.
MAX_KEPT_BYTES = 512 * 2**20
MAX_CONFUSIONS = 20


@dataclass
class Outputs:
    """What a model said about a set.

    values   float32 [N, K]
    labels   int64 [N], or None
    digest   SHA-256 over the pixels and labels of the items, in order
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    digest: str

    def __len__(self) -> int:
        return len(self.values)


def pixel_hash(pixels: NDArray[np.uint8]) -> bytes:
    """A content hash of one image, the same whatever file it came from."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Item:
    """One network input, float32 [1, C, H, W], with its label where there is one, and a hash of its content."""

    input: NDArray[np.float32]
    label: int | None
    digest: bytes


def items_of(reader: Reader, forbidden: frozenset[bytes] = frozenset()) -> Iterator[Item]:
    """Items of a data set.

    forbidden   pixel hashes of calibration images
    raises      DataError where one of them turns up
    """
    for sample in reader:
        digest = pixel_hash(sample.pixels)
        if digest in forbidden:
            raise DataError(
                f"{sample.name!r} is in the calibration set and in the evaluation set, so the accuracy would be "
                "flattered. Use separate images, or pass --allow-overlap."
            )
        yield Item(reader.spec.preprocessing.normalise(sample.pixels)[None], sample.label, digest)


def calibration_items(calibration: CalibrationSet) -> Iterator[Item]:
    """Items of a calibration set, in either domain; labels that are only FP32's own answer are left out."""
    labels = None if calibration.provenance.labels == "pseudo" else calibration.labels
    for i, x in enumerate(calibration):
        label = None if labels is None else int(labels[i])
        yield Item(x, label, hashlib.blake2b(x.tobytes(), digest_size=16).digest())


class Items:
    """Items that can be gone through again; they stay in memory as long as there are few of them.

    make    yields the items, the same each time
    """

    def __init__(self, make: Callable[[], Iterator[Item]]) -> None:
        self.make = make
        self.kept: list[Item] | None = None

    def __iter__(self) -> Iterator[Item]:
        if self.kept is not None:
            yield from self.kept
            return
        kept: list[Item] | None = []
        size = 0
        for item in self.make():
            size += item.input.nbytes
            if kept is not None:
                kept.append(item)
                if size > MAX_KEPT_BYTES:
                    kept = None
            yield item
        self.kept = kept


def collect(runner: Runner, items: Iterable[Item], tick: Callable[[int], None] = lambda done: None) -> Outputs:
    """Run a model over items.

    tick     receives the number of finished items
    raises   DataError where there are none
    """
    labels: list[int | None] = []
    digest = hashlib.sha256()

    def inputs() -> Iterator[NDArray[np.float32]]:
        for item in items:
            labels.append(item.label)
            digest.update(item.digest + str(item.label).encode())
            yield item.input

    values: list[NDArray[np.float32]] = []
    for value in runner.run(inputs()):
        values.append(value)
        tick(len(values))
        if len(values) * value.nbytes > MAX_KEPT_BYTES:
            break
    if not values:
        raise DataError("There are no images to evaluate on.")
    known = [label for label in labels[: len(values)] if label is not None]
    return Outputs(
        np.stack(values), np.array(known, dtype=np.int64) if len(known) == len(values) else None, digest.hexdigest()
    )


# Statistics -----------------------------------------------------------------------------------


def wilson_interval(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """95 % interval of an accuracy, as fractions.

    Stays inside [0, 1] and keeps its coverage for small samples and rates near 1, where the normal interval
    does not (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212).
    """
    if total <= 0:
        raise ValueError(f"An interval needs at least one item, not {total}.")
    rate = correct / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # Rounding must not push a bound past the rate itself at 0 and 1.
    return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))


def paired_drop(before: NDArray[np.bool_], after: NDArray[np.bool_], z: float = Z95) -> tuple[float, float, float]:
    """The drop in accuracy between two models on the same items, and its 95 % interval, as fractions.

    before, after   bool [N], whether each item was right
    Only the items on which the models differ carry information. Half an item is added to each of the four cells
    (Agresti & Min 2005, Stat. Med. 24, 729-740), so that no discordant item does not mean no uncertainty.
    """
    n = len(before)
    lost, won = int(np.sum(before & ~after)), int(np.sum(~before & after))
    drop = (lost - won) / n
    b, c, m = lost + 0.5, won + 0.5, n + 2.0
    centre = (b - c) / m
    half = z * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return drop, centre - half, centre + half


def hits(values: NDArray[np.float32], labels: NDArray[np.int64], k: int = 1) -> NDArray[np.bool_]:
    """Whether the label of each item is among its k largest logits, bool [N]; NaN logits are never right."""
    own = values[np.arange(len(labels)), labels]
    with np.errstate(invalid="ignore"):
        # Ties count against the model, as a constant output must not be right about everything.
        larger = (values >= own[:, None]).sum(1) - 1
    return np.asarray((larger < k) & np.isfinite(own))


def accuracy(values: NDArray[np.float32], labels: NDArray[np.int64]) -> Top:
    """Top-1 with its Wilson interval, and top-5 where there are more than five classes."""
    right = hits(values, labels)
    return Top(
        top1=float(right.mean()),
        top5=float(hits(values, labels, 5).mean()) if values.shape[1] > 5 else None,
        ci95=wilson_interval(int(right.sum()), len(right)),
    )


def same_class(reference: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether both models name the same class for each item, bool [N]; a non-finite output agrees with nothing."""
    finite = np.isfinite(values).all(1) & np.isfinite(reference).all(1)
    return np.asarray((reference.argmax(1) == values.argmax(1)) & finite)


def expected_hits(reference: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The probability that FP32 gives to the class that a model names for each item, float64 [N].

    Its mean is the top-1 accuracy to expect without labels if the probabilities are calibrated; of FP32 itself it is
    the average confidence (Hendrycks & Gimpel, ICLR 2017; Guillory et al., ICCV 2021). Where an image lies between two
    classes it costs little to name the other, so the drop is at most the share of items on which the models disagree,
    and mostly far below it.
    reference   outputs of FP32, float32 [N, K]: logits, or probabilities
    values      outputs of the model; one that is not finite expects 0
    """
    scores = reference.astype(np.float64)
    if scores.min() < 0 or np.abs(scores.sum(1) - 1).max() > 1e-3:
        scores = np.exp(scores - scores.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    named = scores[np.arange(len(scores)), values.argmax(1)]
    return np.asarray(np.where(np.isfinite(values).all(1), named, 0.0))


def nmse(reference: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    """Normalised mean squared error of outputs: sum |reference - values|^2 / sum |reference|^2, over all items."""
    reference, values = reference.astype(np.float64), values.astype(np.float64)
    return float(((reference - values) ** 2).sum() / max((reference**2).sum(), np.finfo(np.float64).tiny))


def agreement(reference: Outputs, other: Outputs, on: str, classification: bool = True) -> Agreement:
    """How well a model agrees with the reference on the same items; top1 is None where outputs are not logits."""
    top1 = float(same_class(reference.values, other.values).mean()) if classification else None
    error = nmse(reference.values, other.values)
    return Agreement(count=len(reference), top1=top1, nmse=error if math.isfinite(error) else None, on=on)


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
