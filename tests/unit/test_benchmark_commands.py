"""What a benchmark says of a user's mistake."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from ovcalib.errors import DataError


@pytest.fixture(scope="module")
def command():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module("command")


def test_a_mistake_is_a_line_and_an_exit_code(command, capsys) -> None:
    def main():
        raise DataError("There is no folder '/nowhere'.")

    with pytest.raises(SystemExit) as left:
        command.run(main)
    assert left.value.code == DataError.exit_code
    assert capsys.readouterr().err == "error: There is no folder '/nowhere'.\n"


def test_an_interruption_has_the_code_of_the_shell_and_a_fault_keeps_its_traceback(command) -> None:
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        command.run(stopped)
    assert left.value.code == 130
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 / 0)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many"])
def test_a_number_from_one_on(command, text) -> None:
    assert command.positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a whole number from 1 on"):
        command.positive(text)


def test_a_program_that_can_be_run(command) -> None:
    assert command.program(sys.executable) == sys.executable
    with pytest.raises(argparse.ArgumentTypeError, match="'/nowhere/python' is no program that can be run"):
        command.program("/nowhere/python")
