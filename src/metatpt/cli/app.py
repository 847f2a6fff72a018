"""The command line: ``metatpt fit|validate|test|predict``, a LightningCLI."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import metatpt
from metatpt.callbacks import (
    AdaptationProgressBar,
    GracefulStop,
    LogResults,
    ResetPrompts,
    RunRecord,
    ViewGallery,
)
from metatpt.datamodules import BaseDataModule
from metatpt.modules import AdaptationModule
from metatpt.results import failures

from .checkpoint import check_goes_on, differences
from .classes import BASES, PLACES, PROMPT, option_types, options_at
from .doctor import doctor
from .errors import (
    RunError,
    UsageError,
    did_you_mean,
    explain,
    is_check,
    is_lost_process,
    nearest,
    raised_in,
    refused,
    root_cause,
)
from .fit import TellCheckpoint, check_learns, curves, kept
from .help import COMMANDS, class_help, command_help, main_help, option_help, trainer_help
from .import_prompt import import_prompt
from .report import report
from .request import Request, read_request, split_options
from .resume import check_same_config
from .run import (
    SaveConfig,
    config_text,
    dump,
    is_rank_zero,
    keep_loggers_in_run_folder,
    leave_no_empty_folder,
    run_folder,
    with_run_folder,
)
from .surroundings import surroundings

_log = logging.getLogger("metatpt")

_TRAINER_DEFAULTS = {
    "inference_mode": False,  # tuning needs gradients, which enable_grad cannot bring back
    "use_distributed_sampler": False,  # Lightning's pads with duplicates; the datamodules have their own
    "enable_model_summary": False,
    "max_epochs": 50,  # as the papers train on 16 shots; Lightning's null is 1000
}
_FIXED = {"verbose": False, "weights_only": True, "return_predictions": False}
"""What every run hands to the Trainer: the table at the end is RunRecord's, a checkpoint runs no code, and predictions
are not collected in memory, since they are on the disk."""
_SETTLED = {
    "fit": ("weights_only",),
    "validate": ("weights_only", "verbose"),
    "test": ("weights_only", "verbose"),
    "predict": ("weights_only", "return_predictions"),
}

_ALWAYS = {
    ResetPrompts: " and set it with --reset.policy",
    RunRecord: " and set it with --run or --resume",
    GracefulStop: "",
}
"""Callbacks of every run, and how they are set."""

_BY_DEFAULT = (ViewGallery, LogResults)
"""Callbacks that are there unless the user gives her own."""

_HIGHEST_SEED = 2**32 - 1

OnError = Literal["skip", "raise"]


class MetaTPTCLI(LightningCLI):
    """Parses a request, makes the objects and runs the Trainer.

    Args:
        request: What is to run.
        run: Whether to run it; else the config is parsed and that is all.
    """

    def __init__(self, request: Request, run: bool = True) -> None:
        self.request = request
        self.folder = Path()
        self._record: RunRecord | None = None
        self._only_parse = not run
        quiet = {"exit_on_error": False}  # jsonargparse's own errors are pages of usage
        try:
            super().__init__(
                AdaptationModule,
                BaseDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                trainer_defaults=dict(_TRAINER_DEFAULTS),
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={**quiet, request.command: dict(quiet)},
            )
        finally:
            leave_no_empty_folder(self.folder)

    @property
    def options(self) -> Namespace:
        """The parsed config of the command."""
        options: Namespace = self.config[self.request.command]
        return options

    # Parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was given (each costs time), and the arguments of the Trainer's method that are settled."""
        data = {"dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {self.request.command: {"model", *data, *_FIXED}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: always a number, so that a run can be repeated."""
        parser.add_argument("--seed_everything", type=int, default=0, help="The one seed of all random numbers.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, the reset, and the class names, which come from the data."""
        parser.add_argument("--run", type=str | None, default=None, help="Folder of the run.")
        parser.add_argument("--resume", type=str | None, default=None, help="Folder of a run that goes on.")
        parser.add_argument(
            "--on_error", type=OnError | None, default=None, help="What comes of pictures without adapted prediction."
        )
        parser.add_lightning_class_args(ResetPrompts, "reset")
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse files and options of the request.

        Raises:
            UsageError: An option that there is not, or a value that does not fit.
        """
        command = self.request.command
        kinds = {
            action.dest: getattr(action, "_typehint", action.type)
            for action in self._subcommand_parsers[command]._actions
            if action.dest not in ("config", "help", "print_config", "trainer", "reset")
        }
        self._check_names(list(kinds))

        def type_of(key: str) -> Any:
            section, _, option = key.partition(".")
            if key.startswith(f"{PROMPT}."):
                section, option = PROMPT, key.removeprefix(f"{PROMPT}.")
            if section in PLACES and option:
                return option_types(self.request.classes[section]).get(option)
            return kinds.get(key)

        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder, "config.yaml")
            merged.write_text(dump(self.request.config), encoding="utf-8")
            try:
                self.config = parser.parse_args([command, f"--config={merged}", *self.request.arguments])
            except argparse.ArgumentError as error:
                given = {key.replace(".init_args.", "."): value for key, value in self.request.options}
                raise UsageError(explain(str(error), given, type_of, options_at, self.request.sources)) from error
            except Exception as error:
                if not type(error).__module__.startswith("yaml."):
                    raise
                # Of a value that is no YAML, or names a Python object: not every way through jsonargparse catches it.
                raise UsageError(" ".join(str(error).split())) from error

    def _check_names(self, known: list[str]) -> None:
        """Refuse options that neither the Trainer nor this command line has (classes' own were checked before)."""
        config = self.request.config
        written = [f"{part}.{name}" for part in ("trainer", "reset") for name in config.get(part) or {}]
        given = [(key, f"--{key.rstrip('+')}") for key, _ in self.request.options]
        for key, place in [*given, *((key, f"{key} in {self.request.sources}") for key in written)]:
            section, _, option = key.rstrip("+").partition(".")
            if section in BASES and option:
                continue
            if any(f"{key}.".replace("+", "").startswith(f"{name}.") for name in known):
                continue
            everything = [*known]
            for part, cls in self.request.classes.items():
                everything += [f"{part}.{name}" for name in option_types(cls)]
            same = [name for name in everything if name.rpartition(".")[2] == (option or section)]
            near = same or nearest(key.rstrip("+"), everything)
            hint = f"Did you mean {' or '.join(f'--{name}' for name in near)}?" if near else ""
            hint = hint or f"metatpt {self.request.command} --help lists them."
            raise UsageError(f"{place}: there is no such option. {hint}")

    def _parse_ckpt_path(self) -> None:
        """Leaves the config as it is, where Lightning takes over all of the checkpoint's options: see request.py."""
        if self.request.command == "fit" and self.request.checkpoint is not None:
            trained = self.options.model.class_path
            check_goes_on(self.request.checkpoint, trained, self.options.trainer.max_epochs)

    def _set_seed(self) -> None:
        seed = self.options.seed_everything
        if not 0 <= seed <= _HIGHEST_SEED:
            raise UsageError(f"--seed_everything: expected a whole number from 0 to {_HIGHEST_SEED}, got {seed}.")
        if not self._only_parse:
            super()._set_seed()

    # Making objects

    def instantiate_classes(self) -> None:
        """Make data, model and Trainer.

        Raises:
            RunError: One of them refuses its options.
        """
        if self._only_parse:
            return
        parsed, self._text = self.config, self.config_text()
        if self.request.resumed is not None:
            check_same_config(self.request.resumed, self._text)
        try:
            classes = (self.request.classes[section] for section in BASES)
            self.folder = run_folder(self.options.run, self.options.resume, *classes)
            self.config = with_run_folder(parsed, self.folder)
            super().instantiate_classes()
            if self.request.command == "fit":
                check_learns(self.model)
        except Exception as error:
            root = root_cause(error)
            if isinstance(root, (ValueError, OSError, ImportError, MisconfigurationException)):
                raise RunError(str(root)) from root
            raise root from None
        finally:
            self.config = parsed
        checkpoint = self.request.checkpoint
        if checkpoint is not None:
            model = self.options.model
            lines = differences(
                checkpoint.options, model.class_path, model.init_args.as_dict(), list(self.model.class_names)
            )
            if self.request.taken:
                _log.info("from the checkpoint %s: model.%s", checkpoint.path, ", model.".join(self.request.taken))
            _log.info("different from the checkpoint %s: %s", checkpoint.path, "; ".join(lines) or "nothing")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with our callbacks beside the user's."""
        options: Namespace = self._get(self.config_init, "trainer")
        theirs = options.callbacks or []
        theirs = list(theirs) if isinstance(theirs, (list, tuple)) else [theirs]
        for callback in theirs:
            for kind, how in _ALWAYS.items():
                if isinstance(callback, kind):
                    raise ValueError(f"{kind.__name__} is always there: leave it out of trainer.callbacks{how}.")
        self._record = RunRecord(self.folder, resume=self.request.resumed is not None)
        callbacks: list[Callback] = [
            self._get(self.config_init, "reset"),
            SaveConfig(self.folder, self._text),  # before the record: what has one can go on, and needs it
            self._record,  # before all that may fail
            *theirs,
        ]
        callbacks += [kind() for kind in _BY_DEFAULT if not any(isinstance(each, kind) for each in theirs)]
        logger, checkpointing = options.logger, options.enable_checkpointing
        if self.request.command == "fit":
            logger = curves(self.folder) if logger is None else logger
            checkpointing = checkpointing is not False
            callbacks += [*kept(self.folder, theirs, checkpointing, bool(logger)), TellCheckpoint(self.folder)]
        else:  # the record has everything, and nothing is trained
            logger = False if logger is None else logger
            checkpointing = any(isinstance(each, Checkpoint) for each in theirs)
        wanted = options.enable_progress_bar is not False and not options.barebones
        if wanted and not any(isinstance(each, ProgressBar) for each in theirs):
            callbacks.append(AdaptationProgressBar())
        callbacks.append(GracefulStop())  # behind all that keeps something of the batch at hand
        root = options.default_root_dir or str(self.folder)  # what Lightning writes lies in the run folder too
        settings = {**options.as_dict(), "logger": logger, "enable_checkpointing": checkpointing}
        settings |= {"callbacks": callbacks, "default_root_dir": root, **kwargs}
        try:
            trainer: Trainer = self.trainer_class(**settings)
        except TypeError as error:  # of `devices: many`
            if not raised_in(error, "lightning"):
                raise
            raise RunError(refused(error, options.as_dict())) from error
        return trainer

    def config_text(self) -> str:
        """The config as it is saved; of `fit` without the checkpoint that it goes on from, so that it can be tested."""
        options = self.options
        if self.request.command == "fit":
            options = options.clone()
            options.pop("ckpt_path", None)
        return config_text(self._subcommand_parsers[self.request.command], options)

    # Running

    def _run_subcommand(self, subcommand: str) -> None:
        if self._only_parse:
            return
        try:
            super()._run_subcommand(subcommand)
            self._check_outcome(subcommand)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            # A check of this package says what to do; an error from elsewhere needs its traceback.
            if is_check(error):
                raise RunError(str(error)) from error
            if raised_in(error, "lightning.pytorch.callbacks"):  # EarlyStopping of a metric that there is not, say
                raise RunError(" ".join(str(error).split())) from error
            if self.trainer.world_size > 1 and is_lost_process(error):
                raise RunError("another process of this run has ended; if it could, it has said why") from error
            raise
        except MisconfigurationException as error:
            raise RunError(str(error)) from error

    def _check_outcome(self, command: str) -> None:
        """Where the run has finished everything else, it fails if pictures did, unless that was allowed.

        Raises:
            RunError: Naming them.
        """
        on_error = self.options.on_error or ("skip" if command == "predict" else "raise")
        if on_error == "raise" and self._record is not None and self._record.outcome is not None and is_rank_zero():
            failed = failures(self._record.outcome)
            if failed:
                raise RunError(f"{failed}\nEverything else is done. With --on_error skip that is no failure.")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        settled = {name: _FIXED[name] for name in _SETTLED[subcommand]}
        return {**super()._prepare_subcommand_kwargs(subcommand), **settled}


def main(args: list[str] | None = None) -> int:
    """The command line.

    Args:
        args: Arguments after the program's name; None: those of the process.

    Returns:
        Exit status: 0; 1 where a run cannot go on; 2 where what was typed cannot be run; 130 where it was interrupted.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    with surroundings():
        try:
            return _main(arguments)
        except UsageError as error:
            return _report(error, 2)
        except RunError as error:
            return _report(error, 1)
        except SystemExit as end:  # of jsonargparse's helps, of a run that was told to stop
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's answer to it
                return _report("interrupted", 130)
            return end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:
            return _report("interrupted", 130)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(main_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"metatpt {metatpt.__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        if command.startswith("-"):
            raise UsageError(
                f"The command comes first, then options such as {command}: metatpt {'|'.join(COMMANDS)} ..."
            )
        raise UsageError(f"There is no command {command!r}. {did_you_mean(command, list(COMMANDS))}")
    if command == "report":  # takes folders, which are no options
        return report(rest)
    if command == "import-prompt":  # takes a file, which is no option
        return import_prompt(rest)
    flags = dict(split_options(rest))
    if "help" in flags or "h" in flags:
        print(command_help(command))
        return 0
    for section in PLACES:
        if f"{section}.help" in flags:
            print(class_help(section, flags[f"{section}.help"] or flags.get(section, "")))
            return 0
    if "trainer.help" in flags:
        print(trainer_help())
        return 0
    if command == "doctor":
        return doctor(rest)
    request = read_request(command, rest)
    for key in flags:
        section, _, option = key.removesuffix(".help").partition(".")
        if key.endswith(".help") and section in BASES:
            print(option_help(section, request.classes[section], option))
            return 0
    keep_loggers_in_run_folder(request)
    if "print_config" in flags:
        request.options = [(key, value) for key, value in request.options if key != "print_config"]
        print(MetaTPTCLI(request, run=False).config_text(), end="")
        return 0
    if command != "fit":  # which alone goes on with what callbacks have kept in a checkpoint
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    if is_rank_zero():
        _log.info("config: %s", ", ".join(map(str, request.files)))
    MetaTPTCLI(request)
    return 0


def _report(error: Exception | str, status: int) -> int:
    if os.environ.get("METATPT_TRACEBACK") and isinstance(error, Exception):
        traceback.print_exception(error)
    print(f"metatpt: {error}", file=sys.stderr)
    return status
