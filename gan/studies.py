"""Sets of images side by side: scored against real ones, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.sets import Reader, choose, model_labels, open_data
from ovcalib.errors import DataError, UsageError
from ovcalib.gan.pictures import by_class, grid, save_png, scatter, titled
from ovcalib.gan.scores import Extractor, Reference, classifier_extractor, embed, find_inception, noise_images
from ovcalib.progress import Progress
from ovcalib.records.model import ModelSpec

CLASSES_SHOWN = 10  # at most so many rows in a grid


@dataclass(frozen=True)
class ImageSet:
    """images uint8 [N, H, W, 3], and labels int64 [N] or None."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Study:
    """Sets of the same size and resolution.

    real, other_real   two disjoint halves of the reference
    sets               what is compared with them, by name
    extractor          made only when it is needed, because it may need weights that are not there
    """

    spec: ModelSpec
    real: ImageSet
    other_real: ImageSet
    sets: dict[str, ImageSet]
    extractor: Callable[[], Extractor]

    @property
    def count(self) -> int:
        return len(self.real.images)


def prepare(
    references: Sequence[str],
    reference: str,
    count: int,
    classifier: str,
    weights: str | None,
    seed: int,
    download: bool,
    progress: Progress,
) -> Study:
    """Read or make `count` images of every set; fewer where the reference cannot be halved into so many."""
    from ovcalib.models import builtin

    if classifier not in builtin.NAMES:
        raise UsageError(f"`classifier={classifier}`: expected a built-in model; see `ovcalib models`.")
    spec = builtin.spec(classifier)
    both = _read(reference, spec, 2 * count, seed, download)
    half = len(both.images) // 2
    if half < 2:
        raise DataError(f"{reference!r} holds {len(both.images)} images; at least 4 are needed for two halves.")
    real, other = (_part(both, slice(start, start + half)) for start in (0, half))
    named = [_named(text) for text in references]
    if len({name for name, _ in named}) < len(named):
        raise UsageError("Two sets have the same name. Write NAME=REFERENCE to tell them apart.")
    sets = {name: _make(text, spec, half, seed, download, progress) for name, text in named}
    return Study(spec, real, other, sets, lambda: _extractor(classifier, weights, progress))


def score_sets(study: Study, inception: Path | None, progress: Progress) -> dict[str, dict[str, float]]:
    """The measures of each set, of real images (the floor) and of noise (the ceiling)."""
    weights = find_inception(inception)
    if weights is None:
        progress.say("Inception's weights are not there (`inception_weights`); measuring with the classifier instead")
    reference = Reference(study.real.images, None if weights else study.extractor(), weights)
    height, width = study.real.images.shape[1:3]
    arms = {
        "real (floor)": study.other_real.images,
        **{name: made.images for name, made in study.sets.items()},
        "noise (ceiling)": noise_images(study.count, height, width, seed=0),
    }
    return {name: reference.score(images) for name, images in arms.items()}


def progress_score(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    count: int,
    classifier: str,
    weights: str | None,
    inception: Path | None,
    progress: Progress,
) -> Callable[[Any], dict[str, float]] | None:
    """The score in the log of a training: the Frechet distance of `count` images from real ones.

    returns   None, with a line for the user, where neither Inception's weights nor the classifier's are there
    """
    from ovcalib.gan.sampling import draw_images
    from ovcalib.gan.snapshot import Teacher
    from ovcalib.models import builtin

    chosen = images[choose(labels, len(images), 0)[:count]]
    found = find_inception(inception)
    if found is not None:
        reference = Reference(chosen, None, found)
    elif images.shape[1:] != (32, 32, 3) or not (weights or builtin.shipped_weights(classifier)):
        progress.say("no curve of distances: Inception's weights are not there, and no classifier that fits the images")
        return None
    else:
        reference = Reference(chosen, _extractor(classifier, weights, progress))

    def measure(generator: Any) -> dict[str, float]:
        made, _ = draw_images(Teacher(generator).drawer(seed=1), len(chosen))
        return {name: value for name, value in reference.score(made).items() if name.startswith("fid")}

    return measure


def _extractor(classifier: str, weights: str | None, progress: Progress) -> Extractor:
    from ovcalib.models.load import load_model
    from ovcalib.records.options import ModelOptions

    loaded = load_model(ModelOptions(reference=classifier, weights=weights), say=progress.say)
    assert loaded.module is not None
    return classifier_extractor(classifier.rpartition("-")[0], loaded.module, loaded.spec)


def draw(study: Study, folder: Path, each: int, tsne: int) -> None:
    """grid.png, and tsne.png where it is asked for."""
    classes = min(study.spec.num_classes or CLASSES_SHOWN, CLASSES_SHOWN)
    arms = {"real": study.real, **study.sets}
    panels = {}
    for name, arm in arms.items():
        if arm.labels is None:
            panels[name] = grid(arm.images[: classes * each], each, scale=2)
        else:
            panels[name] = grid(by_class(arm.images, arm.labels, each, classes), each, scale=2)
    save_png(titled(panels), folder / "grid.png")
    if tsne:
        extractor = study.extractor()
        features = [extractor.features(arm.images[:tsne])[0] for arm in arms.values()]
        groups = [name for name, found in zip(arms, features, strict=True) for _ in found]
        save_png(scatter(embed(np.concatenate(features)), groups), folder / "tsne.png")


def write_images(images: NDArray[np.uint8], labels: NDArray[np.int64] | None, folder: Path) -> None:
    """class-<k>/image-<i>.png (image-<i>.png without classes), and grid.png of the first hundred."""
    for i, image in enumerate(images):
        place = folder if labels is None else folder / f"class-{labels[i]}"
        place.mkdir(exist_ok=True)
        save_png(image, place / f"image-{i}.png")
    save_png(grid(images[:100], 10, scale=2), folder / "grid.png")


def _named(text: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and rest else (text, text)


def _part(images: ImageSet, part: slice) -> ImageSet:
    return ImageSet(images.images[part], None if images.labels is None else images.labels[part])


def _make(reference: str, spec: ModelSpec, count: int, seed: int, download: bool, progress: Progress) -> ImageSet:
    from ovcalib.calibration import SOURCES
    from ovcalib.calibration.sources import Request, generate

    if reference.partition(":")[0] in set(SOURCES) - {"real", "npz"}:
        with progress.task(reference, count) as tick:
            made = generate(reference, Request(count=count, seed=seed, spec=spec, tick=tick, download=download))
        return ImageSet(np.stack([made.pixels(i) for i in range(len(made))]), made.labels)
    found = _read(reference.removeprefix("real:"), spec, count, seed, download)
    if len(found.images) < count:
        raise DataError(
            f"{reference!r} holds {len(found.images)} images, but {count} are compared: the measures depend on the "
            f"number. Pass `count={len(found.images)}`, or give more images."
        )
    return found


def _read(reference: str, spec: ModelSpec, count: int, seed: int, download: bool) -> ImageSet:
    data: Any = open_data(reference, "train", download)
    labels = None if data.labels is None else model_labels(data, spec)
    samples = list(Reader(data, spec, labels, choose(labels, len(data), seed)[:count]))
    known = None if labels is None else np.array([s.label for s in samples], dtype=np.int64)
    return ImageSet(np.stack([s.pixels for s in samples]), known)
