"""Which corruptions are measured, and the means of what a model answers."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from thaw.data.images import Images
from thaw.evaluation import corruptions, robustness
from thaw.evaluation.robustness import SETS, choose_corruptions, number_corrupted, robustness_facts
from thaw.predict.predictor import Predictor


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ((1, 28, 28), "mnist_c"),
        ((3, 28, 28), "cifar10_c"),
        ((3, 64, 90), "cifar10_c"),
        ((1, 32, 32), "cifar10_c"),
        ((3, 96, 96), "imagenet_c"),
    ],
)
def test_the_set_fits_the_images(shape: tuple[int, ...], key: str) -> None:
    found, chosen = choose_corruptions("auto", shape)
    assert found == key and list(chosen) == list(SETS[key].published)
    assert choose_corruptions("imagenet_c", shape)[0] == "imagenet_c"
    _, named = choose_corruptions(["zigzag", "fog"], shape)
    assert list(named) == ["zigzag", "fog"] and named["fog"].side == SETS[key].side
    with pytest.raises(
        ValueError, match=r"robustness.corruptions=frost,rain is unknown; allowed are auto, mnist_c, .*, zoom_blur"
    ):
        choose_corruptions(["fog", "frost", "rain"], shape)


class Darkness:
    """Answers 1 for images above a mean grey; a corruption that brightens makes it err."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def logits(self, images: Tensor, advance: Callable[[int], Any]) -> Tensor:
        self.seen.append(len(images))
        advance(len(images))
        bright = images.double().mean(dim=(1, 2, 3)) > 60
        return torch.stack([~bright, bright], dim=1).double()


def test_means_are_over_severities_then_corruptions_however_images_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = torch.linspace(0, 100, 41).round().to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    model = Darkness()
    test = Images(grey, (grey[:, 0, 0, 0] > 60).long())
    settings = {"corruptions": ["brightness", "stripe"], "severities": [4, 2, 2], "images": 21}
    clean = model.logits(grey, lambda _: None)
    done: list[int] = []
    facts = robustness_facts(cast(Predictor, model), test, clean, settings, done.append)
    assert sum(done) == number_corrupted(test, settings) == 3 * 21 == 3 * facts["images"]
    chosen = grey[torch.linspace(0, 40, 21).round().long(), 0, 0, 0].double()
    curve = [(0, 1.0)]
    for severity, more in ((2, 51), (4, 102)):
        curve.append((severity, float((((chosen + more) > 60) == (chosen > 60)).double().mean())))
    assert facts["curves"]["brightness"] == curve
    inverted = chosen / 2 + (255 - chosen) / 2  # a half of each image
    striped = float(((inverted > 60) == (chosen > 60)).double().mean())
    assert facts["curves"]["stripe"] == [(0, 1.0), (1, striped)]
    assert facts["mean"] == pytest.approx(((curve[1][1] + curve[2][1]) / 2 + striped) / 2)
    assert "released" not in facts, "not the whole of a set"
    monkeypatch.setattr(robustness, "CORRUPTED_AT_ONCE", 8 * 28 * 28)
    model.seen.clear()
    assert robustness_facts(cast(Predictor, model), test, clean, settings, done.append) == facts
    assert model.seen == 3 * [8, 8, 5]


def test_the_severities_of_mnist_cs_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "PLASMA_POINTS", 2**17)
    corruptions.plasma_maps.cache_clear()
    grey = torch.full((2, 1, 28, 28), 50, dtype=torch.uint8)
    model, test = Darkness(), Images(grey, torch.tensor([0, 0]))
    settings = {"corruptions": "auto", "severities": [1, 2, 3, 4, 5], "images": None}
    clean = model.logits(grey, lambda _: None)
    facts = robustness_facts(cast(Predictor, model), test, clean, settings, lambda _: None)
    assert facts["set"] == "mnist_c" and len(facts["curves"]) == 15
    levels = SETS["mnist_c"].released | dict.fromkeys(("stripe", "dotted_line", "zigzag", "canny_edges"), 1)
    assert facts["released"] == pytest.approx(sum(dict(facts["curves"][name])[levels[name]] for name in levels) / 15)
    some = robustness_facts(cast(Predictor, model), test, clean, settings | {"severities": [3]}, lambda _: None)
    assert "released" not in some and some["mean"] == pytest.approx(sum(some["means"].values()) / 15)
    none = robustness_facts(cast(Predictor, model), test, clean, settings | {"corruptions": []}, lambda _: None)
    assert none["mean"] is None and none["curves"] == {}
