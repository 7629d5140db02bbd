"""Reading official StyleGAN2-ADA snapshots without running anything that they hold.

A snapshot is a pickle that embeds the source code of its networks, and the official loader executes it. Here it is
read as data (`ovcalib.models.pickles`), its storages included, and the embedded source is dropped unread.

What comes out is checked - shapes against the settings, finiteness - and is written once to safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovcalib.data.sets import cache_dir
from ovcalib.errors import ModelError, brief, excerpt
from ovcalib.models.pickles import (
    EMBEDDED,
    MAX_NAME,
    Blob,
    LazyTensor,
    RefusedError,
    interpret,
    ordered_dict,
    read_storage,
    refusals_named,
)
from ovcalib.models.weights import class_names, read_safetensors, save_state_dict
from ovcalib.rundir import file_sha256

if TYPE_CHECKING:
    from torch import nn

    from ovcalib.gan.sampling import Drawer, ZDistribution
    from ovcalib.gan.stylegan2 import Discriminator, Generator, NoiseMode

MAX_BYTES = 4 * 2**30
MAX_MODULES = 2_000
MAX_TENSORS = 10_000
MAX_DEPTH = 16
FORMAT = "ovcalib-stylegan2-ada"
PERSISTENCE_VERSION = 6

CLASSES = frozenset(
    "Generator MappingNetwork SynthesisNetwork SynthesisBlock SynthesisLayer ToRGBLayer FullyConnectedLayer "
    "Discriminator DiscriminatorBlock DiscriminatorEpilogue Conv2dLayer MinibatchStdLayer AugmentPipe".split()
)


@dataclass
class Record:
    """A network of the snapshot: the class's name and the attributes, without the source."""

    class_name: str
    state: dict[Any, Any] = field(repr=False)


def _persistent_object(meta: Any) -> Record:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise RefusedError("It holds a network that is not described as one.")
    if meta.get("version") != PERSISTENCE_VERSION:
        raise RefusedError(
            f"It describes its networks in version {brief(meta.get('version'))}; expected {PERSISTENCE_VERSION}."
        )
    if not isinstance(meta.get("class_name"), str) or meta["class_name"] not in CLASSES:
        raise RefusedError(
            f"It holds a {brief(meta.get('class_name'))}, which is no part of StyleGAN2-ADA. "
            f"Expected {', '.join(sorted(CLASSES))}."
        )
    return Record(meta["class_name"], meta["state"])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **EMBEDDED,
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent_object,
    "dnnlib.util EasyDict": ordered_dict,
}


# From the tree to a network -------------------------------------------------------------------


def read_snapshot(path: Path) -> dict[str, Any]:
    """The dictionary of an official snapshot; networks are `Record`s. Nothing in the file is executed.

    raises   ModelError that names the file and what is wrong with it
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(
                f"The snapshot {str(path)!r} has {size / 2**30:.1f} GiB; expected at most {MAX_BYTES // 2**30}."
            )
        with refusals_named(path, "snapshot"), path.open("rb") as stream:
            content = interpret(stream, size, FUNCTIONS, needed_by="snapshot of StyleGAN2-ADA")
    except OSError as error:
        raise ModelError(f"The snapshot {str(path)!r} cannot be read: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{str(path)!r} holds a {type(content).__name__}, not the dictionary with 'G_ema' of a "
            "StyleGAN2-ADA (PyTorch) snapshot."
        )
    return content


def network_tensors(record: Record) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of a network by their state-dict keys."""
    modules = seen = 0

    def walk(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, LazyTensor]]:
        nonlocal modules, seen
        modules += 1
        if not isinstance(module, Record) or depth > MAX_DEPTH or modules > MAX_MODULES:
            raise RefusedError(f"It holds no proper network at {prefix or 'the top'!r}.")
        state = module.state
        parts = [state.get(key, {}) for key in ("_parameters", "_buffers", "_modules")]
        transient = state.get("_non_persistent_buffers_set", set())
        if not all(isinstance(part, dict) for part in parts) or not isinstance(transient, set):
            raise RefusedError(f"It holds no proper network at {prefix or 'the top'!r}.")
        parameters, buffers, children = parts
        for name, tensor in [*parameters.items(), *((k, v) for k, v in buffers.items() if k not in transient)]:
            seen += 1
            if seen > MAX_TENSORS or not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
                raise RefusedError(f"It has more than {MAX_TENSORS} tensors, or one with the name {brief(name)}.")
            if tensor is None:
                continue
            if not isinstance(tensor, LazyTensor):
                raise RefusedError(f"It holds a {type(tensor).__name__} in place of the tensor {prefix}{name}.")
            yield f"{prefix}{name}", tensor
        for name, child in children.items():
            if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
                raise RefusedError(f"It holds a network with a part called {brief(name)}.")
            if child is not None:
                yield from walk(child, f"{prefix}{name}.", depth + 1)

    return walk(record, "", 0)


