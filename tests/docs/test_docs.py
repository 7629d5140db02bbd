"""The documentation: it builds without a warning, its commands run, and its code fits the package."""

import ast
import glob
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import PIL.Image
import pytest
import yaml
from click.testing import CliRunner

from ovcalib.cli import app as cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md",
                      *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INVERSIONS = {None, "bn-inversion", "dgh", "zeroq", "dsg", "intraq", "genie"}
# What makes a command of the documentation small: options that come last win.
SMALL = {
    "quantize": ["--num-samples", "4", "--benchmark-time", "0", "--overwrite"],
    "generate": ["--count", "4", "--overwrite"],
    "convert": ["--overwrite"],
    "benchmark": ["--time", "0.05", "--hint", "latency", "--overwrite"],
    "diagnose": ["--num-samples", "4", "--benchmark-time", "0", "--overwrite"],
    "sweep": ["--jobs", "1"],
}
BUILT_IN, OWN = ("resnet20-cifar10", "vit-cifar10"), "my_package.my_module:make_model"
OF_OWN = {"weights": "model.pth", "input_shape": [3, 32, 32]}
SMALL_SWEEP = {
    "models": [{"model": OWN, **OF_OWN}],
    "sources": ["noise"],
    "seeds": [0],
    "common": {"deploy_isa": "vnni"},
}
# Built-in models take ten times as long as the factory; one stays where it is what the command shows.
KEPT = (["quantize", "resnet20-cifar10", "-o", "runs/demo"],)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    title: str | None
    reason: str | None
    text: str


BLOCKS = [
    Block(page, m["language"], m["title"], m["reason"], m["text"])
    for page, text in PAGES.items()
    for m in BLOCK.finditer(text)
]


def lines(block):
    return [line.strip() for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


def commands(block):
    """The arguments of every ovcalib command of a block."""
    split = [shlex.split(line, comments=True) for line in lines(block)]
    return [words[1:] for words in split if words and words[0] == "ovcalib"]


SHELL = [block for block in BLOCKS if block.language == "sh"]
COMMANDS = [(block, words) for block in SHELL for words in commands(block)]
RUN = {page: [words for block, words in COMMANDS if block.page == page and block.reason is None] for page in PAGES}


def block_of(title):
    (found,) = [block for block in BLOCKS if block.title == title]
    return found.text


# The pages ----------------------------------------------------------------------------------------------------


def test_the_documentation_builds_offline(tmp_path) -> None:
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed")
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": nowhere, "https_proxy": nowhere}
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(pages) > 10
    for name, text in pages.items():
        assert not re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^>]*>", text), name
        assert ":::" not in text, name
    api = pages["python-api/index.html"]
    assert "<code>activation_ranges</code>" in api
    assert "Range estimator: extremes over all images" in api
    assert "<code>drop_ci95</code>" in pages["report/index.html"]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_points_to_exists(page) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"`((?:ovcalib|benchmarks|tests|docs|gan|export)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_source_is_documented() -> None:
    from ovcalib.calibration import SOURCES

    for name in SOURCES:
        assert f"`{name}" in PAGES["docs/calibration-sources.md"], name
        assert f"### `{name}`" in PAGES["docs/methods.md"], name


