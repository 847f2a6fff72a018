"""Help texts: short, and made from what there is."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import textwrap

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from metatpt.class_paths import class_path

from .classes import PROMPT, find_class, given_otherwise, known_classes, option_types
from .errors import UsageError, parts
from .request import shipped_configs

COMMANDS = {
    "fit": "train a prompt with labels, which the others can start from: on a few pictures of each class or many",
    "test": "adapt to every picture of the test split, and compare with zero-shot",
    "validate": "the same on the validation split",
    "predict": "predictions for pictures, with or without labels",
    "import-prompt": "make a checkpoint out of one of the official trainers of CoOp, CoCoOp, MaPLe, MMRL, UPT or VPT",
    "doctor": "look a data set over: layout, counts, unreadable pictures, class names, and a sheet to look at",
    "report": "a page on what runs came to: figures with intervals, plots, pictures, cost; several are compared",
}

_EXAMPLES = """
examples:
  metatpt test                                   MetaTPT, the bundled model, drawn pictures under a shift
  metatpt test --model TPTModule --data.shift noise --data.severity 5
  metatpt test -c pacs --data.root ~/PACS --data.domain sketch
  metatpt test --model TPTModule --model.prompt TextPrompt
  metatpt fit -c few_shot --data.shots 16 --run runs/few
  metatpt test --model TPTModule --ckpt_path runs/few/checkpoints/best.ckpt
  metatpt predict -c folder --data.root ~/photos --data.class_names cat,dog
  metatpt doctor -c imagenet_v2 --data.root ~/imagenetv2
  metatpt test -c runs/<run>/config.yaml --seed_everything 1
  metatpt report runs/<run> runs/<another>
"""

_OPTIONS = {
    "-c, --config FILE|NAME": "config instead of lightning_config.yaml; several add up, the last one wins",
    "--model CLASS": "the method; --model.OPTION VALUE sets its options",
    "--model.prompt CLASS": "the prompt learner (default: the words before the class name, where they are tuned); "
    "--model.prompt.OPTION VALUE sets its options",
    "--data CLASS": "the data set; --data.OPTION VALUE",
    "--reset.policy POLICY": "episodic (every picture starts afresh) or online (the prompt is carried over)",
    "--run DIR": "folder of the run (default: runs/<time>-<method>-<data>)",
    "--resume DIR": "go on with a run that was stopped, with its own config, on any number of devices",
    "--on_error skip|raise": "pictures without adapted prediction: skip names them, raise fails in the end as well "
    "(default: skip in predict, raise in test and validate)",
    "--seed_everything N": "the one seed (default: 0)",
    "--ckpt_path FILE": "checkpoint with a learned prompt; clip, pretrained, template and prompt of the model are "
    "taken from it where neither a named config nor the command line gives them",
    "--trainer.OPTION VALUE": "Lightning's: accelerator, devices, strategy, precision, logger, callbacks, ...",
    "--print_config": "print the config that would run, and end",
}

_OPTIONS_OF_FIT = {
    "--ckpt_path FILE": "checkpoint of fit that training goes on from, with its optimiser: checkpoints/last.ckpt of "
    "the run; clip, pretrained, template and prompt of the model are taken from it likewise",
    "--trainer.OPTION VALUE": "Lightning's: max_epochs (default: 50), accelerator, devices, strategy, precision, "
    "logger (default: log/metrics.csv in the run folder), callbacks, ...",
}
_NOT_OF_FIT = ("--reset.policy POLICY", "--resume DIR", "--on_error skip|raise")

_MOST_USED = """
options that are used most:
  --model.clip NAME|FOLDER|builtin      --model.pretrained TAG|FILE      --model.template "a photo of a {}."
  --data.batch_size N                   --data.num_workers N             --data.max_samples N
"""

_RUN_OF_FIT = """
The run folder keeps checkpoints/last.ckpt, and with a validation split checkpoints/best.ckpt (by val/accuracy). To stop
where validation gets no better: --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/accuracy
--trainer.callbacks.mode=max
"""


def main_help() -> str:
    """``metatpt --help``."""
    return "\n".join(
        [
            "usage: metatpt COMMAND [-c CONFIG] [--model METHOD] [--data DATA] [options]",
            "",
            "Test-time prompt tuning: adapt a CLIP-like model to every single picture, and see what it brings.",
            "",
            "commands:",
            *_table(COMMANDS),
            *_classes(),
            "",
            "configs (-c):",
            *_configs(),
            _EXAMPLES,
            "more: metatpt test --help, metatpt test --model.help METHOD, metatpt test --data.help DATA",
        ]
    )


_DOCTOR_OPTIONS = """
options:
  --data CLASS              the data set; --data.OPTION VALUE
  -c, --config FILE|NAME    config that names it
  --pictures N|all          how many pictures of each split are decoded (default: 200)
  --sheet FILE              where the pictures with their class names go (default: doctor-<data set>.png)

