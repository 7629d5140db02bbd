"""Fixtures that several files share. Nothing here trains for more than a few seconds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

# Tests must not find what a user has cached, nor leave anything there.
os.environ["OVCALIB_CACHE"] = "/nonexistent/ovcalib-cache"
# Test processes share the cores: a thread of torch that waits for another one must not keep a core busy meanwhile.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference data that lies beside some checkouts."""
    if not SHARED.is_dir():
        pytest.skip("the reference data is not beside this checkout")
    return SHARED


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def toy_images(count, seed):
    """Four classes that a tiny network can tell apart: stripes of two directions, coarse or fine. uint8 [N, 16, 16, 3]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    ramp = np.arange(16)
    images = np.empty((count, 16, 16, 3), np.uint8)
    for i, label in enumerate(labels):
        period = (3.0, 7.0)[label // 2] * rng.uniform(0.9, 1.1)
        wave = np.sin(2 * np.pi * ramp / period + rng.uniform(0, 6))
        plane = np.broadcast_to(wave[:, None] if label % 2 else wave, (16, 16))
        colour = rng.uniform(0.3, 1.0, 3)
        image = 127 + 90 * plane[..., None] * colour + rng.normal(0, 12, (16, 16, 3))
        images[i] = np.clip(image, 0, 255)
    return images, labels.astype(np.int64)


@pytest.fixture(scope="session")
def toy():
    """A tiny trained residual network with BatchNorm, its spec, and labelled images it has not seen."""
    import torch
    from torch import nn

    from ovcalib import ModelSpec, Preprocessing
    from ovcalib.records.model import Weights
    from tests.toy import ToyNet

    spec = ModelSpec(
        name="toy", input_shape=(3, 16, 16), num_classes=4, weights=Weights(origin="random"),
        classes=("fine-h", "fine-v", "wide-h", "wide-v"),
        preprocessing=Preprocessing(height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    )  # fmt: skip
    torch.manual_seed(0)
    net = ToyNet()
    images, labels = toy_images(1024, 1)
    x, y = torch.from_numpy(spec.preprocessing.normalise(images)), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(6):
        for index in torch.randperm(1024, generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    net.eval()
    return Toy(net, spec, *toy_images(400, 2))


class Toy:
    def __init__(self, net, spec, images, labels) -> None:
        self.net, self.spec, self.images, self.labels = net, spec, images, labels

    def calibration(self, count=64, images=None):
        from ovcalib.calibration.sets import CalibrationSet
        from ovcalib.records.calibration import Provenance

        chosen = toy_images(count, 3)[0] if images is None else images
        provenance = Provenance(
            source="toy", options={}, num_samples=len(chosen), requested=len(chosen), seed=0, seconds=0.0,
            domain="pixels" if chosen.dtype == np.uint8 else "network", labels=None,
        )  # fmt: skip
        return CalibrationSet(chosen, None, self.spec.preprocessing, provenance)

    def write_folder(self, root: Path, count=200, seed=2) -> Path:
        """An image folder with the toy classes."""
        import PIL.Image

        images, labels = toy_images(count, seed)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / self.spec.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(folder / f"{i:04}.png")
        return root


@pytest.fixture(scope="session")
def toy_graph(toy, tmp_path_factory):
    """The toy network as an FP32 OpenVINO graph."""
    from ovcalib.export.to_onnx import to_onnx
    from ovcalib.graph.files import describe, read_graph

    path = tmp_path_factory.mktemp("toy") / "toy.onnx"
    to_onnx(toy.net, toy.spec.input_shape, path)
    graph = read_graph(path)
    describe(graph, toy.spec)
    return graph
