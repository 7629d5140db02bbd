import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovcalib import Preprocessing
from ovcalib.errors import UsageError
from ovcalib.models.load import _preprocessing
from ovcalib.records.base import checked
from ovcalib.records.options import ModelOptions

CIFAR = Preprocessing(height=32, width=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def gradient(height, width):
    values = np.arange(height * width * 3, dtype=np.uint32) % 256
    return PIL.Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))


def test_a_value_is_normalised_by_the_formula() -> None:
    pixels = np.full((32, 32, 3), 255, np.uint8)
    white = CIFAR.normalise(pixels)[:, 0, 0]
    assert white == pytest.approx([(1 - m) / s for m, s in zip(CIFAR.mean, CIFAR.std, strict=True)], abs=1e-6)


def test_input_range_is_black_and_white() -> None:
    low, high = CIFAR.input_range()
    # The published ranges of CIFAR inputs under these constants.
    assert low == pytest.approx([-2.4291, -2.4183, -2.2214], abs=1e-4)
    assert high == pytest.approx([2.5141, 2.5968, 2.7537], abs=1e-4)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_denormalise_undoes_normalise_for_every_pixel_value(order) -> None:
    pre = CIFAR.model_copy(update={"channel_order": order})
    pixels = np.arange(256, dtype=np.uint8).repeat(3 * 4).reshape(32, 32, 3)
    assert np.array_equal(pre.denormalise(pre.normalise(pixels)), pixels)


def test_bgr_swaps_the_first_and_last_channel() -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    plain = Preprocessing(height=32, width=32)
    assert plain.normalise(red)[0].max() == 1
    swapped = plain.model_copy(update={"channel_order": "BGR"}).normalise(red)
    assert swapped[2].max() == 1
    assert swapped[0].max() == 0


def test_batches_and_single_images_agree(rng) -> None:
    pixels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(CIFAR.normalise(pixels)[2], CIFAR.normalise(pixels[2]))


def test_fit_follows_torchvision(rng) -> None:
    transforms = pytest.importorskip("torchvision").transforms
    pre = Preprocessing(height=224, width=224, short_side=256)
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for height, width in ((256, 341), (500, 375), (300, 300), (257, 1000)):
        image = gradient(height, width)
        assert np.array_equal(pre.fit(image), np.asarray(reference(image)))


def test_fit_leaves_an_image_of_the_right_size_alone() -> None:
    image = gradient(32, 32)
    assert np.array_equal(CIFAR.fit(image), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_fit_reads_every_colour_mode_as_rgb(mode) -> None:
    image = PIL.Image.new(mode, (40, 30))
    assert CIFAR.fit(image).shape == (32, 32, 3)


def test_one_channel_networks_get_grey() -> None:
    pre = Preprocessing(height=8, width=8, mean=(0.5,), std=(0.5,))
    assert pre.fit(gradient(9, 9)).shape == (8, 8, 1)
    assert pre.normalise(np.zeros((8, 8, 1), np.uint8)).shape == (1, 8, 8)


@given(st.integers(1, 64), st.integers(1, 64))
def test_fit_always_gives_the_network_input(height, width) -> None:
    pre = Preprocessing(height=16, width=24, short_side=32)
    assert pre.fit(gradient(height, width)).shape == (16, 24, 3)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolation_is_pillows(method) -> None:
    image = gradient(50, 40)
    fitted = Preprocessing(height=20, width=20, interpolation=method).fit(image)
    assert np.array_equal(fitted, np.asarray(image.resize((20, 20), PIL.Image.Resampling[method.upper()])))


@pytest.mark.parametrize(("share", "short"), [(0.875, 256), (0.9, 248), (0.95, 235), (1.0, 224)])
def test_the_share_of_the_crop_is_a_short_side(share, short) -> None:
    """224 pixels are so much of the short side (timm rounds down)."""
    options = ModelOptions(reference="m", crop_share=share, interpolation="bicubic")
    known = Preprocessing(height=224, width=224, short_side=300, mean=(0.5,) * 3, std=(0.5,) * 3)
    made, _ = _preprocessing((3, 224, 224), options, known)
    assert made == known.model_copy(update={"short_side": short, "interpolation": "bicubic"})


def test_a_crop_is_asked_for_once() -> None:
    with pytest.raises(UsageError, match="`crop_share=0.9` and `short_side=256` both say how large the crop is"):
        checked(ModelOptions, {"reference": "m", "crop_share": 0.9, "short_side": 256})
    with pytest.raises(UsageError, match="crop_share=1.5"):
        checked(ModelOptions, {"reference": "m", "crop_share": 1.5})


@pytest.mark.parametrize(
    ("shape", "short_side"), [((3, 32, 32), None), ((3, 224, 224), 256), ((3, 300, 400), None), ((1, 48, 320), None)]
)
def test_what_nothing_is_said_about_is_cropped_as_in_training_where_it_is_square(shape, short_side) -> None:
    """A crop that is wider than the scaled image would have black edges."""
    options = ModelOptions(reference="x")
    found, _ = _preprocessing(shape, options, None)
    assert found.short_side == short_side
    assert found.fit(PIL.Image.new("RGB", (500, 500), "white")).min() == 255
