"""What may be wrong in a dataset: labels, copies, outliers, blank images.    python clean.py data.source=sample"""

import time

from omegaconf import DictConfig

from thaw.run.command import command
from thaw.run.config import build, settle
from thaw.run.errors import UserError
from thaw.run.trainer_settings import new_trainer


@command("clean")
def main(cfg: DictConfig) -> None:
    started = time.monotonic()
    import lightning as L
    import torch
    from hydra.core.hydra_config import HydraConfig

    from thaw.cleaning.label_issues import check_cleanlab
    from thaw.cleaning.report import report_findings
    from thaw.cleaning.views import features_of_views, use_whole_data
    from thaw.evaluation.probe_run import checkpoint_backbone
    from thaw.run.console import quiet_libraries

    check_cleanlab()
    quiet_libraries()
    backbone = checkpoint_backbone(cfg, HydraConfig.get().overrides.task) if cfg.ckpt else None
    use_whole_data(cfg, HydraConfig.get().overrides.task)
    settle(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    trainer = new_trainer(cfg.trainer, logger=False, enable_checkpointing=False)  # for its device and precision
    if trainer.world_size > 1:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: cleaning runs on one; choose trainer=cpu, gpu or mps.")
    trainer.datamodule, cache, search = build(cfg.data), build(cfg.cache), build(cfg.search)
    backbone = build(cfg.backbone) if backbone is None else backbone
    backbone.eval().requires_grad_(False).to(trainer.strategy.root_device)

    source, names = trainer.datamodule.load(), getattr(trainer.datamodule, "names", {})
    how = cfg.views, build(cfg.augment), trainer, backbone, cache
    train, val, test = (features_of_views(split, *how) for split in ("train", "val", "test"))
    cache.summarise(trainer)
    pool = [torch.cat(parts) for parts in zip(train, val, strict=True)]  # (N, D) of each view
    findings, agreed = search.findings(source, names, getattr(trainer.datamodule, "unreadable", ()), pool, test)
    reader = getattr(trainer.datamodule, "reader", "photo")
    report_findings(cfg, source, names, findings, agreed, reader, time.monotonic() - started)


if __name__ == "__main__":
    main()