def test_the_fields_of_a_sweep_are_documented() -> None:
    from ovcalib.records.sweep import SweepRecipe

    table = re.search(
        r"^\| field \| meaning \| default \|\n(?:\|.*\n)+", PAGES["docs/calibration-sources.md"], re.MULTILINE
    )
    named = {name for row in table[0].splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(SweepRecipe.model_fields)


@pytest.mark.parametrize("page", ["docs/edge-devices.md", "docs/calibration-sources.md"])
def test_the_default_numbers_of_images_are_those_of_the_code(page) -> None:
    from ovcalib.calibration.sources import images_wanted
    from ovcalib.models import builtin

    text = " ".join(PAGES[page].split())
    small, side, large = map(
        int,
        re.search(
            r"make?s? (\d+)(?: images)? for inputs of at most (\d+)x\2 pixels and (\d+) for larger", text
        ).groups(),
    )
    spec = builtin.spec("resnet20-cifar10")
    for size, count in ((side, small), (side + 1, large)):
        assert images_wanted("bn-inversion", spec.model_copy(update={"input_shape": (3, size, size)})) == count


def test_the_layers_are_those_of_the_structure() -> None:
    from tests.unit.test_structure import LAYERS

    rows = re.findall(r"^\| (\d) \| (.*) \|$", PAGES["docs/architecture.md"], re.MULTILINE)
    assert {int(n): set(re.findall(r"`(\w+)`", names)) for n, names in rows} == dict(enumerate(LAYERS, 1))


# Commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.page)
def test_other_commands_are_known(block) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines(block):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("ovcalib", "pip", "pipx", "docker", "dask", "eval", "hf"), line


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.page)
def test_extras_exist(block) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [name for names in re.findall(r"(?:\.|ovcalib)\[([\w,]+)\]", block.text) for name in names.split(",")]
    assert set(named) <= set(extras)


