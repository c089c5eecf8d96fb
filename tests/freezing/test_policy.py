"""Freezing policies: what the rules decide, what they refuse, and what they set on a model."""

import math
import random
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn

from thaw.classifier import Classifier
from thaw.freezing.policy import FreezePolicy, Thaw

Build = Callable[..., Classifier]

HEAD, REST = {"match": r"head\..*", "train": True}, {"match": r"backbone\..*", "train": False}
DEPTHS = {"backbone.stem.weight": 0, "backbone.blocks.0.weight": 1, "backbone.blocks.1.weight": 2, "head.weight": 3}
NEVER = math.inf


def thaw_epochs(rules: list[dict], depths: dict[str, int] | None = None) -> list[float]:
    depths = DEPTHS if depths is None else depths
    thaws = FreezePolicy(rules, add=None).thaw_epochs(depths)
    assert list(thaws) == list(depths)
    return list(thaws.values())


# What the rules decide, for the stem, two blocks and the head


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([HEAD, {"match": r"backbone\.blocks\.1\..*", "train": True}, REST], [NEVER, NEVER, 0, 0]),
        ([{"match": [r"head\..*", r".*\.1\..*"], "train": True}, REST], [NEVER, NEVER, 0, 0]),
        ([{"match": ".*", "train": True, "last": 1}, REST], [NEVER, NEVER, 0, 0]),
        ([{"match": ".*", "train": True, "last": 2}, REST], [NEVER, 0, 0, 0]),
        ([HEAD, {"match": ".*", "train": True, "first": 0}, REST], [0, NEVER, NEVER, 0]),
        ([HEAD, {"match": ".*", "train": True, "first": 1}, REST], [0, 0, NEVER, 0]),
        ([HEAD, {"match": ".*", "train": True, "from_epoch": 3}], [3, 3, 3, 0]),
        ([HEAD, {"match": ".*", "train": True, "from_epoch": 2, "blocks": 1, "every": 3}], [8, 5, 2, 0]),
        ([HEAD, {"match": ".*", "train": True, "blocks": 2, "every": 3}], [3, 0, 0, 0]),
        ([{"match": ".*", "train": True, "from_epoch": 0}], [0, 0, 0, 0]),
    ],
)
def test_thaw_epochs_by_hand(rules: list[dict], expected: list[float]) -> None:
    assert thaw_epochs(rules) == expected


PREFIXES = st.sampled_from(["", "a", "b", "a.", "b.", "a.b"])
WHEN = st.fixed_dictionaries({}, optional={"from_epoch": st.integers(0, 5)}) | st.fixed_dictionaries(
    {"from_epoch": st.integers(0, 5), "blocks": st.integers(1, 3), "every": st.integers(1, 3)}
)
WHERE = st.just({}) | st.fixed_dictionaries({}, optional={"first": st.integers(0, 3), "last": st.integers(1, 4)})
SOME = st.builds(
    lambda prefixes, train, where, when: {"prefixes": prefixes, "train": train, **where, **(when if train else {})},
    st.lists(PREFIXES, min_size=1, max_size=2),
    st.booleans(),
    WHERE,
    WHEN,
)
ALL = st.builds(lambda train, when: {"prefixes": [""], "train": train, **(when if train else {})}, st.booleans(), WHEN)
RULES = st.builds(lambda some, rest: some + rest, st.lists(SOME, max_size=2), st.lists(ALL, max_size=1))
WORDS = st.sampled_from(["".join(letters) for size in (2, 3) for letters in product("ab.", repeat=size)])
NAMES = st.dictionaries(WORDS, st.integers(0, 5), min_size=4, max_size=16)


def as_rules(drawn: list[dict]) -> list[dict]:
    return [
        {"match": [re.escape(prefix) + ".*" for prefix in rule["prefixes"]]}
        | {key: value for key, value in rule.items() if key != "prefixes"}
        for rule in drawn
    ]


