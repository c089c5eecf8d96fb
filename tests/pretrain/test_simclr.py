"""SimCLR: its loss against loops and lightly, its kNN against scikit-learn, and the file that it writes."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thaw.data.datamodule import Batch
from thaw.models.backbone import Backbone
from thaw.models.optim import OptimizerRecipe
from thaw.pretrain.simclr import SimCLR, nt_xent, save_backbone

VIT = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}


def backbone(name: str = "vit_tiny_patch16_224", arguments: dict | None = None, weights: str = "none") -> Backbone:
    arguments = VIT if arguments is None else arguments
    settings: dict[str, Any] = {"pool": "model", "mean": None, "std": None, "fused_attention": False}
    return Backbone(name, weights, image_size=28, channels=1, arguments=arguments, **settings)


class Noise(nn.Module):
    """Two views of an image differ by noise."""

    def forward(self, images: Tensor) -> Tensor:
        return (images + 20 * torch.rand(images.shape)).clamp(0, 255).to(torch.uint8)


def simclr(output: Path) -> SimCLR:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.0, "layer_decay": 1.0, "warmup_fraction": 0.0}
    settings |= {"final_lr_fraction": 1.0, "lr_scaling": "none"}
    optim = OptimizerRecipe(partial(torch.optim.AdamW, foreach=True), **settings)
    return SimCLR(backbone(), Noise(), optim, projection=16, temperature=0.2, output=str(output))


def digits(number: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (number, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(number) % 3
    images[:, :14] += (25 * labels).to(torch.uint8)[:, None, None]
    return Batch(images, labels, torch.arange(number))


# The loss


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_a_naive_version(temperature: float) -> None:
    z, half = torch.randn(10, 6, dtype=torch.float64), 5
    total = 0.0
    for i in range(10):
        partner = (i + half) % 10
        similar = {j: torch.dot(z[i], z[j]) / (z[i].norm() * z[j].norm()) for j in range(10) if j != i}
        others = sum(torch.exp(value / temperature) for value in similar.values())
        total += -torch.log(torch.exp(similar[partner] / temperature) / others) / 10
    torch.testing.assert_close(nt_xent(z, temperature).double(), total, rtol=1e-5, atol=1e-6)


def test_nt_xent_equals_lightlys() -> None:
    loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    z = torch.randn(16, 8)
    torch.testing.assert_close(nt_xent(z, 0.2), loss(z[:8], z[8:]))


def test_nt_xent_is_exact_under_mixed_precision() -> None:
    z = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = nt_xent(z, 0.1)
    assert torch.equal(mixed, nt_xent(z, 0.1))


# Training


def test_gradient_reaches_every_parameter_and_the_loss_falls(tmp_path: Path) -> None:
    model, batch = simclr(tmp_path / "w.safetensors"), digits(12)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.optim.groups(model.named_parameters(), model.depths(), {}))
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = model.training_step(batch, step)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_projection_head_is_the_deepest_layer(tmp_path: Path) -> None:
    model = simclr(tmp_path / "w.safetensors")
    depths = model.depths()
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert {name.split(".")[0] for name, depth in depths.items() if depth == 3} == {"projector"}


@pytest.mark.parametrize("number", [9, 60])
def test_knn_accuracy_equals_scikit_learns(tmp_path: Path, number: int) -> None:
    model, batch, logged = simclr(tmp_path / "w.safetensors").eval(), digits(number), {}
    model.log = lambda name, value, **_: logged.update({name: value.item()})  # type: ignore[method-assign]
    with torch.no_grad():
        for part in (slice(0, 5), slice(5, None)):
            model.validation_step(Batch(*(values[part] for values in batch[:3])), 0)
        model.on_validation_epoch_end()
        features = model.backbone(model.preprocess(batch.images)).numpy()
    k, right = min(20, number - 1), 0
    for i in range(number):
        others = [j for j in range(number) if j != i]
        neighbours = KNeighborsClassifier(k, metric="cosine").fit(features[others], batch.labels[others])
        right += int(neighbours.predict(features[[i]])[0] == batch.labels[i])
    assert logged == {"val/knn_acc": pytest.approx(right / number)}
    assert not model.val_features and not model.val_labels


# The file


def test_a_trained_backbone_is_written_and_loads_back(tmp_path: Path) -> None:
    model, output = simclr(tmp_path / "deep" / "backbone.safetensors"), tmp_path / "deep" / "backbone.safetensors"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, **quiet)  # type: ignore
    loader: DataLoader = DataLoader([digits(12)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader)
    assert 0 <= trainer.callback_metrics["val/knn_acc"] <= 1
    assert [path.name for path in output.parent.iterdir()] == ["backbone.safetensors"]
    images = torch.randn(4, 1, 28, 28)
    loaded, fresh = backbone(weights=str(output)).eval(), backbone().eval()
    expected = model.backbone.eval()(images)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-2, atol=5e-3)  # fp16 in the file
    assert not torch.allclose(fresh(images), expected, rtol=1e-2, atol=5e-3)
    assert output.stat().st_size < 2.2 * sum(p.numel() for p in model.backbone.parameters()) + 4000


def test_counters_of_a_batch_norm_survive_the_file(tmp_path: Path) -> None:
    convnet = backbone("test_resnet", {})
    for name, buffer in convnet.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(70_001)  # more than fp16 can hold
    save_backbone(convnet, tmp_path / "w.safetensors")
    loaded = backbone("test_resnet", {}, str(tmp_path / "w.safetensors")).state_dict()
    for name, tensor in convnet.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-6)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "w.safetensors").write_bytes(b"whole")
    monkeypatch.setattr("thaw.pretrain.simclr.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_backbone(backbone(), tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == b"whole"


def test_output_must_be_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.output=.*w\.pth must end in \.safetensors"):
        simclr(tmp_path / "w.pth")
