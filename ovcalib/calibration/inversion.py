"""Optimising images for the statistics in BatchNorm layers: zeroq, dsg, intraq, dgh, genie and bn-inversion.

Pixels are optimised until the inputs of the BatchNorm layers have the statistics stored in them. The methods
differ along a few axes, which are the fields of `InversionOptions`; each method is a file with its own defaults.

Differences from the published codes:
- Statistics are read at the *inputs of the BatchNorm layers*. Codes that hook convolutions pair them wrongly wherever
  their order or number differs.
- With per-sample statistics each image has its own learning rate, so an image does not depend on its neighbours in the
  batch.
- Everything random is drawn from (seed, image) or (seed, step, batch), so a run that was interrupted continues to the
  same images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovcalib.calibration import bn_losses as losses
from ovcalib.calibration.bfloat16 import bfloat16_is_fast
from ovcalib.calibration.bn_taps import Layer, Moments, find_layers, large_blocks_kept
from ovcalib.calibration.inversion_options import InversionOptions, LoopOptions, resolve
from ovcalib.calibration.network_outputs import flat_outputs, frozen
from ovcalib.calibration.parallel import Network, on_all_cores
from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import ModelError
from ovcalib.models.pickles import read_torch
from ovcalib.records.preprocessing import Preprocessing
from ovcalib.rundir import write_atomically

SAVE_EVERY_S = 20.0
INPUT = "(input)"
# Function systems of the fractals that images start from: few, because finding one takes as long as four images.
SYSTEMS = 32

# Gaussian of sigma 1.25 on 3x3 positions, as DGH smooths.
_ONE_DIMENSION = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 1.25**2))
SMOOTHING = torch.outer(_ONE_DIMENSION, _ONE_DIMENSION) / _ONE_DIMENSION.sum() ** 2


def invert(request: Request, options: InversionOptions, kind: type[Run] | None = None) -> Generated:
    """Images of the network's domain whose statistics are those of its training data.

    kind     how a batch of images is optimised: Run optimises pixels
    raises   ModelError for a network without usable BatchNorm layers
    """
    assert request.module is not None
    options = resolve(options, request.spec.input_shape[1:], request.spec.num_classes)
    module, device = frozen(request.module)
    if device.type == "cpu":
        module = module.to(memory_format=torch.channels_last)
    find_layers(module, request.spec.name)  # refuses
    if options.precision == "auto":
        options = dataclasses.replace(options, precision="bf16" if bfloat16_is_fast(device) else "fp32")
    labels = None
    if options.output == "labels":
        if request.spec.num_classes is None:
            raise ModelError(
                f"{request.spec.name} has no class logits, which this method needs. Use dgh or bn-inversion."
            )
        labels = torch.arange(request.count) % request.spec.num_classes
    half, copies = options.precision == "bf16", 1 if options.swing else None
    with large_blocks_kept(request.spec.input_shape), torch.enable_grad():
        with (
            swinging(module, options.swing) as swing,
            on_all_cores(module, request.spec.name, half, copies, features=options.keeps_distance) as network,
        ):
            run = (kind or Run)(request, options, network, swing, labels, device)
            images = run.all_steps()
        with torch.no_grad():
            argmax = pseudo_labels(request, module, images, options.batch or 1, device) if labels is None else None
    module.cpu()
    given = labels[: len(images)] if labels is not None else argmax
    return Generated(
        images=images.numpy(),
        domain="network",
        labels=None if given is None else given.numpy().astype(np.int64),
        label_origin="method" if labels is not None else None if argmax is None else "pseudo",
        options=dataclasses.asdict(options),
        warnings=run.warnings(len(images)),
    )


def pseudo_labels(
    request: Request, module: nn.Module, images: Tensor, batch: int, device: torch.device
) -> Tensor | None:
    """The model's own argmax, int64 [N]; None where its output is not class logits."""
    if request.spec.num_classes is None:
        return None
    return torch.cat([module(part.to(device)).argmax(1).cpu() for part in torch.split(images, batch)])


# Pictures: what happens between the optimised pixels and the network -----------------------------------------


