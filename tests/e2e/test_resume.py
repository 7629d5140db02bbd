"""An interrupted run says once what it kept, and the same command goes on from there."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ovcalib.calibration import inversion
from ovcalib.cli.options import next_folder
from ovcalib.errors import Interrupted
from ovcalib.rundir import RunDir
from tests.e2e.test_cli import MODEL, run


def test_the_same_command_without_an_output_folder_goes_on(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(toy.net.state_dict(), "toy.pt")
    command = ["generate", "bn-inversion", "--model", *MODEL, "--weights", "toy.pt", "--count", 4, "-O", "steps=6"]
    monkeypatch.setattr(sys, "argv", ["ovcalib", *map(str, command)])
    assert run(*command, "-o", "whole").exit_code == 0
    steps: list[object] = []
    advance = inversion.Run.advance

    def counted(self, number):
        if steps.count("stop") == 0 and len(steps) == 3:
            steps.append("stop")
            raise KeyboardInterrupt
        steps.append(number)
        advance(self, number)

    monkeypatch.setattr(inversion.Run, "advance", counted)
    found = run(*command)
    assert found.exit_code == 130
    (line,) = [line for line in found.stderr.splitlines() if "interrupted" in line]
    assert "the work so far is kept in 'runs/.0001-bn-inversion-tests.toy-ToyNet.resume'" in line
    assert "Go on with: ovcalib generate bn-inversion" in line
    assert "nothing was written" not in found.stderr
    # Something else has taken the number meanwhile.
    Path("runs/0001-other").mkdir()
    steps[:] = ["stop"]
    assert run(*command).exit_code == 0
    assert len(steps) == 1 + 3  # of six steps three were left
    assert sorted(path.name for path in Path("runs").iterdir()) == ["0001-other", "0002-bn-inversion-tests.toy-ToyNet"]
    images = [np.load(Path(folder) / "calibration.npz")["images"]
              for folder in ("whole", "runs/0002-bn-inversion-tests.toy-ToyNet")]  # fmt: skip
    assert np.array_equal(*images)


def test_the_state_of_another_run_is_left_alone(tmp_path):
    for age, name in enumerate((".0003-b-a.resume", ".x-a.resume", ".0003-a.resume")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))  # its own is the oldest
    assert next_folder(tmp_path, "a") == tmp_path / "0001-a"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".0001-a.resume", ".0003-b-a.resume", ".x-a.resume"]


def test_an_interruption_that_keeps_nothing_says_nothing_of_it(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped, RunDir(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not isinstance(stopped.value, Interrupted)
    assert not list(tmp_path.iterdir())
