"""A graph that OpenVINO has read, as a torch module: BatchNorm inversion needs gradients, and they need torch.

Reading an ONNX file, OpenVINO keeps BatchNormalization until its first transformations, so its statistics are as good
as those of a checkpoint. The module computes what the graph computes, for any batch; `read_module` proves it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from openvino.passes import ConstantFolding, Manager
from torch import Tensor, nn

from ovcalib.errors import ModelError
from ovcalib.graph.files import read_graph
from ovcalib.graph.heads import raw_heads
from ovcalib.runtime import Inference

CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
# Of the largest output, on random inputs, as for exports.
TOLERANCE = 2e-3
FOLDED = (
    "BatchNorm is folded into the convolutions, as exporters do, or there is none. What keeps its statistics: the "
    "training checkpoint, as package.module:factory with `weights`, or an export without folding "
    "(torch.onnx.export(..., dynamo=True, optimize=False))"
)

Values = dict[int, Tensor]


def read_module(path: Path, shape: Sequence[int], name: str, expected: ov.Model) -> nn.Module:
    """The network of a model file with its BatchNorm layers.

    shape      (C, H, W) of one input
    expected   what OpenVINO makes of the file, batch 1; the module must compute the same for every image of a batch
    raises     ModelError that says why it cannot be had
    """
    graph = raw_heads(_unfolded(path, shape))
    counts = [op.get_type_name() for op in graph.get_ops()]
    if "BatchNormInference" not in counts:
        raise ModelError(f"{name}: {FOLDED}")
    module = GraphModule(graph, name).eval()
    check_module(module, raw_heads(expected), name)
    return module


def check_module(module: GraphModule, graph: ov.Model, name: str) -> None:
    """Raise ModelError where a module computes something else than a graph with batch 1 for an image of a batch."""
    shape = [int(side) for side in graph.inputs[0].get_shape()]
    inputs = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            found = [value.numpy() for value in module.outputs(inputs)]
    except (RuntimeError, IndexError) as error:
        raise ModelError(f"{name} cannot be run on batches: {str(error).splitlines()[0]}") from error
    run = Inference(graph)
    for i, image in enumerate(inputs.numpy()):
        for ours, theirs in zip(found, run(image[None]), strict=True):
            scale = max(float(np.abs(theirs).max()), 1e-6)
            # NaN compares false with everything, so the test is written the other way round.
            if (
                len(ours) != 2
                or ours[i].size != theirs.size
                or not (float(np.abs(ours[i].reshape(-1) - theirs.reshape(-1)).max()) <= TOLERANCE * scale)
            ):
                raise ModelError(f"{name} as a torch module gives other outputs than OpenVINO")


def layer_counts(module: nn.Module) -> tuple[int, int]:
    """How many BatchNorm layers and how many convolutions there are."""
    layers = list(module.modules())
    norms, convolutions = nn.BatchNorm2d, (nn.Conv2d, nn.ConvTranspose2d)
    return sum(isinstance(layer, norms) for layer in layers), sum(isinstance(layer, convolutions) for layer in layers)


def _unfolded(path: Path, shape: Sequence[int]) -> ov.Model:
    """The graph before OpenVINO's transformations, which fold BatchNorm; shapes and constants are computed."""
    if path.suffix != ".onnx":
        graph = read_graph(path)
    else:
        frontend = ov.frontend.FrontEndManager().load_by_framework("onnx")
        graph = frontend.convert(frontend.load(str(path)))
    graph.reshape({graph.inputs[0]: ov.PartialShape([1, *shape])})
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(graph)
    return graph


