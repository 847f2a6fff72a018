"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def replaced(file: Path) -> Iterator[TextIO]:
    """A stream whose content becomes `file` when all of it is on the disk, and not before.

    Raises:
        OSError: It cannot be written.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        if error.errno is None:  # of something that is read meanwhile
            raise
        raise OSError(
            f"Cannot write {file}: {error.strerror}. What was recorded is whole; make room (or the folder writable) "
            "and go on with --resume."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
