"""Values that change during a run, as functions of progress = images seen / images planned, in [0, 1].

Progress rather than a step count, so that neither the batch size nor the number of workers enters.
"""

import math


def linear(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 in a straight line to `end` at progress 1; constant outside."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1 (SGDR, Loshchilov & Hutter 2017, eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def warmup(start: float, end: float, progress: float, length: float) -> float:
    """Linear from `start` to `end` over the first `length` of the run (a fraction), then constant at `end`."""
    return end if progress >= length else linear(start, end, progress / length)
