"""The calibration set: images, labels and provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.arrays import Npz
from ovcalib.data.sets import read_labels
from ovcalib.errors import DataError, UsageError, excerpt
from ovcalib.records.base import checked
from ovcalib.records.calibration import Calibration, Domain, LabelOrigin, Provenance
from ovcalib.records.model import ModelSpec
from ovcalib.records.preprocessing import Preprocessing
from ovcalib.records.read import read_json
from ovcalib.rundir import write_atomically, write_json

# Beyond this many times the range of black to white, values cannot be normalised images.
MAX_RANGE_FACTOR = 10.0
PREVIEW_IMAGES = 64
PREVIEW_SIDE = 96


@dataclass(frozen=True)
class CalibrationSet:
    """Images to calibrate on.

    images          uint8 [N, H, W, C], RGB (domain "pixels"), or float32 [N, C, H, W], already normalised ("network").
                    Images made by inversion live in the network's domain; rounding and clipping them to pixels would
                    change the ranges that calibration measures.
    labels          int64 [N], classes of the model, or None
    preprocessing   turns pixels into network inputs
    """

    images: NDArray[np.uint8] | NDArray[np.float32]
    labels: NDArray[np.int64] | None
    preprocessing: Preprocessing
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.images)

    @property
    def input_range(self) -> tuple[float, float] | None:
        """Range of the network's input from its preprocessing; None for real images, whose own range is used.

        Generated images stand for photographs, whose pixels range from black to white; the range of generated images
        may be smaller or larger.
        """
        if self.provenance.real:
            return None
        low, high = self.preprocessing.input_range()
        return float(low.min()), float(high.max())

    @property
    def domain(self) -> Domain:
        return self.provenance.domain

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        """The network input of one image, float32 [1, C, H, W]. Raises IndexError past the end."""
        image = self.images[index]
        if self.domain == "pixels":
            return self.preprocessing.normalise(image.astype(np.uint8, copy=False))[None]
        return np.ascontiguousarray(image[None], dtype=np.float32)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self[i] for i in range(len(self)))

    def refuse_other_shape(self, spec: ModelSpec) -> None:
        """Raise DataError where the images are not of the shape that a model takes."""
        if self[0].shape[1:] != spec.input_shape:
            raise DataError(
                f"The calibration set holds images of {list(self[0].shape[1:])}, but {spec.name} takes "
                f"{list(spec.input_shape)}. Make the set for this model."
            )

    def subset(self, indices: range) -> CalibrationSet:
        """Some of the images, with their labels."""
        part = slice(indices.start, indices.stop)
        labels = None if self.labels is None else self.labels[part]
        return replace(self, images=self.images[part], labels=labels)

    def inputs(self, first: int = 0, last: int | None = None) -> list[NDArray[np.float32]]:
        """The network inputs of the images first..last; indices as in slices, None for the end."""
        return [self[i] for i in range(len(self))[first:last]]

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """One image for a person to look at, uint8 [H, W, C]; values outside black to white are clipped."""
        image = self.images[index]
        return image if self.domain == "pixels" else self.preprocessing.denormalise(image)

    def record(self) -> Calibration:
        """The calibration block of a result."""
        return Calibration(**self.provenance.model_dump(), has_labels=self.labels is not None)

    def __repr__(self) -> str:
        made = self.provenance
        return (
            f"<CalibrationSet {len(self)} images from {made.source}, {self.images.dtype} {list(self.images.shape[1:])}>"
        )

    def save(self, folder: Path, keep_images: bool = True, preview: bool = True) -> None:
        """Write calibration.npz, calibration.json and preview.png into a folder; each appears whole or not at all.

        keep_images   False writes the description alone
        preview       False leaves out preview.png
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_description(self, folder, preview and keep_images)
        if not keep_images:
            return
        arrays: dict[str, Any] = {
            "images": self.images, "domain": np.array(self.domain), "real": np.array(self.provenance.real),
        }  # fmt: skip
        if self.labels is not None:
            arrays["labels"] = self.labels
            arrays["label_origin"] = np.array(self.provenance.labels)
        # Not compressed: photographs and noise hardly shrink, and deflate would take longer than NNCF.
        write_atomically(folder / "calibration.npz", lambda partial: _savez(partial, arrays))


