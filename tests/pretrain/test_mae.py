"""The masked autoencoder: what the encoder sees, what the loss counts, patches against loops and lightly."""

from typing import Any

import pytest
import torch
from pretrain.tiny import CLASS_TOKEN, VIT, backbone, digits, losses_of_training, recipe, refused
from small_models import augmentation
from torch import nn

from thaw.pretrain.mae import MAE
from thaw.pretrain.patches import encode, patchify, unpatchify


def mae(*architecture: Any, mask_ratio: float = 0.6, normalize: bool = True) -> MAE:
    torch.manual_seed(0)
    return MAE(backbone(*architecture), augmentation(), recipe(), "w.safetensors", mask_ratio, 16, 1, 2, normalize)


def test_patches_are_rows_of_squares_and_go_back() -> None:
    images = torch.randn(2, 3, 28, 28)
    patches = patchify(images, 7)
    assert patches.shape == (2, 16, 7 * 7 * 3)
    for place in range(16):
        row, column = divmod(place, 4)
        square = images[:, :, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7]
        assert torch.equal(patches[:, place], square.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, 7, 3), images)


def test_patches_equal_lightlys() -> None:
    from lightly.models import utils

    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(patchify(images, 7), utils.patchify(images, 7))


@pytest.mark.parametrize("vit", [VIT, CLASS_TOKEN, VIT | {"reg_tokens": 2}])
def test_all_patches_through_the_encoder_are_the_backbones_features(vit: dict) -> None:
    model = mae(vit).eval()
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        tokens = encode(model.backbone, model.backbone.prefix(images, 1))
        expected = model.backbone.model.forward_features(images)
    torch.testing.assert_close(model.backbone.model.fc_norm(expected), tokens)


@pytest.mark.parametrize("vit", [VIT, CLASS_TOKEN])
def test_hidden_patches_are_not_seen(vit: dict) -> None:
    """Drawn patches depend on the visible ones and on nothing else."""
    model = mae(vit).eval()
    images = torch.randn(3, 1, 28, 28)
    kept, hidden = model.choose(3, images.device)
    assert kept.shape == (3, 6) and hidden.sum(dim=1).tolist() == [10, 10, 10]
    patches = patchify(images, 7)
    other = unpatchify(torch.where(hidden[..., None], torch.randn_like(patches), patches), 7, 1)
    seen = unpatchify(torch.where(hidden[..., None], patches, patches + 1), 7, 1)
    with torch.no_grad():
        drawn = model.draw(images, kept)
        assert torch.equal(drawn, model.draw(other, kept))
        assert not torch.allclose(drawn, model.draw(seen, kept))


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_is_the_error_of_hidden_patches(normalize: bool) -> None:
    model, images = mae(normalize=normalize).eval(), digits(4).images
    torch.manual_seed(5)
    loss = model.loss(images)
    torch.manual_seed(5)
    pixels = model.preprocess(images)
    kept, hidden = model.choose(4, images.device)
    drawn, patches, errors = model.draw(pixels, kept), patchify(pixels, 7), []
    for image in range(4):
        for place in range(16):
            if place in kept[image].tolist():
                assert not hidden[image, place]
                continue
            target = patches[image, place]
            if normalize:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            errors.append(((drawn[image, place] - target) ** 2).mean())
    assert len(errors) == 40
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_every_digit_has_its_own_mask_and_every_patch_its_turn() -> None:
    _, hidden = mae().choose(2000, torch.device("cpu"))
    assert len(hidden.unique(dim=0)) > 1000
    torch.testing.assert_close(hidden.float().mean(dim=0), torch.full((16,), 10 / 16), rtol=0, atol=0.05)


@pytest.mark.parametrize("vit", [VIT, CLASS_TOKEN])
def test_gradient_reaches_every_parameter_and_the_loss_falls(vit: dict) -> None:
    losses = losses_of_training(mae(vit), digits(16), 30)
    assert losses[-1] < 0.9 * losses[0]


def test_the_picture_keeps_what_was_seen() -> None:
    model, images = mae().eval(), digits(20).images
    with torch.no_grad():
        rows, titles = model.contact_sheet(images)
    assert titles == ["image", "seen", "drawn"] and all(row.shape == (16, 1, 28, 28) for row in rows)
    shown = rows[1] != 128
    assert torch.equal(rows[1][shown], images[:16][shown]) and torch.equal(rows[2][shown], images[:16][shown])
    assert 0.3 < shown.float().mean() < 0.45


@pytest.mark.parametrize(("ratio", "hides"), [(0.0, 0), (1.0, 16), (0.01, 0), (1.5, 24)])
def test_a_mask_must_hide_some_and_leave_some(ratio: float, hides: int) -> None:
    with pytest.raises(ValueError, match=rf"model\.mask_ratio={ratio} hides {hides} of 16 patches.*0\.6 to 0\.75"):
        mae(mask_ratio=ratio)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_resnet", {}), ("eva02_tiny_patch14_224", {"patch_size": 7, "depth": 1})],
)
def test_other_backbones_are_refused(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=rf"plain vision transformer, which backbone\.name={name} is not"):
        mae(arguments, name)


def test_a_decoder_of_odd_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder_width=16 must be a multiple of model\.decoder_heads=3"):
        MAE(backbone(), nn.Identity(), recipe(), "w.safetensors", 0.5, 16, 1, 3, True)  # type: ignore[arg-type]
    for key in ("decoder_width", "decoder_depth", "decoder_heads"):
        refused(MAE, key, 0, "a whole number, 1 or more")
