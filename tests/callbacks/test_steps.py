"""What callbacks share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from metatpt.callbacks.steps import raise_together


def trainer(others_failed: int) -> SimpleNamespace:
    """A trainer on three processes, of which so many others have failed."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda own, reduce_op: own + others_failed)
    return SimpleNamespace(strategy=strategy, world_size=3)


def test_all_processes_end_where_one_has_failed():
    raise_together(trainer(0), None)
    with pytest.raises(OSError, match="disk"):
        raise_together(trainer(0), OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        raise_together(trainer(1), OSError("disk"))
    with pytest.raises(RuntimeError, match="2 of 3 processes could not start"):
        raise_together(trainer(2), None)
