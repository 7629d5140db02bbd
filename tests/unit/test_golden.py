"""Files of earlier versions still load."""

import json
import shutil
from pathlib import Path

import pytest

from ovcalib.records.read import read_recipe, read_record
from ovcalib.records.recipe import make_recipe
from ovcalib.records.result import Result
from ovcalib.reports.result import quantize_command, result_page

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_a_flat_recipe_is_the_nested_one() -> None:
    recipe = make_recipe(**read_recipe(GOLDEN / "recipe-0.1.yaml"))
    assert recipe.model.reference == "resnet20-cifar10"
    assert recipe.calibration.calib == "noise"
    assert recipe.calibration.options == {"distribution": "uniform"}
    assert (recipe.quantization.metric, recipe.quantization.validate_on) == ("agreement", "calibration")
    assert (recipe.quantization.guard, recipe.quantization.ignore) == (False, ("layer1.*",))
    assert (recipe.evaluation.eval, recipe.evaluation.limit) == ("imagefolder:photos", 10)
    assert recipe.measurement.benchmark_time == 0
    assert make_recipe(**json.loads(recipe.model_dump_json())) == recipe
    assert quantize_command(recipe) == (
        "ovcalib quantize resnet20-cifar10 --calib noise --num-samples 7 -O distribution=uniform --mode accuracy-aware "
        "--no-guard --ignore 'layer1.*' --metric agreement --max-drop 0.02 --validate calibration "
        "--eval imagefolder:photos --limit 10 --benchmark-time 0.0"
    )


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ("mode: default\nmax_time: 60\nmetric: top1", {"mode": "default"}),
        ("mode: default\nfinetune: true\nmax_time: 60", {"mode": "default", "finetune": True, "max_time": 60}),
        ("mode: [default]\nmax_time: 60", {"mode": ["default"]}),
        ("max_time: 60\nmetric: top1", {"max_time": 60, "metric": "top1"}),
        ("mode: weight-only\npreset: mixed", {"mode": "weight-only", "preset": "mixed"}),  # refused, not left out
    ],
)
def test_idle_fields_are_left_out_but_not_the_time_that_bounds_fine_tuning(tmp_path, fields, read) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: any\n{fields}\n")
    assert read_recipe(tmp_path / "recipe.yaml") == {"model": "any", **read}


def test_a_result_with_a_flat_recipe_and_idle_fields_is_read(tmp_path) -> None:
    shutil.copy(GOLDEN / "result-0.1.json", tmp_path / "result.json")
    record = read_record(tmp_path / "result.json")
    assert isinstance(record, Result)
    assert record.recipe.model.reference == "resnet20-cifar10"
    assert record.recipe.quantization.metric is None  # the default algorithm takes none
    assert record.calibration.source == "bn-inversion"
    assert not record.calibration.real
    assert record.quantization.rounding == "nearest"
    assert record.agreement.kernels is None
    assert "resnet20-cifar10" in result_page(record)
    # The same file is a recipe, too.
    assert make_recipe(**read_recipe(tmp_path / "result.json")) == record.recipe
