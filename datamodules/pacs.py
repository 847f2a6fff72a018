"""PACS: seven kinds of things as paintings, cartoons, photos and sketches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from metatpt.rng import sample_generator

from .base import BaseDataModule, FilePictures, Split
from .folder import existing_folder, find_pictures, sub_folders
from .names import nearest

Domain = Literal["art_painting", "cartoon", "photo", "sketch"]
DOMAINS: tuple[str, ...] = get_args(Domain)
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")

_HELD_OUT = 5  # validation has every fifth picture of the source domains


class PACSDataModule(BaseDataModule):
    """PACS in the layout ``<root>/<domain>/<class>/*``, tested on one domain.

    Li et al., "Deeper, Broader and Artier Domain Generalization" (2017).

    Test is the whole of `domain`. Validation never sees it: it is a fifth of each class of each other domain, drawn
    once and for all (whatever the seed of the run), of which training may take the rest.

    Args:
        root: Folder with the four domains in it.
        domain: The domain to test on.
        **kwargs: See :class:`BaseDataModule`.

    Raises:
        FileNotFoundError: If there is no folder `root`.
        NotADirectoryError: If it is a file.
        ValueError: If there is no such domain.
    """

    def __init__(self, root: str | Path, domain: Domain = "art_painting", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if domain not in DOMAINS:
            raise ValueError(
                f"PACS has no domain {domain!r} ({nearest(domain, DOMAINS)}): expected one of {', '.join(DOMAINS)}."
            )
        self.root = existing_folder(root)
        self.domain = domain
        self.class_names = list(CLASSES)

    def pictures(self, split: Split) -> FilePictures:
        """The domain to test on, or the held-out fifth of the others.

        Raises:
            FileNotFoundError: If the folder of a domain is missing.
            ValueError: If a class folder is missing, empty or unknown.
        """
        labels: dict[str, int] = {}
        for domain in DOMAINS if split == "val" else (self.domain,):
            if domain == self.domain and split == "val":
                continue
            for label, paths in enumerate(_class_pictures(self.root, domain)):
                labels.update((path, label) for path in (_held_out(paths) if split == "val" else paths))
        paths = sorted(labels)
        return FilePictures(self.root, paths, [labels[path] for path in paths])


def _class_pictures(root: Path, domain: str) -> list[list[str]]:
    """Paths of each class of a domain."""
    if not (root / domain).is_dir():
        raise FileNotFoundError(
            f"No folder {domain} in {root}: expected PACS as <root>/<domain>/<class>/* with the domains "
            f"{', '.join(DOMAINS)}; found {', '.join(sub_folders(root)) or 'no folders'}."
        )
    folders = sub_folders(root / domain)
    missing = [name for name in CLASSES if name not in folders]
    stray = [name for name in folders if name not in CLASSES]
    if missing or stray:
        raise ValueError(
            f"{root / domain} is not PACS: expected the class folders {', '.join(CLASSES)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not a class of PACS: {', '.join(stray)}" if stray else "")
            + "."
        )
    by_class = [[f"{domain}/{name}/{path}" for path in find_pictures(root / domain / name)[0]] for name in CLASSES]
    for name, paths in zip(CLASSES, by_class, strict=True):
        if not paths:
            raise ValueError(f"No picture in {root / domain / name}: expected those of class {name}.")
    return by_class


def _held_out(paths: list[str]) -> list[str]:
    order = torch.randperm(len(paths), generator=sample_generator(0, 0, f"pacs {paths[0].rpartition('/')[0]}"))
    return [paths[place] for place in order[: -(-len(paths) // _HELD_OUT)]]
