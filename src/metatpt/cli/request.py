"""What a command line asks for: the files that it reads, the classes that it runs, the options that it gives.

jsonargparse, left alone, keeps of a config file's class every option that the class on the command line has too: with
MetaTPT's ``selection: 0.3`` in the file, ``--model TPTModule`` would run with it. So files and classes are settled
here, before it: a class starts from its own defaults, whatever another class's section says. The same class named
again keeps its section, and options on the command line win over all files. It is the same with the prompt learner, a
class in an option of the model.

What a checkpoint's values depend on (`checkpoint_options` of the method) comes from the checkpoint, where neither a
file that the user has named nor the command line says it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from metatpt.class_paths import class_path
from metatpt.datamodules.names import quote_class_names, quote_entries
from metatpt.prompts import as_factory

from .checkpoint import Checkpoint, read_checkpoint
from .classes import BASES, PROMPT, check_option, find_class, known_classes, option_types
from .errors import UsageError, did_you_mean, nearest
from .resume import saved_config

DEFAULT_CONFIG = "lightning_config.yaml"
COOP = "coop"
"""The template that stands for CoOp's for the data set."""

_PACKAGE = Path(__file__).parent.parent
_FLAGS = ("help", "h", "print_config")
_TEXT_LISTS = ("data.class_names", "data.init_args.class_names")
_NOT_IN_FIT = {
    "resume": "to train on, give --ckpt_path <run folder>/checkpoints/last.ckpt (and the same -c)",
    "on_error": "it is about the predictions of test, validate and predict",
}


@dataclass
class Request:
    """What is to run.

    Attributes:
        command: ``test``, ...
        files: Config files that were read, in order.
        config: What they say, without what no longer counts.
        options: Options on the command line by key and value, in order; classes are in `config`.
        classes: The class of each section, and of the prompt learner where one is named.
        named: Options of the model that a file says which the user has named, or the command line.
        resumed: Config of the run that goes on, if one does.
        checkpoint: What ``--ckpt_path`` names.
        taken: Options of the model that are the checkpoint's.
    """

    command: str
    files: list[Path] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    options: list[tuple[str, str]] = field(default_factory=list)
    classes: dict[str, type] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    resumed: Path | None = None
    checkpoint: Checkpoint | None = None
    taken: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        """The options, as arguments of a parser."""
        return [f"--{key}={value}" for key, value in self.options]

    @property
    def sources(self) -> str:
        """The files, in words."""
        checkpoint = [] if self.checkpoint is None or not self.taken else [self.checkpoint.path]
        return " and ".join([*map(str, self.files), *checkpoint])


def read_request(command: str, arguments: list[str]) -> Request:
    """Read the arguments after a command, and the files that they name.

    Raises:
        UsageError: A file or class that is not there, an option that its class does not have, ...
    """
    request = Request(command)
    options = list(split_options(arguments))
    configs = [value for key, value in options if key in ("c", "config")]
    for key, _ in options:
        if command == "fit" and key in _NOT_IN_FIT:
            raise UsageError(f"--{key} is no option of fit: {_NOT_IN_FIT[key]}.")
    if runs := [value for key, value in options if key == "resume"]:
        if any(key == "run" for key, _ in options):
            raise UsageError("--run and --resume are both given: --resume names the folder of the run that goes on.")
        request.resumed = saved_config(Path(runs[-1]).expanduser(), command)
        configs = [str(request.resumed), *configs]
    for file in [find_config(config) for config in configs] or [_default_config()]:
        request.files.append(file)
        _read_file(request, file, given=bool(configs))
    prompts = []
    for key, value in options:
        section = key.removesuffix(".class_path")
        option = _prompt_option(key)
        if section in BASES:
            _add_section(request, section, structure(value), Path.cwd(), "")
        elif option == "":
            prompts.append(structure(value))
        elif option:
            request.options.append((f"{PROMPT}.{option}", value))
        elif key not in ("c", "config"):
            request.options.append((key, quote_entries(value) if key in _TEXT_LISTS else value))
    for section in BASES:
        if section not in request.classes:
            raise UsageError(
                f"{request.sources} names no class for {section}: give one with --{section}. "
                f"There are: {', '.join(known_classes(section))}."
            )
    request.named |= {name for name in _options_of(request, "model") if name != "prompt"}
    if command != "doctor":  # it looks at the data alone
        _take_from_checkpoint(request, prompts)
    for prompt in prompts:
        _add_prompt(request, prompt, "")
    for section in BASES:
        for name in _options_of(request, section):
            if name != "prompt" or section != "model":
                check_option(section, request.classes[section], name)
    for name in _options_of(request, PROMPT):
        if PROMPT not in request.classes:
            raise UsageError(
                f"--{PROMPT}.{name}: it is an option of a prompt learner, and none is named: give --{PROMPT}. "
                f"There are: {', '.join(known_classes(PROMPT))}."
            )
        check_option(PROMPT, request.classes[PROMPT], name)
    _settle_template(request)
    return request


