"""What a run needs around it, and leaves as it was: import path, environment, logs, warnings."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from .run import is_rank_zero

_log = logging.getLogger("metatpt")

_LIGHTNING_LOGS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_NO_NEWS = (
    "Seed set to",  # the config has it
    "GPU available: False",  # with one it is said
    "TPU available: False",
    "HPU available: False",
    "\N{ELECTRIC LIGHT BULB} Tip",  # advertisement
)
_HARMLESS_WARNINGS = (
    r".*does not have many workers",  # data.num_workers is 0 on purpose: reading is little beside adapting
    r".*recommended to use `self\.log\('(val|test)/",  # what is logged is summed over processes
    r"The number of training batches .* is smaller than the logging interval",  # epochs are logged all the same
    r"Your `IterableDataset` has `__len__`",  # of shards, where it is exact
    r"Found \d+ module\(s\) in eval mode",  # the frozen towers, on purpose
    r".*LeafSpec.* is deprecated",  # between Lightning 2.6 and torch 2.14; nothing of ours
)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(known in message for known in _NO_NEWS)


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """What a run needs around it, and what it changes, put back afterwards."""
    path, environment, level, propagate = list(sys.path), dict(os.environ), _log.level, _log.propagate
    sys.path.insert(0, os.getcwd())  # my_method.py in the working folder, as with python -m
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(handler)
    _log.propagate = False  # the root logger may have a handler too, by whoever called logging.info first
    _log.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    filtered = [logging.getLogger(name) for name in _LIGHTNING_LOGS]
    for log in filtered:
        log.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            for message in _HARMLESS_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for log in filtered:
            log.removeFilter(_is_news)
        _log.removeHandler(handler)
        _log.setLevel(level)
        _log.propagate = propagate
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
