"""Ways to quantize, compared on images of their own."""

from typing import Any

import numpy as np
import pytest

import ovcalib
from ovcalib.errors import UsageError
from ovcalib.evaluation.metrics import nmse
from ovcalib.graph.files import graph_sha256, read_graph
from ovcalib.progress import Progress
from ovcalib.quantization import arm_search
from ovcalib.quantization.arm_search import ARMS, DEFAULTS, WEIGHTS, arms_of, best, cost_no_time, difference, search
from ovcalib.quantization.quantize import quantize_graph
from ovcalib.records.options import QuantizationOptions
from ovcalib.records.result import Arm, KernelsError
from ovcalib.reports.markdown import arms_note, dominated
from ovcalib.runtime import outputs_of


@pytest.fixture
def three(monkeypatch):
    """Three arms, where the others would show nothing more."""
    few = {name: ARMS[name] for name in (DEFAULTS, "NNCF", "histogram ranges")}
    monkeypatch.setattr(arm_search, "ARMS", few)
    return few


def run(toy, toy_graph, count=64, out_of_time=lambda: False, **options):
    asked = QuantizationOptions(search=True, **options)
    return search(asked, toy_graph, toy.calibration(count), "classification", out_of_time, Progress())


# The choice -----------------------------------------------------------------------------------


def test_the_interval_is_that_of_paired_differences(rng) -> None:
    ours, theirs = rng.gamma(2, 0.1, 30), rng.gamma(2, 0.1, 30)
    low, high = difference({DEFAULTS: ours, "other": theirs}, "other")
    differences = theirs - ours
    assert (low + high) / 2 == pytest.approx(theirs.mean() - ours.mean())
    assert (high - low) / 2 == pytest.approx(2.0452 * np.sqrt(differences.var(ddof=1) / 30), rel=1e-4)


def test_the_defaults_stay_unless_an_arm_is_better_beyond_the_interval(rng) -> None:
    ours = rng.uniform(0.9, 1.1, 32)
    noisy = ours + rng.normal(-0.05, 1.0, 32)  # smaller in the mean, perhaps, but not beyond its interval
    assert best({DEFAULTS: ours, "noisy": noisy}) == DEFAULTS
    better, best_of_all = ours - 0.1, ours - 0.2
    assert best({DEFAULTS: ours, "noisy": noisy, "better": better}) == "better"
    assert best({DEFAULTS: ours, "better": better, "best": best_of_all, "worse": ours + 0.1}) == "best"


def test_outputs_that_are_not_finite_are_never_chosen() -> None:
    fine, broken = np.full(4, 0.1), np.array([0.0, 0.0, 0.0, np.inf])
    assert best({DEFAULTS: fine, "broken": broken}) == DEFAULTS
    assert best({DEFAULTS: broken, "fine": fine}) == "fine"
    assert difference({DEFAULTS: fine, "broken": broken}, "broken") is None


def arm(name, error, latency, size):
    found = KernelsError(kernels="vnni", nmse=error, emulated=False)
    return Arm(name=name, changes={}, output_error=(found,), difference_ci95=None, agreement=None, size_bytes=size,
               latency_ms=latency, seconds=1.0)  # fmt: skip


def test_arms_off_the_pareto_front() -> None:
    arms = [arm("a", 0.1, 2.0, 10), arm("b", 0.2, 1.0, 10), arm("c", 0.2, 2.0, 10), arm("d", 0.1, 2.0, 10),
            arm("e", None, 0.5, 10)]  # fmt: skip
    assert dominated(arms) == {"c"}


# The arms -------------------------------------------------------------------------------------


def test_what_was_asked_for_is_in_every_arm() -> None:
    arms, left_out = arms_of(QuantizationOptions(search=True, preset="mixed", deploy_isa="vnni"), transformer=False)
    assert {options.preset for options in arms.values()} == {"mixed"}
    assert {options.deploy_isa for options in arms.values()} == {"vnni"}
    assert left_out == (WEIGHTS,)
    assert "mixed preset" not in arms  # the same as the defaults
    arms, left_out = arms_of(QuantizationOptions(search=True, rounding="compensated"), transformer=False)
    assert {options.rounding for options in arms.values()} == {"compensated"}
    assert left_out == ("NNCF", "NNCF, full bias correction")
    arms, left_out = arms_of(QuantizationOptions(search=True, rounding="nearest"), transformer=False)
    assert (set(arms), left_out) == (set(ARMS), ())
    _, left_out = arms_of(QuantizationOptions(search=True, guard=False), transformer=False)
    assert left_out == (WEIGHTS,)
    arms, left_out = arms_of(QuantizationOptions(search=True, deploy_isa="avx2", max_time=60), transformer=False)
    assert (set(arms), left_out) == (set(ARMS), ())


