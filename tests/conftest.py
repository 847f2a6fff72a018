"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import save_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP as a model folder."""
    return save_folder("openai_vit", tmp_path_factory.mktemp("models") / "tiny")
