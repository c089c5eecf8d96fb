"""Modules that are imported when they are used."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from thaw.run.deferred import AskLater, defer


@pytest.mark.parametrize("use", ["heavy", "heavy.part"])
def test_a_deferred_module(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("value = 3\nfrom heavy import part\nclass Thing: pass\n")
    (tmp_path / "heavy" / "part.py").write_text("import heavy\nvalue = heavy.value + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    for name in ("heavy", "heavy.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    thing = AskLater("Thing", (), {"__module__": "heavy"})
    defer("heavy", asked=None, Thing=thing)
    heavy = importlib.import_module("heavy")
    assert heavy.asked is None and not hasattr(heavy, "__file__") and importlib.util.find_spec("heavy")
    assert "value" not in vars(heavy) and not isinstance(heavy, thing)  # not imported yet

    used = heavy if use == "heavy" else importlib.import_module(use)
    assert used.value == len(use.split(".")) + 2
    real, part = sys.modules["heavy"], sys.modules["heavy.part"]
    assert real is not heavy and real.__file__ and heavy.value == 3
    assert used in (heavy, part) and real.part is part and part.__spec__.loader.path == part.__file__
    assert isinstance(real.Thing(), thing) and not isinstance(heavy, thing)
    with pytest.raises(AttributeError):
        heavy.missing  # noqa: B018
    defer("heavy"), defer("not_installed")
    assert sys.modules["heavy"] is real and "not_installed" not in sys.modules


RUN = """
import runpy, sys
import torch
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
for name in ("torch._dynamo", "wandb", "scipy.signal"):
    print(name, "is imported" if getattr(sys.modules.get(name), "__file__", None) else "is deferred")

from lightning.fabric.wrappers import OptimizedModule  # bound before there was one
layer = torch.nn.Linear(2, 2)
compiled = torch.compile(layer, backend="eager")
assert isinstance(compiled, OptimizedModule) and not isinstance(layer, OptimizedModule)
assert torch.equal(compiled(torch.ones(1, 2)), layer(torch.ones(1, 2)))
optimizer = torch.optim.SGD(layer.parameters(), 0.1)
optimizer.zero_grad(), optimizer.step()
assert sys.modules["torch._dynamo"].__file__
"""


def test_a_run_does_without_the_compiler_and_wandb(tmp_path: Path) -> None:
    overrides = ["experiment=vit_linear_probe", "data.train_size=64", "data.batch_size=32", "trainer.max_epochs=1"]
    overrides += ["logger=csv", f"hydra.run.dir={tmp_path / 'run'}", f"cache.dir={tmp_path / 'cache'}"]
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", RUN, *overrides], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line.split()[-1] for line in run.stdout.splitlines()[-3:]] == ["deferred"] * 3
