"""Recipes, keys and tables of a sweep; nothing here quantizes."""

import csv
import importlib
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ovcalib.errors import DeviceError, UsageError
from ovcalib.evaluation.metrics import T95, t95
from ovcalib.models.builtin import shipped_weights
from ovcalib.records.options import QuantizationOptions
from ovcalib.records.sweep import SweepCell, make_sweep_recipe
from ovcalib.sweeps.engines import LocalEngine, open_engine, share_of_cpus
from ovcalib.sweeps.plan import content_of, plan
from ovcalib.sweeps.state import read_sweep
from ovcalib.sweeps.tables import Estimate, best, csv_report, estimate, markdown_report

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "models": ["resnet20-cifar10"],
    "sources": ["noise", {"calib": "dgh", "options": {"steps": 3}}],
    "seeds": [0, 1],
}


def recipe(**changes):
    return make_sweep_recipe({**SMALL, **changes})


# The recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": []}, ["models=[]", "at least 1"]),
        ({"model": "x"}, ["unknown field 'model'", "models, modes, seeds, sources"]),
        ({"models": [{"model": "a", "wieghts": "b"}]}, ["unknown field 'models[0].wieghts'", "weights"]),
        ({"models": [{"model": "a", "input_shape": [3, 32]}]}, ["models[0].input_shape=[3, 32]", "expected C,H,W"]),
        ({"models": ["a", "a"]}, ["'a' is there twice", "'name'"]),
        ({"sources": ["noise", {"calib": "noise", "name": "b"}]}, ["'noise' and 'b' are the same"]),
        ({"models": ["a", {"model": "a", "name": "b", "command": "train b"}]}, ["'a' and 'b' are the same"]),
        ({"sources": [{"calib": "noise", "num_samples": 0}]}, ["sources[0].num_samples=0", "greater than or equal to 1"]),
        ({"modes": ["fast"]}, ["modes[0]='fast'", "'default', 'accuracy-aware', 'weight-only' or 'simulated'"]),
        ({"seeds": [-1]}, ["seeds[0]=-1", "greater than or equal to 0"]),
        ({"seeds": [1, 1]}, ["seeds", "1 is there twice"]),
        ({"common": {"seed": 3}}, ["common", "'seed', which a sweep sets by cell"]),
        ({"common": {"max_dorp": 3}}, ["common", "max_dorp"]),
        ({"common": {"max_drop": 3}}, ["common", "max_drop", "less than or equal to 1"]),
        ({"common": {"metric": "top1"}}, ["common", "`metric=top1` does nothing without `mode=accuracy-aware`"]),
        ({"modes": ["default", "weight-only"], "common": {"edges": "full"}}, ["`edges=full` does nothing without"]),
        ({"modes": ["weight-only"], "common": {"preset": "mixed"}}, ["`preset=mixed` does nothing with"]),
        ({"devices": ["CPU"]}, ["'benchmark_time'"]),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_said_with_field_value_and_what_was_expected(changes, said) -> None:
    with pytest.raises(UsageError) as error:
        recipe(**changes)
    for text in said:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_source_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="Did you mean 'fractal'"):
        plan(recipe(sources=["fractals"]))


def test_the_accuracy_aware_algorithm_alone_gets_its_fields() -> None:
    cells = plan(recipe(modes=["default", "accuracy-aware"], common={"metric": "agreement"}))
    assert {(cell.mode, cell.recipe.quantization.metric) for cell in cells} == {
        ("default", None), ("accuracy-aware", "agreement"),
    }  # fmt: skip