def test_arms_do_not_search_steer_or_time() -> None:
    options = QuantizationOptions(search=True, mode="accuracy-aware", max_time=60, optimize_for="latency")
    for asked in arms_of(options, transformer=False)[0].values():
        assert (asked.search, asked.mode, asked.max_time, asked.optimize_for) == (False, "default", None, "size")


def test_the_arm_of_nncf_is_what_its_documentation_shows(toy, toy_graph, three, monkeypatch) -> None:
    import nncf

    made: dict[str, Any] = {}
    monkeypatch.setattr(arm_search.Judge, "__call__", lambda judge, name, int8, in_float: made.setdefault(name, int8))
    monkeypatch.setattr(arm_search, "best", lambda errors: DEFAULTS)
    with pytest.raises(KeyError):  # nothing was judged
        run(toy, toy_graph)
    calibration = toy.calibration(64)
    seen = [calibration[i] for i in range(48 - 12)]  # those of the ranges
    plain = nncf.quantize(toy_graph.clone(), nncf.Dataset(seen), subset_size=len(seen))
    x = calibration.inputs(last=8)
    # ovcalib knows the range of the network's input without images.
    assert nmse(outputs_of(plain, x), outputs_of(made["NNCF"], x)) < 1e-3


# The search -----------------------------------------------------------------------------------


def test_arms_are_judged_on_images_that_none_has_seen(toy, toy_graph, three, monkeypatch) -> None:
    seen = []
    quantize = quantize_graph

    def watched(options, settings, fp32, calibration, *others):
        seen.append(calibration.images)
        return quantize(options, settings, fp32, calibration, *others)

    monkeypatch.setattr(arm_search, "quantize_graph", watched)
    options, found = run(toy, toy_graph)
    images = toy.calibration(64).images
    assert all(np.array_equal(part, images[:48]) for part in seen)
    assert found.count == 16
    assert [arm.name for arm in found.arms] == list(three)
    assert options.activation_ranges == ARMS[found.chosen].get("activation_ranges", "auto")
    by_name = {arm.name: max(e.nmse for e in arm.output_error) for arm in found.arms}
    assert by_name[found.chosen] <= by_name[DEFAULTS]
    assert by_name[DEFAULTS] < by_name["NNCF"]
    assert all(0.9 < arm.agreement <= 1 for arm in found.arms)
    assert all(arm.latency_ms is None for arm in found.arms)


def test_the_error_of_an_arm_is_the_nmse_of_its_outputs(toy, toy_graph) -> None:
    judge = arm_search.Judge(toy_graph, toy.calibration(8), QuantizationOptions())
    judge("the same", toy_graph)
    assert [e.nmse for e in judge.by_kernels["the same"]] == pytest.approx([0, 0], abs=1e-9)
    assert judge.agreement("the same") == 1
    judge.reference = 2 * judge.reference
    judge("half", toy_graph)
    assert [e.nmse for e in judge.by_kernels["half"]] == pytest.approx([0.25, 0.25], rel=1e-5)
    assert judge.errors["half"].mean() == pytest.approx(0.25, rel=1e-5)


def test_an_arm_is_judged_where_its_error_is_largest(toy, toy_graph, monkeypatch) -> None:
    judge = arm_search.Judge(toy_graph, toy.calibration(8), QuantizationOptions())
    factor = {"vnni": 1.1, "avx2": 1.5}
    monkeypatch.setattr(arm_search, "outputs_on", lambda kernels, graph, inputs: judge.reference * factor[kernels])
    judge("an arm", toy_graph)
    assert {e.kernels: e.nmse for e in judge.by_kernels["an arm"]} == pytest.approx(
        {"vnni": 0.01, "avx2": 0.25}, rel=1e-4
    )
    assert judge.errors["an arm"].mean() == pytest.approx(0.25, rel=1e-4)


def test_weights_alone_are_judged_in_float(toy, toy_graph, monkeypatch) -> None:
    """A process that takes the kernels of AVX2 on a newer CPU may not compile them."""
    monkeypatch.setattr(arm_search, "ARMS", {name: ARMS[name] for name in (DEFAULTS, WEIGHTS)})
    asked = []

    def outputs_on(kernels, graph, inputs):
        asked.append(kernels)
        return outputs_of(graph, inputs)

    monkeypatch.setattr(arm_search, "outputs_on", outputs_on)
    _, found = run(toy, toy_graph)
    assert asked == ["vnni", "avx2", None, None]
    assert {e.kernels for e in found.arms[1].output_error} == {"vnni", "avx2"}


