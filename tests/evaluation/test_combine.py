"""Which checkpoints may be combined, and what is said of others."""

from pathlib import Path
from typing import Any

import pytest
from conftest import compose_config
from omegaconf import DictConfig

from thaw.data.images import Source
from thaw.data.mnist import load_mnist
from thaw.evaluation.combine import combine, common_source
from thaw.evaluation.combine_settings import check_combination
from thaw.predict.predictor import Predictor, load_predictor
from thaw.run.errors import UserError
from thaw.run.values import check_command_settings


@pytest.mark.parametrize(
    ("ckpt", "changes", "message"),
    [
        ("a", {"combine": "soup"}, r"combine=soup is for several checkpoints, and ckpt=a is one; list them: 'ckpt=\["),
        (["a"], {"combine": "average"}, "combine=average is for several checkpoints"),
        (["a", "b", "c"], {"combine": "wise"}, "is for two checkpoints, .* lists 3; .* combine=soup"),
        (["a", "b"], {"combine": "soup", "tta": 4}, "tta=4 does not go with combine=soup"),
        (["a", "b"], {"tta": 4}, "tta=4 is for one checkpoint or an average, and ckpt lists 2; add combine=average"),
        ("a", {"augment": {"flip": 0.5}}, "tta=1 has none; add tta=8"),
    ],
)
def test_settings_that_do_not_go_together(ckpt: Any, changes: dict[str, Any], message: str) -> None:
    cfg = DictConfig({"ckpt": ckpt, "combine": None, "tta": 1, **changes})
    with pytest.raises(UserError, match=message):
        check_combination(cfg)
    for key, value in {"tta": 0, "combine": "mean", "alphas": [1.5]}.items():
        with pytest.raises(UserError, match=f"{key}="):
            check_command_settings(DictConfig({key: value}))


def test_checkpoints_that_are_not_one_model(
    linear_probe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, two = (load_predictor(str(linear_probe)) for _ in range(2))
    source = load_mnist("MNIST", "nowhere", "sample", None)

    def refused(message: str, other: Source = source, how: str = "average") -> None:
        cfg = DictConfig({"combine": how, "tta": 1})
        with pytest.raises(UserError, match=message):
            common_source(cfg, [one, two], [source, other])

    refused("best.ckpt twice; give each checkpoint once")
    two.checkpoint = tmp_path / "other.ckpt"
    for key, value in {"classes": ["a", "b"], "shape": (3, 28, 28), "reader": "photo"}.items():
        monkeypatch.setitem(two.data, key, value)  # type: ignore[arg-type]
        refused(f"another {key} .*; give runs on the same data")
        monkeypatch.undo()
    shorter = source.test.take(slice(9))
    refused("have other test images", source._replace(test=shorter))
    refused("have other val images .* combine=soup cannot be measured", source._replace(val=shorter), "soup")
    nothing = source._replace(val=source.val.take(slice(0)))
    cfg = DictConfig({"combine": "average", "tta": 1})
    assert not len(common_source(cfg, [one, two], [source, nothing]).val.labels), "one may have trained on the other's"
    assert common_source(cfg, [one, two], [source, source]) is source
    with pytest.raises(UserError, match=r"chosen on validation images, and .* has none"):
        common_source(DictConfig({"combine": "wise", "tta": 1}), [one], [nothing])
    monkeypatch.setattr(one.model, "task", object())
    refused("combine=average is for one class an image")


def test_views_need_an_augmentation_that_fits(linear_probe: Path) -> None:
    predictor = load_predictor(str(linear_probe))
    source = load_mnist("MNIST", "nowhere", "sample", None)

    def combined(*overrides: str) -> Predictor:
        return combine(compose_config("eval", "ckpt=a", "tta=3", *overrides), [predictor], source, None)

    with pytest.raises(UserError, match=r"tta=3 draws views .* changes nothing; add augment=affine for digits"):
        combined()
    with pytest.raises(UserError, match=r"augment.flip=0.5 mirrors digits, which are then others; set it to 0"):
        combined("augment=natural")
    result = combined("augment=affine")
    assert result.facts()["combined"] == {"how": "views", "members": ["vit_linear_probe"], "views": 3}
    assert result.cfg.name == "vit_linear_probe tta=3"
