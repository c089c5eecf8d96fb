"""Train one configuration: compose, build, fit, test.    python train.py experiment=vit_linear_probe"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from thaw.run.command import command
from thaw.run.config import build, build_list, plain, settle
from thaw.run.stopwatch import STOPWATCH


def train(cfg: DictConfig, callbacks: Sequence[Any] = ()) -> float | None:
    """One run in `cfg.run_dir`; returns its best validation accuracy, which sweeps maximise.

    `callbacks` are added to those of `cfg`; sweep.py adds the one that prunes a trial.
    """
    started = time.monotonic()
    STOPWATCH.follow("imports")
    import lightning as L

    from thaw.callbacks.lr_find import find_lr
    from thaw.callbacks.monitored_metric import MonitorCheck
    from thaw.callbacks.run_record import RunRecord
    from thaw.callbacks.soft_targets import SoftTargets, find_teachers
    from thaw.callbacks.weight_averaging import ScheduleFreeAverage
    from thaw.data.module import count_classes
    from thaw.evaluation.evaluate import best_weights
    from thaw.evaluation.summary import forget_peak_memory, report_run
    from thaw.freezing.start_from import start_from
    from thaw.freezing.surgical import settle_chosen
    from thaw.run.checkpoint import find_checkpoint
    from thaw.run.console import quiet_libraries
    from thaw.run.loggers import finish
    from thaw.run.memory import keep_memory
    from thaw.run.ranks import ranks
    from thaw.run.targets import targets
    from thaw.run.trainer_settings import build_trainer, check_test_batches, check_trainer

    STOPWATCH.follow("data and model")
    quiet_libraries()
    keep_memory()
    forget_peak_memory()
    settle(cfg)
    check_trainer(cfg.trainer, cfg.optim)
    if cfg.start_from and "self_contained" in cfg.model:
        cfg.model.self_contained = True  # backbone.weights are not what its frozen part holds

    if cfg.start_from and not cfg.resume:  # all ranks start from the same, which the record names
        cfg.start_from = str(find_checkpoint(cfg.start_from, "best.ckpt"))

    cfg.distill = find_teachers(cfg.distill)

    datamodule = build(cfg.data)
    settle_chosen(cfg, datamodule)  # of freeze=surgical
    with ranks(cfg, plain(cfg)) as wait_for_ranks:
        L.seed_everything(cfg.seed, verbose=False)
        if "num_classes" in cfg.model:
            cfg.model.num_classes = count_classes(cfg.model.num_classes, datamodule)
        model = build(cfg.model)
        if cfg.resume:
            model.backbone.fresh = frozenset()  # the checkpoint fills all
        elif cfg.start_from:
            weights = start_from(model, Path(cfg.start_from), [*cfg.allow, *targets(cfg)])
            if "weights" in cfg.backbone:
                cfg.backbone.weights = weights
        teachers = [SoftTargets(cfg.distill, build(cfg.cache), [*cfg.allow, *targets(cfg)])] if cfg.distill else []
        if cfg.lr_find:
            find_lr(cfg, model, datamodule, teachers)
            return None
        loggers = build_list(cfg.logger, "logger")
        own = [RunRecord(cfg.run_dir, plain(cfg)), MonitorCheck()]
        own += [ScheduleFreeAverage()] if model.optim.is_schedule_free else []
        trainer = build_trainer(cfg, [*build_list(cfg.callbacks, "callbacks"), *own, *teachers, *callbacks], loggers)
        try:
            if cfg.test:
                check_test_batches(trainer, datamodule)
            wait_for_ranks()
            STOPWATCH.follow("Lightning")
            trainer.fit(model, datamodule, ckpt_path=cfg.resume, weights_only=True)
            val_acc, checkpoint = best_weights(trainer, model, datamodule, cfg.validate)
            if cfg.test:
                trainer.test(model, datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
            STOPWATCH.follow("summary, end of the loggers")
            report_run(cfg, trainer, val_acc, time.monotonic() - started)
        finally:
            finish(loggers)
    return val_acc


@command("train")
def main(cfg: DictConfig) -> float | None:
    """Train, resume an earlier run, or do a job of a sweep, if it is not done already."""
    from hydra.core.hydra_config import HydraConfig

    from thaw.run.jobs import refuse_chdir, run_job
    from thaw.run.ranks import is_child
    from thaw.run.resume import resumed_config

    refuse_chdir(HydraConfig.get())
    if cfg.resume and not is_child():  # other ranks are started with the outcome
        cfg = resumed_config(cfg, HydraConfig.get().overrides.task)
    return run_job(cfg, train)


if __name__ == "__main__":
    main()