def naive_thaw_epochs(drawn: list[dict], depths: dict[str, int]) -> dict[str, float] | None:
    """By going from the last rule to the first and overwriting; None if the rules are to be refused."""
    head = max(depths.values())
    decided: dict[str, tuple[int, float]] = {}
    scheduled: set[str] = set()
    for number, rule in reversed(list(enumerate(drawn))):
        first, last = rule.get("first"), rule.get("last")
        if (first is not None and set(range(head)) <= set(range(first + 1))) or (last is not None and head - last <= 0):
            return None  # the whole backbone
        for name, depth in depths.items():
            inside = (first is None or depth <= first) and (last is None or depth in range(head - last, head + 1))
            if not inside or not name.startswith(tuple(rule["prefixes"])):
                continue
            is_schedule = rule.get("from_epoch", 0) > 0 or "blocks" in rule
            if is_schedule and name in scheduled:
                return None
            scheduled |= {name} if is_schedule else set()
            epoch = rule.get("from_epoch", 0)
            if "blocks" in rule:
                waiting = list(range(head))  # the backbone's layers
                while depth < head and depth not in waiting[-rule["blocks"] :]:  # not yet its turn
                    waiting, epoch = waiting[: -rule["blocks"]], epoch + rule["every"]
            decided[name] = (number, epoch if rule["train"] else NEVER)
    if decided.keys() != depths.keys() or len({number for number, _ in decided.values()}) != len(drawn):
        return None  # a parameter without a rule, or a rule without a parameter
    return {name: epoch for name, (_, epoch) in decided.items()}


@settings(max_examples=400, deadline=None)
@given(RULES, NAMES)
def test_thaw_epochs_equal_a_naive_version(drawn: list[dict], depths: dict[str, int]) -> None:
    policy, expected = FreezePolicy(as_rules(drawn), add=None), naive_thaw_epochs(drawn, depths)
    event("refused" if expected is None else "decided")
    if expected is None:
        with pytest.raises(ValueError, match=r"freeze\.rules"):
            policy.thaw_epochs(depths)
    else:
        assert policy.thaw_epochs(depths) == expected


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([HEAD], r"no rule covers backbone\.blocks\.0\.weight; no rule covers .*The model has 3 layers"),
        ([HEAD, REST, {"match": r"neck\..*", "train": True}], r"rule 3 .*neck.* matches nothing"),
        ([{"match": "head", "train": True}, REST], r"no rule covers head\.weight; rule 1 .* matches nothing"),
        ([HEAD, REST, REST | {"last": 1}], r"rule 3 .*last: 1.* matches only what earlier rules decided"),
        ([], "no rule covers"),
        ([HEAD, {"match": ".*", "train": True, "last": 3}], r"last=3 is the whole backbone \(below 3 is a part"),
        ([HEAD, {"match": ".*", "train": True, "first": 2}], r"first=2 is the whole backbone \(below 2 is a part"),
        (
            [HEAD] + [{"match": ".*", "train": True, "from_epoch": epoch} | {"last": 1} for epoch in (1, 2)] + [REST],
            r"rules 2 and 3 both schedule backbone\.blocks\.1\.weight: overlapping schedules",
        ),
    ],
)
def test_rules_that_cannot_be_meant(rules: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^freeze\.rules: .*{message}"):
        thaw_epochs(rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"trian": True}, "trian"),
        ({"train": ...}, "train"),
        ({"match": "head("}, "unterminated"),
        ({"match": []}, "match must hold a regular expression"),
        ({"train": "yes"}, "train='yes' must be true or false"),
        ({"last": 0}, "last=0 must be a whole number, 1 or more"),
        ({"last": "a"}, "last='a' must be a whole number"),
        ({"last": True}, "last=true must be a whole number"),
        ({"first": -1}, "first=-1 must be a whole number, 0 or more"),
        ({"from_epoch": -1}, "from_epoch=-1 must be a whole number, 0 or more"),
        ({"from_epoch": None}, "from_epoch=null must be a whole number"),
        ({"from_epoch": 1.5}, r"from_epoch=1\.5 must be a whole number"),
        ({"blocks": 0, "every": 1}, "blocks=0 must be a whole number, 1 or more"),
        ({"blocks": 1, "every": 0}, "every=0 must be a whole number, 1 or more"),
        ({"blocks": 1}, "belong together"),
        ({"every": 1}, "belong together"),
        ({"from_epoch": 1, "train": False}, "so train must be true"),
        ({"blocks": 1, "every": 1, "train": False}, "so train must be true"),
    ],
)
def test_malformed_rules(rule: dict, message: str) -> None:
    rule = {key: value for key, value in ({"match": ".*", "train": True} | rule).items() if value is not ...}
    with pytest.raises(ValueError, match=rf"freeze\.rules: .*{message}.*\. A rule has match"):
        FreezePolicy([rule], add=None)


