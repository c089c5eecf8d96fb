"""Averaged weights against sums by hand, the papers' selection, and torch's update of batch norms."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import compose_run
from hydra.utils import instantiate
from torch import nn
from torch.optim.swa_utils import update_bn

from thaw.data.images import Source
from thaw.data.mnist import load_mnist
from thaw.evaluation.mixture import Mixture, blend, greedy_soup
from thaw.lr_bank import LRBank
from thaw.predict.predictor import Predictor, load_predictor
from thaw.run.config import plain, settle
from thaw.run.errors import UserError

VIT = ["experiment=vit_from_scratch", "augment=none", "backbone.arguments.depth=2"]
VIT += ["+backbone.arguments.embed_dim=32", "+backbone.arguments.num_heads=2"]
CONVNET = ["experiment=baseline/convnet", "backbone.widths=[8,16]"]


@pytest.fixture(scope="module")
def source() -> Source:
    sample = load_mnist("MNIST", "nowhere", "sample", None)
    return sample._replace(train=sample.train.take(slice(600)), val=sample.val.take(slice(60)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Predictor]]:
    """Checkpoints that were fine-tuned from the same weights, by small random steps of what trains."""

    @cache
    def make(count: int, *overrides: str) -> list[Predictor]:
        folder = tmp_path_factory.mktemp("runs")
        fixed = ["data.source=sample", "logger=none", "trainer.precision=32-true", "model.num_classes=10"]
        cfg = compose_run(folder, *fixed, *overrides)
        settle(cfg)
        torch.manual_seed(0)
        model: Any = instantiate(cfg.model).eval()
        found = []
        for seed in range(count):
            torch.manual_seed(seed + 1)
            each = copy.deepcopy(model)
            for name in (name for name, epoch in each.thaw.epochs.items() if epoch == 0):
                each.get_parameter(name).data += 0.05 * torch.randn_like(each.get_parameter(name))
            for norm in each.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            data = {"name": "MNIST", "origin": "sample", "classes": [*map(str, range(10))]}
            data |= {"shape": [1, 28, 28], "reader": "digit"}
            path = folder / f"run_{seed}" / "checkpoints" / "best.ckpt"
            path.parent.mkdir(parents=True)
            torch.save({"config": plain(cfg), "state_dict": each.state_dict(), "data": data}, path)
            found.append(load_predictor(str(path)))
        return found

    return make


def test_blend() -> None:
    states = [{"w": torch.randn(3, 2), "n": torch.tensor(number)} for number in range(3)]
    mixed = blend(states, [0.5, 0.2, 0.3])
    assert torch.allclose(mixed["w"], 0.5 * states[0]["w"] + 0.2 * states[1]["w"] + 0.3 * states[2]["w"])
    assert mixed["n"] == 0 and mixed["w"].dtype == torch.float32
    assert torch.equal(blend(states, [0.0, 1.0, 0.0])["w"], states[1]["w"])


def test_greedy_soup_as_in_the_paper() -> None:
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        table = {}
        for chosen in range(1, 32):  # an accuracy for each set of five models, with many ties
            members = frozenset(n for n in range(5) if chosen >> n & 1)
            table[members] = int(torch.randint(0, 4, (), generator=generator)) / 4
        alone = [table[frozenset([n])] for n in range(5)]
        ingredients: list[int] = []  # recipe 1, line by line
        for number in sorted(range(5), key=lambda n: (-alone[n], n)):
            if not ingredients or table[frozenset([*ingredients, number])] >= table[frozenset(ingredients)]:
                ingredients.append(number)
        kept, tried = greedy_soup(alone, lambda chosen, table=table: table[frozenset(chosen)])
        assert kept == ingredients and tried[kept[-1]] == table[frozenset(kept)]


def test_lora_is_merged_before_weights_are_averaged(
    saved: Callable[..., list[Predictor]], source: Source, tmp_path: Path
) -> None:
    members = saved(2, *VIT, "freeze=lora")
    before = [copy.deepcopy(member.model.state_dict()) for member in members]
    mixture = Mixture(members, source, "combine=soup", tmp_path / "soup" / "checkpoints" / "best.ckpt")
    logits = mixture.load([0.25, 0.75]).logits(source.val.images)
    layer = "backbone.model.blocks.1.attn.qkv.parametrizations.weight"
    merged = [
        state[f"{layer}.original"] + 16 / 8 * state[f"{layer}.0.lora_B"] @ state[f"{layer}.0.lora_A"]
        for state in before
    ]
    weight = mixture.predictor.model.state_dict()["backbone.model.blocks.1.attn.qkv.weight"]
    assert torch.allclose(weight, 0.25 * merged[0] + 0.75 * merged[1], atol=1e-6)
    assert all(torch.equal(members[0].model.state_dict()[name], tensor) for name, tensor in before[0].items())
    mixture.save([], "combine=soup of two")
    again = load_predictor(str(tmp_path / "soup"))
    assert torch.equal(again.logits(source.val.images), logits)
    assert not any("lora" in name for name in again.model.state_dict())
    ends = [mixture.load(shares).logits(source.val.images) for shares in ([1.0, 0.0], [0.0, 1.0])]
    for end, member in zip(ends, members, strict=True):
        assert torch.allclose(end, member.logits(source.val.images), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["adapter", "prompt", "dora", "ssf"])
def test_what_cannot_be_merged_is_averaged_as_it_is(
    policy: str, saved: Callable[..., list[Predictor]], source: Source, tmp_path: Path
) -> None:
    members = saved(2, *VIT, f"freeze={policy}")
    mixture = Mixture(members, source, "combine=soup", tmp_path / "soup" / "checkpoints" / "best.ckpt")
    logits = mixture.load([0.5, 0.5]).logits(source.val.images)
    mixture.save([], "combine=soup of two")
    assert torch.equal(load_predictor(str(tmp_path / "soup")).logits(source.val.images), logits)
    alone = mixture.load([0.0, 1.0]).logits(source.val.images)
    assert torch.allclose(alone, members[1].logits(source.val.images), atol=1e-4)


def test_batch_norms_get_the_statistics_of_the_mean(
    saved: Callable[..., list[Predictor]], source: Source, tmp_path: Path
) -> None:
    members = saved(2, *CONVNET)
    mixture = Mixture(members, source, "combine=soup", tmp_path / "best.ckpt")
    expected = copy.deepcopy(members[0].model)
    expected.load_state_dict(blend([member.model.state_dict() for member in members], [0.5, 0.5]))
    update_bn(source.train.images.split(members[0].batch_size), expected)  # type: ignore[arg-type]
    found = mixture.load([0.5, 0.5]).model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    assert not any(module.training for module in mixture.predictor.model.modules())
    alone = mixture.load([0.0, 1.0]).model.state_dict()
    assert all(torch.equal(alone[name], tensor) for name, tensor in members[1].model.state_dict().items())


def test_alpha_is_chosen_on_validation(saved: Callable[..., list[Predictor]], source: Source, tmp_path: Path) -> None:
    members = saved(2, *VIT)
    alphas = [0.0, 0.5, 1.0]
    robustness: dict[str, Any] = {"images": 10, "corruptions": ["rotate"], "severities": [3]}
    mixture = Mixture(members, source, "combine=wise", tmp_path / "best.ckpt")
    facts = mixture.choose_alpha(alphas, robustness)
    scores = []
    for row, alpha in zip(facts["between"], alphas, strict=True):
        state = {
            name: (1 - alpha) * tensor + alpha * members[1].model.state_dict()[name]
            for name, tensor in members[0].model.state_dict().items()
        }
        model = copy.deepcopy(members[0].model)
        model.load_state_dict(state)
        logits = model(source.val.images).detach()
        right = (logits.argmax(dim=1) == source.val.labels).float().mean()
        assert row["val/acc"] == pytest.approx(float(right)) and 0 <= row["corrupted"] <= 1
        scores.append((row["val/acc"], -float(F.cross_entropy(logits, source.val.labels))))
    assert facts["alpha"] == alphas[scores.index(max(scores))]


def changed(predictor: Predictor) -> Predictor:
    """A copy that a test may change."""
    other = copy.copy(predictor)
    other.cfg, other.model = copy.deepcopy(predictor.cfg), copy.deepcopy(predictor.model)
    return other


def test_other_models_are_refused(saved: Callable[..., list[Predictor]], source: Source, tmp_path: Path) -> None:
    first, second = saved(2, *VIT, "freeze=lora")

    def refused(other: Predictor, message: str) -> None:
        with pytest.raises(UserError, match=message + r".*combine=average"):
            Mixture([first, other], source, "combine=soup", tmp_path / "best.ckpt")

    other = changed(second)
    other.cfg.backbone.arguments.drop_path_rate = 0.5  # matters in training alone
    Mixture([first, other], source, "combine=soup", tmp_path / "best.ckpt")
    other.cfg.backbone.arguments.patch_size = 14
    refused(other, "backbone.arguments.patch_size is 7 and 14")
    other = changed(second)
    other.model.head.linear = nn.Linear(32, 11)
    refused(other, r"head.linear.weight is \(10, 32\) and \(11, 32\)")
    other = changed(second)
    other.model.head = LRBank(32, 10, "layer", [0.1, 0.2], [0.0])
    refused(other, "head=lr_bank has many heads")
    other = changed(second)
    other.model.backbone.model.blocks[0].norm1.weight.data.add_(1)
    refused(other, r"blocks\.0\.norm1\.weight is frozen in both, and differs")


def test_models_of_two_policies(saved: Callable[..., list[Predictor]], source: Source, tmp_path: Path) -> None:
    """What is frozen in one may train in the other, as in WiSE-FT."""
    members = [saved(2, *VIT, "freeze=lora")[0], saved(1, *VIT, "freeze=linear_probe")[0]]
    Mixture(members, source, "combine=wise", tmp_path / "best.ckpt")
