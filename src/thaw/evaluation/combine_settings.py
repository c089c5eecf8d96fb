"""The settings `combine` and `tta` of eval.py and export.py, checked before anything heavy is imported."""

from omegaconf import DictConfig, OmegaConf

from thaw.run.errors import UserError


def check_combination(cfg: DictConfig) -> list[str]:
    """The checkpoints that `ckpt` names; a UserError for settings of a combination that do not go together."""
    ckpts = [str(ckpt) for ckpt in (cfg.ckpt if OmegaConf.is_list(cfg.ckpt) else [cfg.ckpt])]
    how, tta = cfg.combine, cfg.tta
    if how and len(ckpts) < 2:
        raise UserError(
            f"combine={how} is for several checkpoints, and ckpt={cfg.ckpt} is one; list them: "
            "'ckpt=[<run folder>,<run folder>]', or leave combine out."
        )
    if how == "wise" and len(ckpts) > 2:
        raise UserError(
            f"combine=wise is for two checkpoints, a linear probe and a fine-tuned model, and ckpt lists {len(ckpts)}; "
            "give 'ckpt=[<probe>,<fine-tuned>]', or take combine=soup."
        )
    if tta > 1 and how in ("soup", "wise"):
        raise UserError(
            f"tta={tta} does not go with combine={how}, whose result is a checkpoint of its own: first write it "
            f"(eval.py combine={how}), then give it as ckpt with tta={tta}."
        )
    if tta > 1 and not how and len(ckpts) > 1:
        raise UserError(
            f"tta={tta} is for one checkpoint or an average, and ckpt lists {len(ckpts)}; add combine=average, or give "
            "one of them."
        )
    if cfg.get("augment") and tta == 1:
        raise UserError("augment= says which views tta averages over, and tta=1 has none; add tta=8, or leave it out.")
    return ckpts
