"""The pasted objects are where their boxes say, and the detector that is trained on them is ovcalib's as well."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from ovcalib.calibration import fractal
from ovcalib.data.sets import Reader, box_classes, open_data
from ovcalib.models.load import load_model
from ovcalib.models.weights import load_state_dict, save_state_dict
from ovcalib.records.options import ModelOptions
from ovcalib.rundir import file_sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import train_detector

        # Looking for 64 function systems takes seconds.
        patch.setattr(fractal, "Options", partial(fractal.Options, points=2000, systems=2))
        yield train_detector


@pytest.fixture(scope="module")
def pasted(recipe):
    return recipe.pasted_objects


@pytest.fixture(scope="module")
def tiles():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3), np.arange(40) % 10 + 1


def overlap(a, b) -> float:
    """Intersection over union by counting pixels."""
    masks = np.zeros((2, 160, 160), bool)
    for mask, (left, top, right, bottom) in zip(masks, (a, b), strict=True):
        mask[top:bottom, left:right] = True
    return float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())


def test_objects_lie_in_the_image_and_leave_each_other_to_be_seen(pasted) -> None:
    scenes = pasted.draw(np.random.default_rng(0), 300, 40)
    assert set(scenes.there.sum(1)) == {1, 2, 3, 4}
    assert scenes.tile.min() == 0
    assert scenes.tile.max() == 39
    shown = scenes.corners[scenes.there]
    assert shown.min() == 0
    assert shown.max() == 160
    width, height = (shown[:, 2:] - shown[:, :2]).T
    np.testing.assert_array_equal(width, height)
    assert (width.min(), width.max()) == (32, 96)
    for corners, there in zip(scenes.corners, scenes.there, strict=True):
        boxes = list(corners[there])
        areas = [int(box[2] - box[0]) for box in boxes]
        assert areas == sorted(areas, reverse=True)  # what lies below is never the smaller one
        assert all(overlap(a, b) < 0.2 for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_tile_is_where_its_box_says_as_pillow_would_paste_it(pasted, tiles) -> None:
    backgrounds = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (20, 3, 160, 160), dtype=np.uint8))
    scenes = pasted.draw(np.random.default_rng(2), 20, 40)
    painted = pasted.paint(backgrounds, tiles[0], scenes)
    assert scenes.mirrored[scenes.there].any()
    for i in range(20):
        expected = PIL.Image.fromarray(backgrounds[i].permute(1, 2, 0).numpy())
        for k in np.flatnonzero(scenes.there[i]):
            tile = PIL.Image.fromarray(tiles[0][scenes.tile[i, k]].permute(1, 2, 0).numpy())
            left, top, right, bottom = scenes.corners[i, k].tolist()
            if scenes.mirrored[i, k]:
                tile = PIL.ImageOps.mirror(tile)
            expected.paste(tile.resize((right - left, bottom - top), PIL.Image.Resampling.BILINEAR), (left, top))
        difference = np.abs(painted[i].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
        assert difference.max() <= 1  # Pillow rounds between the two directions


def test_an_image_depends_on_the_seed_and_its_number_alone(pasted, tiles) -> None:
    few, more, others = (list(pasted.images(*tiles, seed, count)) for seed, count in ((3, 2), (3, 3), (4, 2)))
    for (image, boxes), (again, same) in zip(few, more, strict=False):
        assert torch.equal(image, again)
        np.testing.assert_array_equal(boxes.corners, same.corners)
        np.testing.assert_array_equal(boxes.labels, same.labels)
    assert not torch.equal(few[0][0], few[1][0])
    assert not torch.equal(few[0][0], others[0][0])
    assert few[0][1].corners.tolist() != others[0][1].corners.tolist()


def test_the_loss_is_torchvisions(recipe) -> None:
    torch.manual_seed(0)
    detector: Any = recipe.ssdlite160()
    anchors = recipe.anchors_of(detector)
    scenes = recipe.pasted_objects.draw(np.random.default_rng(5), 12, 10)
    corners, labels, there = map(torch.from_numpy, (scenes.corners.astype(np.float32), scenes.tile + 1, scenes.there))
    corners[::2, :, 2:] -= 0.7 * (corners[::2, :, 2:] - corners[::2, :, :2])  # too small for the IoU of any anchor
    heads = {"cls_logits": torch.randn(12, len(anchors), 11), "bbox_regression": torch.randn(12, len(anchors), 4)}
    targets = [{"boxes": c[t], "labels": k[t]} for c, k, t in zip(corners, labels, there, strict=True)]
    from torchvision.ops import box_iou

    chosen = [detector.proposal_matcher(box_iou(target["boxes"], anchors)) for target in targets]
    losses = detector.compute_loss(targets, heads, [anchors] * 12, chosen)
    torch.testing.assert_close(recipe.ssd_loss(detector, heads, anchors, corners, labels, there), sum(losses.values()))


def test_a_stopped_training_goes_on_to_the_same_weights(recipe, tiles, tmp_path, monkeypatch) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, images=tiles[0].permute(0, 2, 3, 1).numpy(), labels=tiles[1] - 1)

    def run(out, *more):
        monkeypatch.setattr(sys, "argv", ["train", "--train", f"npz:{data}", "--test", f"npz:{data}", "-o",
                                          str(tmp_path / out), "--steps", "3", "--batch", "2", "--backgrounds", "4",
                                          "--test-count", "2", "--device", "cpu", *more])  # fmt: skip
        recipe.main()
        return tmp_path / out / "ssdlite160.safetensors"

    whole = load_state_dict(run("whole", "--no-evaluate"))
    assert not run("parts", "--stop-after", "2").exists()
    parts = load_state_dict(run("parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    record = json.loads((tmp_path / "parts/ssdlite160.json").read_text())
    run("whole", "--evaluate-only")
    evaluated = json.loads((tmp_path / "whole/ssdlite160.json").read_text())
    assert 0 <= record["map"] <= record["map50"] <= 1
    assert {key: evaluated[key] for key in ("map", "map50", "sha256")} == {
        key: record[key] for key in ("map", "map50", "sha256")
    }
    half = run("whole", "--evaluate-only", "--half")
    for key, rounded in load_state_dict(half).items():
        assert torch.equal(rounded.float(), whole[key].half().float() if whole[key].ndim > 1 else whole[key])
    assert json.loads((tmp_path / "whole/ssdlite160.json").read_text())["sha256"] == file_sha256(half)


def test_ovcalib_reads_the_set_and_finds_what_the_training_finds(recipe, tiles, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    detector: Any = recipe.ssdlite160()
    with torch.no_grad():
        for block in detector.head.classification_head.module_list:
            block[1].weight.mul_(100)  # far from ties
    weights = tmp_path / "w.safetensors"
    save_state_dict(detector.state_dict(), weights)
    model: Any = load_model(ModelOptions(reference="benchmarks.networks:ssdlite160", weights=str(weights)))
    assert model.spec.task == "detection"
    assert model.spec.input_shape == (3, 160, 160)

    np.savez(tmp_path / "tiles.npz", images=tiles[0].permute(0, 2, 3, 1).numpy(), labels=tiles[1] - 1)
    read_tiles, labels = recipe.pasted_objects.read_tiles(f"npz:{tmp_path / 'tiles.npz'}")
    np.testing.assert_array_equal(labels, tiles[1])
    made = list(recipe.pasted_objects.images(read_tiles, labels, 0, 4))
    recipe.pasted_objects.write(tmp_path / "set", iter(made))
    data = open_data(f"datumaro:coco:{tmp_path / 'set'}")
    read = list(Reader(data, model.spec, box_classes=box_classes(data, model.spec)))
    assert data.class_names == recipe.pasted_objects.CLASSES
    for sample, (image, boxes) in zip(sorted(read, key=lambda sample: sample.name), made, strict=True):
        np.testing.assert_array_equal(sample.pixels, image.permute(1, 2, 0).numpy())
        objects = [sorted(zip(b.corners.tolist(), b.labels.tolist(), strict=True)) for b in (sample.boxes, boxes)]
        assert objects[0] == objects[1]
        x = torch.from_numpy(model.spec.preprocessing.normalise(sample.pixels[None]))
        torch.testing.assert_close(recipe.to_input(image[None]), x)
        with torch.no_grad():
            found = model.module.boxes([head.numpy() for head in model.module(x)])
        (expected,) = recipe.detected(detector, image[None])
        assert len(expected) > 10
        np.testing.assert_allclose(found.corners, expected.corners, atol=1e-3)
        np.testing.assert_array_equal(found.labels, expected.labels)


def test_the_shipped_weights_are_those_of_their_card(recipe) -> None:
    weights = ROOT / "benchmarks/weights/ssdlite160.safetensors"
    card = json.loads(weights.with_suffix(".json").read_text())
    assert card["sha256"] == file_sha256(weights)
    detector: Any = recipe.ssdlite160()
    detector.load_state_dict(load_state_dict(weights))
    assert weights.stat().st_size < 3e6
