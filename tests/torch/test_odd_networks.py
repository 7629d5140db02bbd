"""Networks that are not what a classifier usually is: each works, or is refused with what to do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ovcalib
from ovcalib.errors import DataError, ModelError
from ovcalib.models.load import load_model
from ovcalib.records.options import ModelOptions

SHAPE = (3, 16, 16)


class Output(nn.Module):
    """A small network whose output `change` makes of features [N, 4]."""

    def __init__(self, change, channels=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.change = change

    def forward(self, x):
        return self.change(self.stem(x).mean((2, 3)))


def load(module, shape=SHAPE):
    given = {"mean": (0.5,) * shape[0], "std": (0.25,) * shape[0]}
    return load_model(ModelOptions(reference="odd", input_shape=shape, **given), module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.sum(), r"returns torch.float32 \[\]"),
        (lambda x: x.argmax(1), r"returns torch.int64 \[1\]"),
        (lambda x: x > 0, r"returns torch.bool \[1, 4\]"),
        (lambda x: x[:, :0], r"returns torch.float32 \[1, 0\]"),
        (lambda x: "cat", "returns a str without tensors"),
        (lambda x: None, "returns a NoneType without tensors"),
        (lambda x: {"name": "cat"}, "returns a dict without tensors"),
        (lambda x: (x, x.argmax(1)), "returns torch.int64"),
        (lambda x: x.to(torch.complex64), "returns torch.complex64"),
        (lambda x: nn.functional.dropout(x, 0.5, training=True), "other outputs each time.*self.training"),
        (lambda x: x + torch.randn_like(x), "other outputs each time"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(change, message):
    torch.manual_seed(0)  # dropout of four outputs leaves the same ones now and then
    with pytest.raises(ModelError, match=message):
        load(Output(change))


@pytest.mark.parametrize(
    ("change", "classes"),
    [
        (lambda x: x, 4),
        (lambda x: (x, x * 2), None),
        (lambda x: {"logits": x, "features": x * 2}, None),
        (lambda x: [x], None),
        (lambda x: x[:, :, None, None], None),
        (lambda x: x.repeat(1, 5461), 21844),
        (lambda x: x.double(), 4),
    ],
)
def test_outputs_that_can_be_compared_load(change, classes):
    assert load(Output(change)).spec.num_classes == classes


def trained(module):
    """The module with BatchNorm statistics as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.5, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return module


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


def test_several_inputs_are_refused():
    with pytest.raises(ModelError, match="does not take an input of shape"):
        load(TwoInputs())


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("source", ["fractal", "bn-inversion"])
def test_networks_of_other_channels_are_calibrated_with_made_images(channels, source, tmp_path):
    options: dict[str, Any] = {"options": {"steps": 2}} if source == "bn-inversion" else {}
    module = trained(Output(lambda x: x, channels))
    shape = (channels, 16, 16)
    made = ovcalib.generate(
        source,
        module,
        3,
        tmp_path / "out",
        input_shape=shape,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        **options,
    )
    assert made[0].shape == (1, *shape)
    assert np.isfinite(made[0]).all()
    assert (tmp_path / "out" / "preview.png").is_file()


def test_images_of_files_do_not_fit_other_channels(toy, tmp_path):
    toy.write_folder(tmp_path / "images", 8)
    with pytest.raises(DataError, match="1 or 3 channels, but the model takes 4"):
        ovcalib.generate(
            f"real:{tmp_path / 'images'}",
            Output(lambda x: x, 4),
            4,
            input_shape=(4, 16, 16),
            mean=(0.5,) * 4,
            std=(0.25,) * 4,
        )


class OnePixel(nn.Module):
    """BatchNorm layers that see maps of 1x1 alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 16), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        )

    def forward(self, x):
        return self.body(x).flatten(1)


def test_maps_of_one_pixel_are_inverted():
    made = ovcalib.generate(
        "bn-inversion",
        trained(OnePixel()),
        2,
        input_shape=SHAPE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        options={"steps": 2},
    )
    assert np.isfinite(made[0]).all()


def test_maps_of_one_pixel_have_no_spread_within_an_image():
    options = {"steps": 2, "scope": "sample", "input_weight": 0}
    with pytest.raises(ModelError, match="scope=set"):
        ovcalib.generate(
            "bn-inversion", trained(OnePixel()), 2, input_shape=SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3, options=options
        )
