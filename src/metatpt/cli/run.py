"""The folder of a run: named once, handed on to the processes that the run starts, with the config that made it."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader
from lightning.pytorch import Callback, LightningModule, Trainer, loggers
from lightning.pytorch.utilities import rank_zero_only

from metatpt.results import check_unused
from metatpt.results.files import replaced
from metatpt.results.record import CONFIG

from .request import Request, structure

RUN_FOLDER = "<run>"
"""Stands in a config for the folder of the run, whichever it will be."""

_RUNS = "runs"
_HANDED_ON = "METATPT_RUN"
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


def is_rank_zero() -> bool:
    """Whether this is the process that speaks for all of its machine."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def run_folder(given: str | None, resumed: str | None, method: type, data: type) -> Path:
    """The folder to write to, which is made. It is a new one, unless it was given or handed on.

    Args:
        given: ``--run``.
        resumed: ``--resume``, which holds a run.
        method: Class of the model, for the name of a new one.
        data: Class of the datamodule, likewise.

    Raises:
        FileExistsError: It holds a run.
        OSError: It cannot be made.
    """
    # A process that another one has started: that one has named the folder.
    if _HANDED_ON in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[_HANDED_ON])
    if resumed is not None:
        return Path(resumed).expanduser()
    is_first = is_rank_zero() and os.environ.get("NODE_RANK", "0") == "0"
    if given is not None:
        folder = Path(given).expanduser()
        if is_first:
            check_unused(folder)
            _make(folder)
    else:
        names = [re.sub("(Data)?Module$", "", each.__name__).lower() for each in (method, data)]
        folder = _new_folder(Path(_RUNS) / "-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), *names]), is_first)
    os.environ[_HANDED_ON] = str(folder)
    return folder


def _new_folder(wanted: Path, claim: bool) -> Path:
    if not claim:  # process 0 tells the others its folder before anything is written
        return wanted
    _make(wanted.parent)
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:  # of a run that started in the same second
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The run folder {folder} cannot be made ({error.strerror}): give one with --run.") from error


def leave_no_empty_folder(folder: Path) -> None:
    """Takes a run folder away again, if nothing came into it (a model that could not be loaded, say)."""
    if folder != Path():
        with contextlib.suppress(OSError):
            for inner in folder.iterdir():  # of a logger
                inner.rmdir()
            folder.rmdir()
            if folder.parent == Path(_RUNS):
                folder.parent.rmdir()


class SaveConfig(Callback):
    """Writes the config of the run into its folder, once the data are there and the run starts.

    A run that goes on keeps its own.

    Args:
        folder: The run folder.
        text: What is written.
    """

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.text = text

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes `config.yaml`."""
        if trainer.is_global_zero and not (self.folder / CONFIG).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced(self.folder / CONFIG) as stream:
                stream.write(self.text)


def config_text(parser: ArgumentParser, config: Namespace) -> str:
    """A config that runs again as it stands, with any of the commands.

    Args:
        parser: The parser of a command.
        config: What it has parsed.
    """
    config = config.clone()
    for key in ("config", "run", "resume"):
        config.pop(key, None)
    if config.get("ckpt_path") is None:
        config.pop("ckpt_path", None)
    dumped = get_loader("yaml")(parser.dump(config, skip_unset=False))
    return dump(_as_typed(dumped, config.as_dict()))


class _Dumper(yaml.SafeDumper):
    """Writes text that jsonargparse would read as a number (``1e3``) in quotes."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def dump(config: dict[str, Any]) -> str:
    """A config as YAML that jsonargparse reads back."""
    text: str = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _as_typed(dumped: Any, parsed: Any) -> Any:
    """What was dumped, with text as it was parsed: jsonargparse dumps the text ``1e3`` as the number 1000.0."""
    if isinstance(parsed, str):
        return parsed
    if isinstance(dumped, dict) and isinstance(parsed, dict):
        return {key: _as_typed(value, parsed.get(key)) for key, value in dumped.items()}
    if isinstance(dumped, list) and isinstance(parsed, list) and len(dumped) == len(parsed):
        return [_as_typed(*pair) for pair in zip(dumped, parsed, strict=True)]
    return dumped


def keep_loggers_in_run_folder(request: Request) -> None:
    """Loggers write into the run folder, where nothing else was asked for (some of them insist on being told)."""
    trainer = request.config.get("trainer")
    if isinstance(trainer, dict) and "logger" in trainer:
        trainer["logger"] = _in_run_folder(trainer["logger"])
    for place, (key, value) in enumerate(request.options):
        if key.removesuffix("+") == "trainer.logger":
            logger = _in_run_folder(structure(value))
            request.options[place] = key, logger if isinstance(logger, str) else json.dumps(logger)


def _in_run_folder(logger: Any) -> Any:
    if isinstance(logger, list):
        return [_in_run_folder(each) for each in logger]
    whole = {"class_path": logger} if isinstance(logger, str) else logger
    if not isinstance(whole, dict) or not isinstance(whole.get("class_path"), str):
        return logger
    cls = getattr(loggers, whole["class_path"].rpartition(".")[2], None)
    if cls is None or "save_dir" not in inspect.signature(cls).parameters:
        return logger
    return {**whole, "init_args": {"save_dir": RUN_FOLDER, **(whole.get("init_args") or {})}}


def with_run_folder(value: Any, folder: Path) -> Any:
    """`value` with the folder of the run in place of :data:`RUN_FOLDER`."""
    if isinstance(value, str):
        return value.replace(RUN_FOLDER, str(folder))
    if isinstance(value, Namespace):
        return type(value)(**{key: with_run_folder(each, folder) for key, each in vars(value).items()})
    if isinstance(value, dict):
        return {key: with_run_folder(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [with_run_folder(each, folder) for each in value]
    return value
