"""The measures against closed forms and brute force."""

import numpy as np
import pytest
import torch

from ovcalib.gan import scores
from ovcalib.gan.scores import Extractor, Reference


def test_frechet_distance_of_known_gaussians() -> None:
    # Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2.
    a, b, shift = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.0]), np.array([3.0, 0.0, 4.0])
    found = scores.frechet_distance(np.zeros(3), np.diag(a), shift, np.diag(b))
    assert found == pytest.approx(25 + 1 + 4)
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    turned = scores.frechet_distance(np.zeros(3), turn @ np.diag(a) @ turn.T, turn @ shift, turn @ np.diag(b) @ turn.T)
    assert turned == pytest.approx(found)


def test_frechet_distance_equals_the_general_matrix_root(rng) -> None:
    import scipy.linalg

    a, b = rng.standard_normal((300, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((200, 5)) + 1
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(root))
    assert scores.frechet_of_features(a, b) == pytest.approx(expected)
    assert scores.frechet_of_features(a, a) == pytest.approx(0, abs=1e-8)


def test_kernel_distance_by_brute_force_and_without_bias(rng) -> None:
    a, b = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 0.5

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert scores.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between)
    same = [scores.kernel_distance(rng.standard_normal((20, 3)), rng.standard_normal((20, 3))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20


def test_precision_and_recall_by_brute_force(rng) -> None:
    real, made = rng.standard_normal((40, 2)), rng.standard_normal((50, 2)) * 0.5 + 1

    def covered(points, by):
        hits = 0
        for p in points:
            hits += any(np.linalg.norm(p - q) <= sorted(np.linalg.norm(q - r) for r in by)[3] for q in by)
        return hits / len(points)

    assert scores.precision_recall(real, made) == pytest.approx((covered(made, real), covered(real, made)))
    assert scores.precision_recall(real, real) == (1, 1)
    assert scores.precision_recall(real, made + 100) == (0, 0)


def test_class_confidence_has_known_ends() -> None:
    assert scores.class_confidence(np.eye(10).repeat(10, 0)[np.arange(100).reshape(10, 10).T.ravel()]) == pytest.approx(
        10
    )
    assert scores.class_confidence(np.full((50, 10), 0.1)) == pytest.approx(1)


def test_names_say_whose_features_they_are(rng) -> None:
    extractor = Extractor("toy", lambda x: (x.reshape(len(x), -1)[:, :4] / 255.0, np.full((len(x), 2), 0.5)))
    images = rng.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    found = Reference(images, extractor).score(images)
    assert found["fid-toy"] == pytest.approx(0, abs=1e-8)
    assert found["class-confidence-toy"] == pytest.approx(1)
    assert "fid" not in found
    assert all(name.endswith("-toy") for name in found)


def test_features_are_the_input_of_the_last_layer(toy) -> None:
    extractor = scores.classifier_extractor("toy", toy.net, toy.spec)
    features, probabilities = extractor.features(toy.images[:300])
    linear = [m for m in toy.net.modules() if isinstance(m, torch.nn.Linear)][-1]
    logits = features @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    assert (logits.argmax(1) == probabilities.argmax(1)).all()
    assert probabilities.sum(1) == pytest.approx(np.ones(300), abs=1e-5)


def test_noise_is_farther_than_real_images(toy) -> None:
    extractor = scores.classifier_extractor("toy", toy.net, toy.spec)
    reference = Reference(toy.images[:200], extractor)
    floor = reference.score(toy.images[200:])
    ceiling = reference.score(scores.noise_images(200, 16, 16, seed=0))
    assert floor["fid-toy"] < 0.2 * ceiling["fid-toy"]
    assert floor["precision-toy"] > ceiling["precision-toy"]
