import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf

from thaw.run import ranks as processes


@pytest.mark.parametrize(
    ("accelerator", "devices", "count"),
    [("cpu", 1, 1), ("cpu", 2, 2), ("cpu", "auto", 1), ("gpu", [0, 3], 2), ("gpu", "auto", 4), ("gpu", -1, 4)],
)
def test_num_processes(accelerator: str, devices: object, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert processes.num_processes(OmegaConf.create({"accelerator": accelerator, "devices": devices})) == count


LAUNCHERS = {
    "plain": ({}, False),
    "torchrun, or a child of rank 0": ({"LOCAL_RANK": "0"}, True),
    "sbatch script of one task": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
    "sbatch script of two tasks": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),
    "srun of one task": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, False),
    "srun of two tasks": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, True),
}
OURS = ("LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", processes.PARENT)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_is_launched(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, launched = LAUNCHERS[launcher]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.is_launched() == launched


TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "stray"),
    [
        ({"RANK": "1"}, {"RANK"}),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, {"RANK", "WORLD_SIZE"}),
        ({"LOCAL_RANK": "1"}, {"LOCAL_RANK"}),
        ({"TORCHELASTIC_RUN_ID": "x"}, {"TORCHELASTIC_RUN_ID"}),
        ({"SLURM_PROCID": "1"}, {"SLURM_PROCID"}),
        ({"SLURM_NTASKS": "1"}, {"SLURM_NTASKS"}),
        (TORCHRUN, set()),
        (SRUN, set()),
        ({"LOCAL_RANK": "1", processes.PARENT: "1"}, set()),
        ({}, set()),
    ],
)
def test_stray_ranks(
    environment: dict[str, str], stray: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*processes.PLACE, *processes.SLURM_PLACE, "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.drop_stray_ranks()
    assert {name for name in environment if name not in os.environ} == stray
    said = capsys.readouterr().err
    assert all(f"{name}={environment[name]}" in said for name in stray) and bool(said) == bool(stray)


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "message"),
    [
        ({}, 2, 1, None),
        ({}, 1, 2, "num_nodes=2 needs a process for each device on 2 machines"),
        (TORCHRUN, 2, 1, None),
        (TORCHRUN, 1, 2, None),
        (TORCHRUN, 1, 1, r"started 2 process\(es\), but trainer.devices=1 and trainer.num_nodes=1 ask for 1"),
        (SRUN, 4, 1, r"started 2 process\(es\), but trainer.devices=4 and trainer.num_nodes=1 ask for 4"),
    ],
)
def test_the_processes_are_those_that_were_asked_for(
    environment: dict[str, str], devices: int, nodes: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in processes.PLACE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        processes.check_world(devices, nodes)


def test_lightning_does_not_take_our_ranks_for_sruns(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch script: Lightning would expect srun to start the ranks, wherever it sees SLURM_NTASKS."""
    monkeypatch.setattr(processes, "start_rank", lambda *_: subprocess.Popen([sys.executable, "-c", ""]))
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for devices in (1, 2):
        cfg = OmegaConf.create(
            {"trainer": {"accelerator": "cpu", "devices": devices}, "run_dir": str(tmp_path), "rank_timeout": 9}
        )
        assert SLURMEnvironment.detect()
        with processes.ranks(cfg, {}):
            assert not SLURMEnvironment.detect()
        assert os.environ["SLURM_NTASKS"] == "2"


@pytest.mark.parametrize(
    ("program", "run"), [("train.py", "train.py"), ("mine.py", "mine.py"), ("sweep.py", "train.py")]
)
def test_command_of_a_run(program: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sweep.py, which composes its runs itself, a rank is one of train.py beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [program, "-m", "optim.lr=1,2"])
    command = processes.run_command(tmp_path / "a run", "rank1")
    assert command[:2] == [sys.executable, str(tmp_path / run)]
    assert command[2:] == [
        *("--config-path", str(tmp_path / "a run"), "--config-name", "config.yaml"),
        *(f"hydra.run.dir='{tmp_path}/a run'", "hydra.output_subdir=null", "hydra.job.name=rank1"),
    ]


def test_everything_is_put_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 and the children see the same rendezvous; afterwards nothing of it is left, also after an error."""
    started = []

    def start_rank(rank: int, run_dir: object) -> subprocess.Popen:
        started.append((rank, os.environ["MASTER_PORT"], os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]))
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    monkeypatch.setattr(processes, "start_rank", start_rank)
    monkeypatch.setenv("MASTER_PORT", "kept")
    before, threads = dict(os.environ), torch.get_num_threads()
    cfg = OmegaConf.create(
        {"trainer": {"accelerator": "cpu", "devices": 3}, "run_dir": str(tmp_path), "rank_timeout": 9}
    )
    with pytest.raises(RuntimeError, match="in the body"), processes.ranks(cfg, OmegaConf.to_container(cfg)):
        assert os.environ["LOCAL_RANK"] == "0"
        port = os.environ["MASTER_PORT"]
        raise RuntimeError("in the body")
    assert [rank for rank, *_ in started] == [1, 2]
    assert all(rest == [port, "3", str(max(1, threads // 3))] for _, *rest in started)
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads
    assert OmegaConf.load(tmp_path / processes.CONFIG_NAME).rank_timeout == 9


def test_a_launched_rank_starts_none(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "start_rank", lambda *_: pytest.fail("started a process"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    cfg = OmegaConf.create(
        {"trainer": {"accelerator": "cpu", "devices": 2}, "run_dir": str(tmp_path), "rank_timeout": 9}
    )
    with processes.ranks(cfg, {}):
        pass
