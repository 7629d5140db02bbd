"""Image data sets by reference.

    imagefolder:DIR          DIR/<class>/*.jpg, or DIR/*.jpg without labels; a bare path means the same
    cifar10[:ROOT]           the original CIFAR-10 through torchvision, downloaded only when allowed
    datumaro:FORMAT:DIR      every format that Datumaro reads
    npz:FILE                 `images` uint8 [N, H, W, C] and optionally `labels` int64 [N]

A set has images, its own label indices and their names; `model_labels` converts these to the classes of a
model.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import os
import struct
import threading
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.arrays import Npz
from ovcalib.data.boxes import Boxes
from ovcalib.data.objects import refuse_reference
from ovcalib.errors import DataError, UnknownNameError, UsageError, excerpt, require
from ovcalib.records.model import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "test"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# With a larger share of unreadable files the folder is refused.
MAX_UNREADABLE = 0.1
MAX_LABEL = 2**31 - 1


class ImageData(ABC):
    """A set of images, decoded when asked for.

    reference     how the user named it
    labels        int64 [N], indices into class_names; None where the set has no labels
    class_names   names of the labels, in label order; None where there are none
    """

    reference: str
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image:
        """The decoded image. Raises OSError, ValueError or SyntaxError where it cannot be decoded."""

    def name(self, index: int) -> str:
        return str(index)

    def boxes(self, index: int) -> Boxes | None:
        """The objects in an image, in its own pixels, with labels of the set; None where the set has no boxes."""
        return None


# What Pillow raises for a file that it cannot decode, or that claims to be too large.
UNDECODABLE = (OSError, ValueError, SyntaxError, OverflowError, MemoryError, EOFError, struct.error, zlib.error)
_opening = threading.Lock()


def decoded(path: Path) -> Image:
    """The image of a file, of at most PIL.Image.MAX_IMAGE_PIXELS. Raises one of UNDECODABLE."""
    import PIL.Image

    # Filters of warnings belong to the process, but images are decoded on threads.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            image = PIL.Image.open(path)
        except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
            raise ValueError(excerpt(error)) from error
    with image:
        image.load()
        return image


class FolderData(ImageData):
    """DIR/<class>/... or, without labels, DIR/*."""

    def __init__(self, reference: str, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"There is no folder {str(folder)!r}. Give a folder with one sub-folder a class.")
        self.reference = reference
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        files = {name: _image_files(folder / name) for name in classes}
        files = {name: found for name, found in files.items() if found}
        if files:
            _refuse_splits(folder, list(files))
            self.class_names = tuple(files)
            self.files = [path for found in files.values() for path in found]
            self.labels = np.repeat(np.arange(len(files)), [len(found) for found in files.values()])
        else:
            self.class_names = self.labels = None
            self.files = _image_files(folder)
        if not self.files:
            raise DataError(
                f"{str(folder)!r} holds no images. Expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}, "
                "in the folder itself or in one sub-folder a class."
            )

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image:
        return decoded(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


def open_image(file: Path) -> Image:
    """The image in a file. Raises DataError where there is none."""
    try:
        return decoded(file)
    except UNDECODABLE as error:
        raise DataError(f"{str(file)!r} is no image that can be decoded: {excerpt(error)}") from error


class ArrayData(ImageData):
    """Images in memory, uint8 [N, H, W, C]."""

    def __init__(
        self,
        reference: str,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.reference, self.images, self.labels, self.class_names = reference, images, labels, class_names

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image:
        import PIL.Image

        pixels = self.images[index]
        return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


class DatumaroData(ImageData):
    """Any format that Datumaro reads: the first label annotation of an item, or its boxes."""

    def __init__(self, reference: str, form: str, folder: Path) -> None:
        dm = require("datumaro", "quantize", f"The data reference {reference!r}")
        formats = set(dm.Environment().importers)
        if form not in formats:
            raise UnknownNameError("Datumaro format", form, formats)
        if not folder.exists():
            raise DataError(f"There is no folder {str(folder)!r} to read as {form!r}.")
        self.reference = reference
        try:
            dataset = dm.Dataset.import_from(str(folder), form)
            self.items = [item for item in dataset if item.media is not None]
        except Exception as error:  # Datumaro raises many unrelated types
            raise DataError(f"Datumaro cannot read {str(folder)!r} as {form!r}: {excerpt(error)}") from error
        if not self.items:
            raise DataError(f"Datumaro finds no images in {str(folder)!r} read as {form!r}.")
        labels = [
            next((a.label for a in item.annotations if a.type == dm.AnnotationType.label), None) for item in self.items
        ]
        categories = dataset.categories().get(dm.AnnotationType.label)
        complete = categories is not None and all(label is not None for label in labels)
        self.has_boxes = any(a.type == dm.AnnotationType.bbox for item in self.items for a in item.annotations)
        named = categories is not None and (complete or self.has_boxes)
        self.class_names = tuple(category.name for category in categories) if named else None
        self.labels = np.array(labels, dtype=np.int64) if complete else None

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> Image:
        import PIL.Image

        data = self.items[index].media.data  # BGR, as OpenCV has it
        if data is None:
            raise ValueError("no image data")
        pixels = np.clip(np.asarray(data), 0, 255).astype(np.uint8)
        return PIL.Image.fromarray(pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., 2::-1]))

    def name(self, index: int) -> str:
        return str(self.items[index].id)

    def boxes(self, index: int) -> Boxes | None:
        if not self.has_boxes:
            return None
        found = [a for a in self.items[index].annotations if a.type.name == "bbox"]
        if any(a.label is None for a in found):  # Datumaro reads COCO's category 0 as none
            raise DataError(
                f"{self.name(index)!r} of {self.reference!r} has a box without a category. Number the categories "
                "from 1."
            )
        corners = [(a.x, a.y, a.x + a.w, a.y + a.h) for a in found]
        return Boxes(
            np.array(corners, np.float64).reshape(-1, 4),
            np.array([a.label for a in found], np.int64),
            crowd=np.array([bool(a.attributes.get("is_crowd")) for a in found], np.bool_),
        )


def open_data(reference: str, split: Split = "test", download: bool = False) -> ImageData:
    """The set that a reference names.

    reference   see the module's docstring
    split       which half of a data set that has two: "train" to calibrate, "test" to evaluate
    download    allow CIFAR-10 to be fetched when it is not there
    raises      UsageError for a malformed reference, DataError for data that is not there
    """
    refuse_reference(reference)
    kind, _, rest = reference.partition(":")
    if kind == "imagefolder" and rest:
        return FolderData(reference, Path(rest))
    if kind == "cifar10":
        return _cifar10(reference, Path(rest) if rest else cache_dir() / "cifar10", split, download)
    if kind == "npz" and rest:
        return _npz(reference, Path(rest))
    if kind == "datumaro":
        form, _, folder = rest.partition(":")
        if not form or not folder:
            raise UsageError(f"{reference!r} is not a data reference. Expected datumaro:FORMAT:DIR.")
        return DatumaroData(reference, form, Path(folder))
    if Path(reference).is_dir():
        return FolderData(f"imagefolder:{reference}", Path(reference))
    if reference.endswith(".npz") and Path(reference).is_file():
        return _npz(f"npz:{reference}", Path(reference))
    if not rest and (os.sep in reference or reference.startswith(".")):
        raise DataError(f"There is no folder {reference!r}. Give a folder with one sub-folder a class.")
    raise UnknownNameError(
        "data reference", reference, ["imagefolder:DIR", "cifar10[:ROOT]", "datumaro:FORMAT:DIR", "npz:FILE"]
    )


def cache_dir() -> Path:
    """Where downloads are kept: $OVCALIB_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ovcalib"
    return Path(os.environ.get("OVCALIB_CACHE") or default)


def _cifar10(reference: str, root: Path, split: Split, download: bool) -> ImageData:
    torchvision = require("torchvision", "quantize", "The data reference 'cifar10'")
    try:
        data = torchvision.datasets.CIFAR10(str(root), train=split == "train", download=download)
    except RuntimeError as error:
        raise DataError(
            f"CIFAR-10 is not in {str(root)!r}. Put the folder cifar-10-batches-py there, "
            "or pass `download=True` to fetch it (170 MB)."
        ) from error
    except OSError as error:
        raise DataError(f"CIFAR-10 could not be downloaded to {str(root)!r}: {excerpt(error)}") from error
    return ArrayData(reference, data.data, np.array(data.targets, dtype=np.int64), tuple(data.classes))


def _npz(reference: str, path: Path) -> ImageData:
    with Npz(path) as archive:
        if "images" not in archive:
            raise DataError(f"{str(path)!r} holds {archive.held()}, but an array 'images' was expected.")
        header = archive.header("images")
        if (
            header.dtype != np.uint8
            or len(header.shape) != 4
            or header.shape[-1] not in (1, 3)
            or not min(header.shape)
        ):
            raise DataError(
                f"'images' in {str(path)!r} is {header}, but uint8 [N, H, W, 3] (RGB) or [N, H, W, 1] was expected."
            )
        return ArrayData(reference, archive.read("images"), read_labels(archive, header.shape[0]))


def read_labels(archive: Npz, count: int) -> NDArray[np.int64] | None:
    """The array 'labels', int64 [count]; None where there is none. Raises DataError."""
    if "labels" not in archive:
        return None
    header = archive.header("labels")
    labels = archive.read("labels") if header.dtype.kind in "iu" and header.shape == (count,) else None
    if labels is None or labels.min() < 0 or labels.max() > MAX_LABEL:
        raise DataError(f"'labels' in {str(archive.path)!r} is {header}; expected integers [{count}] of at least 0.")
    return labels.astype(np.int64)


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _refuse_splits(folder: Path, classes: list[str]) -> None:
    splits = [name for name in classes if name.lower() in {"train", "test", "val", "validation"}]
    if splits and len(splits) == len(classes):
        raise DataError(
            f"{str(folder)!r} holds the splits {', '.join(splits)}, not classes. "
            f"Name one of them, for example imagefolder:{folder / splits[0]}."
        )


# Labels ---------------------------------------------------------------------------------------


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of the 1,000 ImageNet classes, in class order."""
    return tuple(importlib.resources.files(__package__).joinpath("imagenet_wnids.txt").read_text().split())


def imagenet_names(count: int | None) -> tuple[str, ...] | None:
    """Names of the ImageNet classes for a model with so many outputs; None for other numbers than 1,000 and 1,001."""
    text = importlib.resources.files(__package__).joinpath("imagenet_classes.txt").read_text()
    names = tuple(text.splitlines())
    # 1,001 outputs: the TensorFlow convention, in which class 0 is the background.
    return {1000: names, 1001: ("background", *names)}.get(count or 0)


def class_names(data: ImageData, spec: ModelSpec) -> tuple[str, ...] | None:
    """Names of the model's classes, in its order, where they are known.

    They are its own, those of ImageNet where the set has WordNet ids, or those of a set with as many classes; numbers
    are no names.
    """
    if spec.classes is not None or not data.class_names:
        return spec.classes
    if set(data.class_names) <= set(imagenet_wnids()):
        return imagenet_names(spec.num_classes)
    fits = len(data.class_names) == spec.num_classes and not all(name.isdigit() for name in data.class_names)
    return data.class_names if fits else None


def model_labels(data: ImageData, spec: ModelSpec) -> NDArray[np.int64]:
    """The set's labels as class indices of the model, int64 [N].

    By name where the model's class names are known, by WordNet id for ImageNet models, and otherwise, as for names
    that are numbers, in sorted order of the names, which is what torchvision's ImageFolder trains with.
    raises   DataError where the set has no labels, or they do not fit
    """
    if data.labels is None:
        raise DataError(f"{data.reference!r} has no labels. Use one sub-folder a class, or an npz with 'labels'.")
    if data.class_names is None:
        if spec.num_classes is None or data.labels.max() >= spec.num_classes:
            raise DataError(
                f"{data.reference!r} has the label {data.labels.max()}, but {spec.name} has {spec.num_classes} "
                "classes, counted from 0."
            )
        return data.labels
    names = [_plain(name) for name in data.class_names]
    wnids = {wnid: i for i, wnid in enumerate(imagenet_wnids())}
    known = {_plain(name): i for i, name in enumerate(spec.classes or ())}
    if set(names) <= set(wnids) and spec.num_classes in (1000, 1001):
        index = [wnids[name] + (spec.num_classes == 1001) for name in names]
    elif known and set(names) <= set(known):
        index = [known[name] for name in names]
    elif len(names) == spec.num_classes and (not known or all(name.isdigit() for name in names)):
        index = list(range(len(names)))
    else:
        expected = f"{', '.join((spec.classes or ())[:10])}" if known else f"{spec.num_classes} sub-folders"
        raise DataError(
            f"{data.reference!r} has the classes {', '.join(data.class_names[:10])}"
            f"{', ...' if len(names) > 10 else ''} ({len(names)}), but {spec.name} has {spec.num_classes} classes. "
            f"Expected folder names: {expected}."
        )
    return np.array(index, dtype=np.int64)[data.labels]


def box_classes(data: ImageData, spec: ModelSpec) -> NDArray[np.int64] | None:
    """The detector's class for each class of a set with boxes, by name where both have names, else in order.

    returns   int64 [K], -1 for a class that the detector does not know; None for a set without boxes
    raises    DataError where no name is known to both, their numbers are not the same, or images are cropped
    """
    if not len(data) or data.boxes(0) is None or data.class_names is None:
        return None
    if spec.preprocessing.short_side is not None:
        raise DataError(
            f"{data.reference!r} has boxes, and `short_side={spec.preprocessing.short_side}` crops images, which cuts "
            "boxes off. Pass `short_side=0`."
        )
    if not spec.classes:
        return _in_order(data.reference, data.class_names, spec)
    known = {_plain(name): i for i, name in enumerate(spec.classes)}
    found = np.array([known.get(_plain(name), -1) for name in data.class_names], np.int64)
    if (found < 0).all():
        raise DataError(
            f"{data.reference!r} has the classes {', '.join(data.class_names[:10])}, none of which {spec.name} knows: "
            f"{', '.join(spec.classes[:10])}, ..."
        )
    return found


def _in_order(reference: str, names: Sequence[str], spec: ModelSpec) -> NDArray[np.int64]:
    """The classes of a detector without names; a category for the background is none of them."""
    if spec.box_labels is None:  # boxes come out of a graph, and their numbers are those of its output
        return np.arange(len(names))
    first, last = spec.box_labels
    objects = np.array([_plain(name).strip() != "background" for name in names])
    count = int(objects.sum())
    # RetinaNet and FCOS have no background, but torchvision trains them as the others: with objects from 1.
    start = 1 if count == last else first
    if count != last - start + 1:
        raise DataError(
            f"{reference!r} has {count} categories of objects, but {spec.name} tells {last - first + 1} apart (numbers "
            f"{first} to {last}) and names none of them. List exactly these in the set, also unused ones, with ids in "
            "the detector's order."
        )
    return np.where(objects, start + np.cumsum(objects) - 1, -1)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


# Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One image as the network will see it.

    pixels   uint8 [H, W, C], scaled and cropped
    label    class index of the model, or None
    boxes    in the same pixels, with classes of the model; None where the set has none
    """

    pixels: NDArray[np.uint8]
    label: int | None
    name: str
    boxes: Boxes | None = None


@dataclass
class Reader:
    """Iterates over samples of a set, decoding ahead on threads; counts unreadable files.

    order        indices to read, in this order; None for all
    labels       class indices of the model for the whole set, or None
    box_classes  the model's class for each class of the set, to read boxes too; -1 for one that it does not know
    unreadable   names of the files that could not be decoded
    """

    data: ImageData
    spec: ModelSpec
    labels: NDArray[np.int64] | None = None
    order: Sequence[int] | None = None
    box_classes: NDArray[np.int64] | None = None
    unreadable: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Sample]:
        order = iter(range(len(self.data)) if self.order is None else self.order)
        workers = 2
        tried = 0
        with ThreadPoolExecutor(workers) as pool:

            def ahead(count: int) -> list[Future[Sample | str]]:
                # Datumaro keeps its settings in context variables, which threads do not inherit.
                return [pool.submit(copy_context().run, self._read, i) for i in islice(order, count)]

            # A short window of decoded images ahead of the consumer bounds the memory.
            window = ahead(4 * workers)
            while window:
                sample = window.pop(0).result()
                window += ahead(1)
                tried += 1
                if isinstance(sample, Sample):
                    yield sample
                    continue
                self.unreadable.append(sample)
                if tried >= 20:
                    self._refuse_too_many(tried)
        self._refuse_too_many(tried)

    def _read(self, index: int) -> Sample | str:
        try:
            image = self.data.image(index)
            pixels = self.spec.preprocessing.fit(image)
        except UNDECODABLE:
            return self.data.name(index)
        label = None if self.labels is None else int(self.labels[index])
        boxes = None if self.box_classes is None else self.data.boxes(index)
        if boxes is not None and self.box_classes is not None:
            boxes = boxes.scaled(pixels.shape[1] / image.width, pixels.shape[0] / image.height)
            classes = self.box_classes[boxes.labels]
            boxes = dataclasses.replace(boxes, labels=classes).only(classes >= 0)
        return Sample(pixels, label, self.data.name(index), boxes)

    def _refuse_too_many(self, tried: int) -> None:
        if len(self.unreadable) > max(1, MAX_UNREADABLE * tried) or len(self.unreadable) == tried:
            raise DataError(
                f"{len(self.unreadable)} of the first {tried} images of {self.data.reference!r} cannot be decoded, "
                f"for example {self.unreadable[0]!r}. Remove the damaged files, or choose another folder."
            )


def choose(labels: NDArray[np.int64] | None, total: int, seed: int) -> list[int]:
    """A seeded order in which any prefix is as class-balanced as it can be.

    labels   int64 [total], or None for a plain permutation
    """
    rng = np.random.default_rng(seed)
    if labels is None:
        return [int(i) for i in rng.permutation(total)]
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    members = [members[i] for i in rng.permutation(len(members))]
    rounds = max(len(m) for m in members)
    return [int(m[r]) for r in range(rounds) for m in members if r < len(m)]


def load_images(data: ImageData, spec: ModelSpec) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The whole labelled set in memory: pixels uint8 [N, H, W, C] and class indices int64 [N]."""
    samples = list(Reader(data, spec, model_labels(data, spec)))
    return np.stack([s.pixels for s in samples]), np.array([s.label for s in samples], dtype=np.int64)
