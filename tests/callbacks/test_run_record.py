"""Configurations that differ between processes; that ranks refuse together is tested on two processes."""

import pytest
import torch

from thaw.callbacks.run_record import by_dotted_key, check_same_config


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Stands for what the other ranks have; this one is rank 0."""
    others: list[dict] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1 + len(others))

    def all_gather_object(values: list, own: object) -> None:
        one_hash = isinstance(own, str)
        values[:] = [own, *(repr(each) if one_hash else by_dotted_key(each) for each in others)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    return others


def test_each_key_is_named_once_with_the_values_of_all_ranks(ranks: list[dict]) -> None:
    own = {"seed": 0, "optim": {"lr": 0.1}, "model": {"optim": "${optim}"}, "run_dir": "a"}
    ranks += [
        {"seed": 0, "optim": {"lr": 0.2}, "model": {"optim": {"lr": 0.2}}, "run_dir": "a"},
        {"seed": 0, "optim": {"lr": 0.1}, "model": {"optim": {"lr": 0.1}}, "run_dir": "b", "new": None},
    ]
    with pytest.raises(ValueError, match="The 3 processes of this run have different") as error:
        check_same_config(own)
    message = str(error.value)
    assert "optim.lr is 0.1 on rank 0, 2 and 0.2 on rank 1" in message
    assert 'run_dir is "a" on rank 0, 1 and "b" on rank 2' in message
    assert "new is missing on rank 0, 1 and null on rank 2" in message
    assert "model.optim" not in message and "seed" not in message


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda *_: pytest.fail("asked"))
    check_same_config({"seed": 0})


@pytest.mark.parametrize("nested", [{}, {"a": {}}, {"a": []}, {"a": {"b": None}}])
def test_nothing_is_lost_when_it_is_flat(nested: dict) -> None:
    leaves = by_dotted_key(nested)
    assert len(leaves) == 1 and leaves != by_dotted_key({"a": 1})
