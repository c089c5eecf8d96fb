"""Folders are named by what is run."""

from pathlib import Path

import pytest
from conftest import compose_run
from omegaconf import OmegaConf

from thaw.run import folders
from thaw.run.config import plain, settle


def key(tmp_path: Path, *overrides: str) -> str:
    return folders.job_key(compose_run(tmp_path, "experiment=vit_linear_probe", *overrides))


@pytest.mark.parametrize(
    "same", ["cache.dir=/elsewhere", "logger=csv", "test=false", "optim.lr=0.03", "cache.max_gb=1", "optim.lr=3e-2"]
)
def test_what_changes_no_weight_changes_no_key(same: str, tmp_path: Path) -> None:
    assert key(tmp_path / "other", same) == key(tmp_path)


@pytest.mark.parametrize("other", ["optim.lr=0.04", "seed=1", "cache.mode=off", "freeze=lora", "data.train_size=100"])
def test_what_changes_a_weight_changes_the_key(other: str, tmp_path: Path) -> None:
    assert key(tmp_path, other) != key(tmp_path)


def test_the_key_survives_the_file(tmp_path: Path) -> None:
    """A job that is started from its config.yaml knows its folder as its own."""
    cfg = compose_run(tmp_path)
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(plain(cfg)), path)
    assert folders.job_key(OmegaConf.load(path)) == folders.job_key(cfg)
    settle(cfg)
    assert folders.job_key(cfg) != folders.job_key(OmegaConf.load(path))  # so keys are taken before `settle`


def test_a_sweep_is_named_by_its_command_in_any_order() -> None:
    def of(*task: str) -> str:
        return folders.sweep_key(OmegaConf.create({"name": "probe", "hydra": {"overrides": {"task": list(task)}}}))

    assert of("a=1,2", "b=3") == of("b=3", "a=1,2") != of("a=1,2", "b=4")
    assert of("a=1").startswith("probe_")


def test_a_run_has_the_time_or_the_jobs_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert folders.run_id("k") != folders.run_id("k")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert folders.run_id("k") == "slurm_7_k"
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # a shell in an allocation: several runs, one after another
    assert "slurm" not in folders.run_id("k")


def test_ranks_of_torchrun_ask_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, value in (
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", str(store.port)),
        ("TORCHELASTIC_RUN_ID", "none"),
    ):
        monkeypatch.setenv(name, value)
    ids = []
    for rank in ("0", "1", "0"):  # the last one was started again
        monkeypatch.setenv("RANK", rank)
        ids.append(folders.run_id("k"))
    assert len(set(ids)) == 1
