"""What scripts rely on, by value."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import ovcalib.__main__
from ovcalib.cli.app import app
from ovcalib.cli.guard import guarded, in_flags, message
from ovcalib.errors import DataError, DeviceError, InvalidOptionError, ModelError, OvcalibError, UsageError, interrupted
from ovcalib.records.read import read_record

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize(("outcome", "code"), [("done", 0), ("goal-met", 0), ("goal-missed", 5), ("budget", 7)])
def test_the_outcome_is_the_exit_code(tmp_path, monkeypatch, outcome, code) -> None:
    shutil.copy(GOLDEN / "result-0.1.json", tmp_path / "result.json")
    record = read_record(tmp_path / "result.json").model_copy(update={"outcome": outcome})
    monkeypatch.setattr("ovcalib.api.run_recipe", lambda *args, **kwargs: SimpleNamespace(record=record))
    found = CliRunner().invoke(app, ["quantize", "resnet20-cifar10", "-o", str(tmp_path / "out")])
    assert found.exit_code == code, found.stderr
    assert f"outcome: {outcome};" in found.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [(OvcalibError, 1), (UsageError, 2), (ModelError, 3), (DataError, 4), (DeviceError, 6), (KeyboardInterrupt, 130),
     (ZeroDivisionError, 1)],
)  # fmt: skip
def test_an_error_is_an_exit_code(tmp_path, monkeypatch, error, code) -> None:
    def fail(*args, **kwargs) -> None:
        raise error("`max_drop=0.5` is it")

    monkeypatch.setattr("ovcalib.api.run_recipe", fail)
    found = CliRunner().invoke(app, ["quantize", "resnet20-cifar10", "-o", str(tmp_path / "out")])
    assert found.exit_code == code
    assert "Traceback" not in found.stderr
    if issubclass(error, OvcalibError):
        assert found.stderr == "error: --max-drop 0.5 is it\n"


def test_arguments_in_backquotes_become_flags() -> None:
    flags = {"max_drop": "--max-drop", "guard": "--guard", "validate_on": "--validate"}
    for text, expected in {
        "`max_drop`": "--max-drop",
        "`max_drop=0.5`": "--max-drop 0.5",
        "`validate_on=a b`": "--validate a b",
        "`guard=True`": "--guard",
        "`guard=False`": "--no-guard",
        "`ovcalib models`, `other=1`": "`ovcalib models`, `other=1`",
    }.items():
        assert in_flags(text, flags) == expected


def test_a_value_of_a_file_is_named_with_the_file_and_not_as_a_flag() -> None:
    flags = {"max_drop": "--max-drop", "models": "--models"}
    assert message(InvalidOptionError("max_drop", 3, "too large"), flags) == "--max-drop 3: too large."
    assert message(InvalidOptionError("models[0]", None, "expected a name"), flags) == "--models: expected a name."
    assert (
        message(InvalidOptionError("max_drop", 3, "too large", "r.yaml: "), flags) == "r.yaml: max_drop=3: too large."
    )


@pytest.mark.parametrize("kind", [AttributeError, ModelError])
@pytest.mark.parametrize("link", ["cause", "context"])
def test_an_error_that_an_interruption_leads_to_is_an_interruption(capsys, kind, link) -> None:
    def stopped() -> None:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as inner:
                if link == "cause":
                    raise ValueError("half an import") from inner
                raise ValueError("half an import")  # noqa: B904 (this link is what is tested)
        except ValueError as error:
            raise kind("no attribute 'exc'") from error

    assert guarded(stopped, {}, debug=False) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_other_errors_are_no_interruption_and_circles_end() -> None:
    first, second = ValueError(), TypeError()
    first.__context__, second.__context__ = second, first
    assert not interrupted(first)


def test_an_interruption_of_the_imports_shows_no_traceback(monkeypatch) -> None:
    class Stop:
        def find_spec(self, name, path, target=None) -> None:
            if name == "ovcalib.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ovcalib.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        ovcalib.__main__.main()
    assert stopped.value.code == 130


def test_a_reader_that_has_gone_is_left_to_the_group(capsys) -> None:
    def gone() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        guarded(gone, {}, debug=False)
    assert capsys.readouterr() == ("", "")