def read_set(folder: Path) -> CalibrationSet:
    """The set that `CalibrationSet.save` wrote into a folder, with its provenance.

    raises   DataError where the folder holds none
    """
    try:
        description = read_json(folder / "calibration.json")
        preprocessing = checked(Preprocessing, description.get("preprocessing", {}))
        provenance = checked(Provenance, description.get("provenance", {}))
    except UsageError as error:
        raise DataError(f"{str(folder)!r} holds no readable calibration set: {error}") from error
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    with Npz(folder / "calibration.npz") as archive:
        images, domain = _read_images(archive, shape, "the model")
        if domain != provenance.domain:
            raise DataError(f"{str(folder)!r} holds images of the domain {domain!r}, but says {provenance.domain!r}.")
        return CalibrationSet(images, read_labels(archive, len(images)), preprocessing, provenance)


def clipped_share(calibration: CalibrationSet) -> float:
    """Share of the values that lie outside black to white, and that pixels cannot hold; 0 for pixels."""
    if calibration.domain == "pixels":
        return 0.0
    low, high = (bound[:, None, None] for bound in calibration.preprocessing.input_range())
    outside = sum(int(((x < low) | (x > high)).sum()) for x in calibration)
    return outside / (calibration.images.size)


def write_description(calibration: CalibrationSet, folder: Path, preview: bool = True) -> None:
    """Write calibration.json and, where it is wanted, preview.png into a folder."""
    description = {
        "provenance": calibration.provenance.model_dump(mode="json"),
        "preprocessing": calibration.preprocessing.model_dump(mode="json"),
        "clipped_share": clipped_share(calibration),
    }
    write_json(folder / "calibration.json", description)
    if preview:
        write_atomically(folder / "preview.png", lambda partial: save_preview(calibration, partial))


def load_calibration(
    path: Path, spec: ModelSpec
) -> tuple[NDArray[Any], Domain, NDArray[np.int64] | None, LabelOrigin | None, bool]:
    """Images, domain, labels, their origin and whether they are real, of an npz file.

    The file is one that ovcalib wrote, or holds arrays of the user's own, which count as real.

    raises   DataError that says what the file holds and what was expected
    """
    with Npz(path) as archive:
        images, domain = _read_images(archive, spec.input_shape, spec.name)
        real = "real" not in archive or _one_value(archive, "real", "b").item()
        labels = read_labels(archive, len(images))
        if labels is None:
            return images, domain, None, None, real
        origin = str(_one_value(archive, "label_origin", "U")) if "label_origin" in archive else "data"
        if origin not in get_args(LabelOrigin):
            raise DataError(
                f"'label_origin' in {str(path)!r} is {excerpt(origin)!r}. Expected {', '.join(get_args(LabelOrigin))}."
            )
        return images, domain, labels, cast(LabelOrigin, origin), real


def _read_images(archive: Npz, shape: tuple[int, int, int], model: str) -> tuple[NDArray[Any], Domain]:
    """The array 'images' for a model of this input, and its domain. Raises DataError."""
    c, h, w = shape
    path = str(archive.path)
    expected = (
        f"Expected uint8 [N, {h}, {w}, {c}] pixels in RGB, or float32 [N, {c}, {h}, {w}] normalised as {model} takes "
        "them."
    )
    if "images" not in archive:
        raise DataError(f"{path!r} holds {archive.held()}, but an array 'images' was expected. {expected}")
    header = archive.header("images")
    pixels = header.dtype == np.uint8 and header.shape[1:] == (h, w, c)
    if not pixels and not (header.dtype.kind == "f" and header.shape[1:] == (c, h, w)):
        raise DataError(f"'images' in {path!r} is {header}. {expected}")
    if not header.shape[0]:
        raise DataError(f"'images' in {path!r} is empty. {expected}")
    images = archive.read("images")
    if pixels:
        return images, "pixels"
    with np.errstate(over="ignore"):  # values beyond float32 are refused as infinite
        return images.astype(np.float32), "network"


