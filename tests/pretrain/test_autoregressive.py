"""Next-patch prediction: what each prediction depends on, its loss against loops, its completions, its gradients."""

from typing import Any

import pytest
import torch
from pretrain.tiny import VIT, backbone, losses_of_training, recipe, refused
from torch import Tensor, nn

from thaw.data.loader import Batch
from thaw.models.backbone import Backbone
from thaw.pretrain.autoregressive import Autoregressive
from thaw.pretrain.patches import patch_targets, patchify, unpatchify

REGISTERS = VIT | {"class_token": True, "global_pool": "token", "reg_tokens": 2}


def autoregressive(vit: dict = VIT, *, fused: bool = False, **settings: Any) -> Autoregressive:
    torch.manual_seed(0)
    settings = {"order": "random", "prefix": 0.0, "head_width": 32, "normalize_pixels": False} | settings
    encoder = backbone(vit, fused_attention=fused)
    return Autoregressive(encoder, nn.Identity(), recipe(), "w.safetensors", **settings)  # type: ignore[arg-type]


def digits(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (number, 28, 28), dtype=torch.uint8, generator=generator)
    images[:, 7:21] += (50 * (torch.arange(number) % 3)).to(torch.uint8)[:, None, None]
    return images[:, None]


# What a prediction depends on


@pytest.mark.parametrize("vit", [VIT, REGISTERS])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("given", [1, 5])
@pytest.mark.parametrize("order", ["raster", "random"])
def test_a_prediction_depends_on_all_earlier_patches_and_on_no_other(
    order: str, given: int, fused: bool, vit: dict
) -> None:
    model = autoregressive(vit, order=order, prefix=0.5, fused=fused).eval()
    pixels = model.preprocess(digits(3))
    sequence = model.draw_order(3, pixels.device)
    assert torch.equal(sequence.sort(dim=1).values, torch.arange(16).expand(3, -1))
    assert torch.equal(sequence[0], sequence[1]) == (order == "raster")
    with torch.no_grad():
        before = model.predict(pixels, sequence, given)  # (3, 16 - given, 49), of the patches from `given` on
        for n in range(16):
            patches = patchify(pixels, 7).clone()
            for image in range(3):
                patches[image, sequence[image, n]] += torch.randn(49)
            after = model.predict(unpatchify(patches, 7, 1), sequence, given)
            same = (after == before).all(dim=2)  # (3, 16 - given)
            expected = torch.arange(given, 16) <= n
            assert torch.equal(same, expected.expand(3, -1)), n


def test_the_head_is_asked_for_a_place() -> None:
    model = autoregressive().eval()
    pixels, order = model.preprocess(digits(2)), torch.arange(16).expand(2, -1)
    swapped = order.clone()
    swapped[:, [14, 15]] = order[:, [15, 14]]
    with torch.no_grad():
        one, other = (model.predict(pixels, x, 1)[:, 13] for x in (order, swapped))  # from the same patches 0 to 13
    assert (one - other).abs().max() > 1e-3


# The loss