def test_the_table_of_extras_is_whole() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"^\| `(\w+)` \|", PAGES["docs/installation.md"], re.MULTILINE))
    assert named == set(extras) - {"docs", "dev"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_is_set_up_as_the_page_says() -> None:
    (line,) = re.findall(r"^(eval .*bash_source.*?) *#", PAGES["docs/installation.md"], re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = f"{line}; COMP_WORDS=(ovcalib quantize m --calib fr); COMP_CWORD=4; _ovcalib_completion ovcalib; echo ${{COMPREPLY[@]}}"
    found = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    assert found.stdout == "fractal\n"


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_every_option_exists(block, words) -> None:
    """Also of the commands that are not run."""
    command: click.Command = cli.app
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def every_command(group):
    for command in group.commands.values():
        yield from every_command(command) if isinstance(command, click.Group) else [command]


@pytest.mark.parametrize("command", [*every_command(cli.app)], ids=lambda command: command.name)
def test_help_fits_80_columns(command) -> None:
    text = command.get_help(click.Context(command, info_name=command.name, terminal_width=80))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_the_text_names_exists(page) -> None:
    options = [
        param for command in every_command(cli.app) for param in command.params if isinstance(param, click.Option)
    ]
    known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    others = {"docs/adding-a-source.md": {"--arm"}, "docs/installation.md": {"--user"}}
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    named = {flag for code in re.findall(r"`([^`\n]+)`", text) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named - others.get(page, set()) <= known


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the commands name: a factory and its weights, images, a result and a set."""
    import torch

    root = tmp_path_factory.mktemp("docs")
    (root / "my_package").mkdir()
    (root / "my_package" / "my_module.py").write_text(block_of("my_package/my_module.py"))
    for name, seed in (("train", 1), ("val", 2)):
        rng = np.random.default_rng(seed)
        for i, label in enumerate(CLASSES * 2):
            folder = root / "photos" / name / label
            folder.mkdir(parents=True, exist_ok=True)
            coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((32, 32), PIL.Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    recipe = yaml.safe_load(block_of("recipe.yaml"))
    recipe["model"]["input_shape"] = [3, 32, 32]
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "sweep.yaml").write_text(yaml.safe_dump({**yaml.safe_load(block_of("sweep.yaml")), **SMALL_SWEEP}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.syspath_prepend(root)
        make_model = importlib.import_module("my_package.my_module").make_model
        torch.manual_seed(0)
        model = make_model()
        for _ in range(20):  # BatchNorm statistics that are not those of a new network
            model(2 * torch.randn(8, 3, 32, 32))
        torch.save(model.state_dict(), "model.pth")
        (own,) = [words for words in RUN["README.md"] if words[-1] == "runs/mine"]
        run(own)
        run(["generate", "noise", "--model", "resnet20-cifar10", "-o", "sets/inverted"])
        shutil.copy("runs/mine/fp32/model.onnx", "model.onnx")
    yield root
    for name in ("my_package", "my_package.my_module"):
        sys.modules.pop(name, None)


def small(words):
    """A command of the documentation on few small images."""
    command = words[0]
    words = ["3,32,32" if word == "3,224,224" else word for word in words]
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word and "/" in word else [word])]
    options = list(SMALL.get(command, ()))
    if command == "quantize" and words[1] in BUILT_IN and words not in KEPT:
        words = [command, OWN, *words[2:]]
        options += ["--weights", "model.pth", "--input-shape", "3,32,32"]
    if command in ("quantize", "generate"):
        source = words[1] if command == "generate" else None
        if "--calib" in words:
            source = words[words.index("--calib") + 1]
        elif "weight-only" in words:
            source = "fractal"
        if source in INVERSIONS or str(source).startswith("prior:"):
            options += ["-O", "steps=1", "-O", "init=gaussian"]
        if source == "fractal":
            options += ["-O", "points=20000", "-O", "systems=4"]
    if "--search" in words:
        options += ["--num-samples", "16"]
    if "accuracy-aware" in words:
        options += ["--max-iterations", "1"]
    return [*words, *options]


def run(words):
    arguments = small(words)
    found = CliRunner().invoke(cli.app, arguments)
    allowed = (0, 5, 7) if "accuracy-aware" in arguments else (0,)
    assert found.exit_code in allowed, f"ovcalib {shlex.join(arguments)}\n{found.stdout}{found.stderr}"
    return found


@pytest.mark.parametrize("page", [page for page, found in RUN.items() if found])
def test_the_commands_run(page, place, monkeypatch) -> None:
    """In their order, those of a page in one folder."""
    monkeypatch.chdir(place)
    for words in RUN[page]:
        run(words)


# Code and recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python" and not b.title], ids=lambda b: b.page)
def test_the_functions_take_these_arguments(block) -> None:
    from ovcalib import api

    found = [
        (node.func.attr, node) for node in ast.walk(ast.parse(block.text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name) and node.func.value.id == "ovcalib"
    ]  # fmt: skip
    assert found
    for name, call in found:
        keywords = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(getattr(api, name)).bind(*call.args, **keywords)


def test_the_recipes_are_read(tmp_path) -> None:
    from ovcalib import api
    from ovcalib.records.sweep import make_sweep_recipe

    recipe = api.make_recipe(**yaml.safe_load(block_of("recipe.yaml")))
    assert recipe.calibration.seed == 1
    assert len(make_sweep_recipe(yaml.safe_load(block_of("sweep.yaml"))).sources) == 3


def test_the_source_of_the_example_works(monkeypatch) -> None:
    from ovcalib.calibration import SOURCES
    from ovcalib.calibration.sources import Request, generate
    from ovcalib.errors import UsageError
    from ovcalib.models import builtin

    module = types.ModuleType("ovcalib.calibration.swirl")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(block_of("ovcalib/calibration/swirl.py"), "swirl.py", "exec"), module.__dict__)
    line = ast.literal_eval(f"{{{block_of('ovcalib/calibration/__init__.py')}}}")
    monkeypatch.setattr(SOURCES, "table", {**SOURCES.table, **line})
    spec = builtin.spec("resnet20-cifar10")
    few, many = (generate("swirl", Request(count=n, seed=3, spec=spec), {"turns": "3"}).images for n in (2, 5))
    assert (many.dtype, many.shape) == (np.uint8, (5, 32, 32, 3))
    assert np.array_equal(few, many[:2])
    assert many.std(axis=(1, 2)).min() > 40
    assert not np.array_equal(many[0], many[1])
    with pytest.raises(UsageError, match="more than 0"):
        generate("swirl", Request(count=1, seed=0, spec=spec), {"turns": "-1"})
