"""Imports run one way (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "metatpt"
LEAVES = {"types", "rng", "images", "metrics", "shifts", "shapes", "timing", "class_paths"}
LOW = {"clip", "prompts", "views", "functional", *LEAVES}
MAY_IMPORT = {
    **{name: LEAVES for name in LEAVES},
    "functional": LEAVES,
    "clip": LEAVES,
    "views": LEAVES | {"functional"},
    "prompts": LEAVES | {"clip", "functional"},
    "modules": LOW,
    "results": LEAVES,
    "datamodules": LOW | {"modules", "results"},
    "callbacks": LOW | {"modules", "results"},
    "checkup": LOW | {"datamodules"},
}
FILES = sorted(file for file in PACKAGE.rglob("*.py"))
FILES += sorted(file for folder in ("datamodules", "callbacks") for file in (ROOT / folder).glob("*.py"))


def part(file: Path) -> str:
    """The folder or file of the package that a file belongs to."""
    inside = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.relative_to(ROOT)
    return inside.parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The parts that a file imports from across folders."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "metatpt" else [f"metatpt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("metatpt.")}
        assert not any(name.split(".")[0] in ("datamodules", "callbacks") for name in names), file
    return found - {part(file)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows(file: Path) -> None:
    name = part(file)
    if name in MAY_IMPORT:
        assert imported(file) <= MAY_IMPORT[name]
    else:
        assert name in {"__init__", "__main__", "classifier", "cli"}
        assert "cli" not in imported(file) or name in {"__main__", "cli"}


def test_the_links_make_one_package() -> None:
    for name in ("datamodules", "callbacks", "configs", "lightning_config.yaml"):
        link = PACKAGE / name
        assert link.resolve() == ROOT / name
        assert link.is_symlink()
