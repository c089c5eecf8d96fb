"""Test checkpoints and write a report: they hold all that is needed.    python eval.py ckpt=<run folder>"""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.command import command

MNIST = "thaw.data.mnist.MNISTData"


@command("eval")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from thaw.evaluation.combine_settings import check_combination

    ckpts = check_combination(cfg)  # before what takes seconds to import
    from thaw.data.images import Source, check_same_classes
    from thaw.data.module import load_source, second_source
    from thaw.evaluation.assessment import assess, images_to_predict
    from thaw.evaluation.assessment_files import cost_table, log_assessment, write_assessments
    from thaw.evaluation.combine import combine, common_source, labels
    from thaw.evaluation.metrics import other_accuracies
    from thaw.predict.predictor import Predictor, load_predictor
    from thaw.run import checkpoint as checkpoints
    from thaw.run.command_line import override_key
    from thaw.run.console import progress, say, say_fitted

    typed = {override_key(override) for override in HydraConfig.get().overrides.task}
    chosen = "_target_" in cfg.data  # data=fashion_mnist
    block: Any = OmegaConf.to_container(cfg.data, resolve=False)
    changes = {key: value for key, value in block.items() if (f"data.{key}" in typed if chosen else value is not None)}
    settings = (cfg.weights, cfg.trainer.accelerator, cfg.trainer.precision, cfg.allow)
    predictors = [load_predictor(ckpt, *settings) for ckpt in ckpts]
    folder = Path(cfg.run_dir) / "report"
    robustness: Any = OmegaConf.to_container(cfg.robustness)

    def source_of(predictor: Predictor, ckpt: str) -> Source:
        own = changes
        if chosen and not (cfg.data._target_ == predictor.cfg.data._target_ == MNIST):  # which share a folder
            own = {}
        elif chosen and predictor.cfg.data.get("source") == "sample":
            own = {key: value for key, value in changes.items() if key != "dir"}  # which is the second dataset's
        source = load_source(predictor.cfg.data, own)
        check_same_classes(predictor.classes, source, f"ckpt={ckpt}")
        return source

    sources = [source_of(predictor, ckpt) for predictor, ckpt in zip(predictors, ckpts, strict=True)]
    if cfg.combine or cfg.tta > 1:
        sources.append(common_source(cfg, predictors, sources))
        path = Path(cfg.run_dir).resolve() / "checkpoints" / "best.ckpt"  # of averaged weights
        predictors.append(combine(cfg, predictors, sources[-1], path))

    assessments = []
    for number, (label, predictor, source) in enumerate(zip(labels(predictors), predictors, sources, strict=True), 1):
        second = second_source(block, predictor.cfg) if chosen else None
        total = images_to_predict(source, second, robustness)
        pictures = folder / (f"model_{number}" if len(predictors) > 1 else "")
        say(f"evaluating {label}: {total:,} test, validation and corrupted images")
        with progress(label, total) as advance:
            assessment = assess(label, predictor, source, second, robustness, pictures, advance)
        facts = assessment.facts
        interval = f"95 % interval {facts['test/acc_low']:.2%} to {facts['test/acc_high']:.2%}{other_accuracies(facts)}"
        say(f"test/acc {facts['test/acc']:.2%}, {interval}, {facts['n_test']:,} images of {source.title}")
        assessments.append(assessment)
    page = write_assessments(assessments, folder)
    if len(predictors) > len(ckpts):
        say_fitted(cost_table(assessments))
    if cfg.wandb:
        for predictor, assessment in zip(predictors[: len(ckpts)], assessments, strict=False):
            log_assessment(assessment, checkpoints.read_checkpoint(predictor.checkpoint, cfg.allow), page)
    say(f"report:\n{os.path.relpath(page)}")


if __name__ == "__main__":
    main()
