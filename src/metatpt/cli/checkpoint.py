"""``--ckpt_path``: what a checkpoint was made with, beside what it is run with."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

_INTERNAL = ("_instantiator", "_class_path", "class_names")
_CLIP = {"name", "pretrained", "fingerprint"}


@dataclass(frozen=True)
class Checkpoint:
    """What the command line reads of a checkpoint.

    Attributes:
        path: Where it lies, as it was given.
        options: Those of the model that it was made with.
        epochs: How many epochs of training it has seen.
        trains_on: Whether it holds the state of an optimiser, so that training can go on from it.
    """

    path: str
    options: dict[str, Any]
    epochs: int
    trains_on: bool


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint, and refuse what is none.

    Raises:
        UsageError: There is no such file, or it is no checkpoint that this package has made.
    """
    file = Path(path).expanduser()
    place = f"--ckpt_path {path}"
    if not file.is_file():
        raise UsageError(f"{place}: there is no such file.")
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights" in reason.lower():  # torch's advice to load it nevertheless
            reason = "it holds more than tensors and plain values"
        raise UsageError(f"{place}: not a checkpoint that loads without running code: {reason}.") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UsageError(f"{place}: not a checkpoint of Lightning (it has no state_dict).")
    options, state, clip = content.get("hyper_parameters", {}), content["state_dict"], content.get("clip")
    if not isinstance(options, dict):
        raise UsageError(f"{place}: not a checkpoint of metatpt (its hyper_parameters are no options).")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{place}: not a checkpoint of metatpt (its state_dict holds more than tensors).")
    if clip is None:
        raise UsageError(
            f"{place}: this is no checkpoint of metatpt: it does not say which CLIP it was made for. One of an "
            "official trainer (CoOp, MaPLe, ...) becomes one: metatpt import-prompt FILE --to FILE."
        )
    if not (isinstance(clip, dict) and clip.keys() >= _CLIP):
        raise UsageError(f"{place}: not a checkpoint of metatpt (it does not say which CLIP it was made for).")
    epoch = content.get("epoch", 0)
    return Checkpoint(path, options, epoch + 1 if isinstance(epoch, int) else 0, bool(content.get("optimizer_states")))


def check_goes_on(checkpoint: Checkpoint, class_path: str, max_epochs: int | None) -> None:
    """Refuse to train on from a checkpoint where nothing would come of it.

    Args:
        checkpoint: Where training is to go on from.
        class_path: Class of the model that trains.
        max_epochs: After how many epochs it ends, all sessions together; None or -1 for no such end.

    Raises:
        UsageError: It holds no state of an optimiser, is another module's, or has seen all epochs.
    """
    place = f"--ckpt_path {checkpoint.path}"
    if not checkpoint.trains_on:
        raise UsageError(
            f"{place}: training cannot go on from it, since it holds no state of an optimiser. `fit` goes on from what "
            "`fit` has left (checkpoints/last.ckpt in its run folder)."
        )
    theirs = checkpoint.options.get("_class_path")
    if theirs not in (None, class_path):
        raise UsageError(
            f"{place}: {theirs} was trained, and its optimiser does not serve {class_path}: training goes on with the "
            "module that it began with."
        )
    if max_epochs is not None and 0 <= max_epochs <= checkpoint.epochs:
        raise UsageError(
            f"{place}: it has seen {checkpoint.epochs} epochs, and --trainer.max_epochs is {max_epochs}, all sessions "
            "together: give more of them to train on."
        )


def differences(
    saved: Mapping[str, Any], class_path: str, options: Mapping[str, Any], class_names: list[str]
) -> list[str]:
    """What is run otherwise than the checkpoint was made, a line each.

    Args:
        saved: The checkpoint's options.
        class_path: Class of the model that runs.
        options: Its options.
        class_names: The classes that it runs on.
    """
    lines = []
    if saved.get("_class_path") not in (None, class_path):
        lines.append(f"model: {class_path} (checkpoint: {saved['_class_path']})")
    for name in dict.fromkeys([*options, *saved]):
        if name in _INTERNAL or name not in options or name not in saved:
            continue
        ours, theirs = _whole(options[name]), _whole(saved[name])
        if ours != theirs:
            lines.append(f"model.{name}: {ours} (checkpoint: {theirs})")
    theirs = list(saved.get("class_names") or class_names)
    if theirs != class_names:
        lines.append(f"class names: {_some(class_names)} (checkpoint: {_some(theirs)})")
    return lines


def _whole(value: Any) -> Any:
    """A value, of which a config leaves out what is empty."""
    return {"init_args": {}, **value} if isinstance(value, dict) and "class_path" in value else value


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
