"""Hydra takes sweepers and launchers from the package `hydra_plugins` alone; these are thaw's."""

from thaw.sweeps.grid import Grid


class GridSweeper(Grid):
    """See `thaw.sweeps.grid`."""
