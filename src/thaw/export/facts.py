"""Facts about an exported model, as values of JSON: its origin, its agreement with the trained one, its accuracy."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from thaw.data.batches import evenly_spread
from thaw.data.images import Images, Source
from thaw.evaluation.metrics import accuracy_facts
from thaw.predict.predictor import Predictor
from thaw.run.errors import UserError
from thaw.run.record import git_commit

PARITY_IMAGES = 1000
PARITY_TOLERANCE = 1e-3  # of a probability
PREPARED = {  # by the reader of a model
    "digit": "0 the paper and 255 the ink, prepared as MNIST's were: scaled into 20 x 20 pixels and centred by its "
    "mass in 28 x 28",
    "photo": "0 to 255, the centre square of an upright picture, resized by antialiased bicubic interpolation",
}


def model_facts(predictor: Predictor, format: str) -> dict[str, Any]:
    """Facts of a predictor after `thaw.export.portable.portable`, without folders of this machine."""
    facts = predictor.facts()
    return {
        "thaw": version("thaw-vit"),
        "format": format,
        **{key: value for key, value in facts.items() if key not in ("checkpoint", "git_commit")},
        "trained_commit": facts["git_commit"],
        "exported_commit": git_commit(),
        "torch": torch.__version__,
        "input": f"uint8 {of_images(facts['shape'])}, N of 1 or more: {PREPARED[facts['reader']]}",
        "output": f"probabilities (N, {len(facts['classes'])}), in the order of classes",
    }


def of_images(shape: Sequence[int]) -> str:
    """The shape of N images of the shape (C, H, W), as text."""
    return f"(N, {', '.join(map(str, shape))})"


def parity_sample(predictor: Predictor, test: Images) -> tuple[Tensor, Tensor]:
    """At most 1,000 test images (N, C, H, W), evenly spread, and the trained model's probabilities (N, K) for them."""
    images = test.images[evenly_spread(len(test.labels), PARITY_IMAGES)]
    return images, predictor(images)


def check_parity(model: Callable[[Tensor], Tensor], images: Tensor, wanted: Tensor) -> dict[str, Any]:
    """The largest difference between an exported model and the trained one on a `parity_sample`, as facts.

    Raises:
        UserError: another class for any image, or a difference above the tolerance.
    """
    given = model(images)
    others = int((given.argmax(dim=1) != wanted.argmax(dim=1)).sum())
    difference = float((given - wanted).abs().max())
    if others or not difference <= PARITY_TOLERANCE:  # `not`, so that NaN fails, too
        raise UserError(
            f"The exported model is not the trained one: on {len(given):,} test images {others} classes differ, "
            f"and a probability by up to {difference:.2g}; allowed are none and {PARITY_TOLERANCE:g}. Nothing was "
            "written. Try another format=, or another version of torch."
        )
    return {"parity_images": len(given), "parity_largest_difference": difference}


def tested_facts(probabilities: Tensor, source: Source) -> dict[str, Any]:
    """Accuracy on the test split and its 95 % interval, as facts."""
    found = accuracy_facts(probabilities.argmax(dim=1), source.test.labels)
    return {
        "test_accuracy": round(found["test/acc"], 6),
        "test_accuracy_interval": [round(found[end], 6) for end in ("test/acc_low", "test/acc_high")],
        "test_images": found["n_test"],
        **source.facts(),
    }