class GraphModule(nn.Module):
    """The operations of a graph, one after the other.

    Convolutions and BatchNorm are layers of torch, with the names that they have in the graph, so that whatever looks
    for layers finds them. All other operations are functions.

    tensors   keys of the module's state: of weights of convolutions and of constants that other operations read, by
              the name of the constant's node, and of the steps of quantizers, by theirs
    forward   float32 [N, C, H, W] -> all outputs, [N, ...] each
    raises    ModelError for an operation that is not known
    """

    def __init__(self, graph: ov.Model, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[Callable[..., Any], list[int], list[int]]] = []
        self.tensors: dict[str, str] = {}
        number: dict[tuple[str, int], int] = {}
        data: dict[int, Tensor] = {}
        origin: dict[int, str] = {}

        def place(value: ov.Output) -> int:
            return number.setdefault((value.get_node().get_name(), value.get_index()), len(number))

        self.input = place(graph.inputs[0])
        for op in graph.get_ordered_ops():
            kind = op.get_type_name()
            if kind in ("Parameter", "Result"):
                continue
            if kind == "Constant":
                if op.get_element_type().is_real():
                    data[place(op.output(0))] = _tensor(op.get_data())
                    origin[place(op.output(0))] = op.get_name()
                continue
            call = _call(op, name)
            if isinstance(call, nn.Module):
                layer = op.get_friendly_name().replace(".", "_")
                layer = layer if layer not in self.layers else f"{layer}_{len(self.layers)}"
                self.layers[layer] = call
                if kind in CONVOLUTIONS:
                    (weight,) = (key for key, _ in call.named_parameters(f"layers.{layer}"))
                    self.tensors[op.input_value(1).get_node().get_name()] = weight
                elif isinstance(call, Quantizer):
                    self.tensors[op.get_name()] = f"layers.{layer}.step"
                call = functools.partial(_run_layer, layer)
            reads = [place(value) for value in _signals(op)]
            self.steps.append((call, reads, [place(port) for port in op.outputs()]))
        used = {value for _, reads, _ in self.steps for value in reads}
        self.constants = [(f"constant{i}", i, data[i].shape) for i in sorted(used & data.keys())]
        for key, i, _ in self.constants:
            self.register_buffer(key, data[i].reshape(-1))  # flat, because channels-last has no fifth dimension
            self.tensors[origin[i]] = key
        self.results = [place(port.get_node().input_value(0)) for port in graph.outputs]
        last = {value: i for i, (_, reads, _) in enumerate(self.steps) for value in reads}
        self.done = [
            [value for value in set(reads) if last[value] == i and value not in self.results]
            for i, (_, reads, _) in enumerate(self.steps)
        ]

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        outputs = self.outputs(x)
        return outputs[0] if len(outputs) == 1 else outputs

    def outputs(self, x: Tensor) -> list[Tensor]:
        """All outputs, also where there is one."""
        values: Values = {place: getattr(self, key).reshape(shape) for key, place, shape in self.constants}
        values[self.input] = x
        for (call, reads, writes), done in zip(self.steps, self.done, strict=True):
            found = call(self.layers, *(values[i] for i in reads))
            for place, value in zip(writes, found if isinstance(found, tuple) else (found,), strict=True):
                values[place] = value
            for place in done:
                del values[place]
        return [values[i] for i in self.results]


def _run_layer(name: str, layers: nn.ModuleDict, x: Tensor, *_: Tensor) -> Any:
    return layers[name](x)


def _function(function: Callable[..., Any], layers: nn.ModuleDict, *values: Tensor) -> Any:
    return function(*values)


# From operations to functions -----------------------------------------------------------------


def _signals(op: ov.Node) -> list[ov.Output]:
    """What a step reads: of operations with parameters, the data alone."""
    values = list(op.input_values())
    if op.get_type_name() == "ScaledDotProductAttention":
        return values[: 4 if _has_mask(op) else 3]
    return values if op.get_type_name() in (*_ELEMENTWISE, "Concat", "MatMul", "PRelu") else values[:1]


def _constants(op: ov.Node, start: int = 1) -> list[np.ndarray[Any, Any]]:
    """The parameters of an operation. Raises ModelError where they are computed."""
    found = []
    for value in op.input_values()[start:]:
        if value.get_node().get_type_name() != "Constant":
            raise ModelError(f"{op.get_friendly_name()} has parameters that depend on the image")
        found.append(np.array(value.get_node().get_data()))
    return found


