"""Which weights of a run count, and the test of a checkpoint on its own configuration's test split."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf

from thaw.run import checkpoint as checkpoints
from thaw.run.config import build, build_list, settle
from thaw.run.console import quiet_libraries, say
from thaw.run.errors import UserError
from thaw.run.files import read_json, write_json
from thaw.run.places import keep_from_downloading, sends
from thaw.run.trainer_settings import new_trainer

log = logging.getLogger(__name__)

ACCURACY_TOLERANCE = 0.001  # between cached features and pixels: bf16 sums differ with the size of a batch


def evaluate_checkpoint(
    checkpoint: dict[str, Any], cfg: DictConfig, run_dir: Path, loggers: list[Any], cache: DictConfig | None = None
) -> dict[str, Any]:
    """Rebuild a model, validate and test it on one device in the precision of its training; figures go to `run_dir`.

    `cfg` is the configuration of the checkpoint, perhaps with another `data.dir`; `cache` is the block of a cache whose
    features are used, in place of pixels, where training used them. Returns `val/acc` if the run
    validates, `test/acc`, its interval, `n_test`, `dataset` and `data_source`.
    """
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from thaw.classifier import Classifier
    from thaw.evaluation.final_test import FinalTest
    from thaw.freezing.features import FrozenFeatures

    quiet_libraries()
    with checkpoints.understood(Path(checkpoint["path"]), checkpoint["git_commit"]):
        settle(cfg)
    model = checkpoints.load_model(checkpoint)
    if isinstance(model, Classifier) and cache is not None:
        model.frozen_features = FrozenFeatures(build(cache))
        model.frozen_features.after_training(model, checkpoint["epoch"])
    if not is_overridden("test_step", model):
        raise UserError(f"A {type(model).__name__} has no test; give the checkpoint of a classifier.")
    datamodule, test = build(cfg.data), FinalTest(str(run_dir))
    shown = cfg.trainer.get("enable_progress_bar", True) and cfg.callbacks.get("progress")
    bars = [build(cfg.callbacks.progress)] if shown else []
    settings = {"devices": 1, "num_nodes": 1, "strategy": "auto", "profiler": None, "enable_progress_bar": bool(bars)}
    trainer = new_trainer(cfg.trainer, **settings, callbacks=[test, *bars], logger=loggers)
    validated = {}
    if trainer.limit_val_batches != 0:
        (metrics,) = trainer.validate(model, datamodule, verbose=False)
        if not math.isfinite(loss := metrics.get("val/loss", 0.0)):
            raise UserError(
                f"The validation loss is {loss}, so that its accuracy means nothing. Likely cause: weights that are "
                "not finite, or too large for trainer.precision."
            )
        validated["val/acc"] = round(metrics["val/acc"], 6)
    trainer.test(model, datamodule, verbose=False)
    return {**validated, **test.results, **datamodule.load().facts()}


def best_weights(trainer: Any, model: LightningModule, datamodule: Any, again: bool) -> tuple[float | None, str | None]:
    """Validation accuracy and file of a run's best weights, None where there is none.

    Where validation has chosen none, these are the last weights. `again` validates the best ones once more, as the
    file has them, and warns if their accuracy in training was another one.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.utilities.model_helpers import is_overridden

    best: Any = next((each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)), None)
    path = best.best_model_path if best else ""
    if path and not trainer.strategy.broadcast(Path(path).is_file()):
        log.warning("%s is gone: another program has removed it during the run.", path)
        path, best.best_model_score = "", None
    if path and best.monitor is None:  # nothing is to be chosen by validation
        return None, path
    if path and best.monitor == "val/acc" and not again:
        return round(float(best.best_model_score), 6), path
    if not path:
        if best and best.monitor and best.save_top_k and trainer.current_epoch:
            path = best.best_model_path = best.format_checkpoint_name({})
            trainer.save_checkpoint(path)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            say(f"validation has chosen no weights: those of step {trainer.global_step}, the last, are the result")
    if trainer.limit_val_batches == 0 or not is_overridden("test_step", model):
        return None, path or None
    (metrics,) = trainer.validate(model, datamodule, ckpt_path=path or None, verbose=False, weights_only=True)
    now = metrics["val/acc"]
    if best and best.monitor == "val/acc" and best.best_model_score is not None:
        before = float(best.best_model_score)
        if abs(now - before) > ACCURACY_TOLERANCE + 1 / len(datamodule.split_dataset("val")):
            log.warning("Validation accuracy of %s is %.4f, but was %.4f in training.", path, now, before)
    return round(now, 6), path or None


def test_run(run_dir: Path, allow: Sequence[str], cache: DictConfig) -> dict[str, Any]:
    """Test the best checkpoint of a finished run and add the numbers to its summary and its W&B run.

    `allow` is as for `thaw.run.checkpoint.read_checkpoint`, `cache` as for `evaluate_checkpoint`.
    """
    from thaw.run.loggers import finish

    checkpoint = checkpoints.read_checkpoint(run_dir / "checkpoints" / "best.ckpt", allow)
    cfg = OmegaConf.create(checkpoint["config"])
    with checkpoints.understood(run_dir, checkpoint["git_commit"]):
        keep_from_downloading(cfg.data)
    loggers = loggers_of(checkpoint, cfg)
    try:
        results = evaluate_checkpoint(checkpoint, cfg, run_dir, loggers, cache)
    finally:
        finish(loggers)
    write_json(read_json(run_dir / "summary.json") | results, run_dir / "summary.json")
    return results


def loggers_of(checkpoint: dict[str, Any], cfg: DictConfig) -> list[Any]:
    """Loggers for the runs in W&B, MLflow and trackio that trained a checkpoint, and `cfg` left with these alone."""
    with checkpoints.understood(Path(checkpoint["path"]), checkpoint["git_commit"]):
        checkpoints.continue_logged(cfg, checkpoint)
        cfg.logger = {kind: block for kind, block in (cfg.logger or {}).items() if block and block.get("id")}
        if named := sends(cfg, ()):
            say(f"adding to the logged run of {', '.join(named)}, as {checkpoint['path']} says")
    return build_list(cfg.logger, "logger")
