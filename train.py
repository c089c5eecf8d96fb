"""Train one configuration: compose, build, fit, test.    python train.py experiment=vit_linear_probe"""

import hydra
from omegaconf import DictConfig

from thaw.config import build_list, clear_errors, plain


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    import lightning as L
    from hydra.utils import instantiate

    L.seed_everything(cfg.seed, verbose=False)
    datamodule = instantiate(cfg.data)
    model = instantiate(cfg.model)
    callbacks = build_list(cfg.callbacks, "callbacks")
    loggers = build_list(cfg.logger, "logger")
    for callback in callbacks:
        if hasattr(callback, "config"):
            callback.config = plain(cfg)
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(model, datamodule, ckpt_path=cfg.resume)


if __name__ == "__main__":
    with clear_errors():
        main()
