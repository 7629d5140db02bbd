"""A result and a benchmark of it, which the tests of the proof and of its pages share."""

import pytest

import ovcalib
from tests.e2e.test_process import ovcalib as process


@pytest.fixture(scope="session")
def result(toy, tmp_path_factory):
    """A result folder, and the images beside it."""
    root = tmp_path_factory.mktemp("proof")
    toy.write_folder(root / "images", 60)
    ovcalib.quantize(
        toy.net, root / "out", input_shape=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), calib="noise",
        num_samples=10, eval=str(root / "images"), benchmark_time=0.05,
    )  # fmt: skip
    return root / "out"


@pytest.fixture(scope="session")
def benchmarked(result, tmp_path_factory):
    """A benchmark of both models under both hints, with counters and device parity, where torch and nncf are refused."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    found = process("benchmark", result, "-t", "0.1", "--counters", "--data", result.parent / "images", "-o", out,
                    edge=True)  # fmt: skip
    assert found.returncode == 0, found.stderr
    return out, found.stdout
