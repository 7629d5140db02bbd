"""Shared by both trainings: data in memory, seeds by step, checkpoints, logs, several processes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ovcalib import machine
from ovcalib.data.sets import ImageData, open_data
from ovcalib.errors import DataError, DeviceError, ModelError, UsageError
from ovcalib.gan.pictures import curves, save_png
from ovcalib.models.pickles import read_torch
from ovcalib.rundir import REQUEST, write_atomically, write_json

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainingImages:
    """All images of a data set in memory.

    images    uint8 [N, H, W, 3]
    labels    int64 [N], or None
    classes   names in label order; empty without labels
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]


def load_training_images(reference: str, *, download: bool = False) -> TrainingImages:
    """The training split of a data reference. Raises DataError for images that are not square or differ in size."""
    data = open_data(reference, "train", download)
    images = [_rgb(data, i) for i in range(len(data))]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DataError(
            f"{reference!r} holds images of different sizes, for example {min(shapes)} and {max(shapes)}. "
            "A generator needs one size; scale them first."
        )
    height, width, _ = next(iter(shapes))
    if height != width or height < 8 or height & (height - 1):
        raise DataError(f"{reference!r} holds images of {height}x{width}. A generator makes 8x8, 16x16, 32x32, ...")
    classes = data.class_names
    if classes is None and data.labels is not None:
        classes = tuple(map(str, range(int(data.labels.max()) + 1)))
    return TrainingImages(np.stack(images), data.labels, classes or ())


def _rgb(data: ImageData, index: int) -> NDArray[np.uint8]:
    try:
        return np.asarray(data.image(index).convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{data.name(index)!r} of {data.reference!r} cannot be decoded. Remove the damaged file."
        ) from error


def batch_indices(total: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """The images of one step: the set in a new order for every pass over it, cut into batches.

    Depends on its arguments alone, so that a resumed run draws what an uninterrupted one would.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // total
    order = {epoch: np.random.default_rng((seed, int(epoch))).permutation(total) for epoch in np.unique(epochs)}
    return np.array([order[epoch][position % total] for epoch, position in zip(epochs, positions, strict=True)])


def step_seed(seed: int, step: int, *parts: int) -> int:
    """A seed for one step, one process and one purpose, unrelated to its neighbours."""
    return int(np.random.SeedSequence((seed, step, *parts)).generate_state(1, np.uint64)[0] >> 1)


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one. Raises DeviceError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"`device={name}`: expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"`device={name}`: torch can use {torch.cuda.device_count()} CUDA devices of this machine.")
    return device


def gpu_memory(device: torch.device) -> dict[str, int]:
    """What torch has taken of a GPU at its peak, and what is free beside it, as fields of a plan; none of a CPU."""
    if device.type != "cuda":
        return {}
    peak, now = torch.cuda.max_memory_reserved(device), torch.cuda.memory_reserved(device)
    return {"gpu_memory_bytes": peak, "free_gpu_memory_bytes": torch.cuda.mem_get_info(device)[0] + now}


def half_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """What the blocks that may run in half precision do run in.

    "auto" takes float16 on CUDA, and bfloat16 on CPUs where that is faster than float32.
    """
    if precision == "float32":
        return None
    if device.type == "cuda":
        return torch.float16
    if precision == "half" or machine.has_fast_bfloat16():
        return torch.bfloat16
    return None


M = TypeVar("M", bound=nn.Module)


def on_device(module: M, device: torch.device) -> M:
    """The module on a device, its kernels in the order (channels last) that both CPUs and tensor cores prefer."""
    return module.to(device).to(memory_format=torch.channels_last)


# Several processes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Workers:
    """The processes of one training, as `torchrun` starts them; one process needs nothing."""

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def average(self, values: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
            values /= self.count
        return values

    def average_gradients(self, module: nn.Module) -> None:
        """Gradients averaged over the processes in one message; overflow of half precision becomes zero.

        Done here and not by DistributedDataParallel's hooks, because those expect one forward pass for each backward
        pass, and the penalties differentiate twice.
        """
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if not gradients:
            return
        flat = self.average(torch.cat([g.flatten() for g in gradients]))
        flat = flat.nan_to_num(nan=0.0, posinf=1e5, neginf=-1e5)
        for gradient, values in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(values.reshape(gradient.shape))


@contextlib.contextmanager
def workers(device: str) -> Iterator[Workers]:
    """Join the other processes, if `torchrun` started this one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers(0, 1, pick_device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    chosen = pick_device(f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Workers(torch.distributed.get_rank(), count, chosen)
    finally:
        torch.distributed.destroy_process_group()


# Folders of resumable trainings ---------------------------------------------


def refuse_another_training(folder: Path, request: Mapping[str, Any]) -> None:
    """Raise UsageError where a folder holds another training, or anything else."""
    path = folder / REQUEST
    if path.is_file():
        try:
            earlier = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{str(path)!r} is damaged. Choose another output folder with -o.") from error
        plain = json.loads(json.dumps(request))
        # The length may change: a training can be taken further.
        changed = [k for k in {*plain, *earlier} - {"kimg", "epochs"} if plain.get(k) != earlier.get(k)]
        if changed:
            key = sorted(changed)[0]
            raise UsageError(
                f"{str(folder)!r} holds a training with {key} = {earlier.get(key)!r}, but {plain.get(key)!r} was "
                "asked for. Continue it with the same settings, or choose another output folder with -o."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} is not empty and holds no training. Choose another output folder with -o.")


def open_training(folder: Path, request: Mapping[str, Any]) -> None:
    """Make the folder of a training, or find that it belongs to this very one.

    raises   UsageError where another training has been started in it
    """
    refuse_another_training(folder, request)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REQUEST, request)
    except OSError as error:
        raise UsageError(f"The folder {str(folder)!r} cannot be written: {error.strerror}.") from error


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    write_atomically(folder / CHECKPOINT, lambda partial: torch.save(dict(state), partial))


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The state of an earlier run in this folder, or None; only tensors and plain values are read."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        state = read_torch(path, device)
    except ModelError as error:
        raise UsageError(f"{error} Remove it to start again, or choose another folder.") from error
    if not isinstance(state, dict):
        raise UsageError(f"The checkpoint {str(path)!r} holds no state. Remove it to start again.")
    return state


class Log:
    """One JSON line a report, and the curves of all of them as a picture. Lines of lost steps are dropped."""

    def __init__(self, folder: Path, key: str, resumed_at: float) -> None:
        self.folder, self.key = folder, key
        path = folder / LOG
        lines = path.read_text().splitlines() if path.is_file() else []
        parsed = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that an interruption truncated
                parsed.append(json.loads(line))
        self.entries: list[dict[str, Any]] = [entry for entry in parsed if entry[key] <= resumed_at]
        write_atomically(path, lambda partial: partial.write_text("".join(json.dumps(e) + "\n" for e in self.entries)))

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def draw(self) -> None:
        names = [name for name in self.entries[-1] if name not in (self.key, "seconds")] if self.entries else []
        series = {
            name: [(e[self.key], e[name]) for e in self.entries if isinstance(e.get(name), int | float)]
            for name in names
        }
        if series:
            save_png(curves(series), self.folder / "curves.png")


class Clock:
    """Seconds of training, over all resumed pieces."""

    def __init__(self, before: float) -> None:
        self.before, self.began = before, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began
