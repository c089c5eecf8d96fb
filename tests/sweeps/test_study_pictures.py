"""Pictures of a search whose trials lie close together."""

from pathlib import Path

import optuna
import pytest
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution
from pages.texts import unreadable

from thaw.sweeps.study import silence_optuna
from thaw.sweeps.study_pictures import draw_study

POLICIES = ("linear_probe", "norm_only", "bias_only", "lora", "last_blocks", "full")


def test_every_policy_of_the_front_is_named_and_no_texts_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence_optuna()
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr("thaw.sweeps.curves.save_figure", lambda figure, path: drawn.update({path.stem: figure}))
    objectives = {"val/acc": "maximize", "trainable_params": "minimize"}
    study = optuna.create_study(directions=list(objectives.values()))
    space = {"freeze": CategoricalDistribution(POLICIES), "optim.lr": FloatDistribution(1e-4, 1.0, log=True)}
    for place in range(12):  # the second half is worse
        policy, accuracy = POLICIES[place % 6], 0.98 + 0.001 * (place % 6) - 0.5 * (place >= 6)
        params = {"freeze": policy, "optim.lr": 0.001 * (place + 1)}
        values = [accuracy, 1930 * 4 ** (place % 6)]
        study.add_trial(optuna.create_trial(params=params, distributions=space, values=values))
    titles = [title for title, _ in draw_study(study, objectives, tmp_path)]
    assert len(titles) == len(drawn) == 5 and "val/acc against trainable_params" in titles
    front = drawn["front_trainable_params"].axes[0]
    assert sorted(text.get_text() for text in front.texts) == sorted(POLICIES)
    assert "log scale of the error" in front.get_ylabel()
    assert drawn["history_trainable_params"].axes[0].get_yscale() == "log"
    for figure in drawn.values():
        assert not unreadable(figure)
