"""The cost of using a model: parameters, floating-point operations, time and size."""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from thaw.evaluation.summary import count_parameters
from thaw.predict.predictor import Predictor

TIMING_SECONDS = 1.0  # spent on each timing


def cost_facts(predictor: Predictor, images: Tensor) -> dict[str, Any]:
    """Parameters, FLOPs of one image, time of one and of a batch (B, C, H, W), and size, as values of JSON.

    Times are medians in the predictor's precision, on its device, on a machine that may do other things besides.
    """
    model, device = predictor.model, predictor.fabric.device
    seconds_of_one, seconds_of_all = median_seconds(predictor, images[:1]), median_seconds(predictor, images)
    return {
        "parameters": count_parameters(model)["total_params"],
        "flops": flops(model, images[:1].to(device)),
        "latency_ms": round(1000 * seconds_of_one, 3),
        "images_per_second": round(len(images) / seconds_of_all, 1),
        "batch_size": len(images),
        "device": str(device),
        "precision": predictor.cfg.trainer.precision,
        "threads": torch.get_num_threads(),
        "checkpoint_mb": round(sum(file.stat().st_size for file in predictor.files) / 1e6, 3),
        "weights_mb": round(sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6, 3),
    }


def flops(model: nn.Module, image: Tensor) -> int | None:
    """Operations in matrix products, convolutions and attention; a multiplication and an addition count as two.

    Added parametrizations, such as LoRA's, count as merged. None for a recurrent network, which torch does not count.
    """
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return None
    # with gradients, as torch's counter fails without them on a parameter that is a module's input (SigLIP's pool)
    with torch.enable_grad(), parametrize.cached():  # the first call computes the parametrized weights
        model(image)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops()


def median_seconds(predictor: Predictor, images: Tensor) -> float:
    """Median time of predicting these images, after one call to warm up."""
    predictor(images)
    taken: list[float] = []
    while not taken or (sum(taken) < TIMING_SECONDS and len(taken) < 200):
        started = time.perf_counter()
        predictor(images)
        taken.append(time.perf_counter() - started)
    return median(taken)
