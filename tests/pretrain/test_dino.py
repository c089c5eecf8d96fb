"""DINO: its loss against a loop and lightly's, its crops, and a teacher that is exactly the student's average."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thaw.data.datamodule import Batch
from thaw.models.backbone import Backbone
from thaw.models.optim import OptimizerRecipe
from thaw.pretrain.dino import DINO, Projector, dino_loss
from thaw.pretrain.patches import embed

VIT = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
CLASS_TOKEN = VIT | {"class_token": True, "global_pool": "token"}


def backbone(arguments: dict, weights: str = "none", name: str = "vit_tiny_patch16_224") -> Backbone:
    settings: dict[str, Any] = {"pool": "model", "mean": None, "std": None, "fused_attention": False}
    return Backbone(name, weights, image_size=28, channels=1, arguments=arguments, **settings)


class Noise(nn.Module):
    """Views of an image differ by noise."""

    is_random = True

    def forward(self, images: Tensor) -> Tensor:
        return (images + 20 * torch.rand(images.shape)).clamp(0, 255).to(torch.uint8)


def dino(arguments: dict = VIT, output: Path = Path("w.safetensors"), **settings: Any) -> DINO:
    torch.manual_seed(0)
    recipe: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.0, "layer_decay": 1.0, "warmup_fraction": 0.0}
    recipe |= {"final_lr_fraction": 1.0, "lr_scaling": "none"}
    optim = OptimizerRecipe(partial(torch.optim.AdamW, foreach=True), **recipe)
    settings = {
        **{"prototypes": 24, "hidden": 32, "bottleneck": 16, "teacher_temperature": 0.04, "momentum": 0.9},
        **{"centre_momentum": 0.8, "local_crops": 2, "local_side": 2},
        **settings,
    }
    encoder = settings.pop("encoder", None) or backbone(arguments)
    model = DINO(encoder, settings.pop("augment", Noise()), optim, str(output), **settings)
    model.gather = lambda rows: rows  # type: ignore[method-assign]  # there is one process
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model


def digits(number: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (number, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(number) % 3
    images[:, :14] += (25 * labels).to(torch.uint8)[:, None, None]
    return Batch(images, labels, torch.arange(number))


def fit(model: DINO, tmp_path: Path, **settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **(quiet | settings))
    loader: DataLoader = DataLoader([digits(6)] * 4, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader)
    return trainer


# The loss


def test_loss_equals_a_naive_loop() -> None:
    student, teacher, centre = torch.randn(5, 3, 7), torch.randn(2, 3, 7), torch.randn(7)
    total, terms = 0.0, 0
    for t in range(2):
        for s in range(5):
            for row in range(3):
                if s != t:
                    sharp = torch.exp((teacher[t, row] - centre) / 0.5)
                    soft = torch.exp(student[s, row] / 0.1)
                    total -= ((sharp / sharp.sum()) * torch.log(soft / soft.sum())).sum().item()
                    terms += 1
    loss = dino_loss(student.unbind(), teacher.unbind(), centre, 0.5)
    assert loss.item() == pytest.approx(total / terms, rel=1e-5)


def test_loss_equals_lightlys() -> None:
    from lightly.loss import DINOLoss

    theirs = DINOLoss(output_dim=7, teacher_temp=0.04, center_momentum=0.8)
    centre = torch.zeros(7)
    for _ in range(3):  # the first has no centre yet
        student, teacher = torch.randn(4, 3, 7), torch.randn(2, 3, 7)
        expected = theirs(list(teacher), list(student))
        torch.testing.assert_close(dino_loss(student.unbind(), teacher.unbind(), centre, 0.04), expected)
        centre.lerp_(teacher.mean(dim=(0, 1)), 0.2)
        torch.testing.assert_close(theirs.center.flatten(), centre)


@pytest.mark.parametrize("arguments", [VIT, CLASS_TOKEN])
def test_what_the_loss_is_taken_of(arguments: dict) -> None:
    """The teacher sees the first two views, the student these and a block of each other view; then the centre moves."""
    model, images = dino(arguments, local_crops=3), digits(4).images
    model.update_teacher(0.5)
    model.student_projector.mlp[0].weight.data.mul_(1.5)  # a student that differs
    model.centre.copy_(0.1 * torch.randn(24))
    old = model.centre.clone()
    torch.manual_seed(4)
    loss = model.loss(images)
    torch.manual_seed(4)
    with torch.no_grad():
        views = model.preprocess(model.augment(images.repeat(5, 1, 1))).split(4)
        blocks = model.random_blocks(embed(model.student, torch.cat(views[2:]))).split(4)
        teacher = [model.projector(model.backbone(view)) for view in views[:2]]
        student = [model.student_projector(model.student(view)) for view in views[:2]]
        student += [model.student_projector(model.student.suffix(block, 1)) for block in blocks]
        torch.testing.assert_close(loss, dino_loss(tuple(student), tuple(teacher), old, 0.04))
        torch.testing.assert_close(model.centre, 0.8 * old + 0.2 * torch.cat(teacher).mean(dim=0))
    now = model.centre.clone()
    model.eval().loss(images)
    assert torch.equal(model.centre, now)  # validation moves nothing


@pytest.mark.parametrize("arguments", [VIT, CLASS_TOKEN | {"reg_tokens": 1}])
def test_blocks_are_squares_of_patches(arguments: dict) -> None:
    model = dino(arguments, local_side=3)
    extra = model.backbone.model.num_prefix_tokens
    tokens = torch.arange(extra + 16.0).expand(200, -1)[..., None]  # each token is its own number
    blocks = model.random_blocks(tokens)[..., 0] - extra
    assert torch.equal(blocks[:, :extra], (torch.arange(extra) - extra).expand(200, -1).float())
    corners = [0, 1, 4, 5]
    squares = {tuple(float(corner + 4 * r + c) for r in range(3) for c in range(3)) for corner in corners}
    assert {tuple(block.tolist()) for block in blocks[:, extra:]} == squares


def test_prototypes_have_length_1_as_under_torchs_weight_norm() -> None:
    torch.manual_seed(0)
    ours, layer = Projector(8, 16, 4, 10), nn.utils.parametrizations.weight_norm(nn.Linear(4, 10, bias=False))
    layer.parametrizations.weight.original0.data.fill_(1)
    layer.parametrizations.weight.original1.data.copy_(ours.prototypes)
    x = torch.randn(5, 8)
    torch.testing.assert_close(ours(x), layer(nn.functional.normalize(ours.mlp(x), dim=1)))
    assert ours(x).abs().max() <= 1


# The teacher


def test_the_teacher_is_the_students_average(tmp_path: Path) -> None:
    """After every step of the optimizer, not every batch, and before that step's checkpoint is written."""
    model = dino(output=tmp_path / "w.safetensors")
    expected = [parameter.clone() for parameter in (*model.backbone.parameters(), *model.projector.parameters())]
    momenta = []
    update = model.update_teacher

    def record(momentum: float) -> None:
        momenta.append(momentum)
        students = (*model.student.parameters(), *model.student_projector.parameters())
        for mean, new in zip(expected, students, strict=True):
            mean.copy_(momentum * mean + (1 - momentum) * new.detach())
        update(momentum)

    model.update_teacher = record  # type: ignore[method-assign]
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(model, tmp_path, max_epochs=3, accumulate_grad_batches=2, callbacks=[keep])
    assert trainer.global_step == 6
    assert momenta == pytest.approx([1 - 0.1 * (math.cos(math.pi * step / 6) + 1) / 2 for step in range(6)])
    for mean, teacher in zip(expected, (*model.backbone.parameters(), *model.projector.parameters()), strict=True):
        torch.testing.assert_close(teacher, mean)
    written = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(written[name], tensor), name


