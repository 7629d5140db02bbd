"""From a model reference to a model: a torch module, or a graph that OpenVINO reads."""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ovcalib.data.sets import imagenet_names
from ovcalib.errors import (
    MissingDependencyError,
    ModelError,
    UnknownNameError,
    UsageError,
    brief,
    excerpt,
    require,
    require_installed,
)
from ovcalib.models import builtin
from ovcalib.models.copies import private_copy
from ovcalib.models.weights import apply_state_dict, download, load_state_dict, never_trained, unreachable
from ovcalib.records.model import ModelInput, ModelRecord, ModelSpec, Task, Weights, is_class_map
from ovcalib.records.options import ModelOptions
from ovcalib.records.preprocessing import IMAGENET_MEAN, IMAGENET_STD, USUAL_CROP, Preprocessing
from ovcalib.rundir import file_sha256
from ovcalib.usercode import load_reference, users_code

if TYPE_CHECKING:
    import openvino as ov
    from torch import nn

# Of the mean and the spread of pixels on the 0..1 scale; a std of 1 leaves them as they are.
LARGEST = {"mean": 1.0, "std": 2.0}

# `weights` in place of a file: what the constructor made, from a fixed seed.
RANDOM = "random"
UNTRAINED = ". Neither agreement nor speed of such a network says what a trained one does; pass trained `weights`."
REFERENCES = (
    "Expected package.module:factory, importable from here; or torchvision:, timm:, hub:, FILE.onnx, FILE.xml or a "
    "name of `ovcalib models`."
)
EXPECTED_OUTPUTS = (
    "Expected floating-point tensors [N, ...], such as logits before softmax or argmax; let the network return those."
)


@dataclass
class Model:
    """A loaded model: `module` (torch), or `graph` (OpenVINO) of a file.

    module     beside a graph, the same network with its BatchNorm layers, see `with_statistics`
    file       that the graph was read from
    obstacle   why there is no module beside a graph
    sha256     of the weights as loaded
    warnings   assumptions about the model
    """

    spec: ModelSpec
    module: nn.Module | None = None
    graph: ov.Model | None = None
    file: Path | None = None
    obstacle: str | None = None
    sha256: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        if self.graph is None:
            assert self.module is not None
            return sum(p.numel() for p in self.module.parameters())
        constants = (op for op in self.graph.get_ops() if op.get_type_name() == "Constant")
        return sum(int(np.prod(list(op.shape))) for op in constants)


def load_model(
    options: ModelOptions, module: nn.Module | None = None, say: Callable[[str], None] = lambda line: None
) -> Model:
    """The model that `options.reference` names.

    module   the torch module itself; the reference is then only its name
    say      receives a line before anything is downloaded
    raises   UsageError, ModelError
    """
    model = _load(options, module, say)
    if model.spec.weights.origin == RANDOM:
        model.warnings.append(f"The weights of {model.spec.name} are random{UNTRAINED}")
    elif model.module is not None and never_trained(model.module):
        model.warnings.append(
            f"{model.spec.name} looks untrained: its BatchNorm statistics are those of a new network (mean 0, "
            f"variance 1){UNTRAINED}"
        )
    return model


def with_statistics(model: Model) -> Model:
    """The model, where it is a file with the torch module that its BatchNorm layers can be inverted in, or why not."""
    if model.file is None or model.module is not None:
        return model
    try:
        require_installed(["torch"], "Inverting the BatchNorm layers of a file")
    except MissingDependencyError as error:
        return replace(model, obstacle=str(error).removesuffix("."))
    from ovcalib.graph.files import batch_one
    from ovcalib.models.graph_module import read_module

    assert model.graph is not None
    try:
        graph = batch_one(model.graph, model.spec)
        return replace(model, module=read_module(model.file, model.spec.input_shape, model.spec.name, graph))
    except ModelError as error:
        return replace(model, obstacle=str(error).removesuffix("."))