def smooth(images: Tensor) -> Tensor:
    """3x3 Gaussian blur with zero padding, channel by channel, [N, C, H, W]."""
    channels = images.shape[1]
    kernel = SMOOTHING.to(images).expand(channels, 1, 3, 3)
    return F.conv2d(images, kernel, padding=1, groups=channels)


def clip_straight_through(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values between black and white; the gradient passes as if nothing had been clipped."""
    return images + (images.clamp(low, high) - images).detach()


def smooth_augment(images: Tensor, rng: np.random.Generator, height: int, width: int) -> Tensor:
    """Blur, one flip for the whole batch with probability 0.5, one random crop (DGH, section 5.2)."""
    images = smooth(images)
    if rng.random() < 0.5:
        images = images.flip(-1)
    top, left = (int(rng.integers(extra + 1)) for extra in (images.shape[-2] - height, images.shape[-1] - width))
    return images[..., top : top + height, left : left + width]


def local_object(images: Tensor, rng: np.random.Generator, smallest: float) -> Tensor:
    """With probability 0.5 a random part of each image, enlarged to its size, and a flip (IntraQ, section 3.2)."""
    if rng.random() < 0.5:
        return images
    n, _, height, width = images.shape
    side = np.sqrt(rng.uniform(smallest, 1.0, n))
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), n) / 2)
    size = np.clip(np.stack((side * aspect, side / aspect), 1), 0, 1)
    shift = rng.uniform(-1, 1, (n, 2)) * (1 - size)
    flip = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    matrices = np.zeros((n, 2, 3), np.float32)
    matrices[:, 0, 0], matrices[:, 1, 1] = size[:, 0] * flip, size[:, 1]
    matrices[:, :, 2] = shift
    grid = F.affine_grid(torch.from_numpy(matrices).to(images), [n, 1, height, width], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def start(options: LoopOptions, request: Request, indices: Sequence[int]) -> Tensor:
    """Where the images with these indices start, float32 [K, C, H + extra, W + extra], each from its own seed."""
    c, h, w = request.spec.input_shape
    extra = (options.extra_pixels or 0) if isinstance(options, InversionOptions) else 0
    shape = (c, h + extra, w + extra)
    generators = [np.random.default_rng((request.seed, 0, i)) for i in indices]
    if options.init == "gaussian":
        return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))
    if options.init == "uniform":
        low, high = (bound[:, None, None] for bound in request.spec.preprocessing.input_range())
        return torch.from_numpy(np.stack([g.uniform(low, high, shape).astype(np.float32) for g in generators]))
    return torch.from_numpy(_fractals(request, shape, indices))


def _fractals(request: Request, shape: tuple[int, int, int], indices: Sequence[int]) -> Any:
    from ovcalib.calibration import fractal

    larger: Preprocessing = request.spec.preprocessing.model_copy(update={"height": shape[1], "width": shape[2]})
    spec = request.spec.model_copy(update={"input_shape": shape, "preprocessing": larger})
    pixels = fractal.pictures(spec, request.seed, indices, fractal.Options(systems=SYSTEMS))
    return larger.normalise(pixels)


class Swing:
    """Shifts the inputs of strided convolutions by up to a pixel while numbers are drawn from a generator."""

    def __init__(self) -> None:
        self.rng: np.random.Generator | None = None

    @contextmanager
    def drawn_from(self, rng: np.random.Generator) -> Iterator[None]:
        self.rng = rng
        try:
            yield
        finally:
            self.rng = None

    def shift(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = inputs[0]
        if self.rng is None or min(x.shape[-2:]) < 2:
            return None
        top, left = (int(v) for v in self.rng.integers(0, 3, 2))
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return (padded[..., top : top + x.shape[-2], left : left + x.shape[-1]], *inputs[1:])


@contextmanager
def swinging(module: nn.Module, wanted: bool) -> Iterator[Swing]:
    """Swing convolution (GENIE, Jeon et al. 2023, section 3.2): strided convolutions of an image that is optimised
    through them see only every second pixel and leave a checkerboard; moved at random they see all."""
    swing = Swing()
    strided = [m for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1] if wanted else []
    hooks = [conv.register_forward_pre_hook(swing.shift) for conv in strided]
    try:
        yield swing
    finally:
        for hook in hooks:
            hook.remove()


# Optimisers: Adam and RAdam with a learning rate for each image ----------------------------------------------


@dataclass
class Batch:
    """The state of the images that are optimised together.

    images               [K, C, H + extra, W + extra]
    first, second        moments of the gradient
    rate                 [K], or [1] where the batch has one loss
    best, stale          loss to beat and steps since it was beaten, shaped like rate
    """

    indices: list[int]
    images: Tensor
    first: Tensor
    second: Tensor
    rate: Tensor
    best: Tensor
    stale: Tensor
    step: int = 0

    @staticmethod
    def tensor_names() -> tuple[str, ...]:
        return "images", "first", "second", "rate", "best", "stale"

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.tensor_names()}


def new_batch(images: Tensor, indices: list[int], rate: float, per_image: bool) -> Batch:
    values = torch.full((len(indices) if per_image else 1,), rate)
    return Batch(
        indices, images, torch.zeros_like(images), torch.zeros_like(images),
        values, torch.full_like(values, torch.inf), torch.zeros_like(values),
    )  # fmt: skip


BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_direction(first: Tensor, second: Tensor, step: int, betas: tuple[float, float] = (BETA1, BETA2)) -> Tensor:
    """Adam's step before the learning rate (Kingma & Ba 2015, algorithm 1); step counts from 1."""
    return (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + EPSILON)


def radam_direction(first: Tensor, second: Tensor, step: int, betas: tuple[float, float] = (BETA1, BETA2)) -> Tensor:
    """Rectified Adam's step before the learning rate (Liu et al. 2020, algorithm 2); step counts from 1."""
    beta1, beta2 = betas
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    corrected = first / (1 - beta1**step)
    if length <= 5:  # the variance of the adaptive rate is not tractable yet: plain momentum
        return corrected
    rectification = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    return corrected * (math.sqrt(1 - beta2**step) * rectification) / (second.sqrt() + EPSILON)


def descend(
    batch: Batch, gradient: Tensor, optimizer: str, scale: float, betas: tuple[float, float] = (BETA1, BETA2)
) -> None:
    """One step of the optimiser, in place; `scale` multiplies the learning rate."""
    batch.step += 1
    batch.first.lerp_(gradient, 1 - betas[0])
    batch.second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    towards = {"adam": adam_direction, "radam": radam_direction}[optimizer]
    direction = towards(batch.first, batch.second, batch.step, betas)
    batch.images -= direction * (scale * batch.rate.to(direction)).view(-1, 1, 1, 1)


def cut_on_plateau(batch: Batch, loss: Tensor, patience: int, factor: float, smallest: float, reset: bool) -> None:
    """Multiply the rate by `factor` after more than `patience` steps without an improvement of 1e-4, relatively.

    loss   shaped like batch.rate
    """
    better = loss < batch.best * (1 - 1e-4)
    batch.best = torch.where(better, loss, batch.best)
    batch.stale = torch.where(better, torch.zeros_like(batch.stale), batch.stale + 1)
    cut = batch.stale > patience
    batch.rate = torch.where(cut, (batch.rate * factor).clamp_min(smallest), batch.rate)
    batch.stale = torch.where(cut, torch.zeros_like(batch.stale), batch.stale)
    if reset:
        batch.best = torch.where(cut, torch.full_like(batch.best, torch.inf), batch.best)


# Statistics of the whole set ---------------------------------------------------------------------------------


class SetStatistics:
    """Moments of all batches, so that one batch can be optimised for the statistics of the whole set.

    The aggregate is exact whatever the sizes of the batches: moments are weighted with their share of the images.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.sums: list[list[Tensor]] = []

    def put(self, number: int, moments: Sequence[Moments]) -> None:
        """Store the moments of a batch, in place of its earlier ones."""
        share = len(moments[0].mean) / self.total
        new = [(m.mean.detach().double().mean(0) * share, m.square.detach().double().mean(0) * share) for m in moments]
        if not self.sums:
            self.sums = [[torch.zeros_like(mean), torch.zeros_like(square)] for mean, square in new]
        old = self.parts.get(number)
        for layer, (mean, square) in enumerate(new):
            self.sums[layer][0] += mean - (old[layer][0] if old else 0)
            self.sums[layer][1] += square - (old[layer][1] if old else 0)
        self.parts[number] = new

    def with_live(self, number: int, layer: int, moments: Moments) -> tuple[Tensor, Tensor]:
        """Mean and mean square of the whole set at one layer, each [1, C], in which the batch's own part carries the
        gradient."""
        share = len(moments.mean) / self.total
        mean, square = (
            (total - part).to(live) + live.mean(0) * share
            for total, part, live in zip(
                self.sums[layer], self.parts[number][layer], (moments.mean, moments.square), strict=True
            )
        )
        return mean[None], square[None]


# The loop ----------------------------------------------------------------------------------------------------


class Loop:
    """Optimises images batch by batch, within a budget, and goes on after an interruption.

    A method says what one step of a batch is (`improve`), and what is kept of its images (`final`).

    labels     int64 [N], or None
    batches    the state of the batches that are being optimised, by number
    finished   the images of the others, on the CPU
    """

    def __init__(self, request: Request, options: LoopOptions, labels: Tensor | None, device: torch.device) -> None:
        assert options.batch is not None
        self.request, self.options, self.labels, self.device = request, options, labels, device
        self.batches: dict[int, Batch] = {}
        self.finished: dict[int, Tensor] = {}
        _, self.height, self.width = request.spec.input_shape
        indices = list(range(request.count))
        self.groups = [indices[i : i + options.batch] for i in range(0, len(indices), options.batch)]
        low, high = request.spec.preprocessing.input_range()
        self.low, self.high = (torch.from_numpy(bound).float().to(device)[None, :, None, None] for bound in (low, high))
        self.save_at = time.monotonic() + SAVE_EVERY_S
        self.made, self.ended_early = 0, False

    def improve(self, number: int, batch: Batch) -> Tensor:
        """One step of a batch, in place; the loss of each image or of the batch, [K] or [1]."""
        raise NotImplementedError

    def final(self, images: Tensor) -> Tensor:
        """What is kept of the images."""
        return images

    def all_steps(self) -> Tensor:
        """Optimise every image; returns them as float32 [N, C, H, W] on the CPU."""
        steps = self.options.steps
        assert steps is not None
        self.load_state()
        self.made = steps * len(self.finished) + sum(batch.step for batch in self.batches.values())
        if self.made:
            self.request.tick(self.request.count * self.made / (len(self.groups) * steps), "taken up again")
        try:
            self.every_batch(steps)
        except KeyboardInterrupt:
            self.save_state()
            raise
        return torch.cat([self.finished[number] for number in sorted(self.finished)])

    def every_batch(self, steps: int) -> None:
        for number in range(len(self.groups)):
            if number not in self.finished and not (number and self.out_of_time()):
                self.steps_alone(number, steps)

    def out_of_time(self) -> bool:
        self.ended_early = self.ended_early or self.request.out_of_time()
        return self.ended_early

    def warnings(self, images: int) -> tuple[str, ...]:
        """What a user should know of the run, which made so many images."""
        if not self.ended_early:
            return ()
        assert self.options.steps is not None
        return (
            f"out of time: {images} of {self.request.count} images were made, with {self.made} of "
            f"{self.options.steps * len(self.groups)} steps. Allow more time, or ask for fewer images or steps",
        )

    def steps_alone(self, number: int, steps: int) -> None:
        """All steps of one batch, which knows nothing of the others."""
        self.open(number)
        while self.batches[number].step < steps and not self.out_of_time():
            self.advance(number)
        self.close(number)

    def open(self, number: int) -> None:
        if number in self.batches:  # from the resume folder
            return
        images = start(self.options, self.request, self.groups[number]).to(self.device)
        if self.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        self.batches[number] = self.batch_of(self.groups[number], images)

    def batch_of(self, indices: list[int], images: Tensor) -> Batch:
        assert self.options.rate is not None
        return new_batch(images, indices, self.options.rate, per_image=True)

    def close(self, number: int) -> None:
        """Keep what the network will see of a batch, and drop the rest."""
        with torch.no_grad():
            self.finished[number] = self.final(self.batches.pop(number).images).cpu().contiguous()

    def advance(self, number: int) -> None:
        """One step of one batch."""
        batch = self.batches[number]
        value = self.improve(number, batch)
        self.check(value, batch.step)
        self.report(float(value.detach().mean()))
        if time.monotonic() > self.save_at:
            self.save_state()

    def check(self, loss: Tensor, step: int) -> None:
        if not torch.isfinite(loss).all():
            raise ModelError(
                f"The loss of {self.request.spec.name} became {loss.sum().item()} at step {step}. "
                "Lower the rate with -O rate=..."
            )

    def report(self, loss: float) -> None:
        """Report one more step as progress, in images."""
        assert self.options.steps is not None
        self.made += 1
        total = len(self.groups) * self.options.steps
        self.request.tick(self.request.count * self.made / total, f"loss {loss:.4g}")

    # Interruptions

    def key(self) -> str:
        """What a state must agree on to be continued."""
        spec = self.request.spec
        parts = {
            "options": dataclasses.asdict(self.options),
            "seed": self.request.seed,
            "count": self.request.count,
            "spec": spec.model_dump(mode="json"),
            "network": self.network_key(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def network_key(self) -> list[float]:
        """Numbers that differ for other weights."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What is kept of the run beside its batches."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; raises KeyError, and changes nothing, if something is missing."""

    def file(self) -> Path | None:
        return None if self.request.resume is None else self.request.resume / "inversion.pt"

    def save_state(self) -> None:
        file = self.file()
        if file is None:
            return
        began = time.monotonic()
        state = {
            "key": self.key(),
            "finished": self.finished,
            "batches": {n: {**b.tensors(), "step": b.step} for n, b in self.batches.items()},
            **self.state(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda partial: torch.save(state, partial))
        now = time.monotonic()
        # Large sets take long to write: at most a twentieth of the time goes into it.
        self.save_at = now + max(SAVE_EVERY_S, 20 * (now - began))

    def load_state(self) -> None:
        file = self.file()
        if file is None or not file.is_file():
            return
        try:
            state = read_torch(file, self.device)
            if state["key"] != self.key():
                return
            finished = {number: images.cpu() for number, images in state["finished"].items()}
            batches = {
                number: Batch(self.groups[number], **{n: values[n] for n in Batch.tensor_names()}, step=values["step"])
                for number, values in state["batches"].items()
            }
            self.restore(state)
        except (ModelError, KeyError, IndexError, TypeError, AttributeError):
            return  # damaged: begin again
        self.finished = finished
        self.batches.update(batches)


class Run(Loop):
    """One run of the engine: images for the statistics of BatchNorm layers."""

    options: InversionOptions

    def __init__(
        self,
        request: Request,
        options: InversionOptions,
        network: Network,
        swing: Swing,
        labels: Tensor | None,
        device: torch.device,
    ) -> None:
        super().__init__(request, options, labels, device)
        self.network, self.swing = network, swing
        self.moments: list[Moments] = []
        self.features: list[Tensor] = []
        self.statistics = SetStatistics(request.count)
        self.margins = self.noise_margins() if options.slack > 0 else None
        self.centres: dict[int, tuple[Tensor, int]] = {}

    def every_batch(self, steps: int) -> None:
        if self.options.scope == "set":
            self.joint_steps(steps)
        else:
            super().every_batch(steps)

    def warnings(self, images: int) -> tuple[str, ...]:
        o, found = self.options, list(super().warnings(images))
        if self.labels is not None and o.keeps_distance:
            wanted, seen, apart = 2 * (self.request.spec.num_classes or 0), set[int](), 0
            for group in self.groups:
                labels = self.labels[group].tolist()
                apart += sum(label in seen for label in labels)
                seen.update(labels)
            if not apart or self.request.count < wanted:
                found.append(
                    f"the distance within a class counts for {apart} of {self.request.count} images: others have no "
                    f"image of their class in an earlier batch. Ask for two images a class or more ({wanted}), in "
                    f"smaller batches than all at once (now {o.batch})"
                )
        return tuple(found)

    def joint_steps(self, steps: int) -> None:
        """Every batch once an iteration, in a new random order; statistics are those of all of them."""
        count = len(self.groups)
        for number in range(count):
            if number not in self.finished:
                self.open(number)
            if number not in self.statistics.parts:
                self.put_statistics(number)
        first = min((batch.step for batch in self.batches.values()), default=steps)
        for iteration in range(first, steps):
            order = np.random.default_rng((self.request.seed, 1, iteration)).permutation(count)
            for number in order.tolist():
                if self.batches[number].step == iteration and not self.out_of_time():
                    self.advance(number)
        for number in sorted(self.batches):
            self.close(number)

    def put_statistics(self, number: int) -> None:
        """Measure a batch as it would be kept now."""
        with torch.no_grad():
            self.measure(self.final(self.batches[number].images))
            self.statistics.put(number, self.moments)

    def batch_of(self, indices: list[int], images: Tensor) -> Batch:
        o = self.options
        assert o.rate is not None
        return new_batch(images, indices, o.rate, o.scope == "sample")

    def close(self, number: int) -> None:
        batch = self.batches[number]
        super().close(number)
        if self.options.keeps_distance:
            with torch.no_grad():
                self.update_centres(batch)

    # One step

    def improve(self, number: int, batch: Batch) -> Tensor:
        o = self.options
        assert o.steps is not None
        rng = np.random.default_rng((self.request.seed, 2, batch.step, number))
        images = batch.images.detach().requires_grad_()
        with self.swing.drawn_from(rng):
            outputs = self.measure(self.view(images, rng))
        value = self.loss(number, batch, outputs)
        (gradient,) = torch.autograd.grad(value.sum(), images)
        scale = 0.5 * (1 + np.cos(np.pi * batch.step / o.steps)) if o.schedule == "cosine" else 1.0
        if o.scope == "set" and not o.refresh:
            self.statistics.put(number, self.moments)
        with torch.no_grad():
            descend(batch, gradient, o.optimizer, scale)
            if o.schedule != "cosine":
                loss = value.detach() if o.scope == "sample" else value.detach().sum()[None]
                assert o.patience is not None
                cut_on_plateau(batch, loss.cpu(), o.patience, o.factor, 1e-4, o.schedule == "plateau-reset")
            if o.scope == "set" and o.refresh:
                self.measure(self.view(batch.images, rng))
                self.statistics.put(number, self.moments)
        return value

    def view(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """What the network sees of the images at a step."""
        o = self.options
        if o.pipeline == "smooth-augment":
            images = smooth_augment(images, rng, self.height, self.width)
        elif o.pipeline == "local-object":
            images = local_object(images, rng, o.enlarge)
        return clip_straight_through(images, self.low, self.high) if o.clip else images

    def final(self, images: Tensor) -> Tensor:
        """The pipeline without its randomness."""
        if self.options.pipeline == "smooth-augment":
            images = centre_crop(smooth(images), self.height, self.width)
        return images.clamp(self.low, self.high) if self.options.clip else images

    def measure(self, images: Tensor) -> list[Tensor]:
        """Run the network; `moments` are then those of its layers, and of the images as one more at the end."""
        done = self.network(images)
        self.moments, self.features = done.moments, done.features
        if self.options.input_weight:
            self.moments = [*self.moments, image_moments(images)]
        return done.outputs

    def loss(self, number: int, batch: Batch, outputs: list[Tensor]) -> Tensor:
        """[K] with per-sample statistics, else [1]."""
        o, moments = self.options, self.moments
        assert o.input_weight is not None
        terms = []
        for i, m in enumerate(moments):
            if o.scope == "sample" and m.positions < 2:
                continue  # one value has no spread
            if o.scope == "set":
                mean, square, images = *self.statistics.with_live(number, i, m), self.request.count
            elif o.scope == "batch" and m.layer.name != INPUT:
                mean, square, images = m.mean.mean(0, keepdim=True), m.square.mean(0, keepdim=True), len(m.mean)
            else:
                # Pooled over a batch, the images of a generator that ends in BatchNorm have mean 0 and std 1 anyway.
                mean, square, images = m.mean, m.square, 1
            slack = (0.0, 0.0) if self.margins is None or m.layer.name == INPUT else self.margins[i]
            term = alignment(o, mean, square, m.layer, images * m.positions, slack)
            terms.append(term.mean(0, keepdim=True) if o.scope == "batch" else term)
        layers = len(terms) - bool(o.input_weight)
        if not layers:
            raise ModelError(
                f"Every BatchNorm layer of {self.request.spec.name!r} sees maps of 1x1, and one value has no spread to "
                "compare. Use `-O scope=set`, or calibrate with fractal."
            )
        stacked = torch.stack(terms, 1)  # [S, L], and one more for the images
        if o.enhance:
            weights = torch.full_like(stacked, 1 / layers)
            weights[:, :layers] = losses.enhancement(layers, torch.tensor(batch.indices))
        else:
            weights = torch.full_like(stacked, 1 / stacked.shape[1] if o.reduction == "mean" else 1.0)
        weights[:, layers:] *= o.input_weight
        return (stacked * weights).sum(1) + self.output_loss(number, batch, outputs)

    def output_loss(self, number: int, batch: Batch, outputs: list[Tensor]) -> Tensor:
        """Shaped as the loss."""
        o = self.options
        if o.output == "none":
            return torch.zeros(1, device=self.device)
        assert o.output_weight is not None
        value = self.stretching(outputs) if o.output == "stretch" else self.labelling(number, batch, outputs[0])
        value = o.output_weight * value
        return value if o.scope == "sample" else value.mean()[None]

    def stretching(self, outputs: list[Tensor]) -> Tensor:
        """[K]: output distribution stretching."""
        o = self.options
        assert o.squared_range is not None
        total = torch.zeros(1, device=self.device)
        maps = [m for m in self.moments if m.positions > 1 and m.layer.name != INPUT]
        if o.leash and not maps:
            return total  # without a limit the range would grow for ever
        for out in flat_outputs(outputs):
            total = total + losses.stretch(out, o.squared_range)
            if o.leash:
                last = maps[-1]
                std = losses.standard_deviation(losses.variance(last.mean, last.square, last.positions, True))
                std0 = losses.standard_deviation(last.layer.var0)
                total = total + losses.leash(last.mean, std, last.layer.mean0, std0, o.delta)
        return total

    def labelling(self, number: int, batch: Batch, logits: Tensor) -> Tensor:
        """[K]: soft inception and marginal distance."""
        o = self.options
        assert self.labels is not None
        labels = self.labels[batch.indices].to(self.device)
        value = losses.soft_inception(logits, labels, self.soft_targets(number).to(logits))
        if self.centres and o.keeps_distance:
            assert o.lower is not None
            assert o.upper is not None
            known, centres = self.centres_of(labels)
            hinge = losses.marginal_distance(self.features[0], centres, known, o.lower, o.upper)
            # The mean is over the images that have a predecessor.
            share = 1.0 if o.scope == "sample" else known.float().mean().clamp_min(1 / len(known))
            value = value + o.distance_weight * hinge / share
        return value

    def soft_targets(self, number: int) -> Tensor:
        """The probability that each label of a batch is to have, [K]: 1, or between `confidence` and 1."""
        smallest, count = self.options.confidence, len(self.groups[number])
        assert smallest is not None
        rng = np.random.default_rng((self.request.seed, 4, number))
        return torch.from_numpy(np.where(rng.random(count) < 0.5, 1.0, rng.uniform(smallest, 1, count)))

    # Class centres of earlier batches, in the space that the classifier reads

    def update_centres(self, batch: Batch) -> None:
        assert self.labels is not None
        self.measure(self.final(batch.images))
        if not self.features:
            raise ModelError(
                f"{self.request.spec.name!r} has no linear layer or convolution whose input could be compared within a "
                "class. Use -O distance_weight=0."
            )
        for label, value in zip(self.labels[batch.indices].tolist(), self.features[0], strict=True):
            mean, count = self.centres.get(label, (torch.zeros_like(value), 0))
            self.centres[label] = (mean + (value - mean) / (count + 1), count + 1)

    def centres_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        blank = torch.ones_like(self.features[0][0])
        known = torch.tensor([int(label) in self.centres for label in labels], device=blank.device)
        return known, torch.stack([self.centres.get(int(label), (blank, 0))[0] for label in labels])

    # Margins of slack distribution alignment

    def noise_margins(self, count: int = 256) -> list[tuple[Tensor, Tensor]]:
        """For each BatchNorm layer, the quantile over its channels of how far noise is from the stored mean and spread.

        Noise is pooled over `count` images; DSG does not say whether it pools (section 3.2 of the paper has 1,024).
        """
        o = self.options
        assert o.batch is not None
        gaussian = dataclasses.replace(o, init="gaussian", extra_pixels=0)
        pooled = SetStatistics(count)
        indices = list(range(10**6, 10**6 + count))  # no image's own seed
        with torch.no_grad():
            for number, first in enumerate(range(0, count, o.batch)):
                group = indices[first : first + o.batch]
                self.measure(start(gaussian, self.request, group).to(self.device))
                pooled.put(number, self.moments)
            margins = []
            for (mean, square), m in zip(pooled.sums, self.moments, strict=True):
                if m.layer.name == INPUT:
                    continue
                spread, spread0 = spreads(o, mean, square, m.layer, count * m.positions)
                margins.append(
                    (
                        torch.quantile((mean - m.layer.mean0).abs().float(), o.slack),
                        torch.quantile((spread - spread0).abs().float(), o.slack),
                    )
                )
        return margins

    # Interruptions

    def network_key(self) -> list[float]:
        module, *_ = self.network.copies[0]
        weights = [float(parameter.double().sum()) for parameter in module.parameters()]
        return [*(float(layer.mean0.double().sum()) for layer in self.network.layers), *weights]

    def state(self) -> dict[str, Any]:
        return {"centres": dict(self.centres), "parts": self.statistics.parts, "sums": self.statistics.sums}

    def restore(self, state: dict[str, Any]) -> None:
        centres, parts, sums = state["centres"], state["parts"], state["sums"]
        self.centres, self.statistics.parts, self.statistics.sums = centres, parts, sums


def image_moments(images: Tensor) -> Moments:
    """Moments of the images themselves, as of one more layer with stored mean 0 and variance 1."""
    one, zero = images.new_ones(images.shape[1]), images.new_zeros(images.shape[1])
    layer = Layer(INPUT, nn.Identity(), zero, one, one, zero)
    return Moments(layer, images.mean((2, 3)), images.square().mean((2, 3)), images.shape[2] * images.shape[3])


def spreads(
    options: InversionOptions, mean: Tensor, square: Tensor, layer: Layer, count: float
) -> tuple[Tensor, Tensor]:
    """The spread of the images and the stored one, as the options measure it."""
    var = losses.variance(mean, square, count, options.unbiased)
    if options.spread == "var":
        return var, layer.var0
    return losses.standard_deviation(var), losses.standard_deviation(layer.var0)


def alignment(
    options: InversionOptions, mean: Tensor, square: Tensor, layer: Layer, count: float, slack: tuple[Any, Any]
) -> Tensor:
    """[S]: how far the statistics at one layer are from the stored ones."""
    spread, spread0 = spreads(options, mean, square, layer, count)
    reduce = losses.sum_over_channels if options.reduction == "sum" else losses.mean_over_channels
    gaps = [reduce(losses.slack_gap(mean, layer.mean0, slack[0])), reduce(losses.slack_gap(spread, spread0, slack[1]))]
    if options.relative:
        units = layer.var0, spread0.square()
        gaps = [gap / unit.mean().clamp_min(losses.EPS) for gap, unit in zip(gaps, units, strict=True)]
    assert options.spread_weight is not None
    return gaps[0] + options.spread_weight * gaps[1]
