"""thaw.freeze on a LightningModule that knows nothing of thaw, compared with a loop in plain torch."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import thaw
from thaw.freezing.policy import FreezePolicy

HEAD = {"match": r"head\..*", "train": True}
TOP = {"match": r"body\.top\..*", "train": True, "from_epoch": 1}
REST = {"match": ".*", "train": False}
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def block(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))


class Own(L.LightningModule):
    """Batch norm and dropout in each part; `optimized` says what its optimizer is given."""

    def __init__(self, optimized: str = "all") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"stem": block(1), "top": block(4)})
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * 36, 3))
        self.optimized = optimized

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body["top"](self.body["stem"](images)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        given = {
            "all": self.parameters(),
            "those that train": filter(lambda parameter: parameter.requires_grad, self.parameters()),
            "the head": self.head.parameters(),
        }
        return torch.optim.AdamW(given[self.optimized], lr=1e-2, weight_decay=0.1)


class Layered(Own):
    def depths(self) -> dict[str, int]:
        order = ("body.stem", "body.top", "head")
        return {name: next(n for n, part in enumerate(order) if name.startswith(part)) for name in self.state_names()}

    def state_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters()]


class Restless(Own):
    """Puts all of itself into train mode, as some modules do, and has another step of validation in between."""

    def on_train_epoch_start(self) -> None:
        self.train()

    def on_validation_epoch_end(self) -> None:
        self.train()


class Shared(Own):
    """Processes take turns at the images; without dropout."""

    def __init__(self) -> None:
        super().__init__()
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0

    def train_dataloader(self) -> DataLoader:
        world, data = self.trainer.world_size, loader().dataset
        sampler = DistributedSampler(data, world, self.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // world, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


class Seeded(L.Callback):
    """Equal random numbers in a step, whatever came before it."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, number: int) -> None:
        torch.manual_seed(trainer.global_step)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=8)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fitted(module: L.LightningModule, rules: list[dict[str, Any]], ckpt: Path | None = None, **changes: Any) -> Any:
    settings = QUIET | {"max_epochs": 3, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1} | changes
    trainer = L.Trainer(callbacks=[Seeded(), thaw.freeze(module, rules)], **settings)
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt)
    return trainer


@pytest.fixture(scope="module")
def naive() -> dict[str, Tensor]:
    """Three epochs by hand: the head trains, after one epoch the top of the body too."""
    module = Own().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for epoch in range(3):
        trains = [module.head] if epoch < 1 else [module.head, module.body["top"]]
        module.requires_grad_(False).body.eval()
        for part in trains:
            part.requires_grad_(True).train()
        for step, (images, labels) in enumerate(loader()):
            torch.manual_seed(3 * epoch + step)
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()
    return state(module)


RULES = [HEAD, TOP, REST]


@pytest.mark.parametrize("optimized", ["all", "those that train"])
@pytest.mark.parametrize("kind", [Own, Restless])
def test_trains_as_a_loop_by_hand_does(naive: dict[str, Tensor], kind: type[Own], optimized: str) -> None:
    module = kind(optimized)
    before = state(module)
    fitted(module, RULES)
    after = state(module)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if not name.startswith("body.stem")}, "buffers of batch norm too"
    assert same(after, naive)


def test_what_no_policy_freezes_moves(naive: dict[str, Tensor]) -> None:
    """The comparison above would see a single step on the stem, or its batch norm in train mode."""
    module = Own()
    fitted(module, [{"match": ".*", "train": True}])
    assert not same(state(module), naive)


def test_a_resumed_run_goes_on_as_it_was(naive: dict[str, Tensor], tmp_path: Path) -> None:
    """Of what has thawed, and of what thaws after it was resumed."""
    for epochs in (1, 2):
        path = tmp_path / f"{epochs}.ckpt"
        fitted(Own("those that train"), RULES, max_epochs=epochs).save_checkpoint(path)
        resumed = Own("those that train")
        fitted(resumed, RULES, ckpt=path)
        assert same(state(resumed), naive)


def test_gradual_thawing_of_a_module_with_layers(capsys: pytest.CaptureFixture[str]) -> None:
    module, expected = Layered(), Own()
    fitted(module, [HEAD, {"match": ".*", "train": True, "from_epoch": 1, "blocks": 1, "every": 2}])
    assert "after 1 epoch: depth 1, 156 parameters start to train" in capsys.readouterr().out
    fitted(expected, RULES)
    assert "after 1 epoch: 156 parameters start to train" in capsys.readouterr().out
    assert same(state(module), state(expected))


