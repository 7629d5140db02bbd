"""Input-output pairs of a teacher, on which a student is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.arrays import Header, Npz, read_npy
from ovcalib.data.sets import UNDECODABLE, decoded
from ovcalib.errors import DataError, ModelError, excerpt
from ovcalib.gan.sampling import Drawer, ZDistribution, draw_images, latent
from ovcalib.rundir import write_atomically, write_json

PAIRS = "pairs.npz"
MAX_Z_DIM = 2**14
MAX_CLASSES = 2**16


@dataclass(frozen=True)
class Pairs:
    """Inputs of a generator and its images.

    z         float32 [N, z_dim]
    labels    int64 [N]
    images    uint8 [N, H, W, 3]
    classes   names in label order; empty where nobody told
    """

    z: NDArray[np.float32]
    labels: NDArray[np.int64]
    images: NDArray[np.uint8]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def class_count(self) -> int:
        return len(self.classes) or int(self.labels.max()) + 1


def collect_pairs(
    drawer: Drawer,
    count: int,
    seed: int,
    z_dim: int,
    distribution: ZDistribution = "gaussian",
    tick: Callable[[int, str], None] = lambda done, note: None,
) -> Pairs:
    """`count` pairs with class-balanced labels; `drawer` must have been made with the same seed and distribution."""
    images, labels = draw_images(drawer, count, tick)
    if labels is None:
        raise DataError(
            f"{drawer.what} is unconditional, but a DiStyleGAN student learns classes. Choose another teacher."
        )
    z = np.stack([latent(seed, i, z_dim, distribution) for i in range(count)])
    return Pairs(z, labels, images, drawer.names)


def save_pairs(pairs: Pairs, folder: Path, provenance: dict[str, Any]) -> None:
    """pairs.npz and pairs.json in an existing folder."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, z=pairs.z, labels=pairs.labels, images=pairs.images, classes=np.array(pairs.classes, str))

    write_atomically(folder / PAIRS, write)
    write_json(folder / "pairs.json", provenance)


def load_pairs(path: Path) -> Pairs:
    """Pairs from a folder of `ovcalib gan collect`, an npz file, or the published layout class_<k>/{image,noise}_<i>.

    raises   DataError that says what was found and what was expected
    """
    if path.is_dir() and not (path / PAIRS).is_file():
        return _checked(_from_folder(path), path)
    file = path / PAIRS if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There are no pairs at {str(path)!r}. Make them with `ovcalib gan collect`.")
    with Npz(file) as archive:
        missing = {"z", "labels", "images"} - set(archive.names)
        if missing:
            raise DataError(f"{str(file)!r} holds {archive.held()}, but {', '.join(sorted(missing))} was expected.")
        _check({name: archive.header(name) for name in ("z", "labels", "images")}, path)
        names = archive.read("classes") if "classes" in archive else np.array([], str)
        z, labels, images = (archive.read(name) for name in ("z", "labels", "images"))
    classes = tuple(map(str, names)) if names.ndim == 1 and names.dtype.kind in "US" else ()
    return _checked(Pairs(z, labels, images, classes), path)


def _check(arrays: Mapping[str, Header | NDArray[Any]], path: Path) -> None:
    """Raise DataError where types and shapes are not those of pairs."""
    z, labels, images = (arrays[name] for name in ("z", "labels", "images"))
    n = images.shape[0] if images.shape else 0
    fits = {
        "z": z.dtype.kind == "f" and len(z.shape) == 2 and z.shape[0] == n and 0 < z.shape[1] <= MAX_Z_DIM,
        "labels": labels.dtype.kind in "iu" and labels.shape == (n,) and n > 0,
        "images": images.dtype == np.uint8
        and len(images.shape) == 4
        and images.shape[3] == 3
        and min(images.shape) > 0,
    }
    for name, fine in fits.items():
        if not fine:
            raise DataError(
                f"{name!r} of the pairs in {str(path)!r} is {arrays[name].dtype} {list(arrays[name].shape)}. Expected "
                "z float [N, D], labels int [N] and images uint8 [N, H, W, 3] with the same N."
            )


def _checked(pairs: Pairs, path: Path) -> Pairs:
    _check({"z": pairs.z, "labels": pairs.labels, "images": pairs.images}, path)
    if not np.isfinite(pairs.z).all():
        raise DataError(f"'z' of the pairs in {str(path)!r} is not finite.")
    low, high = pairs.labels.min(), pairs.labels.max()
    if low < 0 or high >= (len(pairs.classes) or MAX_CLASSES):
        raise DataError(
            f"The pairs in {str(path)!r} have labels from {low} to {high}, but "
            f"{len(pairs.classes) or f'at most {MAX_CLASSES}'} classes."
        )
    return Pairs(pairs.z.astype(np.float32), pairs.labels.astype(np.int64), pairs.images, pairs.classes)


def _from_folder(root: Path) -> Pairs:
    """class_<k>/image_<i>.png beside noise_<i>.pt (a tensor) or noise_<i>.npy, as the publication left its set."""
    found: list[tuple[int, Path, Path]] = []
    for folder in root.iterdir():
        label = re.fullmatch(r"class[_-](\d+)", folder.name)
        for image in sorted(folder.glob("image[_-]*.png")) if label else []:
            noise = [image.with_name(image.stem.replace("image", "noise", 1) + end) for end in (".pt", ".npy")]
            there = next((file for file in noise if file.is_file()), None)
            if there is None:
                raise DataError(f"{str(image)!r} has no latent beside it. Expected {noise[0].name} or {noise[1].name}.")
            found.append((int(label[1]) if label else 0, image, there))
    if not found:
        raise DataError(
            f"{str(root)!r} holds no pairs. Expected pairs.npz, or class_<k>/image_<i>.png with noise_<i>.pt or .npy."
        )
    found.sort(key=lambda entry: entry[0])
    try:
        images = np.stack([np.asarray(decoded(image).convert("RGB")) for _, image, _ in found])
        z = np.stack([_read_latent(noise) for _, _, noise in found])
    except (*UNDECODABLE, ModelError) as error:
        raise DataError(f"The pairs in {str(root)!r} cannot be read: {excerpt(error)}") from error
    return Pairs(z, np.array([label for label, _, _ in found], dtype=np.int64), images)


def _read_latent(path: Path) -> NDArray[np.float32]:
    if path.suffix == ".npy":
        array = read_npy(path)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{path.name} holds {array.dtype}, not numbers")
        return array.astype(np.float32).reshape(-1)
    import torch

    from ovcalib.models.pickles import read_torch

    value = read_torch(path)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not a tensor")
    return value.float().reshape(-1).numpy()


def subset(pairs: Pairs, indices: Sequence[int] | NDArray[np.int64]) -> Pairs:
    return Pairs(pairs.z[indices], pairs.labels[indices], pairs.images[indices], pairs.classes)
