"""SimCLR: its loss against loops and lightly, and the file that every objective writes."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from pretrain.tiny import backbone, digits, losses_of_training, recipe, refused
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thaw.pretrain.objective import save_backbone
from thaw.pretrain.simclr import SimCLR, nt_xent


class Noise(nn.Module):
    """Two views of an image differ by noise."""

    is_random = True

    def forward(self, images: Tensor) -> Tensor:
        return (images + 20 * torch.rand(images.shape)).clamp(0, 255).to(torch.uint8)


def simclr(output: Path) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(backbone(), Noise(), recipe(), str(output), hidden=16, projection=16, temperature=0.2)  # type: ignore[arg-type]


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
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=0.2)
    z = torch.randn(16, 8)
    torch.testing.assert_close(nt_xent(z, 0.2), loss(z[:8], z[8:]))


def test_nt_xent_is_exact_under_mixed_precision() -> None:
    z = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = nt_xent(z, 0.1)
    assert torch.equal(mixed, nt_xent(z, 0.1))


# Training


def test_gradient_reaches_every_parameter_and_the_loss_falls(tmp_path: Path) -> None:
    losses = losses_of_training(simclr(tmp_path / "w.safetensors"), digits(12), 20)
    assert losses[-1] < 0.7 * losses[0]


def test_the_projection_head_is_the_deepest_layer(tmp_path: Path) -> None:
    model = simclr(tmp_path / "w.safetensors")
    depths = model.depths()
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert {name.split(".")[0] for name, depth in depths.items() if depth == 3} == {"projector"}


def test_what_it_cannot_learn_from_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 image has nothing to contrast it with: choose data\.batch_size"):
        nt_xent(torch.randn(2, 8), 0.2)
    model, still = simclr(tmp_path / "w.safetensors"), Noise()
    still.is_random = False
    with pytest.raises(ValueError, match="augment=none makes them equal; choose augment=strong"):
        SimCLR(model.backbone, still, model.optim, model.output, 16, 16, 0.2)  # type: ignore[arg-type]
    refused(SimCLR, "temperature", 0, "a number above 0")
    refused(SimCLR, "projection", 0, "a whole number, 1 or more")


def test_the_picture_shows_the_nearest_digits(tmp_path: Path) -> None:
    model = simclr(tmp_path / "w.safetensors").eval()
    images = digits(12).images
    images[7] = images[3]
    with torch.no_grad():
        rows, titles = model.contact_sheet(images)
    assert len(rows) == len(titles) == 6
    assert torch.equal(rows[0], images) and torch.equal(rows[1][3], images[7]) and torch.equal(rows[1][7], images[3])


def test_processes_with_different_numbers_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own, other = simclr(tmp_path / "w.safetensors"), torch.randn(2, 4), torch.randn(3, 4)

    def all_gather(rows: Tensor, sync_grads: bool = False) -> Tensor:
        return torch.tensor([3, 2]) if rows.ndim == 0 else torch.stack([other, rows])

    monkeypatch.setattr(model, "_trainer", SimpleNamespace(world_size=2))
    monkeypatch.setattr(model, "all_gather", all_gather)
    assert torch.equal(model.gather(own), torch.cat([other, own]))


def test_batch_norm_of_one_process_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = simclr(tmp_path / "w.safetensors")
    model.projector.append(nn.BatchNorm1d(16))
    monkeypatch.setattr(model, "_trainer", SimpleNamespace(world_size=1))
    model.on_train_start()
    monkeypatch.setattr(model, "_trainer", SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match=r"projector\.3 would take its statistics .* trainer\.sync_batchnorm=true"):
        model.on_train_start()
    model.projector[3] = nn.SyncBatchNorm(16)
    model.on_train_start()


# The file


def test_a_trained_backbone_is_written_and_loads_back(tmp_path: Path) -> None:
    model, output = simclr(tmp_path / "deep" / "backbone.safetensors"), tmp_path / "deep" / "backbone.safetensors"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, **quiet)  # type: ignore
    loader: DataLoader = DataLoader([digits(12)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["val/loss"] > 0
    assert [path.name for path in output.parent.iterdir()] == ["backbone.safetensors"]
    images = torch.randn(4, 1, 28, 28)
    loaded, fresh = backbone(weights=str(output)).eval(), backbone().eval()
    expected = model.backbone.eval()(images)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-2, atol=5e-3)  # fp16 in the file
    assert not torch.allclose(fresh(images), expected, rtol=1e-2, atol=5e-3)
    assert output.stat().st_size < 2.2 * sum(p.numel() for p in model.backbone.parameters()) + 4000


def test_counters_of_a_batch_norm_survive_the_file(tmp_path: Path) -> None:
    convnet = backbone({}, "test_resnet")
    for name, buffer in convnet.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(70_001)  # more than fp16 can hold
    save_backbone(convnet, tmp_path / "w.safetensors")
    loaded = backbone({}, "test_resnet", weights=str(tmp_path / "w.safetensors")).state_dict()
    for name, tensor in convnet.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-6)


def test_output_must_be_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.output=.*w\.pth must end in \.safetensors"):
        simclr(tmp_path / "w.pth")
