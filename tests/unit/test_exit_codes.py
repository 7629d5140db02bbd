"""What scripts rely on, by value."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ovcalib.cli.app import app
from ovcalib.errors import DataError, DeviceError, ModelError, OvcalibError, UsageError
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
