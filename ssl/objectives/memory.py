"""A memory of past embeddings: negatives for MoCo (He et al. 2020), company for SwAV's small batches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.distributed import gather, rank, world_size
from objectives.precision import full_precision


class Queue(nn.Module):
    """The last `size` embeddings of all ranks, first in, first out, the same on every rank.

    `observe` keeps a step's embeddings back until `update`, so that they join after the loss that they made was
    computed and differentiated. A batch accumulated in parts enters whole; of one larger than the queue, its end.

    Args:
        size: number of rows.
        shape: of a row: the embedding's width, or (views, width) of what belongs together.
    """

    rows: Tensor
    enqueued: Tensor

    def __init__(self, size: int, *shape: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, *shape), dim=-1))
        # How many ever came; the next row's place is this modulo the size.
        self.register_buffer("enqueued", torch.zeros((), dtype=torch.int64))
        self.observed: list[Tensor] = []

    @property
    def full(self) -> bool:
        """Whether every row is an embedding; those not yet replaced are random directions."""
        return bool(self.enqueued >= len(self.rows))

    def share(self) -> Tensor:
        """This rank's part of the rows; those of all ranks together are the queue."""
        return self.rows[rank() :: world_size()]

    def observe(self, embeddings: Tensor) -> None:
        """Let this rank's `embeddings` [B, *shape] join at the next update; B is the same on all ranks."""
        self.observed.append(full_precision(embeddings.detach()))

    @torch.no_grad()
    def update(self) -> None:
        """Replace the oldest rows by what every rank observed since the last update; nothing where nothing was."""
        if self.observed:
            joined = gather(torch.cat(self.observed))
            places = self.enqueued + torch.arange(len(joined), device=joined.device)
            newest = slice(-len(self.rows), None)
            self.rows.index_copy_(0, places[newest] % len(self.rows), joined[newest])
            self.enqueued += len(joined)
            self.observed.clear()
