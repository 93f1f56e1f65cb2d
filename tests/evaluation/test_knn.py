"""Is the vote DINO's, and does it equal scikit-learn's and a count by hand?"""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pipeline.evaluation import knn as module
from pipeline.evaluation.knn import knn, predict


def clusters(n: int, classes: int, noise: float, seed: int, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, dim] around one centre for each class, the same centres for every seed."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = (centres[y] + noise * rng.normal(size=(n, dim))) * rng.uniform(0.1, 10, (n, 1))  # lengths must not matter
    return torch.from_numpy(x).float(), torch.from_numpy(y)


@pytest.mark.parametrize("k", [1, 10, 20, 100])
def test_it_predicts_what_scikit_learn_predicts(k: int) -> None:
    train_x, train_y = clusters(500, 7, 1.5, seed=0)
    val_x, _ = clusters(300, 7, 1.5, seed=1)
    theirs = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train_x.double().numpy(), train_y.numpy())
    ours = predict(train_x, train_y, val_x, ks=(k,))[k]
    assert ours.numpy().tolist() == theirs.predict(val_x.double().numpy()).tolist()


def test_the_vote_by_hand() -> None:
    """Two neighbours of class 1 at 60 degrees lose to one of class 0 at 30: exp(.866 / .07) > 2 exp(.5 / .07)."""
    angle = torch.tensor([30.0, 60.0, -60.0, 180.0]).deg2rad()
    bank = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels, query = torch.tensor([0, 1, 1, 2]), torch.tensor([[3.0, 0.0]])
    assert math.exp(math.cos(math.pi / 6) / 0.07) > 2 * math.exp(0.5 / 0.07)
    assert predict(bank, labels, query, ks=(3,))[3].tolist() == [0]
    # Warm enough, the two win: 2 exp(.5) > exp(.866).
    assert predict(bank, labels, query, ks=(3,), temperature=1.0)[3].tolist() == [1]


def test_more_neighbours_than_images_means_all_of_them() -> None:
    train_x, train_y = clusters(30, 3, 1.0, seed=0)
    val_x, val_y = clusters(50, 3, 1.0, seed=1)
    scores = knn(train_x, train_y, val_x, val_y, ks=(30, 200, 10_000))
    assert scores[30] == scores[200] == scores[10_000]


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    train_x, train_y = clusters(200, 5, 1.5, seed=0)
    val_x, val_y = clusters(101, 5, 1.5, seed=1)
    whole = knn(train_x, train_y, val_x, val_y)
    monkeypatch.setattr(module, "SIMILARITIES", 200 * 7)
    assert knn(train_x, train_y, val_x, val_y) == whole


def test_permuted_labels_give_chance() -> None:
    train_x, train_y = clusters(2000, 5, 0.3, seed=0)
    val_x, val_y = clusters(1000, 5, 0.3, seed=1)
    assert knn(train_x, train_y, val_x, val_y)[20] > 0.98
    permuted = train_y[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    assert knn(train_x, permuted, val_x, val_y)[20] == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("train_x", "train_y"),
    [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), (torch.ones(3, 4), torch.tensor([0, 1]))],
)
def test_sets_that_do_not_fit_are_refused(train_x: torch.Tensor, train_y: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="k-NN needs"):
        predict(train_x, train_y, torch.ones(2, 4))


def test_unlabelled_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        predict(torch.ones(2, 4), torch.tensor([0, -1]), torch.ones(2, 4))