def test_a_rule_is_a_mapping() -> None:
    with pytest.raises(ValueError, match="head is not a rule"):
        FreezePolicy(["head"], add=None)  # type: ignore[list-item]


# Set on a model


class Part(nn.Module):
    """A module with its own parameters and modules in it, as drawn."""

    def __init__(self, parameters: str, children: list[nn.Module]) -> None:
        super().__init__()
        for name in parameters:
            self.register_parameter(name, nn.Parameter(torch.zeros(1)))
        for name, child in zip("ab", children, strict=False):
            self.add_module(name, child)


PARTS: Any = st.recursive(
    st.builds(Part, st.sampled_from(["", "a", "b", "ab"]), st.just([])) | st.builds(nn.Dropout),
    lambda parts: st.builds(Part, st.sampled_from(["", "c"]), st.lists(parts, min_size=1, max_size=2)),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.builds(Part, st.sampled_from(["", "c"]), st.lists(PARTS, min_size=1, max_size=2)), RULES, st.randoms())
def test_what_is_set_is_a_pure_function_of_the_epoch(
    model: nn.Module, drawn: list[dict], any_order: random.Random
) -> None:
    depths = {name: any_order.randrange(5) for name, _ in model.named_parameters()}
    thaws = naive_thaw_epochs(drawn, depths) if depths else None
    if thaws is None or min(thaws.values()) > 0:
        event("refused")
        return
    thaw = Thaw(model, depths, FreezePolicy(as_rules(drawn), add=None).thaw_epochs(depths))
    seen: dict[int, dict[str, bool]] = {}
    for epoch in [*range(20), *any_order.sample(range(20), 20)]:
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        changed = thaw.apply(epoch)
        after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert after == {name: thaw <= epoch for name, thaw in thaws.items()}
        assert changed == [name for name in after if after[name] != before[name]]
        modes = {name: module.training for name, module in model.named_modules()}
        assert seen.setdefault(epoch, modes) == modes
        for name, module in model.named_modules():
            trains = {parameter.requires_grad for parameter in module.parameters()}
            own = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
            if len(trains) == 1 or own:
                assert modes[name] == (True in (own or trains)), name


@pytest.mark.parametrize("freeze", ["linear_probe", "gradual", "lp_ft"])
def test_freezing_random_numbers_is_an_error(classifier: Build, freeze: str) -> None:
    with pytest.raises(
        ValueError, match=r"tensors would be frozen while random, e\.g\. backbone\.model\.\S+\. Load we"
    ):
        classifier(freeze, loaded=False).thaw.check_fresh()
    classifier("full", loaded=False).thaw.check_fresh()


@pytest.mark.parametrize("rule", [{"train": False}, {"train": True, "from_epoch": 1}])
def test_freezing_everything_is_an_error(classifier: Build, rule: dict) -> None:
    with pytest.raises(ValueError, match="freeze every parameter in epoch 0; let at least the head train"):
        classifier(FreezePolicy([{"match": ".*"} | rule], add=None))
