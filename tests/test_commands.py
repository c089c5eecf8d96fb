"""Every command on a run of every kind: policies, heads, backbones and averages meet each command once.

What others show of a ViT is left out: resuming (`test_resumed_runs`), start_from (`test_slim`), and what files of
baselines, heads and LoRA compute (`test_export_file`).
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, compose_config, compose_run, needs, train_once
from fastapi.testclient import TestClient
from hydra.utils import instantiate
from safetensors.torch import save_file

from thaw.data.idx import write_idx
from thaw.data.mnist import load_mnist
from thaw.data.readers import ImageReader
from thaw.predict.predictor import load_predictor

TINY = ["+backbone.arguments.depth=2", "+backbone.arguments.embed_dim=32", "+backbone.arguments.num_heads=2"]
VIT = ["backbone=digits_vit", "backbone.arguments.depth=2", *TINY[1:]]
TOKEN = ["backbone.pool=class_and_mean", "backbone.arguments.class_token=true", "backbone.arguments.global_pool=token"]
STAGES = ["+backbone.arguments.depths=[1,1,1,1]"]
SWIN = [*STAGES, "+backbone.arguments.embed_dim=16", "+backbone.arguments.num_heads=[1,2,2,2]"]
RESNET = ["backbone=convnext_tiny", "backbone.name=test_resnet", "backbone.image_size=32"]
KINDS: dict[str, list[str]] = {
    "adapter": [*VIT, "freeze=adapter", "head.norm=batch"],
    "attention_only": [*VIT, *TOKEN, "freeze=attention_only", "head=mlp", "average=ema"],
    "attention_out": ["backbone=swin_tiny", *SWIN, "freeze=attention_out"],
    "bias_only": ["backbone=vit_base_clip", *TINY, "backbone.image_size=32", "freeze=bias_only", "mix=mixup"],
    "dora": [*RESNET, "freeze=dora", "average=ema"],
    "first_blocks": [
        *("backbone=convnext_tiny", *STAGES, "+backbone.arguments.dims=[8,8,16,16]", "backbone.image_size=32"),
        "freeze=first_blocks",
    ],
    "full": ["backbone=rnn", "backbone.hidden_size=8", "freeze=full", "mix=cutmix"],
    "gradual": ["backbone=eva02_tiny", *TINY, "backbone.image_size=28", "freeze=gradual", "average=ema"],
    "last_blocks": [
        *("backbone=swin_tiny", *SWIN, "freeze=last_blocks", "head.norm=batch"),
    ],
    "linear_probe": [*VIT, "freeze=linear_probe"],
    "lora": [*VIT, "freeze=lora", "head.norm=batch", "average=ema"],
    "lp_ft": [
        *(*RESNET, "freeze=lp_ft", "freeze.probe_epochs=1"),
    ],
    "lr_bank": [*VIT, "head=lr_bank", "head.lrs=[1e-3,1e-2]"],
    "norm_only": ["backbone=vit_small_dinov3", *TINY, "backbone.image_size=32", "freeze=norm_only", "head.norm=none"],
    "ssf": [*RESNET, "freeze=ssf"],
    "prompt": ["backbone=eva02_tiny", *TINY, "backbone.image_size=28", "freeze=prompt"],
    "surgical": [*VIT, "freeze=surgical", "freeze.k=1"],
    "patterns": ["backbone=vit_base_siglip2", *TINY, "backbone.image_size=32", "freeze=patterns", "mix=both"],
    "convnet": ["backbone=convnet", "backbone.widths=[4,4]", "freeze=full", "average=ema"],
    "lenet5": ["backbone=lenet5", "freeze=full"],
    "mlp": ["backbone=mlp", "backbone.hidden=[8]", "freeze=full"],
    "pixels": ["backbone=pixels", "head.norm=none"],
    "resnet9": ["backbone=resnet9", "backbone.widths=[4,4,4]", "freeze=full"],
}
COMMANDED = [kind for kind in KINDS if kind not in ("lenet5", "mlp", "resnet9")]  # convnet is a baseline like these
ADDING = ["adapter", "attention_out", "dora", "prompt", "ssf", "surgical"]  # as attention_only, lora, last_blocks: long
LIKE_PREDICTED = [*ADDING, "bias_only", "first_blocks", "norm_only", "patterns"]  # predict.py gives their accuracy
UNMERGED = ["adapter", "prompt"]  # which a plain model cannot hold
OTHERS = ["bias_only", "first_blocks", "full", "gradual", "last_blocks", "lp_ft", "norm_only", "patterns", "convnet"]
TRACED = ["first_blocks", "gradual", "last_blocks", "lora", "lp_ft", "patterns"]

EPOCHS = {"gradual": 2, "lp_ft": 2}
OFF = [f"callbacks.{name}=null" for name in ("early_stopping", "lr_monitor", "progress", "sample_grid")]
SHORT = ["data.source=sample", "data.train_size=32", "data.batch_size=16", "data.eval_batch_size=250", "cache.mode=off"]
SHORT += ["logger=none", "validate=false", "trainer.precision=32-true", "trainer.enable_progress_bar=false", *OFF]
PROBE = ["probe.k=[1,5]", "overrides=''", "cache.mode=off"]
STEADY = ["robustness.corruptions=[]"]
pytestmark = pytest.mark.usefixtures("undrawn")


def marked(cases: Sequence[Any], long: Sequence[str] = ADDING) -> list[Any]:
    """Cases, each a kind or one with more; `long` are the kinds that the default run leaves out."""
    given = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.long if case[0] in long else ()) for case in given]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The overrides of a kind's training; what is frozen has random weights, of a file."""

    @cache
    def overrides(kind: str) -> list[str]:
        folder = tmp_path_factory.mktemp(kind)
        block = compose_run(folder, *KINDS[kind]).backbone
        if "weights" not in block:  # a baseline
            return [*KINDS[kind], *SHORT]
        torch.manual_seed(0)
        model = instantiate(block, weights="none", fused_attention=False).model
        state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(state, folder / "w.safetensors")
        return [*KINDS[kind], *SHORT, f"backbone.weights={folder}/w.safetensors"]

    return overrides


