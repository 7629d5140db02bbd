"""Distances between sets of images: Frechet and kernel distance, precision and recall, class confidence.

The names FID, KID and Inception Score belong to the features of one Inception network, and are given only through
torch-fidelity with its weights. On the features of another classifier the same measures carry its name, for example
`fid-resnet20`; they compare sets with each other, never with published numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovcalib.errors import DataError, UsageError, require

if TYPE_CHECKING:
    from torch import nn

    from ovcalib.records.model import ModelSpec

Floats = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
BATCH = 250
NEIGHBOURS = 3
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


# Measures of features -------------------------------------------------------------------------


def frechet_distance(mean_a: Floats, cov_a: Floats, mean_b: Floats, cov_b: Floats) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, equation 6).

    The root of cov_a cov_b has the trace of the root of the symmetric root(cov_a) cov_b root(cov_a), which has real
    eigenvalues even where a covariance is singular.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum())


def frechet_of_features(a: Floats, b: Floats) -> float:
    """Frechet distance of Gaussians fitted to two sets of features, [N, D] and [M, D]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return max(0.0, frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)))


def kernel_distance(a: Floats, b: Floats) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    a, b   [N, D] and [M, D], at least two rows each; the result may be slightly negative
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m, d = len(a), len(b), a.shape[1]
    within_a, within_b, between = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return float(
        (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
        + (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
        - 2 * between.mean()
    )


def kernel_distance_of_subsets(a: Floats, b: Floats, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance over random subsets."""
    size = min(KID_SUBSET_SIZE, len(a), len(b))
    rng = np.random.default_rng(seed)
    found = [
        kernel_distance(a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)])
        for _ in range(KID_SUBSETS)
    ]
    return float(np.mean(found)), float(np.std(found))


def precision_recall(real: Floats, made: Floats, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of made images near real ones, and of real images near made ones (Kynkaanniemi et al. 2019).

    Near means within the distance of some image of the other set to its own k-th neighbour.
    """

    def covered(points: Floats, by: Floats, radii: Floats) -> float:
        parts = np.array_split(points, max(1, len(points) // 500))
        return float(np.mean(np.concatenate([(_distances(part, by) <= radii).any(axis=1) for part in parts])))

    def radii_of(points: Floats) -> Floats:
        parts = np.array_split(points, max(1, len(points) // 500))
        # The nearest is the point itself.
        return np.concatenate(
            [np.partition(_distances(part, points), neighbours, axis=1)[:, neighbours] for part in parts]
        )

    if min(len(real), len(made)) <= neighbours:
        raise DataError(f"Precision and recall need more than {neighbours} images in each set.")
    real, made = real.astype(np.float64), made.astype(np.float64)
    return covered(made, real, radii_of(real)), covered(real, made, radii_of(made))


def _distances(a: Floats, b: Floats) -> Floats:
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    root: Floats = np.sqrt(square.clip(0))
    return root


def class_confidence(probabilities: Floats, splits: int = 10) -> float:
    """exp of the mean divergence of p(y|x) from p(y), averaged over splits (Salimans et al. 2016).

    1 when every image gets the same answer, the number of classes when all answers are sure and balanced. With
    Inception's probabilities this is the Inception Score.
    """
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), min(splits, len(probabilities))):
        p = part.clip(1e-16)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


# Features -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    """A classifier whose last hidden layer measures images.

    name       stands in the names of the measures
    features   uint8 [N, H, W, 3] -> features [N, D] and probabilities [N, K]
    """

    name: str
    features: Callable[[Pixels], tuple[Floats, Floats]]


def classifier_extractor(name: str, module: nn.Module, spec: ModelSpec) -> Extractor:
    """The input of a network's last linear layer, and its softmax. Raises UsageError for a network without one."""
    import torch

    linear = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    if not linear:
        raise UsageError(f"{name!r} has no linear layer whose input could measure images. Choose another classifier.")
    module.eval()

    @torch.no_grad()
    def features(images: Pixels) -> tuple[Floats, Floats]:
        expected = (spec.input_shape[1], spec.input_shape[2])
        if images.shape[1:3] != expected:
            raise DataError(f"The images are {images.shape[1:3]}, but {name} takes {expected}.")
        kept: list[Any] = []
        hook = linear[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].flatten(1).float()))
        probabilities = []
        try:
            for start in range(0, len(images), BATCH):
                x = torch.from_numpy(spec.preprocessing.normalise(images[start : start + BATCH]))
                x = x.to(next(module.parameters()).device)
                probabilities.append(torch.softmax(module(x).float(), dim=1).cpu().numpy())
        finally:
            hook.remove()
        return torch.cat(kept).cpu().numpy(), np.concatenate(probabilities)

    return Extractor(name, features)


@dataclass
class Reference:
    """Real images, measured once.

    extractor   None measures with Inception, through torch-fidelity
    """

    images: Pixels
    extractor: Extractor | None
    inception: Path | None = None

    def __post_init__(self) -> None:
        self._features = None if self.extractor is None else self.extractor.features(self.images)[0]

    def score(self, images: Pixels) -> dict[str, float]:
        """The measures of a set against this one."""
        if self.extractor is None or self._features is None:
            return inception_scores(images, self.images, self.inception)
        features, probabilities = self.extractor.features(images)
        name = self.extractor.name
        kernel, spread = kernel_distance_of_subsets(self._features, features)
        precision, recall = precision_recall(self._features, features)
        return {
            f"fid-{name}": frechet_of_features(self._features, features),
            f"kid-{name}": kernel,
            f"kid-std-{name}": spread,
            f"precision-{name}": precision,
            f"recall-{name}": recall,
            f"class-confidence-{name}": class_confidence(probabilities),
        }


def find_inception(given: Path | None) -> Path | None:
    """The Inception weights: the given file, or those that torch-fidelity has downloaded before; else None."""
    if given is not None:
        if not given.is_file():
            raise UsageError(
                f"There is no file {str(given)!r}. Expected {INCEPTION_FILE} of torch-fidelity's releases."
            )
        return given
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return cached if cached.is_file() else None


def inception_scores(images: Pixels, reference: Pixels, weights: Path | None) -> dict[str, float]:
    """Inception Score, FID, KID, precision and recall, all by torch-fidelity."""
    fidelity = require("torch_fidelity", "gan", "Scores on Inception's features")
    import torch

    found = fidelity.calculate_metrics(
        input1=_image_set(images), input2=_image_set(reference), isc=True, fid=True, kid=True, prc=True, verbose=False,
        cuda=torch.cuda.is_available(), kid_subset_size=min(KID_SUBSET_SIZE, len(images), len(reference)),
        feature_extractor_weights_path=None if weights is None else str(weights), save_cpu_ram=True,
    )  # fmt: skip
    names = {
        "fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
        "kid-std": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
        "inception-score": "inception_score_mean", "inception-score-std": "inception_score_std",
    }  # fmt: skip
    return {name: float(found[theirs]) for name, theirs in names.items()}


def _image_set(images: Pixels) -> Any:
    """What torch-fidelity takes: a data set of uint8 tensors [3, H, W]."""
    import torch

    class Images(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(images[index].transpose(2, 0, 1)))

    return Images()


def noise_images(count: int, height: int, width: int, seed: int) -> Pixels:
    """The ceiling: pixels that are independent and uniform."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def embed(features: Floats, seed: int = 0) -> Floats:
    """t-SNE of features in the plane, [N, 2] (van der Maaten and Hinton 2008)."""
    manifold = require("sklearn.manifold", "gan", "t-SNE")
    perplexity = min(30.0, max(1.0, (len(features) - 1) / 3))
    found: Floats = manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    return found