def _load(options: ModelOptions, module: nn.Module | None, say: Callable[[str], None]) -> Model:
    reference = options.reference
    if module is not None:
        return _from_module(private_copy(module), reference, Weights(origin="module"), options)
    if reference.endswith((".onnx", ".xml")):
        return _from_file(reference, options)
    prefix, colon, rest = reference.partition(":")
    if not colon:
        return _from_builtin(reference, options, say)
    loader = {"torchvision": _from_torchvision, "timm": _from_timm, "hub": _from_hub}.get(prefix)
    if loader is not None:
        return loader(rest, options, say)
    return _from_factory(reference, options)


def model_record(model: Model, graph: ov.Model, dynamic_batch: bool) -> ModelRecord:
    """The model block of a result, with the input of the graph that was written."""
    port = graph.inputs[0]
    return ModelRecord(
        input=ModelInput(
            name=port.any_name,
            dtype=port.get_element_type().to_string(),
            shape=(-1 if dynamic_batch else 1, *model.spec.input_shape),
            preprocessing=model.spec.preprocessing,
        ),
        name=model.spec.name,
        input_shape=model.spec.input_shape,
        parameters=model.parameters,
        sha256=model.sha256,
        weights=model.spec.weights,
        task=model.spec.task,
    )


def list_models(pattern: str = "*") -> list[str]:
    """Built-in names that match a wildcard pattern."""
    return [name for name in builtin.NAMES if fnmatch.fnmatch(name, pattern)]


def _torchvision_has(name: str) -> bool:
    try:
        import torchvision
    except ImportError:
        return False
    return name in torchvision.models.list_models()


def _timm_has(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(name.split(".")[0]))


# Repositories of the Hugging Face Hub that timm can read: an architecture by name, and weights.
HF_HUB = "hf-hub:"
LIBRARIES: dict[str, Callable[[str], bool]] = {"torchvision": _torchvision_has, "timm": _timm_has}

# One function a kind of reference -------------------------------------------------------------


def _from_builtin(name: str, options: ModelOptions, say: Callable[[str], None]) -> Model:
    if name not in builtin.NAMES:
        if Path(name).is_file():
            raise UsageError(
                f"{name!r} is a file of an unknown kind. Expected FILE.onnx or FILE.xml; weights of a network of "
                "your own go in with package.module:factory and `weights=FILE`."
            )
        near = [f"{library}:{name}" for library, has in LIBRARIES.items() if has(name)]
        if near:
            raise UsageError(
                f"{name!r} is no built-in model. Did you mean {' or '.join(map(repr, near))}? `ovcalib models` lists "
                "those that are built in."
            )
        raise UnknownNameError("model", name, builtin.NAMES)
    require("torch", "quantize", f"The model {name!r}")
    chosen = options.weights
    if chosen == RANDOM:
        module = _random(lambda: builtin.build(name))
        return _of_builtin(name, module, Weights(origin=RANDOM, sha256=state_sha256(module)), options)
    if chosen in (None, "shipped", "published"):
        weights = builtin.weights_of(name, chosen)
        if weights.url is not None:
            path = download(weights.url, weights.sha256 or "", say)
        else:
            path = Path(str(builtin.shipped_weights(name)))
    else:
        path = Path(chosen)
        weights = Weights(origin="file")
    module = builtin.build(name)
    apply_state_dict(module, load_state_dict(path), str(path), name)
    return _of_builtin(name, module, weights.model_copy(update={"sha256": file_sha256(path)}), options)


def _of_builtin(name: str, module: nn.Module, weights: Weights, options: ModelOptions) -> Model:
    spec = builtin.spec(name, weights)
    if options.input_shape not in (None, spec.input_shape):
        c, h, w = spec.input_shape
        raise UsageError(f"{name!r} takes images of shape {c},{h},{w} alone. Leave out `input_shape`.")
    assert spec.num_classes is not None
    task, num_classes = _task_of([(1, spec.num_classes)], False, options.task, name)
    preprocessing = _preprocessing(spec.input_shape, options, spec.preprocessing)[0]
    spec = spec.model_copy(update={"preprocessing": preprocessing, "task": task, "num_classes": num_classes})
    return Model(spec, module=builtin.deploy(name, module).eval(), sha256=weights.sha256 or "")


