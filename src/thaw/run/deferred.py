"""Modules that libraries import at their start without a need; they are imported when something in them is used."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any


class DeferredModule(ModuleType):
    """Imports the module of its name when an attribute is read that it does not have."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        vars(self).update(known, __spec__=ModuleSpec(name, None), __path__=[])

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # inspect asks all modules for theirs
            raise AttributeError(attribute)
        return getattr(undeferred(self.__name__), attribute)


def is_deferred(name: str) -> bool:
    return isinstance(sys.modules.get(name), DeferredModule)


def undeferred(name: str) -> ModuleType:
    """A module itself, in place of a deferred one."""
    if is_deferred(name):
        del sys.modules[name]
    return import_module(name)


class WithoutExecution(Loader):
    """Loads a module that has been imported already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class DeferredPackages(MetaPathFinder):
    """Imports a deferred package before one of its modules."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = name.rpartition(".")[0]
        if not is_deferred(package):
            return None
        undeferred(package)
        return ModuleSpec(name, WithoutExecution(import_module(name)))


def defer(name: str, **known: Any) -> None:
    """Let `import <name>` cost nothing yet; reading the `known` attributes does not import the module either."""
    if name not in sys.modules and find_spec(name.partition(".")[0]):
        if not any(isinstance(finder, DeferredPackages) for finder in sys.meta_path):
            sys.meta_path.insert(0, DeferredPackages())
        sys.modules[name] = DeferredModule(name, known)


class AskLater(type):
    """The type of a class that stands for one of a deferred module: before the import nothing is an instance of it."""

    def __instancecheck__(cls, value: object) -> bool:
        return not is_deferred(name := cls.__module__) and isinstance(value, getattr(sys.modules[name], cls.__name__))


def defer_unneeded() -> None:
    """Defer what torchmetrics, timm, torchvision, Lightning and W&B import without a need, a third of the start."""
    defer("scipy.signal", hamming=None)  # torchmetrics asks for this name alone
    defer("wandb")  # timm, for a function that is not called here
    nothing_staged = SimpleNamespace(apply=lambda run: None)  # for a job of W&B Launch, before these are imported
    defer("wandb.sdk.launch.inputs.internal", StagedLaunchInputs=lambda: nothing_staged)

    # The front end of torch.compile. While nothing is compiled, Lightning and optimizers need no more than these.
    compiler, utils = "torch._dynamo", "torch._dynamo.utils"
    no_break, disabled = (lambda *_, **__: None), (lambda function, *_, **__: function)
    compiled = AskLater("OptimizedModule", (), {"__module__": compiler})
    defer(compiler, graph_break=no_break, disable=disabled, OptimizedModule=compiled)
    defer(utils, is_compile_supported=lambda device: undeferred(utils).is_compile_supported(device))  # of torchvision
