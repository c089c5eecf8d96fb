"""thaw's sweepers and launcher, in the only package in which Hydra looks for them."""

import warnings

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from thaw.sweeps.compare import CompareSweep
from thaw.sweeps.grid import GridSweep
from thaw.sweeps.job_queue import JobQueue


class GridSweeper(GridSweep):
    """See `thaw.sweeps.grid`."""


class CompareSweeper(CompareSweep):
    """See `thaw.sweeps.compare`."""


class QueueLauncher(JobQueue):
    """See `thaw.sweeps.job_queue`."""


class OwnLaunchers(SearchPathPlugin):
    """Silences Hydra where configs/hydra/launcher replaces the presets of hydra-submitit-launcher under their names.

    Hydra forgets filters that are set while it imports this file, but calls this method before it composes.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        warnings.filterwarnings("ignore", r"\s*'hydra/launcher/submitit_.*is validated against ConfigStore schema")
