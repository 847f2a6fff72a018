"""The command line in process, and small folders of pictures for it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from metatpt.cli import main


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error: what stands after the program's name."""
        return self.err.partition("metatpt: ")[2]


class CommandLine:
    """Runs commands in the working folder.

    Args:
        capsys: Takes what they print.
        clip: Folder of the model.
        pictures: Folder of class folders.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], clip: Path, pictures: Path) -> None:
        self._capsys = capsys
        self.clip = clip
        self.pictures = pictures

    def __call__(self, *arguments: object) -> Result:
        self._capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *self._capsys.readouterr())

    def small(self, command: str, *arguments: object) -> Result:
        """A command with the small model on the small folder."""
        return self(command, *self.small_options, *arguments)

    @property
    def small_options(self) -> list[str]:
        data = ["--data", "FolderDataModule", "--data.root", str(self.pictures)]
        return ["--model.clip", str(self.clip), "--trainer.accelerator", "cpu", *data]

    def config(self, *arguments: object) -> dict[str, object]:
        """What `test` would run."""
        result = self("test", "--print_config", *arguments)
        assert result.status == 0, result.err
        content: dict[str, object] = yaml.safe_load(result.out)
        return content


def write_pictures(root: Path, *classes: str, n: int = 3, size: tuple[int, int] = (50, 40), seed: int = 0) -> Path:
    """Random pictures in class folders, or without classes in one folder."""
    random = np.random.default_rng(seed)
    for folder in [root / name for name in classes] or [root]:
        folder.mkdir(parents=True)
        for number in range(n):
            pixels = random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return root


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run."""
    with (run / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))