@pytest.fixture(scope="module")
def run(settings: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a kind, which is trained when it is first asked for."""

    @cache
    def trained(kind: str) -> Path:
        return train_once(tmp_path_factory.mktemp(kind), *settings(kind), f"trainer.max_epochs={EPOCHS.get(kind, 1)}")

    return trained


def command(script: str, *overrides: str) -> None:
    import_module(script).main(compose_config(script, *overrides))


def facts(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test digits as an IDX file."""
    path = tmp_path_factory.mktemp("digits") / "digits.idx"
    path.write_bytes(write_idx(load_mnist("MNIST", "nowhere", "sample", None).test.images[:, 0]))
    return path


def test_every_policy_head_and_baseline_is_there() -> None:
    words = " ".join(word for kind in KINDS.values() for word in kind)
    for group in ("freeze", "head", "average", "mix"):
        for name in sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml")):
            assert f"{group}={name}" in words or name in ("linear", "none"), name
    for path in (ROOT / "configs" / "backbone").glob("*.yaml"):
        assert "baselines" not in path.read_text() or f"backbone={path.stem}" in words, path.stem


@pytest.mark.parametrize("kind", marked(COMMANDED, LIKE_PREDICTED))
def test_eval(kind: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    command("eval", f"ckpt={run(kind)}", *STEADY, "wandb=false", f"run_dir={tmp_path}")
    (report,) = json.loads((tmp_path / "report" / "report.json").read_text())["models"].values()
    assert report["test/acc"] == facts(run(kind))["test/acc"]
    assert (report["cost"]["flops"] is None) == (kind == "full"), "torch counts none of an RNN"


@needs("serve")
@pytest.mark.parametrize("kind", marked(COMMANDED))
def test_predict_and_serve(kind: str, run: Callable[[str], Path], digits: Path, capsys: pytest.CaptureFixture) -> None:
    """Both give the classes that the test counted."""
    from thaw.serve.app import create_app
    from thaw.serve.limits import Limits
    from thaw.serve.request_reader import FILE_TYPES

    run_dir = run(kind)
    capsys.readouterr()
    command("predict", f"ckpt={run_dir}", f"inputs=['{digits}']")
    said = [int(row["class"]) for row in csv.DictReader(io.StringIO(capsys.readouterr().out))]
    labels = load_mnist("MNIST", "nowhere", "sample", None).test.labels
    assert np.mean(np.array(said) == labels.numpy()) == pytest.approx(facts(run_dir)["test/acc"], abs=1e-6)

    served = compose_config("serve", "ckpt=none")
    limits = Limits(**{field.name: served[field.name] for field in dataclasses.fields(Limits)})
    app = create_app(load_predictor(str(run_dir)), ImageReader("digit", (1, 28, 28)), limits, 1, ["testserver"])
    with TestClient(app) as client:
        answer = client.post("/predict", content=digits.read_bytes(), headers={"content-type": FILE_TYPES[-1]})
    assert answer.status_code == 200, answer.text
    assert [row["index"] for row in answer.json()["predictions"]] == said


EXPORTS = [(kind, ["format=hub_folder"], "hub") for kind in KINDS if kind not in UNMERGED]
EXPORTS += [(kind, ["quantize=int8"], "model.onnx") for kind in TRACED]
EXPORTS += [("lora", ["format=torch_export"], "model.pt2")]


@needs("export")
@pytest.mark.parametrize(
    ("kind", "format", "name"),
    marked(EXPORTS, [*ADDING, "first_blocks", "last_blocks", "gradual", "lp_ft"]),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_export(
    kind: str,
    format: list[str],
    name: str,
    run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """The command itself compares what it wrote with the model; here with what the training printed."""
    trained = run(kind)
    capsys.readouterr()
    command("export", f"ckpt={trained}", *format, f"output={tmp_path / name}")
    assert f"{facts(trained)['test/acc']:.2%} accuracy" in capsys.readouterr().out
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("kind", marked(COMMANDED, LIKE_PREDICTED))
def test_probe(kind: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    command("probe", f"ckpt={run(kind)}", *PROBE, f"run_dir={tmp_path}")
    assert 0 < facts(tmp_path)["test/acc"] < 1


@pytest.mark.parametrize("kind", marked(OTHERS, OTHERS[:-1]))
def test_resume(kind: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    epochs = EPOCHS.get(kind, 1) + 1
    again = facts(train_once(tmp_path, f"resume={run(kind)}", f"trainer.max_epochs={epochs}"))
    assert (again["epochs"], again["resumed_from"]) == (epochs, str(run(kind) / "checkpoints" / "last.ckpt"))


@pytest.mark.parametrize("kind", OTHERS)
def test_start_from(
    kind: str, run: Callable[[str], Path], settings: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """A rate that moves nothing leaves the earlier run's answers; statistics of batch norms move all the same."""
    still = ["optim.lr=1e-12", "optim.weight_decay=0", "trainer.max_epochs=1"]
    started = train_once(tmp_path, *settings(kind), f"start_from={run(kind)}", *still)
    if kind not in ("last_blocks", "lp_ft", "convnet"):
        assert facts(started)["test/acc"] == facts(run(kind))["test/acc"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = [*VIT[1:], *SHORT, "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
    return train_once(tmp_path_factory.mktemp("simclr"), "experiment=pretrain_simclr", *few)


@needs("pretrain")
def test_probe_of_a_pretraining_run(pretrained: Path, tmp_path: Path) -> None:
    command("probe", f"ckpt={pretrained}/checkpoints/last.ckpt", *PROBE, f"run_dir={tmp_path}")
    assert 0 < facts(tmp_path)["test/acc"] < 1


@needs("pretrain")
@pytest.mark.parametrize("script", ["eval", "predict", pytest.param("export", marks=needs("export")), "train"])
def test_a_pretraining_run_has_no_classes(script: str, pretrained: Path, digits: Path, tmp_path: Path) -> None:
    arguments = {
        "eval": [f"ckpt={pretrained}/checkpoints/last.ckpt", f"run_dir={tmp_path}"],
        "predict": [f"ckpt={pretrained}/checkpoints/last.ckpt", f"inputs=['{digits}']"],
        "export": [f"ckpt={pretrained}/checkpoints/last.ckpt"],
        "train": [f"start_from={pretrained}/checkpoints/last.ckpt", *SHORT, f"run_dir={tmp_path}", "overrides=''"],
    }
    with pytest.raises(ValueError, match=r"no classes|another model"):
        command(script, *arguments[script])
