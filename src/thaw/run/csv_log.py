"""The metrics of a run as a CSV file, which a run that is resumed in its own folder continues."""

import csv
import io
import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from thaw.run.checkpoint import load_checkpoint, run_folder
from thaw.run.config import yaml_text
from thaw.run.files import write_errors, write_text

log = logging.getLogger(__name__)


class RunCSV(CSVLogger):
    """Lightning's CSV logger, except that a resumed run starts with the rows that were written before its checkpoint.

    Rows that the earlier run wrote later are dropped: what they tell of is done again. `resume` is the checkpoint that
    the run resumes from, or None.
    """

    def __init__(
        self, save_dir: str, name: str, version: str, flush_logs_every_n_steps: int, resume: str | None
    ) -> None:
        super().__init__(save_dir, name, version, flush_logs_every_n_steps=flush_logs_every_n_steps)
        self.resume = resume
        self.num_rows = 0  # that have been logged
        self.last_row: dict[str, str] = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            path = Path(self.log_dir, MetricsWriter.NAME_METRICS_FILE)
            header, rows = rows_before(Path(self.resume), path) if self.resume else ([], [])
            if rows:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_rows(path, header, rows)
            else:
                path.unlink(missing_ok=True)
            self.num_rows = len(rows)
            self.last_row = {key: value for key, value in rows[-1].items() if value} if rows else {}
            self._experiment = MetricsWriter(self.log_dir)
            self._experiment.metrics_keys = header
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Add a row, unless it equals the last one: the end of an epoch is logged before a checkpoint and after it."""
        self.experiment  # noqa: B018  (reads the rows before)
        row = {key: str(value) for key, value in {**metrics, "step": step}.items()}
        if row != self.last_row:
            super().log_metrics(metrics, step)
            self.num_rows, self.last_row = self.num_rows + 1, row

    def write_all(self) -> int:
        """Write what is logged so far; returns the number of rows."""
        self.save()
        return self.num_rows


def rows_before(checkpoint: Path, path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows that a checkpoint's run had logged when it was written; `path` is the resumed run's own file."""
    own = run_folder(checkpoint) / path.parent.name / path.name
    if not own.is_file():
        return [], []
    header, rows = read_rows(own)
    saved = load_checkpoint(checkpoint)
    if (count := saved.get("csv_rows")) is None:  # of an earlier version
        steps: int = saved["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        rows = [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) < steps]
    return header, rows[:count]


class MetricsWriter(ExperimentWriter):
    """Lightning's, except that it adds to the file that is there, and loses no row.

    Rows that cannot be written wait in memory: a full disk may get room again, and the run goes on.
    """

    waiting = False

    def _check_log_dir_exists(self) -> None:  # Lightning's removes the file
        pass

    def save(self) -> None:
        path, header = Path(self.metrics_file_path), sorted({*self.metrics_keys}.union(*self.metrics))
        try:
            if header == self.metrics_keys and path.is_file():
                add_rows(path, header, self.metrics)
            elif self.metrics:
                write_rows(path, header, [*(read_rows(path)[1] if path.is_file() else []), *self.metrics])
        except OSError as error:
            if not self.waiting:
                log.warning("%s The run goes on; the rows wait in memory for room on the disk.", error)
            self.waiting = True
        else:
            self.metrics_keys, self.metrics, self.waiting = header, [], False

    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams.update(params)
        write_text(yaml_text(self.hparams), Path(self.log_dir, self.NAME_HPARAMS_FILE))


def add_rows(path: Path, header: list[str], rows: list[dict[str, Any]]) -> None:
    """Add all rows to the file or, where that fails, none."""
    with write_errors(path):
        size = path.stat().st_size
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, header).writerows(rows)
        except OSError:
            os.truncate(path, size)
            raise


def write_rows(path: Path, header: list[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV of metrics."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)
