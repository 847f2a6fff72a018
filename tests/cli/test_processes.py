"""What needs a process of its own: the two ways to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.command_line import rows

MY_METHOD = '''"""Zero-shot, sharpened."""

from typing import Any

from metatpt.functional import entropy
from metatpt.modules import AdaptationModule
from metatpt.types import Adaptation, Batch


class MyModule(AdaptationModule):
    """Zero-shot predictions, sharpened.

    Args:
        my_option: By which power.
        **kwargs: See AdaptationModule.
    """

    tunes = False

    def __init__(self, my_option: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.my_option = my_option

    def adapt(self, batch: Batch) -> Adaptation:
        """Sharpen the prediction of each picture."""
        features = self.prompt.encode(batch.image[:, None])
        zero_shot = self.log_probs(self.prompt.head(), features)[:, 0]
        sharp = (self.my_option * zero_shot).log_softmax(-1)
        return Adaptation(sharp, zero_shot, diagnostics={"sharp_entropy": entropy(sharp)})
'''


def run(folder: Path, command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = [*command, *map(str, arguments)]
    return subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("start", ["module", "script"])
def test_a_method_of_the_user_in_the_working_folder(tiny_clip_folder: Path, pictures: Path, tmp_path: Path, start: str):
    (tmp_path / "my_method.py").write_text(MY_METHOD)
    assert len(MY_METHOD.splitlines()) <= 40
    command = (
        [sys.executable, "-m", "metatpt"] if start == "module" else [str(Path(sys.executable).with_name("metatpt"))]
    )
    options = ["--data", "FolderDataModule", "--data.root", pictures, "--model.clip", tiny_clip_folder, "--run", "out"]
    result = run(tmp_path, command, "test", "--model", "my_method.MyModule", "--model.my_option", 3, *options)
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["model"]["class_path"] == "my_method.MyModule"
    assert config["model"]["init_args"]["my_option"] == 3
    assert all(float(row["sharp_entropy"]) >= 0 for row in rows(tmp_path / "out"))
    assert "MyModule" in result.stdout
    assert "top-1 accuracy" in result.stdout
