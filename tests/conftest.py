"""Running experiments inside a test, as `python train.py <overrides>` would."""

import ctypes
import logging
import os
import pickle
import pkgutil
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, open_dict
from processes import FORKED
from small_models import backbone, batch, classifier, fit, policy, tiny  # noqa: F401  (fixtures)

from thaw import evaluation
from thaw.evaluation import cost
from thaw.run.command import clear_errors

cost.TIMING_SECONDS = 0.0  # each timing is of one prediction
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime, also where a test imports it before thaw
os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # lightly would ask a server for news of itself
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell without job control
    signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform == "linux":  # a forked process that outlives its worker holds the pipe to xdist, which then waits on
    LIBC, DEATH_SIGNAL = ctypes.CDLL(None), 1
    os.register_at_fork(after_in_child=lambda: LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL))
ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
REMOVABLE = ("serve", "export", "sweeps", "pretrain")  # rooms that docs/fork.md says how to remove
SMALL = ["data.source=sample", "data.train_size=256", "data.batch_size=32", "logger=csv", "trainer.max_epochs=2"]


def needs(room: str) -> pytest.MarkDecorator:
    """Skips a test where a removable room is gone."""
    assert room in REMOVABLE
    return pytest.mark.skipif(not (ROOT / "src" / "thaw" / room).is_dir(), reason=f"thaw.{room} is removed")


Plugins.instance()  # registers how configurations are read
CONFIGS, FILES = str(ROOT / "configs"), SourcesRegistry.instance().resolve("file")
READ, LIST = FILES.load_config, config_loader_impl.create_defaults_list
COMPOSE = ConfigLoaderImpl._compose_config_from_defaults_list
LISTS: dict[tuple, DefaultsList] = {}
PICKLED: dict[Any, bytes] = {}


def unpickled(key: Any, make: Callable[..., Any], *arguments: Any) -> Any:
    if not PICKLED.get(key):
        PICKLED[key] = pickle.dumps(make(*arguments))
    return pickle.loads(PICKLED[key])  # noqa: S301  # what this process has pickled


def load_config(self: Any, config_path: str) -> Any:
    """A file of `configs` is read once for all tests."""
    return unpickled(config_path, READ, self, config_path) if self.path == CONFIGS else READ(self, config_path)


def create_defaults_list(repo: Any, config_name: str, overrides_list: list, **settings: bool) -> DefaultsList:
    """Files are chosen once for all tests with the same options of groups; values are set for each."""
    if [source.path for source in repo.get_sources() if source.scheme() == "file"] != [CONFIGS]:
        return LIST(repo, config_name, overrides_list, **settings)
    values = Overrides(repo, overrides_list).config_overrides
    groups = [each.input_line for each in overrides_list if not any(each is value for value in values)]
    key = (config_name, *groups, *settings.values())
    if key not in LISTS:
        LISTS[key] = LIST(repo, config_name, overrides_list, **settings)
        PICKLED[id(LISTS[key].defaults)] = b""
    return replace(LISTS[key], config_overrides=values)


def compose_files(self: Any, defaults: list, repo: Any) -> DictConfig:
    """The chosen files are merged once; composing would take a third of all tests' time."""
    is_known = id(defaults) in PICKLED
    return unpickled(id(defaults), COMPOSE, self, defaults, repo) if is_known else COMPOSE(self, defaults, repo)


FILES.load_config = load_config  # type: ignore[method-assign]
config_loader_impl.create_defaults_list = create_defaults_list
ConfigLoaderImpl._compose_config_from_defaults_list = compose_files  # type: ignore[method-assign]


def compose_run(run_dir: Path, *overrides: str) -> DictConfig:
    """The configuration that train.py would get, with its own run folder."""
    return compose_config("train", *overrides, f"run_dir={run_dir}", "overrides=''")


