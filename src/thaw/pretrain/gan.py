"""Pretraining by a generative adversarial network (Goodfellow et al. 2014, arXiv:1406.2661): which images are real?

Shapes: B batch, Z latent width, D feature width; C channels and S side of the backbone's images.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from thaw.data.augment import Augment
from thaw.data.batches import by_batches, evenly_spread
from thaw.data.loader import Batch
from thaw.evaluation.generation import frechet_distance, image_features, precision_and_recall
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.run.errors import UserError
from thaw.run.values import Count, NonNegative, Positive

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: scores (B,) should be above 1 for real, below -1 for drawn images (Lim & Ye 2017)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Mean squared norm of the score's gradient at images (B, 1, 28, 28).

    R1 for real images, R2 for drawn ones (Mescheder et al. 2018, equations 9 and 10).
    """
    pixels = pixels.detach().requires_grad_()
    with torch.autocast(pixels.device.type, enabled=False):  # a gradient of a gradient in 16 bits is coarse
        (gradient,) = torch.autograd.grad(discriminator(pixels).sum(), pixels, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


class GAN(Objective):
    """A small generator draws images, and the backbone with a linear head scores how real they look.

    One optimizer updates both from one loss, the sum of the discriminator's loss, which gives the generator no
    gradient, and the generator's, which gives the discriminator none. Two optimizers side by side would do the same,
    which converges locally with the R1 or R2 penalty (Mescheder et al. 2018, theorem 4.1). So a batch is a step, as
    everywhere: schedules, trainer.max_steps, accumulated gradients and resuming keep their meaning. Under two
    optimizers Lightning would count each batch twice.

    Args:
        augment: of real and drawn images alike.
        latent: width Z of the noise that an image is drawn from.
        width: channels of the generator where it is 7 x 7; half as many at 14 x 14, a quarter at 28.
        generator_lr: the generator's learning rate as a multiple of optim.lr (Heusel et al. 2017: two time scales).
            Under optim.layer_decay it counts as the layer above the score.
        r1: weight of the penalty on the discriminator's gradient at real images (R1) and at drawn ones (R2), whose
            pixels are in [0, 1]; 0 is off.
        r1_every: every so many images of a batch have the penalty, enough of them to estimate its mean.
        average_decay: of the moving average of the generator's weights, which images are drawn with; 0 is off.
        samples: how many drawn images are measured after a validation, and with how many real ones at most.
        measured_by: a trained backbone in whose features they are compared; it is not a part of the model.
    """

    grid: Tensor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        real = self.augment(batch.images.float() / 255)  # (B, 1, 28, 28)
        noise = torch.randn(len(real), self.latent, device=real.device)
        fake = self.augment(self.generator(noise))  # Zhao et al. 2020: gradients pass through
        scores = self.discriminator(torch.cat([real, fake.detach()]))
        discriminator_loss = hinge(*scores.chunk(2))
        generator_loss = -self.frozen_discriminator(fake).mean()
        loss = discriminator_loss + generator_loss
        if self.r1 > 0:
            some = slice(None, None, self.r1_every)  # it costs several times as much as the rest
            penalty = gradient_penalty(self.discriminator, torch.cat([real[some], fake[some]]))
            loss = loss + self.r1 / 2 * penalty
            self.log("train/r1", penalty.detach())
        self.log("train/loss", loss)
        self.log("train/discriminator_loss", discriminator_loss, prog_bar=True)
        self.log("train/generator_loss", generator_loss, prog_bar=True)
        return loss

    def discriminator(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, 1, 28, 28) -> scores (B,), high for images that look real."""
        images = self.preprocess(255 * pixels)  # (B, C, S, S)
        return self.score(self.backbone(images))[:, 0].float()

    def frozen_discriminator(self, pixels: Tensor) -> Tensor:
        """The same scores; their gradient reaches the pixels, but no weight of the discriminator."""
        images = self.preprocess(255 * pixels)
        features = functional_call(self.backbone, detached(self.backbone), images)
        return functional_call(self.score, detached(self.score), features)[:, 0].float()

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment,
        optim: OptimizerRecipe,
        output: str,
        latent: Count,
        width: Annotated[int, Field(ge=32, multiple_of=32, description="a multiple of 32, e.g. 128")],
        generator_lr: Positive,
        r1: NonNegative,
        r1_every: Count,
        average_decay: Annotated[float, Field(ge=0, lt=1)],
        samples: Annotated[int, Field(ge=2)],
        measured_by: Backbone,
    ) -> None:
        super().__init__(backbone, augment, optim, output)
        if augment.needs_grey_levels:
            raise UserError(
                "model=gan draws images as its augmentation leaves them, and augment.haze, noise and invert leave them "
                "spoilt; set these to 0, or choose augment=affine."
            )
        if r1 > 0 and getattr(backbone, "architecture", {}).get("fused"):
            raise UserError(
                f"model.r1={r1} needs the gradient of a gradient, which fused attention lacks, and "
                "backbone.fused_attention=true; set that to false (or model.r1=0)."
            )
        self.score = nn.Linear(backbone.num_features, 1)
        self.generator = Generator(latent, width)
        self.average = deepcopy(self.generator).requires_grad_(False)
        self.latent, self.generator_lr, self.average_decay = latent, generator_lr, average_decay
        self.r1, self.r1_every = r1, r1_every
        self.samples = samples
        self.measured_by = [measured_by]  # in a list it is not a submodule: neither trained nor in checkpoints
        self.real_features: list[Tensor] = []  # (N, D) of training and validation images, once computed
        self.register_buffer("grid", fixed_latents(8 * 16, latent))

    def draw(self, latents: Tensor) -> Tensor:
        """Latents (N, Z) -> images, uint8 (N, 1, 28, 28), by the averaged generator."""
        return (255 * by_batches(self.average, latents)).round().to(torch.uint8)

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Images drawn from latents that never change, and a row of real ones."""
        rows = [*self.draw(self.grid).unflatten(0, (8, 16)), images[:16]]
        return rows, ["generated", *([""] * 7), "real"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """A GAN's losses say nothing about its images."""

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Measure drawn images against real ones; training images in their place show the best possible score.

        Every process computes the same, so that all log the same.
        """
        (measured_by,) = self.measured_by
        titles = ("features of real images", "features of generated images")
        real, generated = titles if self.trainer.is_global_zero else (None, None)
        if not self.real_features:
            splits = [self.trainer.datamodule.split_dataset(split).data for split in ("train", "val")]  # type: ignore
            chosen = [images[evenly_spread(len(images), self.samples)] for images, _ in splits]
            self.real_features = [image_features(measured_by, images, real) for images in chosen]
        train, val = self.real_features
        latents = fixed_latents(len(train), self.latent).to(self.device)
        drawn = image_features(measured_by, self.draw(latents), generated)
        precision, recall = precision_and_recall(val, drawn, NEIGHBOURS)
        self.log("val/fid", frechet_distance(val, drawn), prog_bar=True)
        self.log("val/fid_floor", frechet_distance(val, train))
        self.log("val/precision", precision)
        self.log("val/recall", recall)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, then the average follows (Yazici et al. 2018), before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        decay = min(self.average_decay, (1 + self.global_step) / (10 + self.global_step))  # the start is soon forgotten
        with torch.no_grad():
            for average, now in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                average.lerp_(now, 1 - decay)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        built: Any = super().configure_optimizers()
        scheduler, generator = built["lr_scheduler"]["scheduler"], set(self.generator.parameters())
        for place, group in enumerate(built["optimizer"].param_groups):
            if generator & set(group["params"]):
                scheduler.base_lrs[place] *= self.generator_lr  # the schedule multiplies these from now on
                group["initial_lr"] *= self.generator_lr
                group["lr"] *= self.generator_lr
        return built

    def depths(self) -> dict[str, int]:
        """The generator alone is the deepest, so that its parameters have groups of their own."""
        depths = super().depths()
        top = max(depths.values()) + 1
        return {name: top if name.startswith("generator.") else depth for name, depth in depths.items()}

    def setup(self, stage: str) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time
        if hasattr(datamodule, "load") and datamodule.load().shape != (1, 28, 28):
            raise UserError(
                f"model=gan draws grey images of 28 x 28, but those of {datamodule.load().title} have the shape "
                f"{datamodule.load().shape}; choose model=mae or model=simclr."
            )
        if self.trainer.precision in ("64-true", "bf16-true"):
            raise UserError(f"model=gan cannot train with trainer.precision={self.trainer.precision}; use 32-true.")


class Generator(nn.Sequential):
    """Latents (B, Z) -> pixels in [0, 1], (B, 1, 28, 28); images of a batch do not depend on one another."""

    def __init__(self, latent: int, width: int) -> None:
        def block(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]

        double = nn.Upsample(scale_factor=2)
        super().__init__(
            *(nn.Linear(latent, width * 7 * 7), nn.Unflatten(1, (width, 7, 7))),
            *block(width, width),  # (B, width, 7, 7)
            *(double, *block(width, width // 2)),  # (B, width / 2, 14, 14)
            *(double, *block(width // 2, width // 4)),  # (B, width / 4, 28, 28)
            nn.Conv2d(width // 4, 1, 3, padding=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return (super().forward(latents).float() - 2).sigmoid()  # dark at first, as most pixels are


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def fixed_latents(number: int, latent: int) -> Tensor:
    """(N, Z), the same in every run."""
    return torch.randn(number, latent, generator=torch.Generator().manual_seed(0))
