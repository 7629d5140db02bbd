"""Input-output pairs of a teacher, on which a student is trained."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from ovcalib.errors import DataError
from ovcalib.gan.sampling import Drawer, ZDistribution, draw_images, latent
from ovcalib.rundir import write_atomically, write_json

PAIRS = "pairs.npz"
MAX_Z_DIM = 2**14


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
        return _check(_from_folder(path), path)
    file = path / PAIRS if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There are no pairs at {str(path)!r}. Make them with `ovcalib gan collect`.")
    try:
        with np.load(file, allow_pickle=False) as archive:
            missing = {"z", "labels", "images"} - set(archive.files)
            if missing:
                raise DataError(
                    f"{str(file)!r} holds {', '.join(archive.files)}, but {', '.join(sorted(missing))} was expected."
                )
            classes = tuple(str(name) for name in archive["classes"]) if "classes" in archive.files else ()
            return _check(Pairs(archive["z"], archive["labels"], archive["images"], classes), path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(file)!r} is not a readable npz file: {str(error).splitlines()[0]}") from error


def _check(pairs: Pairs, path: Path) -> Pairs:
    n = len(pairs.images)
    fits = {
        "z": pairs.z.dtype.kind == "f" and pairs.z.ndim == 2 and len(pairs.z) == n and pairs.z.shape[1] <= MAX_Z_DIM,
        "labels": pairs.labels.dtype.kind in "iu" and pairs.labels.shape == (n,) and n > 0 and pairs.labels.min() >= 0,
        "images": pairs.images.dtype == np.uint8 and pairs.images.ndim == 4 and pairs.images.shape[3] == 3,
    }
    for name, fine in fits.items():
        if not fine:
            array = getattr(pairs, name)
            raise DataError(
                f"{name!r} of the pairs in {str(path)!r} is {array.dtype} {list(array.shape)}. Expected "
                "z float [N, D], labels int [N] and images uint8 [N, H, W, 3] with the same N."
            )
    if not np.isfinite(pairs.z).all():
        raise DataError(f"'z' of the pairs in {str(path)!r} is not finite.")
    if pairs.classes and pairs.labels.max() >= len(pairs.classes):
        raise DataError(
            f"The pairs in {str(path)!r} have the label {pairs.labels.max()}, but {len(pairs.classes)} classes."
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
        images = np.stack([np.asarray(PIL.Image.open(image).convert("RGB")) for _, image, _ in found])
        z = np.stack([_read_latent(noise) for _, _, noise in found])
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"The pairs in {str(root)!r} cannot be read: {str(error).splitlines()[0]}") from error
    return Pairs(z, np.array([label for label, _, _ in found], dtype=np.int64), images)


def _read_latent(path: Path) -> NDArray[np.float32]:
    if path.suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32).reshape(-1)
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many unrelated types for damaged files
        raise ValueError(f"{path.name} is no tensor that can be read safely") from error
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not a tensor")
    return value.float().reshape(-1).numpy()


def subset(pairs: Pairs, indices: Sequence[int] | NDArray[np.int64]) -> Pairs:
    return Pairs(pairs.z[indices], pairs.labels[indices], pairs.images[indices], pairs.classes)
