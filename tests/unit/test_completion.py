"""Values that the shell completes."""

import dataclasses
import os

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from ovcalib.calibration import SOURCES
from ovcalib.calibration.sources import parse_options
from ovcalib.cli import app as cli
from ovcalib.errors import UsageError
from ovcalib.models import builtin


def completed(*words):
    """What the last word may become."""
    shell = ShellComplete(cli.app, {}, "ovcalib", "_OVCALIB_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1]) if item.type == "plain"]


def kinds(*words):
    shell = ShellComplete(cli.app, {}, "ovcalib", "_OVCALIB_COMPLETE")
    return {item.type for item in shell.get_completions(list(words[:-1]), words[-1])}


@pytest.mark.parametrize("words", [["quantize"], ["convert"], ["evaluate"], ["generate", "noise", "--model"]])
def test_models_are_the_built_in_ones(words) -> None:
    found = completed(*words, "")
    assert set(builtin.NAMES) < set(found)
    assert [name for name in found if name not in builtin.NAMES] == ["torchvision:", "timm:", "hub:"]
    assert completed(*words, "vgg11") == ["vgg11_bn-cifar10", "vgg11_bn-cifar100"]
    assert kinds(*words, "./mine") == {"file"}


@pytest.mark.parametrize("words", [["quantize", "m", "--calib"], ["generate"], ["diagnose", "a", "b", "--calib"]])
def test_sources_are_all_of_them(words) -> None:
    """With a colon where an argument has to follow."""
    found = completed(*words, "")
    assert [name.removesuffix(":") for name in found] == list(SOURCES)
    for name in found:
        plain = name.removesuffix(":")
        assert name.endswith(":") == ("argument" in SOURCES[plain].NEEDS)


def test_sources_go_by_their_names_where_their_options_are_listed() -> None:
    assert completed("sources", "") == list(SOURCES)


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("before", [["quantize", "m", "--calib"], ["generate"]])
def test_options_are_those_of_the_source_and_it_takes_them(before, source) -> None:
    found = completed(*before, f"{source}:argument", "-O", "")
    kind = SOURCES[source].Options
    assert list(dict.fromkeys(pair.partition("=")[0] for pair in found)) == [f.name for f in dataclasses.fields(kind)]
    for pair in found:
        key, _, value = pair.partition("=")
        # A choice may go with another option only.
        assert refusal(kind, {key: value}, source).startswith(("Options of", "none"))


def refusal(kind, options, source) -> str:
    try:
        parse_options(kind, options, source)
    except UsageError as error:
        return str(error)
    return "none"


def test_options_without_a_source_are_those_of_the_usual_one() -> None:
    assert completed("quantize", "m", "-O", "init=") == ["init=gaussian", "init=uniform", "init=fractal"]


def test_choices_data_and_weights() -> None:
    assert completed("quantize", "m", "--rounding", "") == ["auto", "nearest", "compensated"]
    assert completed("quantize", "m", "--interpolation", "bi") == ["bilinear", "bicubic"]
    assert completed("quantize", "m", "--eval", "im") == ["imagefolder:"]
    assert completed("quantize", "m", "--weights", "s") == ["shipped"]
    assert kinds("quantize", "m", "--weights", "x.pth") == {"file"}
    assert completed("quantize", "m", "--max-drop", "") == []


def test_the_protocol_of_bash(monkeypatch) -> None:
    environment = {
        "_OVCALIB_COMPLETE": "bash_complete",
        "COMP_WORDS": "ovcalib quantize m --calib fr",
        "COMP_CWORD": "4",
    }
    found = CliRunner().invoke(cli.app, [], env={**os.environ, **environment}, prog_name="ovcalib")
    assert found.stdout == "plain,fractal\n"
