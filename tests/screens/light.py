"""`light.py <script> <arguments>`: that root script; pictures have one pixel, speed is timed once, a queue forks."""

import multiprocessing
import runpy
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import processes
from matplotlib.figure import Figure
from PIL import Image

from thaw.evaluation import cost


def save_one_pixel(self: Figure, path: Any, **_: Any) -> None:
    if isinstance(path, str | Path):
        Image.new("L", (1, 1)).save(path, "PNG")


Figure.savefig = save_one_pixel  # type: ignore[method-assign,assignment]
cost.TIMING_SECONDS = 0.0
multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
processes.FORKING = multiprocessing.get_context("fork")  # type: ignore[assignment]
with suppress(ModuleNotFoundError):  # thaw.sweeps is removed
    import_module("thaw.sweeps.job_queue").subprocess = processes.FORKED  # type: ignore[attr-defined]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
