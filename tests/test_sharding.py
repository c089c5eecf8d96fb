"""What trainer=fsdp refuses, and how it finds a saved state; its training is tested in test_two_processes.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from thaw.callbacks.weight_averaging import EMA
from thaw.classifier import Classifier
from thaw.sharding import FullyShard, by_name, check


def trainer(*callbacks: Any, fn: TrainerFn = TrainerFn.FITTING) -> Any:
    return SimpleNamespace(state=SimpleNamespace(fn=fn), callbacks=list(callbacks))


@pytest.mark.parametrize("name", ["full", "linear_probe", "last_blocks", "lora", "dora", "ssf"])
def test_policies_without_a_schedule_are_sharded(classifier: Callable[..., Classifier], name: str) -> None:
    check(classifier(name), trainer())


def test_what_cannot_be_sharded(classifier: Callable[..., Classifier]) -> None:
    with pytest.raises(ValueError, match=r"cannot thaw on the way, .* thaws after 1 epochs; use trainer=ddp"):
        check(classifier("gradual"), trainer())
    check(classifier("gradual"), trainer(fn=TrainerFn.TESTING))
    with pytest.raises(ValueError, match=r"cannot average weights, as average=ema and optim=schedulefree do"):
        sharded = SimpleNamespace(strategy=FullyShard())
        EMA(0.9).setup(sharded, classifier("full"), "fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shards a Classifier, not a Linear"):
        check(nn.Linear(1, 1), trainer())


def test_a_saved_state_finds_its_parameters_by_the_order_of_groups() -> None:
    """As torch's own `load_state_dict` does; the groups have the parameters in another order than the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = model

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [second.weight, first.weight]}, {"params": [second.bias]}])

    saved = optimizer()
    model(torch.randn(4, 2)).square().sum().backward()
    saved.step()
    named = by_name(saved.state_dict(), optimizer(), model)
    expected = {name: saved.state[p] for name, p in model.named_parameters() if p in saved.state}
    assert named["state"].keys() == expected.keys() == {"0.weight", "1.weight", "1.bias"}
    for name, values in expected.items():
        assert torch.equal(named["state"][name]["exp_avg"], values["exp_avg"]), name
    assert [group["params"] for group in named["param_groups"]] == [["1.weight", "0.weight"], ["1.bias"]]
