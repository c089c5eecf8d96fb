"""Every objective on two processes (gloo) against one at the same global batch, and in bf16."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.multiprocessing
from conftest import ROOT, compose_run

OBJECTIVES = sorted(
    path.stem.removeprefix("pretrain_") for path in (ROOT / "configs" / "experiment").glob("pretrain_*.yaml")
)
GLOBAL_BATCH = 16
TINY = ["backbone.arguments.depth=2", "+backbone.arguments.embed_dim=32", "+backbone.arguments.num_heads=2"]


class SameDraws(L.Callback):
    """Random numbers of a step are drawn for the digits of all processes, and each process takes those of its own.

    A draw is known by its first dimension, which holds the process's digits once or several times.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(batch_idx)  # for draws that are no digit's own
        generator = torch.Generator().manual_seed(batch_idx)
        ranks, rank, own = trainer.world_size, trainer.global_rank, len(batch.images)

        def drawn(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def of_all(*shape: Any, **_: Any) -> torch.Tensor:
                size = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape
                if not size or size[0] % own:
                    return draw(size, generator=generator)
                times = size[0] // own
                numbers = draw((times, ranks * own, *size[1:]), generator=generator)
                return numbers[:, rank * own : (rank + 1) * own].reshape(size)

            return of_all

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch, "rand", drawn(torch.rand))
        self.patch.setattr(torch, "randn", drawn(torch.randn))

    def on_train_batch_end(self, *_: Any) -> None:
        self.patch.undo()


def fit(name: str, ranks: int, folder: Path) -> None:
    """Three steps of an objective on a tiny ViT; writes the weights."""
    from hydra.utils import instantiate

    from thaw.run.config import settle

    small = ["data.source=sample", "data.train_size=48", f"data.batch_size={GLOBAL_BATCH // ranks}", "augment=affine"]
    cfg = compose_run(folder, f"experiment=pretrain_{name}", *TINY, *small, "optim.lr=0.05")
    cfg.optim.optimizer = {"_target_": "torch.optim.SGD", "_partial_": True}  # AdamW turns rounding into steps
    cfg.trainer.precision = "32-true"
    settle(cfg)
    torch.manual_seed(0)
    model, datamodule = instantiate(cfg.model), instantiate(cfg.data)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[SameDraws()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule)
    if trainer.is_global_zero:
        torch.save(model.state_dict(), folder / f"{name}_{ranks}.pt")


def one_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for name in OBJECTIVES:
        fit(name, 2, folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of every objective after the same steps on one process and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{ROOT}", prepend=os.pathsep)
        torch.multiprocessing.spawn(one_of_two, (port, folder), nprocs=2)
        for name in OBJECTIVES:
            fit(name, 1, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_equal_one(name: str, weights: Path) -> None:
    one, two = (torch.load(weights / f"{name}_{ranks}.pt", weights_only=True) for ranks in (1, 2))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, msg=lambda told, key=key: f"{key}: {told}")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_runs_in_bf16(name: str, train: Callable[..., Path]) -> None:
    small = ["debug=fast", "data.source=sample", "data.train_size=64", "data.batch_size=16", "data.eval_batch_size=16"]
    run_dir = train(f"experiment=pretrain_{name}", *small, *TINY, "trainer.precision=bf16-mixed")
    assert (run_dir / "backbone.safetensors").is_file()
