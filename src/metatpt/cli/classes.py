"""The classes that a command line can name: methods, data sets, prompt learners, and a user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser

import metatpt.callbacks  # noqa: F401  (known by name once they are imported)
from metatpt.class_paths import class_path
from metatpt.datamodules import BaseDataModule
from metatpt.modules import AdaptationModule
from metatpt.prompts import PromptLearner, TemplatePrompt

from .errors import UsageError, did_you_mean

BASES: dict[str, type] = {"model": AdaptationModule, "data": BaseDataModule}
"""What the class of a section of the config is derived from."""

PROMPT = "model.prompt"
"""The place of the class that stands in an option of the model."""

PLACES: dict[str, type] = {**BASES, PROMPT: PromptLearner}
"""The places where a class is named, and what it is derived from there."""

_KINDS = {"model": "method", "data": "data set", PROMPT: "prompt learner"}

_NOT_CHOSEN = (TemplatePrompt,)
"""What a method has where it has no learner: ``--model.template`` sets it."""


def known_classes(section: str) -> dict[str, type]:
    """The classes of a section by name, those of this package first. Of these only what it exports: no base classes."""
    found: dict[str, type] = {}
    todo = [PLACES[section]]
    while todo:
        each = todo.pop(0)
        todo += each.__subclasses__()
        if (
            not missing_methods(each)
            and each not in _NOT_CHOSEN
            and not (is_ours(each) and class_path(each).startswith(f"{each.__module__}."))
        ):
            found.setdefault(each.__name__, each)
    ours = {name: each for name, each in sorted(found.items()) if is_ours(each)}
    return {**ours, **found}


def is_ours(cls: type) -> bool:
    """Whether a class is this package's."""
    return cls.__module__.startswith("metatpt.")


def find_class(section: str, name: str, source: str = "") -> type:
    """The class of that name, or at that path (``my_method.MyModule``), which is imported.

    Args:
        section: ``model``, ``data`` or ``model.prompt``.
        name: Name or path.
        source: Where it was given, in words, if not on the command line.

    Raises:
        UsageError: There is none, it cannot be imported, or it is something else.
    """
    kind, base, known = _KINDS[section], PLACES[section], known_classes(section)
    place = f"{section} in {source}" if source else f"--{section}"
    hand_written = (
        f"{place}: {name} learns nothing: a method has it where it has no learner, and --model.template sets its "
        f"words. There are: {', '.join(known)}."
    )
    if "." not in name:
        if name in known:
            return known[name]
        if section == PROMPT and name in [each.__name__ for each in _NOT_CHOSEN]:
            raise UsageError(hand_written)
        abstract = " (it is a base class)" if name == base.__name__ else ""
        raise UsageError(
            f"{place}: no {kind} is called {name!r}{abstract}. {did_you_mean(name, list(known))} "
            f"One of your own, in a file in this folder, is given with the file's name: my_file.{name or 'MyClass'}."
        )
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"{place}: {module_name} cannot be imported, since it needs {error.name}.") from error
        hint = did_you_mean(attribute, list(known))
        raise UsageError(f"{place}: there is no module {module_name} in {os.getcwd()} or installed. {hint}") from error
    except Exception as error:
        raise UsageError(f"{place}: {module_name} cannot be imported: {type(error).__name__}: {error}.") from error
    found = getattr(module, attribute, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
        raise UsageError(
            f"{place}: {module_name} has no {attribute}. {did_you_mean(attribute, classes or list(known))}"
        )
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UsageError(f"{place}: {name} is no {kind}: it is not derived from {base.__module__}.{base.__name__}.")
    cls: type = found
    if cls in _NOT_CHOSEN:
        raise UsageError(hand_written)
    if missing := missing_methods(cls):
        raise UsageError(f"{place}: {name} is a base class: it does not define {', '.join(missing)}.")
    return cls


def missing_methods(cls: type) -> list[str]:
    """The methods that a base class leaves to others (whether or not its metaclass enforces it)."""
    return [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]


def given_otherwise(cls: type) -> set[str | int]:
    """Arguments of a class that are no options: the data give a method its classes, a method gives a learner three."""
    if issubclass(cls, PromptLearner):
        return {3}
    return {"class_names"} if issubclass(cls, AdaptationModule) else set()


@cache
def option_types(cls: type) -> dict[str, Any]:
    """The options of a class and their types, those that it hands on to its base classes included."""
    parser = ArgumentParser()
    names: list[str] = parser.add_class_arguments(cls, fail_untyped=False, skip=given_otherwise(cls))
    kinds = {action.dest: getattr(action, "_typehint", action.type) for action in parser._actions}
    return {name.split(".")[0]: kinds.get(name) for name in names}


def options_at(path: str) -> list[str]:
    """The options of the class at a path, which has been imported before."""
    module, _, name = path.rpartition(".")
    return list(option_types(getattr(sys.modules[module], name)))


def check_option(section: str, cls: type, name: str, source: str = "") -> None:
    """Refuse an option that a class does not have.

    Raises:
        UsageError: Naming the nearest options, and the classes that have this one.
    """
    place = f"{section}.{name} in {source}" if source else f"--{section}.{name}"
    if section == "model" and name == "class_names":
        raise UsageError(f"{place}: class names come from the data: give --data.class_names.")
    known = list(option_types(cls))
    if name in known:
        return
    others = [other for other, each in known_classes(section).items() if name in option_types(each)]
    hint = f"It is an option of {', '.join(others[:4])}."
    raise UsageError(f"{place}: {cls.__name__} has no such option. {hint if others else did_you_mean(name, known)}")