def share_gradients() -> None:
    """Two processes, each with half of a batch, against one; the batch norms are frozen, as they see half a batch."""
    rules = [HEAD, {"match": r"body\.\w+\.0\..*", "train": True, "from_epoch": 1}, REST]

    one, two, start = Shared(), Shared(), state(Shared())
    for module, processes in ((one, {"devices": 1}), (two, {"devices": 2, "strategy": "ddp_fork"})):
        settings = QUIET | {"max_epochs": 3, "accelerator": "cpu", "use_distributed_sampler": False}
        trainer = L.Trainer(callbacks=thaw.freeze(module, rules), enable_checkpointing=False, **settings | processes)
        trainer.fit(module)
    for name, tensor in state(one).items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(tensor, start[name]) != bool(re.search(r"head|body\.\w+\.0\.", name))


@pytest.mark.long
def test_processes_share_the_gradients_of_what_thaws() -> None:
    """In a new Python: a process cannot be forked once torch has computed in threads."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as tests; "
    subprocess.run([sys.executable, "-c", code + "tests.share_gradients()"], check=True)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([HEAD], "no rule covers body.stem.0.bias; .* has parameters under body.stem.0"),
        ([HEAD, {"match": "heads.*", "train": True}, REST], r"rule 2 .*heads.* matches nothing \(nearest: head\)"),
        ([HEAD, REST, TOP], "matches only what earlier rules decided"),
        ([REST], "freeze every parameter in epoch 0"),
        ([TOP, REST], "freeze every parameter in epoch 0"),
        ([HEAD, {"match": ".*", "last": 1, "train": True}, REST], "last: 1.* counts layers, but Own does not say"),
        ([HEAD, {"match": ".*", "first": 0, "train": True}, REST], "match: .* counts layers"),
        ([{"match": "(", "train": True}], "is not a rule"),
        ([HEAD, {"match": ".*", "trian": True}], r"trian is unknown \(nearest: train\)"),
        ({"rules": [HEAD, REST]}, "rules must be a list such as .* not {'rules'"),
        ("linear_probe", "rules must be a list"),
        (["head"], "rules must be a list"),
        ([], "no rule covers"),
    ],
)
def test_wrong_rules(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        thaw.freeze(Own(), rules)


def test_wrong_modules(classifier: Callable[..., L.LightningModule]) -> None:
    with pytest.raises(ValueError, match=r"takes a lightning\.LightningModule and rules, not Linear"):
        thaw.freeze(nn.Linear(1, 1), [REST])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LightningModule has no parameters to freeze"):
        thaw.freeze(L.LightningModule(), [REST])
    with pytest.raises(ValueError, match=r"Classifier has a freezing policy of its own"):
        thaw.freeze(classifier(), [REST])

    class Half(Layered):
        def state_names(self) -> list[str]:
            return super().state_names()[1:]

    with pytest.raises(ValueError, match=r"Half\.depths\(\) must name each parameter; .*: body\.stem\.0\.weight"):
        thaw.freeze(Half(), [HEAD, REST])


def test_fits_that_cannot_follow_the_rules() -> None:
    with pytest.raises(ValueError, match=r"4 tensors that the rules train .* no optimizer \(body\.top\.0\.weight, "):
        fitted(Own("the head"), RULES)
    settings: dict[str, Any] = QUIET | {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu"}
    module = Own()
    callback = thaw.freeze(module, RULES)
    with pytest.raises(ValueError, match="fits another module"):
        L.Trainer(callbacks=callback, **settings).fit(Own(), loader())
    module.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"parameters have changed since \(extra\.bias, extra\.weight\)"):
        L.Trainer(callbacks=callback, **settings).fit(module, loader())
    strategy = type("Sharded", (L.pytorch.strategies.DDPStrategy,), {})(accelerator="cpu")  # as DeepSpeed's is
    spawned = L.pytorch.strategies.DDPStrategy(accelerator="cpu", start_method="spawn")
    for refused, name in ((strategy, "Sharded"), (spawned, "DDPStrategy by spawn")):
        with pytest.raises(ValueError, match=f"not with {name}"):
            callback.setup(type("Trainer", (), {"strategy": refused}), module, "fit")  # type: ignore[arg-type]


def test_the_rules_are_those_of_the_shipped_policies(policy: Callable[..., FreezePolicy]) -> None:
    """Policies that match names alone do for a module with a backbone and a head."""
    module = Own()
    module.backbone = module.body
    del module.body
    for name in ("linear_probe", "lp_ft", "bias_only"):
        rules = [{"match": r.match, "train": r.train, "from_epoch": r.from_epoch} for r in policy(name).rules]
        assert thaw.freeze(module, rules).thaw.epochs.keys() == dict(module.named_parameters()).keys()
