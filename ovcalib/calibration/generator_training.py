"""Training a generator against a frozen classifier, and its images: gdfq, acq and fdda.

One generator is trained for the whole set, on the classes and the BatchNorm statistics that the classifier remembers.
The methods differ in their losses, which are in their own files.

- After the training the generator's own BatchNorm statistics are measured, and stay. An image then depends on its index
  alone, where a generator in training mode, as the authors have it, mixes the images of a batch.
- Everything random is drawn from (seed, step) or (seed, image), so an interrupted training continues to the same
  images.
- The published methods train the quantized network beside the generator, with the same images. In none of the three
  does the generator's loss read the quantized network, so there is none here; that is a matter of fine-tuning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ovcalib.calibration import bn_losses
from ovcalib.calibration.bn_taps import find_layers, large_blocks_kept, tapped
from ovcalib.calibration.generator_options import Options, resolve
from ovcalib.calibration.network_outputs import frozen, last_map_kept, network_outputs
from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import ModelError, UsageError
from ovcalib.gan.class_generator import ClassGenerator, Grid, class_generator
from ovcalib.gan.class_losses import Statistics
from ovcalib.gan.sampling import BATCH_PIXELS, balanced_labels, latents
from ovcalib.gan.training import load_checkpoint, save_checkpoint, step_seed

SAVE_EVERY_S = 20.0
# Batches over which the generator's own BatchNorm statistics are measured after the training.
MEASURED_BATCHES = 16
# Purposes of a seed beside the steps' own.
INITIAL, MEASURING = 1, 2


@dataclass(frozen=True)
class Seen:
    """What the frozen network makes of a batch.

    logits     [N, K]
    found      statistics of the batch at the input of every BatchNorm layer, in execution order
    stored     what training left there
    names      of the layers
    last_map   [N, C, h, w], what its last pooling reads; None where it has no map
    """

    logits: Tensor
    found: list[Statistics]
    stored: list[Statistics]
    names: list[str]
    last_map: Tensor | None


class FrozenNetwork:
    """The classifier that a generator is trained against; it stays as it is."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.layers = module, name, find_layers(module, name)

    def __call__(self, images: Tensor, training: bool = False) -> Seen:
        """What it makes of a batch.

        images     float32 [N, C, H, W]
        training   BatchNorm layers normalise by the batch, and their stored statistics stay as they are (F_train)
        """
        with tapped(self.layers, own_statistics=training) as taps, last_map_kept(self.module) as maps:
            (logits, *_) = network_outputs(self.module, images)
            found = []
            for m in taps.moments:
                mean, square = m.mean.mean(0), m.square.mean(0)
                found.append((mean, bn_losses.variance(mean, square, len(images) * m.positions, unbiased=False)))
            layers = [m.layer for m in taps.moments]
        return Seen(
            logits=logits.float(),
            found=found,
            stored=[(layer.mean0, layer.var0) for layer in layers],
            names=[layer.name for layer in layers],
            last_map=maps[0] if maps else None,
        )

    def grid(self, shape: tuple[int, int, int]) -> Grid:
        """Rows and columns of the last feature map. Raises ModelError where there is none."""
        with torch.no_grad():
            found = self(torch.zeros(1, *shape, device=self.layers[0].mean0.device)).last_map
        if found is None:
            raise ModelError(
                f"{self.name} has no feature map with more than one position, and acq directs the classifier's "
                "attention to one. Use gdfq."
            )
        return found.shape[2], found.shape[3]