def test_every_mode_gets_the_common_fields_that_count_for_it() -> None:
    common = {
        "deploy_isa": "vnni", "rounding": "nearest", "weight_bits": 4, "finetune": True, "max_time": 60, "max_drop": 0.1,
        "max_iterations": 2,
    }  # fmt: skip
    cells = plan(recipe(modes=["default", "accuracy-aware", "weight-only", "simulated"], common=common))
    names = ("deploy_isa", "rounding", "weight_bits", "finetune", "max_time", "max_drop", "max_iterations")
    found = {cell.mode: tuple(getattr(cell.recipe.quantization, name) for name in names) for cell in cells}
    assert found == {
        "default": ("vnni", "nearest", 8, True, 60, 0.1, None),
        "accuracy-aware": ("vnni", "nearest", 8, True, 60, 0.1, 2),
        "weight-only": ("any", "nearest", 8, False, None, 0.1, None),
        "simulated": ("any", "nearest", 4, True, 60, 0.1, None),
    }
    assert len({cell.key for cell in cells}) == len(cells)


def test_bits_that_a_mode_does_not_take_leave_its_cells_as_they_are() -> None:
    modes = ["default", "simulated"]
    keys = [
        {(cell.mode, cell.key) for cell in plan(recipe(modes=modes, common={"weight_bits": bits}))} for bits in (4, 5)
    ]
    assert {mode for mode, _ in keys[0] & keys[1]} == {"default"}


def test_latency_is_measured_on_devices_where_time_is_given_for_it() -> None:
    assert recipe().timed_devices == ()
    assert recipe(benchmark_time=1).timed_devices == ("CPU",)
    assert recipe(benchmark_time=1, devices=["GPU", "CPU"]).timed_devices == ("GPU", "CPU")


def test_options_are_text_whatever_yaml_made_of_them() -> None:
    common = yaml.safe_load("{equalize: off, smooth_quant: on}")
    assert common == {"equalize": False, "smooth_quant": True}  # YAML 1.1
    options = QuantizationOptions(**recipe(common=common).common)
    assert (options.equalize, options.smooth_quant) == ("off", "on")
    found = recipe(sources=[yaml.safe_load("{calib: dgh, options: {steps: 3, output: none, a: 0.5}}")])
    assert found.sources[0].options == {"steps": "3", "output": "none", "a": "0.5"}
    assert found.sources[0].label == "dgh steps=3 output=none a=0.5"


def test_the_plan_is_the_whole_matrix_and_shares_sets_between_modes() -> None:
    cells = plan(recipe(modes=["default", "accuracy-aware"], common={"max_drop": 0.02}))
    assert len(cells) == 8
    assert len({cell.key for cell in cells}) == 8
    assert len({cell.set_key for cell in cells}) == 4
    assert {cell.recipe.measurement.benchmark_time for cell in cells} == {0}
    assert {cell.recipe.quantization.max_drop for cell in cells} == {0.02}
    assert [cell.recipe.calibration.seed for cell in cells[:2]] == [0, 1]


def test_a_key_depends_on_everything_that_its_result_does_and_on_nothing_else() -> None:
    base = plan(recipe())[0]
    same = plan(recipe(sources=["fractal", {"calib": "noise", "name": "other name"}], seeds=[1, 0]))
    assert base.key in {cell.key for cell in same}
    proven = plan(recipe(limit=10))[0]
    assert proven.key != base.key
    assert proven.set_key == base.set_key
    counted = plan(recipe(sources=[{"calib": "noise", "num_samples": 5}]))[0]
    assert counted.set_key != base.set_key


def test_a_key_follows_the_content_of_files(tmp_path) -> None:
    weights = tmp_path / "w.pt"
    keys = set()
    for content in (b"a", b"b"):
        weights.write_bytes(content)
        cell = plan(recipe(models=[{"model": "resnet20-cifar10", "weights": str(weights)}]))[0]
        keys |= {cell.key, cell.set_key}
    assert len(keys) == 4


