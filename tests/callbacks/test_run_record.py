"""How many parameters a run is said to train."""

from pathlib import Path

import lightning as L
import pytest
from conftest import compose_run
from hydra.utils import instantiate

from thaw.callbacks.run_record import count_parameters


@pytest.mark.parametrize(("epochs", "trained"), [(1, ["head."]), (2, ["head.", "blocks.2.", "fc_norm."]), (-1, [""])])
def test_what_thaws_after_the_last_epoch_does_not_count(
    tiny_run: list[str], tmp_path: Path, epochs: int, trained: list[str]
) -> None:
    """Gradual thawing: the head at first, then a block an epoch from the top."""
    cfg = compose_run(tmp_path, *tiny_run, "freeze=gradual", "backbone.fused_attention=false")
    model: L.LightningModule = instantiate(cfg.model)
    named = dict(model.named_parameters())
    expected = sum(p.numel() for name, p in named.items() if any(part in name for part in trained))
    assert count_parameters(model, epochs) == {
        "trainable_params": expected,
        "total_params": sum(p.numel() for p in named.values()),
    }
    assert count_parameters(model) == count_parameters(model, -1)
