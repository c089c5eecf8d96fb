"""What an exported file says of itself, as values of JSON."""

from importlib.metadata import version
from typing import Any

import torch

from thaw.predict.predictor import Predictor
from thaw.run.record import git_commit

INPUT = (
    "uint8 (N, 28, 28), N of 1 or more: one grey digit each, 0 the paper and 255 the ink, prepared as MNIST's were: "
    "scaled into 20 x 20 pixels and centred by its mass in 28 x 28"
)


def model_facts(predictor: Predictor, format: str) -> dict[str, Any]:
    """Of a predictor whose model is as it will be exported; nothing of this machine's folders.

    Args:
        predictor: after `thaw.export.portable.portable`.
        format: as export.py calls it.
    """
    facts = predictor.facts()
    trained = {"checkpoint": None, "git_commit": None}
    return {
        "thaw": version("thaw-vit"),
        "format": format,
        **{key: value for key, value in facts.items() if key not in trained},
        "trained_commit": facts["git_commit"],
        "exported_commit": git_commit(),
        "torch": torch.__version__,
        "input": INPUT,
        "output": "probabilities (N, 10), in the order of classes",
    }
