"""Errors of the command line: one message, with what was given, what was expected, and the nearest names."""

from __future__ import annotations

import difflib
import dis
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch


class UsageError(Exception):
    """What was asked for cannot be run; the message says why, and what to do."""


class RunError(Exception):
    """A run that cannot go on for a reason outside of the program; the message says which."""


def nearest(given: str, known: Iterable[str]) -> list[str]:
    """Up to three known names that begin with the given one, or else look like it, the most alike first."""
    names = list(dict.fromkeys(known))
    by_case = {name.casefold(): name for name in names}
    wanted = given.casefold()
    begin = sorted((name for name in by_case if name.startswith(wanted)), key=len) if len(wanted) > 2 else []
    found = begin or difflib.get_close_matches(wanted, by_case, n=3, cutoff=0.6)
    return [by_case[name] for name in found[:3]]


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """The end of a message: the nearest names, or where none is near all of them.

    >>> did_you_mean("tset", ["test", "validate"])
    'Did you mean test?'
    >>> did_you_mean("x", ["test", "validate"])
    'There are: test, validate.'
    """
    names = nearest(given, known)
    return f"Did you mean {' or '.join(names)}?" if names else f"There are: {', '.join(known)}."


def explain(
    error: str,
    given: dict[str, str],
    type_of: Callable[[str], Any],
    options_of: Callable[[str], Sequence[str]],
    source: str,
) -> str:
    """Put jsonargparse's report on a value, which runs over a dozen lines, as one message.

    Args:
        error: The report.
        given: Options on the command line, by key.
        type_of: The type of an option by its key, None where it is not known.
        options_of: The options of a class by its path.
        source: Where the other options come from, in words.
    """
    key = ".".join(re.findall(r'Parser key "([^"]+)"', error))
    missing = re.search(r"(?:class_path '([^']+)':\s+)?the following arguments are required: (.+)", error)
    if missing:
        needed = [f"--{key}.{name.strip()}".replace("--.", "--") for name in missing[2].split(",")]
        return f"{', '.join(needed)} must be given{_for(missing[1])}."
    unknown = re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", error)
    if unknown:
        hint = did_you_mean(unknown[2], options_of(unknown[1]))
        return f"--{key}.{unknown[2]}: there is no such option{_for(unknown[1])}. {hint}"
    if not key:
        return " ".join(error.split())
    nested = (each for each in given if each.rstrip("+").startswith(f"{key}."))
    typed = next((each for each in (key, f"{key}+") if each in given), next(nested, None))
    place, value = f"--{typed}".rstrip("+"), given.get(typed or "")
    if value is None:
        place = f"{key} in {source}"
        found = re.search(r"Got value: (.*)", error) or re.search(r"Given value: (.*)", error)
        value = found[1] if found else "this"
    kind = type_of(key)
    expected = words(kind) if kind is not None else _expected(error)
    why = re.search(r"No module named '[^']+'|Import path does not [^\n]+|has no attribute[^\n]+", error)
    return f"{place}: expected {expected}, got {value!r}{f' ({why[0]})' if why else ''}.{_hint(value, kind)}"


def _for(class_path: str | None) -> str:
    return f" (for {class_path.rpartition('.')[2]})" if class_path else ""


def _expected(error: str) -> str:
    """What jsonargparse expected, where the type is not at hand."""
    plain = {"int": int, "float": float, "bool": bool, "str": str, "NoneType": type(None)}
    names = dict.fromkeys(re.findall(r"Expected an? (?:<class ')?([^'\n.]+)", error))
    return " or ".join(words(plain[name]) if name in plain else name for name in names) or "something else"


def _hint(value: str, kind: Any) -> str:
    names = [name for part in parts(kind) for name in _names(part)]
    close = nearest(value, names)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def words(kind: Any) -> str:
    """A type, as a user says it.

    >>> words(int | None)
    'a whole number or null'
    >>> words(Literal["crop", "affine"])
    'crop or affine'
    """
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    texts = []
    for part in parts(kind):
        if get_origin(part) is Literal:
            texts += [str(value) for value in get_args(part)]
        elif part in plain:
            texts.append(plain[part])
        elif get_origin(part) is dict:
            texts.append("a mapping")
        elif get_origin(part) is Callable:
            texts.append("a class or a function")
        elif get_origin(part) is not None:
            texts.append(f"a list of {words(get_args(part)[0])}" if get_args(part) else "a list")
        elif isinstance(part, type) and issubclass(part, Path):
            texts.append("a path")
        elif isinstance(part, type):
            texts.append(f"a {part.__name__}")
        else:
            texts.append(str(part))
    texts = list(dict.fromkeys(texts))
    return " or ".join(filter(None, [", ".join(texts[:-1]), texts[-1]])) if texts else "something else"


def parts(kind: Any) -> list[Any]:
    """The members of a union; another type is its only one."""
    if get_origin(kind) in (Union, types.UnionType):
        return [part for member in get_args(kind) for part in parts(member)]
    return [] if kind is None else [kind]


def _names(kind: Any) -> list[str]:
    """Values that a type has by name: those of a Literal, or the classes that are known of a base class."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) in (list, Sequence, Iterable):
        return [name for part in get_args(kind) for name in _names(part)]
    if isinstance(kind, type) and kind.__module__.startswith("lightning."):
        derived: list[type] = kind.__subclasses__()
        return [kind.__name__, *(name for each in derived for name in _names(each))]
    return []


def refused(error: Exception, options: Mapping[str, Any]) -> str:
    """Lightning's complaint about the Trainer's options, after the ones that it names and their values.

    >>> refused(TypeError("`devices` should be an int > 0."), {"devices": "many", "max_time": None})
    "--trainer.devices 'many': `devices` should be an int > 0."
    """
    named = [f"--trainer.{name} {value!r}" for name, value in options.items() if f"`{name}`" in str(error)]
    return f"{', '.join(named) or 'the Trainer refuses its options'}: {error}"


def _origin(error: BaseException) -> types.TracebackType | None:
    """Where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def raised_in(error: BaseException, package: str) -> bool:
    """Whether code of a package raised an error."""
    trace = _origin(error)
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(f"{package}.")


def is_check(error: Exception) -> bool:
    """Whether a ``raise`` of this package raised an error, and no operation of a library that it called."""
    trace = _origin(error)
    if trace is None or not raised_in(error, "metatpt"):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def is_lost_process(error: Exception) -> bool:
    """Whether torch has failed to reach another process of the run."""
    lost = ("connection closed by peer", "connection reset by peer", "broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(text in str(error).lower() for text in lost)


def root_cause(error: Exception) -> Exception:
    """What a constructor raised: jsonargparse packs it into reports of its own."""
    while isinstance(error.__cause__, Exception) and raised_in(error, "jsonargparse"):
        error = error.__cause__
    return error
