"""Self-supervised pretraining by masked autoencoding (He et al. 2021, arXiv:2111.06377): draw what is hidden.

Shapes: B batch, T patches, K visible patches, D width, p patch side.
"""

import torch
from torch import Tensor, nn

from thaw.data.augment import Augment
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.pretrain.patches import embed, encode, patch_side, patchify, scale, target, to_pixels, unpatchify


class MAE(Objective):
    """The encoder sees the patches that are not hidden and nothing else; a light decoder draws those that are.

    Args:
        backbone, augment, optim, output: as for every objective.
        mask_ratio: share of the patches that are hidden, above 0 and below 1.
        decoder_width, decoder_depth, decoder_heads: of the decoder, which is thrown away after training.
        normalize_pixels: the decoder draws each patch in its own mean and deviation (He et al. 2021, section 3).

    Raises:
        ValueError: a ratio that hides no patch or all, or a backbone whose patches cannot be hidden.
    """

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment,
        optim: OptimizerRecipe,
        output: str,
        mask_ratio: float,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        normalize_pixels: bool,
    ) -> None:
        super().__init__(backbone, augment, optim, output)
        self.side = patch_side(backbone, "mae")
        self.num_patches = (backbone.image_size // self.side) ** 2
        self.num_visible = round((1 - mask_ratio) * self.num_patches)
        if not 0 < self.num_visible < self.num_patches:
            raise ValueError(
                f"model.mask_ratio={mask_ratio} hides {self.num_patches - self.num_visible} of {self.num_patches} "
                "patches, and must hide some and leave some; 0.6 to 0.75 is common."
            )
        if decoder_heads < 1 or decoder_width % decoder_heads:
            raise ValueError(
                f"model.decoder_width={decoder_width} must be a multiple of model.decoder_heads={decoder_heads}."
            )
        values = self.side**2 * backbone.channels
        self.decoder = Decoder(backbone, decoder_width, decoder_depth, decoder_heads, self.num_patches, values)
        self.normalize_pixels = normalize_pixels

    def loss(self, images: Tensor) -> Tensor:
        images = self.preprocess(self.augment(images))  # (B, C, S, S)
        kept, hidden = self.choose(len(images), images.device)  # (B, K), (B, T) of which T - K are true
        drawn = self.draw(images, kept)  # (B, T, p * p * C)
        error = (drawn.float() - target(images, self.side, self.normalize_pixels)).square().mean(dim=2)  # (B, T)
        return error[hidden].mean()  # He et al. 2021, section 3: on the hidden patches alone

    def choose(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which patches each image keeps, drawn at random: their places (B, K), and whether each is hidden (B, T)."""
        order = torch.rand(batch, self.num_patches, device=device).argsort(dim=1)
        kept = order[:, : self.num_visible]
        return kept, torch.ones_like(order, dtype=torch.bool).scatter(1, kept, False)

    def draw(self, images: Tensor, kept: Tensor) -> Tensor:
        """All patches (B, T, p * p * C) from those that are kept."""
        tokens = embed(self.backbone, images)
        start = tokens.shape[1] - self.num_patches  # class and register tokens are never hidden
        places = (start + kept)[..., None].expand(-1, -1, tokens.shape[2])
        visible = torch.cat([tokens[:, :start], tokens.gather(1, places)], dim=1)  # (B, start + K, D)
        return self.decoder(encode(self.backbone, visible)[:, start:], kept)

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Digits, what the encoder sees of them, and what the decoder draws, in the scale of the true patches."""
        pixels = self.preprocess(images[:16])
        kept, hidden = self.choose(len(pixels), pixels.device)
        patches, drawn = patchify(pixels, self.side), self.draw(pixels, kept).float()
        if self.normalize_pixels:
            mean, std = scale(patches)
            drawn = drawn * std + mean
        grey = (0.5 - self.preprocess.mean.flatten()[0]) / self.preprocess.std.flatten()[0]
        seen = torch.where(hidden[..., None], grey, patches)
        rows = [
            unpatchify(x, self.side, self.backbone.channels)
            for x in (seen, torch.where(hidden[..., None], drawn, patches))
        ]
        return [images[:16], *(to_pixels(row, self.preprocess) for row in rows)], ["digit", "seen", "drawn"]


class Decoder(nn.Module):
    """A narrow, shallow ViT from the encoder's tokens to the pixels of every patch (He et al. 2021, section 3).

    Args:
        encoder: whose kind of block it takes.
        width, depth, heads: its own.
        num_patches: T.
        num_values: of a patch, p * p * C.
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

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Tokens (B, K, D) of the patches `kept` (B, K) -> all patches' pixels (B, T, p * p * C)."""
        tokens = self.embed(tokens)  # (B, K, width)
        blank = self.mask_token.to(tokens.dtype).expand(len(tokens), self.pos_embed.shape[1], -1)
        x = blank.scatter(1, kept[..., None].expand_as(tokens), tokens) + self.pos_embed  # (B, T, width)
        return self.pixels(self.norm(self.blocks(x)))
