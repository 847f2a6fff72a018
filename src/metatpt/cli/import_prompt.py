"""``metatpt import-prompt``: a checkpoint of an official trainer becomes one of this package."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning
import torch
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.clip.text import text_tower, token_embedding
from metatpt.clip.tokens import Position
from metatpt.datamodules.names import read_class_names
from metatpt.modules import ZeroShotModule
from metatpt.prompts import PromptLearner
from metatpt.prompts.official import OfficialPrompt, read_official, recognise
from metatpt.prompts.towers import n_blocks as blocks_of

from .errors import RunError, UsageError, did_you_mean

HELP = """usage: metatpt import-prompt FILE --to FILE --clip NAME|FOLDER [options]

Make a checkpoint out of one of the official trainers of CoOp, CoCoOp, MaPLe, MMRL, UPT (the authors', MVLPT's) or VPT.

options:
  FILE                      model-best.pth.tar of an official trainer; no code in it is run
  --to FILE                 where the checkpoint goes: what --ckpt_path takes
  --clip NAME|FOLDER        the CLIP that it was trained with; the official ViT-B/16 is ViT-B-16-quickgelu
  --pretrained TAG|FILE     its weights; the official ones are openai
  --template TEXT           what the class prompts are made from (default: the official code's, a photo of a {}.)
  --class_names NAMES       the classes that it was trained on, in order: a file with one a line, or cat,dog.
                            Needed where each class has a context of its own, and for MMRL
  --position POSITION       of the class name, for CoOp, whose files do not tell: end (default), middle, front
  --first_block N           of MMRL, whose files do not tell: the first block with tokens (default: the uppermost ones)

--model.clip, --model.pretrained, --model.template and --data.class_names will do too."""

_ROUNDING = 0.01  # of embeddings that a file holds in half precision
_ANY_CLASS = "a"  # for a prompt that goes with any classes; the template's own word, which every model knows


def import_prompt(arguments: list[str]) -> int:
    """Run the command.

    Returns:
        Exit status: 0.

    Raises:
        UsageError: An option that is missing or does not fit.
        RunError: The file is no official checkpoint, or does not fit the CLIP, or the checkpoint cannot be written.
    """
    given = _parse(arguments)
    if given.help:
        print(HELP)
        return 0
    names = _class_names(given.class_names)
    try:
        official = recognise(read_official(given.file), given.template, given.position)
        trained_on, remark = _trained_classes(official, names)
        module = _build(official, given, trained_on)
        checkpoint = make_checkpoint(module, official, trained_on)
    except (ValueError, OSError, ImportError) as error:
        raise RunError(f"{given.file}: {str(error).removeprefix(f'{given.file}: ')}") from error
    _write(checkpoint, given.to)
    _tell(official, module.prompt, remark, given)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--clip", "--model.clip")
    parser.add_argument("--pretrained", "--model.pretrained")
    parser.add_argument("--template", "--model.template")
    parser.add_argument("--class_names", "--data.class_names")
    parser.add_argument("--position", choices=get_args(Position))
    parser.add_argument("--first_block", type=int)
    parser.add_argument("-h", "--help", action="store_true")
    usage = "metatpt import-prompt FILE --to FILE --clip NAME|FOLDER"
    try:
        given, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}: {usage}.") from error
    if given.help:
        return given
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UsageError(f"{unknown[0]}: there is no such option. {did_you_mean(unknown[0], known)}")
    if given.file is None:
        raise UsageError(f"Which file? {usage} takes one that an official trainer has written (model-best.pth.tar).")
    if given.to is None:
        raise UsageError(f"Where to? {usage} writes a checkpoint, for instance prompt.ckpt.")
    if given.clip is None:
        raise UsageError(
            f"Which CLIP was it trained with? {usage}; the official code's is mostly --clip ViT-B-16-quickgelu "
            "--pretrained openai."
        )
    given.file, given.to = given.file.expanduser(), given.to.expanduser()
    if given.to.exists():
        raise UsageError(f"--to {given.to}: there is such a file already. Give another name, or remove it.")
    return given


def _class_names(text: str | None) -> list[str] | None:
    try:
        return None if text is None else read_class_names(text)
    except (ValueError, OSError) as error:
        raise UsageError(f"--class_names: {error}.") from error


def _trained_classes(official: OfficialPrompt, names: list[str] | None) -> tuple[list[str] | None, str]:
    """The classes that a prompt was trained on, where they are known, and what there is to say about them."""
    number = official.n_classes
    if names is None:
        if official.needs_classes:
            count = f"the {number} classes" if number else "the classes"
            raise ValueError(
                f"{official.method}'s prompt needs the names of {count} that it was trained on, in their order, since "
                f"{official.needs_classes}: give them with --class_names"
            )
        return None, ""
    if number in (None, len(names)):
        return names, ""
    if official.needs_classes:
        raise ValueError(
            f"it was trained on {number} classes, and --class_names has {len(names)}; {official.needs_classes}, so "
            "give those that it was trained on"
        )
    return None, (
        f"it was trained on {number} classes, and --class_names has {len(names)}. Its prompt is shared by all classes "
        "and goes with any"
    )


def _build(official: OfficialPrompt, given: argparse.Namespace, trained_on: list[str] | None) -> ZeroShotModule:
    """A module with the learner that the file is for; its parameters are still where they start."""
    package, _, name = official.class_path.rpartition(".")
    cls = getattr(importlib.import_module(package), name, None)
    if cls is None:
        raise ValueError(f"{official.method}'s prompt is a {name}, which this version of metatpt does not have")
    if given.first_block is not None and official.n_blocks is None:
        raise ValueError(f"--first_block is an option of MMRL's files; this is {official.method}")

    def make(clip: FrozenCLIP, class_names: list[str], template: str) -> PromptLearner:
        options = dict(official.options)
        if official.n_blocks is not None:
            first = _uppermost(clip, official.n_blocks) if given.first_block is None else given.first_block
            options |= {"first_block": first, "last_block": first + official.n_blocks - 1}
        prompt: PromptLearner = partial(cls, **options)(clip, class_names, template)
        return prompt

    return ZeroShotModule(given.clip, given.pretrained, official.template, trained_on or [_ANY_CLASS], prompt=make)


def _uppermost(clip: FrozenCLIP, n_blocks: int) -> int:
    """Number of the first of so many blocks, counted from 1, where the last one is the lower tower's last."""
    return min(blocks_of(text_tower(clip.model)), blocks_of(clip.model.visual)) - n_blocks + 1


def make_checkpoint(module: ZeroShotModule, official: OfficialPrompt, trained_on: list[str] | None) -> dict[str, Any]:
    """What ``--ckpt_path`` takes: the module's own checkpoint with the file's parameters in it.

    Raises:
        ValueError: They do not fit the model; says which, and what was expected.
    """
    prompt = module.prompt
    _check_shapes(prompt, official)
    _check_start_token(prompt.clip, official)
    with torch.no_grad():
        for name, value in official.parameters.items():
            prompt.tuned[name].copy_(value)
    options = {key: module.hparams[key] for key in ("clip", "pretrained", "template", "prompt")}
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "hparams_name": "kwargs",
        "hyper_parameters": options if trained_on is None else {**options, "class_names": trained_on},
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _check_shapes(prompt: PromptLearner, official: OfficialPrompt) -> None:
    ours: Mapping[str, Tensor] = dict(prompt.tuned.items())
    if set(ours) != set(official.parameters):
        raise ValueError(
            f"{official.method}'s file gives {', '.join(sorted(official.parameters))}, and {type(prompt).__name__} for "
            f"{prompt.clip.name} has {', '.join(sorted(ours))}: the file was made for another CLIP"
        )
    for name, value in official.parameters.items():
        expected, found = list(ours[name].shape), list(value.shape)
        if expected != found:
            pairs = zip(expected, found, strict=False)
            differs = next((pair for pair in pairs if pair[0] != pair[1]), (len(expected), len(found)))
            raise ValueError(
                f"{name}: width {differs[0]} expected, {differs[1]} found (shape {found}, and {prompt.clip.name} needs "
                f"{expected}): the file was made for another CLIP; name that one with --clip and --pretrained"
            )


def _check_start_token(clip: FrozenCLIP, official: OfficialPrompt) -> None:
    """Another CLIP of the same sizes has other embeddings, of which most files hold some."""
    if official.start_token is None:
        return
    number = int(clip.tokenize("{}", [_ANY_CLASS]).ids[0, 0])
    ours = token_embedding(clip.model).weight[number].detach().float()
    difference = float((ours - official.start_token).norm() / ours.norm().clamp(min=1e-6))
    if difference > _ROUNDING:
        raise ValueError(
            f"the file's embedding of the start token differs from {clip.name}'s by {difference:.0%} of its length: "
            "it was made for another CLIP of the same sizes; name that one with --clip and --pretrained"
        )


def _write(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a file that is whole or not there."""
    partial_file = file.with_name(f"{file.name}.partial")
    try:
        with partial_file.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial_file.replace(file)
    except (OSError, RuntimeError) as error:  # torch's writer says a full disk as a RuntimeError
        raise RunError(f"--to {file}: the checkpoint cannot be written: {error}.") from error
    finally:
        with suppress(OSError):
            partial_file.unlink(missing_ok=True)


def _tell(official: OfficialPrompt, prompt: PromptLearner, remark: str, given: argparse.Namespace) -> None:
    options = ", ".join(f"{name} {value}" for name, value in prompt.config["init_args"].items())
    lines = {
        "Found": f"{official.method}; {official.details}",
        "Layout": official.layout,
        "Prompt": f"{official.class_path} ({options})",
        "Template": official.template,
        "Ignored": "; ".join(official.ignored),
        "Classes": remark,
        "Checkpoint": str(given.to),
    }
    for name, text in lines.items():
        if text:
            print(f"{name}: {text}")
