"""LoRA: starts as the plain model, computes W + alpha / r B A, merges without a trace, and trains alone."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import compose_run
from torch import Tensor, nn

from thaw.classifier import Classifier
from thaw.data.module import Batch
from thaw.evaluation.cost import flops
from thaw.freezing.added import merge_added, plain_name
from thaw.freezing.lora import add_lora
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError
from thaw.run.values import check_types

Build = Callable[..., Classifier]
CONVNET = {"name": "test_resnet", "arguments": {}}


def adapted(classifier: Build, policy: Callable, **changes: object) -> Classifier:
    """With a trained look: B is no longer 0."""
    model = classifier(policy("lora", lora=changes))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def updates(model: nn.Module) -> dict[str, Tensor]:
    """B A of each adapted layer."""
    state = model.state_dict()
    factors = {name.rpartition(".parametrizations")[0] for name in state if "lora_" in name}
    part = "{}.parametrizations.weight.0.lora_{}"
    return {name: state[part.format(name, "B")] @ state[part.format(name, "A")] for name in sorted(factors)}


def test_starts_as_the_plain_model(classifier: Build, batch: Batch) -> None:
    plain, lora = classifier("full"), classifier("lora")
    assert len(updates(lora)) == 3 * 4  # qkv, proj, fc1, fc2 of each block
    lora.head.load_state_dict(plain.head.state_dict())
    for name, tensor in plain.state_dict().items():
        theirs = {plain_name(key): value for key, value in lora.state_dict().items()}
        assert torch.equal(theirs[name], tensor), name
    assert torch.equal(lora.eval()(batch.images), plain.eval()(batch.images))


@pytest.mark.parametrize(("rank", "alpha"), [(1, 16.0), (8, 0.5), (32, 3.0)])
def test_equals_the_sum_by_hand_and_merges_into_it(
    classifier: Build, policy: Callable, batch: Batch, rank: int, alpha: float
) -> None:
    model = adapted(classifier, policy, rank=rank, alpha=alpha).eval()
    hand = classifier("full").eval()
    hand.head.load_state_dict(model.head.state_dict())
    before = hand(batch.images)
    for name, product in updates(model).items():
        assert torch.linalg.matrix_rank(product) == rank
        hand.get_submodule(name).weight.data += alpha / rank * product
    logits = model(batch.images)
    torch.testing.assert_close(logits, hand(batch.images), rtol=1e-4, atol=1e-5)
    assert (logits - before).abs().max() > 0.01

    merge_added(model)
    assert torch.equal(model(batch.images), logits)
    assert model.state_dict().keys() == hand.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in hand.modules()]
    for name, tensor in hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_merging_changes_nothing_in_mixed_precision(classifier: Build, policy: Callable, batch: Batch) -> None:
    model = adapted(classifier, policy).eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.images)
        merge_added(model)
        assert torch.equal(model(batch.images), logits)


def test_factors_and_head_train_and_nothing_else(classifier: Build, batch: Batch, fit: Callable) -> None:
    model = classifier("lora", optim={"weight_decay": 0.0})
    before = copy.deepcopy(model.state_dict())
    fit(model, [batch] * 3)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    factors = {f"{name}.parametrizations.weight.0.lora_{x}" for name in updates(model) for x in "AB"}
    assert moved == factors | {"head.linear.weight", "head.linear.bias"}


@pytest.mark.parametrize("last", [1, 2, None])
def test_what_lies_below_the_last_layers_is_left_alone(classifier: Build, policy: Callable, last: int | None) -> None:
    model = classifier(policy("lora", lora={"last": last}))
    blocks = {int(name.split("blocks.")[1][0]) for name in updates(model)}
    assert blocks == set(range(3 - (last or 3), 3))
    assert (model.thaw.cut(0), model.thaw.next_cut_epoch(0)) == (4 - (last or 3), float("inf"))  # stem and blocks


def test_a_copy_stands_alone(classifier: Build, policy: Callable, batch: Batch) -> None:
    model = adapted(classifier, policy).eval()
    twin = copy.deepcopy(model.backbone)
    images = model.preprocess(batch.images)
    assert torch.equal(twin(images), model.backbone(images))
    for name, parameter in twin.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.zero_()
    assert not torch.equal(twin(images), model.backbone(images))
    before = model(batch.images)
    merge_added(twin)
    assert len(updates(model)) == 12
    assert torch.equal(model(batch.images), before)


def test_flops_are_those_of_the_merged_model(classifier: Build, policy: Callable, batch: Batch) -> None:
    model = adapted(classifier, policy).eval()
    logits, counted = model(batch.images), flops(model, batch.images[:1])
    assert torch.equal(model(batch.images), logits)
    merge_added(model)
    assert flops(model, batch.images[:1]) == counted


def test_state_dict_round_trip(classifier: Build, policy: Callable, batch: Batch, tmp_path: Path) -> None:
    model, other = adapted(classifier, policy), classifier("lora")
    assert not torch.equal(model.eval()(batch.images), other.eval()(batch.images))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(model(batch.images), other(batch.images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"match": r".*\.nothing"},
            r"freeze\.lora\.match='.*nothing' is the name of no linear layer; .* attn\.qkv, mlp",
        ),
        ({"match": r".*\.blocks\.0\..*", "last": 2}, "is the name of no linear layer in the last 2 layers"),
        ({"rank": 0}, r"freeze\.lora\.rank=0 must be from 1 to 32"),
        ({"rank": 33}, r"freeze\.lora\.rank=33 must be from 1 to 32, the smallest side"),
        ({"last": 0}, r"freeze\.lora\.last=0 must be from 1 to 4"),
        ({"last": 5}, r"freeze\.lora\.last=5 must be from 1 to 4, the backbone's layers, or null"),
    ],
)
def test_what_cannot_be_is_refused(backbone: Callable[..., Backbone], changes: dict, message: str) -> None:
    model = backbone()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"match": r".*\.(attn|mlp)\..*", "last": None, "rank": 8, "alpha": 16.0} | changes)
    assert not updates(model)


@pytest.mark.parametrize("alpha", ["0.0", "nan"])
def test_the_scale_is_above_0(alpha: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"freeze.lora.alpha={alpha} must be a number above 0"):
        check_types(compose_run(tmp_path, "freeze=lora", f"freeze.lora.alpha={alpha}"))


def test_a_model_without_linear_layers(backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(
        ValueError, match=r"this backbone has none: choose another policy, e\.g\. freeze=last_blocks, or a transformer"
    ):
        add_lora(backbone(**CONVNET), ".*", None, 1, 1.0)
