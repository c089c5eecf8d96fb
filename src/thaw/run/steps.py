"""Spares a training step what nobody reads; for a small model Lightning's loop takes longer than the arithmetic."""

from collections.abc import Sequence
from typing import Any

STEP_HOOKS = (  # of a callback, in each training step
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)


def is_logged(trainer: Any | None) -> bool:
    """Whether something reads what a training step logs: a logger, an epoch's line or a validation that follows.

    Logging takes as long as the step of a linear head.
    """
    if trainer is None:
        return False
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    is_last = loop.batch_progress.is_last_batch or trainer.global_step + 1 == trainer.max_steps
    return is_last or trainer._logger_connector.should_update_logs or loop._should_check_val_fx(fit._data_fetcher)


def skip_empty_hooks(callbacks: Sequence[Any]) -> None:
    """Let Lightning skip the hooks of a step that a callback does not have, 0.2 ms of each step for 15 callbacks."""
    from lightning import Callback

    for callback in callbacks:
        for hook in STEP_HOOKS:
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)  # Lightning calls what is callable
