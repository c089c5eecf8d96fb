"""Hydra takes sweepers and launchers from the package `hydra_plugins` alone; these are thaw's."""

import warnings

from thaw.sweeps.grid import Grid
from thaw.sweeps.queue import Queue

# configs/hydra/launcher replaces the plugin's own presets, by the same names
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/submitit_.*is validated against ConfigStore schema")


class GridSweeper(Grid):
    """See `thaw.sweeps.grid`."""


class QueueLauncher(Queue):
    """See `thaw.sweeps.queue`."""
