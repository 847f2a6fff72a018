"""Which process takes which samples: each exactly once, or in training equally many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data.distributed import DistributedSampler

from metatpt.rng import sample_generator

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


class TrainingSampler(DistributedSampler[tuple[int, int]]):
    """Deals samples out in an order that follows from seed and epoch; every process gets equally many.

    In training a process that has fewer batches than the others leaves them waiting: as in PyTorch's sampler, some
    samples are taken twice where they cannot be shared out evenly. A sample comes with its epoch, which seeds what is
    random about it: workers that outlive an epoch would not see it change in the data set.

    Args:
        indices: Places of the samples in the whole split.
        seed: Seed of the run.
        num_replicas: Number of processes.
        rank: Number of this process.
    """

    def __init__(self, indices: Sequence[int], seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(indices, num_replicas, rank, seed=seed)  # type: ignore[arg-type]  # it asks for the length
        self.indices = list(indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, size = self.epoch, len(self.indices)  # Lightning sets the epoch before each
        order = torch.randperm(size, generator=sample_generator(self.seed, 0, "order", epoch)).tolist()
        mine = range(self.rank, self.total_size, self.num_replicas)
        return iter([(epoch, self.indices[order[place % size]]) for place in mine])
