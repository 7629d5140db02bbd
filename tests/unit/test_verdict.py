"""What a reader takes away: a difference within its interval is none, and noise is not a speed."""

import pytest

from ovcalib.records.read import read_record
from ovcalib.records.result import Accuracy, Latency, LatencyComparison, SpeedSearch, Top
from ovcalib.reports.markdown import markdown_report, summary
from ovcalib.reports.result import result_page
from ovcalib.reports.verdict import result_verdict
from tests.unit.test_golden import GOLDEN


@pytest.fixture
def result(tmp_path):
    (tmp_path / "result.json").write_text((GOLDEN / "result-0.1.json").read_text())
    return read_record(tmp_path / "result.json")


def with_speed(result, speedup=2.0, ci95=(1.9, 2.1), unreliable=(), isa="AVX2"):
    latency = Latency(p50=4.125, p90=5, p99=5, mean=4, min=4, max=5, n=99)
    found = LatencyComparison(
        device="CPU", latency_ms={"fp32": latency, "int8": latency}, speedup=speedup, speedup_ci95=ci95,
        unreliable=unreliable,
    )  # fmt: skip
    return result.model_copy(
        update={"benchmark": found, "environment": result.environment.model_copy(update={"isa": isa})}
    )


def with_drop(result, drop, low, high, count=1000):
    top = Top(top1=0.9, top5=None, ci95=(0.88, 0.92))
    accuracy = Accuracy(
        protocol="p", count=count, data_sha256="", fp32=top, int8=top, drop_points=drop, drop_ci95=(low, high)
    )
    return result.model_copy(update={"accuracy": accuracy})


@pytest.mark.parametrize(
    ("drop", "words", "mood"),
    [
        ((-0.4, -0.99, 0.19), "No measurable difference in top-1 accuracy", "good"),
        ((0.4, -0.19, 0.99), "No measurable difference in top-1 accuracy", "good"),
        ((0.4, -0.4, 1.2), "A loss of up to 1.20 points is not excluded: evaluate on more images.", "unsure"),
        ((0.5, 0.1, 0.9), "INT8 loses 0.50 points of top-1 accuracy (95 % interval 0.10 to 0.90", "good"),
        ((0.9, 0.1, 1.7), "INT8 loses 0.90 points", "unsure"),
        ((5.0, 4.0, 6.0), "INT8 loses 5.00 points", "bad"),
        ((-0.5, -0.9, -0.1), "INT8 gains 0.50 points of top-1 accuracy (95 % interval 0.10 to 0.90", "good"),
    ],
)
def test_only_an_interval_that_leaves_zero_out_is_a_difference(result, drop, words, mood):
    found = result_verdict(with_drop(result, *drop))
    assert words in found["text"]
    assert found["css"] == mood


def test_agreement_says_on_which_images_and_is_no_accuracy(result):
    result = result.model_copy(update={"benchmark": None})
    text = result_verdict(result)["text"]
    assert "images of the calibration set itself. Accuracy was not measured." in text
    recipe = result.recipe
    others = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"eval": "imagefolder:x"})})
    assert "calibration set" not in result_verdict(result.model_copy(update={"recipe": others}))["text"]


@pytest.mark.parametrize(
    ("speedup", "ci95", "isa", "words"),
    [
        (2.0, (1.9, 2.1), "AVX2", "INT8 is 2.00 times as fast on CPU (95 % interval 1.90 to 2.10)."),
        (1.1, (0.9, 1.3), "AVX2", "No measurable difference in speed on CPU"),
        (0.9, (0.85, 0.95), "AVX2", "INT8 is slower than FP32 on CPU: 0.90 times its speed"),
        (0.9, (0.85, 0.95), "AVX2", "INT8 pays on CPUs with VNNI or AMX, which this one lacks"),
        (
            0.9,
            (0.85, 0.95),
            "AVX512-VNNI",
            "lose in float with `--optimize-for latency`, or ship FP32 for this machine.",
        ),
    ],
)
def test_speed_is_a_statement_with_its_interval(result, speedup, ci95, isa, words):
    assert words in result_verdict(with_speed(result, speedup, ci95, isa=isa))["text"]


def test_operations_in_float_for_speed_are_counted(result):
    def verdict(**changes):
        found = SpeedSearch(**({"device": "CPU", "in_float": ("a", "b"), "over_int8": 1.5, "over_int8_ci95": (1.4, 1.6),
                                "over_fp32": 1.1, "over_fp32_ci95": (1.0, 1.2), "nmse": (0.1, 0.1)} | changes))  # fmt: skip
        quantization = result.quantization.model_copy(update={"speed": found})
        return result_verdict(result.model_copy(update={"quantization": quantization}))["text"]

    expected = (
        "2 operations are in float for speed: 1.50 times as fast as all of them in INT8 (95 % interval 1.40 to 1.60)"
    )
    assert expected in verdict()
    assert "No operation is faster in float on CPU." in verdict(in_float=())


def test_a_slowdown_is_never_good(result):
    good = with_drop(result, 0.0, -0.1, 0.1)
    assert result_verdict(with_speed(good))["css"] == "good"
    assert result_verdict(with_speed(good, 0.9, (0.8, 0.95)))["css"] == "unsure"


def test_the_speed_of_a_noisy_machine_is_not_shown(result):
    noisy = with_speed(result, unreliable=("the host took 9.0% of the processor time away",))
    text = "not shown: the machine is too noisy (the host took 9.0% of the processor time away)"
    assert f"Speed is {text}." in result_verdict(noisy)["text"]
    for report in (result_page(noisy), markdown_report(noisy)):
        assert text.split(" (")[0] in report
        assert "4.125" not in report
        assert "2.00x" not in report
    assert summary(noisy)["p50 ms"] == "-"
    quiet = with_speed(result)
    assert "2.00x (1.90 to 2.10)" in result_page(quiet)
    assert "4.125" in markdown_report(quiet)


def test_the_report_says_which_ranges_were_taken_and_why(result):
    def report(**ranges):
        quantization = result.quantization.model_copy(update={"activation_ranges": "mean-min-max", **ranges})
        return markdown_report(result.model_copy(update={"quantization": quantization}))

    by_nmse = "mean-min-max (NMSE 0.0022 with min-max and 0.0027 with mean-min-max"
    assert f"{by_nmse})" in report(ranges_nmse=(0.0022, 0.0027))
    assert "NMSE 0.0022 with min-max and not finite with mean-min-max" in report(ranges_nmse=(0.0022, None))
    assert (
        f"{by_nmse}; with the latter an image's error is 0.47 times that with min-max, 95 % interval 0.31 to 0.71)"
    ) in report(ranges_nmse=(0.0022, 0.0027), ranges_ratio=(0.47, 0.31, 0.71))
