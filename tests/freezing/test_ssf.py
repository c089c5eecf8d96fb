"""SSF computes gamma y + beta of the output y of each linear, convolution and norm layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from small_models import assert_same
from torch import Tensor, nn

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.freezing.added import added_names, plain_name
from thaw.freezing.ssf import add_ssf

CHANGES = {"vit": {}, "resnet": {"name": "test_resnet", "arguments": {}}}
SCALE, SHIFT = "parametrizations.weight.0.ssf_scale", "parametrizations.bias.0.ssf_shift"


def scaled(*given: Any) -> Tensor:
    """A hook, called with gamma, beta if the layer has a bias, the layer, its inputs and its output."""
    *tensors, _, _, output = given
    return tensors[0] * output + (tensors[1] if len(tensors) > 1 else 0)


@pytest.mark.parametrize("kind", CHANGES)
def test_is_the_formula_by_hand(classifier: Callable[..., Classifier], batch: Batch, kind: str) -> None:
    """Hooks scale and shift what the plain layers give."""
    model, plain = (classifier(name, **CHANGES[kind]).eval() for name in ("ssf", "full"))
    own = {plain_name(name): tensor for name, tensor in model.named_parameters() if "ssf_" not in name}
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    plain.load_state_dict({**plain.state_dict(), **own})
    leaves = []
    for name, layer in plain.backbone.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
            tensors = dict(model.backbone.get_submodule(name).named_parameters())
            shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d | nn.BatchNorm2d) else (-1,)
            own = [tensors[key] for key in (SCALE, SHIFT) if key in tensors]
            layer.register_forward_hook(partial(scaled, *(tensor.view(shape) for tensor in own)))
            leaves += own
    assert len(leaves) == len(added_names(model))
    assert_same(model(batch.images), plain(batch.images), leaves)


def test_what_cannot_be_is_refused(backbone: Callable) -> None:
    with pytest.raises(
        ValueError, match=r"freeze\.ssf\.match='x' is the name of no linear, .* has attn\.proj, .*norm1"
    ):
        add_ssf(backbone(), "x", None)
    with pytest.raises(ValueError, match=r"freeze\.ssf\.last=5 must be from 1 to 4, the backbone's layers"):
        add_ssf(backbone(), ".*", 5)
