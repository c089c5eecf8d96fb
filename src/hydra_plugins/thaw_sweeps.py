"""thaw's sweeper and launcher, in the only package in which Hydra looks for them."""

import warnings

from thaw.sweeps.grid import GridSweep
from thaw.sweeps.job_queue import JobQueue

# configs/hydra/launcher replaces the presets of hydra-submitit-launcher under the same names
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/submitit_.*is validated against ConfigStore schema")


class GridSweeper(GridSweep):
    """See `thaw.sweeps.grid`."""


class QueueLauncher(JobQueue):
    """See `thaw.sweeps.job_queue`."""
