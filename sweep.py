"""Search for good settings with Optuna.    python sweep.py experiment=vit_linear_probe sweep=lr_tpe"""

import sys

from omegaconf import DictConfig

from thaw.run.command import command
from thaw.run.errors import UserError


@command("sweep")
def main(cfg: DictConfig) -> None:
    """Work at a study until it has its trials, alone or beside other workers, and report."""
    from hydra.core.hydra_config import HydraConfig

    from thaw.run.jobs import is_sweep_job, refuse_chdir

    if is_sweep_job():  # Hydra keeps to itself what a job raises
        sys.exit("error: sweep.py takes no -m. It draws values from sweep.space; train.py -m runs those you type.")
    refuse_chdir(HydraConfig.get())
    try:
        from thaw.sweeps.search import search
        from thaw.sweeps.study import storage_errors
    except ModuleNotFoundError as error:
        raise UserError(f"sweep.py needs {error.name}: pip install -e '.[search]'.") from error
    from train import train

    with storage_errors(cfg.sweep.storage):
        search(cfg, list(HydraConfig.get().overrides.task), train)


if __name__ == "__main__":
    main()
