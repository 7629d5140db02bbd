"""What a user wrote, and what was meant."""

import json
import re

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from ovcalib.calibration.sources import open_source
from ovcalib.cli.app import app
from ovcalib.data.sets import class_names, imagenet_wnids, model_labels, open_data
from ovcalib.errors import DataError, UsageError
from ovcalib.evaluation.dataset import open_dataset, refuse_same_images
from ovcalib.models import load
from ovcalib.records.options import EvaluationOptions, ModelOptions
from ovcalib.records.recipe import make_recipe
from ovcalib.records.sweep import make_sweep_recipe
from tests.unit.test_fp32_fault import spec


@pytest.mark.parametrize(
    ("field", "given", "divided"),
    [("mean", "123.675,116.28,103.53", "0.485,0.456,0.406"), ("std", "58.395,57.12,57.375", "0.229,0.224,0.225")],
)
def test_a_normalisation_on_the_scale_of_bytes_is_refused(field, given, divided):
    options = ModelOptions(reference="resnet20-cifar10", **{field: given})
    with pytest.raises(UsageError, match=f"looks like the 0..255 scale.*`{field}={divided}`"):
        load.load_model(options)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["evaluate", "model.xml", "--eval", "photos"], "--data"),
        (["quantize", "resnet20-cifar10", "--data", "photos"], "--eval"),
        (["quantize", "resnet20-cifar10", "--count", "3"], "--num-samples"),
        (["benchmark", "model.xml", "--seconds", "3"], "--time"),
    ],
)
def test_an_option_of_another_command_is_offered_by_its_name_here(arguments, meant):
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert f"No such option '{arguments[2]}'. Did you mean '{meant}'?" in found.stderr


def test_an_option_without_a_namesake_here_is_not_offered():
    assert "Did you mean --data" not in CliRunner().invoke(app, ["generate", "noise", "--eval", "photos"]).stderr


def test_a_name_of_a_library_is_offered_with_its_prefix(monkeypatch):
    monkeypatch.setattr(load, "LIBRARIES", {"torchvision": lambda name: name == "resnet18", "timm": lambda name: True})
    with pytest.raises(UsageError, match="Did you mean 'torchvision:resnet18' or 'timm:resnet18'"):
        load.load_model(ModelOptions(reference="resnet18"))
    with pytest.raises(UsageError, match="Did you mean 'timm:vit_tiny'"):
        load.load_model(ModelOptions(reference="vit_tiny"))


def test_the_libraries_know_their_names():
    assert load.LIBRARIES["torchvision"]("resnet18")
    assert not load.LIBRARIES["torchvision"]("resnet20-cifar10")


def test_images_in_place_of_a_source_are_offered_as_one(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((1, 8, 8, 3), np.uint8))
    for given, meant in (
        (str(tmp_path), f"real:imagefolder:{tmp_path}"),
        (f"imagefolder:{tmp_path}", f"real:imagefolder:{tmp_path}"),
        ("cifar10", "real:cifar10"),
        (str(tmp_path / "set.npz"), f"npz:{tmp_path}/set.npz"),
    ):
        with pytest.raises(UsageError) as error:
            open_source(given, spec(), None)
        assert f"Did you mean {meant!r}?" in str(error.value)
    with pytest.raises(UsageError, match="Unknown calibration source 'fractals'. Did you mean 'fractal'"):
        open_source("fractals", spec(), None)


def write(root, *classes):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(root / name / "a.png")
    return root


def test_calibrating_on_the_evaluation_images_is_refused_before_anything_is_made(tmp_path):
    write(tmp_path / "a", "red", "green"), write(tmp_path / "b", "red", "green")
    given = spec()
    evaluation = open_dataset(f"imagefolder:{tmp_path / 'a'}", given)
    options = EvaluationOptions(eval=evaluation.reference)
    for calib in (f"real:imagefolder:{tmp_path / 'a'}", f"real:{tmp_path / 'b' / '..' / 'a'}"):
        with pytest.raises(DataError, match="come out of the evaluation set"):
            refuse_same_images(calib, evaluation, options)
        refuse_same_images(calib, evaluation, EvaluationOptions(allow_overlap=True))
    for calib in (f"real:imagefolder:{tmp_path / 'b'}", "fractal", "bn-inversion"):
        refuse_same_images(calib, evaluation, options)


