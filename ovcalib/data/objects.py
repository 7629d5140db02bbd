"""Images that Python objects hold: arrays, torch tensors, data sets and loaders.

uint8 [N, H, W, C] or [N, C, H, W]     pixels in RGB, of any size: fitted and normalised as files are
float [N, C, H, W] or [N, H, W, C]     what the network takes: normalised already
(images, labels)                       with class indices of the model, integers [N]
a torch Dataset, or any sequence       whose items are an image, or (image, label); an image is a PIL image or an array
a torch DataLoader                     whose batches are images, or (images, labels)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovcalib.errors import DataError, UsageError
from ovcalib.records.model import ModelSpec

# How a recipe names what it cannot hold.
PREFIX = "python:"


@dataclass(frozen=True)
class ObjectImage:
    """One image of an object.

    pixels   uint8 [H, W, C], scaled and cropped; None where the object holds network inputs
    input    float32 [C, H, W]
    """

    pixels: NDArray[np.uint8] | None
    input: NDArray[np.float32]
    label: int | None


class ObjectImages:
    """The images of an object, in the form that a model takes; they can be gone through again.

    raises   UsageError for an object that holds no images, or gives them only once
    """

    def __init__(self, source: Any, spec: ModelSpec) -> None:
        self.spec = spec
        self.reference = reference_of(source)
        self.labels: Any = None
        if isinstance(source, tuple) and len(source) == 2:
            source, self.labels = source[0], _array(source[1])
            if self.labels.dtype.kind not in "iu" or self.labels.shape != (len(source),):
                raise DataError(
                    f"The labels are {self.labels.dtype} {list(self.labels.shape)}. Expected integers [{len(source)}]."
                )
        self.loader = _is_loader(source)
        if not self.loader and not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise UsageError(
                f"Images cannot be taken from a {type(source).__name__}. Expected an array, a torch Dataset or "
                "DataLoader, or a list of images; a generator can be gone through only once."
            )
        self.source = source if self.loader or not _is_array(source) else _array(source)
        if not self.loader and not len(source):
            raise DataError("There are no images in the object that was given.")

    def __len__(self) -> int:
        return len(getattr(self.source, "dataset", self.source))

    def read(self, order: Sequence[int] | None = None) -> Iterator[ObjectImage]:
        """The images; `order` chooses among them, which loaders do themselves."""
        if self.loader:
            for batch in self.source:
                images, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
                for i in range(len(images)):
                    yield self._fitted(images[i], None if labels is None else labels[i])
            return
        for i in range(len(self.source)) if order is None else order:
            item = self.source[i]
            image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
            yield self._fitted(image, label if self.labels is None else self.labels[i])

    def _fitted(self, image: Any, label: Any) -> ObjectImage:
        preprocessing, (c, h, w) = self.spec.preprocessing, self.spec.input_shape
        index = None if label is None else int(label)
        if index is not None and not 0 <= index < (self.spec.num_classes or index + 1):
            raise DataError(
                f"The label {index} is none of the {self.spec.num_classes} classes of {self.spec.name}, counted from 0."
            )
        pixels = _pixels(image)
        if pixels is not None:
            fitted = preprocessing.fit(pixels)
            return ObjectImage(fitted, preprocessing.normalise(fitted), index)
        values = _array(image)
        if values.dtype.kind == "f" and values.shape == (h, w, c) != (c, h, w):
            values = np.moveaxis(values, -1, 0)
        if values.dtype.kind != "f" or values.shape != (c, h, w):
            raise DataError(
                f"An image of {self.reference} is {values.dtype} {list(values.shape)}. Expected uint8 pixels [H, W, C] "
                f"or [C, H, W], or normalised floats {[c, h, w]}."
            )
        return ObjectImage(None, np.ascontiguousarray(values, np.float32), index)


def reference_of(source: Any) -> str:
    """How a recipe names an object: it cannot hold it."""
    return f"{PREFIX}{type(source[0] if isinstance(source, tuple) and source else source).__name__}"


def refuse_reference(reference: str) -> None:
    """Raise UsageError for a reference that stands for an object of an earlier process."""
    if reference.startswith(PREFIX):
        raise UsageError(
            f"{reference!r} stands for a Python object, which a recipe cannot hold. Pass the object to "
            "`ovcalib.quantize`, or name other images."
        )


def refuse_shuffling(source: Any) -> None:
    """Raise UsageError for a loader that gives its images in another order every time."""
    sampler = getattr(source, "sampler", None)
    if _is_loader(source) and type(sampler).__name__ in ("RandomSampler", "WeightedRandomSampler"):
        raise UsageError(
            "The DataLoader shuffles, so two models would see different images. Pass one with shuffle=False."
        )


def _is_loader(source: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.utils.data.DataLoader)


def _is_array(source: Any) -> bool:
    return isinstance(source, np.ndarray) or hasattr(source, "detach")


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _pixels(image: Any) -> Any:
    """A PIL image of 8-bit pixels; None for anything else."""
    import PIL.Image

    if isinstance(image, PIL.Image.Image):
        return image
    values = _array(image)
    if values.dtype != np.uint8 or values.ndim not in (2, 3):
        return None
    if values.ndim == 3 and values.shape[-1] not in (1, 3) and values.shape[0] in (1, 3):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] not in (1, 3):
        return None
    return PIL.Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))