def _from_torchvision(name: str, options: ModelOptions, say: Callable[[str], None]) -> Model:
    torchvision = require("torchvision", "quantize", f"The model 'torchvision:{name}'")
    if name not in torchvision.models.list_models():
        raise UnknownNameError("torchvision model", name, torchvision.models.list_models())
    tag = torchvision.models.get_model_weights(name).DEFAULT
    # Detectors and segmentation networks would download a backbone, also where no weights are asked for.
    builder = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    bare = {"weights": None, **({"weights_backbone": None} if "weights_backbone" in builder else {})}
    if options.weights in (None, "published"):
        say(f"downloading the weights of torchvision:{name} from {tag.url}")
        module = _downloading(f"torchvision:{name}", lambda: torchvision.models.get_model(name, weights=tag))
        weights = Weights(origin="torchvision", licence="BSD-3-Clause", url=tag.url)
    else:
        module, weights = _with_file(lambda: torchvision.models.get_model(name, **bare), name, options)
    transform = tag.transforms()
    shape = options.input_shape
    published = None
    if hasattr(transform, "crop_size"):
        shape = shape or (3, transform.crop_size[0], transform.crop_size[0])
        published = Preprocessing(
            height=transform.crop_size[0], width=transform.crop_size[0],
            mean=tuple(transform.mean), std=tuple(transform.std), short_side=transform.resize_size[0],
            interpolation=transform.interpolation.value,
        )  # fmt: skip
    return _from_module(
        module, f"torchvision:{name}", weights, options, shape, published, tuple(tag.meta.get("categories", ()))
    )


def _from_timm(name: str, options: ModelOptions, say: Callable[[str], None]) -> Model:
    timm = require("timm", "quantize", f"The model 'timm:{name}'")
    on_hub = name.startswith(HF_HUB)
    if on_hub and name.count("/") != 1:
        raise UsageError(f"'timm:{name}' is not a model reference. Expected timm:{HF_HUB}OWNER/NAME.")
    if not on_hub and not timm.is_model(name.split(".")[0]):
        raise UnknownNameError("timm model", name, timm.list_models())

    def load(pretrained: bool) -> Any:
        with from_cache_if_offline(f"timm:{name}"):
            return _downloading(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained))

    if options.weights in (None, "published"):
        say(f"downloading the weights of timm:{name}")
        module = load(pretrained=True)
        weights = Weights(
            origin="timm", licence=module.pretrained_cfg.get("license"), url=module.pretrained_cfg.get("hf_hub_id")
        )
    else:
        # Of a repository on the hub, the architecture is downloaded even so.
        make = partial(load, False) if on_hub else partial(timm.create_model, name, pretrained=False)
        module, weights = _with_file(make, name, options)
    config = timm.data.resolve_data_config({}, model=module)
    shape = options.input_shape or tuple(config["input_size"])
    published = Preprocessing(
        height=shape[1], width=shape[2], mean=tuple(config["mean"]), std=tuple(config["std"]),
        short_side=int(min(shape[1:]) / config["crop_pct"]), interpolation=config["interpolation"],
    )  # fmt: skip
    labels = module.pretrained_cfg.get("label_names")
    if labels is not None and len(labels) == module.num_classes:
        classes: Sequence[str] | None = tuple(map(str, labels))
    else:
        classes = imagenet_names(module.num_classes) if weights.origin == "timm" and not on_hub else None
    return _from_module(module, f"timm:{name}", weights, options, shape, published, tuple(classes or ()))


def _from_hub(rest: str, options: ModelOptions, say: Callable[[str], None]) -> Model:
    repository, _, name = rest.partition(":")
    if repository.count("/") != 1 or not name:
        raise UsageError(f"'hub:{rest}' is not a model reference. Expected hub:OWNER/REPO:NAME.")
    if not options.trust_remote_code:
        raise UsageError(
            f"'hub:{rest}' downloads the code of github.com/{repository} and runs it. "
            "If you trust it, pass `trust_remote_code=True`."
        )
    torch = require("torch", "quantize", f"The model 'hub:{rest}'")
    say(f"downloading and running the code of github.com/{repository}")
    published = options.weights in (None, "published")

    def load() -> Any:
        return torch.hub.load(repository, name, trust_repo=True, **({"pretrained": True} if published else {}))

    weights = Weights(origin="hub", url=f"https://github.com/{repository}")
    with redirect_stdout(sys.stderr):
        if published:
            module = _downloading(f"hub:{rest}", load)
        else:
            module, weights = _with_file(lambda: _downloading(f"hub:{rest}", load), name, options)
    return _from_module(module, f"hub:{rest}", weights, options)


