"""Train a built-in CIFAR-10 network from scratch; the recipe behind the weights that ovcalib ships.

    python benchmarks/train_cifar10.py resnet20-cifar10 --train imagefolder:cifar10-jpeg/train \
        --test imagefolder:cifar10-jpeg/test -o runs/resnet20

SGD with Nesterov momentum, one-epoch warm-up and a cosine to zero, random crop and flip; channels-last and, where
that is faster, bfloat16 autocast: half the time of float32 on an AMD EPYC with AVX512-BF16. `--sizes` shows the first
epochs smaller images (progressive resizing), which cost a quarter at half the side. Transformers take AdamW:
`--optimizer adamw --lr 0.001 --weight-decay 0.05`. Every epoch draws its order and augmentation from (seed, epoch),
so a run that is stopped and started again continues exactly where it would have been. The last epoch is the result:
nothing is chosen on the test set, which is read once, at the end. To choose an option, compare runs with `--holdout`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

import command
import numpy as np
import torch
from checkpoints import stored, takes_bfloat16
from torch import Tensor, nn
from torch.nn import functional as F

from ovcalib.data.sets import ImageData, load_images, open_data
from ovcalib.models import builtin
from ovcalib.models.weights import load_state_dict, save_state_dict
from ovcalib.rundir import file_sha256

PAD = 4  # pixels of reflection around the image, from which a crop of the original size is taken


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random crop after reflection padding, and horizontal flip.

    images    float32 [N, 3, H, W]
    """
    n, _, h, w = images.shape
    padded = F.pad(images, (PAD,) * 4, mode="reflect")
    dy, dx = torch.randint(0, 2 * PAD + 1, (2, n), generator=rng).to(images.device)
    flip = (torch.rand(n, generator=rng) < 0.5).to(images.device)
    rows = dy[:, None] + torch.arange(h, device=images.device)
    cols = torch.arange(w, device=images.device).expand(n, w)
    cols = dx[:, None] + torch.where(flip[:, None], w - 1 - cols, cols)
    index = torch.arange(n, device=images.device)[:, None, None]
    # Indexing the channels-last view keeps one gather a batch: [N, H, W, 3].
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """One square of `size` pixels an image set to zero, the mean colour; its centre is anywhere.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    images    float32 [N, 3, H, W], normalised
    """
    n, _, h, w = images.shape
    top = torch.randint(0, h, (n, 1), generator=rng) - size // 2
    left = torch.randint(0, w, (n, 1), generator=rng) - size // 2
    y, x = torch.arange(h), torch.arange(w)
    rows = (y >= top) & (y < top + size)
    cols = (x >= left) & (x < left + size)
    hidden = rows[:, :, None] & cols[:, None, :]
    return images.masked_fill(hidden[:, None].to(images.device), 0.0)


def image_sizes(text: str, epochs: int, full: int) -> list[int]:
    """The image side of each epoch: "16:4,24:3" is 16 pixels for 4 epochs, 24 for 3, and `full` for the rest.

    Howard, "Progressive resizing", fast.ai at DAWNBench, 2018.
    """
    sizes = [int(side) for part in text.split(",") if part for side, n in [part.split(":")] for _ in range(int(n))]
    if len(sizes) >= epochs:
        raise SystemExit(f"--sizes {text} covers {len(sizes)} of {epochs} epochs; leave the last to the full size.")
    return sizes + [full] * (epochs - len(sizes))


def learning_rate(step: int, steps_per_epoch: int, epochs: int, peak: float) -> float:
    """Linear warm-up over the first epoch, then half a cosine down to zero at the last step."""
    total = steps_per_epoch * epochs
    if step < steps_per_epoch:
        return peak * (step + 1) / steps_per_epoch
    return peak * 0.5 * (1 + math.cos(math.pi * (step - steps_per_epoch) / max(1, total - steps_per_epoch)))