def test_content_is_found_at_the_end_of_a_reference(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    empty = content_of(f"real:imagefolder:{tmp_path / 'images'}")
    (tmp_path / "images" / "a.png").write_bytes(b"1")
    assert empty is not None
    assert content_of(f"real:imagefolder:{tmp_path / 'images'}") not in (None, empty)
    assert content_of("noise") is None
    (tmp_path / "m.xml").write_text("x")
    alone = content_of(str(tmp_path / "m.xml"))
    (tmp_path / "m.bin").write_text("x")
    assert content_of(str(tmp_path / "m.xml")) != alone


# Engines --------------------------------------------------------------------------------------


def test_shares_of_the_cpus_do_not_overlap() -> None:
    shares = [share_of_cpus([0, 2, 4, 6, 8], i, 2) for i in range(2)]
    assert shares == [[0, 4, 8], [2, 6]]
    assert [share_of_cpus([3, 5], i, 3) for i in range(3)] == [[3], [5], [3]]


@pytest.mark.parametrize("reference", ["dask", "dask:", "ray:x", ""])
def test_an_unknown_engine(reference) -> None:
    with pytest.raises(UsageError, match="expected local or dask:ADDRESS"), open_engine(reference, None):
        pass


def test_jobs_belong_to_the_local_engine() -> None:
    with pytest.raises(UsageError, match="`jobs=3`"), open_engine("dask:tcp://127.0.0.1:1", 3):
        pass


def test_a_task_that_ends_every_process_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr("ovcalib.sweeps.engines.sys.executable", "/bin/false")
    engine = LocalEngine(1)
    try:
        with pytest.raises(DeviceError, match=r"ended 4 times \(exit code 1\)"):
            engine.submit({}).result(60)
    finally:
        engine.stop()


# Numbers --------------------------------------------------------------------------------------


def test_mean_spread_and_interval_have_their_closed_forms() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.std, found.count) == (2.0, 1.0, 3)
    assert found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3))
    assert estimate([5.0]) == Estimate(5.0, None, None, None, 1)
    assert estimate([5.0], [0.5]) == Estimate(5.0, None, 4.5, 5.5, 1)
    assert estimate([5.0, 5.0], [0.4, 0.6]).high == pytest.approx(5.5)
    both = estimate([1.0, 2.0, 3.0], [1.0] * 3)
    assert both.high - both.mean == pytest.approx(math.hypot(1.0, 4.3027 / math.sqrt(3)))


def test_students_t_agrees_with_scipy() -> None:
    from scipy.stats import t

    for freedom in (*range(1, len(T95) + 5), 30, 100):
        assert t95(freedom) == pytest.approx(t.ppf(0.975, freedom), abs=1e-3)


def at(low, high):
    return Estimate((low + high) / 2, None, low, high, 1)


@pytest.mark.parametrize(
    ("column", "better", "winner"),
    [
        ([at(0, 1), at(2, 3)], "less", 0),
        ([at(0, 1), at(2, 3)], "more", 1),
        ([at(0, 2), at(2, 3)], "less", None),
        ([at(0, 9), at(1, 2), at(3, 4)], "less", None),
        ([at(3, 4), None, at(1, 2)], "less", 2),
        ([at(0, 1)], "less", None),
        ([at(0, 1), Estimate(5, None, None, None, 1)], "less", None),
        ([], "less", None),
    ],
)
def test_the_best_is_marked_only_where_it_stands_apart(column, better, winner) -> None:
    assert best(column, better) == winner


# Tables ---------------------------------------------------------------------------------------


def result(drop, agreement=0.9, nmse=0.1):
    accuracy = SimpleNamespace(
        drop_points=drop, drop_ci95=(drop - 0.2, drop + 0.2), fp32=SimpleNamespace(top1=0.8), protocol="p*",
        kernels="avx2",
    )  # fmt: skip
    return SimpleNamespace(
        model=SimpleNamespace(weights=SimpleNamespace(origin="file"), sha256="0" * 64),
        calibration=SimpleNamespace(num_samples=300), environment=SimpleNamespace(cpu="A CPU", isa="AVX2", versions={}),
        accuracy=accuracy, agreement=SimpleNamespace(top1=agreement, count=1000, nmse=nmse),
        quantization=SimpleNamespace(mode="default", reverted=(), seconds=1.0),
    )  # fmt: skip


