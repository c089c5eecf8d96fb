"""What offline W&B runs hold, read back with W&B's own `wandb leet inspect`."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, compose_run
from omegaconf import OmegaConf
from run.test_loggers import no_settings, settings  # noqa: F401  # the fixture keeps this machine's key out

from thaw.classifier import Classifier
from thaw.run import loggers

WANDB = [sys.executable, "-m", "wandb"]
OFFLINE = ["logger=[csv,wandb]", "logger.wandb.mode=offline", "test=false", "trainer.log_every_n_steps=1"]


def run_folders(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "wandb").glob("offline-run-*"))


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a W&B run's folder, in the order of writing."""
    shown = subprocess.run([*WANDB, "leet", "inspect", "--json", folder], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def of_type(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def merged(updates: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for update in updates for key, value in update.get("update", {}).items()}


def history(found: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric."""
    items = [record["item"] for record in of_type(found, "history")]
    return [(item["trainer/global_step"], item[key]) for item in items if key in item]


def in_csv(run_dir: Path, key: str) -> list[tuple[int, float]]:
    with (run_dir / "csv" / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row[key]]


@pytest.fixture
def run_settings(tiny_run: list[str]) -> list[str]:
    linear_probe = ["experiment=vit_linear_probe", "trainer.max_epochs=3", "cache.mode=off"]
    return [*(setting for setting in tiny_run if setting != "logger=none"), *linear_probe, *OFFLINE]


def test_a_run_reads_back(train: Callable[..., Path], run_settings: list[str]) -> None:
    run_dir = train(*run_settings, "optim.lr=3e-3", "logger.wandb.job_type=probe")
    (folder,) = run_folders(run_dir)
    found = records(folder)

    config = merged(of_type(found, "config"))
    wanted = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=True)
    assert isinstance(wanted, dict)
    assert {key: config[key] for key in wanted} == json.loads(json.dumps(wanted))
    assert config["optim"]["lr"] == 3e-3

    for key in ("val/acc", "val/loss", "train/loss"):
        assert len(history(found, key)) >= 3
        assert history(found, key) == in_csv(run_dir, key), key

    summary = merged(of_type(found, "summary"))
    assert summary["val/acc"] == pytest.approx(
        max(value for _, value in history(found, "val/acc")), abs=1e-6
    )  # rounded
    assert summary["val/loss"] == min(value for _, value in history(found, "val/loss"))

    (run,) = of_type(found, "run")
    assert run["run_group"] == "test"  # the folder above the run's
    assert run["display_name"] == "vit_linear_probe"
    typed = OmegaConf.merge(OmegaConf.load(run_dir / "config.yaml"), {"overrides": "optim.lr=3e-3"})
    assert typed.logger.wandb.name == "vit_linear_probe optim.lr=3e-3"
    name = "vit_tiny_patch16_224 with patch_size 7, depth 3, embed_dim 32, num_heads 2 from tiny.safetensors"
    assert (run["job_type"], run["tags"]) == ("probe", ["MNIST", name[:64]])  # W&B takes no longer ones
    assert not [record for record in found if record["type"] == "artifact"]  # unless log_model is set


def test_the_best_value_stays_in_the_summary(tmp_path: Path) -> None:
    logger = loggers.wandb_logger(**settings(mode="offline", run_dir=str(tmp_path)))
    for step, (acc, loss) in enumerate([(0.1, 3.0), (0.9, 1.0), (0.5, 2.0)]):
        logger.log_metrics({"val/acc": acc, "val/loss": loss, "train/loss": loss}, step=step)
    loggers.add_to_summary([logger], {"seconds": 1.5, "test/acc": None})
    loggers.finish([logger])
    summary = merged(of_type(records(*run_folders(tmp_path)), "summary"))
    assert (summary["val/acc"], summary["val/loss"], summary["train/loss"]) == (0.9, 1.0, 2.0)
    assert summary["seconds"] == 1.5 and "test/acc" not in summary


def test_a_run_that_was_cut_off_goes_on_as_the_same_run(
    train: Callable[..., Path], run_settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """4 steps an epoch, cut in the second: its validations are those of a run without a break."""
    step = Classifier.training_step

    def crash(self: Classifier, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == 6:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    whole = train(*run_settings, name="whole")
    monkeypatch.setattr(Classifier, "training_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train(*run_settings, name="cut")
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    import train as script

    cut = whole.parent / "cut"
    script.main(compose_run(cut, f"cache.dir={tmp_path / 'cache'}", *run_settings))

    first, second = (records(folder) for folder in run_folders(cut))
    assert of_type(first, "run")[0]["run_id"] == of_type(second, "run")[0]["run_id"]
    assert of_type(first, "exit")[0]["exit_code"] == 143 and of_type(first, "preempting"), "it can be resumed"
    assert "exit_code" not in of_type(second, "exit")[0] or of_type(second, "exit")[0]["exit_code"] == 0
    (reference,) = (records(folder) for folder in run_folders(whole))
    assert history(second, "val/acc")
    assert history(first, "val/acc") + history(second, "val/acc") == history(reference, "val/acc")
    losses = dict(history(first, "train/loss")) | dict(history(second, "train/loss"))  # steps 4 and 5 are made twice
    assert losses == dict(history(reference, "train/loss"))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_code_state_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit and changes of thaw's checkout, wherever the run was started and writes; no untracked file."""
    repository, run_dir = tmp_path / "code", tmp_path / "run"
    repository.mkdir()
    (repository / "loggers.py").write_text("committed\n")
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (repository / "loggers.py").write_text("changed since\n")
    (repository / "untracked.txt").write_text("secret\n")
    monkeypatch.setattr(loggers, "__file__", str(repository / "loggers.py"))
    monkeypatch.chdir(tmp_path)

    logger = loggers.wandb_logger(**settings(mode="offline", run_dir=str(run_dir)))
    assert logger.experiment
    loggers.finish([logger])
    (folder,) = run_folders(run_dir)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    found = records(folder)
    assert of_type(found, "run")[0]["git"]["commit"] == commit
    assert "+changed since" in (folder / "files" / "diff.patch").read_text()
    uploaded = [file["path"] for record in of_type(found, "files") for file in record["files"]]
    assert "diff.patch" in uploaded
    assert not any("untracked" in path for path in uploaded)
    assert not any("secret" in path.read_text(errors="replace") for path in folder.glob("files/**/*.patch"))


def test_only_the_best_checkpoint_is_an_artifact_and_is_not_copied(
    train: Callable[..., Path], run_settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cached"))
    run_dir = train(*run_settings, "logger.wandb.log_model=true", "trainer.max_epochs=2")
    (artifact,) = of_type(records(*run_folders(run_dir)), "artifact")
    (file,) = artifact["manifest"]["contents"]
    best = run_dir / "checkpoints" / "best.ckpt"
    assert (file["local_path"], int(file["size"])) == (str(best), best.stat().st_size)
    assert "best" in artifact["aliases"]
    copies = [path for top in ("data", "cached") for path in (tmp_path / top).glob("**/*") if path.is_file()]
    assert not [path for path in copies if path.stat().st_size == best.stat().st_size]


def test_a_sweep_shows_its_jobs_in_one_folder(tmp_path: Path) -> None:
    """And uploads them with one command."""
    (tmp_path / "multirun.yaml").touch()
    ids = []
    for job in ("a", "b", "b", "b"):  # the second job was cut off, goes on, and is tested when it is done
        again = ids[-1] if len(ids) >= 2 else None
        if len(ids) == 3:
            (tmp_path / "b" / "summary.json").touch()
        logger = loggers.wandb_logger(**settings(mode="offline", run_dir=str(tmp_path / job), id=again))
        ids.append(logger.experiment.id)
        logger.log_metrics({"val/acc": 0.5}, step=0)
        if again:
            assert f"wandb sync {os.path.relpath(tmp_path)}/b/wandb/offline-run-*-{again}*" in str(
                loggers.where_to_look([logger])
            )
        loggers.finish([logger])
    links = sorted((tmp_path / "wandb").iterdir())
    shown = [path for path in links if path.name.startswith("offline-run-")]  # by leet
    assert {path.resolve().parents[1].name for path in shown} == {"a", "b"}
    (tested,) = set(links) - set(shown)
    assert tested.resolve().parents[1].name == "b"
    assert {file.stem for link in links for file in link.glob("*.wandb")} == {f"run-{id}" for id in ids}
    assert of_type(records(links[0]), "run")[0]["run_id"] in ids
    planned = subprocess.run([*WANDB, "sync", "--dry-run", *links], capture_output=True, text=True, check=True)
    assert all(f"run-{id}.wandb" in planned.stdout + planned.stderr for id in ids)


OFFLINE_RUN = """
import sys
from run.test_loggers import settings
from thaw.run import loggers
logger = loggers.wandb_logger(**settings(mode="offline", run_dir=sys.argv[1]))
logger.log_metrics({"val/acc": 0.5}, step=0)
loggers.finish([logger])
"""


@pytest.fixture
def contacted() -> Iterator[tuple[int, list[bytes]]]:
    """A server that notes what it is sent: its port, and the notes."""
    notes: list[bytes] = []

    def answer(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed: the test is over
                return
            with connection:
                connection.settimeout(1)
                notes.append(connection.recv(200))
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        yield server.getsockname()[1], notes


@pytest.mark.parametrize("telemetry", [False, pytest.param(True, marks=pytest.mark.long)])
def test_no_traffic_offline(
    telemetry: bool, contacted: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither to W&B's server nor to any other through a proxy, although a key is configured.

    With W&B's telemetry on, the same run does reach the server: this is how it would be seen.
    """
    port, notes = contacted
    here = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, here)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    if telemetry:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    strace, trace = shutil.which("strace"), tmp_path / "trace"
    traced = bool(strace) and not telemetry
    tracer = [strace, "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg", "-o", trace] if traced else []
    run = subprocess.Popen([*tracer, sys.executable, "-c", OFFLINE_RUN, tmp_path / "run"])
    while run.poll() is None and not notes:  # after the first, W&B would wait for answers
        time.sleep(0.05)
    run.kill()
    status = run.wait()
    assert bool(notes) == telemetry, notes
    assert telemetry or (status == 0 and run_folders(tmp_path / "run"))
    if traced:  # sees look-ups of names too
        calls = trace.read_text().splitlines()
        assert any("AF_UNIX" in call for call in calls)  # W&B's two processes talk
        assert not [call for call in calls if "AF_INET" in call]


def test_the_wandb_sweep_drives_train(tmp_path: Path) -> None:
    """W&B's agent expands the command; what it would run composes."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["metric"] == {"name": "val/acc", "goal": "maximize"}
    chosen = {}
    for key, space in sweep["parameters"].items():
        numbers = space.get("values") or [space["min"], space["max"]]
        assert all(isinstance(number, float) for number in numbers), key  # YAML takes 1e-3 for a string
        chosen[key] = {"value": numbers[-1]}
    known = create_sweep_command_args({"args": chosen}) | {"env": [], "interpreter": [], "program": []}
    command = [part for item in create_sweep_command(sweep["command"]) for part in known.get(item[2:-1], [item])]
    cfg = compose_run(tmp_path, *command)
    assert (cfg.name, cfg.test, cfg.logger.wandb.mode) == ("vit_linear_probe", False, "online")
    assert cfg.logger.wandb.project == sweep["project"]
    assert {key: OmegaConf.select(cfg, key) for key in chosen} == {key: of["value"] for key, of in chosen.items()}


ONNX_SESSION = """
import sys, time
if sys.argv[1] == "thaw":
    import thaw
import onnxruntime
from onnx import TensorProto, helper
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
session = onnxruntime.InferenceSession(model.SerializeToString())
time.sleep(30)
"""


@pytest.mark.long
@pytest.mark.parametrize("who", ["thaw", "another program"])
def test_onnxruntime_reports_nothing(
    who: str, contacted: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without thaw it does, some seconds after a session was made: this is how it would be seen."""
    port, notes = contacted
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    run = subprocess.Popen([sys.executable, "-c", ONNX_SESSION, who])
    while run.poll() is None and not notes:
        time.sleep(0.05)
    run.kill()
    run.wait()
    assert bool(notes) == (who != "thaw"), notes
