"""The published pedestrian detector: its anchors, its padding and the file of its weights, which is not here."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import pedestrians

        yield pedestrians


@pytest.fixture(scope="module")
def maps(published):
    with torch.no_grad():
        return list(published.Backbone().eval()(torch.zeros(1, 3, published.SIZE, published.SIZE)).values())


def test_the_maps_are_those_of_the_published_network(maps) -> None:
    assert [tuple(x.shape[1:]) for x in maps] == [
        (576, 19, 19), (1280, 10, 10), (512, 5, 5), (256, 3, 3), (256, 2, 2), (128, 1, 1),
    ]  # fmt: skip


def test_every_value_of_the_head_has_its_anchor(published, maps) -> None:
    images = ImageList(torch.zeros(2, 3, published.SIZE, published.SIZE), [(published.SIZE, published.SIZE)] * 2)
    first, second = published.Anchors()(images, maps)
    assert torch.equal(first, second)
    with torch.no_grad():
        found = published.Head([x.shape[1] for x in maps]).eval()(maps)
    assert found["bbox_regression"].shape == (1, len(first), 4)
    assert found["cls_logits"].shape == (1, len(first), 2)
    assert len(first) == 1917
    # The first position of the first map: 30 pixels square, then a fifth of the side with ratios 2 and 1/2.
    centre = published.SIZE / 19 / 2
    for anchor, (width, height) in zip(
        first, [(30, 30), (60 * 2**0.5, 60 / 2**0.5), (60 / 2**0.5, 60 * 2**0.5)], strict=False
    ):
        expected = [centre - width / 2, centre - height / 2, centre + width / 2, centre + height / 2]
        np.testing.assert_allclose(anchor, expected, atol=1e-3)
    # The last: the whole image, in the middle of the only position, and the root of 0.95 times 1 for the square.
    np.testing.assert_allclose(first[-6], [7.5, 7.5, 292.5, 292.5], atol=1e-3)
    half = published.SIZE * 0.95**0.5 / 2
    np.testing.assert_allclose(first[-1], [150 - half, 150 - half, 150 + half, 150 + half], atol=1e-3)


@pytest.mark.parametrize(("side", "before"), [(8, 0), (7, 1)])
def test_strides_are_padded_as_by_tensorflow(published, side, before) -> None:
    """Output i of ceil(side / 2) reads from 2 i on, after half of the padding that this takes, rounded down."""
    layer = published.Layer(2, 3, 3, stride=2, relu=False).eval()
    x = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(x)
        padded = F.pad(x, (before, 2, before, 2))
        count = -(-side // 2)
        for i in range(count):
            for j in range(count):
                read = padded[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                expected = (layer.conv.weight * read).sum((1, 2, 3)) / (1 + 1e-3) ** 0.5
                torch.testing.assert_close(found[0, :, i, j], expected, atol=1e-5, rtol=1e-4)
    assert found.shape[2:] == (count, count)


def message(*parts: tuple[int, bytes | int]) -> bytes:
    """A protobuf message, of numbers and of anything longer."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    return b"".join(
        varint(number << 3) + varint(value) if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in parts
    )  # fmt: skip


def test_the_floats_of_a_frozen_graph_are_read(published, tmp_path) -> None:
    value = np.arange(600, dtype=np.float32).reshape(2, 300)
    shape = message((2, message((1, 2))), (2, message((1, 300))))

    def node(name: str, kind: str, tensor: bytes) -> bytes:
        entry = message((1, b"value"), (2, message((8, tensor))))
        return message(
            (1, name.encode()), (2, kind.encode()), (5, message((1, b"dtype"), (2, message((6, 1))))), (5, entry)
        )

    floats = node("a/weights", "Const", message((1, 1), (2, shape), (4, value.tobytes())))
    others = node("b", "Const", message((1, 3), (2, shape), (4, struct.pack("<2i", 1, 2))))
    named = message((1, b"c"), (2, b"Relu"), (3, b"a/weights"))
    path = tmp_path / "graph.pb"
    path.write_bytes(message((1, floats), (1, others), (1, named), (4, message((1, 21)))))
    found = published.constants(path)
    assert list(found) == ["a/weights"]
    np.testing.assert_array_equal(found["a/weights"], value)