def test_time_runs_out_after_the_defaults(toy, toy_graph) -> None:
    _, found = run(toy, toy_graph, out_of_time=lambda: True)
    assert [arm.name for arm in found.arms] == [DEFAULTS]
    assert found.late == tuple(ARMS)[1:]
    assert found.chosen == DEFAULTS


def test_weights_alone_are_taken_where_they_cost_no_time(toy, toy_graph, monkeypatch) -> None:
    monkeypatch.setattr(arm_search, "ARMS", {name: ARMS[name] for name in (DEFAULTS, WEIGHTS)})
    times = {DEFAULTS: [1.0, 1.01, 0.99, 1.0, 1.0], WEIGHTS: [1.02, 1.01, 1.02, 1.01, 1.02]}
    monkeypatch.setattr(arm_search, "race", lambda graphs, device, seconds: times)
    asked = QuantizationOptions(search=True)

    def chosen(device):
        options, found = search(
            asked, toy_graph, toy.calibration(64), "classification", lambda: False, Progress(), device=device
        )
        assert options.mode == ("weight-only" if found.chosen == WEIGHTS else "default")
        assert ("computes in float" in arms_note(found)) == (found.chosen != WEIGHTS)
        return found.chosen

    assert chosen("CPU") == WEIGHTS
    assert chosen(None) == DEFAULTS  # nothing was timed
    times[WEIGHTS] = [1.1, 1.11, 1.1, 1.1, 1.11]
    assert chosen("CPU") == DEFAULTS


def test_no_time_is_a_twentieth_at_the_upper_end_of_the_interval() -> None:
    assert cost_no_time({WEIGHTS: [1.049] * 5, "b": [1.0] * 5}, "b")
    assert not cost_no_time({WEIGHTS: [1.051] * 5, "b": [1.0] * 5}, "b")
    assert not cost_no_time({WEIGHTS: [0.8, 1.2, 0.8, 1.2, 1.0], "b": [1.0] * 5}, "b")  # too noisy to tell
    assert not cost_no_time({"b": [1.0] * 5}, "b")


def test_an_interrupted_search_goes_on(toy, toy_graph, three, monkeypatch, tmp_path) -> None:
    made = []
    quantize = quantize_graph

    def counted(options, *others):
        made.append(options)
        if len(made) == 3:
            raise KeyboardInterrupt
        return quantize(options, *others)

    monkeypatch.setattr(arm_search, "quantize_graph", counted)

    def again(images, **options):
        asked = QuantizationOptions(search=True, **options)
        return search(
            asked, toy_graph, images, "classification", lambda: False, Progress(), resume=tmp_path
        )[1]  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        again(toy.calibration(64))
    assert len(list((tmp_path / "arms").iterdir())) == 2
    resumed = again(toy.calibration(64))
    assert len(made) == 4  # the third arm alone was made
    whole = run(toy, toy_graph)[1]
    assert [a.output_error for a in resumed.arms] == [a.output_error for a in whole.arms]
    assert [a.size_bytes for a in resumed.arms] == [a.size_bytes for a in whole.arms]
    other = toy.calibration(64)
    other.images[0] ^= 1
    before = len(made)
    again(other)
    again(toy.calibration(64), preset="mixed")
    assert len(made) == before + 6  # nothing that was kept is of these images, or options


def test_too_few_images(toy, toy_graph) -> None:
    with pytest.raises(UsageError, match="Expected at least 16"):
        run(toy, toy_graph, 15)


def test_the_written_model_is_that_of_the_chosen_options(toy, three, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(arm_search, "best", lambda errors: "histogram ranges")
    common: Any = {"input_shape": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "calib": "fractal",
              "num_samples": 16, "benchmark_time": 0, "deploy_isa": "vnni"}  # fmt: skip
    found = ovcalib.quantize(toy.net, tmp_path / "searched", search=True, **common)
    plain = ovcalib.quantize(toy.net, tmp_path / "plain", activation_ranges="histogram", **common)
    assert found.record.quantization.search.chosen == "histogram ranges"
    assert found.record.quantization.activation_ranges == "histogram"
    hashes = [graph_sha256(read_graph(tmp_path / name / "int8" / "model.xml")) for name in ("searched", "plain")]
    assert hashes[0] == hashes[1]
    for name in ("report.md", "report.html"):
        text = (tmp_path / "searched" / name).read_text()
        assert "histogram ranges" in text
        assert "Compared on 4 calibration images" in text
    with pytest.raises(UsageError, match="Expected at least 16"):
        ovcalib.quantize(toy.net, search=True, **common | {"num_samples": 8})
    assert plain.record.quantization.search is None
