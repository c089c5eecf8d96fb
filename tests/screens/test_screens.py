"""What a person sees who types the first commands, on terminals of 80 and 120 columns.

The files hold whole screens. Numbers, times, ids and runs of blanks are not compared. To write anew the files that
differ: THAW_WRITE_SCREENS=1 pytest tests/screens
"""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import tty
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyte
import pytest
from conftest import ROOT
from PIL import Image
from processes import Forked

SCREENS = Path(__file__).parent
PROBE = (
    "experiment=vit_linear_probe data.source=sample data.train_size=256 data.batch_size=64 trainer.max_epochs=2 "
    "trainer.precision=32-true"  # on every machine
)
COMMANDS = {  # in the order in which a person types them
    "help": "train.py --help",
    "linear_probe": f"train.py {PROBE}",
    "linear_probe_again": f"train.py {PROBE}",
    "resume": "train.py resume=last",
    "eval": "eval.py ckpt=last robustness.images=1",
    "predict": "predict.py ckpt=last pictures",
    "export": "export.py ckpt=last format=hub_folder",
    "wrong_setting": "train.py experiment=vit_linear_probe optim.lrr=1",
    "finetune": "train.py experiment=vit_finetune data.source=sample trainer.max_epochs=1 logger=csv "
    "data.train_size=64 data.batch_size=16 callbacks.progress.refresh_rate=1",
    "sweep": f"train.py -m {PROBE} optim.lr=1e-4,1e-2 logger=csv",
    "queue": f"train.py -m hydra/launcher=queue {PROBE} optim.lr=1e-4,1e-2 logger=csv",
    "search": f"sweep.py sweep=lr_tpe sweep.trials=2 {PROBE} logger=csv",
}
COMMANDS = {
    name: command
    for name, command in COMMANDS.items()
    if (ROOT / command.split()[0]).is_file() and (name not in ("sweep", "queue") or (ROOT / "src/thaw/sweeps").is_dir())
}
LIKE_ANOTHER = ("linear_probe_again", "queue", "eval", "search")  # at 120 columns, where they would show nothing new
SLOW = ("eval", "export", "finetune", "help", "queue", "resume", "search", "sweep")
ON_A_RUN = ("resume", "eval", "predict", "export", "linear_probe_again")
MASKED = (  # these differ from run to run
    r"\d{4}-\d\d-\d\d_[\d-]+",
    r"offline-run-\d+_\d+-\w+",
    r"\b[0-9a-f]{10,12}\b",
    r"less than a minute(?= ago)|\d+ minutes?(?= ago)",
    r"[\d,]*\.?\d+(e[-+]\d+)?",
)
COPIED = re.compile(r"\S/\S+/|\w=\S|python |https?:")  # may be wider than the terminal: paths and commands
ALIGNED = re.compile(r"\S {2,}\S|---")  # must not be: columns and rules; the terminal wraps sentences
BAR = re.compile("[\u2501\u2578\u257a]|%\\|")


def screen(command: str, folder: Path, width: int) -> str:
    """What a terminal shows after a command, its long lines whole, and the exit status."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{ROOT / 'tests'}"}
    script, *arguments = command.split()
    folder.mkdir(parents=True, exist_ok=True)
    terminal = pyte.HistoryScreen(1000, 50, history=10_000, ratio=1)
    terminal.set_mode(pyte.modes.LNM)
    stream = pyte.ByteStream(terminal)
    with Path(os.ttyname(slave)).open("wb", buffering=0) as output:
        started = [str(ROOT), str(SCREENS / "light.py"), str(ROOT / script), *arguments]
        process = Forked(started, cwd=folder, env=environment, stdout=output)
    while (status := process.poll()) is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.05)[0]:
            stream.feed(os.read(master, 65536))
    os.close(slave)
    os.close(master)
    lines = ["".join(line[column].data for column in range(1000)) for line in terminal.history.top]
    text = "\n".join(line.rstrip() for line in [*lines, *terminal.display]).strip("\n")
    return f"$ python {command}\n{text}\n[exit {status}]\n"


def masked(text: str) -> list[str]:
    for pattern in MASKED:
        text = re.sub(pattern, "#", text)
    return re.sub("[ #]*[# ][ #]*", " ", text).splitlines()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, str]]:
    """For a terminal of that width: a folder with a trained run, and the screen of its training."""

    @cache
    def train(width: int) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(f"screens{width}")
        (folder / "pictures").mkdir()
        for number in range(2):
            Image.linear_gradient("L").resize((28, 28)).save(folder / "pictures" / f"{number}.png")
        return folder, screen(COMMANDS["linear_probe"], folder, width)

    return train


@pytest.mark.parametrize(
    ("width", "name"),
    [
        *((80, name) for name in COMMANDS if name not in SLOW),
        *(pytest.param(80, name, marks=pytest.mark.long) for name in COMMANDS if name in SLOW),
        *(pytest.param(120, name, marks=pytest.mark.long) for name in COMMANDS if name not in LIKE_ANOTHER),
    ],
)
def test_screen(width: int, name: str, trained: Callable[[int], tuple[Path, str]]) -> None:
    folder, first = trained(width)
    place = folder if name in ON_A_RUN else folder / name
    text = first if name == "linear_probe" else screen(COMMANDS[name], place, width)
    text = text.replace(f"{folder}/", "")
    for line in text.splitlines()[1:]:
        assert not BAR.search(line), f"a part of a bar stays on the screen: {line}"
        assert len(line) <= width or COPIED.search(line) or not ALIGNED.search(line), f"wider than the terminal: {line}"
    assert text.endswith(f"[exit {int(name == 'wrong_setting')}]\n"), text
    kept = SCREENS / str(width) / f"{name}.txt"
    if os.environ.get("THAW_WRITE_SCREENS") and (not kept.is_file() or masked(text) != masked(kept.read_text())):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text)
    assert masked(text) == masked(kept.read_text())
