"""Block reconstruction: weights are rounded up or down so that the output of a block stays what FP32 gives, and then
the ranges of activations learn the same (Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", ICLR 2021). Publications on calibration data judge their images by it.

As in the authors' main script, the error is that of a block's output without Fisher information, and weights are
learned while activations are float, from what the quantized blocks before them give. Ranges are learned from what those
give as well; the script takes what FP32 gives. Rounding is that of AdaRound.

A block lies between two values through which everything after them has to go: a residual block, or one layer where
nothing goes around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset13 as ops
from torch import Tensor
from torch.func import functional_call

from ovcalib.graph.editing import before_softmax, float_activations, redirect, scale_ranges
from ovcalib.graph.reading import (
    activation_quantizers,
    float_operations,
    quantized_layers,
    quantizers_by_range,
    signal_names,
)
from ovcalib.models.graph_module import GraphModule
from ovcalib.quantization.adaround import beta_at, softly, start, undecided
from ovcalib.quantization.finetuning import TrainedRange, as_module
from ovcalib.quantization.rounding import Rounding, roundings_in

BATCH = 32
SEED = 0
# A value of v at which `softly` gives 0 or 1, its sign telling which.
CERTAIN = 10.0


@dataclass(frozen=True)
class Schedule:
    """Steps of the weights of a block and of its ranges, and Adam's rate for each; that of ranges falls along a cosine.

    batch   images of one step

    The defaults are those of the authors' main script.
    """

    weight_steps: int = 20_000
    range_steps: int = 5_000
    weight_rate: float = 1e-3
    range_rate: float = 4e-4
    batch: int = BATCH

    @staticmethod
    def shortened(steps: int, batch: int = BATCH) -> Schedule:
        """With so many steps of weights, and rates that let them go as far as in the published schedule."""
        if steps < 1:
            raise ValueError(f"{steps} steps, but there must be at least one")
        whole = Schedule()
        share = steps / whole.weight_steps
        range_steps = max(1, round(whole.range_steps * share))
        return Schedule(steps, range_steps, whole.weight_rate / share, whole.range_rate / share, batch)


# Blocks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """layers    names of its layers
    first, last  names of the operations whose outputs it reads and gives; None where that is the network's input, and
                 where it gives the network's outputs
    """

    layers: tuple[str, ...]
    first: str | None
    last: str | None


def blocks_of(fp32: ov.Model, layers: Sequence[str]) -> list[Block]:
    """The blocks of a float graph, in order.

    layers    names of those that are quantized
    """
    signals, wanted = signal_names(fp32), set(layers)
    order = [op for op in fp32.get_ordered_ops() if op.get_name() in signals]
    position = {op.get_name(): i for i, op in enumerate(order)}
    last_read = [
        max((position[to.get_node().get_name()] for port in op.outputs() for to in port.get_target_inputs()), default=i)
        for i, op in enumerate(order)
    ]
    blocks: list[Block] = []
    inside: list[str] = []
    first: str | None = None
    cut: str | None = None  # behind the last layer
    open_until = 0  # the last operation that reads a value from before this one
    for i, op in enumerate(order):
        name = op.get_friendly_name()
        if name in wanted:
            if cut is not None and inside:
                blocks.append(Block(tuple(inside), first, cut))
                inside, first = [], cut
            inside.append(name)
            cut = None
        read = [port.get_index() for port in op.outputs() if port.get_target_inputs()]
        if op.get_type_name() != "Parameter" and open_until <= i and read == [0]:
            cut = name
        open_until = max(open_until, last_read[i])
    return [*blocks, Block(tuple(inside), first, None)] if inside else blocks


def part(graph: ov.Model, block: Block) -> ov.Model:
    """A copy of one block, as a graph of its own."""
    graph = graph.clone()
    operations = {op.get_friendly_name(): op for op in graph.get_ops()}
    parameters = graph.get_parameters()
    outputs = [result.input_value(0) for result in graph.get_results()]
    if block.last is not None:
        outputs = [operations[block.last].output(0)]
    if block.first is not None:
        value = operations[block.first].output(0)
        parameters = [ops.parameter(list(value.get_shape()), np.float32)]
        redirect(value, parameters[0].output(0))
    return ov.Model(outputs, parameters, "block")


# The loss: tensors in, a tensor out ---------------------------------------------------------------


def reconstruction_loss(found: Sequence[Tensor], wanted: Sequence[Tensor], power: float) -> Tensor:
    """Distances of outputs [N, C, ...]: |difference| ** power, summed over channels and averaged over the rest."""
    return torch.stack([(a - b).abs().pow(power).sum(1).mean() for a, b in zip(found, wanted, strict=True)]).sum()


# What is trained ----------------------------------------------------------------------------------


class SoftRounding:
    """The weights of a layer, each between the two integers next to it.

    v   float32 [G, O, I], of AdaRound
    """

    def __init__(self, rounding: Rounding, key: str, module: GraphModule) -> None:
        """key   of its weights in the module's state"""
        self.rounding, self.key, self.shape = rounding, key, module.state_dict()[key].shape
        self.scale = torch.from_numpy(rounding.scale[..., None].astype(np.float32))
        units = torch.from_numpy(rounding.exact / rounding.scale[..., None])
        self.floor = units.floor().float()
        self.v = start((units - units.floor()).float()).requires_grad_()

    def units(self) -> Tensor:
        """Its weights in units of their scale."""
        limit = self.rounding.limit
        return torch.clamp(self.floor + softly(self.v), -limit, limit)

    def tensors(self) -> dict[str, Tensor]:
        """What the layer computes with, by the key of the module's state."""
        weights = self.scale * self.units()
        own = weights[0].T if self.rounding.turned else weights
        return {self.key: own.reshape(self.shape)}

    def decide(self) -> None:
        """Every weight becomes the integer that it is nearer to."""
        self.v = torch.where(self.v.detach() >= 0, 1.0, -1.0) * CERTAIN

    def integers(self) -> NDArray[np.int8]:
        """[G, O, I], after `decide`."""
        return self.units().numpy().astype(np.int8)