@dataclass(frozen=True)
class Teacher:
    """A generator ready to be sampled.

    classes   names in label order; empty where the file does not tell
    """

    generator: Generator
    classes: tuple[str, ...] = ()

    def drawer(
        self,
        seed: int,
        truncation: float = 1.0,
        cutoff: int | None = None,
        noise: NoiseMode = "const",
        z: ZDistribution = "gaussian",
    ) -> Drawer:
        """Image i from (seed, i), its noise included."""
        import torch

        from ovcalib.gan.sampling import Drawer, latents, one_hot, to_pixels

        config = self.generator.config
        device = self.generator.mapping.w_avg.device

        def own_noise(indices: Sequence[int]) -> list[torch.Tensor]:
            sides = [side for side in config.resolutions for _ in range(1 if side == 4 else 2)]
            drawn = []
            for i in indices:
                rng = np.random.default_rng((seed, i, 1))
                drawn.append([rng.standard_normal((1, side, side), dtype=np.float32) for side in sides])
            return [torch.from_numpy(np.stack(layer)).to(device) for layer in zip(*drawn, strict=True)]

        @torch.no_grad()
        def draw(indices: Sequence[int], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
            image = self.generator(
                latents(seed, indices, config.z_dim, z).to(device),
                None if labels is None else one_hot(labels, config.c_dim).to(device),
                truncation=truncation,
                cutoff=cutoff,
                noise=own_noise(indices) if noise == "random" else noise,
            )
            return to_pixels(image)

        return Drawer("This StyleGAN2-ADA generator", config.img_resolution, config.c_dim, self.classes, draw)


def load_teacher(path: Path) -> Teacher:
    """G_ema of an official snapshot (.pkl), or a generator that ovcalib wrote (.safetensors), in eval mode.

    A snapshot is converted once; the safetensors file is kept in the user's cache under the snapshot's SHA-256.
    raises   ModelError
    """
    if not path.is_file():
        raise ModelError(f"There is no generator {str(path)!r}. Give FILE.pkl or FILE.safetensors.")
    if path.suffix == ".safetensors":
        return read_teacher(path)
    cached = cache_dir() / "stylegan2-ada" / f"{file_sha256(path)[:32]}.safetensors"
    if cached.is_file():
        return read_teacher(cached)
    generator = generator_of(path, read_snapshot(path))
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second conversion, no more
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_generator(generator, cached)
    return Teacher(generator)


@contextlib.contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Whatever hostile settings lead to becomes an error that names the file."""
    try:
        with refusals_named(path, "snapshot"):
            yield
    except (
        TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, MemoryError, RecursionError
    ) as error:  # fmt: skip
        raise ModelError(f"The settings in {str(path)!r} make no sense ({excerpt(error)}).") from error


def generator_of(path: Path, snapshot: Mapping[str, Any], key: str = "G_ema") -> Generator:
    """The generator in the content of a snapshot."""
    from ovcalib.gan.stylegan2 import Generator

    with _refusals_named(path):
        record, arrays = _arrays(snapshot, key, "Generator")
        config = generator_config(record, arrays)
        _check_config(config)
        return _filled(lambda: Generator(config), arrays)  # type: ignore[return-value]


def discriminator_of(path: Path, snapshot: Mapping[str, Any]) -> Discriminator:
    """The discriminator in the content of a snapshot; only the plain architecture of the `cifar` configuration."""
    from ovcalib.gan.stylegan2 import Discriminator, DiscriminatorConfig

    with _refusals_named(path):
        record, arrays = _arrays(snapshot, "D", "Discriminator")
        given = _settings(record)
        architecture = given.get("architecture", "resnet")
        if architecture != "orig":
            raise RefusedError(f"Its discriminator is of the kind {brief(architecture)}; only 'orig' is known.")
        kwargs: dict[str, Any] = {
            key: given[key] for key in ("c_dim", "img_resolution", "img_channels") if key in given
        }
        kwargs |= {k: given[k] for k in ("channel_base", "channel_max", "num_fp16_res", "conv_clamp") if k in given}
        kwargs["mapping_layers"] = sum(name.startswith("mapping.fc") for name in arrays) // 2
        kwargs["mbstd_group_size"] = given.get("epilogue_kwargs", {}).get("mbstd_group_size", 4)
        config = DiscriminatorConfig(**kwargs)
        _check_config(config)
        return _filled(lambda: Discriminator(config), arrays)  # type: ignore[return-value]


def _arrays(snapshot: Mapping[str, Any], key: str, class_name: str) -> tuple[Record, dict[str, NDArray[np.float32]]]:
    record = snapshot.get(key)
    if not isinstance(record, Record) or record.class_name != class_name:
        held = ", ".join(map(brief, list(snapshot)[:8])) or "nothing"
        raise RefusedError(f"It has no network {key!r} of the class {class_name!r}; it holds {held}.")
    tensors = dict(network_tensors(record))
    blobs = {id(tensor.storage): tensor.storage.data for tensor in tensors.values() if isinstance(tensor.storage, Blob)}
    claimed = sum(math.prod(tensor.size) for tensor in tensors.values())
    stored = sum(len(data) for data in set(blobs.values()))
    if claimed > stored:
        raise RefusedError(f"It claims {claimed} values in {stored} bytes.")
    storages = {key: read_storage(data) for key, data in blobs.items()}
    arrays = {}
    for name, tensor in tensors.items():
        array = tensor.array(storages[id(tensor.storage)])
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise RefusedError(f"Its tensor {name} holds {array.dtype} values that are not all finite numbers.")
        arrays[name] = array.astype(np.float32)
    return record, arrays


def _settings(record: Record) -> dict[str, Any]:
    settings = record.state.get("_init_kwargs")
    return settings if isinstance(settings, dict) else {}


def generator_config(record: Record, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """The settings of a generator: sizes from its tensors, the rest from what the snapshot says of itself."""
    from ovcalib.gan.stylegan2 import GeneratorConfig

    given = _settings(record)
    mapping, synthesis = given.get("mapping_kwargs", {}), given.get("synthesis_kwargs", {})
    if not isinstance(mapping, dict) or not isinstance(synthesis, dict):
        raise RefusedError("Its settings are not dictionaries.")
    for where, key, expected in (
        (synthesis, "architecture", "skip"), (synthesis, "activation", "lrelu"), (mapping, "activation", "lrelu"),
        (synthesis, "resample_filter", [1, 3, 3, 1]),
    ):  # fmt: skip
        if where.get(key, expected) != expected:
            raise RefusedError(f"Its generator has {key} {brief(where[key])}; only {expected!r} is known.")

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise RefusedError(f"Its generator has no tensor {name}.")
        return arrays[name].shape

    if any(len(shape(name)) != 2 for name in ("mapping.fc0.weight", "synthesis.b4.conv1.affine.weight")):
        raise RefusedError("Its linear layers are not matrices.")
    blocks = {int(n.split(".")[1][1:]) for n in arrays if n.startswith("synthesis.b") and n.split(".")[1][1:].isdigit()}
    resolution = max(blocks)
    c_dim = shape("mapping.embed.weight")[-1] if "mapping.embed.weight" in arrays else 0
    w_dim = shape("synthesis.b4.conv1.affine.weight")[1]
    widest, top = shape("synthesis.b4.conv1.weight")[0], shape(f"synthesis.b{resolution}.conv1.weight")[0]
    sizes: dict[str, Any] = {
        "z_dim": shape("mapping.fc0.weight")[1] - (w_dim if c_dim else 0),
        "c_dim": c_dim,
        "w_dim": w_dim,
        "img_resolution": resolution,
        "img_channels": shape("synthesis.b4.torgb.weight")[0],
    }
    for key, found in sizes.items():
        if given.get(key, found) != found:
            raise RefusedError(f"It says that {key} is {brief(given[key])}, but its tensors say {found}.")
    config = GeneratorConfig(**sizes)
    clamp = synthesis.get("conv_clamp", None)
    return GeneratorConfig(
        **sizes,
        num_layers=sum(name.startswith("mapping.fc") and name.endswith("weight") for name in arrays),
        channel_base=synthesis.get("channel_base", top * resolution),
        channel_max=synthesis.get("channel_max", widest),
        num_fp16_res=synthesis.get("num_fp16_res", 0),
        conv_clamp=None if clamp is None else float(clamp),
        lr_multiplier=float(mapping.get("lr_multiplier", config.lr_multiplier)),
        w_avg_beta=float(mapping.get("w_avg_beta", config.w_avg_beta)),
        use_noise=any(name.endswith("noise_strength") for name in arrays),
    )


def _check_config(config: Any) -> None:
    """Bounds within which a network of these settings can be described without harm."""
    bounds = {"z_dim": (1, 2**14), "w_dim": (1, 2**14), "c_dim": (0, 2**16), "img_resolution": (4, 2**11),
              "img_channels": (1, 64), "num_layers": (1, 64), "mapping_layers": (0, 64), "channel_base": (1, 2**20),
              "channel_max": (1, 2**12), "num_fp16_res": (0, 16), "mbstd_group_size": (1, 2**10)}  # fmt: skip
    for setting in fields(config):
        value = getattr(config, setting.name)
        low, high = bounds.get(setting.name, (None, None))
        if low is not None and high is not None and (type(value) is not int or not low <= value <= high):
            raise RefusedError(f"Its {setting.name} is {brief(value)}; expected a whole number of {low} to {high}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise RefusedError(f"Its {setting.name} is {brief(value)}.")
    if config.img_resolution & (config.img_resolution - 1):
        raise RefusedError(f"Its img_resolution is {config.img_resolution}; expected a power of two.")
    if config.channels(config.img_resolution) < 1:
        raise RefusedError(f"Its channel_base is {config.channel_base}: no channels are left at the full resolution.")


def _filled(build: Callable[[], nn.Module], arrays: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    """The network with these tensors; nothing is set aside before names and shapes are known to fit."""
    import torch

    with torch.device("meta"):
        module = build()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: array.shape for name, array in arrays.items()}
    if expected != given:
        wrong = sorted(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
        lines = [f"{k} is {given.get(k, 'missing')}, expected {expected.get(k, 'nothing')}" for k in wrong[:3]]
        raise RefusedError(f"{len(wrong)} of its tensors do not fit its settings: {'; '.join(lines)}.")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    tensors = {name: tensor.reshape(expected[name]) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


# Our own container ----------------------------------------------------------------------------


def write_generator(generator: Generator, path: Path, classes: Sequence[str] = ()) -> None:
    """Tensors, settings and the names of the classes, where they are known, as safetensors, atomically."""
    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(generator.config)),
        "classes": json.dumps(list(classes)),
    }
    save_state_dict(generator.state_dict(), path, metadata)


def read_teacher(path: Path) -> Teacher:
    """A generator that `write_generator` wrote, in eval mode. Raises ModelError."""
    from ovcalib.gan.stylegan2 import Generator, GeneratorConfig

    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ModelError(
            f"{str(path)!r} is no StyleGAN2-ADA generator of ovcalib: expected a file that `ovcalib gan train-teacher` "
            "or the conversion of a snapshot wrote."
        )
    with _refusals_named(path):
        config = GeneratorConfig(**json.loads(metadata["config"]))
        _check_config(config)
        arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
        return Teacher(_filled(lambda: Generator(config), arrays), class_names(metadata))  # type: ignore[arg-type]
