"""What a policy adds starts as the plain model and merges without a trace; test_schedule.py: it trains alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.evaluation.cost import flops
from thaw.freezing.added import added_names, merge_added, plain_name
from thaw.freezing.policy import FreezePolicy

Build = Callable[..., Classifier]
METHODS = ["lora", "dora", "ssf"]  # that are merged into the weights
ALL = [*METHODS, "adapter", "prompt"]
MODELS: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {"name": "test_resnet", "arguments": {"zero_init_last": False}},  # its convolutions have no bias
}


def plain_like(model: Classifier, classifier: Build, kind: str = "vit") -> Classifier:
    """The model before anything was added, with the same head."""
    plain = classifier("full", **MODELS[kind])
    plain.head.load_state_dict(model.head.state_dict())
    return plain.eval()


def trained(classifier: Build, policy: str | FreezePolicy, kind: str = "vit") -> Classifier:
    """In eval mode, and with a trained look: added parameters are not where they start."""
    model = classifier(policy, **MODELS[kind])
    generator = torch.Generator().manual_seed(1)
    for name in added_names(model):
        parameter = model.get_parameter(name)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_plain_model(classifier: Build, batch: Batch, method: str, kind: str) -> None:
    model = classifier(method, **MODELS[kind]).eval()
    plain = plain_like(model, classifier, kind)
    added, state = set(added_names(model)), model.state_dict()
    assert added and added < state.keys()
    own = {plain_name(name): tensor for name, tensor in state.items() if name not in added}
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in own.items())
    assert torch.equal(model(batch.images), plain(batch.images))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_merges_without_a_trace(classifier: Build, batch: Batch, method: str, kind: str) -> None:
    model = trained(classifier, method, kind)
    plain = plain_like(model, classifier, kind)
    model.thaw.apply(0)
    model.eval()
    mixed = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad():
        logits = model(batch.images)
        assert (logits - plain(batch.images)).abs().max() > 0.01
        with mixed:
            rounded = model(batch.images)
        merge_added(model)
        assert torch.equal(model(batch.images), logits)
        with mixed:
            assert torch.equal(model(batch.images), rounded)
    assert added_names(model) == []
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("last", [1, 2, None])
def test_what_lies_below_the_last_layers_is_left_alone(
    classifier: Build, policy: Callable, method: str, last: int | None
) -> None:
    """So that its output can be cached; the key of the cache is made of the names and tensors of these layers."""
    model = classifier(policy(method, **{method: {"last": last}}))
    cut = 4 - last if last else {"ssf": 0}.get(method, 1)  # stem and blocks
    assert (model.thaw.cut(0), model.thaw.next_cut_epoch(0)) == (cut, float("inf"))
    assert {model.depths()[name] for name in added_names(model)} == set(range(cut, 4))
    below, plain = (each.backbone.layers_state(cut) for each in (model, classifier("linear_probe")))
    assert below.keys() == plain.keys() and all(torch.equal(below[name], plain[name]) for name in plain)


@pytest.mark.parametrize("method", ALL)
def test_a_copy_stands_alone(classifier: Build, batch: Batch, method: str) -> None:
    model = trained(classifier, method)
    twin, images = copy.deepcopy(model.backbone), model.preprocess(batch.images)
    assert torch.equal(twin(images), model.backbone(images))
    for name in added_names(twin):
        twin.get_parameter(name).data += 0.1
    assert not torch.equal(twin(images), model.backbone(images))
    before, names = model(batch.images), added_names(model)
    merge_added(twin)
    assert added_names(model) == names
    assert torch.equal(model(batch.images), before)


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_the_merged_model(classifier: Build, batch: Batch, method: str) -> None:
    model = trained(classifier, method)
    logits, counted = model(batch.images), flops(model, batch.images[:1])
    assert torch.equal(model(batch.images), logits)
    merge_added(model)
    assert flops(model, batch.images[:1]) == counted


@pytest.mark.parametrize("method", ALL)
def test_state_dict_round_trip(classifier: Build, batch: Batch, tmp_path: Path, method: str) -> None:
    model, other = trained(classifier, method), classifier(method)
    assert not torch.equal(model(batch.images), other.eval()(batch.images))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(model(batch.images), other(batch.images))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_batch_norm_are_frozen(classifier: Build, method: str, kind: str) -> None:
    """A layer with added parameters has the mode of its own, and checkpoints leave its buffers out."""
    model = classifier(method, **MODELS[kind])
    model.thaw.apply(0)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert bool(norms) == (kind == "resnet") and not any(norm.training for norm in norms.values())
    assert {f"{name}.running_mean" for name in norms} <= set(model.thaw.constant())


@pytest.mark.parametrize("method", METHODS)
def test_rules_that_never_train_it_are_refused(classifier: Build, policy: Callable, method: str) -> None:
    rules = [{"match": r"head\..*", "train": True}, {"match": ".*", "train": False}]
    kinds = {"lora": r"lora_A\|lora_B", "dora": r"lora_A\|lora_B\|magnitude", "ssf": r"ssf_scale\|ssf_shift"}[method]
    with pytest.raises(ValueError, match=rf"freeze\.add adds backbone\.\S+ and \d+ more, .*\({kinds}\)', train: true"):
        classifier(policy(method, rules=rules))
