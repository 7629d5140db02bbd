"""Outputs of a model on items."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.sets import CalibrationSet
from ovcalib.data.boxes import Boxes
from ovcalib.data.objects import ObjectImage
from ovcalib.data.sets import Reader
from ovcalib.errors import DataError
from ovcalib.records.preprocessing import Preprocessing
from ovcalib.runtime import Port, Runner

# Outputs of a reference are kept for the comparison; large output maps are compared on fewer items.
MAX_KEPT_BYTES = 512 * 2**20


@dataclass
class Outputs:
    """The outputs of a model on a set.

    values   float32 [N, K]
    labels   int64 [N], or None: classes of the model where it is a classifier, else of the data set
    digest   SHA-256 over the pixels and labels of the items, in order
    boxes    the truth of each item, or None
    found    what a detector found in each item, or None
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    digest: str
    boxes: list[Boxes] | None = None
    found: list[Boxes] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def by_name(self, ports: Sequence[Port]) -> dict[str, NDArray[np.float32]]:
        """Views of the single outputs, [N, ...] each."""
        ends = np.cumsum([port.size for port in ports])
        return {
            port.name: self.values[:, end - port.size : end].reshape(len(self), *port.shape)
            for port, end in zip(ports, ends, strict=True)
        }


def pixel_hash(pixels: NDArray[np.uint8] | NDArray[np.float32]) -> bytes:
    """A content hash of one image, the same whatever file it came from."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Item:
    """One network input, float32 [1, C, H, W], with its label or boxes where it has some, and a hash of its content."""

    input: NDArray[np.float32]
    label: int | None
    digest: bytes
    boxes: Boxes | None = None


def items_of(reader: Reader, forbidden: frozenset[bytes] = frozenset()) -> Iterator[Item]:
    """Items of a data set.

    forbidden   pixel hashes of calibration images
    raises      DataError where one of them turns up
    """
    for sample in reader:
        digest = pixel_hash(sample.pixels)
        _refuse_overlap(repr(sample.name), digest, forbidden)
        yield Item(reader.spec.preprocessing.normalise(sample.pixels)[None], sample.label, digest, sample.boxes)


def object_items(
    images: Iterable[ObjectImage], preprocessing: Preprocessing, forbidden: frozenset[bytes] = frozenset()
) -> Iterator[Item]:
    """Items of a Python object; otherwise as `items_of`. Network inputs are recognised by the pixels they come from."""
    for i, image in enumerate(images):
        digest = pixel_hash(preprocessing.denormalise(image.input) if image.pixels is None else image.pixels)
        _refuse_overlap(f"Image {i}", digest, forbidden)
        yield Item(image.input[None], image.label, digest)


def _refuse_overlap(name: str, digest: bytes, forbidden: frozenset[bytes]) -> None:
    if digest in forbidden:
        raise DataError(
            f"{name} is in the calibration set and in the evaluation set, so the accuracy would be flattered. Use "
            "separate images, or pass `allow_overlap=True`."
        )


def calibration_items(calibration: CalibrationSet) -> Iterator[Item]:
    """Items of a calibration set, in either domain; labels that FP32 predicted are left out."""
    labels = None if calibration.provenance.labels == "pseudo" else calibration.labels
    for i, x in enumerate(calibration):
        label = None if labels is None else int(labels[i])
        yield Item(x, label, hashlib.blake2b(x.tobytes(), digest_size=16).digest())


class Items:
    """Items that can be iterated again; a few are kept in memory.

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
    boxes: list[Boxes | None] = []
    digest = hashlib.sha256()

    def inputs() -> Iterator[NDArray[np.float32]]:
        for item in items:
            labels.append(item.label)
            boxes.append(item.boxes)
            digest.update(item.digest + str(item.label).encode())
            if item.boxes is not None:
                digest.update(item.boxes.corners.tobytes() + item.boxes.labels.tobytes())
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
    truth = [found for found in boxes[: len(values)] if found is not None]
    return Outputs(
        np.stack(values),
        np.array(known, dtype=np.int64) if len(known) == len(values) else None,
        digest.hexdigest(),
        truth if len(truth) == len(values) else None,
    )
