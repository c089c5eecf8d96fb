"""Rows of full fine-tuning: images per second, and what share of the machine's peak a step reaches."""

import os
import shutil

import timm
from safetensors.torch import save_file

from benchmarks.extract_then_fit import digits_vit
from benchmarks.speed.measure import Bench, Row, forward_flops, rates
from benchmarks.speed.probe import feature_rate

IMAGES = {False: 4000, True: 640}  # by bench.quick


def theirs(bench: Bench, *arguments: str) -> float:
    size = str(IMAGES[bench.quick])
    cost = bench.other("plain_finetune", "--data", bench.data, "--train-size", size, *arguments)
    return cost.result["images_per_second"]


def ours(bench: Bench, *overrides: str) -> float:
    size = f"data.train_size={IMAGES[bench.quick]}"
    settings = ("experiment=vit_finetune", "augment=none", "average=none", size, "trainer.max_epochs=2")
    return bench.clocked(*settings, *overrides)["images_per_second"]


def bundled(bench: Bench) -> list[Row]:
    """The bundled ViT at a batch of 128, without augmentation or moving average."""
    timms = ("--attention", "timm")
    plain, fused, own, peak = rates(
        bench.rounds, lambda: theirs(bench), lambda: theirs(bench, *timms), lambda: ours(bench), bench.peak
    )
    flops = 3 * forward_flops(digits_vit(), 1, 28, 28)
    other, best = max((plain, "plain attention"), (fused, "timm's attention"))
    shares = [f"{rate:,.0f} images/s, {rate * flops / peak:.0%}" for rate in (other, own)]
    name, ratio = "full fine-tuning, images/s and share of the bf16 peak", f"{own / other:.2f}"
    bench.note(
        f"The plain fine-tuning loop: {plain:,.0f} images/s with plain attention, {fused:,.0f} with timm's. "
        f"A step counts as three forward passes; the peak was {peak / 1e9:,.0f} GFLOP/s."
    )
    return [Row(name, f"loop in bf16, {best}: {shares[0]}", shares[1], ratio, "1.2, 50 %", "1.5, 60 %")]


def compiled(bench: Bench) -> list[Row]:
    """The same by torch.compile, in the third epoch."""
    if bench.quick or (bench.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++"))):
        return []
    other, own = rates(
        1,
        lambda: theirs(bench, "--compile", "--epochs", "3"),
        lambda: ours(bench, "model.compile=true", "trainer.max_epochs=3"),
    )
    return [
        Row("the same, once compiled", f"{other:,.0f} images/s", f"{own:,.0f} images/s", f"{own / other:.2f}", "", "")
    ]


def vit_base(bench: Bench) -> list[Row]:
    """ViT-B/16 with random weights at 224 px, on a GPU: fine-tuning, LoRA, the last blocks, and the feature pass."""
    if bench.device == "cpu":
        return []
    size, batch = (512, 64) if bench.quick else (8192, 128)
    model = timm.create_model("vit_base_patch16_224", num_classes=0)
    flops = forward_flops(model.eval(), 3, 224, 224)
    weights = f"{bench.new_folder()}/random.safetensors"  # thaw refuses to freeze what no file holds
    save_file(model.state_dict(), weights)
    backbone = ("backbone=vit_base", f"backbone.weights={weights}", "backbone.image_size=224")
    backbone += (f"data.train_size={size}",)
    settings = (*backbone, "augment=none", "average=none", f"data.batch_size={batch}", "trainer.max_epochs=2")
    script = ("plain_finetune", "--data", bench.data, "--model", "vit_base_patch16_224", "--attention", "timm")
    script += ("--train-size", str(size), "--batch-size", str(batch))

    def own(freeze: str) -> float:
        uncached = "cache.mode=off"  # each step runs the frozen layers, too
        clock = bench.clocked("experiment=vit_finetune", f"freeze={freeze}", uncached, *settings)
        return clock["images_per_second"]

    def feature_pass() -> float:
        probe = bench.thaw("experiment=vit_linear_probe", *backbone, "trainer.max_epochs=1", "test=false")
        return feature_rate(probe[0].output)

    loop, full, lora, last, features, peak = rates(
        min(2, bench.rounds),
        lambda: bench.other(*script).result["images_per_second"],
        lambda: own("full"),
        lambda: own("lora"),
        lambda: own("last_blocks"),
        feature_pass,
        bench.peak,
    )
    shares = [f"{rate:,.0f} images/s, {3 * rate * flops / peak:.0%}" for rate in (loop, full)]
    name = "ViT-B/16 at 224 px, full fine-tuning, share of the bf16 peak"
    rows = [Row(name, f"bf16 loop: {shares[0]}", shares[1], f"{full / loop:.2f}", "40 %", "")]
    for title, rate in (("LoRA", lora), ("last 2 blocks", last)):
        rows.append(Row(f"the same, {title}, no cache", "", f"{rate:,.0f} images/s", "", "", ""))
    share = f"{features:,.0f} images/s, {features * flops / peak:.0%}"
    return [*rows, Row("the same, feature pass", "", share, "", "50 %", "")]