def test_a_source_that_learns_from_the_evaluation_set_is_refused_on_any_part_of_it(tmp_path):
    write(tmp_path / "a", "red", "green")
    reference = f"imagefolder:{tmp_path / 'a'}"
    part = EvaluationOptions(eval=reference, limit=1)
    evaluation = open_dataset(reference, spec(), 1)
    with pytest.raises(DataError, match="come out of the evaluation set"):
        refuse_same_images(f"fdda:{reference}", evaluation, part)
    # Its images are made, so hashes do not find them; those of a part of a folder are found by their hashes.
    refuse_same_images(f"real:{reference}", evaluation, part)


def test_classes_of_imagenet_have_names_where_folders_are_wordnet_ids(tmp_path):
    wnids = imagenet_wnids()
    data = open_data(str(write(tmp_path, wnids[0], wnids[1], wnids[999])))
    names = class_names(data, spec(num_classes=1000))
    assert (len(names), names[0], names[1], names[999]) == (1000, "tench", "goldfish", "toilet tissue")
    assert class_names(data, spec(num_classes=1001))[:2] == ("background", "tench")
    assert class_names(data, spec())[0] == "red"  # the model's own
    assert class_names(data, spec(num_classes=12)) is None


def test_a_set_with_as_many_classes_names_them_unless_by_numbers(tmp_path):
    data = open_data(str(write(tmp_path / "names", "cat", "dog", "frog")))
    assert class_names(data, spec(num_classes=3)) == ("cat", "dog", "frog")
    assert class_names(data, spec(num_classes=4)) is None
    numbered = open_data(str(write(tmp_path / "numbers", "0", "1", "2")))
    assert class_names(numbered, spec(num_classes=3)) is None
    # A model with names takes numbers in their order.
    named = spec(num_classes=3).model_copy(update={"classes": ("cat", "dog", "frog")})
    assert model_labels(numbered, named).tolist() == [0, 1, 2]


def test_a_sweep_shows_its_cells_and_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(
        "models: [resnet20-cifar10]\nsources: [noise, fractal]\nmodes: [default, accuracy-aware]\n"
    )
    found = CliRunner().invoke(app, ["sweep", "s.yaml", "--dry-run"])
    assert found.exit_code == 0, found.stderr
    assert "quantize 4 times" in found.stdout
    assert len(re.findall("^resnet20-cifar10 ", found.stdout, re.MULTILINE)) == 4
    plan = json.loads(CliRunner().invoke(app, ["sweep", "s.yaml", "--dry-run", "--json"]).stdout)
    cells = plan["cells"]
    assert plan["calibration_sets"] == 2
    assert [(cell["source"], cell["mode"]) for cell in cells][:2] == [("noise", "default"), ("noise", "accuracy-aware")]
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_the_images_of_a_sweep_may_stand_under_common():
    content = {"models": ["a"], "sources": ["noise"]}
    recipe = make_sweep_recipe({**content, "common": {"limit": 7, "eval": "cifar10", "preset": "mixed"}})
    assert (recipe.limit, recipe.eval, recipe.common) == (7, "cifar10", {"preset": "mixed"})
    with pytest.raises(UsageError, match="'limit', which a sweep sets by cell"):
        make_sweep_recipe({**content, "limit": 3, "common": {"limit": 7}})


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("rounding", ("auto", "nearest", "compensated")),
        ("activation_ranges", ("auto", "min-max", "mean-min-max", "histogram")),
        ("bias_correction", ("auto", "none", "fast", "full", "layerwise")),
        ("overflow_fix", ("auto", "disable", "first-layer", "enable")),
        ("deploy_isa", ("any", "vnni", "avx2")),
    ],
)
def test_a_wrong_choice_is_answered_with_all_of_them(name, choices) -> None:
    with pytest.raises(UsageError) as found:
        make_recipe(model="m", **{name: "bogus"})
    assert f"{name}=" in str(found.value)
    assert all(repr(choice) in str(found.value) for choice in choices)