# The training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a block is trained on.

    source, wanted   [N, ...] of all images: what the block reads, and the outputs that it should give
    """

    student: GraphModule
    source: Tensor
    wanted: Sequence[Tensor]
    batch: int
    generator: torch.Generator
    tick: Callable[[], None]

    def losses(self, tensors: Callable[[], dict[str, Tensor]], steps: int, power: float) -> Iterator[Tensor]:
        """The loss of a batch at each step; `tensors` is what the block computes with by then."""
        for _ in range(steps):
            chosen = torch.randperm(len(self.source), generator=self.generator)[: self.batch]
            found = block_outputs(self.student, self.source[chosen], tensors())
            yield reconstruction_loss(found, [value[chosen] for value in self.wanted], power)
            self.tick()


def learn_rounding(task: Task, layers: Sequence[SoftRounding], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam([layer.v for layer in layers], rate)
    for step, loss in enumerate(task.losses(lambda: tensors_of(layers), steps, power=2)):
        beta = beta_at(step, steps)
        descend(optimizer, loss + torch.stack([undecided(softly(layer.v), beta) for layer in layers]).sum())


def learn_ranges(task: Task, ranges: Sequence[TrainedRange], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam([one.growth for one in ranges], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for loss in task.losses(lambda: tensors_of(ranges), steps, power=2.4):
        descend(optimizer, loss)
        schedule.step()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def tensors_of(trained: Sequence[SoftRounding] | Sequence[TrainedRange]) -> dict[str, Tensor]:
    return {key: value for one in trained for key, value in one.tensors().items()}


def block_outputs(module: GraphModule, x: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of a block that computes with `tensors` in the place of its own."""
    found = functional_call(module, tensors, (x,))
    return found if isinstance(found, list) else [found]


def all_outputs(module: GraphModule, x: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The same for all images, a batch at a time and without gradients."""
    with torch.no_grad():
        found = [block_outputs(module, images, tensors) for images in torch.split(x, BATCH)]
    return [torch.cat(values) for values in zip(*found, strict=True)]


def reconstruct(
    fp32: ov.Model,
    quantized: ov.Model,
    images: Sequence[NDArray[np.float32]],
    schedule: Schedule | None = None,
    *,
    tick: Callable[[int], None] = lambda done: None,
) -> ov.Model:
    """A copy of a quantized graph with weights rounded anew, and other ranges of activations.

    fp32, quantized   the same network before and after quantization, batch 1, without bias correction
    images            network inputs, float32 [1, C, H, W] each
    tick              is told the steps that were made
    raises            ModelError where torch has no operation of the network
    """
    schedule, copy = schedule or Schedule(), quantized.clone()
    # Probabilities that are quantized themselves are compared as they are.
    teacher = fp32 if before_softmax(copy) is copy else before_softmax(fp32)
    roundings = {rounding.layer.name: rounding for rounding in roundings_in(quantized_layers(copy), fp32)}
    blocks = blocks_of(fp32, list(roundings))
    x = torch.from_numpy(np.concatenate(list(images)))
    wanted = [[x]]
    for block in blocks:
        wanted.append(all_outputs(as_module(part(teacher, block)), wanted[-1][0], {}))
    generator, made = torch.Generator().manual_seed(SEED), itertools.count(1)

    def task(graph: ov.Model, source: Tensor, outputs: Sequence[Tensor]) -> Task:
        return Task(as_module(graph), source, outputs, schedule.batch, generator, lambda: tick(next(made)))

    floats, source = float_activations(before_softmax(copy)), x
    for block, outputs in zip(blocks, wanted[1:], strict=True):
        graph = part(floats, block)
        own = task(graph, source, outputs)
        weights = {op.get_friendly_name(): op.input_value(1).get_node().get_name() for op in float_operations(graph)}
        layers = [
            SoftRounding(roundings[name], own.student.tensors[weights[name]], own.student) for name in block.layers
        ]
        learn_rounding(own, layers, schedule.weight_steps, schedule.weight_rate)
        for layer in layers:
            layer.decide()
            layer.rounding.write(layer.integers(), layer.rounding.scale)
        source = all_outputs(own.student, source, tensors_of(layers))[0]

    source = x
    groups = [[quantizer.get_friendly_name() for quantizer in group] for group in quantizers_by_range(copy)]
    for block, outputs in zip(blocks, wanted[1:], strict=True):
        graph = part(before_softmax(copy), block)
        own = task(graph, source, outputs)
        steps = {fq.get_friendly_name(): own.student.tensors[fq.get_name()] for fq in activation_quantizers(graph)}
        # A range that several blocks share is learned in the first of them.
        here = [group for group in groups if not steps.keys().isdisjoint(group)]
        groups = [group for group in groups if group not in here]
        ranges = [TrainedRange(names, [steps[name] for name in names if name in steps], own.student) for names in here]
        if ranges:
            learn_ranges(own, ranges, schedule.range_steps, schedule.range_rate)
            scale_ranges(copy, {name: factor for one in ranges for name, factor in one.factors().items()})
        source = all_outputs(own.student, source, tensors_of(ranges))[0]
    return copy