def naive_states(backbone: Backbone, tokens: Tensor, given: int) -> Tensor:
    """The blocks of a ViT on one image, token by token: (T, D)."""
    for block in backbone.model.blocks:
        heads, width = block.attn.num_heads, tokens.shape[1]
        q, k, v = block.attn.qkv(block.norm1(tokens)).reshape(len(tokens), 3, heads, width // heads).unbind(1)
        mixed = torch.zeros_like(q)
        for i in range(len(tokens)):
            seen = list(range(max(i + 1, given)))
            for h in range(heads):
                weights = torch.stack([torch.dot(q[i, h], k[j, h]) / (width // heads) ** 0.5 for j in seen]).softmax(0)
                mixed[i, h] = sum(w * v[j, h] for w, j in zip(weights, seen, strict=True))
        tokens = tokens + block.attn.proj(mixed.flatten(1))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return backbone.model.fc_norm(backbone.model.norm(tokens))


@pytest.mark.parametrize(
    ("order", "prefix", "normalize_pixels", "vit"),
    [("raster", 0.0, False, VIT), ("random", 0.6, True, VIT), ("random", 0.6, False, REGISTERS)],
)
@torch.no_grad()
def test_loss_equals_a_naive_loop(order: str, prefix: float, normalize_pixels: bool, vit: dict) -> None:
    model = autoregressive(vit, order=order, prefix=prefix, normalize_pixels=normalize_pixels)
    for parameter in model.backbone.model.blocks.parameters():
        parameter.mul_(5)  # attention that counts
    images = digits(3)
    torch.manual_seed(3)
    loss = model.loss(images)
    torch.manual_seed(3)
    given = int(torch.randint(1, model.most_given + 1, ()))
    sequences = model.draw_order(3, images.device)
    assert (given > 1) == (prefix > 0)
    pixels, errors = model.preprocess(images), []
    tokens = model.backbone.prefix(pixels, 1)
    for embedded, patches, sequence in zip(tokens, patchify(pixels, 7), sequences, strict=True):
        extra = len(embedded) - 16
        ordered = torch.cat([embedded[:extra], embedded[extra:][sequence]])
        states = naive_states(model.backbone, ordered, extra + given)
        for t in range(given, 16):
            patch = patches[sequence[t]]
            if normalize_pixels:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            drawn = model.head(states[extra + t - 1] + model.target_pos_embed[sequence[t]])
            errors.extend((drawn - patch).square())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


@pytest.mark.parametrize(("prefix", "allowed"), [(0.0, {1}), (0.05, {1}), (0.25, {1, 2, 3, 4})])
def test_the_prefix_is_drawn_up_to_its_share(prefix: float, allowed: set, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = autoregressive(prefix=prefix), set()

    def predict(images: Tensor, _order: Tensor, given: int) -> Tensor:
        seen.add(given)
        return torch.zeros(len(images), 16 - given, 49)

    monkeypatch.setattr(model, "predict", predict)
    for _ in range(50):
        model.loss(digits(2))
    assert seen == allowed


# Completions


@pytest.mark.parametrize("normalize_pixels", [False, True])
@torch.no_grad()
def test_a_completion_is_made_of_its_own_patches(normalize_pixels: bool) -> None:
    model = autoregressive(prefix=0.25, normalize_pixels=normalize_pixels).eval()
    pixels = model.preprocess(digits(2))
    expected = patchify(pixels, 7).clone()
    if not normalize_pixels:  # nothing of the true lower half is used
        expected[:, 8:] = 0
    true, order = patchify(pixels, 7), torch.arange(16).expand(2, -1)
    for n in range(8, 16):
        drawn = model.predict(unpatchify(expected, 7, 1), order, 4)[:, n - 4]
        if normalize_pixels:
            drawn = drawn * (true[:, n].var(dim=1, keepdim=True) + 1e-6).sqrt() + true[:, n].mean(dim=1, keepdim=True)
        expected[:, n] = drawn
    completed = model.complete(pixels, 8)
    torch.testing.assert_close(completed, expected)
    assert torch.equal(completed[:, :8], true[:, :8])
    assert torch.equal(pixels, model.preprocess(digits(2)))


def test_contact_sheet() -> None:
    model, images = autoregressive(order="raster").eval(), digits(20)
    with torch.no_grad():
        (shown, given, completed), titles = model.contact_sheet(images)
    assert titles == ["image", "given", "completed"]
    assert all(row.shape == (16, 1, 28, 28) and row.dtype == torch.uint8 for row in (shown, given, completed))
    assert torch.equal(shown, images[:16])
    for row in (given, completed):
        assert torch.equal(row[:, :, :14], images[:16, :, :14])
    assert given[:, :, 14:].unique().tolist() == [128]


# Training


@pytest.mark.parametrize("vit", [VIT, REGISTERS])
@pytest.mark.parametrize(("order", "prefix"), [("raster", 0.0), ("random", 0.9)])
def test_gradient_reaches_every_parameter_and_the_loss_falls(order: str, prefix: float, vit: dict) -> None:
    batch = Batch(digits(12), torch.arange(12), torch.arange(12))
    losses = losses_of_training(autoregressive(vit, order=order, prefix=prefix), batch, 20)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_in_bf16(fused: bool) -> None:
    model = autoregressive(fused=fused, normalize_pixels=True)
    torch.manual_seed(1)
    exact = model.loss(digits(6))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(digits(6))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_targets_in_their_own_scale() -> None:
    patches = patch_targets(autoregressive().preprocess(digits(2)), 7, True)
    torch.testing.assert_close(patches.mean(dim=2), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(patches.std(dim=2), torch.ones(2, 16), rtol=0, atol=1e-4)


def test_a_single_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="needs several patches"):
        autoregressive(VIT | {"patch_size": 28})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("order", "spiral", "raster or random"),
        ("prefix", 1.0, "a number, 0 or more and below 1; 0 predicts all patches but the first"),
        ("prefix", -0.1, "a number, 0 or more and below 1; 0 predicts all patches but the first"),
        ("head_width", 0, "a whole number, 1 or more"),
    ],
)
def test_settings_out_of_range(key: str, value: Any, allowed: str) -> None:
    refused(Autoregressive, key, value, allowed)
