"""AdaptFormer: the paper's formula written out, beside layer scale and drop path, from an identity on."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thaw.freezing.adapter import add_adapters
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "layer scale": {"name": "vit_small_patch14_dinov2", "arguments": SMALL, "channels": 3},
    "eva": {"name": "eva02_tiny_patch14_224", "arguments": SMALL, "channels": 3},
    "eva with layer scale": {
        **{"name": "vit_small_patch16_dinov3", "arguments": SMALL},
        **{"channels": 3, "image_size": 32},
    },
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "arguments": {"embed_dim": 16, "num_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 2]},
        **{"channels": 3, "image_size": 64},
    },
}


def look_trained(model: nn.Module) -> None:
    """No parameter is 0 or 1, layer scales included."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_plain_model(backbone: Callable[..., Backbone], kind: str) -> None:
    model = backbone(**KINDS[kind])
    images = torch.randn(2, model.channels, model.image_size, model.image_size)
    before = model(images)
    add_adapters(model, last=None, bottleneck="auto", scale=0.1)
    assert torch.equal(model(images), before)
    depths = model.depths()
    added = [name for name in depths if ".adapter." in name]
    assert {depths[name] for name in added} == set(range(1, model.num_layers - 1)) and len(added) % 4 == 0
    assert {depths[name] for name in added} == {model.layer_of(name) for name in added}


def naive_vit(state: Mapping[str, Tensor], tokens: Tensor, heads: int, scale: float) -> Tensor:
    """x' = x + MSA(LN(x)); x = x' + MLP(LN(x')) + s ReLU(LN(x') W_down) W_up, with layer scale if there is one."""
    for number in range(SMALL["depth"]):
        block = {name.removeprefix(f"{number}."): t for name, t in state.items() if name.startswith(f"{number}.")}

        def linear(x: Tensor, name: str, block: dict[str, Tensor] = block) -> Tensor:
            return x @ block[f"{name}.weight"].T + block[f"{name}.bias"]

        def norm(x: Tensor, name: str, block: dict[str, Tensor] = block) -> Tensor:
            centred = x - x.mean(dim=-1, keepdim=True)
            scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            return scaled * block[f"{name}.weight"] + block[f"{name}.bias"]

        query, key, value = linear(norm(tokens, "norm1"), "attn.qkv").chunk(3, dim=-1)
        outputs = []
        for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in (query, key, value)), strict=True):
            outputs.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
        tokens = tokens + block.get("ls1.gamma", 1) * linear(torch.cat(outputs, dim=-1), "attn.proj")
        normed = norm(tokens, "norm2")
        mlp = linear(F.gelu(linear(normed, "mlp.fc1")), "mlp.fc2")
        adapter = linear(linear(normed, "adapter.down").clamp(min=0), "adapter.up")
        tokens = tokens + block.get("ls2.gamma", 1) * mlp + scale * adapter
    return tokens


@pytest.mark.parametrize("kind", ["vit", "layer scale"])
def test_equals_the_formula(backbone: Callable[..., Backbone], kind: str) -> None:
    model = backbone(**{"arguments": SMALL | {"patch_size": 7}} | KINDS[kind]).double()
    add_adapters(model, last=None, bottleneck=5, scale=0.3)
    model = model.double()
    look_trained(model)
    images = torch.randn(2, model.channels, 28, 28, dtype=torch.double)
    tokens = model.prefix(images, 1).detach()
    state = dict(model.model.blocks.named_parameters())
    weights = torch.randn(tokens.shape, dtype=torch.double)
    got, wanted = model.prefix(images, 4), naive_vit(state, tokens, heads=2, scale=0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    added = [parameter for name, parameter in state.items() if "adapter" in name]
    gradients = [torch.autograd.grad((result * weights).sum(), added) for result in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients[0])


@pytest.mark.parametrize("kind", ["eva", "eva with layer scale", "swin"])
def test_adds_to_the_residual_stream_of_other_blocks(backbone: Callable[..., Backbone], kind: str) -> None:
    """The last block's output is its own, of a plain model, and s times the adapter of what enters its MLP."""
    plain, model = backbone(**KINDS[kind]), backbone(**KINDS[kind])
    add_adapters(model, last=1, bottleneck=5, scale=0.3)
    look_trained(model)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "adapter" not in name})
    images = torch.randn(2, 3, model.image_size, model.image_size)
    end = model.num_layers - 1
    normed: list[Tensor] = []
    last: Any = [module for name, module in plain.named_modules() if name.endswith("norm2")][-1]
    last.register_forward_hook(lambda module, inputs, output: normed.append(output))
    own = plain.prefix(images, end)
    (adapter,) = (module for name, module in model.named_modules() if name.endswith(".adapter"))
    down, up = adapter.down, adapter.up
    hidden = (normed[0] @ down.weight.T + down.bias).clamp(min=0)
    wanted = own + 0.3 * (hidden @ up.weight.T + up.bias).reshape(own.shape)
    torch.testing.assert_close(model.prefix(images, end), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own, wanted, atol=0.1)


def test_a_dropped_mlp_leaves_the_adapter(backbone: Callable[..., Backbone]) -> None:
    model = backbone(arguments={"patch_size": 7, **SMALL, "drop_path_rate": 1.0})
    add_adapters(model, last=1, bottleneck=5, scale=1.0)
    look_trained(model)
    block: Any = model.model.blocks[-1]
    tokens = torch.randn(2, 16, 24)
    block.drop_path1.train(), block.drop_path2.train()
    torch.testing.assert_close(block(tokens), tokens + block.adapter(block.norm2(tokens)))


def test_starts_as_the_paper_says(backbone: Callable[..., Backbone]) -> None:
    """The bottleneck of 64 in a width of 768, W_down by He's rule, all else 0: 1.19 M parameters in ViT-B."""
    model = backbone("vit_base_patch16_224", {"depth": 1}, image_size=32)
    add_adapters(model, last=None, bottleneck="auto", scale=0.1)
    (adapter,) = (module for name, module in model.named_modules() if name.endswith(".adapter"))
    assert adapter.down.weight.shape == (64, 768) and adapter.up.weight.shape == (768, 64)
    assert float(adapter.down.weight.detach().std()) == pytest.approx((2 / 768) ** 0.5, rel=0.02)
    assert not any(tensor.any() for tensor in (adapter.down.bias, adapter.up.weight, adapter.up.bias))
    assert 12 * sum(parameter.numel() for parameter in adapter.parameters()) == 1_189_632


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"name": "test_resnet", "arguments": {}}, {}, "beside the MLP .* made of timm.models.resnet.B.*: choose"),
        ({}, {"bottleneck": 33}, "freeze.adapter.bottleneck=33 must be at most 32, the width of a block, or auto"),
        ({}, {"last": 5}, "freeze.adapter.last=5 must be from 1 to 4"),
    ],
)
def test_what_cannot_be_is_refused(backbone: Callable[..., Backbone], model: dict, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapters(backbone(**model), **{"last": None, "bottleneck": "auto", "scale": 0.1} | changes)