def _from_factory(reference: str, options: ModelOptions) -> Model:
    require("torch", "quantize", f"The model {brief(reference)}")
    factory = load_reference(reference, "model", ModelError, REFERENCES)

    def make() -> Any:
        with users_code(reference, ModelError):
            return factory()

    if options.weights is None:
        made, weights = make(), Weights(origin="factory")
    else:
        made, weights = _with_file(make, reference, options)
    return _from_module(made, reference, weights, options)


def _from_file(reference: str, options: ModelOptions) -> Model:
    import openvino as ov

    from ovcalib.graph.files import read_graph, stored_spec
    from ovcalib.graph.heads import split_detector

    graph = read_graph(Path(reference))
    spec = stored_spec(graph)
    said = ("input_shape", "mean", "std", "short_side", "crop_share", "interpolation", "channel_order")
    if spec is not None and options.task == "auto" and all(getattr(options, name) is None for name in said):
        digest = file_sha256(Path(reference).with_suffix(".bin"))
        return Model(spec, graph=graph, file=Path(reference), sha256=digest)
    if len(graph.inputs) != 1:
        raise ModelError(f"{reference!r} has {len(graph.inputs)} inputs. Expected one image input [N, C, H, W].")
    shape = options.input_shape or (spec.input_shape if spec else None)
    partial = graph.inputs[0].get_partial_shape()
    if shape is None:
        if partial.rank.is_dynamic or len(partial) != 4 or any(partial[i].is_dynamic for i in (1, 2, 3)):
            raise ModelError(
                f"{reference!r} has the input shape {partial}, which leaves channels, height or width open. "
                "Pass `input_shape`, for example `input_shape=3,224,224`."
            )
        shape = (partial[1].get_length(), partial[2].get_length(), partial[3].get_length())
    try:
        graph.reshape({graph.inputs[0]: ov.PartialShape([1, *shape])})
    except RuntimeError as error:
        raise ModelError(
            f"{reference!r} does not take inputs of shape {list(shape)} (its input is {partial}). "
            "Pass the right `input_shape`."
        ) from error
    if not graph.outputs:
        raise ModelError(f"{reference!r} has no outputs. {EXPECTED_OUTPUTS}")
    detector = split_detector(graph)
    heads = graph if detector is None else detector.body
    for port in heads.outputs:
        outside = port.get_partial_shape()
        if not port.get_element_type().is_real() or outside.rank == ov.Dimension(0) or 0 in outside:
            raise ModelError(f"{reference!r} returns {port.get_element_type()} {outside}. {EXPECTED_OUTPUTS}")
    preprocessing, warnings = _preprocessing(shape, options, spec.preprocessing if spec else None)
    shapes = [tuple(d.get_length() if d.is_static else 0 for d in port.get_partial_shape()) for port in heads.outputs]
    last = heads.outputs[0].get_node().input_value(0).get_node()
    softmax = last.get_type_name() == "Softmax" and last.get_attributes()["axis"] in (1, -3)
    task, classes = _task_of(shapes, softmax, options.task if detector is None else "detection", reference)
    digest = file_sha256(Path(reference).with_suffix(".bin" if reference.endswith(".xml") else ".onnx"))
    built = ModelSpec(
        name=Path(reference).stem, task=task, input_shape=shape, num_classes=classes, preprocessing=preprocessing,
        classes=spec.classes if spec else None, weights=Weights(origin="file", sha256=digest),
    )  # fmt: skip
    return Model(built, graph=graph, file=Path(reference), sha256=digest, warnings=warnings)


