"""Modules that libraries import at their start without a need; they are imported when something in them is used."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class DeferredModule(ModuleType):
    """Imports the module of its name when an attribute is read that it does not have."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__path__":  # inspect asks all modules for theirs
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), attribute)


def defer(name: str, **known: Any) -> None:
    """Let `import <name>` cost nothing yet; reading the `known` attributes does not import the module either."""
    if name not in sys.modules and (spec := find_spec(name)):
        module = sys.modules[name] = DeferredModule(name)
        vars(module).update(known, __spec__=spec)
