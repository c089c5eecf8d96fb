"""Heads: shapes, arithmetic, and that an image's logits depend on that image alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.preprocessing import StandardScaler
from torch import nn

from thaw.models.heads import LinearHead, MLPHead
from thaw.run.values import check_types

CONFIGS = Path(__file__).parents[2] / "configs" / "head"
HEADS = [partial(LinearHead, norm="layer"), partial(MLPHead, hidden_features=16, dropout=0.5)]


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_a_digit_do_not_depend_on_the_batch(head: Callable[..., nn.Module]) -> None:
    built = head(in_features=8, num_classes=10).eval()
    features = torch.randn(5, 8)
    logits = built(features)
    assert logits.shape == (5, 10)
    torch.testing.assert_close(logits, torch.cat([built(one[None]) for one in features]))


@pytest.mark.parametrize("head", HEADS)
def test_the_scale_of_the_features_does_not_matter(head: Callable[..., nn.Module]) -> None:
    built = head(in_features=8, num_classes=10).eval()
    features = torch.randn(5, 8)
    torch.testing.assert_close(built(1000 * features + 7), built(features), rtol=1e-3, atol=1e-4)


def test_heads_by_hand() -> None:
    features = torch.randn(5, 8)
    mean, std = features.mean(dim=1, keepdim=True), (features.var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
    normal = (features - mean) / std
    linear = LinearHead(8, 10, norm="layer")
    torch.testing.assert_close(linear(features), normal @ linear.linear.weight.T + linear.linear.bias)
    mlp = MLPHead(8, 10, hidden_features=16, dropout=0.0)
    hidden = F.gelu(normal @ mlp.hidden.weight.T + mlp.hidden.bias)
    torch.testing.assert_close(mlp(features), hidden @ mlp.linear.weight.T + mlp.linear.bias)
    assert [len(list(head.parameters())) for head in (linear, mlp)] == [2, 4]  # none in the normalisation


def test_dropout_is_random_in_training_alone() -> None:
    head, features = MLPHead(8, 10, hidden_features=16, dropout=0.5), torch.randn(5, 8)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_heads(config: Path) -> None:
    cfg = OmegaConf.load(config)
    cfg.pop("defaults", None)  # of Hydra's composition
    head = instantiate(cfg)(in_features=8, num_classes=7).eval()
    assert head(torch.randn(3, 8)).shape == (3, 7)


def test_batch_norm_standardises_every_dimension() -> None:
    """As scikit-learn does over the same digits, up to the running average."""
    features = torch.randn(4000, 8) * torch.logspace(-2, 2, 8) + 5
    head = LinearHead(8, 10, norm="batch")
    for batch in features.repeat(40, 1).split(100):
        head.norm(batch)
    head.eval()
    expected = torch.from_numpy(StandardScaler().fit_transform(features.numpy()))
    torch.testing.assert_close(head.norm(features), expected.float(), rtol=0.1, atol=0.1)


def test_no_norm_is_a_plain_linear_layer() -> None:
    head, features = LinearHead(8, 10, norm="none"), 100 * torch.randn(5, 8) + 7
    assert torch.equal(head(features), F.linear(features, head.linear.weight, head.linear.bias))
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize(
    ("config", "setting", "value", "allowed"),
    [
        ("linear", "norm", "group", "layer, batch or none"),
        ("mlp", "hidden_features", 0, "a whole number, 1 or more"),
        ("mlp", "dropout", 1.5, "a number, 0 or more and below 1"),
    ],
)
def test_settings_that_cannot_work(config: str, setting: str, value: object, allowed: str) -> None:
    block = OmegaConf.load(CONFIGS / f"{config}.yaml")
    block[setting] = value
    with pytest.raises(ValueError, match=rf"^head\.{setting}=.* must be {allowed}\.$"):
        check_types(block, "head.")