The exit status is 1 where something is wrong.
"""

_REPORT_OPTIONS = """
  RUN                       folder of a run that has ended or was stopped; several are compared with the first
  --to FOLDER               where report.html and plots/ go (default: the run, or of several report/)

The page needs no network, and nothing beside it.
"""


def _configs() -> list[str]:
    described, data_sets = {}, []
    for name, path in shipped_configs().items():
        if path.parent.name == "data":
            data_sets.append(name)
        else:
            described[name] = _first_comment(path.read_text(encoding="utf-8"))
    return _table({**described, "data sets": f"MetaTPT with a real CLIP on each: {', '.join(data_sets)}"})


def command_help(command: str) -> str:
    """``metatpt test --help``."""
    if command == "doctor":
        usage = "usage: metatpt doctor --data DATA [options]"
        return "\n".join([usage, "", f"{COMMANDS[command].capitalize()}.", _DOCTOR_OPTIONS.rstrip(), *_classes()])
    if command == "report":
        usage = "usage: metatpt report RUN [RUN ...] [--to FOLDER]"
        return "\n".join([usage, "", f"{COMMANDS[command].capitalize()}.", _REPORT_OPTIONS.rstrip()])
    options = _OPTIONS
    if command == "fit":
        options = {name: text for name, text in (_OPTIONS | _OPTIONS_OF_FIT).items() if name not in _NOT_OF_FIT}
    return "\n".join(
        [
            f"usage: metatpt {command} [-c CONFIG] [--model METHOD] [--data DATA] [options]",
            "",
            f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.",
            *(_RUN_OF_FIT.rstrip().splitlines() if command == "fit" else []),
            "",
            "options (of the command line, or under the same names in a config file; the command line wins):",
            *_table(options),
            _MOST_USED.rstrip(),
            *_classes(),
            "",
            f"more: --model.help METHOD, --model.prompt.help PROMPT, --data.help DATA, --trainer.help after {command}",
            "METATPT_TRACEBACK=1 in the environment shows where an error comes from.",
        ]
    )


def class_help(section: str, name: str) -> str:
    """``--model.help TPTModule``: the options of a class.

    Raises:
        UsageError: No class was given.
    """
    if not name:
        raise UsageError(f"--{section}.help needs a class: {', '.join(known_classes(section))}.")
    cls = find_class(section, name)
    text = re.split(r"\n(?:Args|Raises|Attributes):\n", _documentation(cls))[0].rstrip()
    return f"{class_path(cls)}\n\n{_plain(text)}\n\n{_options(cls, section)}"


def option_help(section: str, cls: type, option: str) -> str:
    """``--model.bounds.help``: the options of an option that is a group of them.

    Raises:
        UsageError: It is not.
    """
    for each in parts(option_types(cls).get(option)):
        if dataclasses.is_dataclass(each) and isinstance(each, type):
            return f"{_plain(_documentation(each).splitlines()[0])}\n\n{_options(each, f'{section}.{option}')}"
    raise UsageError(f"--{section}.{option}.help: it is one value, which metatpt test --{section}.help explains.")


def trainer_help() -> str:
    """``--trainer.help``: the options of Lightning's Trainer."""
    return _options(Trainer, "trainer")


def _options(cls: type, section: str) -> str:
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(cls, section, fail_untyped=False, skip=given_otherwise(cls), sub_configs=False)
    lines = parser.format_help().strip().splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith(f"  --{section}.")), None)
    if start is None:
        return f"{cls.__name__} has no options."
    return _plain("\n".join(["options:", *lines[start:]]))


def _classes() -> list[str]:
    lines = []
    for section, title in {"model": "methods", PROMPT: "prompt learners", "data": "data sets"}.items():
        known = {name: _plain(_documentation(each).split("\n")[0]) for name, each in known_classes(section).items()}
        lines += ["", f"{title} (--{section}):", *_table(known)]
    return lines


def _documentation(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")  # its own: getdoc would give that of the base class


def _table(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries), default=0)
    return [
        textwrap.fill(text, 110, initial_indent=f"  {name:{width}}  ", subsequent_indent=" " * (width + 4))
        for name, text in entries.items()
    ]


def _first_comment(text: str) -> str:
    first = text.strip().split("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _plain(text: str) -> str:
    """Without the marks of a docstring."""
    return re.sub(r":\w+:`~?([^`]+)`|``([^`]+)``|`([^`]+)`", lambda found: next(filter(None, found.groups())), text)
