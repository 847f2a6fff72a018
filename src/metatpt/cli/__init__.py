"""The command line: ``metatpt validate|test|predict``."""

from .app import main

__all__ = ["main"]
