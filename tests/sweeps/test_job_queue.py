"""A process per job: as many at once as there is room for, and none is affected by the end of another."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from thaw.run import console
from thaw.sweeps import job_queue, machine

Sweep = Callable[..., int]
QUEUE = "hydra/launcher=queue"

# A stand-in for the program: does by the job's seed what a training might do.
PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import yaml
folder = Path(sys.argv[1])
cfg = yaml.safe_load((folder / "config.yaml").read_text())
cores = sorted(os.sched_getaffinity(0))
record = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "THAW_PARENT")}
(folder / "seen.json").write_text(json.dumps(record | {"cores": cores, "start": time.time(), "test": cfg["test"]}))
print("epoch 1/2 going", flush=True)
if cfg["seed"] == 1: os.kill(os.getpid(), signal.SIGKILL)
if cfg["seed"] == 2: sys.exit(3)
if cfg["seed"] == 8: sys.exit(128 + signal.SIGTERM)
if cfg["seed"] == 9: sys.exit(3) if not (folder / "failure.json").exists() else os.kill(os.getpid(), signal.SIGKILL)
if cfg["seed"] == 3:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    time.sleep(60)
time.sleep(2 if cfg["seed"] == 7 else 0.4)
facts = {"val/acc": 0.9, "test/acc": None, "name": cfg["name"], "overrides": cfg["overrides"], "seed": cfg["seed"]}
(folder / "summary.json").write_text(json.dumps(facts | {"run_dir": str(folder), "end": time.time()}))
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(
        job_queue, "run_command", lambda folder, _: [sys.executable, str(tmp_path / "program.py"), str(folder)]
    )
    monkeypatch.setattr(job_queue, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(job_queue, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(machine, "free_cores", lambda: ["0", "1"])


def by_seed(sweep: Path, file: str) -> dict[int, dict]:
    folders = [path.parent for path in sweep.glob("*/config.yaml")]
    found = {int(OmegaConf.load(folder / "config.yaml").seed): folder / file for folder in folders}
    return {seed: json.loads(path.read_text()) for seed, path in found.items() if path.exists()}


def test_a_killed_and_a_failed_job_touch_no_other(sweep: Sweep, tmp_path: Path, capsys) -> None:
    assert sweep(QUEUE, "seed=0,1,2,4") == 1
    assert by_seed(tmp_path / "sweep", "summary.json").keys() == {0, 4}
    failures = by_seed(tmp_path / "sweep", "failure.json")
    assert [failures[seed]["status"] for seed in (1, 2)] == ["killed", "failed"]
    assert "SIGKILL" in failures[1]["reason"] and "exit status 3" in failures[2]["reason"]
    assert "epoch 1/2 going" in failures[2]["traceback"]  # the end of its output
    printed = capsys.readouterr().out
    assert "4/4" in printed and "seed=1: killed: ended by SIGKILL" in printed and "done, val/acc 90.00%" in printed
    before = {seed: seen["start"] for seed, seen in by_seed(tmp_path / "sweep", "seen.json").items()}
    assert sweep(QUEUE, "seed=0,1,2,4") == 1
    after = {seed: seen["start"] for seed, seen in by_seed(tmp_path / "sweep", "seen.json").items()}
    assert {seed for seed in before if after[seed] != before[seed]} == {1, 2}  # what was done did not run again


def test_the_last_end_of_a_job_counts(sweep: Sweep, tmp_path: Path) -> None:
    """A handled signal counts as killed, and the record is that of the last try."""
    ends = []
    for _ in range(2):
        assert sweep(QUEUE, "seed=8,9") == 1
        failures = by_seed(tmp_path / "sweep", "failure.json")
        ends.append([(failures[seed]["status"], failures[seed]["reason"].split(";")[0]) for seed in (8, 9)])
    assert ends == [
        [("killed", "ended by SIGTERM"), ("failed", "ended with exit status 3")],
        [("killed", "ended by SIGTERM"), ("killed", "ended by SIGKILL")],
    ]


@pytest.mark.long
def test_jobs_at_once_have_cores_of_their_own(sweep: Sweep, tmp_path: Path) -> None:
    """Two cores, one thread each: two at a time; a job of two processes has both."""
    assert sweep(QUEUE, "seed=0,4,5", "trainer=cpu,ddp_cpu") == 0
    seen = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/seen.json")]
    ends = [json.loads(path.read_text())["end"] for path in (tmp_path / "sweep").glob("*/summary.json")]
    spans = [(one["start"], end, set(one["cores"])) for one, end in zip(seen, ends, strict=True)]
    for start, end, cores in spans:
        for other_start, other_end, others in spans:
            if (start, end) != (other_start, other_end) and start < other_end and other_start < end:
                assert not cores & others
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        assert sorted(len(one["cores"]) for one in seen) == [1, 1, 1, 2, 2, 2]
    assert all(one["OMP_NUM_THREADS"] == str(len(one["cores"])) for one in seen)
    assert all(one["CUDA_VISIBLE_DEVICES"] == "" and one["test"] is False for one in seen)
    assert all(one["THAW_PARENT"] == str(os.getpid()) for one in seen)  # without which a job ends, see `end_with`


def test_each_gpu_job_sees_its_own(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, two for each job: two at a time."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(machine, "free_gpus", lambda _: ["0", "1", "2", "3"])
    assert sweep(QUEUE, "seed=0,4,5,6", "trainer=ddp", "trainer.devices=2") == 0
    seen = by_seed(tmp_path / "sweep", "seen.json")
    ends = {seed: facts["end"] for seed, facts in by_seed(tmp_path / "sweep", "summary.json").items()}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen.values()} == {"0,1", "2,3"}
    last = [seed for seed, _ in sorted(seen.items(), key=lambda item: item[1]["start"])][2:]
    assert all(seen[seed]["start"] > min(ends.values()) for seed in last)


def test_the_time_limit(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep(QUEUE, "seed=3,4", "hydra.launcher.minutes=0.02") == 1
    failures = by_seed(tmp_path / "sweep", "failure.json")
    assert failures[3]["status"] == "timeout" and "0.02 minutes" in failures[3]["reason"]
    assert by_seed(tmp_path / "sweep", "summary.json").keys() == {4}
    assert not alive(tmp_path)


def alive(tmp_path: Path) -> list[int]:
    """Processes that jobs have started and that are still there."""
    pids = [int(path.read_text()) for path in (tmp_path / "sweep").glob("*/child")]
    assert pids
    time.sleep(0.2)  # a killed process takes a moment to go
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return [pid for pid, stat in zip(pids, states, strict=True) if stat.exists() and " Z " not in stat.read_text()]


@pytest.mark.parametrize("wanted", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_an_interruption_ends_all(wanted: signal.Signals, sweep: Sweep, tmp_path: Path, capsys) -> None:
    def interrupt() -> None:
        while not list((tmp_path / "sweep").glob("*/child")):
            time.sleep(0.05)
        os.kill(os.getpid(), wanted)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell without job control
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    assert sweep(QUEUE, "seed=3,4,5,6") == 130
    assert "4 runs of 1 setting: " in capsys.readouterr().out  # also those that have not started
    assert not alive(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not by_seed(tmp_path / "sweep", "failure.json")  # cut off, not failed


def test_more_gpus_than_there_are(sweep: Sweep, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(machine, "free_gpus", lambda _: ["3"])
    assert sweep(QUEUE, "seed=0,4", "trainer=ddp", "trainer.devices=2") == 1
    assert "needs 2 GPUs; free here: 1" in capsys.readouterr().err


def fake_nvidia_smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_free_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake_nvidia_smi(tmp_path, "0, GPU-a, 17\n1, GPU-b, 40000\n2, GPU-c, 3", monkeypatch)
    assert machine.free_gpus("auto") == ["0", "2"]
    assert machine.free_gpus([1]) == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-c,GPU-a")
    assert machine.free_gpus("auto") == ["GPU-c", "GPU-a"]
    assert machine.free_gpus([0]) == ["GPU-b"]
    with pytest.raises(ValueError, match="5 is not one of the 3 GPUs"):
        machine.free_gpus([5])
    fake_nvidia_smi(tmp_path, "0, GPU-a, 9000\n1, GPU-b, 9000\n2, GPU-c, 9000", monkeypatch)
    with pytest.raises(ValueError, match="Other programs use all 3 GPUs"):
        machine.free_gpus("auto")


@pytest.mark.long
def test_lines_on_a_terminal(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "stream_console", cache(console.stream_console.__wrapped__))  # knows no terminal
    assert sweep(QUEUE, "seed=0,2,7") == 1
    printed = capsys.readouterr().out
    assert "epoch 1/2 going" in printed and "core 1" in printed  # of running jobs
    assert "2 of 3 jobs ended, about " in printed
