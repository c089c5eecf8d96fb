"""Label propagation against dense closed forms and scikit-learn, class means against a naive loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.semi_supervised import LabelSpreading
from torch import Tensor

from thaw.evaluation.probes import Labelled
from thaw.evaluation.propagation import balance, neighbours_mean, normalised_graph, propagation, prototype, spread

NOTHING = Labelled(torch.empty(0, 6), torch.empty(0, dtype=torch.long))
K, ALPHA = 7, 0.9


def clouds(count: int, seed: int) -> Labelled:
    """Four classes, the labels in no order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    centres = 2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return Labelled(centres[labels] + torch.randn(count, 6, generator=generator), labels)


ALL, TEST = clouds(160, 0), clouds(40, 1)


def few(wanted: dict[int, int]) -> Labelled:
    """The first images of each class keep their label."""
    labels = torch.full_like(ALL.labels, -1)
    for label, count in wanted.items():
        labels[(ALL.labels == label).nonzero()[:count, 0]] = label
    return Labelled(ALL.features, labels)


def naive_adjacency(features: Tensor, k: int) -> np.ndarray:
    """(N, N): the positive cosine of each image to its k nearest, plus the transpose."""
    unit = F.normalize(features.double(), dim=1).numpy()
    links = np.zeros((len(unit), len(unit)))
    for row in range(len(unit)):
        cosines = [unit[row] @ other if other is not unit[row] else -2 for other in unit]
        cosines[row] = -2
        for column in np.argsort(cosines)[::-1][:k]:
            links[row, column] = max(0, cosines[column])
    return links + links.T


def naive_graph(features: Tensor, k: int) -> np.ndarray:
    links = naive_adjacency(features, k)
    degrees = links.sum(axis=1)
    return links / np.sqrt(np.outer(degrees, degrees))


def test_the_graph_equals_a_naive_one() -> None:
    graph = normalised_graph(ALL.features, K)
    assert np.allclose(graph.toarray(), naive_graph(ALL.features, K), atol=1e-6)


def test_equal_images_are_neighbours_and_none_is_its_own() -> None:
    twice = torch.cat([ALL.features[:30], ALL.features[:30]])
    graph = normalised_graph(twice, 3).toarray()
    assert (graph.diagonal() == 0).all() and (graph[torch.arange(30), torch.arange(30) + 30] > 0).all()


@pytest.mark.parametrize("alpha", [0.5, 0.99])
def test_scores_equal_the_closed_form(alpha: float) -> None:
    """In float64, with another number of labels in each class."""
    labels = few({0: 1, 1: 5, 2: 2, 3: 9}).labels
    one_hot = np.stack([(labels == label).double().numpy() for label in range(4)], axis=1)
    closed = np.linalg.solve(np.eye(160) - alpha * naive_graph(ALL.features, K), one_hot / one_hot.sum(axis=0))
    scores = spread(normalised_graph(ALL.features, K), labels, alpha).numpy()
    assert np.abs(scores - closed).max() < 1e-4 * closed.max()


def test_labels_equal_scikit_learns() -> None:
    images = few(dict.fromkeys(range(4), 3))
    links = naive_adjacency(ALL.features, K)
    reference = LabelSpreading(kernel=lambda *_: links.copy(), alpha=ALPHA, max_iter=3000, tol=1e-12)
    reference.fit(ALL.features.numpy(), images.labels.numpy())
    scores = spread(normalised_graph(ALL.features, K), images.labels, ALPHA)
    ours = scores / scores.sum(dim=1, keepdim=True)
    assert np.abs(ours.numpy() - reference.label_distributions_).max() < 1e-4
    assert ours.argmax(dim=1).tolist() == reference.transduction_.tolist()


def test_balanced_classes_have_equal_shares() -> None:
    """A class without scores, here the third, stays empty; a class with few takes what is nearly its own."""
    generator = torch.Generator().manual_seed(0)
    scores = (0.5 + torch.rand(200, 4, generator=generator, dtype=torch.float64)) * torch.tensor([5.0, 1.0, 0.0, 1.0])
    balanced = balance(scores)
    assert torch.allclose(balanced.sum(dim=1), torch.ones(200, dtype=torch.float64))
    assert torch.allclose(balanced.sum(dim=0), 200 * torch.tensor([1 / 3, 1 / 3, 0, 1 / 3], dtype=torch.float64))
    ratios = (balanced / scores**4)[:, [0, 1, 3]]  # a factor of the row times one of the column
    assert torch.allclose(ratios / ratios[:, :1], (ratios / ratios[:, :1])[:1].expand(200, 3), rtol=1e-3)


def test_queries_take_the_mean_of_their_neighbours() -> None:
    values = torch.rand(160, 4, generator=torch.Generator().manual_seed(0))
    means = neighbours_mean(TEST.features, ALL.features, values, K)
    for query, mean in zip(TEST.features, means, strict=True):
        cosines = F.cosine_similarity(query[None], ALL.features)
        nearest = cosines.argsort(descending=True)[:K]
        expected = sum(cosines[n] * values[n] for n in nearest) / cosines[nearest].sum()
        assert torch.allclose(mean, expected, atol=1e-5)


def test_propagation_uses_the_images_without_labels() -> None:
    """Two half-moons: with one label each the nearest label is wrong where the nearest chain is right."""
    angles = torch.linspace(0, 1, 60) * 1.5
    moons = [torch.stack([angles.cos(), angles.sin(), torch.full((60,), height)], dim=1) for height in (0.0, 0.3)]
    features, truth = torch.cat(moons), torch.arange(2).repeat_interleave(60)
    labels = torch.full((120,), -1)
    labels[0], labels[119] = 0, 1  # at opposite ends
    train, nothing = Labelled(features, labels), Labelled(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    queries = features + 0.001
    assert propagation(train, nothing, k=4, alpha=0.99).predict(queries).tolist() == truth.tolist()
    assert (prototype(train, nothing).predict(queries) == truth).float().mean() < 0.8


def test_queries_are_classified_one_by_one() -> None:
    choice = propagation(few(dict.fromkeys(range(4), 2)), NOTHING, k=K, alpha=ALPHA)
    alone = torch.cat([choice.predict(query[None]) for query in TEST.features])
    assert torch.equal(choice.predict(TEST.features), alone) and (alone == TEST.labels).float().mean() > 0.7
    assert (choice.setting, choice.candidates, choice.chosen) == ("k", {K: None}, K)


def test_class_means_equal_a_naive_loop() -> None:
    images = few({0: 4, 1: 1, 3: 9})
    means = []
    for label in (0, 1, 3):
        members = [feature / feature.norm() for feature, own in zip(*images, strict=True) if own == label]
        means.append(sum(members) / len(members))
    similarities = torch.stack([F.cosine_similarity(TEST.features, mean[None]) for mean in means])
    expected = torch.tensor([0, 1, 3])[similarities.argmax(dim=0)]
    choice = prototype(images, TEST)
    assert torch.equal(choice.predict(TEST.features), expected)
    assert choice.setting is None and choice.candidates == {0: float((expected == TEST.labels).double().mean())}


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probe=propagation spreads labels .* set data\.labels_per_class"):
        propagation(ALL, NOTHING, k=K, alpha=ALPHA)
    with pytest.raises(ValueError, match=r"probe\.k=160 must be less than the 160 images of the graph"):
        propagation(few({0: 1, 1: 1}), NOTHING, k=160, alpha=ALPHA)
    with pytest.raises(ValueError, match="All 3 training images are of class 2; a probe needs two"):
        prototype(few({2: 3}), NOTHING)
