"""Compare freezing policies on your data.    python compare.py data=folder data.dir=pets backbone=vit_small_dinov2"""

from omegaconf import DictConfig, open_dict

from thaw.run.command import command


@command("compare")
def main(cfg: DictConfig) -> float | None:
    """Do a job of the comparison, if it is not done already; `thaw.sweeps.compare` says which jobs there are."""
    from thaw.run.jobs import run_job
    from train import train

    with open_dict(cfg):
        del cfg["compare"]  # what remains is a run of train.py
    return run_job(cfg, train)


if __name__ == "__main__":
    main()