def swept(results, errors=None, **changes):
    """A sweep whose cells are done where they have a result, by (source, seed)."""
    from ovcalib.records.sweep import Sweep

    chosen = recipe(eval="images", **changes)
    found, cells = {}, []
    for cell in plan(chosen):
        place = (cell.recipe.calibration.calib, cell.seed)
        error = (errors or {}).get(place)
        state = "done" if place in results else "failed" if error else "pending"
        if state == "done":
            found[cell.key] = results[place]
        cells.append(SweepCell(model=cell.model, source=cell.source, mode=cell.mode, seed=cell.seed, key=cell.key,
                               set_key=cell.set_key, state=state, error=error))  # fmt: skip
    return Sweep(created="now", ovcalib="0", recipe=chosen, cells=tuple(cells)), found


def rows(markdown, title):
    lines = markdown.split(f"### {title}\n")[1].split("###")[0].split("##")[0].strip().splitlines()
    return {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines[2:]}


def test_a_table_shows_mean_and_spread_and_marks_the_best() -> None:
    sweep, results = swept({("noise", 0): result(5.0), ("noise", 1): result(5.1), ("dgh", 0): result(1.0),
                            ("dgh", 1): result(1.1)})  # fmt: skip
    text = markdown_report(sweep, results, {})
    assert rows(text, "Drop of top-1 accuracy, points") == {"noise": "5.05 ± 0.071", "dgh steps=3": "**1.05 ± 0.071**"}
    assert rows(text, "Drop of top-1 accuracy, % of FP32") == {
        "noise": "6.31 ± 0.088",
        "dgh steps=3": "**1.31 ± 0.088**",
    }
    assert rows(text, "Output error (NMSE)") == {"noise": "0.10 ± 0.00", "dgh steps=3": "0.10 ± 0.00"}
    assert r"p\*" in text


def test_what_was_not_measured_has_no_number() -> None:
    sweep, results = swept({("noise", 0): result(1.0)}, {("dgh", 0): "no *weights*"})
    text = markdown_report(sweep, results, {})
    assert rows(text, "Drop of top-1 accuracy, points") == {"noise": "1.00 (1 of 2 seeds)", "dgh steps=3": "failed"}
    assert r"no \*weights\*" in text
    sweep, nothing = swept({})
    assert "not run" in markdown_report(sweep, nothing, {})


def test_a_seed_that_broke_is_not_averaged_away() -> None:
    sweep, results = swept({("noise", 0): result(1.0), ("noise", 1): result(1.0, nmse=None)})
    assert rows(markdown_report(sweep, results, {}), "Output error (NMSE)")["noise"] == "-"


def test_the_csv_holds_every_digit_and_empty_cells() -> None:
    sweep, results = swept({("noise", 0): result(1.0), ("noise", 1): result(4 / 3)})
    first, second = csv.DictReader(io.StringIO(csv_report(sweep, results, {})))
    assert float(first["Drop of top-1 accuracy, points: mean"]) == pytest.approx(7 / 6, abs=1e-12)
    assert (first["seeds"], first["done"], second["done"]) == ("2", "2", "0")
    assert second["Drop of top-1 accuracy, points: mean"] == ""


# Scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "least"), [(1, 8 * 100 + 8 * 200), (4, 2 * 100 + 2 * 200), (64, 100 + 200)])
def test_the_replay_of_a_sweep_takes_what_its_schedule_takes(tmp_path, workers, least) -> None:
    """Sets of 100 s and a cell of 200 s each: in turns, in even shares, and all at once."""
    scale = benchmark("sweep_scale")
    (tmp_path / "result.json").write_bytes((ROOT / "tests" / "golden" / "result-0.1.json").read_bytes())
    costs = {source: scale.Measured([100.0], [200.0], tmp_path) for source in ("noise", "fractal")}
    content = {"models": ["a", "b", "c", "d"], "sources": list(costs)}
    chances = SimpleNamespace(seed=0, stragglers=0.0, slowdown=5.0, losses=0.0)
    row = scale.simulate(workers, content, costs, chances)
    assert row["tasks"] == 16
    assert row["bound_s"] == least
    assert least <= row["makespan_s"] <= least + row["coordinator_s"] + 1
    late = SimpleNamespace(seed=0, stragglers=1.0, slowdown=5.0, losses=1.0)
    assert scale.simulate(1, content, costs, late)["makespan_s"] >= 7.5 * (8 * 100 + 8 * 200)