class Training(Generic[Options]):
    """The training of a generator.

    positions   whether images are made for a position of the classifier's last feature map, too
    options     with what was None filled in
    raises      ModelError for a network without class logits or without usable BatchNorm layers
    """

    def __init__(self, request: Request, options: Options, positions: bool = False) -> None:
        spec, module = request.spec, request.module
        assert module is not None
        if spec.num_classes is None:
            raise ModelError(f"{spec.name} has no class logits, which this method needs. Use dgh or bn-inversion.")
        self.request, self.classes = request, spec.num_classes
        self.options: Options = resolve(options, min(spec.input_shape[1:]), spec.num_classes)
        module, self.device = frozen(module)
        if self.device.type == "cpu":
            module = module.to(memory_format=torch.channels_last)
        self.network = FrozenNetwork(module, spec.name)
        grid = self.network.grid(spec.input_shape) if positions else None
        o = self.options
        assert o.width is not None
        assert o.rate is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step_seed(request.seed, 0, INITIAL))
            generator = class_generator(spec.input_shape, self.classes, o.latent, o.width, grid)
        self.generator: ClassGenerator = generator.to(self.device).to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.Adam(self.generator.parameters(), o.rate, betas=(0.5, 0.999))
        self.step, self.between_steps, self.save_at = 0, True, time.monotonic() + SAVE_EVERY_S

    def run(self, loss: Callable[[torch.Generator], Tensor]) -> Generated:
        """Train, and draw as many images as are asked for, of all classes alike.

        loss   of one step; all that it draws comes from the generator of random numbers that it is given
        """
        o, request = self.options, self.request
        assert o.steps is not None
        self.load_state()
        if self.step:
            self.report("taken up again")
        try:
            with large_blocks_kept(request.spec.input_shape), torch.enable_grad():
                while self.step < o.steps and not request.out_of_time():
                    self.advance(loss)
            with torch.no_grad():
                self.keep_own_statistics()
                images, labels = self.drawn()
        except KeyboardInterrupt:
            self.save_state()
            raise
        self.network.module.cpu()
        warnings = [] if self.step == o.steps else [
            f"out of time: the generator was trained for {self.step} of {o.steps} steps. Allow more time, or ask for "
            "fewer steps"
        ]  # fmt: skip
        request.tick(request.count, "")
        return Generated(
            images=images.numpy(),
            domain="network",
            labels=labels,
            label_origin="method",
            options=dataclasses.asdict(o),
            warnings=tuple(warnings),
        )

    # One step

    def advance(self, loss: Callable[[torch.Generator], Tensor]) -> None:
        """One step of the optimiser."""
        draws = torch.Generator().manual_seed(step_seed(self.request.seed, self.step))
        value = loss(draws)
        if not torch.isfinite(value):
            raise ModelError(
                f"The loss of {self.request.spec.name} became {value.item()} at step {self.step}. Lower the rate with "
                "-O rate=..."
            )
        self.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        assert self.options.rate is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * self.rate_factor()
        self.between_steps = False
        self.optimizer.step()
        self.step += 1
        self.between_steps = True
        self.report(f"loss {value.item():.4g}")
        if time.monotonic() > self.save_at:
            self.save_state()

    def rate_factor(self) -> float:
        """What the learning rate of the next step is multiplied with."""
        o = self.options
        assert o.steps is not None
        if o.schedule == "tenths":
            return float(0.1 ** (4 * self.step // o.steps))
        return 0.5 * (1 + math.cos(math.pi * self.step / o.steps))

    def report(self, note: str) -> None:
        """Progress, in images; drawing them counts as one step."""
        assert self.options.steps is not None
        self.request.tick(self.request.count * self.step / (self.options.steps + 1), note)

    def look_at(self, image: NDArray[np.float32]) -> Seen:
        """What the network makes of a real image, float32 [1, C, H, W]."""
        with torch.no_grad():
            return self.network(torch.from_numpy(image).to(self.device))

    # What a step draws

    def labels(self, draws: torch.Generator, count: int | None = None) -> Tensor:
        """Classes for a batch, int64 [count or train_batch]."""
        return torch.randint(self.classes, (count or self.batch,), generator=draws).to(self.device)

    def latents(self, draws: torch.Generator) -> Tensor:
        """Latent vectors for a batch, [train_batch, latent]."""
        return torch.randn(self.batch, self.options.latent, generator=draws).to(self.device)

    def positions(self, draws: torch.Generator, count: int | None = None) -> Tensor:
        """Positions for a batch, int64 [count or train_batch]."""
        return torch.randint(self.generator.positions, (count or self.batch,), generator=draws).to(self.device)

    @property
    def batch(self) -> int:
        assert self.options.train_batch is not None
        return self.options.train_batch

    # The finished generator

    def keep_own_statistics(self) -> None:
        """Measure the generator's BatchNorm statistics with its final weights, and let it use them from now on."""
        draws = torch.Generator().manual_seed(step_seed(self.request.seed, 0, MEASURING))
        for layer in self.generator.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None  # the mean over all batches
        for _ in range(MEASURED_BATCHES):
            positions = self.positions(draws) if self.generator.grid else None
            self.generator(self.latents(draws), self.labels(draws), positions)
        self.generator.eval()

    def drawn(self) -> tuple[Tensor, NDArray[np.int64]]:
        """The images, float32 [N, C, H, W], and their classes, int64 [N].

        Batches have one size, the last one too: kernels may sum in another order for another.
        """
        count, seed = self.request.count, self.request.seed
        _, height, width = self.request.spec.input_shape
        size = max(1, BATCH_PIXELS // (height * width))
        labels = balanced_labels(-(-count // size) * size, self.classes)
        images = []
        for first in range(0, count, size):
            indices = range(first, first + size)
            positions = None
            if self.generator.grid:
                own = [int(np.random.default_rng((seed, i, 1)).integers(self.generator.positions)) for i in indices]
                positions = torch.tensor(own, device=self.device)
            z = latents(seed, indices, self.options.latent).to(self.device)
            given = torch.from_numpy(labels[first : first + size]).to(self.device)
            images.append(self.generator(z, given, positions).cpu().contiguous())
        return torch.cat(images)[:count], labels[:count]

    # Interruptions

    def key(self) -> str:
        """What a state must agree on to be continued."""
        parts = {
            "source": type(self.options).__module__,
            "argument": self.request.argument,
            "options": dataclasses.asdict(self.options),
            "seed": self.request.seed,
            "spec": self.request.spec.model_dump(mode="json"),
            "mean": [float(layer.mean0.double().sum()) for layer in self.network.layers],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def save_state(self) -> None:
        """Write what a later run continues from; in the middle of a step there is nothing that could be kept."""
        folder = self.request.resume
        if folder is None or not self.between_steps:
            return
        began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder, {
            "key": self.key(), "step": self.step,
            "generator": self.generator.state_dict(), "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip
        now = time.monotonic()
        # A large generator takes long to write: at most a twentieth of the time goes into it.
        self.save_at = now + max(SAVE_EVERY_S, 20 * (now - began))

    def load_state(self) -> None:
        """Continue where an earlier run of the same training ended; a damaged state is as good as none."""
        if self.request.resume is None:
            return
        with contextlib.suppress(UsageError, KeyError):
            state = load_checkpoint(self.request.resume, self.device)
            if state is not None and state["key"] == self.key():
                self.generator.load_state_dict(state["generator"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.step = state["step"]
