import os
import subprocess
import sys
import threading

import pytest
import torch
from omegaconf import OmegaConf

from thaw.sweeps import processes


@pytest.mark.parametrize(
    ("accelerator", "devices", "count"),
    [("cpu", 1, 1), ("cpu", 2, 2), ("cpu", "auto", 1), ("gpu", [0, 3], 2), ("gpu", "auto", 4), ("gpu", -1, 4)],
)
def test_num_processes(accelerator: str, devices: object, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert processes.num_processes(OmegaConf.create({"accelerator": accelerator, "devices": devices})) == count


def test_everything_is_put_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 and the children see the same rendezvous; afterwards nothing of it is left, also after an error."""
    started = []

    def start_rank(rank: int, run_dir: object) -> subprocess.Popen:
        started.append((rank, os.environ["MASTER_PORT"], os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]))
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    monkeypatch.setattr(processes, "start_rank", start_rank)
    monkeypatch.setenv("MASTER_PORT", "kept")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before, threads = dict(os.environ), torch.get_num_threads()
    cfg = OmegaConf.create({"trainer": {"accelerator": "cpu", "devices": 3}, "run_dir": str(tmp_path), "x": 1})
    with pytest.raises(RuntimeError, match="in the body"), processes.ranks(cfg, OmegaConf.to_container(cfg)):
        assert os.environ["LOCAL_RANK"] == "0"
        port = os.environ["MASTER_PORT"]
        raise RuntimeError("in the body")
    assert [rank for rank, *_ in started] == [1, 2]
    assert all(rest == [port, "3", str(max(1, threads // 3))] for _, *rest in started)
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads
    assert OmegaConf.load(tmp_path / processes.CONFIG_NAME).x == 1


def test_a_launched_rank_starts_none(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "start_rank", lambda *_: pytest.fail("started a process"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    cfg = OmegaConf.create({"trainer": {"accelerator": "cpu", "devices": 2}, "run_dir": str(tmp_path)})
    with processes.ranks(cfg, {}):
        pass


def test_a_failed_rank_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.1)
    exits = []
    monkeypatch.setattr(processes.os, "_exit", lambda status: (exits.append(status), ended.set()))
    ended = threading.Event()
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    child.wait()
    processes.watch([child], ended)
    assert exits == [1]
    assert "rank 1 ended with an error" in capsys.readouterr().err
