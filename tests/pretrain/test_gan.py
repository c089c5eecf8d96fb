"""The GAN: its losses against loops and separate computations, its one step a batch, and what it measures."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import compose_run
from hydra.utils import instantiate
from pretrain.tiny import VIT, recipe, refused
from pretrain.tiny import backbone as tiny_backbone
from small_models import augmentation
from torch import Tensor, nn

from thaw.data.loader import Batch
from thaw.models.backbone import Backbone
from thaw.pretrain.gan import GAN, Generator, fixed_latents, gradient_penalty, hinge

RUN = [
    *("experiment=pretrain_gan", "data.source=sample", "data.train_size=64", "data.batch_size=16", "logger=csv"),
    *("trainer.precision=32-true", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "model.width=32"),
    *("backbone.arguments.depth=1", "+backbone.arguments.embed_dim=32", "+backbone.arguments.num_heads=2"),
    *("model.samples=100", "trainer.plugins.0.seconds=0", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1"),
]


def backbone(size: int = 28, channels: int = 1, fused: bool = False) -> Backbone:
    return tiny_backbone(VIT, image_size=size, channels=channels, fused_attention=fused)


def gan(trained: Backbone | None = None, **changes: Any) -> GAN:
    torch.manual_seed(0)
    augment = augmentation(degrees=10.0, translate=0.1, scale=0.1, thickness=0.5)
    own: dict[str, Any] = {"latent": 8, "width": 32, "generator_lr": 1.0, "r1": 10.0, "r1_every": 2}
    own |= {"average_decay": 0.9, "samples": 50, "measured_by": backbone()} | changes
    model = GAN(trained or backbone(), augment, recipe(), "w.safetensors", **own)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model


def digits(number: int = 6) -> Batch:
    images = torch.randint(0, 256, (number, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.zeros(number), torch.arange(number))


def gradients(model: GAN) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# The losses


def test_hinge_equals_a_loop() -> None:
    real, fake = 2 * torch.randn(7), 2 * torch.randn(7)
    expected = sum(max(0.0, 1 - float(s)) for s in real) / 7 + sum(max(0.0, 1 + float(s)) for s in fake) / 7
    assert hinge(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_of_a_linear_discriminator_is_its_squared_norm() -> None:
    linear = nn.Linear(784, 1)
    penalty = gradient_penalty(lambda x: linear(x.flatten(1))[:, 0], torch.rand(5, 1, 28, 28))
    torch.testing.assert_close(penalty, linear.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(linear.weight.grad, 2 * linear.weight)


def test_the_penalty_equals_finite_differences() -> None:
    model = gan().double()
    real = torch.rand(1, 1, 28, 28, dtype=torch.float64)
    model.discriminator = lambda x: model.score(model.backbone((x - 0.1307) / 0.3081))[:, 0]  # type: ignore
    with torch.no_grad():
        steps = 1e-5 * torch.eye(784, dtype=torch.float64).reshape(784, 1, 28, 28)
        slopes = (model.discriminator(real + steps) - model.discriminator(real - steps)) / 2e-5
    torch.testing.assert_close(gradient_penalty(model.discriminator, real), slopes.square().sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("r1", [0.0, 10.0])
def test_one_backward_gives_the_gradients_of_two_separate_ones(r1: float) -> None:
    model, batch = gan(r1=r1), digits()
    torch.manual_seed(1)
    model.training_step(batch, 0).backward()
    got = gradients(model)

    torch.manual_seed(1)
    real = model.augment(batch.images / 255)
    fake = model.augment(model.generator(torch.randn(6, 8)))
    normalize: Callable[[Tensor], Tensor] = lambda x: (x - 0.1307) / 0.3081  # noqa: E731
    score: Callable[[Tensor], Tensor] = lambda x: model.score(model.backbone(normalize(x)))[:, 0]  # noqa: E731
    of_discriminator = [*model.backbone.parameters(), *model.score.parameters()]
    leaf = torch.cat([real[::2], fake[::2]]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(score(leaf).sum(), leaf, create_graph=True)
    loss = (1 - score(real)).relu().mean() + (1 + score(fake.detach())).relu().mean()
    loss = loss + r1 / 2 * slope.square().sum(dim=(1, 2, 3)).mean()
    expected = dict(zip(of_discriminator, torch.autograd.grad(loss, of_discriminator), strict=True))
    of_generator = list(model.generator.parameters())
    expected |= dict(zip(of_generator, torch.autograd.grad(-score(fake).mean(), of_generator), strict=True))
    for name, gradient in got.items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0 or name == "backbone.model.fc_norm.bias", name  # real and fake cancel there
        torch.testing.assert_close(gradient, expected[model.get_parameter(name)], rtol=1e-3, atol=1e-5, msg=name)


def test_the_generators_loss_teaches_the_discriminator_nothing_and_the_other_way_round() -> None:
    model = gan()
    fake = model.generator(torch.randn(6, 8))
    (-model.frozen_discriminator(fake).mean()).backward()
    assert {name.split(".")[0] for name, g in gradients(model).items() if g is not None} == {"generator"}
    model.zero_grad()
    hinge(model.discriminator(torch.rand(6, 1, 28, 28)), model.discriminator(fake.detach())).backward()
    assert {name.split(".")[0] for name, g in gradients(model).items() if g is not None} == {"backbone", "score"}


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (56, 3)])
def test_the_discriminator_sees_what_features_sees(size: int, channels: int) -> None:
    model, images = gan(backbone(size, channels)), digits().images
    expected = model.score(model.features(images))[:, 0]
    torch.testing.assert_close(model.discriminator(images / 255), expected)
    torch.testing.assert_close(model.frozen_discriminator(images / 255), expected)
    model.training_step(digits(), 0).backward()  # the resize has a gradient of a gradient


def test_bf16_step_is_close_to_fp32() -> None:
    losses = []
    for enabled in (False, True):
        model = gan()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.training_step(digits(), 0)
        loss.backward()
        assert all(g is not None and g.isfinite().all() for g in gradients(model).values())
        losses.append(loss.item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.03)


def test_a_digit_is_drawn_alone() -> None:
    generator, latents = Generator(8, 32), torch.randn(5, 8)
    pixels = generator(latents)
    assert pixels.shape == (5, 1, 28, 28) and pixels.min() >= 0 and pixels.max() <= 1
    torch.testing.assert_close(pixels[:2], generator(latents[:2]))


def test_the_latents_are_fixed() -> None:
    model = gan()
    torch.manual_seed(7)
    assert torch.equal(model.grid, fixed_latents(128, 8)) and "grid" in model.state_dict()
    first, again = (model.contact_sheet(digits(20).images) for _ in range(2))
    assert first[1] == ["generated", "", "", "", "", "", "", "", "real"]
    assert [row.shape for row in first[0]] == 9 * [(16, 1, 28, 28)] and {row.dtype for row in first[0]} == {torch.uint8}
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert torch.equal(first[0][8], digits(20).images[:16])


# Errors


def test_a_penalty_needs_plain_attention() -> None:
    with pytest.raises(ValueError, match=r"model\.r1=10\.0 needs .*backbone\.fused_attention=true; set that to false"):
        gan(backbone(fused=True))
    gan(backbone(fused=True), r1=0.0)


def test_images_are_not_drawn_with_noise() -> None:
    own = gan()
    with pytest.raises(ValueError, match=r"augment\.haze, noise and invert leave them spoilt; set these to 0"):
        GAN(
            own.backbone, augmentation(noise=0.1), own.optim, "w.safetensors", 8, 32, 1.0, 0.0, 2, 0.9, 50, own.backbone
        )


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("latent", 0, "a whole number, 1 or more"),
        ("width", 48, "a whole number, 32 or more; a multiple of 32, e.g. 128"),
        ("generator_lr", 0, "a number above 0"),
        ("r1", -1, "a number, 0 or more"),
        ("r1_every", 0, "a whole number, 1 or more"),
        ("average_decay", 1.0, "a number, 0 or more and below 1"),
        ("samples", 1, "a whole number, 2 or more"),
    ],
)
def test_settings_out_of_range(key: str, value: float, allowed: str) -> None:
    refused(GAN, key, value, allowed)


# Runs


def state(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_batch_is_a_step(train: Callable[..., Path]) -> None:
    whole = train(*RUN, "model.generator_lr=2", "callbacks.finite_loss=null")
    saved = state(whole)
    assert saved["global_step"] == 8  # 4 batches in each of 2 epochs
    (scheduler,) = saved["lr_schedulers"]
    low, high = min(scheduler["base_lrs"]), max(scheduler["base_lrs"])
    assert scheduler["last_epoch"] == 8 and high == 2 * low and set(scheduler["base_lrs"]) == {low, high}
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == scheduler["base_lrs"]
    rates = [group["lr"] / group["initial_lr"] for group in groups]
    assert rates == pytest.approx([0.1] * len(rates))  # optim.final_lr_fraction: the schedule has ended
    assert not any("measured_by" in name for name in saved["state_dict"])
    assert (whole / "report" / "epoch_0002.png").is_file() and (whole / "backbone.safetensors").is_file()
    logged = (whole / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/fid", "val/fid_floor", "val/precision", "val/recall", "train/discriminator_loss"} <= set(logged)
    assert {"train/generator_loss", "train/r1", "train/loss"} <= set(logged)
    averages = [name for name in saved["state_dict"] if name.startswith("average.")]
    assert averages and not any(
        torch.equal(saved["state_dict"][n], saved["state_dict"][n.replace("average", "generator")]) for n in averages
    )


def test_the_measurement_is_that_of_its_parts(tmp_path: Path) -> None:
    """Training digits as the generated ones would score the floor."""
    cfg = compose_run(tmp_path, *RUN)
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    logged: dict[str, float] = {}
    model.log = lambda name, value, **_: logged.update({name: value})
    model.trainer = SimpleNamespace(is_global_zero=True, datamodule=data)
    train = data.split_dataset("train").data.images
    model.draw = lambda latents: train[: len(latents)]
    model.on_validation_epoch_end()
    assert logged["val/fid"] == pytest.approx(logged["val/fid_floor"], rel=1e-6) and logged["val/fid"] > 0
    assert logged["val/precision"] > 0.5
    model.draw = lambda latents: torch.zeros(len(latents), 1, 28, 28, dtype=torch.uint8)
    model.on_validation_epoch_end()
    assert logged["val/fid"] > 3 * logged["val/fid_floor"] and logged["val/precision"] == 0
