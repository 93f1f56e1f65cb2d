"""How sure is an accuracy?"""

from scipy import stats
from torch import Tensor


def bootstrap(correct: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron 1979) of an accuracy, from which answers [N] were right.

    Without drawing a sample: resampling N answers of which a share p is right, and counting, is a binomial draw, so
    that the bootstrap's percentiles are the binomial's. It tells what another set of images of this size might have
    given, with this backbone and this probe; not what another seed of pretraining might.
    """
    n, right = len(correct), int(correct.sum())
    if not n:
        raise ValueError("no answer, no accuracy: the validation set is empty")
    low, high = stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], n, right / n)
    return float(low) / n, float(high) / n
