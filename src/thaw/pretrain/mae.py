"""Self-supervised pretraining by masked autoencoding (He et al. 2021, arXiv:2111.06377): most patches are hidden and drawn.

Shapes: B batch, T patches, K visible patches, D width, p patch side.
"""

import torch
from torch import Tensor, nn

from thaw.data.augment import Augment
from thaw.models.backbone import Backbone
from thaw.models.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.pretrain.patches import embed, encode, patch_side, patchify, to_pixels, unpatchify


class MAE(Objective):
    """The encoder sees the patches that are not hidden and nothing else; a light decoder draws those that are.

    Args:
        backbone, augment, optim, output: as for every objective.
        mask_ratio: share of the patches that are hidden, above 0 and below 1.
        decoder_width, decoder_depth, decoder_heads: of the decoder, which is thrown away after training.
        normalize_pixels: the decoder draws each patch in units of its own mean and deviation (He et al. 2021, section 4).

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
        self.decoder = Decoder(
            backbone.model.embed_dim, decoder_width, decoder_depth, decoder_heads, self.num_patches, values
        )
        self.normalize_pixels = normalize_pixels

    def loss(self, images: Tensor) -> Tensor:
        images = self.preprocess(self.augment(images))  # (B, C, S, S)
        kept, hidden = self.choose(len(images), images.device)  # (B, K), (B, T) of which T - K are true
        drawn = self.draw(images, kept)  # (B, T, p * p * C)
        error = (drawn.float() - self.target(images)).square().mean(dim=2)  # (B, T)
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

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should give: patches (B, T, p * p * C), each in its own mean and deviation if wanted."""
        patches = patchify(images, self.side)
        if not self.normalize_pixels:
            return patches
        mean, std = self.scale(patches)
        return (patches - mean) / std

    @staticmethod
    def scale(patches: Tensor) -> tuple[Tensor, Tensor]:
        return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Digits, what the encoder sees of them, and what the decoder draws, in the scale of the true patches."""
        pixels = self.preprocess(images[:16])
        kept, hidden = self.choose(len(pixels), pixels.device)
        patches, drawn = patchify(pixels, self.side), self.draw(pixels, kept).float()
        if self.normalize_pixels:
            mean, std = self.scale(patches)
            drawn = drawn * std + mean
        grey = (0.5 - self.preprocess.mean.flatten()[0]) / self.preprocess.std.flatten()[0]
        seen = torch.where(hidden[..., None], grey, patches)
        rows = [unpatchify(x, self.side, self.backbone.channels) for x in (seen, torch.where(hidden[..., None], drawn, patches))]
        return [images[:16], *(to_pixels(row, self.preprocess) for row in rows)], ["digit", "seen", "drawn"]


class Decoder(nn.Module):
    """A narrow, shallow transformer from the encoder's tokens to the pixels of every patch (He et al. 2021, section 3).

    Args:
        width: D of the encoder's tokens.
        decoder_width, depth, heads: its own.
        num_patches: T.
        patch_values: p * p * C.
    """

    def __init__(
        self, width: int, decoder_width: int, depth: int, heads: int, num_patches: int, patch_values: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, num_patches, decoder_width))
        layers = [
            nn.TransformerEncoderLayer(
                decoder_width, heads, 4 * decoder_width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(decoder_width)
        self.pixels = nn.Linear(decoder_width, patch_values)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Tokens (B, K, D) of the patches `kept` (B, K) -> all patches' pixels (B, T, p * p * C)."""
        tokens = self.embed(tokens)
        all_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), self.positions.shape[1], -1)
        places = kept[..., None].expand_as(tokens)
        x = all_tokens.scatter(1, places, tokens) + self.positions  # (B, T, decoder_width)
        return self.pixels(self.norm(self.blocks(x)))
