"""Reading, writing and downloading state dicts, without executing code of a file."""

from __future__ import annotations

import errno
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ovcalib.data.sets import cache_dir
from ovcalib.errors import ModelError, excerpt
from ovcalib.models.pickles import MAX_NAME, read_torch, refuse_larger_than_memory
from ovcalib.rundir import file_sha256, write_atomically

if TYPE_CHECKING:
    from torch import Tensor, nn

TIMEOUT_S = 60
REACH_S = 10
# Of a safetensors file: a hundred thousand tensors take a few megabytes.
MAX_HEADER_BYTES = 16 * 2**20


def statistics_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that keep a mean and a variance of each channel, with their names.

    BatchNorm of any dimension, SyncBatchNorm, InstanceNorm that tracks statistics, and torchvision's
    FrozenBatchNorm2d count; layers with track_running_stats=False remember nothing and are passed over.
    """
    from torch import Tensor
    from torch.nn.modules.batchnorm import _NormBase

    for path, child in module.named_modules():
        stored = (getattr(child, name, None) for name in ("running_mean", "running_var"))
        known = isinstance(child, _NormBase) or type(child).__name__ == "FrozenBatchNorm2d"
        if known and all(isinstance(value, Tensor) for value in stored):
            yield path, child


def never_trained(module: nn.Module) -> bool:
    """Whether there are BatchNorm layers, and all have the statistics of a new one (mean 0, variance 1)."""
    layers = [child for _, child in statistics_layers(module)]
    return bool(layers) and all(bool((m.running_mean == 0).all() and (m.running_var == 1).all()) for m in layers)  # type: ignore[union-attr]


def save_state_dict(state: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically; the bytes depend on the content alone."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def write(partial: Path) -> None:
        save_file(tensors, partial, dict(metadata) if metadata else None)
        if metadata:
            _sort_metadata(partial)

    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ModelError."""
    from safetensors import safe_open

    try:
        refuse_larger_than_memory(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header of {length} bytes is longer than {MAX_HEADER_BYTES}")
        with safe_open(path, "pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}, archive.metadata() or {}  # noqa: SIM118
    except ModelError:
        raise
    except Exception as error:  # safetensors raises its own type, and torch's for types that it lacks
        raise ModelError(f"{str(path)!r} is not a readable safetensors file: {excerpt(error)}.") from error


def class_names(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes in the metadata of a generator; none where it has none. Raises ValueError."""
    try:
        names = json.loads(metadata.get("classes", "[]"))
        if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
            raise ValueError("expected a list of names")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its class names are damaged: {excerpt(error)}") from error
    return tuple(names)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a file of torch.save.

    A `state_dict` or `model` entry around it and a `module.` prefix (DataParallel) are taken off; half
    precision becomes float32.
    raises   ModelError for a file that is missing, damaged, no state dict, or that holds more than data
    """
    import torch

    if not path.is_file():
        raise ModelError(f"There is no weights file {str(path)!r}.")
    state = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise ModelError(f"{str(path)!r} holds no state dict: expected a mapping of names to tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or len(name) > MAX_NAME or not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{str(path)!r} holds no state dict: expected a mapping of names to tensors, but {excerpt(name)!r} "
                f"is a {type(value).__name__}."
            )
    half = (torch.float16, torch.bfloat16)
    return {
        name.removeprefix("module."): tensor.float() if tensor.dtype in half else tensor
        for name, tensor in state.items()
    }


def apply_state_dict(module: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    """load_state_dict(strict=True) with an error that names what does not fit.

    BatchNorm's batch counters, which checkpoints before PyTorch 0.4.1 do not hold and inference does not use, may miss.
    """
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    state = {**counters, **state}
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [f"{k}: {given[k]} for {own[k]}" for k in own.keys() & given.keys() if own[k] != given[k]]
    problems = [
        f"{len(found)} {what} ({', '.join(map(excerpt, sorted(found)[:3]))}{', ...' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ModelError(
            f"The weights of {source!r} are not those of {name}: tensors {'; '.join(problems)}. "
            "Give the checkpoint of this very network."
        )
    for key, value in module.state_dict().items():
        given_value = state[key]
        if value.is_floating_point() and not given_value.is_floating_point():
            raise ModelError(
                f"The weights of {source!r} hold {given_value.dtype} for {key}; expected floating-point numbers. Give "
                "the weights of the float network, before it was quantized."
            )
        if given_value.is_floating_point() and given_value.isnan().any():
            raise ModelError(f"The weights of {source!r} are not finite: NaN in {key}. Train or fetch them again.")
    module.load_state_dict(state)


def unreachable(url: str) -> str | None:
    """Why the server of a URL cannot be reached; None where it answers, or where only its client can tell."""
    if "all" in urllib.request.getproxies():  # of a kind that urllib does not speak
        return None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_S):
            return None
    except urllib.error.HTTPError:
        return None
    except (urllib.error.URLError, OSError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        # Certificates, for example, may be known to the client alone.
        cut_off = isinstance(reason, ConnectionError | TimeoutError | socket.gaierror) or (
            isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
        )
        return excerpt(str(reason)) if cut_off else None


def download(url: str, sha256: str, progress: Callable[[str], None] = lambda line: None) -> Path:
    """The cached file of a URL, fetched if it is not there; its SHA-256 must begin with `sha256`."""
    target = cache_dir() / "weights" / url.rsplit("/", 1)[-1]
    if target.is_file() and file_sha256(target).startswith(sha256):
        return target
    progress(f"downloading {url}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, partial.open("wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
        digest = file_sha256(partial)
        if not digest.startswith(sha256):
            raise ModelError(
                f"{url} has the SHA-256 {digest[:16]}..., but {sha256}... was expected. "
                "The download was thrown away; try again, or give the file with `weights=FILE`."
            )
        partial.replace(target)
    except (urllib.error.URLError, OSError) as error:
        raise ModelError(f"{url} cannot be downloaded: {error}. Fetch it elsewhere and pass `weights=FILE`.") from error
    finally:
        partial.unlink(missing_ok=True)
    return target
