"""How classes are called in configs and checkpoints."""

from __future__ import annotations

import sys


def class_path(cls: type) -> str:
    """The path of a class: that of the outermost package which exports it."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        package = ".".join(parts[:length])
        if getattr(sys.modules.get(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
