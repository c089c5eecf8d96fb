"""thaw: fine-tune pretrained vision transformers, as far as a freezing policy lets them.

For scripts: `thaw.load` gives a trained model as a function of images, `thaw.freeze` applies a freezing policy to any
LightningModule. Importing thaw imports no torch; these names do so when they are first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# How often a thread of torch looks for work before it sleeps (libgomp, read when torch is imported). By default 300,000
# times: two runs on the same cores then slow each other many times over; with 3,000 they share them.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would report its use to its makers

from thaw.run.folders import register_resolvers

if TYPE_CHECKING:
    from thaw.freezing.any_module import FreezeModule, freeze
    from thaw.predict.model import Model, load

__all__ = ["FreezeModule", "Model", "freeze", "load"]

register_resolvers()  # a configuration can be resolved wherever thaw is imported

if not TYPE_CHECKING:  # a type checker would take any name for defined

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'thaw' has no attribute {name!r}")
        home = "thaw.predict.model" if name in ("Model", "load") else "thaw.freezing.any_module"
        return getattr(import_module(home), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
