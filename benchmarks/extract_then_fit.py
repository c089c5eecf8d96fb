"""A linear probe as a careful researcher writes it, with timm and torch alone: features once, then a fit on them.

python benchmarks/extract_then_fit.py --data data      (the folder that holds MNIST/raw/*.gz)

Backbone, splits and recipe are those of experiment=vit_linear_probe. Prints one line of JSON.
"""

import time

STARTED = time.perf_counter()  # before all other imports, as these count

import argparse  # noqa: E402
import copy  # noqa: E402
import gzip  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

WEIGHTS = Path(__file__).parents[1] / "src" / "thaw" / "models" / "weights" / "digits_vit.safetensors"


def read_idx(path: Path) -> Tensor:
    """uint8 (N, 28, 28) or (N,): four bytes that say how many dimensions there are, four for each, then the content."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    sizes = [int.from_bytes(content[4 * axis + 4 : 4 * axis + 8], "big") for axis in range(content[3])]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * content[3]).reshape(sizes)


def digits_vit() -> nn.Module:
    """The settings of configs/backbone/digits_vit.yaml."""
    shape = {"img_size": 28, "patch_size": 7, "in_chans": 1, "depth": 6, "class_token": False, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
    model.load_state_dict(load_file(WEIGHTS))
    return model


@torch.inference_mode()
def extract(model: nn.Module, images: Tensor, device: str, batch_size: int) -> Tensor:
    """uint8 (N, 28, 28) -> normalised features (N, 192): the head's layer norm has no weights, so once is enough."""
    parts = []
    for batch in images.split(batch_size):
        pixels = ((batch.to(device).float() / 255 - 0.1307) / 0.3081)[:, None]  # (B, 1, 28, 28)
        with torch.autocast(device, torch.bfloat16):
            features = model(pixels)
        parts.append(F.layer_norm(features.float(), features.shape[1:]))
    return torch.cat(parts)


def fit(train: list[Tensor], val: list[Tensor], lrs: list[float], args: argparse.Namespace) -> tuple[list, list]:
    """A head for each learning rate, all in each step: the best validation accuracy of each, and its weights.

    As in DINOv2's linear evaluation the losses are added; no head's gradient depends on another. A single head stops
    after `args.patience` epochs without a gain.
    """
    torch.manual_seed(args.seed)
    heads = nn.ModuleList(nn.Linear(train[0].shape[1], 10) for _ in lrs).to(train[0].device)
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, lrs, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = args.epochs * math.ceil(len(train[0]) / args.batch_size)
    warmup = round(0.1 * steps)

    def fraction(step: int) -> float:
        rest = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / (warmup + 1) if step < warmup else (1 + math.cos(math.pi * rest)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, fraction)
    best, weights, waited = [-1.0] * len(lrs), [{}] * len(lrs), 0
    for _ in range(args.epochs):
        for rows in torch.randperm(len(train[0]), device=train[0].device).split(args.batch_size):
            features, labels = train[0][rows], train[1][rows]
            loss = sum(F.cross_entropy(head(features), labels) for head in heads)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        waited += 1
        for number, head in enumerate(heads):
            if (acc := accuracy(head, *val)) > best[number]:
                best[number], weights[number], waited = acc, copy.deepcopy(head.state_dict()), 0
        if len(lrs) == 1 and waited >= args.patience:
            break
    return best, weights


@torch.no_grad()
def accuracy(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    return (head(features).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--train-size", type=int, help="only the first so many training images")
    parser.add_argument("--val-size", type=int, default=6000, help="the first so many official training images")
    parser.add_argument("--cached", help="file of the features: read if it is there, else written")
    parser.add_argument("--lrs", default="3e-2", help="learning rates; validation chooses among them")
    parser.add_argument("--bank", action="store_true", help="train the heads of all learning rates together")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    imported = time.perf_counter()

    read = imported
    if args.cached and Path(args.cached).exists():
        splits = torch.load(args.cached, mmap=True)
    else:
        raw = Path(args.data) / "MNIST" / "raw"
        names = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        images, labels, test_images, test_labels = (read_idx(raw / name) for name in names)
        parts = slice(args.val_size, args.train_size and args.val_size + args.train_size), slice(args.val_size)
        pairs = [*((images[part], labels[part]) for part in parts), (test_images, test_labels)]
        model, read = digits_vit().eval().to(args.device), time.perf_counter()
        chunk = 128 if args.device == "cpu" else 8192
        splits = [[extract(model, pixels, args.device, chunk).cpu(), numbers.long()] for pixels, numbers in pairs]
        if args.cached:
            torch.save(splits, args.cached)
    train, val, test = ([part.to(args.device) for part in split] for split in splits)
    extracted = time.perf_counter()

    lrs = [float(lr) for lr in args.lrs.split(",")]
    fits = [fit(train, val, rates, args) for rates in ([lrs] if args.bank else [[lr] for lr in lrs])]
    accs, weights = ([value for each in fits for value in each[column]] for column in (0, 1))
    chosen = max(range(len(lrs)), key=accs.__getitem__)
    head = nn.Linear(train[0].shape[1], 10).to(args.device)
    head.load_state_dict(weights[chosen])
    test_acc, ended = accuracy(head, *test), time.perf_counter()
    result = {"lr": lrs[chosen], "val_acc": round(accs[chosen], 4), "test_acc": round(test_acc, 4)}
    moments = {"start": STARTED, "imports": imported, "read": read, "features": extracted, "fit": ended}
    seconds = {after: moments[after] - moments[before] for before, after in pairwise(moments)}
    print(json.dumps(result | {name: round(value, 2) for name, value in seconds.items()}))


if __name__ == "__main__":
    main()
