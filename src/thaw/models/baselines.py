"""Small networks trained from scratch, with the contract of `Backbone`: images (B, C, S, S) -> features (B, D)."""

import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from thaw.models.backbone import match_channels
from thaw.models.batch_norm import FeatureNorm

Numbers: TypeAlias = Sequence[float]


class Baseline(nn.Module):
    """What `Classifier` asks of a backbone, for a network that is one layer: it trains as a whole and is never cut.

    Args:
        model: images (B, C, S, S) -> features (B, D), unless `forward` says otherwise.
        num_features: D.
        image_size: S, pixels.
        channels: C, 1 or 3.
        mean, std: of the pixels in [0, 1], one number or one for each channel.
        settings: what else shapes the network, as values of JSON.

    Attributes:
        weights, fresh: no weights are loaded, so all parameters are fresh.

    Raises:
        ValueError: a setting of this class or of one below it that is unknown or out of its range.
    """

    weights = "none"
    is_chain = False
    num_tokens = 1  # there are none, and an image counts as one

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
        if mean is None or std is None:
            raise ValueError(f"backbone.mean={mean} and backbone.std={std} must hold numbers, e.g. [0.1307], [0.3081].")
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
        """Images (B, C, S, S) after the first `cut` layers: themselves for 0, features (B, num_features) for 1."""
        return self(images) if cut else images

    def suffix(self, features: Tensor, cut: int) -> Tensor:
        """What `prefix` returned -> features (B, num_features)."""
        return features if cut else self(features)

    @property
    def layers(self) -> list[nn.Module]:
        return [self]

    def layer_of(self, parameter: str) -> int:
        """Index of the layer that a parameter belongs to: there is one."""
        return 0

    def layers_state(self, cut: int) -> dict[str, Tensor]:
        """Parameters and buffers of the first `cut` layers."""
        return self.state_dict() if cut else {}

    def depths(self) -> dict[str, int]:
        """Depth of every parameter."""
        return {name: 0 for name, _ in self.named_parameters()}

    def compile_layers(self) -> None:
        """Have torch.compile turn the network into fast code at its first call; on a CPU that needs a C++ compiler."""
        if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("model.compile=true needs a C++ compiler such as g++, there is none; set it to false.")
        self.model.compile()
        self.architecture["compiled"] = True


class Pixels(Baseline):
    """The pixels themselves, (B, C, S, S) -> (B, C S S): under a linear head, multinomial logistic regression."""

    def __init__(self, image_size: int, channels: int, mean: Numbers, std: Numbers) -> None:
        check_images(image_size, channels, smallest=1)
        super().__init__(nn.Flatten(), channels * image_size**2, image_size, channels, mean, std, {})

    def depths(self) -> dict[str, int]:
        """The layer itself: there are no parameters, and rules of a freezing policy need a name to speak of."""
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
        self, hidden: Sequence[int], dropout: float, image_size: int, channels: int, mean: Numbers, std: Numbers
    ) -> None:
        check_images(image_size, channels, smallest=1)
        check_widths("hidden", hidden, least=1)
        check_dropout(dropout)
        widths = [channels * image_size**2, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]  # (B, C S S)
        for before, width in pairwise(widths):
            layers += [nn.Linear(before, width, bias=False), FeatureNorm(width), nn.ReLU(), nn.Dropout(dropout)]
        settings = {"hidden": list(hidden), "dropout": dropout}
        super().__init__(nn.Sequential(*layers), widths[-1], image_size, channels, mean, std, settings)


class LeNet5(Baseline):
    """LeNet-5 (LeCun et al. 1998, section II.B and figure 2) up to F6, (B, C, S, S) -> (B, 84).

    It differs where one would today: ReLU for the scaled tanh, max-pooling without parameters for the trained
    averages S2 and S4, every map of C3 sees all of S2 (their table 1 leaves some out), and a head with softmax instead
    of the radial basis functions. At 28 px it has 60,856 parameters, 61,706 with a linear head of 10.
    """

    def __init__(self, image_size: int, channels: int, mean: Numbers, std: Numbers) -> None:
        check_images(image_size, channels, smallest=12)
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

    A 5 x 5 convolution of stride 2, which spares the costly full resolution, then stages of two 3 x 3 convolutions
    with 2 x 2 max-pooling between them.

    Args:
        widths: channels of the first convolution and of each stage; the last is D.
        dropout: probability of zeroing a feature in training.
    """

    def __init__(
        self, widths: Sequence[int], dropout: float, image_size: int, channels: int, mean: Numbers, std: Numbers
    ) -> None:
        check_widths("widths", widths, least=2)
        check_images(image_size, channels, smallest=2 ** (len(widths) - 1))
        check_dropout(dropout)
        layers = convolution(channels, widths[0], kernel=5, stride=2)  # (B, widths[0], S / 2, S / 2)
        for stage, (before, width) in enumerate(pairwise(widths)):
            layers += [nn.MaxPool2d(2)] if stage else []
            layers += [*convolution(before, width), *convolution(width, width)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]  # (B, widths[-1])
        model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        settings = {"widths": list(widths), "dropout": dropout}
        super().__init__(model, widths[-1], image_size, channels, mean, std, settings)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))  # 1.3 times as fast on a CPU


class RNN(Baseline):
    """A recurrent network that reads an image row by row; the features are its last state, in each direction.

    Args:
        cell: `lstm` (Hochreiter & Schmidhuber 1997, with Gers et al.'s forget gate, 2000) or `gru` (Cho et al. 2014).
        hidden_size: width of the state.
        num_layers: layers, each reading the states of the one below.
        bidirectional: read the rows from below, too (Schuster & Paliwal 1997), which doubles D.
    """

    def __init__(
        self,
        cell: Literal["lstm", "gru"],
        hidden_size: int,
        num_layers: int,
        bidirectional: bool,
        image_size: int,
        channels: int,
        mean: Numbers,
        std: Numbers,
    ) -> None:
        if cell not in ("lstm", "gru"):
            raise ValueError(f"backbone.cell={cell!r} is unknown; choose lstm or gru.")
        if not is_count(hidden_size) or not is_count(num_layers):
            raise ValueError(f"backbone.hidden_size={hidden_size}, backbone.num_layers={num_layers} must be 1 or more.")
        if not isinstance(bidirectional, bool):
            raise ValueError(f"backbone.bidirectional={bidirectional!r} must be true or false.")
        check_images(image_size, channels, smallest=1)
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


def check_images(image_size: int, channels: int, smallest: int) -> None:
    if not is_count(image_size) or image_size < smallest:
        raise ValueError(f"backbone.image_size={image_size} must be {smallest} pixels or more for this network.")
    if channels not in (1, 3):
        raise ValueError(f"backbone.channels={channels} must be 1 or 3.")


def check_widths(key: str, widths: Sequence[int], least: int) -> None:
    if not isinstance(widths, Sequence) or len(widths) < least or not all(is_count(width) for width in widths):
        raise ValueError(f"backbone.{key}={widths} must be a list of {least} or more widths, each 1 or more.")


def check_dropout(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"backbone.dropout={dropout} must be from 0 to below 1; 0 switches it off.")


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
