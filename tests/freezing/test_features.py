"""Cached features against timm's own, and runs that use them against runs that start from pixels."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from freezing.test_cache import new, nothing_at_hand, trainer_of  # noqa: F401  (an autouse fixture)
from small_models import augmentation, mnist_data
from torch import Tensor

from thaw.callbacks.step_seed import StepSeed
from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.data.mnist import MNISTData
from thaw.freezing import features as thaw_features
from thaw.freezing.policy import FreezePolicy
from thaw.models.backbone import Backbone

MOVED = augmentation(degrees=10.0, translate=0.1)
TRAIN, VAL = 160, 500

Build = Callable[..., Classifier]


@pytest.fixture
def model(tmp_path: Path, classifier: Build, policy: Callable[..., FreezePolicy]) -> Build:
    """Builds a classifier on a tiny ViT of depth 3 whose random weights count as pretrained."""

    def build(
        freeze: str = "linear_probe", mode: str = "disk", lr: float = 0.05, perturb: str = "", **changes: Any
    ) -> Classifier:
        chosen = policy(freeze, **({"k": changes.pop("k")} if "k" in changes else {}))
        settings = {"lr": lr, "final_lr_fraction": 0.1}
        built = classifier(chosen, optim=settings, cache=new(tmp_path / "cache", mode), **changes)
        built.optim.optimizer = partial(torch.optim.SGD, momentum=0.9)
        with torch.no_grad():
            for name, parameter in built.backbone.named_parameters():
                if perturb and name.startswith(perturb):
                    parameter.add_(0.01)
        return built

    return build


def digits(train_size: int = TRAIN, seed: int = 0, fold: int | None = None) -> MNISTData:
    return mnist_data(train_size=train_size, seed=seed, fold=fold)


class Watch(L.Callback):
    """Keeps the features of training and validation batches, the digits they are of, and the epoch."""

    def __init__(self) -> None:
        self.train: list[tuple[int, Tensor | None, Tensor]] = []
        self.val: list[tuple[Tensor | None, Tensor]] = []
        self.test: list[Tensor | None] = []

    def on_train_batch_start(self, trainer: L.Trainer, _module: Any, batch: Batch, *_: Any) -> None:
        self.train.append((trainer.current_epoch, batch.features, batch.indices))

    def on_validation_batch_start(self, _trainer: L.Trainer, _module: Any, batch: Batch, *_: Any) -> None:
        self.val.append((batch.features, batch.indices))

    def on_test_batch_start(self, _trainer: L.Trainer, _module: Any, batch: Batch, *_: Any) -> None:
        self.test.append(batch.features)


def fitted(model: Classifier, data: MNISTData | None = None, epochs: int = 2, **changes: Any) -> L.Trainer:
    trainer = trainer_of(max_epochs=epochs, callbacks=[*changes.pop("callbacks", []), StepSeed(0)], **changes)
    trainer.fit(model, data or digits())
    return trainer


def timm_features(model: Classifier, image: Tensor, blocks: int | None) -> Tensor:
    """One digit (28, 28) through timm's own forward: tokens after so many blocks, or pooled."""
    vit, cached = model.backbone.model, []
    hooks = [vit.blocks[blocks - 1].register_forward_hook(lambda *args: cached.append(args[2]))] if blocks else []
    with torch.no_grad():
        features = vit.forward_head(vit.forward_features(model.preprocess(image[None])), pre_logits=True)
    for hook in hooks:
        hook.remove()
    return cached[0][0] if blocks else features[0]


@pytest.mark.parametrize(("freeze", "blocks"), [("linear_probe", None), ("last_blocks", 1)])
def test_batches_carry_what_timm_gives_for_each_digit(model: Build, freeze: str, blocks: int | None) -> None:
    watch, data, classifier = Watch(), digits(), model(freeze)
    fitted(classifier, data, callbacks=[watch])
    source = data.load()
    classifier.eval()
    for split, batches in (("train", [part[1:] for part in watch.train]), ("val", watch.val)):
        images = getattr(source, split).images
        assert sum(len(indices) for _, indices in batches) == 2 * len(images)
        for features, indices in batches[:2]:
            assert features is not None and features.shape[1:] == ((17 - 1, 32) if blocks else (32,))
            for feature, index in zip(features[:8], indices[:8].tolist(), strict=True):
                torch.testing.assert_close(feature, timm_features(classifier, images[index], blocks))


