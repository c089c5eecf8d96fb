"""Test a checkpoint: it holds all that is needed.    python eval.py ckpt=logs/runs/.../checkpoints/best.ckpt"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from thaw.config import clear_errors


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> None:
    from thaw import checkpoint as checkpoints
    from thaw.evaluation.evaluate import evaluate
    from thaw.json_files import write_json

    path = checkpoints.find(cfg.ckpt, Path("logs"), "best.ckpt")
    checkpoint = checkpoints.read(path)
    if cfg.weights:
        checkpoint["config"]["backbone"]["weights"] = cfg.weights
    saved = OmegaConf.create(checkpoint["config"])
    for group in ("data", "trainer"):
        changes = {key: value for key, value in cfg[group].items() if value is not None}
        saved[group] = OmegaConf.merge(saved[group], changes)
    results = {"checkpoint": str(path), **evaluate(checkpoint, saved, Path(cfg.run_dir), loggers=[])}
    write_json(results, Path(cfg.run_dir) / "eval.json")
    print(
        f"test/acc {results['test/acc']:.4%} on {results['n_test']:,} {results['data_source']} digits, 95 % interval "
        f"[{results['test/acc_low']:.2%}, {results['test/acc_high']:.2%}]\npictures and eval.json in {cfg.run_dir}"
    )


if __name__ == "__main__":
    with clear_errors():
        main()
