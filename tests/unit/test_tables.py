"""Tables, charts and records: what comes from outside stays text."""

import fnmatch
import json
import re
import shlex

import numpy as np
import pytest
from markupsafe import Markup

from ovcalib.errors import UsageError
from ovcalib.records.benchmark import Benchmark, BenchmarkRun, Speedup
from ovcalib.records.diagnosis import Candidate, Diagnosis, OperationDiagnosis
from ovcalib.records.read import read_record, read_records
from ovcalib.records.recipe import make_recipe
from ovcalib.records.result import Accuracy, ClassAccuracy, Memory, Result
from ovcalib.reports import charts
from ovcalib.reports.benchmark import benchmark_context, over_baseline
from ovcalib.reports.diagnosis import diagnosis_verdict, ignore_options
from ovcalib.reports.result import class_table, quantize_command
from ovcalib.reports.tables import Table, shown

HOSTILE = "<script>alert(1)</script>|`=1+1"


def test_what_was_not_measured_is_a_dash() -> None:
    assert [shown(v) for v in (None, "", 0, 0.0, 1.23456)] == ["-", "-", "0", "0", "1.235"]


def test_markdown_and_csv_keep_a_hostile_name_as_text() -> None:
    table = Table(["name", "value"], [[HOSTILE, 1.5], ["=cmd()", None]])
    assert "<script>" not in table.markdown()
    assert "\\|" in table.markdown()
    assert table.csv().splitlines()[2] == "'=cmd(),"


def only(kind, **fields):
    """A record with these fields alone."""
    return kind.model_construct(**fields)


def test_a_notebook_shows_a_hostile_name_as_text() -> None:
    page = Table([HOSTILE], [[HOSTILE]]).html()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 2


def test_the_classes_that_lose_most_come_first() -> None:
    lost = {"a": (0.9, 0.9), "b": (0.8, 0.9), "c": (0.9, 0.5), "d": (0.9, 0.8)}
    classes = [
        ClassAccuracy(label=i, name=name, count=10, fp32_top1=before, int8_top1=after)
        for i, (name, (before, after)) in enumerate(lost.items())
    ]
    table = class_table(only(Result, accuracy=only(Accuracy, per_class=tuple(classes))))
    assert [row[0] for row in table["rows"]] == ["c", "d", "a", "b"]
    assert table["rows"][0] == ["c", "10", "90", "50", "-40"]
    assert table["note"] == "2 of 4 lose accuracy"


@pytest.mark.parametrize(("metric", "worse", "css"), [("nmse", 0.05, "bad"), ("nmse", 0.005, "good"), ("top1", 0.85, "bad"),
                                                       ("top1", 0.895, "good"), ("top1", None, "bad")])  # fmt: skip
def test_a_diagnosis_is_bad_where_more_is_lost_than_allowed(metric, worse, css) -> None:
    fp32 = only(Candidate, nmse=0.0, top1=0.9)
    found = only(Diagnosis,
        operations=(only(OperationDiagnosis, name="fc"),), metric=metric, max_drop=0.01, fp32=fp32,
        int8=fp32.model_copy(update={metric: worse}),
    )  # fmt: skip
    assert diagnosis_verdict(found)["css"] == css


def test_ignored_names_are_no_patterns() -> None:
    """Names with brackets, as NNCF's, are matched as they are; the shell gets one word each."""
    candidate = only(Candidate, in_float=("layer[0]", "a*b", "it's"))
    words = shlex.split(ignore_options(candidate))
    assert words[::2] == ["--ignore"] * 3
    for name, pattern in zip(candidate.in_float, words[1::2], strict=True):
        assert fnmatch.fnmatchcase(name, pattern)
        assert not fnmatch.fnmatchcase("axb" if "*" in name else "layer0", pattern)


@pytest.mark.parametrize(("interval", "doubts", "css"), [((1.1, 1.3), (), "good"), ((0.7, 0.9), (), "bad"),
                                                         ((0.9, 1.2), (), "unsure"), ((1.1, 1.3), ("busy",), "unsure")])  # fmt: skip
def test_a_speedup_is_good_or_bad_outside_its_interval_alone(interval, doubts, css) -> None:
    speedup = only(Speedup, verdict="words", hint="latency", precision="default", ci95=interval, unreliable=doubts)
    context = benchmark_context(only(Benchmark, runs=(), parity=(), speedups=(speedup,)))
    assert [entry["css"] for entry in context["comparisons"]] == [css]


def test_memory_is_shown_without_that_of_openvino() -> None:
    memory = Memory(baseline=50_000_000, loaded=80_000_000, peak=90_000_000)
    run = only(BenchmarkRun, memory_bytes=memory)
    assert (over_baseline(run, "loaded"), over_baseline(run, "peak")) == (30, 40)
    assert over_baseline(only(BenchmarkRun, memory_bytes=None), "peak") is None