def compose_config(name: str, *overrides: str) -> DictConfig:
    """The configuration that a root script would get; Hydra's own part is where scripts look for it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train with overrides on a few real digits, as rank 0 of what they ask for; returns the run's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])  # what other ranks run
    monkeypatch.setattr("thaw.run.ranks.subprocess", FORKED)
    monkeypatch.setattr("thaw.freezing.cache.VERIFIED", {})  # what earlier tests have at hand
    import train as script

    def run(*overrides: str, name: str = "run") -> Path:
        run_dir = tmp_path / "runs" / "test" / name
        run_dir.mkdir(parents=True)
        script.main(compose_run(run_dir, f"cache.dir={tmp_path / 'cache'}", *overrides))
        return run_dir

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run a root script in this process, as `python <script> <arguments>` would; returns the exit status."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("thaw.run.ranks.subprocess", FORKED)

    def run(script: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), "--config-path", str(ROOT / "configs"), *arguments])
        GlobalHydra.instance().clear()
        try:
            with clear_errors():
                import_module(script.removesuffix(".py")).main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    handlers, level = logging.root.handlers[:], logging.root.level
    yield run
    logging.root.handlers[:] = handlers  # Hydra's write to what this test captures
    logging.root.setLevel(level)


def train_once(folder: Path, *overrides: str) -> Path:
    """Train below a folder, for a fixture that several tests share; returns the run's folder."""
    run_dir = folder / "runs" / "test" / "run"
    run_dir.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        import train as script

        script.main(compose_run(run_dir, f"cache.dir={folder / 'cache'}", *overrides))
    return run_dir


@pytest.fixture(scope="session")
def linear_probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: a linear probe on the bundled sample and weights, not tested; trained once."""
    wanted = ["experiment=vit_linear_probe", "data.source=sample", "data.train_size=1500", "logger=none", "test=false"]
    return train_once(tmp_path_factory.mktemp("trained"), *wanted)


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Pictures are empty files: drawing them takes longer than the small runs of tests."""

    def touch(*arguments: Any) -> None:
        for path in arguments:
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

    for found in pkgutil.iter_modules(evaluation.__path__, "thaw.evaluation."):
        import_module(found.name)  # one that is imported under the patch would keep `touch`
    with pytest.MonkeyPatch.context() as patch:
        for module in [module for name, module in sys.modules.items() if name.startswith("thaw.")]:
            for name, value in [*vars(module).items()]:
                if name.startswith("save_") and getattr(value, "__module__", "").startswith("thaw.evaluation."):
                    patch.setattr(module, name, touch)
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=BROWSER_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def digits() -> list[np.ndarray]:
    """The first digit of each class that is in the sample's test split, uint8 (28, 28)."""
    from thaw.data.mnist import load_sample

    test = load_sample("MNIST").test
    return [test.images[(test.labels == label).nonzero()[0, 0], 0].numpy() for label in range(10)]


@pytest.fixture
def tiny_run(tmp_path: Path) -> list[str]:
    """Overrides for a run of a second: a ViT of three narrow blocks with weights of its own, 4 steps an epoch."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shape = {"patch_size": 7, "depth": 3, "embed_dim": 32, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=0, **shape)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    off = ("early_stopping", "lr_monitor", "progress", "sample_grid")
    return [
        *("data.source=sample", "data.train_size=64", "data.batch_size=16", "logger=none", "validate=false"),
        *(f"backbone.weights={tmp_path / 'tiny.safetensors'}", "backbone.arguments.depth=3"),
        *("+backbone.arguments.embed_dim=32", "+backbone.arguments.num_heads=2", "trainer.precision=32-true"),
        *("trainer.enable_progress_bar=false", *(f"callbacks.{name}=null" for name in off)),
    ]


# xdist hands whole files to its workers; those with few slow tests come first, so that no worker waits for another at
# the end.
SLOW_FILES = ("test_two_processes", "test_search", "test_commands", "test_screens", "test_page", "test_resumed_runs")
SLOW_FILES += ("test_serving", "test_end_to_end", "test_export_file", "test_grid", "test_plan", "test_preemption")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in SLOW_FILES)
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")  # -m 'not slow' leaves them out, too
