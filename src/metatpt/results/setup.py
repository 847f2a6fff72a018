"""What a run was made with, as far as it can move a number: versions, revision, hardware."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from .files import replaced

SETUP = "setup.json"

_PACKAGES = ("metatpt", "torch", "torchvision", "lightning", "open_clip_torch", "higher", "pillow", "numpy", "timm")


def read_setup(folder: str | Path) -> dict[str, Any]:
    """The setup of a run; empty where it was stopped before it had one."""
    file = Path(folder) / SETUP
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content


def write_setup(folder: str | Path, content: dict[str, Any]) -> Path:
    """Write the setup of a run; returns the file.

    Raises:
        OSError: It cannot be written.
    """
    file = Path(folder) / SETUP
    with replaced(file) as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
    return file


def check_same_setup(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a run under another setup.

    Args:
        before: That of the run; what it does not say may be anything.
        now: What has to be the same. Where things lie is not in it, but what they hold.

    Raises:
        ValueError: Naming each difference.
    """
    now = json.loads(json.dumps(now))  # tuples as lists
    shared = {name: value for name, value in now.items() if name in before}
    earlier, later = (dict(leaves(each)) for each in ({name: before[name] for name in shared}, shared))
    lines = [
        f"{name}: {later.get(name)!r} (the run: {earlier.get(name)!r})"
        for name in dict.fromkeys([*earlier, *later])
        if earlier.get(name) != later.get(name)
    ]
    if lines:
        raise ValueError(
            "The run cannot go on, since what it was made with has changed:\n  "
            + "\n  ".join(lines)
            + "\nBring it back, or start a new run with --run."
        )


def file_hash(file: str | Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested options, by the names that the command line has for them.

    >>> dict(leaves({"model": {"class_path": "A", "init_args": {"bounds": {"scale": 2}}}, "seed_everything": 0}))
    {'model.class_path': 'A', 'model.bounds.scale': 2, 'seed_everything': 0}
    """
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, each in value.items():
        yield from leaves(each, name if key == "init_args" else f"{name}.{key}".lstrip("."))


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute something."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def revision(folder: str | Path) -> str | None:
    """The git commit that a folder is at, with ``-dirty`` where files differ from it; None where there is none.

    Args:
        folder: A folder of a working tree.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def revisions() -> dict[str, str | None]:
    """The git commit of this package, where it runs from a clone, and that of the working folder."""
    package = Path(__file__).resolve().parent
    installed = any(part in ("site-packages", "dist-packages") for part in package.parts)  # in whose venv's project?
    return {"metatpt": None if installed else revision(package), "working_folder": revision(Path.cwd())}


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine of this process.

    Args:
        device: What it computes on.
    """
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