def _call(op: ov.Node, name: str) -> Callable[..., Any]:
    kind = op.get_type_name()
    try:
        if kind in CONVOLUTIONS or kind == "BatchNormInference":
            return _layer(op)
        if kind == "FakeQuantize":
            return Quantizer.of(op)
        if kind in _ELEMENTWISE:
            return functools.partial(_function, _ELEMENTWISE[kind])
        if kind in _WITH_ATTRIBUTES:
            return functools.partial(_function, _WITH_ATTRIBUTES[kind](op))
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except RuntimeError as error:  # OpenVINO's, of a shape that is not known
        raise ModelError(f"{name}: the shape of {op.get_friendly_name()} depends on the image") from error
    raise ModelError(f"{name}: the operation {kind} ({op.get_friendly_name()}) is not known")


def _tensor(value: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(value, np.float32))


class Quantizer(nn.Module):
    """FakeQuantize, with gradients for its input and for the size of its steps.

    Rounding counts as the identity in the backward pass. So the gradient of the input passes between the ends of the
    range, and a step has that of LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020, equation 3).

    step   [1], or broadcastable to what is quantized where every channel has a range of its own
    zero   the level of 0, as step
    top    the last level; the first is 0
    """

    step: Tensor
    zero: Tensor

    def __init__(self, step: Tensor, zero: Tensor, top: int) -> None:
        super().__init__()
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)
        self.top = top

    @staticmethod
    def of(op: ov.Node) -> Quantizer:
        low, high, low_out, high_out = (_tensor(value) for value in _constants(op))
        if not (torch.equal(low, low_out) and torch.equal(high, high_out)):
            raise ModelError(f"{op.get_friendly_name()} gives another range than it takes")
        top = int(op.get_attributes()["levels"]) - 1
        step = ((high - low) / top).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.round(-low / step).clamp(0, top)
        if step.numel() == 1:  # whatever rank the graph writes it with
            return Quantizer(step.reshape(1), zero.reshape(1), top)
        return Quantizer(step, zero, top)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Quantize.apply(x, self.step, self.zero, self.top)
        return found


