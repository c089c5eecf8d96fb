"""Every argument of Lightning's Trainer works, or is refused in one line before training begins."""

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from conftest import compose_run, needs
from omegaconf import OmegaConf

from thaw.evaluation.evaluate import evaluate_checkpoint
from thaw.run import checkpoint as checkpoints
from thaw.run.command import show
from thaw.run.deferred import DeferredModule
from thaw.run.errors import UserError
from thaw.run.steps import skip_empty_hooks
from thaw.run.trainer_settings import RULES, check_trainer, new_trainer

REFUSED = {
    "trainer.strategy=ddp_spawn": "trainer.strategy='ddp_spawn' must be auto, ddp",
    "trainer.devices=[0]": r"trainer.devices=\[0\] must be a number of processes",
    "trainer.devices=abc": "trainer.devices=abc must be",
    "trainer.accelerator=auto trainer.devices=[]": r"trainer.devices=\[\] must be a number, a list of GPUs' numbers",
    "trainer.num_nodes=0": "trainer.num_nodes=0 must be a whole number, 1 or more",
    "trainer.precision=16-true": "trainer.precision='16-true' must be 16-mixed",
    "+trainer.logger=true": "trainer.logger=true must be null; leave it out; logger= chooses",
    "+trainer.callbacks=[]": r"trainer.callbacks=\[\] must be null; leave it out",
    "+trainer.fast_dev_run=-1": "trainer.fast_dev_run=-1 must be true or false, or a whole number, 0 or more",
    "trainer.max_epochs=-2": "trainer.max_epochs=-2 must be",
    "trainer.max_epochs=-1": r"trainer.max_epochs=-1 has no end.* \+trainer.max_steps=<steps>",
    "+trainer.min_epochs=-1": "trainer.min_epochs=-1 must be a whole number, 0 or more",
    "+trainer.min_epochs=11": "trainer.min_epochs=11 must be at most trainer.max_epochs=10",
    "+trainer.max_steps=0": "trainer.max_steps=0 must be",
    "+trainer.min_steps=-1": "trainer.min_steps=-1 must be",
    "+trainer.max_time=tomorrow": "trainer.max_time='tomorrow' must be a duration as DD:HH:MM:SS",
    "+trainer.max_time=00:00:00:00": "trainer.max_time='00:00:00:00' must be",
    "+trainer.max_time={fortnights:1}": "trainer.max_time={'fortnights': 1} must be",
    "trainer.limit_train_batches=0": "trainer.limit_train_batches=0 must be",
    "trainer.limit_train_batches=0.0": "trainer.limit_train_batches=0.0 must be",
    "trainer.limit_train_batches=1.5": "trainer.limit_train_batches=1.5 must be",
    "trainer.limit_val_batches=-1": "trainer.limit_val_batches=-1 must be .* 0 for no validation",
    "trainer.limit_test_batches=0": "trainer.limit_test_batches=0 must be .* above 0 and at most 1; .*test=false",
    "+trainer.limit_predict_batches=-1": "trainer.limit_predict_batches=-1 must be",
    "+trainer.overfit_batches=1": "trainer.overfit_batches=1 must be 0.* debug=overfit",
    "trainer.val_check_interval=0": "trainer.val_check_interval=0 must be",
    "trainer.val_check_interval=soon": "trainer.val_check_interval='soon' must be .* or a duration as",
    "trainer.val_check_interval=0.5 trainer.check_val_every_n_epoch=null": "=0.5 must be a whole number of batches",
    "trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch=0 must be a whole number, 1 or more",
    "trainer.num_sanity_val_steps=-2": "trainer.num_sanity_val_steps=-2 must be",
    "trainer.log_every_n_steps=-1": "trainer.log_every_n_steps=-1 must be",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches=0 must be a whole number, 1 or more",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val=-1 must be",
    "+trainer.gradient_clip_algorithm=foo": "trainer.gradient_clip_algorithm='foo' must be norm or value",
    "trainer.profiler=xla": "trainer.profiler='xla' must be simple, advanced or pytorch",
    "+trainer.barebones=true": "trainer.barebones=true must be false",
    "+trainer.reload_dataloaders_every_n_epochs=-1": "trainer.reload_dataloaders_every_n_epochs=-1 must be",
    "+trainer.model_registry=mine": "trainer.model_registry='mine' must be null",
}
# What no value of the right type makes wrong.
ANY = {"detect_anomaly", "deterministic", "benchmark", "inference_mode", "use_distributed_sampler", "sync_batchnorm"}
ANY |= {"enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams", "plugins"}
ANY |= {"default_root_dir", "devices"}


