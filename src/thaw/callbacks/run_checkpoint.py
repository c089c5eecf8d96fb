"""Checkpoints of a run that may go on in another folder."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, except that a resumed run takes the best checkpoint so far into its own folder.

    Without that, the resumed run would forget the best score and keep a worse model as its best.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = Path(state_dict["best_model_path"])
        if not best.is_file():  # nothing to take along: the best is chosen among the epochs to come
            return
        assert self.dirpath is not None
        moved = Path(self.dirpath) / best.name
        if moved != best:
            moved.parent.mkdir(parents=True, exist_ok=True)
            part = moved.with_suffix(".part")
            shutil.copyfile(best, part)
            part.replace(moved)
        paths = {path: str(moved) for path in (str(best), state_dict["kth_best_model_path"])}
        super().load_state_dict(
            state_dict
            | {
                "dirpath": self.dirpath,
                "best_model_path": str(moved),
                "best_k_models": {paths.get(path, path): score for path, score in state_dict["best_k_models"].items()},
                "kth_best_model_path": paths[state_dict["kth_best_model_path"]],
                "last_model_path": "",
            }
        )