@pytest.mark.parametrize(
    "chart",
    [
        charts.bars(HOSTILE, [(HOSTILE, 1.0), ("b", 0.0)], HOSTILE),
        charts.bars("log", [(HOSTILE, 1.0), ("b", 0.0)], "", logarithmic=True),
        charts.intervals(HOSTILE, [(HOSTILE, 1.0, 1.0, 1.0)], HOSTILE),
        charts.intervals("long", [(HOSTILE * 3, 1.0, 0.5, 2.0), ("b", -1.0, -2.0, 0.0)], HOSTILE, zero=True),
        charts.scatter(HOSTILE, [(HOSTILE, 1.0, 2.0), ("b", 1.0, 2.0)], HOSTILE, HOSTILE),
        charts.profile(HOSTILE, [(HOSTILE, 5.0), ("b", -1.0)], HOSTILE, 10.0),
        charts.steps(HOSTILE, {HOSTILE: ((0.0, 1.0, 2.0), (3, 4), 1.0)}, HOSTILE),
        charts.ranges(HOSTILE, (0.0, 1.0, 2.0), {HOSTILE: (0, 0), "b": (5, 1)}, -1.0, 1.0),
    ],
)
def test_charts_escape_and_say_their_figures(chart) -> None:
    assert isinstance(chart, Markup)
    assert "<script>" not in chart
    assert 'role="img"' in chart
    assert "<desc" in chart
    assert "nan" not in chart


def test_an_interval_that_holds_zero_is_seen_to_do_so() -> None:
    (zero,) = re.findall(
        r'<line x1="([\d.]+)"[^>]*class="axis"', charts.intervals("t", [("a", 3, 1, 5)], "p", zero=True)
    )
    assert re.search(r'text-anchor="middle" class="tick">0<', charts.intervals("t", [("a", 3, 1, 5)], "p", zero=True))
    chart = charts.intervals("t", [("a", 0.5, -1, 2), ("b", 2, 1, 3)], "points", zero=True)
    (zero,) = re.findall(r'<line x1="([\d.]+)"[^>]*class="axis"', chart)
    spans = [
        tuple(map(float, span))
        for span in re.findall(r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"[^>]*whisker', chart)
    ]
    assert spans[0][0] < float(zero) < spans[0][1]
    assert float(zero) < spans[1][0]
    assert "axis" not in charts.intervals("t", [("a", 3, 1, 5)], "p")


def test_the_frontier_is_what_no_other_point_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(a), float(b)) for a, b in rng.integers(0, 6, (12, 2))]

        def beaten(p: tuple[float, float], points: list[tuple[float, float]] = points) -> bool:
            return any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)

        assert sorted(charts.pareto(points)) == [i for i, p in enumerate(points) if not beaten(p)]


def test_layers_below_the_limit_stand_out() -> None:
    chart = charts.profile("SQNR", [("a", 30.0), ("b", 9.9), ("c", 10.0)], "dB", 10.0)
    assert [("out" in css, name) for name, css in re.findall(r'<title>(\w): [^<]*</title><rect[^>]*class="([^"]*)"', chart)] == [
        (False, "a"), (True, "b"), (False, "c"),
    ]  # fmt: skip
    assert "lowest b, 9.9 dB" in chart


def test_ticks_are_round_numbers() -> None:
    assert charts.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(0.11, 0.34) == pytest.approx([0.15, 0.2, 0.25, 0.3], abs=0.05)
    assert charts.ticks(3, 3) == [3]


def test_the_command_says_what_differs_from_the_defaults() -> None:
    recipe = make_recipe(
        model="a b", calib="noise", mean=(0.5, 0.25), options={"k": "v"}, ignore=("layer1.*",), allow_overlap=True,
        mode="accuracy-aware", validate_on="x", num_samples=7, guard=False,
    )  # fmt: skip
    assert quantize_command(recipe) == (
        "ovcalib quantize 'a b' --mean 0.5,0.25 --calib noise --num-samples 7 -O k=v --mode accuracy-aware "
        "--no-guard --ignore 'layer1.*' --validate x --allow-overlap"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"schema_version": 1, "created', "is damaged"), ("[]", "holds no object"),
     ('{"schema_version": 9, "ovcalib": "3.0"}', "schema_version 9"), ('{"schema_version": 1}', "does not keep its schema")],
)  # fmt: skip
def test_damaged_results_are_refused(tmp_path, content, message) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_records([tmp_path])


def test_what_is_no_result_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no result"):
        read_records([tmp_path])
    (tmp_path / "other.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="no result file"):
        read_record(tmp_path / "other.json")