@pytest.mark.parametrize(("precision", "rtol", "atol"), [("32-true", 1e-4, 1e-5), ("bf16-mixed", 0.05, 0.01)])
@pytest.mark.parametrize(
    ("freeze", "changes"),
    [
        ("linear_probe", {}),
        ("last_blocks", {}),
        ("last_blocks", {"arguments": {"patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2, "reg_tokens": 2}}),
    ],
)
def test_training_with_cached_features_is_training_from_pixels(
    model: Build, freeze: str, changes: dict, precision: str, rtol: float, atol: float
) -> None:
    results = []
    for mode in ("off", "disk", "memory"):
        classifier, watch = model(freeze, mode, **changes), Watch()
        trainer = fitted(classifier, precision=precision, callbacks=[watch])
        assert all((features is None) == (mode == "off") for _, features, _ in watch.train)
        results.append((classifier.state_dict(), trainer.callback_metrics["val/loss"]))
    (pixels, loss), *others = results
    start = model(freeze, "off", **changes).state_dict()
    assert not torch.allclose(start["head.linear.weight"], pixels["head.linear.weight"], rtol, 2 * atol)
    for state, other in others:
        for name, tensor in pixels.items():
            if not name.endswith(("tp", "fp", "tn", "fn")):  # counts of right digits
                torch.testing.assert_close(state[name], tensor, rtol=rtol, atol=atol, msg=name)
        torch.testing.assert_close(other, loss, rtol=rtol, atol=atol)


@pytest.mark.parametrize("freeze", ["linear_probe", "last_blocks"])
def test_validation_and_test_after_training_equal_those_from_pixels(
    model: Build, freeze: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They use cached features, unless these are wrong; pooled ones all at once."""
    classifier, data, watch = model(freeze), digits(), Watch()
    batches = 1 if freeze == "linear_probe" else 5
    trainer = fitted(classifier, data, callbacks=[watch])
    cached = dict(trainer.callback_metrics)
    assert data.split_dataset("train").features is None and data.split_dataset("val").features is None
    logits = []
    classifier.eval()
    with torch.no_grad():
        for features, indices in watch.val[-batches:]:
            assert features is not None
            logits.append(classifier.head(classifier.backbone.suffix(features, classifier.cut)))
            torch.testing.assert_close(classifier(data.load().val.images[indices]), logits[-1])
        watch.val.clear()
        (metrics,) = trainer.validate(classifier, data, verbose=False)
        assert len(watch.val) == batches and all(features is not None for features, _ in watch.val)
        assert metrics["val/loss"] == pytest.approx(cached["val/loss"].item(), rel=1e-5)
        assert metrics["val/acc"] == pytest.approx(cached["val/acc"].item())
        (metrics,) = trainer.test(classifier, data, verbose=False)
        right = (classifier(data.load().test.images).argmax(1) == data.load().test.labels).float().mean()
    assert metrics["test/acc"] == pytest.approx(right.item())
    assert len(watch.test) == batches and all(features is not None for features in watch.test)
    assert all(data.split_dataset(split).features is None for split in ("train", "val", "test"))

    correct = thaw_features.frozen_features
    monkeypatch.setattr(thaw_features, "frozen_features", lambda *given: 1.1 * correct(*given))
    watch.test.clear()
    (again,) = trainer.test(classifier, data, verbose=False)
    assert again == metrics and watch.test == [None] * 5
    assert "The cached test features differ by 1e-01 from those of pixels, which count." in caplog.text


@pytest.mark.parametrize("limit", [2, 0.4])
def test_a_limited_validation_takes_batches_as_from_pixels(model: Build, limit: float) -> None:
    watch = Watch()
    fitted(model("linear_probe"), epochs=1, limit_val_batches=limit, callbacks=[watch])
    assert [len(indices) for features, indices in watch.val if features is not None] == [100, 100]


def test_a_test_whose_features_cannot_be_cached_starts_from_pixels(
    model: Build, caplog: pytest.LogCaptureFixture
) -> None:
    """Although cache.mode=disk insists: the model has been trained by then."""
    classifier, data, watch = model("linear_probe", "disk"), digits(), Watch()
    trainer = fitted(classifier, data, callbacks=[watch])
    classifier.cache.max_gb = 1e-6
    (metrics,) = trainer.test(classifier, data, verbose=False)
    right = (classifier(data.load().test.images).argmax(1) == data.load().test.labels).float().mean()
    assert watch.test == [None] * 5 and metrics["test/acc"] == pytest.approx(right.item())
    assert "The test images start from pixels, as their features cannot be cached: cache.mode=disk" in caplog.text


def test_a_test_without_training_starts_from_pixels(model: Build, tmp_path: Path) -> None:
    watch = Watch()
    trainer_of(callbacks=[watch]).test(model(), digits(), verbose=False)
    assert watch.test == [None] * 5 and not (tmp_path / "cache").exists()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of digits in each call of the frozen layers (one: only to see the shape)."""
    seen: list[int] = []
    prefix = Backbone.prefix

    def counted(self: Backbone, images: Tensor, cut: int) -> Tensor:
        seen.extend([len(images)] if len(images) > 1 else [])
        return prefix(self, images, cut)

    def packed(backbone: Backbone, cut: int) -> Callable[[Tensor], Tensor]:
        return lambda images: counted(backbone, images, cut)

    monkeypatch.setattr(Backbone, "prefix", counted)
    monkeypatch.setattr(thaw_features, "packed_prefix", packed)
    return seen  # type: ignore[return-value]


BOTH, HALF = {2 * 128 + 4 * 128}, {2 * 128, 4 * 128}
VIT = {"patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2, "class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("changed", "settings", "expected"),
    [
        ("nothing", {}, {0}),
        ("seed", {"seed": 7}, {0}),
        ("lr", {"lr": 0.5}, {0}),
        ("what trains", {"perturb": "model.blocks.1"}, {0}),
        ("frozen weights", {"perturb": "model.blocks.0.mlp.fc2.bias"}, BOTH),
        ("stem", {"perturb": "model.pos_embed"}, BOTH),
        ("more digits", {"train_size": TRAIN + 1}, HALF),
        ("fold", {"fold": 0}, {2 * 128 + 8 * 128}),
        ("precision", {"precision": "bf16-mixed"}, BOTH),
        ("k", {"k": 1}, BOTH),
        ("image size", {"image_size": 35}, {(2 + 7) * 81}),
        ("mean", {"mean": [0.2]}, BOTH),
        ("attention", {"fused_attention": True}, BOTH),
        ("timm arguments", {"arguments": VIT | {"init_values": 1.0}}, BOTH),
    ],
)
def test_what_another_run_reuses(
    model: Build, computed: list[int], changed: str, settings: dict, expected: set[int]
) -> None:
    fitted(model("last_blocks"), epochs=1)
    assert sum(computed) in BOTH
    computed.clear()
    run = {key: settings.pop(key) for key in ("precision",) if key in settings}
    data = digits(**{key: settings.pop(key) for key in ("train_size", "seed", "fold") if key in settings})
    fitted(model("last_blocks", **settings), data, epochs=1, **run)
    assert sum(computed) in expected, changed


def test_a_run_draws_the_same_random_numbers_with_and_without_cached_features(model: Build) -> None:
    states = []
    for mode in ("off", "disk", "disk"):
        torch.manual_seed(5)
        classifier = model("linear_probe", mode)
        torch.manual_seed(5)
        probe = SimpleNamespace(state=None)
        classifier.on_train_epoch_start = lambda probe=probe: setattr(probe, "state", torch.random.get_rng_state())
        trainer = trainer_of(max_epochs=1)
        trainer.fit(classifier, digits())
        states.append(probe.state)
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


def test_images_that_are_augmented_are_not_cached(model: Build, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    fitted(model(mode="auto", augment=MOVED), epochs=1, callbacks=[watch])
    assert all(features is None for _, features, _ in watch.train)
    assert "cache: off, images are augmented at random (augment=none" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cache\.mode=disk can cache nothing: images are augmented at random"):
        fitted(model(mode="disk", augment=MOVED))


def test_nothing_is_cached_where_everything_trains(model: Build, tmp_path: Path) -> None:
    watch = Watch()
    fitted(model("full"), epochs=1, callbacks=[watch])
    assert all(features is None for _, features, _ in watch.train) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("mode", "some_frozen"), [("auto", True), ("disk", False), ("memory", False)])
def test_it_is_said_where_no_layer_can_be_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, some_frozen: bool
) -> None:
    new(tmp_path, mode).explain_no_layer(some_frozen, trainer_of())
    assert "cache: off (the stem trains" in capsys.readouterr().out
    new(tmp_path, "off").explain_no_layer(some_frozen, trainer_of())
    new(tmp_path, "auto").explain_no_layer(False, trainer_of())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("freeze", ["linear_probe", "last_blocks"])
def test_frozen_layers_store_no_activations(model: Build, batch: Batch, freeze: str) -> None:
    """What backward needs is of the same number and shapes from pixels as from features."""
    classifier = model(freeze, "off")
    classifier.thaw.apply(0)
    classifier.cut = classifier.thaw.cut(0)
    classifier.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with torch.no_grad():
        features = classifier.backbone.prefix(classifier.preprocess(batch.images), classifier.cut)
    assert classifier.backbone.prefix(classifier.preprocess(batch.images), classifier.cut).grad_fn is None
    saved: list[list[tuple[int, ...]]] = []
    for one in (batch, batch._replace(features=features)):
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            classifier.training_step(one, 0).backward()
        saved.append(sorted(shapes))
    assert saved[0] == saved[1] and saved[0]
    frozen = [p for n, p in classifier.backbone.named_parameters() if classifier.backbone.layer_of(n) < classifier.cut]
    assert frozen and all(parameter.grad is None for parameter in frozen)


def test_thawing_what_was_cached_is_an_error(model: Build) -> None:
    class Thaw(L.Callback):
        def on_train_epoch_end(self, _trainer: L.Trainer, module: Any) -> None:
            module.backbone.model.blocks[0].mlp.fc1.weight.requires_grad_(True)

    with pytest.raises(ValueError, match=r"backbone\.model\.blocks\.0\.mlp\.fc1\.weight trains now"):
        fitted(model("last_blocks"), callbacks=[Thaw()])


def test_another_model_after_an_interrupted_run_starts_from_pixels(model: Build) -> None:
    class Cut(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power cut")

    data, watch = digits(), Watch()
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(model("last_blocks"), data, callbacks=[Cut()])
    trainer_of(callbacks=[watch]).validate(model("last_blocks", perturb="model.blocks.0"), data, verbose=False)
    fitted(model("linear_probe", "off"), data, epochs=1, callbacks=[watch])
    assert all(features is None for features, _ in watch.val)
    assert all(features is None for _, features, _ in watch.train)


# Whole runs


class FeatureCheck(L.Callback):
    """Kept features are those of the layers that are frozen in this epoch; counts the batches that carry some."""

    cached: list[tuple[int, int]] = []  # noqa: RUF012  # (epoch, cut) of each such batch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        assert pl_module.cut == pl_module.thaw.cut(trainer.current_epoch)
        if batch.features is not None:
            images = trainer.datamodule.split_dataset("train").data.images[batch.indices]  # type: ignore[attr-defined]
            expected = pl_module.backbone.prefix(pl_module.preprocess(images), pl_module.cut)
            torch.testing.assert_close(batch.features, expected, rtol=1e-5, atol=1e-6)
            self.cached.append((trainer.current_epoch, pl_module.cut))


@pytest.mark.parametrize(
    ("policy", "epochs", "cached"),
    [
        pytest.param(["freeze=lp_ft", "freeze.probe_epochs=2"], 4, [(0, 5), (1, 5)], marks=pytest.mark.long),
        (["freeze=gradual", "freeze.epochs=2"], 7, [(0, 5), (1, 5), (2, 3), (3, 3), (4, 2), (5, 2)]),
        (["freeze=gradual", "freeze.blocks=2"], 3, [(0, 5)]),  # a pass for a single epoch is not worth it
        (["freeze=last_blocks", "freeze.k=1"], 2, [(0, 3), (1, 3)]),
        pytest.param(["freeze=lora", "freeze.lora.last=2"], 2, [(0, 2), (1, 2)], marks=pytest.mark.long),
        pytest.param(["freeze=ssf", "freeze.ssf.last=2"], 2, [(0, 2), (1, 2)], marks=pytest.mark.long),
        pytest.param(["freeze=prompt", "freeze.prompt.last=2"], 2, [(0, 2), (1, 2)], marks=pytest.mark.long),
    ],
    ids=["lp_ft", "gradual", "gradual by twos", "last_blocks", "lora", "ssf", "prompt"],
)
def test_cached_features_change_nothing(
    train: Callable[..., Path], tiny_run: list[str], policy: list[str], epochs: int, cached: list[tuple[int, int]]
) -> None:
    """Memory and disk agree to the bit; with pixels to float32 rounding, as sums differ with the size of a batch."""
    run = [*tiny_run, *policy, f"trainer.max_epochs={epochs}", "test=false", "optim=sgd", "optim.lr=0.05"]
    weights = {}
    for mode in ("off", "memory", "disk"):
        FeatureCheck.cached = []
        check = f"+callbacks.check._target_={__name__}.FeatureCheck"
        run_dir = train(*run, f"cache.mode={mode}", check, name=mode)
        weights[mode] = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert sorted(set(FeatureCheck.cached)) == ([] if mode == "off" else cached)
        assert len(FeatureCheck.cached) == 4 * len(set(FeatureCheck.cached))
    for name, tensor in weights["off"].items():
        assert torch.equal(weights["memory"][name], weights["disk"][name]), name
        torch.testing.assert_close(weights["memory"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
