"""The command line on a small model and a few pictures, in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.command_line import CommandLine, write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of two classes."""
    root = write_pictures(tmp_path_factory.mktemp("data") / "pets", "cat", "dog")
    shutil.copy(root / "cat" / "0000.png", root / "dog" / "last.png")
    return root


@pytest.fixture
def metatpt(
    capsys: pytest.CaptureFixture[str],
    tiny_clip_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> CommandLine:
    """The command line; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return CommandLine(capsys, tiny_clip_folder, pictures)
