"""Self-supervised pretraining by predicting the next patch, as GPT predicts the next word.

Chen et al. 2020, "Generative pretraining from pixels"; El-Nouby et al. 2024 (AIM, arXiv:2401.08541).

Shapes: B batch, T patches, G given patches, D width, p patch side, P class and register tokens.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from thaw.data.augment import Augment
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.pretrain.patches import (
    encode,
    grey,
    patch_scale,
    patch_side,
    patch_targets,
    patchify,
    show_patches,
    unpatchify,
)
from thaw.run.errors import UserError
from thaw.run.values import Count


class Autoregressive(Objective):
    """Each token attends to itself and those before it, and a head draws the patch that comes next.

    Class and register tokens come first and all tokens see them. The first patch of an order is never predicted, as no
    patch comes before it.

    Args:
        order: `raster`, row by row; or `random`, another order for each image (Yang et al. 2019, XLNet).
        prefix: largest share of the patches that attend to one another both ways and are not predicted, drawn anew for
            each step, as a probe lets all patches do (El-Nouby et al. 2024, section 3.2); 0 is causal from the start.
        head_width: of the hidden layers of the head, which is thrown away after training; the backbone's is common.
        normalize_pixels: the head draws each patch normalized by its own mean and deviation (He et al. 2021).
    """

    def loss(self, images: Tensor) -> Tensor:
        images = self.preprocess(self.augment(images))  # (B, C, S, S)
        given = int(torch.randint(1, self.most_given + 1, ()))  # G
        order = self.draw_order(len(images), images.device)  # (B, T)
        drawn = self.predict(images, order, given)  # (B, T - G, p * p * C)
        wanted = pick(patch_targets(images, self.side, self.normalize_pixels), order[:, given:])
        return (drawn.float() - wanted).square().mean()

    def draw_order(self, batch: int, device: torch.device) -> Tensor:
        """The order of each image's patches, (B, T)."""
        if self.order == "random":
            return torch.rand(batch, self.num_patches, device=device).argsort(dim=1)
        return torch.arange(self.num_patches, device=device).expand(batch, -1)

    def predict(self, images: Tensor, order: Tensor, given: int) -> Tensor:
        """Each patch after the first G of its order, from those before it: (B, T - G, p * p * C)."""
        tokens = self.backbone.prefix(images, 1)  # (B, P + T, D), with their positions
        start = tokens.shape[1] - self.num_patches  # P
        tokens = torch.cat([tokens[:, :start], pick(tokens[:, start:], order[:, :-1])], dim=1)  # (B, P + T - 1, D)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        visible = (place <= place[:, None]) | (place < start + given)  # row attends to column
        states = encode(self.backbone, tokens, visible)[:, start + given - 1 :]  # (B, T - G, D), each before its patch
        return self.head(states + self.target_pos_embed[order[:, given:]])

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment,
        optim: OptimizerRecipe,
        output: str,
        order: Literal["raster", "random"],
        prefix: Annotated[float, Field(ge=0, lt=1, description="0 predicts all patches but the first")],
        head_width: Count,
        normalize_pixels: bool,
    ) -> None:
        super().__init__(backbone, augment, optim, output)
        self.side = patch_side(backbone, "autoregressive")
        self.num_patches = (backbone.image_size // self.side) ** 2
        if self.num_patches < 2:
            raise UserError(
                f"model=autoregressive needs several patches, and backbone.image_size={backbone.image_size} is one of "
                f"side {self.side}; use a larger image or smaller patches."
            )
        width, values = backbone.model.embed_dim, self.side**2 * backbone.channels
        self.target_pos_embed = nn.Parameter(0.02 * torch.randn(self.num_patches, width))  # of the patch to predict
        self.head = nn.Sequential(
            *(nn.Linear(width, head_width), nn.GELU()),
            *(nn.Linear(head_width, head_width), nn.GELU()),
            nn.Linear(head_width, values),
        )
        self.order, self.normalize_pixels = order, normalize_pixels
        self.most_given = max(1, int(prefix * self.num_patches))

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Images, their given upper halves, and the completions of these, drawn patch by patch."""
        pixels, half = self.preprocess(images[:16]), self.num_patches // 2
        upper = patchify(pixels, self.side).clone()
        upper[:, half:] = grey(self.preprocess)
        rows = (show_patches(row, self.side, self.preprocess) for row in (upper, self.complete(pixels, half)))
        return [images[:16], *rows], ["image", "given", "completed"]

    def complete(self, images: Tensor, given: int) -> Tensor:
        """The first G patches of (B, C, S, S), then drawn ones, each from all those before it: (B, T, p * p * C).

        With `normalize_pixels` a drawn patch takes its mean and deviation from the true patch.
        """
        patches = patchify(images, self.side).clone()  # (B, T, p * p * C)
        mean, std = patch_scale(patches) if self.normalize_pixels else (None, None)
        order = torch.arange(self.num_patches, device=images.device).expand(len(images), -1)
        for n in range(given, self.num_patches):
            so_far = unpatchify(patches, self.side, self.backbone.channels)  # later patches are not attended to
            drawn = self.predict(so_far, order, min(n, self.most_given))[:, n - min(n, self.most_given)].float()
            patches[:, n] = drawn if mean is None or std is None else drawn * std[:, n] + mean[:, n]
        return patches


def pick(patches: Tensor, places: Tensor) -> Tensor:
    """The patches (B, T, D) at `places` (B, K), in that order: (B, K, D)."""
    return patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2]))
