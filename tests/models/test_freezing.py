"""Freezing policies: what they decide, what they refuse, and that frozen parts stay bit-identical in training."""

import re
from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from thaw.data.datamodule import Batch
from thaw.models.classifier import Classifier
from thaw.models.freezing import FreezePolicy, format_table, set_modes
from thaw.models.heads import MLPHead

Build = Callable[..., Classifier]

DROPOUT = {"pos_drop_rate": 0.3, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.5}
CONVNET = {"name": "test_resnet", "arguments": {}}
HEAD, REST = {"match": r"head\..*", "train": True}, {"match": r"backbone\..*", "train": False}
DEPTHS = {"backbone.stem.weight": 0, "backbone.blocks.0.weight": 1, "backbone.blocks.1.weight": 2, "head.weight": 3}


def apply(model: Classifier) -> Classifier:
    model.setup("fit")
    return model


def trainable_parts(model: Classifier) -> set[str]:
    """`backbone.model.pos_embed`, `backbone.model.blocks.2`, `head.linear`, ...: whose parameters all train."""
    trains: dict[str, list[bool]] = {}
    for name, parameter in apply(model).named_parameters():
        short = name.removeprefix("backbone.model.")
        part = ".".join(short.split(".")[: 4 if short.startswith("layers") else 2])
        trains.setdefault(part.removesuffix(".weight").removesuffix(".bias"), []).append(parameter.requires_grad)
    assert all(len(set(flags)) == 1 for flags in trains.values()), "a layer is partly frozen"
    return {part for part, flags in trains.items() if flags[0]}


# What the rules decide


def test_first_match_wins() -> None:
    rules = [HEAD, {"match": r"backbone\.blocks\.1\..*", "train": True}, REST]
    assert FreezePolicy(rules).trainable(DEPTHS) == dict(zip(DEPTHS, [False, False, True, True], strict=True))


@pytest.mark.parametrize(("last", "expected"), [(1, [0, 0, 1, 1]), (2, [0, 1, 1, 1]), (3, [1, 1, 1, 1])])
def test_last_counts_layers_from_the_top(last: int, expected: list[int]) -> None:
    rules = [{"match": ".*", "train": True, "last": last}, *([] if last == 3 else [REST])]
    assert list(FreezePolicy(rules).trainable(DEPTHS).values()) == [bool(flag) for flag in expected]


PREFIXES = st.sampled_from(["", "a", "a.", "b.", "a.b.", "b.b.", "c"])
RULES = st.lists(st.tuples(PREFIXES, st.booleans(), st.none() | st.integers(1, 4)), max_size=5)
NAMES = st.dictionaries(st.text("ab.", min_size=1, max_size=5), st.integers(0, 4), min_size=1)


@given(RULES, NAMES)
def test_decisions_equal_a_naive_version(rules: list[tuple], depths: dict[str, int]) -> None:
    decided: dict[str, tuple[int, bool]] = {}
    for number, (prefix, train, last) in reversed(list(enumerate(rules))):  # the first rule overwrites the later ones
        for name, depth in depths.items():
            if name.startswith(prefix) and (last is None or depth in range(max(depths.values()) - last, 9)):
                decided[name] = (number, train)
    policy = FreezePolicy(
        [{"match": re.escape(prefix) + ".*", "train": train, "last": last} for prefix, train, last in rules]
    )
    if decided.keys() == depths.keys() and len({number for number, _ in decided.values()}) == len(rules):
        assert policy.trainable(depths) == {name: train for name, (_, train) in decided.items()}
    else:  # a parameter without a rule, or a rule without a parameter
        with pytest.raises(ValueError, match=r"freeze\.rules"):
            policy.trainable(depths)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([HEAD], r"no rule covers backbone\.blocks\.0\.weight; no rule covers .*The model has 3 layers"),
        ([HEAD, REST, {"match": r"neck\..*", "train": True}], r"rule 3 .*neck.* matches nothing"),
        ([{"match": "head", "train": True}, REST], r"no rule covers head\.weight; rule 1 .* matches nothing"),
        ([HEAD, REST, REST | {"last": 1}], r"rule 3 .*last=1.* matches only what earlier rules decided"),
        ([], "no rule covers"),
    ],
)
def test_rules_must_cover_everything_and_each_decide_something(rules: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreezePolicy(rules).trainable(DEPTHS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": ".*", "trian": True}, "trian"),
        ({"match": ".*"}, "train"),
        ({"match": "head(", "train": True}, "unterminated"),
        ({"match": ".*", "train": "yes"}, "train='yes' must be true or false"),
        ({"match": ".*", "train": True, "last": 0}, "last=0 must be a number of layers, 1 or more"),
        ({"match": ".*", "train": True, "last": "a"}, "last='a' must be a number of layers"),
        ({"match": ".*", "train": True, "last": True}, "last=True must be a number of layers"),
        ("head", "head is not a rule"),
    ],
)
def test_malformed_rules(rule: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"freeze\.rules: .*{message}.*; a rule has match"):
        FreezePolicy([rule])


