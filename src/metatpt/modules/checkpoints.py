"""Checkpoints hold what is learned, never CLIP's weights, and load without running code."""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import AdaptationModule

_log = logging.getLogger(__name__)

_OF_META_TRAINING = ("learned.", "view_start.")
"""What meta training learns beside the prompt, which other methods can start from without it."""


def check_fits(module: AdaptationModule, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another CLIP, and missing or unknown learned values; leave out what is of no use.

    Raises:
        ValueError: Saying what was expected and what was found.
    """
    check_clip(module, checkpoint)
    module.prompt.trained_on(checkpoint.get("hyper_parameters", {}).get("class_names") or module.class_names)
    expected, found = learned(module.state_dict()), checkpoint["state_dict"]
    others = [name for name in found if name.startswith(_OF_META_TRAINING) and name not in expected]
    if others:
        _log.warning("%s has no use for %s of the checkpoint", type(module).__name__, ", ".join(others))
        checkpoint["state_dict"] = found = {name: found[name] for name in found if name not in others}
    check_shapes(type(module).__name__, expected, found)


def check_clip(module: AdaptationModule, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another CLIP.

    Raises:
        ValueError: Naming both.
    """
    made_for, ours = checkpoint.get("clip"), module.clip.fingerprint()
    if made_for is None:
        raise ValueError("this is no checkpoint of metatpt: it does not say which CLIP it was made for")
    if made_for["fingerprint"] != ours:
        raise ValueError(
            f"the checkpoint was made for {made_for['name']} with weights {made_for['pretrained']} (SHA-256 "
            f"{made_for['fingerprint'][:12]}), and this is {module.clip.name} with {module.clip.pretrained} "
            f"({ours[:12]}): choose that model with --model.clip and --model.pretrained"
        )


def check_shapes(who: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse values that are missing, unknown, or of another shape.

    Args:
        who: Learns them.
        expected: What it has.
        found: What a checkpoint holds.

    Raises:
        ValueError: Naming each.
    """
    lines = [f"{name} is not in the checkpoint" for name in expected if name not in found]
    lines += [f"{name} is in the checkpoint alone" for name in found if name not in expected]
    lines += [
        f"{name} is {list(found[name].shape)} in the checkpoint and {list(value.shape)} here"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if lines:
        raise ValueError(f"the checkpoint holds something else than {who} learns: {'; '.join(lines)}")


def start_prompt(module: AdaptationModule, path: str | Path) -> None:
    """Give a module's prompt the values of a checkpoint's, and nothing else of it.

    Raises:
        ValueError: It was made for another CLIP, or holds another prompt.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    check_clip(module, checkpoint)
    state = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("prompt.")}
    ours = {name: value for name, value in learned(module.state_dict()).items() if name.startswith("prompt.")}
    check_shapes(type(module.prompt).__name__, ours, state)
    module.prompt.trained_on(checkpoint.get("hyper_parameters", {}).get("class_names") or module.class_names)
    module.load_state_dict(state, strict=False)


def learned(state: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a state dictionary that a checkpoint holds."""
    return {key: value for key, value in state.items() if not key.startswith("prompt.clip.")}


def plain(value: Any) -> Any:
    """A value as ``torch.load(weights_only=True)`` takes it: dataclasses as dictionaries, paths and enums as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    return value if value is None or isinstance(value, (bool, int, float, str, Tensor)) else str(value)
