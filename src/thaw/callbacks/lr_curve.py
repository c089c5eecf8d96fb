"""After a run with head=lr_bank: which head won, and a picture of how all of them did."""

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from thaw.lr_bank import BankClassifier
from thaw.run.files import dispensable
from thaw.run.loggers import log_image


class LRCurve(Callback):
    """Draws an `LRBank`'s accuracies as `<run_dir>/report/lr_bank.png`, tells loggers and `pl_module` the winner."""

    def __init__(self, run_dir: str) -> None:
        self.path = Path(run_dir) / "report" / "lr_bank.png"

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not isinstance(pl_module, BankClassifier) or not trainer.is_global_zero:
            return
        from thaw.pages.lr_curve import save_lr_curve  # matplotlib, only for pictures

        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        state: Any = trainer.strategy.load_checkpoint(best)["state_dict"] if best else pl_module.state_dict()
        number, bank = int(state["head.chosen"]), pl_module.head
        lr, weight_decay = bank.settings[number]
        pl_module.winner = {"best_lr": lr, "best_weight_decay": weight_decay, "heads": len(bank.names)}
        with dispensable():
            save_lr_curve(bank.settings, pl_module.best_acc.tolist(), number, self.path)
            log_image(trainer.loggers, "val/lr_bank", self.path)
        for logger in trainer.loggers:
            logger.log_metrics({"best/lr": lr, "best/weight_decay": weight_decay}, step=trainer.global_step)
