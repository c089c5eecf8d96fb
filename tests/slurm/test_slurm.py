"""Sweeps, runs of two processes and preempted runs on a real SLURM of one node, which is started here and stopped.

`make test-slurm` installs what it needs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
if MISSING:
    pytest.skip(f"no {', '.join(MISSING)}: make test-slurm installs them", allow_module_level=True)
if os.geteuid() != 0:
    pytest.skip("only root may start slurmd", allow_module_level=True)
pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="make test-slurm installs submitit", exc_type=ImportError
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

RUN = ["experiment=vit_last_blocks", "augment=affine", "data.source=sample", "data.train_size=256"]
RUN += ["data.batch_size=16", "trainer.precision=32-true", "callbacks.early_stopping=null"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    script = ROOT / "tests" / "slurm" / "cluster.sh"
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        environment.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("WANDB_MODE", "offline")
        try:
            subprocess.run([script, "start", folder], check=True)
            yield
        finally:
            subprocess.run([script, "stop", folder], check=True)


def wait_for(what: str, is_so: Callable[[], Any], seconds: float = 120) -> Any:
    """What `is_so` returns, once it is something."""
    until = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)
    return found


def state(job: str) -> str:
    """State of a job that was submitted in the last minutes, such as RUNNING."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], check=True, capture_output=True, text=True)
    return re.findall(r"JobState=(\w+)", shown.stdout)[0]


def says(file: Path, text: str) -> Callable[[], bool]:
    return lambda: file.exists() and text in file.read_text()


def preempt(job: str, number: str) -> None:
    """Send a running job a signal, and have it started again at once when it is back in the queue."""
    subprocess.run(["scancel", f"--signal={number}", job], check=True)
    wait_for("requeued", lambda: state(job) == "PENDING")
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # SLURM would wait two minutes


def submit_two_tasks(folder: Path, *overrides: str) -> str:
    """`srun` of two processes in a batch job; returns its number."""
    folder.mkdir()
    options = ["--ntasks-per-node=2", "--nodes=1", f"--output={folder}/output", "--open-mode=append"]
    command = ["srun", sys.executable, str(ROOT / "train.py"), "trainer=ddp_cpu", *RUN, *overrides]
    submit = ["sbatch", "--parsable", f"--chdir={folder}", *options, f"--wrap={shlex.join(command)}"]
    return subprocess.run(submit, check=True, capture_output=True, text=True).stdout.strip()


def only_run(folder: Path) -> Path:
    (run,) = folder.glob("logs/runs/vit_last_blocks/*")
    return run


def weights(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_training(one: Path, other: Path) -> None:
    expected, got = weights(one), weights(other)
    assert (expected["epoch"], expected["global_step"]) == (got["epoch"], got["global_step"])
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, got["state_dict"][name]), name


@pytest.mark.usefixtures("cluster")
def test_two_tasks_are_one_run_and_a_preempted_one_goes_on_exactly(tmp_path: Path) -> None:
    """Two processes in step get the signal, save at the same step and are requeued; the other job is left alone."""
    job = submit_two_tasks(tmp_path / "cut", "trainer.max_epochs=4")
    wait_for("trained", says(tmp_path / "cut" / "output", "epoch 1/4"))
    preempt(job, "USR1")
    wait_for("done", lambda: state(job) == "COMPLETED")
    cut = only_run(tmp_path / "cut")  # one folder for both processes and both tries
    output = (tmp_path / "cut" / "output").read_text()
    assert output.count("SIGUSR1: step") == 1 and "was cut off; resuming" in output, output
    assert (cut / "summary.json").exists() and not (cut / "failure.json").exists(), output
    assert not list(cut.glob("hpc_ckpt*"))  # of Lightning's own handler
    ids = {folder.name.rpartition("-")[2] for folder in cut.glob("wandb/offline-run-*")}
    assert len(ids) == 1  # one W&B run, in two parts

    job = submit_two_tasks(tmp_path / "whole", "trainer.max_epochs=4")
    wait_for("done", lambda: state(job) == "COMPLETED")
    whole = only_run(tmp_path / "whole")
    assert len(list(whole.glob("wandb/offline-run-*"))) == 1
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["val/acc"] > 0.9
    assert weights(whole)["global_step"] == 4 * 256 // (16 * 2)  # two processes share the digits
    assert_same_training(whole, cut)


def sweep(folder: Path, launcher: str, meanwhile: Callable[[subprocess.Popen], None]) -> dict[str, Path]:
    """Two jobs from their own folder; returns their runs by name, and checks that one report was printed."""
    folder.mkdir()
    typed = [*RUN, "trainer.max_epochs=3", "logger=csv", "optim.lr=1e-3,3e-4", "hydra.launcher.cpus_per_task=1"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", f"hydra/launcher={launcher}", *typed]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        try:
            meanwhile(process)
            process.wait(400)  # SLURM may take two minutes to start a requeued job again
        finally:
            process.kill()
    said = (folder / "output").read_text()
    assert process.returncode == 0, said
    assert said.count("Ranked by validation") == 1 and "2 done" in said, said
    return {path.parent.name: path.parent for path in folder.glob("logs/sweeps/*/*/summary.json")}


@pytest.mark.usefixtures("cluster")
def test_a_sweep_whose_first_job_is_preempted(tmp_path: Path) -> None:
    """submitit puts the job back into the queue, and waits for it; without SLURM the same sweep gives the same."""

    def preempt_the_first(process: subprocess.Popen) -> None:
        jobs = "slurm/logs/sweeps/*/.submitit/*_0/*_0_log.out"
        (job,) = wait_for("started", lambda: process.poll() or list(tmp_path.glob(jobs)))
        wait_for("trained", says(job, "epoch 1/3"))
        preempt(job.parent.name, "USR2")

    runs = sweep(tmp_path / "slurm", "submitit_slurm", preempt_the_first)
    (job,) = tmp_path.glob("slurm/logs/sweeps/*/.submitit/*_0/*_0_log.out")
    assert job.read_text().count("SIGUSR2: step") == 1 and "resuming from its last" in job.read_text()

    expected = sweep(tmp_path / "local", "submitit_local", lambda process: None)
    assert len(expected) == 2 and runs.keys() == expected.keys()
    for name, run in expected.items():
        assert_same_training(run, runs[name])
