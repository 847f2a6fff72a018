"""Data sets of several domains in their layouts: all domains and class folders, with a tiny picture or more in each."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
VLCS = ("bird", "car", "chair", "dog", "person")
TERRA = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
OFFICE = ("Alarm_Clock", "TV", *(f"Thing_{number:02}" for number in range(63)))
DOMAIN_NET = ("t-shirt", "The_Mona_Lisa", *(f"thing_{number:03}" for number in range(343)))
STYLES = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def write_domains(root: Path, domains: Sequence[str], counts: Mapping[str, int], file: str, seed: int = 0) -> None:
    """Pictures of every domain, so many of each class.

    Args:
        root: Folder that the domains are made in.
        domains: Their folders.
        counts: Pictures of each class folder.
        file: Name of a picture, with ``{domain}``, ``{label}`` and ``{number}``, both counted from 1.
        seed: Seed of the colours.
    """
    shuffled = random.Random(seed)
    for domain in domains:
        for label, (name, count) in enumerate(counts.items(), start=1):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for number in range(1, count + 1):
                picture = Image.new("RGB", (10, 8), tuple(shuffled.randbytes(3)))
                picture.save(folder / file.format(domain=domain, label=label, number=number))


def write_pacs(root: Path) -> None:
    """The four domains, with another number of pictures in each class."""
    counts = {name: 3 + place for place, name in enumerate(PACS)}
    write_domains(root, ("art_painting", "cartoon", "photo", "sketch"), counts, "pic_{number:03}.jpg")


def write_vlcs(root: Path) -> None:
    """DomainBed's layout."""
    domains = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    write_domains(root / "VLCS", domains, dict.fromkeys(VLCS, 3), "{label}_{number:06}.jpg")


def write_office_home(root: Path) -> None:
    """The four domains, and the table that comes with them."""
    write_domains(root, ("Art", "Clipart", "Product", "Real World"), dict.fromkeys(OFFICE, 2), "{number:05}.jpg")
    (root / "ImageInfo.csv").write_text("Category,Domain\n")


def write_terra_incognita(root: Path) -> None:
    """What DomainBed's script makes."""
    domains = [f"location_{place}" for place in (38, 43, 46, 100)]
    write_domains(root / "terra_incognita", domains, dict.fromkeys(TERRA, 3), "{number:08x}.jpg")


def write_domain_net(root: Path) -> None:
    """The six domains and their lists, with the classes numbered as there: without regard to case."""
    counts = {name: 5 if place < 4 else 1 for place, name in enumerate(DOMAIN_NET)}
    write_domains(root, STYLES, counts, "{domain}_{label:03}_{number:06}.jpg")
    numbers = {name: number for number, name in enumerate(sorted(counts, key=str.casefold))}
    for domain in STYLES:
        paths = sorted((root / domain).rglob("*.jpg"))
        lines = [f"{path.relative_to(root).as_posix()} {numbers[path.parent.name]}" for path in paths]
        (root / f"{domain}_train.txt").write_text("\n".join(lines[::2]) + "\n")
        (root / f"{domain}_test.txt").write_text("\n".join(lines[1::2]) + "\n")