def test_every_argument_has_a_rule() -> None:
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert arguments == RULES.keys() | ANY | {"precision"}
    for name in RULES:
        assert any(f"trainer.{name}=" in wrong for wrong in REFUSED), name


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_wrong_value_is_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED[wrong]):
        cfg = compose_run(tmp_path, *wrong.split())
        check_trainer(cfg.trainer, cfg.optim)


# 4 steps an epoch, 2 epochs; which checkpoints the run leaves
USUAL = ("best", "last")
WORKS = {
    "+trainer.fast_dev_run=true": (),
    "+trainer.fast_dev_run=2": (),
    "+trainer.enable_checkpointing=false": (),
    "callbacks.checkpoint=null callbacks.last_checkpoint=null": (),
    "callbacks.checkpoint.save_top_k=0": ("last",),
    "trainer.max_epochs=-1 +trainer.max_steps=5": USUAL,
    "trainer.max_epochs=null +trainer.max_steps=5": USUAL,
    "+trainer.max_steps=1": USUAL,
    "+trainer.min_epochs=1 +trainer.min_steps=1 +trainer.max_time={minutes:5}": USUAL,
    "trainer.limit_train_batches=1 trainer.limit_test_batches=1.0": USUAL,
    "trainer.limit_val_batches=0": USUAL,
    "trainer.val_check_interval=3": USUAL,
    "trainer.val_check_interval=3 trainer.check_val_every_n_epoch=null": USUAL,
    "trainer.val_check_interval=99 trainer.check_val_every_n_epoch=null": ("best",),
    "trainer.val_check_interval=00:01:00:00": ("best",),
    "trainer.check_val_every_n_epoch=3": ("best",),
    "trainer.num_sanity_val_steps=-1 trainer.log_every_n_steps=0 trainer.enable_model_summary=true": USUAL,
    "trainer.accumulate_grad_batches=3 trainer.gradient_clip_val=0 +trainer.gradient_clip_algorithm=value": USUAL,
    "trainer.deterministic=true trainer.inference_mode=false trainer.detect_anomaly=true": USUAL,
    "+trainer.use_distributed_sampler=false +trainer.reload_dataloaders_every_n_epochs=1": USUAL,
    "+trainer.enable_autolog_hparams=false trainer.profiler=simple trainer.default_root_dir=null": USUAL,
    "trainer.plugins=[] trainer.sync_batchnorm=true trainer.devices=auto trainer.accelerator=auto": USUAL,
    "trainer.precision=64-true": USUAL,
    "trainer.precision=64-true freeze=lora average=ema mix=both augment=strong": USUAL,
    "trainer.precision=bf16-true freeze=last_blocks freeze.k=1": USUAL,
    "callbacks.checkpoint.monitor=val/loss callbacks.checkpoint.mode=min": USUAL,
    "head.norm=batch data.train_size=65": USUAL,
    "head=lr_bank head.norm=batch data.train_size=65": USUAL,
}


