"""Self-supervised pretraining by DINO (Caron et al. 2021, arXiv:2104.14294): a student learns from its average.

Shapes: B batch, V views, T tokens, D feature width, K prototypes, L patches along the side of a local crop.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thaw.data.augment import Augment
from thaw.models.backbone import Backbone
from thaw.models.optim import OptimizerRecipe
from thaw.pretrain.objective import Objective, neighbours_sheet
from thaw.pretrain.patches import embed, patch_side

STUDENT_TEMPERATURE = 0.1  # Caron et al. 2021, section 3.2


class DINO(Objective):
    """The student's view of a digit should fall on the prototypes on which the teacher's other view of it falls.

    The teacher is the exponential moving average of the student; it has no gradient, and it is what is probed and
    written. It sees two whole views; the student sees these and square blocks of patches of further views.

    Args:
        backbone, augment, optim, output: as for every objective.
        prototypes: K, outputs of the projection head.
        hidden, bottleneck: widths of that head's hidden layers and of what is compared with the prototypes.
        teacher_temperature: sharpens the teacher's outputs; below the student's 0.1.
        momentum: of the teacher at the first step; it rises to 1 by a cosine.
        centre_momentum: of the mean of the teacher's outputs, which is taken from them.
        local_crops: how many blocks the student sees; 0 works for all backbones.
        local_side: L, so that a block is of L x L patches.

    Raises:
        ValueError: a number out of its range, or an augmentation that changes nothing.
    """

    centre: Tensor

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment,
        optim: OptimizerRecipe,
        output: str,
        prototypes: int,
        hidden: int,
        bottleneck: int,
        teacher_temperature: float,
        momentum: float,
        centre_momentum: float,
        local_crops: int,
        local_side: int,
    ) -> None:
        super().__init__(backbone, augment, optim, output)
        if not augment.is_random:
            raise ValueError("model=dino compares views of a digit, and augment=none makes them equal; use strong.")
        self.grid = backbone.image_size // patch_side(backbone, "dino") if local_crops else 0  # patches along a side
        ranges = {
            "prototypes": (prototypes, prototypes > 1, "2 or more"),
            "teacher_temperature": (
                *(teacher_temperature, 0 < teacher_temperature < STUDENT_TEMPERATURE),
                f"above 0 and below the student's {STUDENT_TEMPERATURE}",
            ),
            "momentum": (momentum, 0 <= momentum < 1, "from 0 to below 1"),
            "centre_momentum": (centre_momentum, 0 <= centre_momentum < 1, "from 0 to below 1"),
            "local_crops": (local_crops, local_crops >= 0, "0 or more"),
            "local_side": (local_side, not local_crops or 0 < local_side <= self.grid, f"from 1 to {self.grid}"),
        }
        wrong = [f"model.{name}={value} must be {allowed}" for name, (value, ok, allowed) in ranges.items() if not ok]
        if wrong:
            raise ValueError("; ".join(wrong) + ".")
        self.projector = Projector(backbone.num_features, hidden, bottleneck, prototypes)
        self.student, self.student_projector = copy.deepcopy(backbone), copy.deepcopy(self.projector)
        for module in (self.backbone, self.projector):
            module.requires_grad_(False).eval()
        self.register_buffer("centre", torch.zeros(prototypes))
        self.teacher_temperature, self.momentum, self.centre_momentum = teacher_temperature, momentum, centre_momentum
        self.local_crops, self.local_side = local_crops, local_side

    def loss(self, images: Tensor) -> Tensor:
        if len(images) < 2:
            raise ValueError(
                "A step on 1 digit has nothing to tell it from: choose data.batch_size (256 is common) and "
                "data.eval_batch_size of 2 or more that leave no single digit over."
            )
        views = self.preprocess(self.augment(images.repeat(2 + self.local_crops, 1, 1)))  # (V * B, C, S, S)
        whole, others = views[: 2 * len(images)], views[2 * len(images) :]
        with torch.no_grad():
            teacher = self.projector(self.backbone(whole))  # (2B, K)
        student = self.student_projector(self.student(whole)).chunk(2)  # (B, K) each
        if self.local_crops:
            blocks = self.random_blocks(embed(self.student, others))  # tokens keep their positions
            student += self.student_projector(self.student.suffix(blocks, 1)).chunk(self.local_crops)
        loss = dino_loss(student, teacher.chunk(2), self.centre, self.teacher_temperature)
        if self.training:
            mean = self.gather(teacher.mean(dim=0, keepdim=True)).mean(dim=0)  # (K,) over all processes
            self.centre.lerp_(mean, 1 - self.centre_momentum)  # Caron et al. 2021, equation 4
        return loss

    def random_blocks(self, tokens: Tensor) -> Tensor:
        """A block of L x L patches of each image: (B, T, D) -> (B, prefix + L * L, D)."""
        start = tokens.shape[1] - self.grid**2  # class and register tokens stay
        corner = torch.rand(len(tokens), 2, 1, 1, device=tokens.device) * (self.grid - self.local_side + 1)
        row, column = corner.long().unbind(1)  # (B, 1, 1) each
        steps = torch.arange(self.local_side, device=tokens.device)
        places = start + ((row + steps[:, None]) * self.grid + column + steps).flatten(1)  # (B, L * L)
        block = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :start], block], dim=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The teacher follows every step of the student, and before a checkpoint of that step is written."""
        progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
        super().optimizer_step(*args, **kwargs)
        self.update_teacher(1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        for teacher, student in ((self.backbone, self.student), (self.projector, self.student_projector)):
            for mean, new in zip(teacher.parameters(), student.parameters(), strict=True):
                mean.lerp_(new, 1 - momentum)
            for own, new_value in zip(teacher.buffers(), student.buffers(), strict=True):  # statistics of batch norms
                own.copy_(new_value)

    def train(self, mode: bool = True) -> "DINO":
        super().train(mode)
        self.backbone.eval()  # dropout and drop path are the student's
        self.projector.eval()
        return self

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: the student's as the backbone has them, its projection head the deepest."""
        depths = {f"student.{name}": depth for name, depth in self.student.depths().items()}
        top = max(depths.values()) + 1
        return {name: depths.get(name, top) for name, _ in self.named_parameters()}

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Digits, and below each its nearest neighbours among the others by the cosine of the teacher's features."""
        return neighbours_sheet(self.features(images), images)


class Projector(nn.Module):
    """Features (B, D) -> how near each is to every prototype, (B, K): cosines (Caron et al. 2021, appendix C).

    The prototypes have length 1, as a weight-normalised layer whose gain is fixed to 1.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):  # biases would outweigh what tells digits apart, and all would collapse
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, features: Tensor) -> Tensor:
        x = F.normalize(self.mlp(features).float(), dim=1)  # (B, bottleneck)
        with torch.autocast(x.device.type, enabled=False):  # in bf16 it would be off by 0.004 / temperature
            return x @ F.normalize(self.prototypes.float(), dim=1).T


def dino_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], centre: Tensor, teacher_temperature: float
) -> Tensor:
    """Cross-entropy of every student view under every teacher view but the same one (Caron et al. 2021, algorithm 1).

    Args:
        student, teacher: (B, K) of each view, in float32; the student's first views are the teacher's.
        centre: (K,), taken from the teacher's outputs.
        teacher_temperature: divides the teacher's outputs.
    """
    targets = [((view - centre) / teacher_temperature).softmax(dim=1) for view in teacher]
    guesses = [(view / STUDENT_TEMPERATURE).log_softmax(dim=1) for view in student]
    terms = [
        -(target * guess).sum(dim=1).mean()
        for t, target in enumerate(targets)
        for s, guess in enumerate(guesses)
        if s != t
    ]
    return torch.stack(terms).mean()
