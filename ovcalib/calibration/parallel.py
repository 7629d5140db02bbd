"""A network on all cores, each thread with its own images.

Torch splits every operation over its threads, and an operation ends with the slowest thread. A step of inversion has
hundreds of short operations, whose threads wait more than they compute, and wait for a whole time slice if other work
runs on the machine. Here each thread takes its images through the whole network and back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ovcalib.calibration.bfloat16 import in_bfloat16
from ovcalib.calibration.bn_taps import Layer, Moments, Taps, find_layers, tapped
from ovcalib.calibration.network_outputs import features_kept, network_outputs

# The interpreter runs one thread at a time; further threads would wait for it, and are given to operations instead.
MOST_COPIES = 4

Share = TypeVar("Share")
Result = TypeVar("Result")


@dataclass
class Pass:
    """What one forward pass left; the first axis of every tensor is the images.

    features   what the classifier read, [N, D], where it is kept, as the only entry; maps are averaged over positions
    moments    of the BatchNorm layers, in execution order
    """

    outputs: list[Tensor]
    features: list[Tensor]
    moments: list[Moments]

    def tensors(self) -> list[Tensor]:
        moments = [*(m.mean for m in self.moments), *(m.square for m in self.moments)]
        return [*self.outputs, *self.features, *moments]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Pass:
        """The same pass with other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        outputs, features, means, squares = (
            [next(rest) for _ in part] for part in (self.outputs, self.features, self.moments, self.moments)
        )
        moments = [
            Moments(m.layer, mean, square, m.positions)
            for m, mean, square in zip(self.moments, means, squares, strict=True)
        ]
        return Pass(outputs, features, moments)


class Network:
    """Runs a network, with the moments of its BatchNorm layers, in as many copies as there are threads.

    copies    modules that share their weights, what their layers record, and their features
    layers    of the first copy
    half      run in bfloat16
    """

    def __init__(
        self,
        copies: list[tuple[nn.Module, Taps, list[Tensor]]],
        layers: list[Layer],
        half: bool,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self.copies, self.layers, self.half, self.pool = copies, layers, half, pool

    def __call__(self, images: Tensor) -> Pass:
        if self.pool is None or len(images) == 1:
            return self.run_copy(0, images)
        parts: list[Pass] = []
        tensors = _InParallel.apply(images, self, parts)
        return parts[0].with_tensors(tensors)

    def run_copy(self, number: int, images: Tensor) -> Pass:
        module, taps, features = self.copies[number]
        taps.clear()
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        with in_bfloat16(images.device, self.half):
            outputs = [output.float() for output in network_outputs(module, images)]
            read = [(tensor.mean((2, 3)) if tensor.ndim == 4 else tensor).float() for tensor in features]
        return Pass(outputs, read, list(taps.moments))

    def in_parallel(self, work: Callable[[int, Share], Result], shares: Sequence[Share]) -> list[Result]:
        """What `work` makes of the number of each share and the share, one thread each."""
        assert self.pool is not None
        return list(self.pool.map(work, range(len(shares)), shares))


class _InParallel(torch.autograd.Function):
    """The passes of all copies as one operation: their graphs begin and end here, each in its own thread."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, network: Network, parts: list[Pass]) -> tuple[Tensor, ...]:
        shares = [share.detach().requires_grad_(ctx.needs_input_grad[0]) for share in images.chunk(len(network.copies))]
        parts += network.in_parallel(network.run_copy, shares)
        ctx.network, ctx.shares, ctx.results = network, shares, [part.tensors() for part in parts]
        ctx.set_materialize_grads(False)
        return tuple(torch.cat([t.detach() for t in pieces]) for pieces in zip(*ctx.results, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        # The loss may leave some alone, and some may be constants of the network.
        wanted = [i for i, g in enumerate(gradients) if g is not None and ctx.results[0][i].requires_grad]
        # Networks that fold positions into the first axis have more rows than images.
        rows = ([len(tensors[i]) for tensors in ctx.results] for i in wanted)
        pieces = zip(*(gradients[i].split(n) for i, n in zip(wanted, rows, strict=True)), strict=True)  # type: ignore[union-attr]

        def back(number: int, piece: tuple[Tensor, ...]) -> Tensor:
            results = [ctx.results[number][i] for i in wanted]
            found: tuple[Tensor, ...] = torch.autograd.grad(results, ctx.shares[number], piece)
            return found[0]

        return torch.cat(ctx.network.in_parallel(back, list(pieces))), None, None


@contextmanager
def on_all_cores(
    module: nn.Module, name: str, half: bool, copies: int | None = None, features: bool = False
) -> Iterator[Network]:
    """The network in as many copies as are of use; torch's threads are shared out among them.

    copies     at most so many: 1 where a pass draws random numbers
    features   whether a pass keeps what the classifier read
    """
    threads = torch.get_num_threads()
    on_cpu = find_layers(module, name)[0].mean0.device.type == "cpu"
    count = min(threads if on_cpu else 1, copies or MOST_COPIES)
    try:
        modules = [module, *(twin(module) for _ in range(count - 1))]
    except Exception:  # a network that cannot be copied runs as one copy
        modules, count = [module], 1
    layers = [find_layers(each, name) for each in modules]
    with ExitStack() as stack:
        kept = [stack.enter_context(features_kept(each)) if features else [] for each in modules]
        taps = [stack.enter_context(tapped(own)) for own in layers]
        pool = None
        if count > 1:
            shared = threads // count
            pool = stack.enter_context(ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(shared,)))
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(shared)
        yield Network(list(zip(modules, taps, kept, strict=True)), layers[0], half, pool)


def twin(module: nn.Module) -> nn.Module:
    """A copy with the same weights, for networks that keep something of a pass in their attributes."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)
