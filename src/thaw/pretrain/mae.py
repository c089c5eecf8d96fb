"""Self-supervised pretraining by masked autoencoding (He et al. 2021, arXiv:2111.06377): draw the hidden patches.

Shapes: B batch, T patches, K visible patches, D width, p patch side.
"""

import torch
from torch import Tensor, nn

from thaw.data.augment import Augment
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.pretrain.patches import encode, grey, patch_scale, patch_side, patch_targets, patchify, show_patches
from thaw.run.errors import UserError
from thaw.run.values import Count


class MAE(Objective):
    """The encoder sees only the visible patches; a light decoder draws the hidden ones.

    Args:
        mask_ratio: share of the patches that are hidden, above 0 and below 1.
        decoder_width, decoder_depth, decoder_heads: of the decoder, which is thrown away after training.
        normalize_pixels: the decoder draws each patch normalized by its own mean and deviation (section 3).
    """

    def loss(self, images: Tensor) -> Tensor:
        images = self.preprocess(self.augment(images))  # (B, C, S, S)
        visible, hidden = self.choose(len(images), images.device)  # (B, K), (B, T) of which T - K are true
        drawn = self.draw(images, visible)  # (B, T, p * p * C)
        wanted = patch_targets(images, self.side, self.normalize_pixels)
        error = (drawn.float() - wanted).square().mean(dim=2)  # (B, T)
        return error[hidden].mean()  # section 3: on the hidden patches alone

    def choose(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random places of each image's visible patches, (B, K), and for every patch whether it is hidden, (B, T)."""
        order = torch.rand(batch, self.num_patches, device=device).argsort(dim=1)
        visible = order[:, : self.num_visible]
        return visible, torch.ones_like(order, dtype=torch.bool).scatter(1, visible, False)

    def draw(self, images: Tensor, visible: Tensor) -> Tensor:
        """All patches (B, T, p * p * C) from the visible ones."""
        tokens = self.backbone.prefix(images, 1)  # (B, prefix + T, D), with their positions
        start = tokens.shape[1] - self.num_patches  # class and register tokens are never hidden
        places = (start + visible)[..., None].expand(-1, -1, tokens.shape[2])
        seen = torch.cat([tokens[:, :start], tokens.gather(1, places)], dim=1)  # (B, start + K, D)
        return self.decoder(encode(self.backbone, seen)[:, start:], visible)

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment,
        optim: OptimizerRecipe,
        output: str,
        mask_ratio: float,
        decoder_width: Count,
        decoder_depth: Count,
        decoder_heads: Count,
        normalize_pixels: bool,
    ) -> None:
        super().__init__(backbone, augment, optim, output)
        self.side = patch_side(backbone, "mae")
        self.num_patches = (backbone.image_size // self.side) ** 2
        self.num_visible = round((1 - mask_ratio) * self.num_patches)
        if not 0 < self.num_visible < self.num_patches:
            raise UserError(
                f"model.mask_ratio={mask_ratio} hides {self.num_patches - self.num_visible} of {self.num_patches} "
                "patches, and must hide some and leave some; 0.6 to 0.75 is common."
            )
        if decoder_width % decoder_heads:
            raise UserError(
                f"model.decoder_width={decoder_width} must be a multiple of model.decoder_heads={decoder_heads}."
            )
        values = self.side**2 * backbone.channels
        self.decoder = Decoder(backbone, decoder_width, decoder_depth, decoder_heads, self.num_patches, values)
        self.normalize_pixels = normalize_pixels

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Images, the encoder's view of them, and the decoder's drawing in the scale of the true patches."""
        pixels = self.preprocess(images[:16])
        visible, hidden = self.choose(len(pixels), pixels.device)
        patches, drawn = patchify(pixels, self.side), self.draw(pixels, visible).float()
        if self.normalize_pixels:
            mean, std = patch_scale(patches)
            drawn = drawn * std + mean
        rows = [torch.where(hidden[..., None], filling, patches) for filling in (grey(self.preprocess), drawn)]
        shown = (show_patches(row, self.side, self.preprocess) for row in rows)
        return [images[:16], *shown], ["image", "seen", "drawn"]


class Decoder(nn.Module):
    """A narrow, shallow ViT from the encoder's tokens to the pixels of every patch (He et al. 2021, section 3).

    Args:
        encoder: the backbone whose kind of block is used.
        num_patches, num_values: T, and p * p * C of a patch.
    """

    def __init__(
        self, encoder: Backbone, width: int, depth: int, heads: int, num_patches: int, num_values: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.model.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_patches, width))
        self.blocks = nn.Sequential(*(encoder.new_block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, num_values)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Tokens (B, K, D) of the patches at `visible` (B, K) -> all patches' pixels (B, T, p * p * C)."""
        tokens = self.embed(tokens)  # (B, K, width)
        blank = self.mask_token.to(tokens.dtype).expand(len(tokens), self.pos_embed.shape[1], -1)
        x = blank.scatter(1, visible[..., None].expand_as(tokens), tokens) + self.pos_embed  # (B, T, width)
        return self.pixels(self.norm(self.blocks(x)))
