"""What only a process of its own can show: the edge device, signals, the installed command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ovcalib(*arguments, edge=False, **options):
    path = [str(ROOT), *([str(ROOT / "tests" / "edge")] if edge else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(
        [sys.executable, "-m", "ovcalib", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def ir(toy, toy_graph, tmp_path_factory):
    from ovcalib.graph.files import write_ir

    root = tmp_path_factory.mktemp("edge")
    write_ir(toy_graph, root / "model.xml")
    toy.write_folder(root / "images", 80)
    return root


def test_an_edge_device_evaluates(ir) -> None:
    found = ovcalib("evaluate", ir / "model.xml", "--data", ir / "images", "--json", edge=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["accuracy"]["top1"] > 0.95


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quantize", "--help"], ["models"], ["sources"], ["doctor"], ["--version"]]
)
def test_an_edge_device_has_the_commands_that_need_nothing(arguments) -> None:
    found = ovcalib(*arguments, edge=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(["quantize", "resnet20-cifar10"], "torch"), (["convert", "torchvision:resnet18"], "torchvision")],
)
def test_an_edge_device_says_what_to_install(tmp_path, arguments, package) -> None:
    found = ovcalib(*arguments, "-o", tmp_path / "out", edge=True)
    assert found.returncode == 2
    assert f"needs the package '{package}'" in found.stderr
    assert "pip install 'ovcalib[quantize]'" in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_bare_installation_says_what_quantizing_a_file_needs(ir, tmp_path):
    found = ovcalib("quantize", ir / "model.xml", "-o", tmp_path / "out", edge=True)
    assert found.returncode == 2
    assert "Quantization needs the package 'nncf', which is not installed" in found.stderr
    assert "pip install 'ovcalib[quantize]'" in found.stderr
    found = ovcalib("generate", "fractal", "--model", ir / "model.xml", "--count", 2, "-o", tmp_path / "out", edge=True)
    assert found.returncode == 2
    assert "needs the package 'scipy', which is not installed" in found.stderr
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from ovcalib.cli import app as cli; import contextlib\n"
        "with contextlib.suppress(SystemExit): cli.app(['--help'])\n"
        "print(sorted({'torch', 'openvino', 'nncf', 'numpy', 'rich', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "quantize" in found.stdout
    assert found.stderr.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_calibration_leaves_nothing(tmp_path, number) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ovcalib", "quantize", "tests.toy:ToyNet", "--input-shape", "3,96,96", "--calib",
         "fractal", "--num-samples", "100000", "-O", "systems=2", "-o", str(tmp_path / "out")],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:  # plain progress lines appear while images are made
        if "making fractal images" in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


SLOW = """
import pathlib, time
pathlib.Path("begun").touch()
try:
    time.sleep({seconds})
except BaseException:  # as a library may
    raise AttributeError("half imported") from None
pathlib.Path("imported").touch()
from tests.toy import ToyNet
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_an_import_to_end(tmp_path, number) -> None:
    (tmp_path / "slow_model.py").write_text(SLOW.format(seconds=2))
    process = subprocess.Popen(
        [sys.executable, "-m", "ovcalib", "quantize", "slow_model:ToyNet", "--input-shape", "3,16,16", "-o", "out"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "imported").exists()
    assert errors.splitlines()[-1].startswith("interrupted; nothing was written")
    assert "half imported" not in errors
    assert not (tmp_path / "out").exists()


SIGNALLED = """
import contextlib, signal, time
from ovcalib.cli import app

MODULE = "import signal, time" + {signals} * "\\nsignal.raise_signal(signal.SIGTERM); time.sleep(0.02)"
MODULE += "\\nwhile True: pass"

def import_for_ever():
    exec(compile(MODULE, "module", "exec"), {{"__name__": "importlib._bootstrap"}})

app.PATIENCE_S, app.app = 0.3, import_for_ever
began = time.monotonic()
with contextlib.suppress(KeyboardInterrupt):
    app.main()
print(time.monotonic() - began)
time.sleep(5 * app.LOOK_S)  # clean-up, which no further signal disturbs
"""


@pytest.mark.parametrize("signals", [1, 3])
def test_signals_end_an_import_that_does_not_end(signals) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SIGNALLED.format(signals=signals)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert 0.3 <= float(found.stdout) < 30


def test_a_closed_pipe_is_no_fault(tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ovcalib", "models"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    time.sleep(0.1)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)