# Applied to a model


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("linear_probe", {}, {"head.linear"}),
        ("last_blocks", {"k": 1}, {"head.linear", "fc_norm", "blocks.2"}),
        ("last_blocks", {"k": 2}, {"head.linear", "fc_norm", "blocks.2", "blocks.1"}),
        ("full", {}, {"head.linear", "fc_norm", "blocks.2", "blocks.1", "blocks.0", "patch_embed.proj", "pos_embed"}),
    ],
)
def test_shipped_policies(classifier: Build, policy: Callable, name: str, changes: dict, expected: set) -> None:
    assert trainable_parts(classifier(policy(name, **changes))) == expected


def test_last_two_layers_of_a_swin(classifier: Build) -> None:
    arguments = {"embed_dim": 24, "depths": [1, 1, 2, 1]}
    model = classifier("last_blocks", name="swin_tiny_patch4_window7_224", arguments=arguments, image_size=56)
    expected = {"head.linear", "norm", "layers.3.blocks.0", "layers.3.downsample.norm", "layers.2.blocks.1"}
    assert trainable_parts(model) == expected | {"layers.3.downsample.reduction"}


def test_freezing_random_numbers_is_an_error(classifier: Build) -> None:
    with pytest.raises(
        ValueError, match=r"tensors would stay random for ever, e\.g\. backbone\.model\.\S+\. Load weig"
    ):
        apply(classifier("linear_probe", loaded=False))
    apply(classifier("full", loaded=False))


def test_freezing_everything_is_an_error(classifier: Build) -> None:
    with pytest.raises(ValueError, match="freeze every parameter; let at least the head train"):
        apply(classifier(FreezePolicy([{"match": ".*", "train": False}])))


# Modes


def test_modules_without_parameters_follow_what_comes_before() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1), nn.Dropout(), nn.Linear(1, 1), nn.Dropout())
    model[1].requires_grad_(False)
    assert set_modes(model, before=True) is True
    assert [child.training for child in model] == [True, False, False, True, True]
    model[3].requires_grad_(False)
    assert set_modes(model, before=True) is False
    assert not any(module.training for module in model.modules())


def test_modules_without_parameters_follow_the_own_parameters_of_their_module() -> None:
    class Stem(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Dropout(), nn.Linear(1, 1))
            self.token = nn.Parameter(torch.zeros(1), requires_grad=False)

    stem = Stem()
    set_modes(stem, before=True)
    assert [module.training for module in stem.modules()] == [False, False, True]


def test_modes_of_a_frozen_backbone_under_a_training_head(classifier: Build, tiny: dict) -> None:
    head = partial(MLPHead, hidden_features=16, dropout=0.5)
    model = apply(classifier("linear_probe", head=head, arguments=tiny | DROPOUT))
    assert model.training and model.head.dropout.training
    assert not any(module.training for module in model.backbone.modules())


def outputs(model: Classifier) -> list[Tensor]:
    """What pos_drop, each block and the head give for the same images."""
    seen: list[Tensor] = []
    vit = model.backbone.model
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for module in (vit.pos_drop, *vit.blocks, model.head)
    ]
    model(torch.arange(8 * 28 * 28).reshape(8, 28, 28).to(torch.uint8))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("name", "frozen"), [("linear_probe", 4), ("last_blocks", 2), ("full", 0)])
def test_dropout_is_silent_in_the_frozen_part_alone(classifier: Build, tiny: dict, name: str, frozen: int) -> None:
    head = partial(MLPHead, hidden_features=16, dropout=0.5)
    model = apply(classifier(name, head=head, arguments=tiny | DROPOUT))
    same = [torch.equal(a, b) for a, b in zip(outputs(model), outputs(model), strict=True)]
    assert same == [True] * frozen + [False] * (5 - frozen)


# Training