class _Quantize(torch.autograd.Function):
    """Levels are computed anew in the backward pass, because they are as large as the input, and soon computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(x, step, zero)
        ctx.top = top
        return (x / step).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, step, zero = ctx.saved_tensors
        levels = (x / step).add_(zero)
        inside = (levels >= 0) & (levels <= ctx.top)
        of_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None
        # Within the range what rounding adds, beyond it the level of the end.
        of_step = torch.where(inside, levels.round().sub_(levels), levels.clamp(0, ctx.top).sub_(zero))
        return of_x, of_step.mul_(grad).sum_to_size(step.shape), None, None


class _Cropped(nn.Module):
    """A layer without padding, of whose output a border is cut off: uneven padding of a transposed convolution."""

    def __init__(self, layer: nn.Module, border: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.layer, self.border = layer, border

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.layer(x), [-side for side in self.border])


def _layer(op: ov.Node) -> nn.Module:
    kind, attributes = op.get_type_name(), op.get_attributes()
    if kind == "BatchNormInference":
        scale, shift, mean, variance = (_tensor(value) for value in _constants(op))
        norm = nn.BatchNorm2d(len(scale), eps=attributes["epsilon"])
        norm.load_state_dict(
            {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance,
             "num_batches_tracked": torch.tensor(1)}
        )  # fmt: skip
        return norm
    (weights, *more) = (_tensor(value) for value in _constants(op))
    transposed = "Backprop" in kind
    groups = weights.shape[0] if kind.startswith("Group") else 1
    weights = weights.flatten(0, 1) if kind.startswith("Group") else weights
    if weights.ndim != 4 or more:
        raise ModelError(f"{op.get_friendly_name()} is no convolution of images")
    pads = [*zip(attributes["pads_begin"], attributes["pads_end"], strict=True)]
    (top, bottom), (left, right) = pads
    even = top == bottom and left == right
    size: dict[str, Any] = {
        "kernel_size": tuple(weights.shape[2:]), "stride": tuple(attributes["strides"]),
        "dilation": tuple(attributes["dilations"]), "groups": groups, "bias": False,
        "padding": (top, left) if even else 0,
    }  # fmt: skip
    layer: nn.Module
    made: nn.Conv2d | nn.ConvTranspose2d
    if transposed:
        extra = tuple(attributes["output_padding"])
        made = nn.ConvTranspose2d(weights.shape[0], weights.shape[1] * groups, output_padding=extra, **size)
        layer = made if even else _Cropped(made, (left, right, top, bottom))
    else:
        made = nn.Conv2d(weights.shape[1] * groups, weights.shape[0], **size)
        layer = made if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), made)
    made.weight.data = weights
    return layer


def _reduce(function: Callable[..., Tensor]) -> Callable[[ov.Node], Callable[..., Any]]:
    def make(op: ov.Node) -> Callable[..., Any]:
        axes = [int(axis) for axis in _constants(op)[0].reshape(-1)]
        return functools.partial(function, dim=axes, keepdim=bool(op.get_attributes()["keep_dims"]))

    return make


def _to_shape(size: int, shape: Sequence[int], x: Tensor) -> Tensor:
    """size is that of one image, and shape what it takes: a batch goes into the first axis, or before a single one."""
    batch = x.numel() // size
    if len(shape) < 2:
        return x.reshape(batch, *shape) if batch > 1 else x.reshape(tuple(shape))
    return x.reshape(batch * shape[0], *shape[1:])


def _reshape(op: ov.Node) -> Callable[..., Any]:
    before, after = (list(port.get_shape()) for port in (op.input_value(0), op.output(0)))
    return functools.partial(_to_shape, math.prod(before), after)


def _permute(order: Sequence[int], x: Tensor) -> Tensor:
    return x.permute(tuple(order))


def _transpose(op: ov.Node) -> Callable[..., Any]:
    order = [int(axis) for axis in _constants(op)[0]] or list(range(len(op.input_value(0).get_shape())))[::-1]
    return functools.partial(_permute, order)


def _concatenate(axis: int, *values: Tensor) -> Tensor:
    return torch.cat(values, axis)


def _split_lengths(op: ov.Node) -> Callable[..., Any]:
    axis = _constants(op)[0]
    sizes = [port.get_shape()[int(axis)] for port in op.outputs()]
    return functools.partial(_split, sizes, int(axis))


def _split(sizes: Sequence[int], axis: int, x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), axis)


def _slice(op: ov.Node) -> Callable[..., Any]:
    start, stop, step, *axes = _constants(op)
    chosen = [int(a) for a in (axes[0] if axes else range(len(start)))]
    cuts: list[tuple[int, int, int, int]] = []
    for axis, first, end, by in zip(chosen, start, stop, step, strict=True):
        if by < 1:
            raise ModelError(f"{op.get_friendly_name()} goes backwards")
        # The end of a slice may be beyond what Python's own may be.
        cuts.append((axis, int(first), int(min(end, 2**31)), int(by)))
    return functools.partial(_cut, cuts)


def _cut(cuts: Sequence[tuple[int, int, int, int]], x: Tensor) -> Tensor:
    for axis, first, end, by in cuts:
        index: list[Any] = [slice(None)] * x.ndim
        index[axis] = slice(first, end, by)
        x = x[tuple(index)]
    return x


def _pool(op: ov.Node) -> Callable[..., Any]:
    attributes, maximum = op.get_attributes(), op.get_type_name() == "MaxPool"
    before, after = tuple(attributes["pads_begin"]), tuple(attributes["pads_end"])
    kernel, strides = tuple(attributes["kernel"]), tuple(attributes["strides"])
    if len(kernel) != 2 or set(attributes.get("dilations", (1,))) != {1}:
        raise ModelError(f"{op.get_friendly_name()} is no plain pooling of images")
    # Rounding up reads beyond the padding; the shape of the output says how far.
    size, out = op.input_value(0).get_shape()[2:], op.output(0).get_shape()[2:]
    ends = [
        max(end, (o - 1) * s + k - n - begin)
        for end, o, s, k, n, begin in zip(after, out, strides, kernel, size, before, strict=True)
    ]
    border = (before[1], ends[1], before[0], ends[0])
    if maximum:
        return functools.partial(_max_pool, kernel, strides, border)
    count_all = not attributes["exclude-pad"] and tuple(ends) == after
    return functools.partial(_average_pool, kernel, strides, border, count_all)


def _max_pool(kernel: Any, strides: Any, border: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    pooled = F.max_pool2d(F.pad(x, border, value=-math.inf) if any(border) else x, kernel, strides)
    return pooled, pooled  # the second output, of positions, is not read


def _average_pool(kernel: Any, strides: Any, border: Any, count_all: bool, x: Tensor) -> Tensor:
    pooled = F.avg_pool2d(F.pad(x, border), kernel, strides)
    if count_all or not any(border):
        return pooled
    return pooled / F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), border), kernel, strides)


def _interpolate(op: ov.Node) -> Callable[..., Any]:
    attributes = op.get_attributes()
    mode, how = attributes["mode"], attributes["coordinate_transformation_mode"]
    size = tuple(op.output(0).get_shape())
    if tuple(op.input_value(0).get_shape()[:2]) != size[:2] or len(size) != 4:
        raise ModelError(f"{op.get_friendly_name()} resizes other axes than those of an image")
    if mode == "nearest":
        return functools.partial(F.interpolate, size=size[2:], mode="nearest")
    if mode in ("linear", "linear_onnx"):
        aligned = how == "align_corners"
        return functools.partial(F.interpolate, size=size[2:], mode="bilinear", align_corners=aligned)
    raise ModelError(f"{op.get_friendly_name()} interpolates by {mode}")


def _matmul(first: bool, second: bool, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.mT if first else a, b.mT if second else b)


def _pad(op: ov.Node) -> Callable[..., Any]:
    before, after, *value = _constants(op)
    border = [int(n) for pair in list(zip(before, after, strict=True))[::-1] for n in pair]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(op.get_attributes()["pad_mode"])
    if mode is None:
        raise ModelError(f"{op.get_friendly_name()} pads by {op.get_attributes()['pad_mode']}")
    if mode != "constant":
        return functools.partial(F.pad, pad=border[:4], mode=mode)
    return functools.partial(F.pad, pad=border, value=float(value[0]) if value else 0.0)


def _gather(op: ov.Node) -> Callable[..., Any]:
    indices, axis = _constants(op)
    rank, after = len(op.input_value(0).get_shape()), list(op.output(0).get_shape())
    return functools.partial(_take, torch.from_numpy(indices.astype(np.int64)), int(axis) % rank - rank, after)


def _take(indices: Tensor, axis: int, after: Sequence[int], x: Tensor) -> Tensor:
    """axis counts from the end, since a batch may stand before a single axis; after is the shape for one image."""
    axis += x.ndim
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    taken = x.index_select(axis, indices.reshape(-1).to(x.device))
    return _to_shape(math.prod(after), after, taken) if len(shape) > len(after) else taken.reshape(shape)


def _shuffle(op: ov.Node) -> Callable[..., Any]:
    """Groups of a dimension become the inner part of it, as in ShuffleNet."""
    axis, groups = int(op.get_attributes()["axis"]), int(op.get_attributes()["group"])
    axis %= len(op.output(0).get_shape())
    if axis == 0:
        raise ModelError(f"{op.get_friendly_name()} shuffles images")
    return functools.partial(_shuffled, axis, groups)


def _shuffled(axis: int, groups: int, x: Tensor) -> Tensor:
    grouped = x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    return grouped.transpose(axis, axis + 1).reshape(x.shape)


def _hard_sigmoid(op: ov.Node) -> Callable[..., Any]:
    alpha, beta = (float(value) for value in _constants(op))
    return functools.partial(_clipped_line, alpha, beta)


def _clipped_line(alpha: float, beta: float, x: Tensor) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _swish(op: ov.Node) -> Callable[..., Any]:
    beta = float(_constants(op)[0]) if op.get_input_size() > 1 else 1.0
    return functools.partial(_scaled_silu, beta)


def _scaled_silu(beta: float, x: Tensor) -> Tensor:
    return x * torch.sigmoid(beta * x)


def _same(x: Tensor) -> Tensor:
    return x


def _squared_difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b) ** 2


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    slope = slope.reshape(-1, *[1] * (x.ndim - 2)) if slope.numel() > 1 and slope.ndim == 1 else slope
    return torch.where(x > 0, x, slope * x)


def _normalize(op: ov.Node) -> Callable[..., Any]:
    """Values without their mean and, but for an option, over their standard deviation: the heart of LayerNorm."""
    attributes, axes = op.get_attributes(), [int(axis) for axis in _constants(op)[0].reshape(-1)]
    inside = attributes["eps_mode"].lower() == "inside_sqrt"
    return functools.partial(_standardized, axes, attributes["normalize_variance"], float(attributes["eps"]), inside)


def _standardized(axes: Sequence[int], scaled: bool, eps: float, inside: bool, x: Tensor) -> Tensor:
    centred: Tensor = x - x.mean(tuple(axes), keepdim=True)
    if not scaled:
        return centred
    variance = (centred**2).mean(tuple(axes), keepdim=True)
    scale: Tensor = torch.sqrt(variance + eps) if inside else torch.sqrt(variance) + eps
    return centred / scale


def _has_mask(op: ov.Node) -> bool:
    """A number in the place of a mask stands for none."""
    return op.get_input_size() > 3 and len(op.input_value(3).get_partial_shape()) > 0


def _attention(op: ov.Node) -> Callable[..., Any]:
    scale = float(_constants(op, 4)[0].item()) if op.get_input_size() > 4 else None
    return functools.partial(_attend, bool(op.get_attributes()["causal"]), scale)


def _attend(causal: bool, scale: float | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal, scale=scale)


def _softmax(op: ov.Node) -> Callable[..., Any]:
    return functools.partial(torch.softmax, dim=int(op.get_attributes()["axis"]))


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Add": torch.add, "Divide": torch.div, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "HSigmoid": F.hardsigmoid, "HSwish": F.hardswish, "Log": torch.log, "Maximum": torch.maximum,
    "Minimum": torch.minimum, "Mish": F.mish, "Multiply": torch.mul, "Negative": torch.neg, "Power": torch.pow,
    "PRelu": _prelu, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "SoftPlus": F.softplus, "Sqrt": torch.sqrt,
    "SquaredDifference": _squared_difference, "Subtract": torch.sub, "Tanh": torch.tanh, "Identity": _same,
}  # fmt: skip
_WITH_ATTRIBUTES: dict[str, Callable[[ov.Node], Callable[..., Any]]] = {
    "AvgPool": _pool, "MaxPool": _pool, "Interpolate": _interpolate,
    "Clamp": lambda op: functools.partial(
        torch.clamp, min=float(op.get_attributes()["min"]), max=float(op.get_attributes()["max"])
    ),
    "Concat": lambda op: functools.partial(_concatenate, int(op.get_attributes()["axis"])),
    "Convert": lambda op: _same, "Reshape": _reshape, "Squeeze": _reshape, "Unsqueeze": _reshape,
    "Elu": lambda op: functools.partial(F.elu, alpha=float(op.get_attributes()["alpha"])),
    "Gather": _gather, "HardSigmoid": _hard_sigmoid, "Pad": _pad, "Slice": _slice,
    "ScaledDotProductAttention": _attention, "ShuffleChannels": _shuffle, "Softmax": _softmax,
    "Gelu": lambda op: functools.partial(
        F.gelu, approximate="tanh" if op.get_attributes()["approximation_mode"].lower() == "tanh" else "none"
    ),
    "MatMul": lambda op: functools.partial(
        _matmul, bool(op.get_attributes()["transpose_a"]), bool(op.get_attributes()["transpose_b"])
    ),
    "MVN": _normalize, "ReduceMax": _reduce(torch.amax), "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin), "ReduceSum": _reduce(torch.sum), "Split": _split_lengths,
    "VariadicSplit": _split_lengths, "Swish": _swish, "Transpose": _transpose,
}  # fmt: skip
