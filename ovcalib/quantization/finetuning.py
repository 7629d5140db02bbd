"""Fine-tuning of a quantized graph: it learns from the float one what it should compute, without labels.

The graph itself is trained, operation by operation in torch, so what is learned is what runs: integers within their
limits and the scales of weights, biases, and the ranges of activations. Weights are trained in units of their scale, in
which a step means the same for every layer. They are rounded in the forward pass; in the backward pass gradients go
straight through (Bengio, Léonard & Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
Conditional Computation", 2013). Scales grow and shrink by a factor, and so do ranges, whose level of 0 stays; ranges
have the gradient of LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020).

Both graphs get the same images, and the outputs of all layers are compared as well as those of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ovcalib.errors import ModelError
from ovcalib.graph.editing import add_to_biases, before_softmax, fold_weights, scale_ranges
from ovcalib.graph.reading import (
    Layer,
    float_operations,
    is_constant,
    quantized_layers,
    quantizers_by_range,
)
from ovcalib.models.graph_module import GraphModule, check_module
from ovcalib.quantization.rounding import Rounding, roundings_in
from ovcalib.runtime import size_of

BATCH = 32
# Adam's rates at the first step, which fall to 0 along a cosine: of weights in units of their scale, of the logarithm
# of scales, of biases in standard deviations of their layer's output, and of the logarithm of ranges.
WEIGHT_RATE, SCALE_RATE, BIAS_RATE, RANGE_RATE = 0.005, 0.01, 0.0001, 0.01
# Of the network's outputs, beside the mean over layers. With more, the error is smaller on the images that are learned
# from, and larger on others.
OUTPUT_WEIGHT = 0.25
# Weights start at least this far from the middle between two levels, in units of their scale. Nearer ones flip in
# Adam's first steps, which are as large for a small gradient as for any, and undo what compensated rounding has made.
MARGIN = 0.1
# Images are moved by up to this share of their sides.
SHIFT = 1 / 8
# Of all values that both graphs hold for the images of one step; a smaller batch where BATCH needs more.
BATCH_BYTES = 2 * 2**30
# Copies of every layer's output: of both graphs, quantized and not, and for the gradient.
COPIES = 8
# Share of the mean square that a variance counts at least.
LEAST_VARIANCE = 1e-3
SEED = 0


# The loss: tensors in, a tensor out --------------------------------------------------------------


def distillation_loss(found: Sequence[Tensor], wanted: Sequence[Tensor], powers: Sequence[float], heads: int) -> Tensor:
    """The squared error of layers and of the network's outputs, each in units of its own variance.

    found, wanted   [N, ...] of the quantized and of the float graph: layers in order, then `heads` outputs
    powers          variance of each
    returns         mean over layers plus OUTPUT_WEIGHT times the mean over outputs
    """
    errors = [F.mse_loss(a, b) / power for a, b, power in zip(found, wanted, powers, strict=True)]
    layers, outputs = errors[: len(errors) - heads], errors[len(errors) - heads :]
    return torch.stack(layers).mean() + OUTPUT_WEIGHT * torch.stack(outputs).mean()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, C, H, W], each moved by up to SHIFT of its sides, mirrored at its border, and half of them flipped.

    The float graph says what is right for any image, so an object may lie where none of the set has it.
    """
    height, width = images.shape[2:]
    down, right = round(SHIFT * height), round(SHIFT * width)
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    tops = torch.randint(2 * down + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(2 * right + 1, (len(images),), generator=generator).tolist()
    flips = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    moved = [
        image[:, top : top + height, left : left + width] for image, top, left in zip(padded, tops, lefts, strict=True)
    ]
    return torch.stack([image.flip(2) if flip else image for image, flip in zip(moved, flips, strict=True)])


# What is trained ---------------------------------------------------------------------------------


class TrainedLayer:
    """Weights and bias of a quantized layer.

    units   float32 [G, O, I], weights in units of their scale, which the layer rounds
    growth  float32 [G, O, 1], logarithm of the factor of its scales; [1, 1, 1] where all channels share one
    shift   float32 [C], what the bias has gained, in units of `unit`
    """

    def __init__(self, rounding: Rounding, by_channel: bool, keys: tuple[str, str], module: GraphModule) -> None:
        """
        by_channel   whether every output channel has a scale of its own
        keys         of its weights and of its bias in the module's state
        """
        self.rounding, self.keys = rounding, keys
        state = module.state_dict()
        self.shape, self.before = state[keys[0]].shape, state[keys[1]].clone()
        self.scale = torch.from_numpy(rounding.scale[..., None].astype(np.float32))
        plain = torch.from_numpy(rounding.plain.astype(np.float32))
        exact = torch.from_numpy((rounding.exact / rounding.scale[..., None]).astype(np.float32))
        # As near to the float weight as the integer allows.
        self.units = (plain + (exact - plain).clamp(MARGIN - 0.5, 0.5 - MARGIN)).requires_grad_()
        own = self.scale if by_channel else self.scale[:1, :1]
        self.growth = torch.zeros_like(own).requires_grad_()
        self.shift = torch.zeros_like(self.before).requires_grad_()
        self.unit = 1.0

    def tensors(self) -> dict[str, Tensor]:
        """What the layer computes with, by the keys of the module's state."""
        limit = self.rounding.limit
        rounded = torch.fake_quantize_per_tensor_affine(self.units, 1.0, 0, -limit, limit)
        weights = self.scale * self.growth.exp() * rounded
        own = weights[0].T if self.rounding.turned else weights
        return dict(zip(self.keys, (own.reshape(self.shape), self.before + self.unit * self.shift), strict=True))

    def integers(self) -> NDArray[np.int8]:
        """[G, O, I]."""
        limit = self.rounding.limit
        return self.units.detach().round().clamp(-limit, limit).numpy().astype(np.int8)

    def scales(self) -> NDArray[np.float64]:
        """[G, O]."""
        factor: NDArray[np.float32] = self.growth.detach().exp().numpy()
        return self.rounding.scale * factor[..., 0]

    def bias_shift(self) -> NDArray[np.float64]:
        return (self.unit * self.shift).detach().numpy().astype(np.float64)


class TrainedRange:
    """The range of an activation, or of several that quantization gave the same one.

    growth   float32, logarithm of the factor for each of the range's ends: [1], or as many as there are channels
    """

    def __init__(self, names: Sequence[str], keys: Sequence[str], module: GraphModule) -> None:
        """names, keys   of its quantizers, and of their steps in the module's state"""
        self.names, self.keys = tuple(names), tuple(keys)
        self.before = module.state_dict()[keys[0]].clone()
        self.growth = torch.zeros_like(self.before).requires_grad_()

    def tensors(self) -> dict[str, Tensor]:
        """What its quantizers compute with, by the keys of the module's state."""
        return dict.fromkeys(self.keys, self.before * self.growth.exp())

    def factors(self) -> dict[str, NDArray[np.float32]]:
        """How many times as wide the range is, by the name of the quantizer."""
        return dict.fromkeys(self.names, self.growth.detach().exp().numpy())


@dataclass(frozen=True)
class Pair:
    """Both graphs as torch modules, whose outputs are those of the trained layers and then the network's own."""

    teacher: GraphModule
    student: GraphModule
    layers: tuple[TrainedLayer, ...]
    ranges: tuple[TrainedRange, ...]
    heads: int

    @staticmethod
    def of(fp32: ov.Model, int8: ov.Model) -> Pair:
        """Raises ModelError where there is nothing to train, or torch has no such operation."""
        quantized = before_softmax(int8).clone()
        roundings = roundings_in(quantized_layers(quantized), fp32)
        if not roundings:
            raise ModelError("No layer computes in INT8, so there is nothing to fine-tune. Omit `finetune`.")
        # Told by the graph, and so before `as_module` folds the scales into the weights.
        by_channel = [rounding.by_channel for rounding in roundings]
        # Biases become constants, and every layer has one.
        names = [rounding.layer.name for rounding in roundings]
        channels = (int(np.prod(rounding.exact.shape[:2])) for rounding in roundings)
        add_to_biases(quantized, {name: np.zeros(count) for name, count in zip(names, channels, strict=True)})
        student = as_module(quantized, names)
        trained = []
        for rounding, own_scales in zip(roundings, by_channel, strict=True):
            layer = Layer.of(rounding.layer.op)
            assert layer.add is not None
            (bias,) = (value for value in layer.add.input_values() if is_constant(value))
            weights, shift = (student.tensors[v.get_node().get_name()] for v in (layer.op.input_value(1), bias))
            trained.append(TrainedLayer(rounding, own_scales, (weights, shift), student))
        ranges = tuple(
            TrainedRange(
                [fq.get_friendly_name() for fq in quantizers],
                [student.tensors[fq.get_name()] for fq in quantizers],
                student,
            )
            for quantizers in quantizers_by_range(quantized)
        )
        teacher = as_module(before_softmax(fp32).clone(), names)
        return Pair(teacher, student, tuple(trained), ranges, len(fp32.outputs))

    def tensors(self) -> dict[str, Tensor]:
        """What the student computes with, by the keys of its state."""
        trained: tuple[TrainedLayer | TrainedRange, ...] = (*self.layers, *self.ranges)
        return {key: value for part in trained for key, value in part.tensors().items()}


def as_module(graph: ov.Model, names: Sequence[str] = (), model: str = "the model") -> GraphModule:
    """A graph as a torch module with the outputs of the named layers, bias included, before its own.

    model    its name in errors
    raises   ModelError for an operation that torch does not have
    """
    fold_weights([*quantized_layers(graph), *map(Layer.of, float_operations(graph))])
    operations = {op.get_friendly_name(): op for op in graph.get_ops()}
    layers = [Layer.of(operations[name]) for name in names]
    points = [(layer.op if layer.add is None else layer.add).output(0) for layer in layers]
    outputs = [result.input_value(0) for result in graph.get_results()]
    return GraphModule(ov.Model([*points, *outputs], graph.get_parameters(), "observed"), model).eval()


def refuse_unknown_operations(fp32: ov.Model, model: str) -> None:
    """Raise ModelError where torch does not compute what OpenVINO does, before anything else is done."""
    graph = before_softmax(fp32)
    try:
        check_module(as_module(graph.clone(), model=model), graph, model)
    except ModelError as error:
        raise ModelError(f"{error}, so the model cannot be fine-tuned. Omit `finetune`.") from error


# The training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a pair is trained.

    begin   sets up what is trained, and gives its optimizer; it is told the variance of each layer and output
    loss    of what the student and the teacher give, with these variances and the number of outputs
    """

    begin: Callable[[Pair, Sequence[float]], torch.optim.Optimizer]
    loss: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float], int], Tensor]


def by_adam(pair: Pair, powers: Sequence[float]) -> torch.optim.Optimizer:
    """Everything that a pair has learns, each at its own rate."""
    for layer, power in zip(pair.layers, powers, strict=False):
        layer.unit = math.sqrt(power)
    return torch.optim.Adam(
        [
            {"params": [layer.units for layer in pair.layers], "lr": WEIGHT_RATE},
            {"params": [layer.growth for layer in pair.layers], "lr": SCALE_RATE},
            {"params": [layer.shift for layer in pair.layers], "lr": BIAS_RATE},
            {"params": [one.growth for one in pair.ranges], "lr": RANGE_RATE},
        ]
    )


BY_LAYER = Recipe(by_adam, distillation_loss)


def train(
    pair: Pair,
    images: Tensor,
    generator: torch.Generator,
    steps: int,
    tick: Callable[[int], None],
    out_of_time: Callable[[], bool],
    recipe: Recipe = BY_LAYER,
) -> int:
    """Train the layers and ranges of a pair in place; returns the steps that were made."""
    batch = min(len(images), batch_size(pair))
    with torch.no_grad():
        shown = pair.teacher.outputs(images[:batch])
    powers = [power_of(value) for value in shown]
    optimizer = recipe.begin(pair, powers)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order: list[int] = []
    for step in range(steps):
        if out_of_time():
            return step
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        x = augmented(images[chosen], generator)
        with torch.no_grad():
            wanted = pair.teacher.outputs(x)
        found = functional_call(pair.student, pair.tensors(), (x,))
        loss = recipe.loss(found, wanted, powers, pair.heads)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        tick(step + 1)
    return steps


def power_of(values: Tensor) -> float:
    """The variance of values [N, ...] over images; what hardly varies must not outweigh everything else."""
    return max(float(values.var(0, correction=0).mean()), LEAST_VARIANCE * float(values.square().mean()), 1e-12)


def batch_size(pair: Pair) -> int:
    """At most BATCH images, and no more than BATCH_BYTES hold."""
    of_one = COPIES * sum(size_of(layer.rounding.layer.op.output(0)) for layer in pair.layers)
    return max(1, min(BATCH, BATCH_BYTES // max(1, of_one)))


def finetune(
    fp32: ov.Model,
    int8: ov.Model,
    images: Sequence[NDArray[np.float32]],
    steps: int,
    *,
    recipe: Recipe = BY_LAYER,
    tick: Callable[[int], None] = lambda done: None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[ov.Model, int]:
    """A copy of a quantized graph with what it learned, and the steps that it was trained for.

    fp32, int8   the same network before and after quantization, batch 1
    images       network inputs, float32 [1, C, H, W] each
    recipe       what the loss is, and what learns at which rate
    raises       ModelError where torch cannot compute what OpenVINO does
    """
    pair = Pair.of(fp32, int8)
    made = train(
        pair, torch.from_numpy(np.concatenate(list(images))), torch.Generator().manual_seed(SEED), steps, tick,
        out_of_time, recipe,
    )  # fmt: skip
    copy = int8.clone()
    layers = {layer.name: layer for layer in quantized_layers(copy)}
    for trained in pair.layers:
        own = trained.rounding
        replace(own, layer=layers[own.layer.name]).write(trained.integers(), trained.scales())
    add_to_biases(copy, {trained.rounding.layer.name: trained.bias_shift() for trained in pair.layers})
    scale_ranges(copy, {name: factor for one in pair.ranges for name, factor in one.factors().items()})
    return copy, made
