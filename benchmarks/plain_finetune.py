"""Full fine-tuning as a plain loop in bf16, with timm and torch alone.

python -m benchmarks.plain_finetune --data data

`--attention plain` turns off torch's fused attention, whose backward pass is slow at 16 tokens on a CPU; `timm` is what
timm does by itself. `--model` takes a timm model with random weights in place of the bundled one, its pictures enlarged
on the device. Prints one line of JSON: images per second of the last epoch.
"""

import argparse
import json
import math
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from benchmarks.extract_then_fit import digits_vit, read_idx

VALIDATION = 6000  # the first so many official training images


def build(args: argparse.Namespace) -> nn.Module:
    model = timm.create_model(args.model, num_classes=0) if args.model else digits_vit()
    for module in model.modules():
        if args.attention == "plain" and hasattr(module, "fused_attn"):
            module.fused_attn = False
    width = model.num_features
    model = nn.Sequential(model, nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 10)).to(args.device)
    if args.compile:
        model.compile()
    return model


def epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: Optimizer,
    schedule: LRScheduler,
    args: argparse.Namespace,
) -> float:
    """Seconds of one epoch over uint8 (N, 28, 28)."""
    patches = getattr(model[0], "patch_embed", None)
    side, channels = (patches.img_size[0], patches.proj.in_channels) if patches else (28, 1)
    began = time.perf_counter()
    for rows in torch.randperm(len(images), device=images.device).split(args.batch_size):
        pixels = ((images[rows].float() / 255 - 0.1307) / 0.3081)[:, None]  # (B, 1, 28, 28)
        if side != 28:
            pixels = F.interpolate(pixels, side, mode="bilinear")  # (B, 1, S, S)
        with torch.autocast(args.device, torch.bfloat16):
            loss = F.cross_entropy(model(pixels.expand(-1, channels, -1, -1)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    loss.item()  # waits for a GPU
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--model", help="a timm model of square images")
    parser.add_argument("--attention", choices=("plain", "timm"), default="plain")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--train-size", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    raw, part = Path(args.data) / "MNIST" / "raw", slice(VALIDATION, VALIDATION + args.train_size)
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    images, labels = (read_idx(raw / name)[part].to(args.device) for name in names)
    model, labels = build(args), labels.long()
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, weight_decay=0.05, fused=True)
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = CosineAnnealingLR(optimizer, steps)
    seconds = [epoch(model, images, labels, optimizer, schedule, args) for _ in range(args.epochs)]
    print(json.dumps({"images_per_second": round(len(images) / seconds[-1], 1), "first_epoch": round(seconds[0], 2)}))


if __name__ == "__main__":
    main()
