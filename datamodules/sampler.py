"""Which process takes which samples, each exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FILLER = -1
"""Index that stands for no sample: the data set answers it with a row that nothing counts."""


class UnrepeatedSampler(DistributedSampler[int]):
    """Deals samples out to processes without padding them with duplicates.

    PyTorch's and Lightning's sampler count 7 samples on 2 processes as 8. A process that gets no sample would end
    before the others' reduction, so it gets one :data:`FILLER`. It is a ``DistributedSampler`` in name only: Lightning
    replaces any other kind, unless the Trainer has ``use_distributed_sampler=False``.

    Args:
        indices: Places of the samples in the whole split, in order.
        num_replicas: Number of processes.
        rank: Number of this process.
    """

    def __init__(self, indices: Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"Expected a rank from 0 to {num_replicas - 1}, got {rank}.")
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0  # Lightning sets it; the order of evaluation does not change
        self.shard = list(indices[rank::num_replicas]) or [FILLER]

    def __iter__(self) -> Iterator[int]:
        return iter(self.shard)

    def __len__(self) -> int:
        return len(self.shard)
