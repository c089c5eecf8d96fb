"""Whether an exported model is the trained one, and how accurate it is; on test digits, which decide nothing else.

Shapes: N digits, h x w the grid of patches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from thaw.data.images import Images, Source
from thaw.evaluation.metrics import accuracy_interval
from thaw.export.onnx_model import BATCH
from thaw.predict.predictor import DigitModel

PARITY_DIGITS = 1000
TOLERANCE = 1e-3  # in a probability or in a patch's share


class Expected(NamedTuple):
    """What the trained model says of some digits (N, 28, 28): probabilities (N, 10), attention (N, h, w) or None."""

    images: Tensor
    probabilities: Tensor
    attention: Tensor | None


def expected(model: DigitModel, test: Images) -> Expected:
    """Of 1,000 test digits, evenly spread over the split, or of all where there are fewer."""
    count = min(PARITY_DIGITS, len(test.labels))
    images = test.images[torch.linspace(0, len(test.labels) - 1, count).round().long()]
    return Expected(images, model(images), model.attention(images) if model.has_attention else None)


def check_parity(model: DigitModel, wanted: Expected) -> dict[str, Any]:
    """The largest difference between an exported model and the trained one, as facts.

    Raises:
        ValueError: another class for any digit, or a difference above the tolerance.
    """
    given = model(wanted.images)
    others = int((given.argmax(dim=1) != wanted.probabilities.argmax(dim=1)).sum())
    difference = float((given - wanted.probabilities).abs().max())
    pairs = {"a probability": difference}
    if wanted.attention is not None and model.has_attention:
        pairs["a patch's share"] = float((model.attention(wanted.images) - wanted.attention).abs().max())
    for what, value in pairs.items():
        if others or not value <= TOLERANCE:  # so that NaN is one, too
            raise ValueError(
                f"The exported model is not the trained one: on {len(given):,} test digits {others} classes differ, "
                f"and {what} by up to {value:.2g}; allowed are none and {TOLERANCE:g}. Nothing was written. "
                "Try another format=, or another version of torch."
            )
    return {"parity_digits": len(given), "parity_largest_difference": difference}


def probabilities_of(model: Callable[[Tensor], Tensor], images: Tensor, title: str) -> Tensor:
    """(N, 28, 28) -> probabilities (N, 10), with a bar where there is a terminal."""
    parts = []
    with tqdm(total=len(images), desc=title, unit="digit", disable=None, leave=False) as bar:
        for batch in images.split(BATCH):
            parts.append(model(batch))
            bar.update(len(batch))
    return torch.cat(parts)


def tested(probabilities: Tensor, source: Source) -> dict[str, Any]:
    """Accuracy on the test split and its 95 % interval, as facts."""
    labels = source.test.labels
    correct = int((probabilities.argmax(dim=1) == labels).sum())
    return {
        "test_accuracy": round(correct / len(labels), 6),
        "test_accuracy_interval": [round(end, 6) for end in accuracy_interval(correct, len(labels))],
        "test_digits": len(labels),
        **source.facts(),
    }