def _prompt_option(key: str) -> str | None:
    """The option of the prompt learner that a key stands for: empty for its class, None for another's."""
    found = re.fullmatch(r"model\.(?:init_args\.)?prompt(?:\.(.*))?", key)
    if found is None or found[1] == "help":
        return None
    return "" if found[1] in (None, "class_path") else found[1].removeprefix("init_args.")


def _options_of(request: Request, section: str) -> list[str]:
    """The options of a class that stand on the command line."""
    names = []
    for key, _ in request.options:
        if key.startswith(f"{section}."):
            name = re.split(r"[.+]", key[len(section) + 1 :].removeprefix("init_args."))[0]
            names += [name] if name != "dict_kwargs" else []
    return names


def _take_from_checkpoint(request: Request, prompts: list[Any]) -> None:
    """Put in what a checkpoint's values depend on, where the user does not say it.

    Args:
        request: What the user says, but for the prompt learners on the command line.
        prompts: These.
    """
    path = dict(request.options).get("ckpt_path", request.config.get("ckpt_path"))
    if path in (None, "", "null"):
        return
    request.checkpoint = checkpoint = read_checkpoint(str(path))
    method: Any = request.classes["model"]
    for name in method.checkpoint_options:
        if name in request.named or name not in checkpoint.options or name not in option_types(method):
            continue
        value = checkpoint.options[name]
        if name == "prompt":
            if _is_another(value, prompts):
                continue
            _add_prompt(request, _known_prompt(value, checkpoint), f"the checkpoint {checkpoint.path}")
        else:
            request.config["model"]["init_args"][name] = value
        request.taken.append(name)


def _is_another(saved: Any, prompts: list[Any]) -> bool:
    """Whether prompt learners that were named are others than the checkpoint's (which need not be known, then)."""
    paths = [prompt.get("class_path") if isinstance(prompt, dict) else prompt for prompt in prompts]
    known = [class_path(find_class(PROMPT, path)) for path in paths if path not in (None, "", "null")]
    return isinstance(saved, dict) and any(path != saved.get("class_path") for path in known)


def _known_prompt(saved: Any, checkpoint: Checkpoint) -> Any:
    """The prompt learner of a checkpoint, whose class must be known: a checkpoint does not say what is imported."""
    if saved is None:
        return None
    try:
        as_factory({"class_path": saved["class_path"], "init_args": dict(saved["init_args"])})
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"its prompt is no class with options: {saved!r}"
        raise UsageError(f"--ckpt_path {checkpoint.path}: {reason}.") from error
    return saved


def _settle_template(request: Request) -> None:
    """Put CoOp's template for the data set where ``coop`` stands for it: a config and a record hold the words."""
    options = request.config["model"]["init_args"]
    places = ("model.template", "model.init_args.template")
    if COOP not in [options.get("template"), *(value for key, value in request.options if key in places)]:
        return
    data: Any = request.classes["data"]
    if data.coop_template is None:
        known = [name for name, each in known_classes("data").items() if getattr(each, "coop_template", None)]
        raise UsageError(
            f"--model.template {COOP}: CoOp has no template for {data.__name__}, only for {', '.join(known)}. Give the "
            "words, such as 'a photo of a {}.'."
        )
    if options.get("template") == COOP:
        options["template"] = data.coop_template
    request.options = [
        (key, data.coop_template if key in places and value == COOP else value) for key, value in request.options
    ]


def split_options(arguments: list[str]) -> list[tuple[str, str]]:
    """Arguments as pairs of key and value, without dashes. Every option has one value, but for `_FLAGS`.

    Raises:
        UsageError: A value without option, or an option without value.
    """
    pairs = []
    todo = list(arguments)
    while todo:
        argument = todo.pop(0)
        if re.match(r"-c.", argument):
            argument = f"--config={argument[2:].removeprefix('=')}"
        if not re.match(r"-[a-zA-Z-]", argument):
            raise UsageError(f"Unexpected {argument!r}: options are given as --name VALUE.")
        key, equals, value = argument.lstrip("-").partition("=")
        if not equals and key not in _FLAGS:
            if todo and not re.match(r"--|-[a-zA-Z]", todo[0]):
                value = todo.pop(0)
            elif not key.endswith(".help"):
                raise UsageError(f"--{key} needs a value.")
        pairs.append((key, value))
    return pairs


def shipped_configs() -> dict[str, Path]:
    """The configs of the package by name."""
    folder = _PACKAGE / "configs"
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("data/*.yaml"))]
    return {file.stem: file for file in files} | {"default": _PACKAGE / DEFAULT_CONFIG}


