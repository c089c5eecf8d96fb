"""Hydra takes sweepers and launchers from the package `hydra_plugins` alone; these are thaw's."""

from thaw.sweeps.grid import Grid
from thaw.sweeps.queue import Queue


class GridSweeper(Grid):
    """See `thaw.sweeps.grid`."""


class QueueLauncher(Queue):
    """See `thaw.sweeps.queue`."""
