"""Train `networks.ssdlite160` on the images of `pasted_objects.py`, from scratch.

    python benchmarks/train_detector.py --train imagefolder:cifar10-jpeg/train --test imagefolder:cifar10-jpeg/test \
        -o runs/ssdlite160

AdamW with a linear warm-up and a cosine to zero; bfloat16 autocast and channels-last. Every step draws its scenes from
(seed, step), so a run that is stopped and started again continues exactly where it would have been. Tiles and fractals
are kept on the device and put together there. The last step is the result; mean average precision is that of the set
which `pasted_objects.py` writes from `--test` with `--test-count` and `--test-seed`. It needs OpenVINO and pycocotools:
where they are missing, train with `--no-evaluate`, and run the same command with `--evaluate-only` elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import command
import numpy as np
import pasted_objects
import torch
from checkpoints import stored, takes_bfloat16
from networks import ssdlite160
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from ovcalib.data.boxes import Boxes
from ovcalib.models.weights import load_state_dict, save_state_dict
from ovcalib.rundir import file_sha256, write_atomically

NAME = "ssdlite160"
MATCHED_IOU = 0.5
# Background boxes in the loss for each that has an object: those with the largest loss.
NEGATIVES = 3


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then half a cosine down to zero at the last step."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def matched(anchors: Tensor, corners: Tensor, there: Tensor) -> Tensor:
    """The object of each anchor, int64 [B, A]; -1 for the background.

    An anchor takes the object with the largest IoU from MATCHED_IOU on, and each object its best anchor in any case.
    anchors   float32 [A, 4]
    corners   float32 [B, K, 4]
    there     bool [B, K]
    """
    overlap = box_iou(corners.flatten(0, 1), anchors).unflatten(0, corners.shape[:2])
    overlap = torch.where(there[..., None], overlap, -1)
    best, chosen = overlap.max(1)
    chosen = torch.where(best < MATCHED_IOU, -1, chosen)
    index = torch.arange(len(anchors), device=anchors.device)
    for k, nearest in enumerate(overlap.argmax(2).unbind(1)):
        chosen = torch.where(there[:, k, None] & (index == nearest[:, None]), k, chosen)
    return chosen


def ssd_loss(
    detector: Any, heads: dict[str, Tensor], anchors: Tensor, corners: Tensor, labels: Tensor, there: Tensor
) -> Tensor:
    """Torchvision's loss of SSD for all images at once: Liu et al., "SSD: Single Shot MultiBox Detector", 2016.

    heads     cls_logits [B, A, classes], bbox_regression [B, A, 4]
    anchors   float32 [A, 4]
    corners   float32 [B, K, 4]
    labels    int64 [B, K]
    there     bool [B, K]
    """
    chosen = matched(anchors, corners, there)
    object_, foreground = chosen.clamp(min=0), chosen >= 0
    logits, offsets = heads["cls_logits"].float(), heads["bbox_regression"].float()
    boxes = corners.gather(1, object_[..., None].expand(-1, -1, 4))
    wanted = detector.box_coder.encode_single(boxes.flatten(0, 1), anchors.repeat(len(boxes), 1)).view_as(boxes)
    box_loss = F.smooth_l1_loss(offsets, wanted, reduction="none").sum(2)
    classes = torch.where(foreground, labels.gather(1, object_), 0)
    class_loss = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
    hardness = class_loss.detach().masked_fill(foreground, -math.inf)
    rank = hardness.argsort(1, descending=True).argsort(1)
    counted = foreground | (rank < NEGATIVES * foreground.sum(1, keepdim=True))
    return ((box_loss * foreground).sum() + (class_loss * counted).sum()) / foreground.sum().clamp(min=1)


def to_input(images: Tensor) -> Tensor:
    """Network inputs of uint8 images: as the detector's own transform normalises them, -1..1."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def anchors_of(detector: Any) -> Tensor:
    """The default boxes in pixels, float32 [A, 4]."""
    from torchvision.models.detection.image_list import ImageList

    side = pasted_objects.SIDE
    image = torch.zeros(1, 3, side, side, device=next(detector.parameters()).device)
    detector.eval()
    with torch.no_grad():
        features = list(detector.backbone(image).values())
        (anchors,) = detector.anchor_generator(ImageList(image, [(side, side)]), features)
    return anchors  # type: ignore[no-any-return]


