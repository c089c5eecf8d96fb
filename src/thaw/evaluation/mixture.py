"""One model whose weights are a mean of several models' weights, chosen on validation; it costs as much as one model.

For models that were fine-tuned from the same weights. The order of neurons in models trained from scratch differs, so
that a mean of their weights computes nothing.
"""

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from thaw.data.batches import evenly_spread
from thaw.data.images import Source
from thaw.evaluation.robustness import number_corrupted, robustness_facts
from thaw.freezing.added import merge_added, plain_name
from thaw.lr_bank import LRBank
from thaw.predict.predictor import Predictor
from thaw.run import checkpoint as checkpoints
from thaw.run.console import progress
from thaw.run.errors import UserError
from thaw.run.files import write_bytes
from thaw.run.record import portable_paths, replaced
from thaw.run.targets import config_leaves

NORM_IMAGES = 5000  # from which the statistics of batch norms are computed anew
NOT_IN_OUTPUT = ("backbone.weights", "backbone.fused_attention")  # settings that leave a model's output as it is ...
TRAINING_ONLY = "drop"  # ... and those with this word


def blend(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of state dicts; whole numbers, such as batches seen, are those of the first."""

    def mix(name: str, first: Tensor) -> Tensor:
        parts = [share * state[name].double() for share, state in zip(shares, states, strict=True) if share]
        return torch.stack(parts).sum(dim=0).to(first.dtype) if first.is_floating_point() else first

    return {name: mix(name, tensor) for name, tensor in states[0].items()}


def greedy_soup(
    accuracies: Sequence[float], accuracy_of: Callable[[list[int]], float]
) -> tuple[list[int], dict[int, float]]:
    """Which models to average with equal shares (Wortsman et al. 2022, arXiv:2203.05482, recipe 1).

    They are tried from the best to the worst of their validation `accuracies`, of equals the earlier first; one stays
    unless it lowers the accuracy of the average, which `accuracy_of` measures. Returns the numbers of those that stay,
    and for each model the accuracy of the average with it when it was tried, in this order.
    """
    first, *others = sorted(range(len(accuracies)), key=lambda number: -accuracies[number])
    kept, tried = [first], {first: accuracies[first]}
    for number in others:
        tried[number] = accuracy_of([*kept, number])
        if tried[number] >= tried[kept[-1]]:
            kept.append(number)
    return kept, tried


class Mixture:
    """Measures means of the weights of several models on validation images.

    LoRA is merged first, so that the mean is of the matrices that compute. Batch norms whose statistics differ get
    those of the mean's own activations, on at most 5,000 training images as they are, like torch's `update_bn` for
    averaged weights (Izmailov et al. 2018, section 3.2); other statistics are equal, and stay.

    Args:
        predictors: the models.
        source: their images.
        wanted: the setting that asks for it, for messages.
        path: the checkpoint file of the result, which `save` writes.

    Attributes:
        predictor: the model that was loaded last.

    Raises:
        UserError: models of different architectures or frozen weights; it names the first difference.
    """

    def __init__(self, predictors: Sequence[Predictor], source: Source, wanted: str, path: Path) -> None:
        self.members, self.source = predictors, source
        models = [copy.deepcopy(predictor.model) for predictor in predictors]
        for model in models:
            merge_added(model)
        self.states = [{name: tensor.cpu().clone() for name, tensor in model.state_dict().items()} for model in models]
        for other, state in zip(predictors[1:], self.states[1:], strict=True):
            if found := first_difference(predictors[0], other, self.states[0], state):
                pair = f"{predictors[0].where} and {other.where}"
                raise UserError(
                    f"{wanted} averages weights, and those of {pair} are of other models: {found}. Averaged "
                    "probabilities do not need equal models: combine=average."
                )
        norms = {name: module for name, module in models[0].named_modules() if isinstance(module, _BatchNorm)}
        self.norms = [norm for name, norm in norms.items() if self.differs(f"{name}.running_mean")]
        first = predictors[0]
        self.predictor = Predictor(models[0], first.cfg.copy(), path, first.commit, first.data)

    def differs(self, name: str) -> bool:
        """Whether there is a tensor of this name, and not the same in all models."""
        first, *others = (state.get(name) for state in self.states)
        return first is not None and any(other is None or not torch.equal(first, other) for other in others)

    def load(self, shares: Sequence[float]) -> Predictor:
        """The model with the weighted mean of all weights; shares of 0 and 1 give one of the models as it is."""
        self.predictor.model.load_state_dict(blend(self.states, shares))
        if max(shares) < 1 and self.norms:
            momenta = [norm.momentum for norm in self.norms]
            for norm in self.norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            images = self.source.train.images
            self.predictor.logits(images[evenly_spread(len(images), NORM_IMAGES)])
            for norm, momentum in zip(self.norms, momenta, strict=True):
                norm.momentum = momentum
                norm.eval()
        return self.predictor

    def shares(self, chosen: Sequence[int]) -> list[float]:
        """Equal shares of some of the models."""
        return [1 / len(chosen) if number in chosen else 0.0 for number in range(len(self.states))]

    def choose_soup(self, labels: Sequence[str]) -> dict[str, Any]:
        """Load the greedy soup; facts about it, as values of JSON."""
        images, truth = self.source.val
        count = len(self.states)
        with progress("soup on validation", (2 * count - 1) * len(truth)) as advance:

            def accuracy_of(chosen: list[int]) -> float:
                logits = self.load(self.shares(chosen)).logits(images, advance)
                return float((logits.argmax(dim=1) == truth).double().mean())

            alone = [accuracy_of([number]) for number in range(count)]
            kept, tried = greedy_soup(alone, accuracy_of)
        self.load(self.shares(kept))
        self.predictor.cfg.name = "soup"
        rows = [
            {"model": labels[n], "val/acc": alone[n], "val/acc of the soup": tried[n], "stays": n in kept}
            for n in tried
        ]
        return {"tried": rows}

    def choose_alpha(self, alphas: Sequence[float], robustness: Mapping[str, Any]) -> dict[str, Any]:
        """Load the best of the models between two: WiSE-FT (Wortsman et al. 2021, arXiv:2109.01903).

        Their weights are (1 - alpha) of the first and alpha of the second. The best has the highest validation
        accuracy, of equals the lowest loss. `robustness`, which may be empty, is as for `assess`: each model is also
        measured on corrupted validation images. Returns facts, as values of JSON.
        """
        images, truth = self.source.val
        corrupted = number_corrupted(self.source.val, robustness) if robustness else 0
        rows, order = [], []
        with progress("models between on validation", len(alphas) * (len(truth) + corrupted)) as advance:
            for alpha in alphas:
                between = self.load([1 - alpha, alpha])
                logits = between.logits(images, advance)
                accuracy = float((logits.argmax(dim=1) == truth).double().mean())
                order.append((accuracy, -float(F.cross_entropy(logits, truth))))
                facts = {"alpha": alpha, "val/acc": accuracy}
                if corrupted:
                    facts["corrupted"] = robustness_facts(between, self.source.val, logits, robustness, advance)["mean"]
                rows.append(facts)
        best = max(range(len(alphas)), key=order.__getitem__)
        self.load([1 - alphas[best], alphas[best]])
        self.predictor.cfg.name = "wise"
        return {"alpha": alphas[best], "between": rows}

    def save(self, allow: Sequence[str], how: str) -> None:
        """Write the loaded model as a checkpoint that holds all weights, with the configuration of the first model."""
        first, path = self.members[0], self.predictor.checkpoint
        checkpoint = checkpoints.read_checkpoint(first.checkpoint, allow)
        config, folder = checkpoint["config"], path.parent.parent
        for block in ("data", "backbone"):  # whose files lie where they did
            config[block] = replaced(config[block], {"${run_dir}/": f"{config['run_dir']}/"})
        config = replaced(config, portable_paths(folder)) | {
            "run_dir": ".",
            "resume": None,
            "start_from": None,
            "distill": None,
        }
        config |= {"name": self.predictor.cfg.name, "overrides": how}
        if self.states[0].keys() != first.model.state_dict().keys():  # LoRA is merged
            config["freeze"] = {"rules": [{"match": ".*", "train": True}]}
        content = io.BytesIO()
        state = {name: tensor.cpu() for name, tensor in self.predictor.model.state_dict().items()}
        facts = {"git_commit": first.commit, "data": dict(first.data), "wandb_id": None}
        torch.save({"config": config, "state_dict": state, **facts}, content)
        write_bytes(content.getbuffer(), path)


def first_difference(
    one: Predictor, other: Predictor, state: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> str | None:
    """The first setting or tensor that keeps the weights of two models from being averaged; None if nothing does.

    `state` and `others` are their weights with LoRA merged.
    """
    if isinstance(one.model.head, LRBank) or isinstance(other.model.head, LRBank):
        return "head=lr_bank has many heads, each with a learning rate of its own"
    settings = [architecture(predictor.cfg) for predictor in (one, other)]
    for key in settings[0] | settings[1]:
        if settings[0].get(key) != settings[1].get(key):
            return f"{key} is {settings[0].get(key)} and {settings[1].get(key)}"
    for name in {**state, **others}:
        shapes = [tuple(each[name].shape) if name in each else "absent" for each in (state, others)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} and {shapes[1]}"
    raw = [{plain_name(name): tensor for name, tensor in each.model.state_dict().items()} for each in (one, other)]
    frozen = [set(map(plain_name, each.model.thaw.constant())) for each in (one, other)]
    for name in (both := [name for name in raw[0] if name in frozen[0] & frozen[1]]):
        if not torch.equal(raw[0][name], raw[1][name]):
            return f"{name} is frozen in both, and differs: they started from other weights"
    weights = [each.cfg.backbone.get("weights", "none") for each in (one, other)]
    return None if both or weights[0] == weights[1] else f"backbone.weights is {weights[0]} and {weights[1]}"


def architecture(cfg: DictConfig) -> dict[str, Any]:
    """The settings of backbone and head that shape the output, by their keys."""
    blocks = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("backbone", "head")}
    leaves = dict(config_leaves(blocks, ""))
    return {key: leaf for key, leaf in leaves.items() if key not in NOT_IN_OUTPUT and TRAINING_ONLY not in key}
