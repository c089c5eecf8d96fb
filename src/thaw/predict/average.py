"""One prediction of several: the mean over models, and over transformed views of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thaw.classifier import Classifier
from thaw.data.augment import Augment, Draws

VIEWS_SEED = 0


class Average(nn.Module):
    """Mean of the probabilities that models give to views of an image.

    Its output is the mean's logarithm: logits, whose softmax is the mean.
    """

    def __init__(self, members: Sequence[Classifier], views: "Views") -> None:
        super().__init__()
        self.members, self.views = nn.ModuleList(members), views
        self.task = members[0].task

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> logits (B, K)."""
        given = [member(view).float() for view in self.views(images) for member in self.members]
        mean = torch.stack([self.task.probabilities(logits) for logits in given]).mean(dim=0)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


class Views(nn.Module):
    """Test-time augmentation: an image as it is, and as so many transforms leave it.

    The transforms are drawn once, from a fixed seed, and are the same for every image: a prediction depends on its
    image alone, and an exported graph computes it without random numbers.

    Args:
        augment: what they are drawn from.
        count: K, with the image itself.
        shape: (C, H, W) of the images.
    """

    def __init__(self, augment: Augment, count: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.augment, self.count = augment, count
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(VIEWS_SEED)
            draws = [augment.draw(torch.zeros(1, *shape)) for _ in range(1, count)]  # K views begin as K - 1 do
        for name, parts in zip(Draws._fields, zip(*draws, strict=True), strict=False):
            self.register_buffer(name, None if parts[0] is None else torch.cat(parts), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """uint8 (B, C, H, W) -> K times (B, C, H, W): uint8, then floats from 0 to 255."""
        views, batch = [images], images.shape[0]  # len() would be a constant of an exported graph
        for number in range(self.count - 1):
            draws = [getattr(self, name) for name in Draws._fields]
            own = (None if each is None else each[number].expand(batch, *each.shape[1:]) for each in draws)
            views.append(self.augment.apply_draws(images.float(), Draws(*own)).clamp(0, 255))
        return views