def _one_value(archive: Npz, name: str, kind: str) -> NDArray[Any]:
    """An array of one value and a kind of numpy. Raises DataError."""
    header = archive.header(name)
    if header.dtype.kind != kind or header.shape:
        raise DataError(f"{name!r} in {str(archive.path)!r} is {header}; expected one value. Leave it out.")
    return archive.read(name)


def preflight(calibration: CalibrationSet) -> list[str]:
    """Check a set before it is given to NNCF, which accepts NaN, zeros and unnormalised values silently.

    returns   warnings about values that are possible but unlikely
    raises    DataError for values that cannot be network inputs
    """
    name = repr(calibration.provenance.source)
    low, high = calibration.preprocessing.input_range()
    moments = np.zeros(2)
    smallest, largest = np.inf, -np.inf
    constant = []
    for i, x in enumerate(calibration):
        # Sums of float32 products are exact enough for warnings, and show NaN or infinity.
        flat = x.reshape(-1)
        moments += flat.sum() / flat.size, flat @ flat / flat.size
        if not np.isfinite(moments).all():
            raise DataError(f"Image {i} of {name} holds NaN or infinite values. Remove it, or make the set again.")
        bottom, top = x.min((0, 2, 3)), x.max((0, 2, 3))
        smallest, largest = min(smallest, float(bottom.min())), max(largest, float(top.max()))
        if (bottom == top).all():
            constant.append(i)
    if len(constant) == len(calibration) or len(constant) > max(1, len(calibration) // 10):
        raise DataError(
            f"{len(constant)} of the {len(calibration)} images of {name} are constant, image {constant[0]} among them. "
            "Expected images with content."
        )
    span = float(np.max(np.abs([low, high])))
    if max(abs(smallest), abs(largest)) > MAX_RANGE_FACTOR * span:
        hint = "They look like unnormalised pixels; " if smallest >= 0 and largest <= 255.5 else ""
        raise DataError(
            f"The values of {name} run from {smallest:.4g} to {largest:.4g}, but the model's inputs lie between "
            f"{low.min():.4g} (black) and {high.max():.4g} (white). {hint}pass uint8 pixels [N, H, W, C], or normalise."
        )
    warnings = [f"image {i} of {name} is constant" for i in constant]
    mean, square = moments / len(calibration)
    std = max(square - mean * mean, 0.0) ** 0.5
    if calibration.domain == "network" and low.min() < -0.5 and smallest >= 0 and largest <= 1:
        warnings.append(
            f"the values of {name} lie in 0..1, but the model takes {low.min():.3g} (black) to {high.max():.3g} "
            "(white): were they normalised?"
        )
    # Natural images come out near mean 0 and std 1 after the usual normalisation.
    middle, unit = float(np.mean((low + high) / 2)), float(np.mean(high - low))
    if abs(mean - middle) > 0.45 * unit or not 0.02 * unit < std < 0.6 * unit:
        warnings.append(
            f"{name} has mean {mean:.3g} and std {std:.3g} as network input, unlike photographs "
            f"(black is {low.min():.3g}, white {high.max():.3g})"
        )
    return warnings


def save_preview(calibration: CalibrationSet, path: Path) -> None:
    """A grid of the first images as PNG; small images are enlarged without smoothing."""
    from PIL import Image

    count = min(len(calibration), PREVIEW_IMAGES)
    columns = int(np.ceil(np.sqrt(count)))
    side = PREVIEW_SIDE
    grid = Image.new("RGB", (columns * (side + 2) - 2, -(-count // columns) * (side + 2) - 2), "white")
    for i in range(count):
        pixels = calibration.pixels(i)
        image = Image.fromarray(np.ascontiguousarray(pixels[..., np.arange(3) % pixels.shape[-1]]))
        smooth = Image.Resampling.NEAREST if max(image.size) <= side else Image.Resampling.LANCZOS
        tile = image.resize((side, side), smooth)
        grid.paste(tile, ((i % columns) * (side + 2), (i // columns) * (side + 2)))
    grid.save(path, format="PNG")


def _savez(path: Path, arrays: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)
