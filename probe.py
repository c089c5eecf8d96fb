"""How good frozen features are, without a training loop: kNN or logistic regression.    python probe.py probe=knn"""

import time

from omegaconf import DictConfig

from thaw.run.command import command
from thaw.run.config import build, settle
from thaw.run.errors import UserError
from thaw.run.trainer_settings import new_trainer


@command("probe")
def main(cfg: DictConfig) -> float | None:
    """One probe; returns its validation accuracy, None without validation images."""
    started = time.monotonic()
    import lightning as L
    from hydra.core.hydra_config import HydraConfig

    from thaw.evaluation.probe_run import checkpoint_backbone, probe_features
    from thaw.evaluation.probes import score
    from thaw.evaluation.summary import report_probe
    from thaw.run.console import quiet_libraries

    quiet_libraries()
    backbone = checkpoint_backbone(cfg, HydraConfig.get().overrides.task) if cfg.ckpt else None
    settle(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    trainer = new_trainer(cfg.trainer, logger=False, enable_checkpointing=False)  # for its device and precision
    if trainer.world_size > 1:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: a probe runs on one; choose trainer=cpu, gpu or mps.")
    trainer.datamodule, cache = build(cfg.data), build(cfg.cache)
    backbone = build(cfg.backbone) if backbone is None else backbone
    backbone.eval().requires_grad_(False).to(trainer.strategy.root_device)

    train, val = (probe_features(split, trainer, backbone, cache) for split in ("train", "val"))
    cache.summarise(trainer)
    choice = build(cfg.probe)(train, val)
    listed = trainer.datamodule.load().listed
    tested = score(choice, probe_features("test", trainer, backbone, cache), listed) if cfg.test else {}
    report_probe(cfg, trainer, backbone, choice, tested, time.monotonic() - started)
    return choice.candidates[choice.chosen]


if __name__ == "__main__":
    main()
