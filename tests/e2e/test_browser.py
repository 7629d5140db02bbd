"""The pages in a browser: nothing is requested, nothing complains, nothing overflows, and a name stays a name."""

import json

import pytest

import ovcalib
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.result import Result
from ovcalib.reports.benchmark import benchmark_page
from ovcalib.reports.comparison import write_comparison
from ovcalib.reports.diagnosis import diagnosis_page
from ovcalib.reports.result import result_page
from tests.e2e.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

HOSTILE = "<img src=x onerror='window.hostile=1'><script>window.hostile=1</script>" + "long_name." * 30


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def folder(result, benchmarked, tmp_path_factory):
    """One page of each kind, with hostile names wherever a name can stand."""
    root = tmp_path_factory.mktemp("pages")
    record = Result.model_validate(json.loads((result / "result.json").read_text()))
    record = record.model_copy(
        update={
            "model": record.model.model_copy(update={"name": HOSTILE}),
            "calibration": record.calibration.model_copy(update={"source": HOSTILE, "licence": HOSTILE}),
            "warnings": (HOSTILE,),
            "recipe": record.recipe.model_copy(
                update={"calibration": record.recipe.calibration.model_copy(update={"calib": HOSTILE})}
            ),
        }
    )
    measured = Benchmark.model_validate(json.loads((benchmarked[0] / "benchmark.json").read_text()))
    runs = tuple(run.model_copy(update={"model": HOSTILE + run.model}) for run in measured.runs)
    measured = measured.model_copy(update={"runs": runs, "warnings": (HOSTILE,)})
    diagnosis = ovcalib.diagnose(
        result / "fp32/model.xml", result / "int8/model.xml", calib=["noise"], num_samples=4, benchmark_time=0
    )
    operations = tuple(o.model_copy(update={"name": HOSTILE + o.name}) for o in diagnosis.operations)
    diagnosis = diagnosis.model_copy(update={"operations": operations, "model": HOSTILE, "faults": (HOSTILE,)})
    for name, page in {
        "result": result_page(record, [measured], [diagnosis], result / "preview.png"),
        "benchmark": benchmark_page(measured),
        "diagnosis": diagnosis_page(diagnosis),
    }.items():
        (root / f"{name}.html").write_text(page)
    (root / "comparison").mkdir()
    write_comparison([record, record.model_copy(update={"outcome": "budget"})], root / "comparison", ["html"])
    (root / "comparison/report.html").rename(root / "comparison.html")
    return root


@pytest.mark.parametrize("page", ["result", "benchmark", "diagnosis", "comparison"])
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1200, True)])
def test_a_page_in_a_browser(browser, folder, page, width, dark) -> None:
    path = folder / f"{page}.html"
    browser.open(path, width, dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("window.hostile") is None
    assert browser.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [path.as_uri()]
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 22, 27)" if dark else "rgb(251, 250, 248)")


def test_a_hostile_name_is_shown_as_it_is(browser, folder) -> None:
    browser.open(folder / "result.html", 900)
    assert browser.evaluate("document.querySelector('h1').textContent") == HOSTILE


@pytest.mark.parametrize("page", ["result", "comparison"])
def test_everything_is_reached_by_keyboard(browser, folder, page) -> None:
    browser.open(folder / f"{page}.html", 900)
    wanted = browser.evaluate(
        "[...document.querySelectorAll('a, button, summary, .scroll, pre')].filter(e => e.checkVisibility()).length"
    )
    browser.evaluate("window.reached = new Set()")
    for _ in range(wanted + 2):
        browser.press("Tab")
        browser.evaluate("document.activeElement !== document.body && reached.add(document.activeElement)")
    assert browser.evaluate("reached.size") >= wanted


def test_columns_sort_by_number_and_back(browser, folder) -> None:
    browser.open(folder / "comparison.html", 900)
    button = "document.querySelectorAll('table.sortable th button')[12]"  # outcome: done, budget
    column = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[12].textContent)"
    browser.evaluate(f"{button}.focus()")
    browser.press("Enter")
    assert browser.evaluate(column) == ["budget", "done"]
    browser.press("Enter")
    assert browser.evaluate(column) == ["done", "budget"]
    assert browser.evaluate(f"{button}.parentElement.getAttribute('aria-sort')") == "descending"


def test_charts_have_text_alternatives(browser, folder) -> None:
    browser.open(folder / "result.html", 900)
    charts = "[...document.querySelectorAll('svg')]"
    assert browser.evaluate(f"{charts}.length") >= 4
    # Ids are unique on the page, and each names its own chart.
    labelled = f"{charts}.every(s => s.getAttribute('aria-labelledby').split(' ').every(i => s.querySelector('#' + i).textContent))"
    assert browser.evaluate(labelled)
    assert browser.evaluate("[...document.images].every(i => i.alt && i.naturalWidth > 0)")
