"""What of a frozen backbone a linear classifier reads: class token, mean of the cells, or both, of one layer or four.

Which of them shows the classes best differs by architecture and by objective, so the classifier chooses (DINOv2's
eval/linear.py: Oquab et al. 2023, section 7.1): `class_1`, `class_4`, `both_1` and `both_4` are its four, where `both`
has the mean of the last layer's cells alone; `mean_1` and `mean_4` are those of a network without a class token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LAST = (1, 4)
"""Of so many last layers, or of as many as there are; DINOv2's."""

WORDS = {"pooled": "the pooled features", "class": "the class token", "mean": "the mean of the cells"}


def names(summaries: Sequence[Tensor]) -> list[str]:
    """What can be read of layers [..., S, D_l], as `Features.summaries` has them."""
    if not summaries:
        return []
    kinds = ("class", "mean", "both") if summaries[-1].shape[-2] > 1 else ("mean",)
    return [f"{kind}_{last}" for last in LAST if last == 1 or len(summaries) > 1 for kind in kinds]


def pool(name: str, summaries: Sequence[Tensor]) -> Tensor:
    """The features [..., D] of that name."""
    kind, last = name.split("_")
    of = summaries[-int(last) :]
    read = [layer[..., -1 if kind == "mean" else 0, :] for layer in of]
    return torch.cat([*read, of[-1][..., -1, :]] if kind == "both" else read, dim=-1)


def in_words(name: str) -> str:
    """ "class_4" as "the class token of the last 4 layers"."""
    kind, _, last = name.partition("_")
    if kind == "both":
        many = f"tokens of the last {last} layers" if last != "1" else "token"
        return f"the class {many} and the mean of the cells"
    return WORDS.get(kind, name) + (f" of the last {last} layers" if last not in ("", "1") else "")
