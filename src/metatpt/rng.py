"""Random numbers of a sample, from (seed, index) and nothing else; in training from (seed, epoch, index).

Numbers drawn here do not depend on batch size, order, workers, devices or where a run was resumed.
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import torch


def run_seed() -> int:
    """The seed of the run: what ``--seed_everything`` set (through Lightning's ``seed_everything``), else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def sample_generator(seed: int, index: int, stream: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator for one purpose of one sample.

    Args:
        seed: Seed of the run.
        index: Number of the sample in its whole split.
        stream: Name of what is drawn (``"views"``, ...): streams of one sample are independent.
        epoch: Epoch of training that the sample is met in (:attr:`metatpt.types.Batch.epoch`); outside training 0.
    """
    words = _words(seed, index, stream, epoch)
    return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))


def numpy_generator(seed: int, index: int, stream: str, epoch: int = 0) -> np.random.Generator:
    """As :func:`sample_generator`, for what draws its numbers through numpy."""
    return np.random.default_rng(_words(seed, index, stream, epoch))


def _words(seed: int, index: int, stream: str, epoch: int) -> np.random.SeedSequence:
    entropy = [seed & (2**63 - 1), index & (2**63 - 1), zlib.crc32(stream.encode())]
    return np.random.SeedSequence([*entropy, epoch] if epoch else entropy)  # numbers of evaluations are published