def find_config(name: str) -> Path:
    """The file of that name, or the shipped config.

    Raises:
        UsageError: There is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    what = f"{name} is a folder" if path.is_dir() else f"there is no file {name}"
    tasks = [each for each, file in shipped.items() if file.parent.name != "data"]
    known = list(shipped) if nearest(name, shipped) else [*tasks, "and one for each data set (metatpt --help)"]
    raise UsageError(f"-c {name}: {what}, nor a config of that name in the package. {did_you_mean(name, known)}")


def _default_config() -> Path:
    own = Path(DEFAULT_CONFIG)
    return own if own.is_file() else _PACKAGE / DEFAULT_CONFIG


def _read_file(request: Request, file: Path, given: bool) -> None:
    try:
        content = _load(file)
        if not isinstance(content, dict):
            raise UsageError(f"{file} holds no options (expected keys such as model, data and trainer).")
        for section, value in content.items():
            if section in BASES:
                _add_section(request, section, value, file.parent, str(file), named=given)
            elif isinstance(value, dict) and isinstance(request.config.get(section), dict):
                request.config[section] |= value
            elif value is not None:
                request.config[section] = value
        check_sections(request.config, str(file))
    except UsageError as error:
        if given or file.is_relative_to(_PACKAGE):
            raise
        raise UsageError(
            f"{error}\n{file.resolve()} is read because it lies in the working folder. If it belongs to another "
            "project, name a config with -c (-c default: this package's own)."
        ) from error


def check_sections(config: dict[str, Any], source: str) -> None:
    """Refuse what is no section of ours. What is in `trainer` and `reset`, the parser knows.

    Raises:
        UsageError: Naming the nearest ones.
    """
    known = [*BASES, "trainer", "reset", "seed_everything", "ckpt_path", "on_error"]
    for key in config:
        if key not in known:
            raise UsageError(f"{key} in {source}: there is no such option. {did_you_mean(str(key), known)}")


def _add_section(request: Request, section: str, value: Any, folder: Path, source: str, named: bool = True) -> None:
    """Take over what a file or an argument says on the model or the data.

    Args:
        request: Where it goes.
        section: ``model`` or ``data``.
        value: A class, a mapping with `class_path` and `init_args`, or the name of a file that holds this.
        folder: Where such a file is looked for.
        source: Where it was given, in words, if not on the command line.
        named: Whether the user has named it.
    """
    place = f"{section} in {source}" if source else f"--{section}"
    if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
        file = folder / Path(value).expanduser()
        if not file.is_file():
            raise UsageError(f"{place}: there is no file {value}.")
        request.files.append(file)
        _add_section(request, section, _load(file), file.parent, str(file), named)
        return
    options = _add_class(request, section, value, request.config, source)
    if section == "model":
        request.named |= set(options) if named else set()
        if "prompt" in options:
            check_option(section, request.classes[section], "prompt", source)
            _add_prompt(request, options.pop("prompt"), source)
    for name in options:
        check_option(section, request.classes[section], name, source)
    request.config[section]["init_args"] |= options


def _add_prompt(request: Request, value: Any, source: str) -> None:
    """The same for the prompt learner of the model; null for that of the method."""
    options = request.config["model"]["init_args"]
    if value in (None, "", "null"):
        request.classes.pop(PROMPT, None)
        options["prompt"] = None
        return
    if options.get("prompt") is None:
        options.pop("prompt", None)
    given = _add_class(request, PROMPT, value, options, source)
    for name in given:
        check_option(PROMPT, request.classes[PROMPT], name, source)
    options["prompt"]["init_args"] |= given


def _add_class(request: Request, section: str, value: Any, holder: dict[str, Any], source: str) -> dict[str, Any]:
    """Take over a class and give the options that stand with it. One that was not there before starts without any.

    Args:
        request: Where it goes.
        section: ``model``, ``data`` or ``model.prompt``.
        value: A class, or a mapping with `class_path` and `init_args`.
        holder: The part of the config that it goes into.
        source: Where it was given, in words, if not on the command line.
    """
    place, key = f"{section} in {source}" if source else f"--{section}", section.rpartition(".")[2]
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        raise UsageError(f"{place}: expected a class, or a mapping with class_path and init_args; got {value!r}.")
    unknown = [name for name in value if name not in ("class_path", "init_args", "dict_kwargs")]
    if unknown:
        raise UsageError(f"{place}: {unknown[0]} stands beside class_path; options stand in init_args.")
    if value.get("class_path") is not None:
        found = find_class(section, str(value["class_path"]), source)
        if found is not request.classes.get(section):
            request.classes[section] = found
            holder[key] = {"class_path": class_path(found), "init_args": {}}
            if section == "model":  # and nothing of it is left
                request.classes.pop(PROMPT, None)
                request.named.clear()
    if section not in request.classes:
        raise UsageError(f"{place}: it has options but no class_path.")
    options = value.get("init_args") or {}
    if not isinstance(options, dict):
        raise UsageError(f"{place}: expected init_args to be a mapping of options; got {options!r}.")
    if value.get("dict_kwargs"):
        holder[key].setdefault("dict_kwargs", {}).update(value["dict_kwargs"])
    return dict(options)


def _load(file: Path) -> Any:
    try:
        return _parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def structure(value: str) -> Any:
    """A value on the command line: a mapping if it is written as one."""
    return _parse(value, value) if value.lstrip().startswith("{") else value


def _parse(text: str, source: str) -> Any:
    try:
        return get_loader("yaml")(quote_class_names(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{source}{place}: no YAML: {getattr(error, 'problem', None) or error}.") from error
