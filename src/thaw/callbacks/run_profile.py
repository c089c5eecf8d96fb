"""Where the seconds of a run go, from the start of the process to its end: debug=profile."""

import atexit
import re
from pathlib import Path

from lightning.pytorch.profilers import Profiler
from rich.table import Table

from thaw.run.console import say, say_fitted
from thaw.run.files import write_json
from thaw.run.stopwatch import STOPWATCH

ACTIONS = {  # in Lightning's name of an action -> a row of the table; the first that is found
    "FrozenFeatures|SoftTargets": "cached features",
    "FinalTest.*epoch_end|LRCurve|SampleGrid": "predictions and pictures",
    "[Cc]heckpoint": "checkpoints",
    "_next$|batch_to_device|batch_transfer": "{stage}: batches",
    "_step$|backward|optimizer|gradient_clipping": "{stage}: model",
    r"^\[Callback\]": "{stage}: callbacks",
    "^run_training": "{stage}: Lightning's loop",
}
STAGES = {"fit": "training", "validate": "best weights", "test": "test"}


class RunProfile(Profiler):
    """Prints the seconds of each part of the process when it ends, and writes them to `<run_dir>/profile.json`.

    The seconds of a part within another one count for the inner part alone. In a sweep the last job prints the seconds
    of all jobs in the process.
    """

    latest: "RunProfile | None" = None

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self.path = Path(run_dir) / "profile.json"
        if RunProfile.latest:
            atexit.unregister(RunProfile.latest.report)
        RunProfile.latest = self
        atexit.register(self.report)

    def start(self, action_name: str) -> None:
        STOPWATCH.start(self.part(action_name))

    def stop(self, action_name: str) -> None:
        STOPWATCH.stop()

    def part(self, action: str) -> str:
        stage = STAGES.get(getattr(self._stage, "value", ""), "training")
        if stage == "training" and re.search("validation_step|val_next", action):
            stage = "validation"
        for pattern, part in ACTIONS.items():
            if re.search(pattern, action):
                return part.format(stage=stage)
        return STOPWATCH.parts[-1]

    def report(self) -> None:
        if self._local_rank not in (None, 0):
            return
        STOPWATCH.lap()
        seconds = {part: round(spent, 3) for part, spent in STOPWATCH.seconds.items() if spent >= 0.005}
        total = sum(seconds.values())
        table = Table("part of the run", "seconds", "share", box=None)
        for part, spent in seconds.items():
            table.add_row(part, f"{spent:.2f}", f"{spent / total:.1%}")
        table.add_row("all", f"{total:.2f}", "100.0%")
        say_fitted(table)
        write_json(seconds, self.path)
        say(f"written to {self.path}")
