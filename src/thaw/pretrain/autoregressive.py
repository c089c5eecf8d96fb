"""Self-supervised pretraining by predicting the next patch, as GPT predicts the next word.

Chen et al. 2020, "Generative pretraining from pixels"; El-Nouby et al. 2024 (AIM, arXiv:2401.08541).

Shapes: B batch, T patches, G patches given, D width, p patch side, P class and register tokens.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from thaw.data.augment import Augment
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective
from thaw.pretrain.patches import embed, encode, patch_side, patchify, scale, target, to_pixels, unpatchify


class Autoregressive(Objective):
    """Each token attends to those before it and to itself, and a head draws the patch that comes next.

    Class and register tokens come first and are seen by all. The first patch of an order is never predicted, as no
    patch comes before it.

    Args:
        backbone, augment, optim, output: as for every objective.
        order: `raster`, row by row; or `random`, for each digit another one (Yang et al. 2019, XLNet).
        prefix: up to this share of the patches, drawn anew for each step, attend to one another both ways and are not
            predicted, as a probe lets all patches do (El-Nouby et al. 2024, section 3.2); 0 is causal from the start.
        head_width: of the hidden layers of the head, which is thrown away after training.
        normalize_pixels: the head draws each patch in its own mean and deviation (He et al. 2021, section 3).

    Raises:
        ValueError: an unknown order, a share out of its range, or a backbone that does not see patches.
    """

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment,
        optim: OptimizerRecipe,
        output: str,
        order: Literal["raster", "random"],
        prefix: float,
        head_width: int,
        normalize_pixels: bool,
    ) -> None:
        super().__init__(backbone, augment, optim, output)
        self.side = patch_side(backbone, "autoregressive")
        self.num_patches = (backbone.image_size // self.side) ** 2
        if self.num_patches < 2:
            raise ValueError(
                f"model=autoregressive needs several patches, and backbone.image_size={backbone.image_size} is one of "
                f"side {self.side}; use a larger image or smaller patches."
            )
        if order not in ("raster", "random"):
            raise ValueError(f"model.order={order!r} is unknown; choose raster or random.")
        if not 0 <= prefix < 1:
            raise ValueError(f"model.prefix={prefix} must be from 0 to below 1; 0 predicts all patches but the first.")
        if head_width < 1:
            raise ValueError(f"model.head_width={head_width} must be 1 or more; the backbone's width is common.")
        width, values = backbone.model.embed_dim, self.side**2 * backbone.channels
        self.target_pos_embed = nn.Parameter(0.02 * torch.randn(self.num_patches, width))  # which patch is asked for
        self.head = nn.Sequential(
            *(nn.Linear(width, head_width), nn.GELU()),
            *(nn.Linear(head_width, head_width), nn.GELU()),
            nn.Linear(head_width, values),
        )
        self.order, self.normalize_pixels = order, normalize_pixels
        self.most_given = max(1, int(prefix * self.num_patches))

    def loss(self, images: Tensor) -> Tensor:
        images = self.preprocess(self.augment(images))  # (B, C, S, S)
        given = int(torch.randint(1, self.most_given + 1, ()))  # G
        order = self.draw_order(len(images), images.device)  # (B, T)
        drawn = self.predict(images, order, given)  # (B, T - G, p * p * C)
        wanted = pick(target(images, self.side, self.normalize_pixels), order[:, given:])
        return (drawn.float() - wanted).square().mean()

    def draw_order(self, batch: int, device: torch.device) -> Tensor:
        """The patches (B, T) of each image in the order in which they come."""
        if self.order == "random":
            return torch.rand(batch, self.num_patches, device=device).argsort(dim=1)
        return torch.arange(self.num_patches, device=device).expand(batch, -1)

    def predict(self, images: Tensor, order: Tensor, given: int) -> Tensor:
        """Each patch after the first G of its order, from those before it: (B, T - G, p * p * C)."""
        tokens = embed(self.backbone, images)  # (B, P + T, D), which know their positions
        start = tokens.shape[1] - self.num_patches  # P
        tokens = torch.cat([tokens[:, :start], pick(tokens[:, start:], order[:, :-1])], dim=1)  # (B, P + T - 1, D)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        visible = (place <= place[:, None]) | (place < start + given)  # row attends to column
        states = encode(self.backbone, tokens, visible)[:, start + given - 1 :]  # (B, T - G, D), each before its patch
        return self.head(states + self.target_pos_embed[order[:, given:]])

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Digits, the upper half that is given, and the digit that is drawn from it patch by patch."""
        pixels = self.preprocess(images[:16])
        grey = (0.5 - self.preprocess.mean.flatten()[0]) / self.preprocess.std.flatten()[0]
        half = patchify(pixels, self.side).clone()
        half[:, self.num_patches // 2 :] = grey
        rows = [unpatchify(half, self.side, self.backbone.channels), self.complete(pixels, self.num_patches // 2)]
        return [images[:16], *(to_pixels(row, self.preprocess) for row in rows)], ["digit", "given", "completed"]

    def complete(self, images: Tensor, given: int) -> Tensor:
        """Keep the first G patches of (B, C, S, S) and draw the others row by row, each from all that were before it.

        What is drawn in units of a patch's own mean and deviation takes them from the true patch.
        """
        mean, std = scale(patchify(images, self.side)) if self.normalize_pixels else (None, None)
        order = torch.arange(self.num_patches, device=images.device).expand(len(images), -1)
        patches = patchify(images, self.side).clone()  # (B, T, p * p * C)
        for n in range(given, self.num_patches):
            so_far = unpatchify(patches, self.side, self.backbone.channels)  # later patches are not attended to
            drawn = self.predict(so_far, order, min(n, self.most_given))[:, n - min(n, self.most_given)].float()
            patches[:, n] = drawn if mean is None or std is None else drawn * std[:, n] + mean[:, n]
        return unpatchify(patches, self.side, self.backbone.channels)


def pick(patches: Tensor, places: Tensor) -> Tensor:
    """Of (B, T, D) those at `places` (B, K), in that order: (B, K, D)."""
    return patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2]))
