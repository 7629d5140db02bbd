"""Images as Python objects: arrays, data sets and loaders, for calibration, evaluation and prediction."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ovcalib
from ovcalib.calibration.make import set_of_object
from ovcalib.data.objects import ObjectImages
from ovcalib.errors import DataError, UsageError
from ovcalib.evaluation.dataset import ObjectSet, calibration_hashes
from ovcalib.models.load import Model
from ovcalib.records.options import CalibrationOptions
from tests.conftest import toy_images

FIELDS: dict[str, Any] = {
    "input_shape": (3, 16, 16),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "benchmark_time": 0,
}


def inputs(toy, images):
    return torch.from_numpy(toy.spec.preprocessing.normalise(images))


class Pairs(torch.utils.data.Dataset[Any]):
    """A map-style data set of PIL images."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return PIL.Image.fromarray(self.images[i]), int(self.labels[i])


def test_every_object_gives_the_same_images(toy):
    images, labels = toy.images[:6], toy.labels[:6]
    normalised = inputs(toy, images)
    for source in (
        images,
        np.moveaxis(images, -1, 1),
        list(images),
        torch.from_numpy(images),
        [PIL.Image.fromarray(image) for image in images],
        normalised,
        normalised.numpy().transpose(0, 2, 3, 1),
        (images, labels),
        (normalised, torch.from_numpy(labels)),
        Pairs(images, labels),
        TensorDataset(normalised, torch.from_numpy(labels)),
        DataLoader(TensorDataset(normalised, torch.from_numpy(labels)), batch_size=4),
        DataLoader(normalised, batch_size=4),
    ):
        opened = ObjectImages(source, toy.spec)
        assert len(opened) == 6
        found = list(opened.read())
        np.testing.assert_allclose(np.stack([x.input for x in found]), normalised.numpy(), atol=1e-6)
        assert [x.label for x in found] in ([None] * 6, labels.tolist())
    assert [x.label for x in ObjectImages((images, labels), toy.spec).read([3, 1])] == labels[[3, 1]].tolist()


@pytest.mark.parametrize("calibrated", ["pixels", "inputs"])
@pytest.mark.parametrize("evaluated", ["pixels", "inputs"])
def test_a_calibration_image_is_found_among_the_evaluation_images_in_either_form(toy, calibrated, evaluated):
    images, labels = toy.images[:6], toy.labels[:6]
    forms = {"pixels": images, "inputs": inputs(toy, images)}
    calibration = set_of_object(forms[calibrated][:3], CalibrationOptions(), Model(toy.spec))
    other = ObjectSet((forms[evaluated][3:], labels[3:]), toy.spec).images(calibration_hashes(calibration))
    assert len(list(other.items)) == 3
    same = ObjectSet((forms[evaluated], labels), toy.spec).images(calibration_hashes(calibration))
    with pytest.raises(DataError, match="Image 0 is in the calibration set and in the evaluation set"):
        list(same.items)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (iter(()), UsageError, "can be gone through only once"),
        (np.zeros((2, 3, 8, 8), np.float32), DataError, r"float32 \[3, 8, 8\]. Expected uint8 pixels"),
        (np.zeros((2, 16, 16, 3), np.int64), DataError, "is int64"),
        (np.zeros((0, 16, 16, 3), np.uint8), DataError, "no images"),
        ((np.zeros((2, 16, 16, 3), np.uint8), [0.5, 1]), DataError, "labels are float64"),
        ((np.zeros((2, 16, 16, 3), np.uint8), [0, 4]), DataError, "label 4 is none of the 4 classes"),
    ],
)
def test_what_is_no_set_of_images_is_refused(toy, source, error, message):
    with pytest.raises(error, match=message):
        list(ObjectImages(source, toy.spec).read())


def test_arrays_calibrate_loaders_evaluate_and_the_result_predicts(toy, tmp_path):
    loader = DataLoader(TensorDataset(inputs(toy, toy.images), torch.from_numpy(toy.labels)), batch_size=64)
    made, labels = toy_images(40, 3)
    result = ovcalib.quantize(
        toy.net, tmp_path / "out", calib=(made, labels), num_samples=30, eval=loader, limit=100, **FIELDS
    )
    record = result.record
    assert (record.calibration.source, record.recipe.evaluation.eval) == ("python:ndarray", "python:DataLoader")
    assert (record.calibration.num_samples, record.calibration.real, record.calibration.domain) == (30, True, "pixels")
    assert record.accuracy.protocol == "100 of 400 images of python:DataLoader"
    assert record.accuracy.fp32.top1 > 0.95
    assert set(result.calibration.labels) == {0, 1, 2, 3}
    again = ovcalib.evaluate(str(tmp_path / "out/int8/model.xml"), loader, limit=100)
    assert again.accuracy.top1 == record.accuracy.int8.top1
    # Prediction, from each form of the same image.
    path = tmp_path / "image.png"
    PIL.Image.fromarray(toy.images[7]).save(path)
    forms = (path, str(path), PIL.Image.open(path), toy.images[7], inputs(toy, toy.images[7:8])[0])
    first = result.predict(path)
    assert len(first) == 4
    assert first[0].label == toy.labels[7]
    assert sum(p.probability for p in first) == pytest.approx(1)
    for form in forms:
        assert [p.label for p in result.predict(form)] == [p.label for p in first]
    assert len(result.predict(path, top=1)) == 1
    with pytest.raises(DataError, match="no image that can be decoded"):
        result.predict(tmp_path / "out/result.json")
    # A recipe cannot hold the object, and says so.
    with pytest.raises(UsageError, match="stands for a Python object"):
        ovcalib.run_recipe(record.recipe, module=toy.net)


def test_objects_that_would_flatter_or_differ_are_refused(toy):
    data = TensorDataset(inputs(toy, toy.images), torch.from_numpy(toy.labels))
    with pytest.raises(UsageError, match="shuffles"):
        ovcalib.evaluate(
            toy.net, DataLoader(data, shuffle=True), **{k: v for k, v in FIELDS.items() if k != "benchmark_time"}
        )
    with pytest.raises(DataError, match="Image 0 is in the calibration set and in the evaluation set"):
        ovcalib.quantize(toy.net, calib=toy.images[:20], eval=(toy.images[:40], toy.labels[:40]), **FIELDS)
    with pytest.raises(UsageError, match="more than the 20 images"):
        ovcalib.quantize(toy.net, calib=toy.images[:20], num_samples=30, **FIELDS)
    with pytest.raises(DataError, match="calibration set holds images of"):
        ovcalib.quantize("resnet20-cifar10", calib=toy.calibration(8), benchmark_time=0)


def test_images_that_change_between_two_models_are_found_out(toy, monkeypatch):
    class Restless(Pairs):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return PIL.Image.fromarray(np.random.default_rng().permutation(np.asarray(image))), label

    monkeypatch.setattr("ovcalib.evaluation.outputs.MAX_KEPT_BYTES", 3000)  # so that they are read again
    restless = Restless(toy.images[20:60], toy.labels[20:60])
    with pytest.raises(DataError, match="gave other images"):
        ovcalib.quantize(toy.net, calib=toy.images[:20], eval=restless, **FIELDS)