def to_tensors(data: ImageData, spec: builtin.ModelSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images as network inputs and their labels, on the device."""
    images, labels = load_images(data, spec)
    inputs = spec.preprocessing.normalise(images)
    return torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
        for x, y in zip(torch.split(inputs, 500), torch.split(labels, 500), strict=True)
    )
    return hits / len(labels)


def train(args: argparse.Namespace) -> None:
    spec = builtin.spec(args.model)
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    args.bf16 = takes_bfloat16(args.bf16, device)
    inputs, labels = to_tensors(open_data(args.train), spec, device)
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(labels)))
    keep, held = order[args.holdout :], order[: args.holdout]

    torch.manual_seed(args.seed)
    model = builtin.build(args.model).to(device).to(memory_format=torch.channels_last)
    if args.init:
        model.load_state_dict(load_state_dict(Path(args.init)))
    # Weight decay on convolution and linear weights alone: BatchNorm's scale and all biases are left free.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=args.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    start, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["epoch"], state["seconds"]
        print(f"resumed after epoch {start}", flush=True)

    steps = len(keep) // args.batch
    sizes = image_sizes(args.sizes, args.epochs, inputs.shape[-1])
    for epoch in range(start, args.stop_after or args.epochs):
        began = time.perf_counter()
        rng = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
        shuffled = keep[torch.randperm(len(keep), generator=rng)]
        model.train()
        total = hits = 0.0
        for i in range(steps):
            index = shuffled[i * args.batch : (i + 1) * args.batch].to(device)
            x = augment(inputs[index], rng)
            if args.cutout:
                x = cutout(x, args.cutout, rng)
            if sizes[epoch] != x.shape[-1]:
                x = F.interpolate(x, size=sizes[epoch], mode="bilinear", antialias=True)
            x = x.contiguous(memory_format=torch.channels_last)
            y = labels[index]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps + i, steps, args.epochs, args.lr)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            hits += (logits.argmax(1) == y).float().mean().item()
        seconds += time.perf_counter() - began
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1, "seconds": seconds,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        print(
            f"epoch {epoch + 1}/{args.epochs} loss {total / steps:.4f} train {hits / steps:.4f} "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )

    if args.stop_after and args.stop_after < args.epochs:
        print(f"stopped after epoch {args.stop_after}; run again without --stop-after to go on")
        return
    if args.holdout:
        print(f"held-out top-1 {accuracy(model, inputs[held], labels[held]):.4f}")
        return
    weights = out / f"{args.model}.safetensors"
    save_state_dict(stored(model, args.half), weights)
    result = {
        "model": args.model,
        "top1": accuracy(model, *to_tensors(open_data(args.test), spec, device)),
        "test_data": args.test,
        "data": args.train,
        "seed": args.seed,
        "command": shlex.join(["python", "benchmarks/train_cifar10.py", *sys.argv[1:]]),
        "sha256": file_sha256(weights),
        "recipe": {k: v for k, v in vars(args).items() if k != "output"},
        "train_seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    (out / f"{args.model}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a built-in network, for example resnet20-cifar10")
    parser.add_argument("--train", required=True, help="data reference of the training split")
    parser.add_argument("--test", required=True, help="data reference of the test split, read once at the end")
    parser.add_argument("-o", "--output", required=True, help="folder of the checkpoint and the result")
    parser.add_argument("--epochs", type=command.positive, default=200)
    parser.add_argument("--batch", type=command.positive, default=128)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="adamw for transformers")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--cutout", type=int, default=0, help="side in pixels of the square hidden in each image")
    parser.add_argument(
        "--sizes", default="", help="SIDE:EPOCHS,...: image side of the first epochs, then the full one"
    )
    parser.add_argument("--init", help="weights to start from: a warm restart of the schedule")
    parser.add_argument("--holdout", type=int, default=0, help="train without N images and score on them")
    parser.add_argument("--stop-after", type=command.positive, help="stop after this epoch, as if interrupted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--half", action="store_true", help="store the weights in float16: half the file")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: where it is faster")
    train(parser.parse_args())


if __name__ == "__main__":
    command.run(main)
