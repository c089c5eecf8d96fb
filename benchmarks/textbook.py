"""The textbook way that our speed table compares with, in one file.    python benchmarks/textbook.py --thaw head

A careful user of a popular Lightning template writes such code: torchvision transforms of one PIL image at a time,
worker processes, and the whole backbone in each step. Backbone, splits, head and schedule are ours. Where there is a
choice, the faster form is taken.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms  # v2 takes 1.3 to 1.9 times as long for each digit
from torchvision.transforms import v2

from thaw.data.images import Images, Source
from thaw.data.mnist import load_mnist
from thaw.models.backbone import Backbone
from thaw.run.console import lenient

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "backbone"


class TextbookDataset(Dataset[tuple[Tensor, int]]):
    """One transformed digit (C, S, S) and its label at a time, of (N, 1, 28, 28)."""

    def __init__(self, digits: Images, *steps: object) -> None:
        self.images, self.labels = digits.images.numpy(), digits.labels.tolist()
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, 0])), self.labels[index]


class TextbookPhotos(Dataset[Tensor]):
    """One transformed photograph at a time, of decoded ones (N, 3, H, W)."""

    def __init__(self, images: Tensor, *steps: nn.Module) -> None:
        self.images, self.transform = images, v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def photo_loader(images: Tensor, batch_size: int, padded: bool) -> DataLoader:
    """Random crops and flips in two workers; of tensors, which v2 transforms faster than PIL images."""
    side = images.shape[-1]
    crop = v2.RandomCrop(side, padding=4) if padded else v2.RandomResizedCrop(side, antialias=True)
    photos = TextbookPhotos(images, crop, v2.RandomHorizontalFlip())
    return DataLoader(photos, batch_size, shuffle=True, num_workers=2, persistent_workers=True)


class TextbookDataModule(LightningDataModule):
    """Loaded splits, as images that the backbone takes; `affine` varies the training digits as augment=affine does."""

    def __init__(self, source: Source, backbone: Backbone, batch_size: int, affine: bool) -> None:
        super().__init__()
        self.settings = {"batch_size": batch_size, "num_workers": 2, "persistent_workers": True, "drop_last": False}
        self.settings["pin_memory"] = torch.cuda.is_available()
        steps = [transforms.ToTensor()]
        if backbone.image_size != source.train.images.shape[-1]:
            steps.append(transforms.Resize(backbone.image_size, antialias=True))
        if backbone.channels > 1:  # after resizing one channel, before each gets its own mean and std
            steps.append(transforms.Lambda(lambda image: image.repeat(backbone.channels, 1, 1)))
        steps.append(transforms.Normalize(backbone.mean, backbone.std, inplace=True))
        smooth = transforms.InterpolationMode.BILINEAR  # as ours: the default, nearest, is coarse at 28 pixels
        random = [transforms.RandomAffine(10, (0.07, 0.07), (0.9, 1.1), interpolation=smooth)] if affine else []
        self.train = TextbookDataset(source.train, *random, *steps)
        self.val, self.test = TextbookDataset(source.val, *steps), TextbookDataset(source.test, *steps)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, shuffle=True, **self.settings)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, **self.settings)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, **self.settings)


class TextbookClassifier(LightningModule):
    """A backbone, frozen or trainable as a whole, under our linear head."""

    def __init__(self, backbone: Backbone, frozen: bool, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone.requires_grad_(not frozen), frozen
        self.lr, self.weight_decay = lr, weight_decay
        width = backbone.num_features
        self.head = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 10))
        self.train_acc, self.val_acc, self.test_acc = (MulticlassAccuracy(10, average="micro") for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(images)  # (B, C, S, S) -> (B, D)
        return self.head(features)  # (B, 10)

    def on_train_epoch_start(self) -> None:
        self.backbone.train(not self.frozen)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_acc.update(logits, labels)  # calling it would also compute the accuracy of each batch
        self.log("train/loss", loss)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_acc.update(self(batch[0]), batch[1])
        self.log("val/acc", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.test_acc.update(self(batch[0]), batch[1])
        self.log("test/acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps = self.trainer.estimated_stepping_batches
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=self.weight_decay, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_fraction(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lr_fraction(step: int, total_steps: float) -> float:
    """Linear warmup over a tenth of the steps, then a cosine to 0, like `OptimizerRecipe` in our configuration."""
    warmup = round(0.1 * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup)))) / 2


class Clock(Callback):
    """Seconds of each epoch, and of the training in it: Lightning validates before it ends an epoch."""

    def __init__(self) -> None:
        self.begun, self.training, self.epochs = 0.0, [], []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training.append(time.perf_counter() - self.begun)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(round(time.perf_counter() - self.begun, 2))


def seconds() -> float:
    """Since this process was started, before any import; only Linux says."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="holds MNIST/raw/*.gz; without it: the bundled 5,000 digits")
    parser.add_argument("--train-size", type=int, help="only the first so many training digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--thaw", choices=("head", "all"), default="head")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    seed_everything(args.seed, workers=True, verbose=False)
    source = load_mnist("MNIST", args.data_dir or "", "official" if args.data_dir else "sample", mirrors=[])
    source = source._replace(train=source.train.take(slice(args.train_size)))
    args.train_size = len(source.train.labels)
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "digits_vit.yaml"))
    del config["_target_"]
    config["fused_attention"] = True  # timm's default
    backbone = Backbone(**config)
    data = TextbookDataModule(source, backbone, args.batch_size, affine=False)
    model = TextbookClassifier(backbone, args.thaw == "head", args.lr, args.weight_decay)
    clock, best = Clock(), ModelCheckpoint(monitor="val/acc", mode="max")
    with tempfile.TemporaryDirectory() as folder:  # of the log and, in it, the checkpoint
        trainer = Trainer(
            devices=1,
            precision="32-true",
            max_epochs=args.epochs,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            callbacks=[clock, best],
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        test_acc = trainer.test(model, data, ckpt_path="best", verbose=False)[0]["test/acc"]
        total_seconds = seconds()

    result = {
        **vars(args),
        "seconds": round(total_seconds, 2),
        "epoch_seconds": clock.epochs,
        "val_acc": round(float(best.best_model_score), 4),
        "test_acc": round(test_acc, 4),
        "train_images_per_second": round(args.train_size / clock.training[-1]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    with lenient():
        main()
