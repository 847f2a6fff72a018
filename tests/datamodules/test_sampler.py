"""Samples dealt out to processes."""

import pytest
import torch
from torch.utils.data import DataLoader

from metatpt.datamodules.sampler import FILLER, UnrepeatedSampler


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_sample_once(n, processes):
    samplers = [UnrepeatedSampler(range(10, 10 + n), processes, rank) for rank in range(processes)]
    shards = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(shard) for shard in shards]
    assert sorted(index for shard in shards for index in shard if index != FILLER) == list(range(10, 10 + n))
    for shard in shards:
        assert shard == [FILLER] or (FILLER not in shard and shard == sorted(shard))
    assert min(map(len, shards)) >= 1
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_seven_on_two_are_four_and_three():
    assert [list(UnrepeatedSampler(range(7), 2, rank)) for rank in (0, 1)] == [[0, 2, 4, 6], [1, 3, 5]]


def test_one_process_goes_in_order():
    assert list(UnrepeatedSampler([3, 5, 9])) == [3, 5, 9]


def test_each_pass_is_the_same():
    sampler = UnrepeatedSampler(range(5))
    first = list(sampler)
    sampler.set_epoch(1)  # Lightning's
    assert list(sampler) == first


def test_in_a_loader():
    loader = DataLoader(torch.arange(7), batch_size=3, sampler=UnrepeatedSampler(range(7), 2, 0))
    assert [batch.tolist() for batch in loader] == [[0, 2, 4], [6]]


@pytest.mark.parametrize(("processes", "rank"), [(2, 2), (1, -1), (0, 0)])
def test_wrong_rank(processes, rank):
    with pytest.raises(ValueError, match=f"got {rank}"):
        UnrepeatedSampler(range(7), processes, rank)
