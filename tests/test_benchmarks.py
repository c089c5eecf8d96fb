"""The other ways that thaw's speed is compared with do the same work, and the tables say what was measured."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from omegaconf import OmegaConf
from sklearn.linear_model import Ridge

from benchmarks import closed_form, extract_then_fit, plain_finetune, race
from benchmarks.speed.probe import feature_rate
from thaw.data.idx import write_idx
from thaw.data.mnist import load_sample
from thaw.freezing.cache import FeatureCache
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 training digits, of which 100 validate, and 100 test digits, in the layout of the official files."""
    folder, source = tmp_path_factory.mktemp("data"), load_sample("MNIST")
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for name, images, count in (("train", source.train, 400), ("t10k", source.test, 100)):
        few = images.take(torch.arange(0, len(images.labels), len(images.labels) // count)[:count])
        for kind, content in (("images-idx3", few.images[:, 0]), ("labels-idx1", few.labels.to(torch.uint8))):
            packed = gzip.compress(write_idx(content), 1)
            (folder / "MNIST" / "raw" / f"{name}-{kind}-ubyte.gz").write_bytes(packed)
    return folder


def test_extract_then_fit_takes_the_backbone_that_thaw_takes() -> None:
    settings = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "backbone" / "digits_vit.yaml"))
    settings = {key: value for key, value in settings.items() if key != "_target_"} | {"fused_attention": False}
    digits = load_sample("MNIST").test.images[:8]
    with torch.no_grad():
        ours = Backbone(**settings).eval()((digits / 255 - 0.1307) / 0.3081)  # (8, 192)
    with torch.autocast("cpu", enabled=False):
        theirs = extract_then_fit.extract(extract_then_fit.digits_vit().eval(), digits[:, 0], "cpu", 3)
    assert F.cosine_similarity(F.layer_norm(ours, (192,)), theirs).min() > 0.999  # theirs are computed in bf16


def test_extract_then_fit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same result from features that are kept, whose rows are the official ones."""
    command = ["extract_then_fit", "--data", str(data), "--val-size", "100", "--cached", str(tmp_path / "features.pt")]
    command += ["--lrs", "1e-6,3e-2", "--batch-size", "50", "--epochs", "4"]
    results = []
    for more in ([], [], ["--bank"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        extract_then_fit.main()
        results.append(json.loads(capsys.readouterr().out))
    assert {result["lr"] for result in results} == {3e-2}
    assert results[0]["test_acc"] == results[1]["test_acc"] > 0.9 < results[2]["test_acc"]
    labels = extract_then_fit.read_idx(data / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz")
    train, val, test = torch.load(tmp_path / "features.pt")
    assert train[1].equal(labels[100:].long()) and val[1].equal(labels[:100].long()) and len(test[1]) == 100


def test_the_closed_form_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 12, generator=generator) + 3, torch.arange(200) % 10
    strengths = [0.5, 64.0]
    for (weight, bias), strength in zip(closed_form.ridge(features, labels, strengths), strengths, strict=True):
        trusted = Ridge(alpha=strength).fit(features.numpy(), 2.0 * F.one_hot(labels, 10).numpy() - 1)
        torch.testing.assert_close(weight.T, torch.from_numpy(trusted.coef_).float(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(bias, torch.from_numpy(trusted.intercept_).float(), atol=1e-4, rtol=1e-3)


def test_the_plain_loop(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plain_finetune, "VALIDATION", 0)
    monkeypatch.setattr(
        sys, "argv", ["plain_finetune", "--data", str(data), "--train-size", "64", "--batch-size", "32"]
    )
    plain_finetune.main()
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 0


def test_the_feature_pass_is_read_from_what_a_run_prints(capsys: pytest.CaptureFixture[str]) -> None:
    cache = FeatureCache("memory", "", 1.0)
    cache.splits, cache.seconds, cache.place = ["54,000 train", "6,000 val"], 7.5, "memory"

    class OneProcess:
        is_global_zero = True

    cache.summarise(OneProcess())  # type: ignore[arg-type]
    assert feature_rate(capsys.readouterr().out) == 8000


def test_a_race_is_lost_below_its_goal(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast, good = (
        ("-c", "print('{{\"test_acc\": 0.9' + '9' * {seed} + '}}')"),
        ("-c", "print('{{\"test_acc\": 0.995}}')"),
    )
    monkeypatch.setattr(race, "ENTRANTS", {"fast": list(fast), "good": list(good)})
    monkeypatch.setattr(sys, "argv", ["race", f"data.dir={data}", "--rounds", "2", "--only", "."])
    race.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table] == ["| good", "| fast"]
    assert "99.50% |" in table[0] and "90.00% (1 of 2 below 99 %)" in table[1]
    monkeypatch.setattr(sys, "argv", ["race", f"data.dir={data / 'MNIST'}"])
    with pytest.raises(UserError, match="name the folder of the official files"):
        race.main()
