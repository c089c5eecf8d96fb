"""Baselines: the arithmetic of each network, and that they serve wherever a backbone does."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.models.baselines import Baseline
from thaw.models.heads import LinearHead
from thaw.run.checkpoint import load_model, read_checkpoint
from thaw.run.values import check_types

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"
NAMES = ["pixels", "mlp", "lenet5", "convnet", "resnet9", "rnn"]
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [32, 24]},
    "convnet": {"widths": [8, 12, 16]},
    "resnet9": {"widths": [8, 12, 16, 20], "image_size": 28, "channels": 1},
    "rnn": {"hidden_size": 16},
}
PLAIN = partial(LinearHead, norm="none")

Build = Callable[..., Baseline]


@pytest.fixture
def backbone() -> Build:
    """Builds the baseline of configs/backbone/<name>.yaml, small, in eval mode; `classifier` is then built on it."""

    def build(name: str, **changes: Any) -> Baseline:
        torch.manual_seed(0)
        settings = SMALL.get(name, {}) | changes
        return instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"), **settings).eval()

    return build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("image_size", "channels"), [(28, 1), (28, 3), (33, 1), (32, 3)])
def test_shapes(backbone: Build, name: str, image_size: int, channels: int) -> None:
    net = backbone(name, image_size=image_size, channels=channels)
    features = net(torch.randn(3, channels, image_size, image_size))
    assert features.shape == (3, net.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_does_not_depend_on_the_batch(backbone: Build, name: str) -> None:
    net, images = backbone(name), torch.randn(5, 1, 28, 28)
    net.train()(images)  # statistics that are not those of the batch
    net.eval()
    torch.testing.assert_close(net(images), torch.cat([net(image[None]) for image in images]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES[1:])
def test_gradient_reaches_every_parameter(backbone: Build, name: str) -> None:
    net = backbone(name).train()
    features = net(torch.randn(16, 1, 28, 28))
    (features * torch.randn_like(features)).sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES[1:])
def test_header_states_the_parameters(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    parameters = sum(parameter.numel() for parameter in instantiate(OmegaConf.load(path)).parameters())
    assert f" {parameters:,} parameters" in path.read_text().splitlines()[0]


def test_lenet5_has_the_layers_of_the_paper(backbone: Build) -> None:
    """C1 156, C5 48,120 and F6 10,164 parameters, as LeCun et al. (1998) count; C3 sees all maps: 16 (6 x 25 + 1)."""
    layers = [layer for layer in backbone("lenet5").model if list(layer.parameters())]  # type: ignore[union-attr]
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert counts == [156, 16 * (6 * 25 + 1), 48120, 10164]
    assert sum(counts) + 84 * 10 + 10 == 61706


def test_pixels_under_a_plain_head_are_logistic_regression(classifier: Callable[..., Classifier], batch: Batch) -> None:
    model = classifier("full", head=PLAIN, name="pixels")
    pixels = (batch.images.double() / 255 - 0.1307) / 0.3081
    expected = F.linear(pixels.flatten(1).float(), model.head.linear.weight, model.head.linear.bias)  # type: ignore
    torch.testing.assert_close(model(batch.images), expected)
    assert len(list(model.parameters())) == 2


def test_mlp_by_hand(backbone: Build) -> None:
    net, images = backbone("mlp", dropout=0.5), torch.randn(4, 1, 28, 28)
    net.train()(torch.randn(64, 1, 28, 28))
    x, linear1, norm1, linear2, norm2 = images.flatten(1), *(m for m in net.model if list(m.parameters()))  # type: ignore
    for linear, norm in ((linear1, norm1), (linear2, norm2)):
        x = x @ linear.weight.T
        x = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        x = x.clamp(min=0)
    torch.testing.assert_close(net.eval()(images), x)
    assert (net.train()(torch.randn(200, 1, 28, 28)) == 0).float().mean() > 0.6  # of ReLU and dropout, each half


def test_convnet_by_hand(backbone: Build) -> None:
    net, images = backbone("convnet"), torch.randn(4, 1, 28, 28)
    net.train()(torch.randn(64, 1, 28, 28))
    tensors = list(net.state_dict().values())
    layers = [tensors[start : start + 5] for start in range(0, len(tensors), 6)]  # a convolution and its norm
    assert [tuple(weight.shape) for weight, *_ in layers] == [
        *((8, 1, 5, 5), (12, 8, 3, 3), (12, 12, 3, 3), (16, 12, 3, 3), (16, 16, 3, 3)),
    ]
    x = images
    for number, (weight, gamma, beta, mean, var) in enumerate(layers):
        x = F.conv2d(x, weight, stride=1 if number else 2, padding=weight.shape[-1] // 2)
        x = F.relu(F.batch_norm(x, mean, var, gamma, beta))
        x = F.max_pool2d(x, 2) if number == 2 else x
    torch.testing.assert_close(net.eval()(images), x.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_resnet9_by_hand(backbone: Build) -> None:
    net, images = backbone("resnet9", image_size=32, channels=3), torch.randn(4, 3, 32, 32)
    net.train()(torch.randn(64, 3, 32, 32))
    tensors = list(net.eval().state_dict().values())
    layers = iter([tensors[start : start + 5] for start in range(0, len(tensors), 6)])  # a convolution and its norm

    def convolve(x: Tensor) -> Tensor:
        weight, gamma, beta, mean, var = next(layers)
        return F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), mean, var, gamma, beta))

    x = convolve(images)
    for side, is_residual in ((16, True), (8, False), (4, True)):
        x = F.max_pool2d(convolve(x), 2)
        assert x.shape[2:] == (side, side)
        x = x + convolve(convolve(x)) if is_residual else x
    assert next(layers, None) is None
    torch.testing.assert_close(net(images), x.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def read_rows(rows: Tensor, weights: list[Tensor], cell: str) -> Tensor:
    """(B, T, F) -> states (B, T, H), one row after the other, by the equations in torch's documentation."""
    w_input, w_state, b_input, b_state = weights
    state = memory = torch.zeros(len(rows), w_state.shape[1])
    states = []
    for row in rows.unbind(1):
        from_row, from_state = row @ w_input.T + b_input, state @ w_state.T + b_state
        if cell == "lstm":
            i, f, g, o = (from_row + from_state).chunk(4, dim=1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = o.sigmoid() * memory.tanh()
        else:
            (r, z, n), (r_state, z_state, n_state) = from_row.chunk(3, dim=1), from_state.chunk(3, dim=1)
            update = (z + z_state).sigmoid()
            state = (1 - update) * (n + (r + r_state).sigmoid() * n_state).tanh() + update * state
        states.append(state)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_rnn_equals_a_loop_over_rows(backbone: Build, cell: str, bidirectional: bool, num_layers: int) -> None:
    net = backbone("rnn", cell=cell, bidirectional=bidirectional, num_layers=num_layers, channels=3)
    images = torch.randn(4, 3, 28, 28)
    rows = torch.stack([torch.cat(list(images[:, :, row].unbind(1)), dim=1) for row in range(28)], dim=1)  # (B, S, 3 S)
    weights = list(net.parameters())
    for _ in range(num_layers):
        below, above = rows, []
        for _ in range(1 + bidirectional):
            above.append(read_rows(below, weights[:4], cell))
            weights, below = weights[4:], below.flip(1)
        last = torch.cat([states[:, -1] for states in above], dim=1)
        rows = torch.cat([above[0], *(states.flip(1) for states in above[1:])], dim=2)
    torch.testing.assert_close(net(images), last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_trains_on_it(
    classifier: Callable[..., Classifier], batch: Batch, fit: Callable, name: str
) -> None:
    model = classifier("full", name=name, loaded=False, dropout=0.0) if name in ("mlp", "convnet", "resnet9") else None
    model = model or classifier("full", name=name, loaded=False)
    before = {key: value.clone() for key, value in model.named_parameters()}
    model.eval()
    loss = F.cross_entropy(model(batch.images), batch.labels).item()
    trainer = fit(model, [batch] * 20)
    assert trainer.callback_metrics["val/loss"].item() < 0.7 * loss
    assert "val/acc" in trainer.callback_metrics
    assert not any(torch.equal(before[key], value) for key, value in model.named_parameters())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("numbers", [[0.3], [0.2, 0.3, 0.4]])
def test_mean_and_std_are_one_number_or_three(
    classifier: Callable[..., Classifier], channels: int, numbers: list[float]
) -> None:
    """Three are averaged for one grey channel; a colour image has each channel's own."""
    changes: dict[str, Any] = {"mean": numbers, "std": numbers, "channels": channels, "image_size": 32}
    model = classifier("full", name="pixels", loaded=False, **changes)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    own = torch.tensor(numbers if channels == 3 else [0.3]).reshape(1, -1, 1, 1)
    pixels = (
        images / 255
        if channels == 3
        else (images / 255 * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, True)
    )
    torch.testing.assert_close(model.preprocess(images), (pixels - own) / own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_is_one_layer(backbone: Build, name: str) -> None:
    net, images = backbone(name), torch.randn(2, 1, 28, 28)
    assert len(net.layers) == 1 and not net.is_chain
    assert torch.equal(net.prefix(images, 0), images) and net.layers_state(0) == {}
    assert torch.equal(net.prefix(images, 1), net(images)) and net.layers_state(1).keys() == net.state_dict().keys()
    for cut in (0, 1):
        assert torch.equal(net.suffix(net.prefix(images, cut), cut), net(images))
    parameters = dict(net.named_parameters())
    assert net.fresh == parameters.keys()
    assert {net.layer_of(key) for key in parameters} <= {0}
    assert set(net.depths().values()) == {0} and parameters.keys() <= net.depths().keys()


def test_architecture_tells_networks_apart(backbone: Build) -> None:
    nets = [*(backbone(name) for name in NAMES), backbone("mlp", hidden=[16]), backbone("rnn", cell="gru")]
    nets += [backbone("convnet", widths=[4, 8]), backbone("pixels", mean=[0.5]), backbone("pixels", image_size=32)]
    assert len({json.dumps(net.architecture) for net in nets}) == len(nets)


@pytest.mark.parametrize("name", NAMES[1:])
def test_random_layers_cannot_be_frozen(classifier: Callable[..., Classifier], name: str) -> None:
    with pytest.raises(ValueError, match=r"freshly initialised tensors.*freeze=full"):
        classifier("linear_probe", name=name, loaded=False).thaw.check_fresh()


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_has_no_last_blocks(classifier: Callable[..., Classifier], name: str) -> None:
    with pytest.raises(ValueError, match=r"last=2 is the whole backbone.*The model has 1 layers"):
        classifier("last_blocks", name=name, loaded=False)


def test_pixels_have_nothing_to_freeze(classifier: Callable[..., Classifier], batch: Batch, fit: Callable) -> None:
    full, probe = (classifier(freeze, name="pixels", loaded=False) for freeze in ("full", "linear_probe"))
    probe.load_state_dict(full.state_dict())
    for model in (full, probe):
        fit(model, [batch] * 3)
    assert torch.equal(full(batch.images), probe(batch.images))


@pytest.mark.parametrize(
    ("name", "setting", "values", "allowed"),
    [
        (
            "mlp",
            "hidden",
            [[], 0, [0], [32, -1], [1.5], "64"],
            "a list of 1 or more, each item a whole number, 1 or more",
        ),
        ("mlp", "dropout", [-0.1, 1.0, "half", True], "a number, 0 or more and below 1"),
        ("convnet", "dropout", [-0.1, 1.0], "a number, 0 or more and below 1"),
        ("convnet", "widths", [[], [8], [8, 0], 8], "a list of 2 or more, each item a whole number, 1 or more"),
        ("rnn", "cell", ["LSTM", "rnn", None], "lstm or gru"),
        *(("rnn", setting, [0, 1.5, True], "a whole number, 1 or more") for setting in ("hidden_size", "num_layers")),
        ("rnn", "bidirectional", ["both"], "true or false"),
        *(
            (name, "image_size", [0], "a whole number, 1 or more")
            for name in ("pixels", "mlp", "convnet", "resnet9", "rnn")
        ),
        ("lenet5", "image_size", [11], "a whole number, 12 or more"),
        *((name, "channels", [2], "1 or 3") for name in NAMES),
        *((name, "mean", [None], "a list, each item a number") for name in NAMES),
    ],
)
def test_setting_that_cannot_work(name: str, setting: str, values: list[object], allowed: str) -> None:
    for value in values:
        block = OmegaConf.load(CONFIGS / f"{name}.yaml")
        block[setting] = value
        with pytest.raises(ValueError, match=rf"^backbone\.{setting}=.* must be .*{allowed}\.$"):
            check_types(block, "backbone.")


def test_an_image_that_is_too_small_for_its_stages(backbone: Build) -> None:
    with pytest.raises(
        InstantiationException, match=r"image_size=3 must be 4 or more for backbone\.widths=\[8, 12, 16\]"
    ):
        backbone("convnet", image_size=3)


@pytest.mark.parametrize(
    ("name", "image_size"), [("lenet5", 12), ("convnet", 4), ("resnet9", 8), ("mlp", 1), ("rnn", 1)]
)
def test_smallest_image(backbone: Build, name: str, image_size: int) -> None:
    net = backbone(name, image_size=image_size)
    assert net(torch.randn(2, 1, image_size, image_size)).isfinite().all()


def test_compiling_keeps_names(backbone: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "g++")
    net = backbone("mlp")
    names = net.state_dict().keys()
    net.compile_layers()
    assert net.architecture["compiled"] and net.model._compiled_call_impl is not None
    assert net.state_dict().keys() == names


def test_a_run_names_it_and_its_checkpoint_loads(train: Callable[..., Path]) -> None:
    run_dir = train("experiment=baseline/lenet5", "debug=fast", "data.source=sample")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["backbone"], summary["weights"]) == ("lenet5", "none")
    model = load_model(read_checkpoint(run_dir / "checkpoints" / "best.ckpt"))
    assert model(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 10)
