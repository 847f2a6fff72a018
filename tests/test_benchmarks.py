"""The measuring scripts run; what they measure is nobody's test."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the scripts read peak memory from /proc")
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            'methods.py --model ViT-S-32 --views 12 --classes 3 --plain --methods TPT "MetaTPT, 10 %"',
            ["| MetaTPT, 10 % |", "| TPT, plain |", "making the views:"],
        ),
        ("text_tower.py --model ViT-S-32 --classes 4 --chunk 3", ["| 4 |"]),
        ("footprint.py --models ViT-S-32", ["| ViT-S-32 |"]),
        ("loading.py --pictures 8 --workers 1", ["| datamodule |", "| ImageFolder | "]),
        ("loop.py --samples 6", ["| TPTModule |", "| MetaTPTModule |"]),
        ("record.py --samples 2 --method ZeroShotModule", ["| ZeroShotModule | RunRecord |", "| CostMeter |"]),
        ("scaling.py --samples 3 --method ZeroShotModule", ["| 2 / 1 |", "| ZeroShotModule |"]),
    ],
)
def test_a_script_prints_its_table(command: str, expected: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *shlex.split(command), "--repeats", "1", "--threads", "1"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=500,  # on a machine that has other things to do
    )
    assert result.returncode == 0, result.stderr
    for text in expected:
        assert text in result.stdout
