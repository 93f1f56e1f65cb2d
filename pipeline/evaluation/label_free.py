"""How good is a representation, told without a single label? Scores of the spectrum and the spread of its features.

What they are worth is a matter of measurement: `pipeline.compare` gives their rank correlation with k-NN and linear
accuracy over the runs that it compares.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from objectives.spread import effective_rank
from pipeline.evaluation.feature_set import FeatureSet

EPSILON = 1e-7
DELTA = 1e-4  # LiDAR's, added to the within-class covariance
FITTED = (3, 100)  # the ranks between which α-ReQ's power law is fitted
PAIRS = 4_096  # images that uniformity is taken over, always the same: its pairs are the square


def label_free(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, float] | None:
    """rankme, alpha_req, effective_rank, uniformity of the training features; lidar and alignment of random views."""
    assert train.views is not None
    if len(train.features) < 3:
        return None
    return {
        "rankme": rankme(train.features),
        "alpha_req": alpha_req(train.features),
        "effective_rank": effective_rank(train.features.double()).item(),
        "uniformity": uniformity(train.at_most(PAIRS).features),
        "alignment": alignment(train.views),
        "lidar": lidar(train.views),
    }


def rankme(x: Tensor) -> float:
    """RankMe of features [N, D] (Garrido et al. 2023, equation 1): exp(−Σ p ln p), p = σ / Σ σ + ε, of the singular
    values σ of the uncentred matrix. From 1 to min(N, D)."""
    return smooth_rank(torch.linalg.svdvals(x.double()))


def alpha_req(x: Tensor) -> float:
    """α-ReQ of features [N, D] (Agrawal et al. 2022, section 3): the exponent α of the power law λ_i ∝ i^(−α) that the
    eigenvalues of their covariance follow; near 1 generalises best there.

    Fitted by least squares of ln λ on ln i over ranks 3 to 100, each weighted by 1 / i, so that every octave counts
    alike (as Stringer et al. 2019 fit theirs).
    """
    values = torch.linalg.svdvals(x.double() - x.double().mean(0)).square() / (len(x) - 1)
    values = values[values > values[0] * torch.finfo(torch.float32).eps ** 2]
    first, last = FITTED[0] - 1, min(FITTED[1], len(values))
    if last - first < 2:
        return float("nan")
    i = torch.arange(first + 1, last + 1, dtype=torch.float64, device=x.device)
    w, u, v = 1 / i, i.log(), values[first:last].log()
    u, v = u - (w * u).sum() / w.sum(), v - (w * v).sum() / w.sum()
    return -((w * u * v).sum() / (w * u * u).sum()).item()


def lidar(views: Tensor) -> float:
    """LiDAR of q views of each of n images [n, q, D] (Thilak et al. 2024, section 4): the smooth rank of Fisher's
    discriminant Σ_w^(−1/2) Σ_b Σ_w^(−1/2), every image a class of its own. At most min(n − 1, D).

    Σ_b is the covariance of the images' means, Σ_w that of the views about them, plus δ I.
    """
    x = views.double()
    n, q, d = x.shape
    means = x.mean(1)
    centred = means - means.mean(0)
    within = (x - means[:, None]).flatten(0, 1)
    sigma_w = within.T @ within / (n * (q - 1)) + DELTA * torch.eye(d, dtype=x.dtype, device=x.device)
    # Eigenvalues of Σ_w^(−1/2) Σ_b Σ_w^(−1/2) are the squared singular values of (means) Σ_w^(−1/2).
    values, vectors = torch.linalg.eigh(sigma_w)
    whitened = centred @ vectors / values.clamp(min=DELTA * 1e-3).sqrt()
    return smooth_rank(torch.linalg.svdvals(whitened).square() / (n - 1))


def smooth_rank(values: Tensor) -> float:
    """exp of the entropy of non-negative values, taken as shares (Roy & Vetterli 2007); none at all has rank 0."""
    if not bool(values.sum() > 0):
        return 0.0
    p = values / values.sum() + EPSILON
    return (-(p * p.log()).sum()).exp().item()


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """ln E exp(−t |x − y|²) over pairs of different rows of [N, D], each of unit length (Wang & Isola 2020, section
    4.1.2): 0 where all are one, the lower the more even."""
    x = F.normalize(x.double(), dim=1)
    return (torch.pdist(x).square() * -t).exp().mean().log().item()


def alignment(views: Tensor) -> float:
    """E |x − y|² over pairs of views of one image [n, V, D], of unit length (Wang & Isola 2020, section 4.1.1)."""
    x = F.normalize(views.double(), dim=2)
    q = x.shape[1]
    # Σ over ordered pairs of |x − y|² is 2 q Σ |x|² − 2 |Σ x|².
    return ((2 * q * x.square().sum((1, 2)) - 2 * x.sum(1).square().sum(1)) / (q * (q - 1))).mean().item()
