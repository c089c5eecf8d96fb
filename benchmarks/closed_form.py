"""Linear probes without a training loop, on features that `benchmarks/extract_then_fit.py --cached FILE` has written.

python -m benchmarks.closed_form FILE ridge       one eigendecomposition of the Gram matrix serves every L2 strength, as
                                                  in big_vision's few-shot evaluation
python -m benchmarks.closed_form FILE logistic    scikit-learn's LogisticRegression on standardised features

Validation chooses the strength. Prints one line of JSON.
"""

import argparse
import json
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = [2.0**power for power in range(-10, 21)]
C = [1e-3, 1e-2, 1e-1]  # inverse strengths, as scikit-learn counts them


def ridge(features: Tensor, labels: Tensor, strengths: list[float]) -> list[tuple[Tensor, Tensor]]:
    """Weights (D, K) and bias (K,) of least squares on targets of -1 and 1, for each L2 strength.

    With X^T X = V diag(s) V^T of the centred features X (N, D), the weights are V diag(1 / (s + strength)) V^T X^T Y.
    """
    features, targets = features.double(), 2.0 * F.one_hot(labels, 10).double() - 1  # (N, D), (N, K)
    mean, base = features.mean(0), targets.mean(0)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)  # (D,), (D, D)
    projected = vectors.T @ (centred.T @ targets)  # (D, K)
    weights = [vectors @ (projected / (values + strength)[:, None]) for strength in strengths]
    return [(weight.float(), (base - mean @ weight).float()) for weight in weights]


def logistic(features: Tensor, labels: Tensor, strengths: list[float]) -> list[tuple[Tensor, Tensor]]:
    """Weights (D, K) and bias (K,) of scikit-learn's multinomial regression for each C, each started at the last."""
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(0), features.std(0)
    model = LogisticRegression(max_iter=1000, tol=1e-5, warm_start=True)
    fits = []
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the largest C may need more iterations than change an answer
            model.set_params(C=strength).fit(((features - mean) / std).numpy(), labels.numpy())
        weight = torch.from_numpy(model.coef_.T).float() / std[:, None]  # (D, K)
        fits.append((weight, torch.from_numpy(model.intercept_).float() - mean @ weight))
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features")
    parser.add_argument("method", choices=("ridge", "logistic"))
    args = parser.parse_args()
    train, val, test = torch.load(args.features, mmap=True)
    began = time.perf_counter()
    strengths = STRENGTHS if args.method == "ridge" else C
    fits = {"ridge": ridge, "logistic": logistic}[args.method](*train, strengths)
    accs = [
        [((x @ weight + bias).argmax(1) == y).float().mean().item() for x, y in (val, test)] for weight, bias in fits
    ]
    chosen = max(range(len(fits)), key=lambda number: accs[number][0])
    seconds = time.perf_counter() - began
    result = {
        "strength": strengths[chosen],
        "val_acc": round(accs[chosen][0], 4),
        "test_acc": round(accs[chosen][1], 4),
    }
    print(json.dumps(result | {"fit": round(seconds, 2)}))


if __name__ == "__main__":
    main()
