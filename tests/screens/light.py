"""`light.py <script> <arguments>`: that root script, whose pictures have one pixel and whose queue forks its jobs."""

import multiprocessing
import runpy
import sys
from pathlib import Path
from typing import Any

import processes
from matplotlib.figure import Figure
from PIL import Image

from thaw.sweeps import job_queue


def save_one_pixel(self: Figure, path: Any, **_: Any) -> None:
    if isinstance(path, str | Path):
        Image.new("L", (1, 1)).save(path, "PNG")


Figure.savefig = save_one_pixel  # type: ignore[method-assign,assignment]
multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
processes.FORKING = multiprocessing.get_context("fork")  # type: ignore[assignment]
job_queue.subprocess = processes.FORKED  # type: ignore[assignment]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
