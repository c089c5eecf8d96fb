"""Small networks trained from scratch, with the contract of `Backbone`: images (B, C, S, S) -> features (B, D)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from thaw.models.backbone import compile_each, match_channels
from thaw.models.heads import DropRate, FeatureNorm
from thaw.run.errors import UserError
from thaw.run.values import Count

Channels: TypeAlias = Literal[1, 3]
Numbers: TypeAlias = Sequence[float]
Widths: TypeAlias = Annotated[Sequence[Count], Field(min_length=1)]
StageWidths: TypeAlias = Annotated[Sequence[Count], Field(min_length=2)]


class Baseline(nn.Module):
    """The interface of `Backbone` for a network that is one layer: it trains as a whole and is never cut.

    Args:
        model: images (B, channels, image_size, image_size) -> features (B, num_features).
        mean, std: of the pixels in [0, 1], one number or one for each channel.
        settings: everything else that shapes the network, as values of JSON.
    """

    weights = "none"
    is_chain = False
    num_tokens = 1  # an image counts as one token

    def __init__(
        self,
        model: nn.Module,
        num_features: int,
        image_size: int,
        channels: int,
        mean: Numbers,
        std: Numbers,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model, self.num_features = model, num_features
        self.fresh = frozenset(dict(self.named_parameters()))
        self.image_size, self.channels = image_size, channels
        self.mean, self.std = match_channels("mean", mean, channels), match_channels("std", std, channels)
        self.architecture: dict[str, Any] = {
            **{"name": type(self).__name__.lower(), "image_size": image_size, "channels": channels},
            **{"mean": self.mean, "std": self.std, **settings},
        }

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, num_features)."""
        return self.model(images)

    def prefix(self, images: Tensor, cut: int) -> Tensor:
        """Images (B, C, S, S) after the first `cut` layers: unchanged for 0, features (B, num_features) for 1."""
        return self(images) if cut else images

    def suffix(self, features: Tensor, cut: int) -> Tensor:
        """The output of `prefix` -> features (B, num_features)."""
        return features if cut else self(features)

    @property
    def layers(self) -> list[nn.Module]:
        return [self]

    def layer_of(self, parameter: str) -> int:
        return 0

    def layers_state(self, cut: int) -> dict[str, Tensor]:
        return self.state_dict() if cut else {}

    def depths(self) -> dict[str, int]:
        return {name: 0 for name, _ in self.named_parameters()}

    def compile_layers(self) -> None:
        compile_each([self.model])
        self.architecture["compiled"] = True


class Pixels(Baseline):
    """The pixels themselves, (B, C, S, S) -> (B, C S S): under a linear head, multinomial logistic regression."""

    def __init__(self, image_size: Count, channels: Channels, mean: Numbers, std: Numbers) -> None:
        super().__init__(nn.Flatten(), channels * image_size**2, image_size, channels, mean, std, {})

    def depths(self) -> dict[str, int]:
        """The layer itself: there are no parameters, and the rules of a freezing policy need a name to match."""
        return {"model": 0}


class MLP(Baseline):
    """Fully connected layers with batch normalisation, ReLU and dropout.

    A classic of MNIST (LeCun et al. 1998, section III.C; Simard et al. 2003, table 1) with the normalisation of
    Ioffe & Szegedy (2015) and the dropout of Srivastava et al. (2014).

    Args:
        hidden: width of each hidden layer; the last is D.
        dropout: probability of zeroing a hidden unit in training.
    """

    def __init__(
        self, hidden: Widths, dropout: DropRate, image_size: Count, channels: Channels, mean: Numbers, std: Numbers
    ) -> None:
        widths = [channels * image_size**2, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]  # (B, C S S)
        for before, width in pairwise(widths):
            layers += [nn.Linear(before, width, bias=False), FeatureNorm(width), nn.ReLU(), nn.Dropout(dropout)]
        settings = {"hidden": list(hidden), "dropout": dropout}
        super().__init__(nn.Sequential(*layers), widths[-1], image_size, channels, mean, std, settings)


