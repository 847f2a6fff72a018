"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, here and in all processes that tests start: several of them share the cores (pytest -n), and
# threads that wait for each other in a loop, OpenMP's default, take the time of those that compute.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
from helpers.models import save_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP as a model folder."""
    return save_folder("openai_vit", tmp_path_factory.mktemp("models") / "tiny")
