"""Test a checkpoint on its own configuration's test split; all it needs is the file."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw import checkpoint as checkpoints
from thaw.config import build_list, check
from thaw.evaluation.summary import write_json


def evaluate(checkpoint: dict[str, Any], cfg: DictConfig, run_dir: Path, loggers: list[Any]) -> dict[str, Any]:
    """Rebuild the model, test it in the precision it was trained in, on one device.

    Args:
        checkpoint: from `thaw.checkpoint.read`.
        cfg: its configuration, perhaps with another `data.dir`.
        run_dir: where the pictures go.
        loggers: what else is told the accuracy.

    Returns:
        `test/acc`, its interval, `n_test` and `data_source`.
    """
    from hydra.utils import instantiate
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from thaw.callbacks.progress import quiet
    from thaw.callbacks.test_report import TestReport

    quiet()
    check(cfg)
    model = checkpoints.load_model(checkpoint)
    if not is_overridden("test_step", model):
        raise ValueError(f"A {type(model).__name__} has no test; give the checkpoint of a classifier.")
    datamodule = instantiate(cfg.data)
    report = TestReport(str(run_dir))
    settings = {"devices": 1, "strategy": "auto", "profiler": None, "enable_progress_bar": False}
    trainer = instantiate(OmegaConf.merge(cfg.trainer, settings), callbacks=[report], logger=loggers)
    trainer.test(model, datamodule, verbose=False)
    return {**report.results, "data_source": datamodule.digits.name}


def test_run(run_dir: Path) -> dict[str, Any]:
    """Test the best checkpoint of a finished run and add the numbers to its summary and its W&B run."""
    from thaw.loggers import finish

    checkpoint = checkpoints.read(run_dir / "checkpoints" / "best.ckpt")
    cfg = OmegaConf.create(checkpoint["config"])
    loggers = []
    if cfg.logger and "wandb" in cfg.logger:
        cfg.logger.wandb.id = checkpoint["wandb_id"]
        cfg.logger = {"wandb": cfg.logger.wandb}
        loggers = build_list(cfg.logger, "logger")
    try:
        results = evaluate(checkpoint, cfg, run_dir, loggers)
    finally:
        finish(loggers)
    summary = json.loads((run_dir / "summary.json").read_text()) | results
    write_json(summary, run_dir / "summary.json")
    return results