class LeNet5(Baseline):
    """LeNet-5 (LeCun et al. 1998, section II.B and figure 2) up to F6, (B, C, S, S) -> (B, 84).

    Modernised: ReLU for the scaled tanh, max-pooling without parameters for the trained averages S2 and S4, every map
    of C3 sees all of S2 (table 1 of the paper leaves some out), and a softmax head instead of the radial basis
    functions. At 28 px it has 60,856 parameters, 61,706 with a linear head of 10.
    """

    def __init__(
        self, image_size: Annotated[int, Field(ge=12)], channels: Channels, mean: Numbers, std: Numbers
    ) -> None:
        side = (image_size // 2 - 4) // 2  # of the maps of S4: 5 for 28 px, which padding makes the paper's 32
        model = nn.Sequential(
            *(nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),  # C1, S2: (B, 6, 14, 14)
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),  # C3, S4: (B, 16, 5, 5)
            *(nn.Flatten(), nn.Linear(16 * side**2, 120), nn.ReLU()),  # C5, whose kernel covers all of S4
            *(nn.Linear(120, 84), nn.ReLU()),  # F6
        )
        super().__init__(model, 84, image_size, channels, mean, std, {})


class ConvNet(Baseline):
    """A small VGG (Simonyan & Zisserman 2015) with batch normalisation and a global mean instead of wide linear layers.

    A 5 x 5 convolution of stride 2, which avoids the costly full resolution, then stages of two 3 x 3 convolutions
    with 2 x 2 max-pooling between the stages.

    Args:
        widths: channels of the first convolution and of each stage; the last is D.
        dropout: probability of zeroing a feature in training.

    Raises:
        UserError: the image is too small for so many stages.
    """

    def __init__(
        self, widths: StageWidths, dropout: DropRate, image_size: Count, channels: Channels, mean: Numbers, std: Numbers
    ) -> None:
        if image_size < (smallest := 2 ** (len(widths) - 1)):
            raise UserError(
                f"backbone.image_size={image_size} must be {smallest} or more for backbone.widths={widths}."
            )
        layers = self.stages(channels, widths)
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]  # (B, widths[-1])
        model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        settings = {"widths": list(widths), "dropout": dropout}
        super().__init__(model, widths[-1], image_size, channels, mean, std, settings)

    def stages(self, channels: int, widths: Sequence[int]) -> list[nn.Module]:
        layers = convolution(channels, widths[0], kernel=5, stride=2)  # (B, widths[0], S / 2, S / 2)
        for stage, (before, width) in enumerate(pairwise(widths)):
            layers += [nn.MaxPool2d(2)] if stage else []
            layers += [*convolution(before, width), *convolution(width, width)]
        return layers

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))  # 1.3 times as fast on a CPU


class ResNet9(ConvNet):
    """A residual network (He et al. 2016) for small photographs, after Page (2018), "How to train your ResNet".

    A convolution at full resolution, then stages of a convolution with 2 x 2 max-pooling; the first and every second
    one after it have two more convolutions, whose output is added to their input. With four widths, eight convolutions.
    """

    def stages(self, channels: int, widths: Sequence[int]) -> list[nn.Module]:
        layers = convolution(channels, widths[0])  # (B, widths[0], S, S)
        for stage, (before, width) in enumerate(pairwise(widths)):
            layers += [*convolution(before, width), nn.MaxPool2d(2)]
            layers += [Residual(*convolution(width, width), *convolution(width, width))] if stage % 2 == 0 else []
        return layers


class Residual(nn.Sequential):
    """Adds its input to the output of its layers."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class RNN(Baseline):
    """A recurrent network that reads an image row by row; the features are its last state in each direction.

    Args:
        cell: `lstm` (Hochreiter & Schmidhuber 1997, with Gers et al.'s forget gate, 2000) or `gru` (Cho et al. 2014).
        hidden_size: width of the state.
        num_layers: layers, each of which reads the states of the one below.
        bidirectional: read the rows from the bottom up as well (Schuster & Paliwal 1997), which doubles D.
    """

    def __init__(
        self,
        cell: Literal["lstm", "gru"],
        hidden_size: Count,
        num_layers: Count,
        bidirectional: bool,
        image_size: Count,
        channels: Channels,
        mean: Numbers,
        std: Numbers,
    ) -> None:
        model = (nn.LSTM if cell == "lstm" else nn.GRU)(
            channels * image_size, hidden_size, num_layers, batch_first=True, bidirectional=bidirectional
        )
        self.directions = 1 + bidirectional
        settings = {"cell": cell, "hidden_size": hidden_size, "num_layers": num_layers, "bidirectional": bidirectional}
        super().__init__(model, self.directions * hidden_size, image_size, channels, mean, std, settings)

    def forward(self, images: Tensor) -> Tensor:
        _, last = self.model(images.transpose(1, 2).flatten(2))  # (B, S, C S)
        state = last[0] if isinstance(last, tuple) else last  # (num_layers x directions, B, hidden_size)
        return state[-self.directions :].transpose(0, 1).flatten(1)


def convolution(before: int, width: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """(B, before, S, S) -> (B, width, S / stride, S / stride), normalised (which adds the bias) and rectified."""
    return [nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