def train(args: argparse.Namespace, weights: Path) -> dict[str, Any]:
    """Train to the last step, or to `--stop-after`; returns what the record says of it, or nothing."""
    out, device = Path(args.output), torch.device(args.device)
    args.bf16 = takes_bfloat16(args.bf16, device)
    tiles, tile_labels = pasted_objects.read_tiles(args.train)
    backgrounds = pasted_objects.backgrounds(args.seed, range(args.backgrounds)).to(device)
    tiles = tiles.to(device)
    print(f"{len(tiles)} tiles, {len(backgrounds)} backgrounds", flush=True)

    torch.backends.cudnn.benchmark = True  # all batches have one shape
    torch.manual_seed(args.seed)
    detector: Any = ssdlite160().to(device).to(memory_format=torch.channels_last)
    anchors = anchors_of(detector)
    # Weight decay on convolution weights alone: BatchNorm's scale and all biases are left free.
    decayed = [p for p in detector.parameters() if p.ndim > 1]
    free = [p for p in detector.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda")
    start, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        detector.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        print(f"resumed after step {start}", flush=True)

    last = min(args.stop_after or args.steps, args.steps)
    began = time.perf_counter() - seconds
    total, since = torch.zeros((), device=device), start
    detector.train()
    for step in range(start, last):
        rng = np.random.default_rng((args.seed, step))
        scenes = pasted_objects.draw(rng, args.batch, len(tiles))
        chosen = torch.from_numpy(rng.integers(0, len(backgrounds), args.batch))
        images = pasted_objects.paint(backgrounds[chosen.to(device, non_blocking=True)], tiles, scenes)
        corners, labels, there = (
            torch.from_numpy(values).to(device, non_blocking=True)
            for values in (scenes.corners.astype(np.float32), tile_labels[scenes.tile], scenes.there)
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            heads = detector.head(list(detector.backbone(to_input(images)).values()))
        loss = ssd_loss(detector, heads, anchors, corners, labels, there)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach()
        done = step + 1
        if done % args.log_every == 0 or done == last:
            mean = total.item() / (done - since)
            total.zero_()
            since = done
            print(f"step {done}/{args.steps} loss {mean:.4f} {time.perf_counter() - began:.1f} s", flush=True)
        if done % args.save_every == 0 or done == last:
            state = {"model": detector.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
                     "seconds": time.perf_counter() - began}  # fmt: skip
            write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))  # type: ignore[misc]

    if last < args.steps:
        print(f"stopped after step {last}; run again without --stop-after to go on")
        return {}
    save_state_dict(stored(detector, args.half), weights)
    return {
        "model": NAME,
        "data": args.train,
        "test_data": args.test,
        "seed": args.seed,
        "command": shlex.join(["python", "benchmarks/train_detector.py", *sys.argv[1:]]),
        "sha256": file_sha256(weights),
        "recipe": {k: v for k, v in vars(args).items() if k != "output"},
        "train_seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }


@torch.no_grad()
def detected(detector: nn.Module, images: Tensor) -> list[Boxes]:
    """What the detector finds in uint8 images [N, 3, SIDE, SIDE]."""
    device = next(detector.parameters()).device
    found = detector.eval()(list(images.to(device) / 255))
    return [Boxes(*(boxes[key].cpu().numpy() for key in ("boxes", "labels", "scores"))) for boxes in found]


def evaluate(args: argparse.Namespace, weights: Path) -> dict[str, Any]:
    """Mean average precision of the weights on images with tiles of the test split."""
    from ovcalib.evaluation.detection import mean_precision

    detector = ssdlite160().to(args.device)
    detector.load_state_dict(load_state_dict(weights))
    tiles = pasted_objects.read_tiles(args.test)
    images, truth = zip(*pasted_objects.images(*tiles, args.test_seed, args.test_count), strict=True)
    found = [boxes for part in torch.split(torch.stack(images), 50) for boxes in detected(detector, part)]
    precision = mean_precision(truth, found)
    return {"map": precision.map, "map50": precision.map50, "test_images": len(truth), "test_seed": args.test_seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="data reference of the tiles of the training split")
    parser.add_argument("--test", required=True, help="data reference of the tiles of the test split")
    parser.add_argument("-o", "--output", required=True, help="folder of the checkpoint and the result")
    parser.add_argument("--steps", type=command.positive, default=8000)
    parser.add_argument("--batch", type=command.positive, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--backgrounds", type=command.positive, default=2000, help="fractals to choose from")
    parser.add_argument("--stop-after", type=command.positive, help="stop after this step, as if interrupted")
    parser.add_argument("--log-every", type=command.positive, default=100, help="steps")
    parser.add_argument("--save-every", type=command.positive, default=1000, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-count", type=command.positive, default=1000, help="images of the test set")
    parser.add_argument("--test-seed", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: where it is faster")
    parser.add_argument("--half", action="store_true", help="store the weights in float16: half the file")
    parser.add_argument("--evaluate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--evaluate-only", action="store_true", help="of a training with --no-evaluate; --half applies")
    args = parser.parse_args()
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    weights, record = out / f"{NAME}.safetensors", out / f"{NAME}.json"
    if args.evaluate_only:
        result = json.loads(record.read_text())
        if args.half:
            detector = ssdlite160()
            detector.load_state_dict(load_state_dict(weights))
            save_state_dict(stored(detector, half=True), weights)
            result |= {"sha256": file_sha256(weights), "recipe": {**result["recipe"], "half": True}}
    else:
        result = train(args, weights)
        if not result:
            return
        record.write_text(json.dumps(result, indent=2) + "\n")
    if args.evaluate or args.evaluate_only:
        result |= evaluate(args, weights)
        record.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    command.run(main)
