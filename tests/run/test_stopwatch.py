"""The seconds of a command's parts, by a clock that the test sets."""

import subprocess
import sys
import time

import pytest

from thaw.run.stopwatch import Stopwatch


def test_a_part_pauses_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch("start")
    watch.seconds.clear()
    now = watch.since

    def after(seconds: float) -> None:
        nonlocal now
        now += seconds
        monkeypatch.setattr(time, "monotonic", lambda: now)

    after(1)
    watch.follow("imports")
    after(2)
    watch.start("fit")
    after(3)
    watch.start("step")
    after(4)
    watch.stop()
    after(5)
    watch.start("step")
    after(6)
    watch.stop()
    watch.stop()
    after(7)
    watch.lap()
    assert watch.seconds == pytest.approx({"start": 1, "imports": 9, "fit": 8, "step": 10})


def test_it_starts_with_the_process() -> None:
    code = "import time; time.sleep(0.5); from thaw.run.stopwatch import STOPWATCH as watch; watch.lap(); "
    code += "print(*watch.seconds.values())"
    started = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (0.5 if sys.platform == "linux" else 0) < float(said) < time.monotonic() - started + 0.02