def _from_module(
    module: Any,
    name: str,
    weights: Weights,
    options: ModelOptions,
    shape: Sequence[int] | None = None,
    published: Preprocessing | None = None,
    classes: tuple[str, ...] = (),
) -> Model:
    import torch

    from ovcalib.models.detectors import is_detector, usual_input, with_raw_heads

    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{name!r} is a {type(module).__name__}. Expected a torch.nn.Module.")
    detector = is_detector(module)
    if detector:
        usual, own = usual_input(module)
        shape, published = options.input_shape or usual, own
        with users_code(name, ModelError):
            module = with_raw_heads(module, name, shape)
    shape = options.input_shape or shape
    if shape is None:
        raise UsageError(f"{name!r} does not tell its input shape. Pass it, for example `input_shape=3,224,224`.")
    c, h, w = shape
    preprocessing, warnings = _preprocessing((c, h, w), options, published)
    with users_code(name, ModelError):
        module.cpu().float().eval()
        task, num_classes = _task_of_module(module, name, (c, h, w), "detection" if detector else options.task)
        digest = state_sha256(module)
    spec = ModelSpec(
        name=name, task=task, input_shape=(c, h, w), num_classes=num_classes, preprocessing=preprocessing,
        classes=classes if classes and (detector or len(classes) == num_classes) else None, weights=weights,
        box_labels=module.labels if detector else None,
        dataset="imagenet" if num_classes in (1000, 1001) else None,
    )  # fmt: skip
    return Model(spec, module=module, sha256=digest, warnings=warnings)


# Shared pieces --------------------------------------------------------------------------------


def state_sha256(module: nn.Module) -> str:
    """A hash of a module's parameters and buffers, by name; independent of file formats."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _random(make: Callable[[], Any]) -> Any:
    """A network with the random weights of its constructor, the same every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _with_file(make: Callable[[], Any], name: str, options: ModelOptions) -> tuple[Any, Weights]:
    """A network with the weights of a file, or with random ones."""
    module = _random(make)
    if options.weights == RANDOM:
        return module, Weights(origin=RANDOM)
    path = Path(options.weights or "")
    apply_state_dict(module, load_state_dict(path), str(path), name)
    return module, Weights(origin="file", sha256=file_sha256(path))