LIKE_ANOTHER = ("fast_dev_run=true", "max_epochs=null", "limit_test_batches", "interval=3 ", "autolog", "distributed")


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, marks=pytest.mark.long if any(map(each.count, LIKE_ANOTHER)) else ()) for each in WORKS],
)
def test_what_works_leaves_a_tested_run(
    train: Callable[..., Path],
    tiny_run: list[str],
    undrawn: None,
    capsys: pytest.CaptureFixture[str],
    settings: str,
) -> None:
    with_early_stopping = [each for each in tiny_run if each != "callbacks.early_stopping=null"]
    run_dir = train(*with_early_stopping, "trainer.max_epochs=2", *settings.split())
    assert tuple(sorted(path.stem for path in (run_dir / "checkpoints").glob("*.ckpt"))) == WORKS[settings]
    facts = json.loads((run_dir / "summary.json").read_text())
    assert facts["n_test"] == 500 and 0 <= facts["test/acc"] <= 1
    assert (facts["val/acc"] is None) == ("limit_val_batches=0" in settings)
    assert facts["val/acc"] is None or facts["val/acc"] <= 1
    told = "validation has chosen no weights" in capsys.readouterr().out
    assert facts["chosen"] != (told or "fast_dev_run" in settings)
    if "best" in WORKS[settings] and ("max_steps=1" in settings or "precision" in settings):  # the file was tested
        checkpoint = checkpoints.read_checkpoint(run_dir / "checkpoints" / "best.ckpt")
        results = evaluate_checkpoint(checkpoint, OmegaConf.create(checkpoint["config"]), run_dir, loggers=[])
        assert results["test/acc"] == facts["test/acc"]


STOPS = "callbacks.early_stopping={_target_:thaw.callbacks.monitored_metric.EarlyStopping,mode:max,patience:3,monitor:"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("trainer.limit_train_batches=0.001", "limit_train_batches"),
        ("trainer.limit_val_batches=0.001", "limit_val_batches"),
        ("trainer.limit_test_batches=0.001", "limit_test_batches=0.001 leaves no batch of the 1 there are"),
        ("trainer.val_check_interval=5", "val_check_interval"),
        ("trainer.precision=transformer-engine", "transformer_engine"),
        ("trainer.num_nodes=2", "num_nodes=2 needs a process for each device on 2 machines"),
        ("callbacks.checkpoint.mode=best", "callbacks.checkpoint: .*min, max"),
        (STOPS + "val_acc}", "monitor=val_acc of EarlyStopping .* choose from val/loss, val/acc"),
        pytest.param(
            "experiment=pretrain_mae " + STOPS + "val/knn}",
            "monitor=val/knn of EarlyStopping .* val/knn_acc",
            marks=needs("pretrain"),
        ),
        ("head.norm=batch data.batch_size=1", "data.batch_size=1 has no statistics for head.norm=batch"),
    ],
)
def test_what_depends_on_the_data_is_refused_before_the_first_step(
    train: Callable[..., Path], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, settings: str, message: str
) -> None:
    kind = "thaw.pretrain.mae.MAE" if "pretrain" in settings else "thaw.classifier.Classifier"
    monkeypatch.setattr(f"{kind}.training_step", lambda *_: pytest.fail("trained"))
    experiment = [each for each in settings.split() if each.startswith("experiment=")]
    with pytest.raises(Exception, match=r".") as error:
        train(*experiment, *tiny_run, *(each for each in settings.split() if each not in experiment))
    assert re.search(message, show(error.value))


def test_a_metric_of_training_that_is_not_logged(train: Callable[..., Path], tiny_run: list[str]) -> None:
    with pytest.raises(UserError, match=r"monitor=train/los of EarlyStopping is not logged; choose from train/loss,"):
        train(*tiny_run, STOPS + "train/los}")


def test_hooks_that_a_callback_does_not_have_are_skipped(classifier: Callable, batch: Any, fit: Callable) -> None:
    class Counter(lightning.Callback):
        steps = 0

        def on_train_batch_end(self, *_: object) -> None:
            self.steps += 1

    counter = Counter()
    skip_empty_hooks([counter])
    fit(classifier(), [batch] * 3, callbacks=[counter])
    assert counter.steps == 3 and counter.on_before_backward is None


@pytest.mark.parametrize("settings", [{"deterministic": "warn"}, {"deterministic": "warn", "benchmark": True}])
def test_determinism_without_the_compiler_is_lightnings(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    block = OmegaConf.create({"_target_": "lightning.Trainer", "accelerator": "cpu", "logger": False, **settings})

    def flags() -> tuple:
        backends, deterministic = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns, backends.benchmark, deterministic

    def unset() -> None:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    seen = []
    for compiler in (sys.modules["torch._dynamo"], DeferredModule("torch._dynamo", {})):
        unset()
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "torch._dynamo", compiler)
            new_trainer(block, enable_checkpointing=False)
        seen.append((*flags(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
    unset()
    assert seen[0] == seen[1] and seen[0][:2] == (True, True)