def test_a_folder_without_a_sweep(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no sweep"):
        read_sweep(tmp_path)


# The paper's tables ---------------------------------------------------------------------------


def benchmark(name):
    """A module of the folder `benchmarks`, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def paper():
    return benchmark("paper_tables")


def test_published_cells_stand_alone_where_nothing_was_run(paper) -> None:
    text = paper.drop_table(None, {}, "default", paper.TABLE_1A)
    assert "| Fractal | not run | 1.10 | not run | 0.69 | not run | 0.54 | not run | 87.21 | not run | 41.73 |" in text
    assert "| ShuffleNetV2 | paper |" in text


def test_our_cells_stand_beside_the_published_ones(paper) -> None:
    sweep, results = swept({("noise", 0): result(0.4), ("noise", 1): result(0.4)}, {("fractal", 0): "no"},
                           models=[{"name": "ResNet20", "model": "resnet20-cifar10"}],
                           sources=[{"name": "CIFAR-10", "calib": "noise"}, {"name": "Fractal", "calib": "fractal"},
                                    {"name": "Own", "calib": "dgh"}])  # fmt: skip
    lines = paper.drop_table(sweep, results, "default", paper.TABLE_1A).splitlines()
    assert lines[2].startswith("| CIFAR-10 | 0.40 ± 0.00 (0.50 %) | 0.28 | not run | 0.05 |")
    assert lines[3].startswith("| StyleGAN2-ADA | not run | 0.43 |")
    assert lines[5].startswith("| Fractal | failed | 1.10 |")
    assert lines[6].startswith("| Own | not run | - | not run | - |")


def test_a_narrow_relative_stands_beside_its_model_of_the_paper_by_name(paper) -> None:
    sweep, results = swept({("noise", 0): result(0.4)}, {}, sources=[{"name": "Fractal", "calib": "noise"}],
                           models=[{"name": "RepVGG-A0", "model": "resnet20-cifar10"}])  # fmt: skip
    lines = paper.drop_table(sweep, results, "default", paper.TABLE_1A).splitlines()
    assert lines[0] == "| calibration | RepVGG-A0 | paper (RepVGG) |"
    assert lines[-1].endswith("(0.50 %) | 41.73 |")


def test_a_table_of_one_seed_says_so(paper) -> None:
    sweep, results = swept({("noise", 0): result(0.4)}, {}, sources=[{"name": "Fractal", "calib": "noise"}], seeds=[0],
                           models=[{"name": "RepVGG-A0", "model": "resnet20-cifar10"}])  # fmt: skip
    table = paper.with_seeds(paper.drop_table(sweep, results, "default", paper.TABLE_1A), sweep)
    assert table.splitlines()[-1] == "| Fractal (1 seed) | 0.40 (0.50 %) | 41.73 |"
    assert table.splitlines()[0] == "| calibration | RepVGG-A0 | paper (RepVGG) |"
    twice, _ = swept({}, {})
    assert "(1 seed)" not in paper.with_seeds(paper.drop_table(twice, {}, "default", paper.TABLE_1A), twice)


def test_nncfs_own_settings_have_tables_of_their_own_and_name_them(paper) -> None:
    sweep, results = swept({("noise", 0): result(0.4)}, {}, sources=[{"name": "Fractal", "calib": "noise"}], seeds=[0],
                           models=[{"name": "RepVGG-A0", "model": "resnet20-cifar10"}],
                           common={"bias_correction": "fast", "limit": 50})  # fmt: skip
    lines = paper.document(sweep, results, {}, (sweep, results)).splitlines()
    first = lines.index("## NNCF's own settings")
    assert lines[first + 2].startswith("`bias_correction=fast`. Measured on: avx2.")
    assert "| Fractal (1 seed) | 0.40 |" in lines[first:]
    assert "- Calibration images: 300 for Fractal." in lines
    assert "- CPU: A CPU, AVX2" in lines
    assert "## NNCF's own settings" not in paper.document(sweep, results, {})


def test_scores_of_another_classifier_never_stand_for_the_inception_score(paper) -> None:
    lines = paper.score_table({"Fractal": {"fid-resnet20": 9.713}, "CIFAR-10": {"fid-resnet20": 0.03}}).splitlines()
    assert lines[0] == "| images | paper: Inception Score of 50,000 | ovcalib: Inception Score | fid-resnet20 |"
    assert lines[2] == "| StyleGAN2-ADA | 10.34 | not run | not run |"
    assert lines[4] == "| Fractal | 3.31 | not run | 9.71 |"
    assert lines[5] == "| CIFAR-10 | - | not run | 0.03 |"
    measured = paper.score_table({"Fractal": {"fid": 80.0, "inception-score": 3.2}})
    assert "| Fractal | 3.31 | 3.2 | 80 |" in measured


def test_the_narrow_recipe_is_valid_and_every_model_has_a_column(paper) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "paper_narrow.yaml"
    found = make_sweep_recipe(yaml.safe_load(path.read_text()))
    assert {paper.INSTEAD.get(model.label) for model in found.models} == {None, *paper.MODELS[1:]}
    assert set(paper.TABLE_1A) <= {source.label for source in found.sources}
    assert all(model.command or model.weights is None for model in found.models)


def test_the_recipe_of_shipped_networks_needs_no_training(paper) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "paper_shipped.yaml"
    found = make_sweep_recipe(yaml.safe_load(path.read_text()))
    assert all(shipped_weights(model.model) and model.weights is None for model in found.models)
    assert [model.label for model in found.models if model.label not in paper.INSTEAD] == ["ResNet20"]


@pytest.mark.parametrize(
    ("common", "expected"),
    [({"max_drop": 0.003, "validate_on": "calibration"}, "Here 0.3 points are allowed, measured on the same images: "),
     ({"max_drop": 0.02, "validate_on": "imagefolder:train", "limit": 50},
      "Here 2 points are allowed, measured on `imagefolder:train`, whatever the calibration set, of at most 50 images."),
     ({}, "Here 1 points are allowed, measured on `images`, whatever the calibration set.")],
)  # fmt: skip
def test_it_says_what_steered_the_accuracy_aware_algorithm(paper, common, expected) -> None:
    sweep, _ = swept({}, {}, common=common, modes=["accuracy-aware"])
    assert expected in paper.steering(sweep)
    assert paper.steering(sweep) in paper.document(sweep, {}, {})
    assert "Accuracy-aware: the paper" not in paper.document(swept({}, {})[0], {}, {})


def test_the_recipe_with_nncfs_own_settings_is_that_of_the_wide_networks(paper) -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    wide, own = (
        make_sweep_recipe(yaml.safe_load((folder / f"paper_{name}.yaml").read_text())) for name in ("wide", "nncf")
    )
    assert own.models == wide.models
    assert all(source in wide.sources for source in own.sources)
    assert own.common.items() >= wide.common.items()
    assert {model.label for model in wide.models} <= set(paper.MODELS)


@pytest.mark.parametrize("name", ["paper", "paper_published"])
def test_the_papers_recipes_are_valid_and_name_its_rows_and_columns(paper, name) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.yaml"
    found = make_sweep_recipe(yaml.safe_load(path.read_text()))
    assert tuple(model.label for model in found.models) == paper.MODELS
    assert set(paper.TABLE_1A) <= {source.label for source in found.sources}
    assert all(model.command or model.weights in (None, "published") for model in found.models)