class Modes(L.Callback):
    """Notes at every training batch which modules are in train mode."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.seen.append({name for name, module in pl_module.named_modules() if module.training})


def trained(model: Classifier, batch: Batch, fit: Callable) -> dict[str, tuple[Tensor, Tensor]]:
    """Every parameter and buffer before and after two epochs, each followed by a validation."""
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = Modes()
    fit(model, [batch, batch], epochs=2, callbacks=[modes])
    frozen = {
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    }
    assert len(modes.seen) == 4 and all(seen == modes.seen[0] for seen in modes.seen)  # validation changes nothing
    assert not frozen & modes.seen[0]
    after = dict((*model.named_parameters(), *model.named_buffers()))
    return {name: (before[name], after[name]) for name in before}


@pytest.mark.parametrize("name", ["linear_probe", "last_blocks", "full"])
def test_frozen_is_bit_identical_and_the_rest_moves(
    classifier: Build, tiny: dict, batch: Batch, fit: Callable, name: str
) -> None:
    head = partial(MLPHead, hidden_features=16, dropout=0.1)
    model = classifier(name, head=head, arguments=tiny | DROPOUT)
    tensors = trained(model, batch, fit)
    for parameter, tensor in model.named_parameters():
        assert torch.equal(*tensors[parameter]) != tensor.requires_grad, parameter
    for buffer, _ in model.named_buffers():
        assert torch.equal(*tensors[buffer]), buffer


@pytest.mark.parametrize(("name", "moved"), [("linear_probe", 0), ("last_blocks", 2), ("full", 5)])
def test_batch_norm_statistics_are_frozen_with_their_layer(
    classifier: Build, batch: Batch, fit: Callable, name: str, moved: int
) -> None:
    model = classifier(name, **CONVNET)
    tensors = trained(model, batch, fit)
    layers = {}
    for buffer, (before, after) in tensors.items():
        if buffer.endswith("running_var"):
            layer = model.depths()[buffer.replace("running_var", "weight")]
            layers.setdefault(layer, set()).add(not torch.equal(before, after))
    assert [layers[depth] for depth in sorted(layers)] == [{False}] * (5 - moved) + [{True}] * moved


# The table


def rows_of(table: str) -> list[tuple[list[str], int, bool, str, str, str]]:
    """Name prefixes, parameters, trains, mode, lr, decay of every line."""
    rows = []
    for line in table.splitlines()[1:-1]:
        label, _, count, trains, mode, lr, decay = line.split()
        numbers = re.fullmatch(r"(.*\.)(\d+)-(\d+)", label)
        prefixes = [f"{numbers[1]}{i}" for i in range(int(numbers[2]), int(numbers[3]) + 1)] if numbers else [label]
        rows.append((prefixes, int(count.replace(",", "")), trains == "yes", mode, lr, decay))
    return rows


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("name", ["linear_probe", "last_blocks", "full"])
def test_table_lists_every_parameter_once_as_the_optimizer_has_it(
    classifier: Build, name: str, layer_decay: float
) -> None:
    model = apply(classifier(name, optim={"layer_decay": layer_decay}))
    groups = model.optim.groups(model.named_parameters(), model.depths())
    settings = {id(p): (f"{g['lr']:.2e}", f"{g['weight_decay']:.3g}") for g in groups for p in g["params"]}
    left = dict(model.named_parameters())
    for prefixes, count, trains, mode, *numbers in rows_of(format_table(model, model.depths(), groups)):
        mine = [
            parameter
            for parameter in left
            if any(parameter == prefix or parameter.startswith(f"{prefix}.") for prefix in prefixes)
            and settings.get(id(left[parameter]), ("-", "-")) == tuple(numbers)
        ]
        for parameter in mine:
            assert left[parameter].requires_grad == trains
            assert model.get_submodule(parameter.rpartition(".")[0]).training == (mode == "train")
        assert sum(left.pop(parameter).numel() for parameter in mine) == count > 0
    assert not left


def test_table_merges_equal_blocks(classifier: Build) -> None:
    model = apply(classifier("last_blocks", optim={"lr": 1e-3, "weight_decay": 0.05}))
    optimizer = torch.optim.AdamW(model.optim.groups(model.named_parameters(), model.depths()))
    expected = """\
layers                      depth  parameters  trains  mode    peak lr   decay
backbone.model.pos_embed        0         512  no      eval          -       -
backbone.model.patch_embed      0       1,600  no      eval          -       -
backbone.model.blocks.0         1      12,704  no      eval          -       -
backbone.model.blocks.1-2     2-3         832  yes     train  1.00e-03       0
backbone.model.blocks.1-2     2-3      24,576  yes     train  1.00e-03    0.05
backbone.model.fc_norm          3          64  yes     train  1.00e-03       0
head.linear                     4         320  yes     train  1.00e-03    0.05
head.linear                     4          10  yes     train  1.00e-03       0
25,802 of 40,618 parameters train"""
    assert format_table(model, model.depths(), optimizer.param_groups) == expected


def test_table_shows_the_peak_of_a_schedule(classifier: Build) -> None:
    model = apply(classifier("linear_probe", optim={"warmup_fraction": 0.5}))
    built = model.optim.build(model.named_parameters(), model.depths(), total_steps=10)
    assert built["optimizer"].param_groups[0]["lr"] < 1e-2
    assert "1.00e-02" in format_table(model, model.depths(), built["optimizer"].param_groups)