def test_the_teacher_is_never_trained_and_has_no_dropout() -> None:
    model = dino(VIT | {"drop_path_rate": 0.5})
    for _ in range(2):
        assert not any(module.training for module in (*model.backbone.modules(), *model.projector.modules()))
        assert all(module.training for module in (*model.student.modules(), *model.student_projector.modules()))
        model.eval().train()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"student", "student_projector"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.loss(digits(4).images).backward()
    assert all(parameter.grad is None for parameter in (*model.backbone.parameters(), *model.projector.parameters()))
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {"centre"}
    images = digits(4).images
    assert torch.equal(model.features(images), model.features(images))


def test_the_file_holds_the_teacher(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "backbone.safetensors"
    model = dino(output=output)
    fit(model, tmp_path, max_epochs=2, enable_checkpointing=False)
    images = torch.randn(4, 1, 28, 28)
    loaded = backbone(VIT, weights=str(output)).eval()(images)
    torch.testing.assert_close(loaded, model.backbone(images), rtol=1e-2, atol=5e-3)  # fp16 in the file
    assert not torch.allclose(loaded, model.student.eval()(images), rtol=1e-2, atol=5e-3)


def test_statistics_of_batch_norms_are_the_students() -> None:
    model = dino(encoder=backbone({}, name="test_resnet"), local_crops=0)
    model.loss(digits(4).images)
    model.update_teacher(0.9)
    student = dict(model.student.named_buffers())
    assert student
    for name, buffer in model.backbone.named_buffers():
        assert torch.equal(buffer, student[name])


# Training


@pytest.mark.parametrize("arguments", [VIT, CLASS_TOKEN])
def test_gradient_reaches_every_parameter_and_the_loss_falls(arguments: dict) -> None:
    model, batch = dino(arguments, centre_momentum=0.0), digits(12)
    model.loss(batch.images)  # the teacher's outputs are centred from the first step on
    model.eval()  # and the centre stays, as the loss rises with it
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(model.optim.groups(trained, model.depths(), {}))
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = model.training_step(batch, step)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_depths_are_the_students() -> None:
    model = dino()
    depths = model.depths()
    assert depths.keys() == dict(model.named_parameters()).keys()
    student = {name.removeprefix("student."): depth for name, depth in depths.items() if name.startswith("student.")}
    assert student == model.backbone.depths()
    assert {depth for name, depth in depths.items() if name.startswith("student_projector.")} == {3}


def test_a_step_in_bf16() -> None:
    model = dino()
    torch.manual_seed(1)
    exact = copy.deepcopy(model).loss(digits(6).images)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(digits(6).images)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)


def test_contact_sheet() -> None:
    model, images = dino().eval(), digits(20).images
    with torch.no_grad():
        rows, titles = model.contact_sheet(images)
    assert titles == ["digit", *(f"nearest {n}" for n in range(1, 6))]
    assert all(row.shape == (16, 28, 28) for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": type("Still", (Noise,), {"is_random": False})()}, r"augment=none makes them equal"),
        ({"local_side": 5}, r"model\.local_side=5 must be from 1 to 4"),
        ({"momentum": 1.0}, r"model\.momentum=1\.0 must be from 0 to below 1"),
        ({"teacher_temperature": 0.2}, r"model\.teacher_temperature=0\.2 must be above 0 and below the student's 0\.1"),
        ({"prototypes": 1, "local_crops": -1}, r"model\.prototypes=1 .*; model\.local_crops=-1 must be 0 or more"),
    ],
)
def test_what_it_cannot_learn_from_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dino(**settings)


def test_a_single_digit_is_too_few() -> None:
    with pytest.raises(ValueError, match=r"1 digit has nothing to tell it from: choose data\.batch_size"):
        dino().loss(digits(1).images)
