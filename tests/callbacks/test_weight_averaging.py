"""Averages compared with ones computed by hand from the weights after each step, on a net of a few numbers."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thaw.callbacks.weight_averaging import EMA
from thaw.run.values import check_types

STEPS = 4  # an epoch
AVERAGED = {"thawed.0.weight", "thawed.0.bias", "last.weight"}  # no statistics of norms
State = dict[str, Tensor]


class Net(L.LightningModule):
    """A frozen and a thawed part, each with a batch norm; the thawed one's has no parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)
        self.thawed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False, momentum=0.3))
        self.last = nn.Linear(4, 2, bias=False)
        self.frozen[1].running_mean.fill_(-0.0)
        self.thawed.register_buffer("unsaved", torch.tensor(-torch.inf), persistent=False)
        self.seen: list[State] = []  # in validation and test

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.last(self.thawed(self.frozen(batch))), (batch[:, 0] > 0).long())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(copy(self))
        self.log("val/acc", float(len(self.seen)))  # each better than the one before

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(copy(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5, momentum=0.9)


class Watch(Callback):
    """The weights after each batch, and again at the end of each epoch, after its validations."""

    def __init__(self) -> None:
        self.batches: list[State] = []
        self.epochs: list[State] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.batches.append(copy(pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(copy(pl_module))


def copy(module: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def loader(batches: int = STEPS) -> DataLoader:
    data = torch.randn(batches, 8, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(list(data), batch_size=None)  # type: ignore[arg-type]


def fit(model: Net, *callbacks: Callback, epochs: int = 3, ckpt_path: Path | None = None, **changes: Any) -> L.Trainer:
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "inference_mode": True}
    settings |= {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **(settings | changes))
    trainer.fit(model, loader(), loader(1), ckpt_path=ckpt_path)
    return trainer


def saving(folder: Path, name: str = "{epoch}") -> ModelCheckpoint:
    return ModelCheckpoint(folder, name, monitor="val/acc", mode="max", save_top_k=-1, save_on_train_epoch_end=False)


def ema_by_hand(states: list[State], name: str, decay: float) -> Tensor:
    average = states[0][name].double()
    for n, state in enumerate(states[1:], start=1):
        kept = min(decay, n / (n + 9))
        average = kept * average + (1 - kept) * state[name].double()
    return average.float()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """-0.0 and 0.0 differ."""
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def assert_averaged(state: State, average: dict[str, Tensor], raw: State) -> None:
    """What is averaged equals the average; everything else the module's tensors, to the bit."""
    assert average.keys() == AVERAGED and state.keys() == raw.keys()
    for name, tensor in state.items():
        if name in average:
            torch.testing.assert_close(tensor, average[name], msg=name)
        else:
            assert same_bits(tensor, raw[name]), name


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_ema_by_hand(decay: float) -> None:
    model, watch = Net(), Watch()
    before = copy(model)
    fit(model, EMA(decay), watch)
    assert len(watch.batches) == 3 * STEPS and len(model.seen) == 3
    for epoch, seen in enumerate([*model.seen, copy(model)]):  # also what is left after training
        states = watch.batches[: STEPS * (epoch + 1)]
        assert_averaged(seen, {name: ema_by_hand(states, name, decay) for name in AVERAGED}, states[-1])
        assert not torch.equal(seen["last.weight"], states[-1]["last.weight"])
    for name, tensor in copy(model).items():
        if name.startswith("frozen"):
            assert same_bits(tensor, before[name]), name


def test_training_does_not_notice() -> None:
    """Every step, in epochs after validations too, is as without averaging."""
    with_it, without = Watch(), Watch()
    fit(Net(), EMA(0.9), with_it, val_check_interval=0.5)
    fit(Net(), without, val_check_interval=0.5)
    for one, other in zip(with_it.batches + with_it.epochs, without.batches + without.epochs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_accumulated_gradients_count_once() -> None:
    averaging, watch = EMA(0.999), Watch()
    model = Net()
    fit(model, averaging, watch, epochs=2, accumulate_grad_batches=2)
    average = {name: ema_by_hand(watch.batches[1::2], name, 0.999) for name in AVERAGED}
    assert averaging.updates == 4
    assert_averaged(copy(model), average, watch.batches[-1])


def test_checkpoint_holds_the_average_and_the_current_weights(tmp_path: Path) -> None:
    """Whoever validates or tests it, after training or with another trainer, gets the average."""
    model, watch = Net(), Watch()
    trainer = fit(model, EMA(0.9), watch, saving(tmp_path))
    path = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(path)
    averaged, current = model.seen[1], watch.batches[2 * STEPS - 1]
    assert checkpoint["state_dict"].keys() == averaged.keys()
    assert all(torch.equal(checkpoint["state_dict"][name], averaged[name]) for name in averaged)
    assert checkpoint["current_weights"].keys() == AVERAGED
    assert all(torch.equal(tensor, current[name]) for name, tensor in checkpoint["current_weights"].items())
    other = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    for tester in (trainer, other):
        for run in (tester.validate, tester.test):
            model.seen.clear()
            run(model, loader(1), ckpt_path=path, verbose=False)
            assert all(torch.equal(tensor, averaged[name]) for name, tensor in model.seen[-1].items())


@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_equals_uninterrupted(tmp_path: Path, epoch: int) -> None:
    whole, watch = Net(), Watch()
    fit(whole, EMA(0.9), watch, saving(tmp_path), epochs=4)
    resumed, rest = Net(), Watch()
    fit(resumed, EMA(0.9), rest, epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    pairs = [*zip(whole.seen[epoch + 1 :], resumed.seen, strict=True), (copy(whole), copy(resumed))]
    pairs += zip(watch.batches[STEPS * (epoch + 1) :], rest.batches, strict=True)
    for expected, got in pairs:
        assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


def test_resumed_after_its_end(tmp_path: Path) -> None:
    """No step is trained, and what is validated afterwards is the average."""
    whole, resumed = Net(), Net()
    fit(whole, EMA(0.9), ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=True), epochs=2)
    trainer = fit(resumed, EMA(0.9), epochs=2, ckpt_path=tmp_path / "end.ckpt")
    assert not resumed.seen
    for path in (None, tmp_path / "end.ckpt"):
        trainer.validate(resumed, loader(1), ckpt_path=path, verbose=False)
        assert all(torch.equal(tensor, resumed.seen[-1][name]) for name, tensor in copy(whole).items())


def test_resumed_from_a_run_without_averaging(tmp_path: Path) -> None:
    """The average starts there."""
    fit(Net(), saving(tmp_path), epochs=2)
    model, watch = Net(), Watch()
    fit(model, EMA(0.9), watch, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_averaged(copy(model), {name: ema_by_hand(watch.batches, name, 0.9) for name in AVERAGED}, watch.batches[-1])


def test_averages_in_full_precision() -> None:
    """An average of bf16 weights takes in what one update alone would lose in bf16."""
    averaging = EMA(0.9999)
    model: Any = nn.Linear(1, 1, bias=False).bfloat16()
    averaging.live = {"weight": model.weight}
    averaging.updates = 10**6
    averaging.average = {"weight": torch.ones(1, 1)}
    nn.init.constant_(model.weight, 2)
    for step in (1, 2, 3):
        averaging.on_train_batch_end(type("Trainer", (), {"global_step": step}))  # type: ignore[arg-type]
    torch.testing.assert_close(averaging.average["weight"].item(), 2 - 0.9999**3)


@pytest.mark.parametrize("decay", [0, 1, 1.5, -0.1, float("nan")])
def test_decay_out_of_range(decay: float) -> None:
    settings = OmegaConf.create({"average": {"_target_": "thaw.callbacks.weight_averaging.EMA", "decay": decay}})
    with pytest.raises(ValueError, match=r"average\.decay=.* must be a number above 0 and below 1; .*average=none"):
        check_types(settings)