def _downloading(reference: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # hubs raise many unrelated types
        raise ModelError(
            f"{reference!r} cannot be loaded: {excerpt(error)}. Without a network, give the weights with "
            "`weights=FILE`."
        ) from error


@contextmanager
def from_cache_if_offline(reference: str) -> Iterator[None]:
    """Let the Hugging Face hub read its cache alone where its server cannot be reached: it would try for a minute.

    raises   ModelError also where the cache does not hold the files
    """
    from huggingface_hub import constants

    server, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    reason = None if constants.HF_HUB_OFFLINE else unreachable(server)
    if reason is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"{reference!r} cannot be downloaded: {server} cannot be reached ({reason}), and {cache!r} does not "
            "hold it. Connect, copy that folder from a machine that has it, or give the weights with "
            "`weights=FILE`."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _preprocessing(
    shape: Sequence[int], options: ModelOptions, known: Preprocessing | None
) -> tuple[Preprocessing, list[str]]:
    """What the user said, over what the model says, over what is usual; the last with a warning."""
    c, h, w = shape
    warnings = []
    if known is None:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if c == 3 else ((0.0,) * c, (1.0,) * c)
        if options.mean is None or options.std is None:
            warnings.append(
                f"Nothing says how the model's input is normalised; assumed mean {','.join(map(str, mean))} and "
                f"std {','.join(map(str, std))} on the 0..1 scale. Pass `mean` and `std`."
            )
        # Small inputs are trained on whole images, and so are inputs that are not square; large ones on a centre crop.
        known = Preprocessing(
            height=h,
            width=w,
            mean=mean,
            std=std,
            short_side=round(h / USUAL_CROP) if h == w >= 128 else None,
        )
    for name, values in (("`mean`", options.mean), ("`std`", options.std)):
        if values is not None and len(values) != c:
            raise UsageError(f"{name} has {len(values)} values, but the input has {c} channels.")
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and max(values) > LARGEST[name]:
            given, divided = (",".join(f"{v:.4g}" for v in numbers) for numbers in (values, [v / 255 for v in values]))
            raise UsageError(
                f"`{name}={given}` looks like the 0..255 scale, but 0..1 was expected. Divide `mean` and `std` by 255, "
                f"for example `{name}={divided}`."
            )
    if options.std is not None and min(options.std) <= 0:
        given = ",".join(f"{value:g}" for value in options.std)
        raise UsageError(f"`std={given}` has a value that is not positive.")
    changes: dict[str, Any] = {"height": h, "width": w}
    if options.mean is not None:
        changes["mean"] = options.mean
    if options.std is not None:
        changes["std"] = options.std
    if options.short_side is not None:
        if 0 < options.short_side < max(h, w):
            raise UsageError(f"`short_side={options.short_side}` is smaller than the input of {h}x{w}.")
        changes["short_side"] = options.short_side or None
    if options.crop_share is not None:
        changes["short_side"] = int(max(h, w) / options.crop_share)
    if options.interpolation is not None:
        changes["interpolation"] = options.interpolation
    if options.channel_order is not None:
        if c != 3:
            raise UsageError(f"`channel_order={options.channel_order}` needs three channels, but the input has {c}.")
        changes["channel_order"] = options.channel_order
    return known.model_copy(update=changes), warnings


def _task_of_module(module: nn.Module, name: str, shape: tuple[int, int, int], asked: str) -> tuple[Task, int | None]:
    """The task and the width of the logits, from forward passes in eval mode.

    raises   ModelError where the outputs are nothing that can be compared; as `_task_of`
    """
    import torch

    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            output, again = module(image), module(image)
    except Exception as error:  # the network is the user's code
        raise ModelError(
            f"{name!r} does not take an input of shape {[1, *shape]}: {excerpt(error)}. Pass the right `input_shape`."
        ) from error
    leaves, repeated = (torch.utils._pytree.tree_leaves(value) for value in (output, again))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ModelError(f"{name!r} returns a {type(output).__name__} without tensors. {EXPECTED_OUTPUTS}")
    for tensor in tensors:
        if not tensor.is_floating_point() or not tensor.ndim or not tensor.numel():
            raise ModelError(f"{name!r} returns {tensor.dtype} {list(tensor.shape)}. {EXPECTED_OUTPUTS}")
    others = [leaf for leaf in repeated if isinstance(leaf, torch.Tensor)]
    if not all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in zip(tensors, others, strict=True)
    ):
        raise ModelError(
            f"{name!r} gives other outputs each time for the same input, so that INT8 cannot be compared with it. Let "
            "dropout and noise depend on `self.training`; the network runs in eval mode."
        )
    sums = tensors[0].sum(1) if tensors[0].ndim > 1 else tensors[0]
    softmax = bool((tensors[0] >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if asked == "auto":
        if type(module).__module__.startswith("torchvision.models.segmentation"):
            asked = "segmentation"
        elif not isinstance(output, torch.Tensor) and [len(shape) for shape in shapes] == [2]:
            asked = "dense"  # a dict of one vector names it otherwise than logits
    return _task_of(shapes, softmax, asked, name)


def _task_of(shapes: Sequence[tuple[int, ...]], softmax: bool, asked: str, name: str) -> tuple[Task, int | None]:
    """What the outputs are, and how many classes the logits have.

    shapes    of all outputs, batch first; 0 where a length is open
    softmax   the first output sums to 1 over its channels
    asked     the option `task`, or "detection"
    raises    UsageError where no output has the shape that the task has
    """
    single = shapes[0] if len(shapes) == 1 else ()
    logits = single[1] if len(single) == 2 and single[1] else None
    maps = [shape for shape in shapes if is_class_map(shape[1:])]
    if asked == "auto":
        asked = "classification" if logits else "segmentation" if softmax and single and maps else "dense"
    fits = {"classification": logits is not None, "segmentation": bool(maps)}
    if not fits.get(asked, True):
        expected = {"classification": "one output [N, K]", "segmentation": "an output [N, K, H, W] with 2 or more K"}
        raise UsageError(
            f"`task={asked}` expects {expected[asked]}, but {name!r} returns {', '.join(map(str, map(list, shapes)))}. "
            "Pass another `task`, or leave it out."
        )
    return cast("Task", asked), logits if asked == "classification" else None
