"""References to models on servers that cannot be reached: one line, at once."""

import http.server
import json
import socket
import threading

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from ovcalib.cli import app as cli
from ovcalib.models import weights
from ovcalib.models.load import load_model
from ovcalib.records.options import ModelOptions

timm = pytest.importorskip("timm")
constants = pytest.importorskip("huggingface_hub").constants
COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def direct(monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def refused() -> str:
    """The address of a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def offline(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answering(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_hub_that_cannot_be_reached_is_one_line(offline, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    found = CliRunner().invoke(cli.app, ["convert", "timm:resnet10t", "-o", "out"])
    assert found.exit_code == 3
    said, error = found.stderr.splitlines()
    assert said == "downloading the weights of timm:resnet10t"
    assert error.startswith("error: 'timm:resnet10t' cannot be downloaded: http://127.0.0.1:")
    assert "Connection refused" in error
    assert str(offline) in error
    assert error.endswith("or give the weights with --weights FILE.")
    assert not constants.HF_HUB_OFFLINE


def test_what_the_cache_holds_needs_no_network(offline) -> None:
    made = timm.create_model("resnet10t", pretrained=False)
    repository = made.pretrained_cfg["hf_hub_id"].replace("/", "--")
    folder = offline / f"models--{repository}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    safetensors.torch.save_file(made.state_dict(), folder / "snapshots" / COMMIT / "model.safetensors")
    (folder / "snapshots" / COMMIT / "config.json").write_text(json.dumps(made.pretrained_cfg, default=str))
    model = load_model(ModelOptions(reference="timm:resnet10t"))
    assert all((value == made.state_dict()[name]).all() for name, value in model.module.state_dict().items())
    assert model.spec.classes[:2] == ("tench", "goldfish")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_server_that_answers_is_reached(status) -> None:
    server = answering(status)
    try:
        assert weights.unreachable(f"http://127.0.0.1:{server.server_port}") is None
    finally:
        server.shutdown()
        server.server_close()


def test_the_reason_is_the_systems(refused) -> None:
    assert "refused" in weights.unreachable(refused)
    assert weights.unreachable("http://host.invalid")


def test_published_weights_are_one_line_too(refused, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("OVCALIB_CACHE", str(tmp_path))
    monkeypatch.setattr("ovcalib.models.builtin.HUB", refused)
    found = CliRunner().invoke(cli.app, ["convert", "vgg11_bn-cifar10", "--weights", "published", "-o", "out"])
    assert found.exit_code == 3
    said, error = found.stderr.splitlines()
    assert said.startswith(f"downloading {refused}")
    assert "Connection refused" in error
    assert error.endswith("Fetch it elsewhere and pass --weights FILE.")


class Repository(http.server.BaseHTTPRequestHandler):
    """A repository of the hub, as far as reading its files goes; `files` is set by `hub`."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(offline, monkeypatch):
    """The repository somebody/cats, with a network of three classes; its weights."""
    torch.manual_seed(1)
    made = timm.create_model("test_resnet", num_classes=3)
    about = {"architecture": "test_resnet", "num_classes": 3, "label_names": ["lion", "tiger", "cat"],
             "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.5, "interpolation": "bicubic",
                                "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "license": "mit",
                                "first_conv": "conv1", "classifier": "fc"}}  # fmt: skip
    folder = "/somebody/cats/resolve/main"
    files = {f"{folder}/config.json": json.dumps(about).encode(),
             f"{folder}/model.safetensors": safetensors.torch.save(made.state_dict())}  # fmt: skip
    handler = type("Handler", (Repository,), {"files": files})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield made.state_dict()
    server.shutdown()
    server.server_close()


def test_a_repository_of_the_hub_brings_network_weights_and_preprocessing(hub) -> None:
    model = load_model(ModelOptions(reference="timm:hf-hub:somebody/cats"))
    assert all((value == hub[name]).all() for name, value in model.module.state_dict().items())
    assert model.spec.classes == ("lion", "tiger", "cat")
    preprocessing = model.spec.preprocessing
    assert (preprocessing.height, preprocessing.short_side, preprocessing.interpolation) == (64, 128, "bicubic")
    assert (preprocessing.mean, preprocessing.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (model.spec.weights.origin, model.spec.weights.url) == ("timm", "somebody/cats")
    assert model.spec.weights.licence == "mit"


def test_its_architecture_takes_other_weights(hub, tmp_path) -> None:
    other = {name: value + 1 for name, value in hub.items()}
    safetensors.torch.save_file(other, tmp_path / "mine.safetensors")
    model = load_model(ModelOptions(reference="timm:hf-hub:somebody/cats", weights=str(tmp_path / "mine.safetensors")))
    assert all((value == other[name]).all() for name, value in model.module.state_dict().items())
    assert model.spec.weights.origin == "file"


@pytest.mark.parametrize(
    ("reference", "code", "message"),
    [
        ("timm:hf-hub:somebody/dogs", 3, "'timm:hf-hub:somebody/dogs' cannot be loaded"),
        ("timm:hf-hub:cats", 2, "Expected timm:hf-hub:OWNER/NAME."),
    ],
)
def test_a_repository_that_is_not_there(hub, reference, code, message) -> None:
    found = CliRunner().invoke(cli.app, ["convert", reference, "-o", "out"])
    assert (found.exit_code, "Traceback" in found.stderr) == (code, False)
    assert message in found.stderr
