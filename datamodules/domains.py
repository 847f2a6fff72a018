"""Data sets of several domains, tested on one of them: PACS, VLCS, Office-Home, Terra Incognita and DomainNet."""

from __future__ import annotations

import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from .base import FilePictures, Split
from .benchmark import BenchmarkDataModule, check_folders, class_folders
from .folder import sub_folders
from .subsets import held_out_of_classes

Lists = Literal["auto", "official", "all"]

_LISTS = "https://ai.bu.edu/M3SDA"


class Domain(NamedTuple):
    """How many pictures a domain has (None where copies differ), and its other names in use."""

    size: int | None = None
    aliases: tuple[str, ...] = ()


class DomainDataModule(BenchmarkDataModule):
    """Base of data sets that lie as ``<domain>/<class>/*`` and are tested on one domain.

    Test is the whole of `domain`. Validation never sees it: it is a fifth of each class of each other domain, drawn
    once and for all (whatever the seed of the run), and training is the rest of them.

    Args:
        root: Folder with the domains in it, or the folder that it lies in under one of the names in use.
        domain: The domain to test on. Case, spaces and underscores do not matter.
        **kwargs: See :class:`BenchmarkDataModule`.

    Raises:
        FileNotFoundError: If there is no folder `root`, or no domain in it.
        ValueError: If there is no such domain.
    """

    layout = "<domain>/<class>/*"

    domains: ClassVar[dict[str, Domain]]
    """The domains by name."""

    draw: ClassVar[str]
    """Names the draw of the validation pictures: another name means other pictures."""

    n_classes: ClassVar[int]

    classes: ClassVar[tuple[str, ...]] = ()
    """Class folders in the order of the labels; empty where they are read from the disk, and sorted."""

    @abstractmethod  # a leaf has a default domain
    def __init__(self, root: str | Path, domain: str, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        known = self.find_domain(domain)
        self.domain = self.source = self.check_known("domain", known or domain, list(self.domains))
        self.class_names = list(self.classes or self._common_folders())

    @classmethod
    def find_domain(cls, name: str) -> str | None:
        """The domain that goes by a name; None if none does."""
        for domain, (_, aliases) in cls.domains.items():
            if _letters(name) in map(_letters, (domain, *aliases)):
                return domain
        return None

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Whether a sub-folder has the name of a domain: one is enough to test on it."""
        return any(map(cls.find_domain, sub_folders(folder)))

    def size(self, domain: str) -> int | None:
        """How many pictures :meth:`read_domain` should find; None where nobody has published it."""
        return self.domains[domain].size

    def published(self, split: Split) -> int | None:
        """Size of the domain to test on. The others' are checked one by one in :meth:`read`."""
        return self.size(self.domain) if split == "test" else None

    def read(self, split: Split) -> FilePictures:
        """The domain to test on, or the held-out fifth of the others, or the rest of the others."""
        if split == "test":
            return self.read_domain(self.domain)
        labels: dict[str, int] = {}
        for domain in self.domains:
            if domain == self.domain:
                continue
            pictures = self.read_domain(domain)
            self.check_count(f"domain {domain}", len(pictures), self.size(domain))
            draws = [f"{self.draw} {domain}/{name}" for name in self.class_names]
            held = held_out_of_classes(pictures.paths, pictures.labels, draws)
            labels.update(
                (path, label)
                for path, label in zip(pictures.paths, pictures.labels, strict=True)
                if (path in held) == (split == "val")
            )
        paths = sorted(labels)
        return FilePictures(self.root, paths, [labels[path] for path in paths])

    def read_domain(self, domain: str) -> FilePictures:
        """All pictures of a domain, sorted by path."""
        place = self.place(domain)
        return class_folders(self.root, place, self.class_labels(place), partial=self.partial, hint=self._hint)

    def place(self, domain: str) -> str:
        """Where the class folders of a domain are, below the root.

        Raises:
            FileNotFoundError: If there is no folder with a name of this domain.
            ValueError: If there are several.
        """
        folders = sub_folders(self.root)
        found = [name for name in folders if self.find_domain(name) == domain]
        if not found:
            raise FileNotFoundError(
                f"No folder {domain} in {self.root}: expected {self.title} as <root>/{self.layout} with the domains "
                f"{', '.join(self.domains)}; found {', '.join(folders) or 'no folders'}."
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.root} has {len(found)} folders for the domain {domain} of {self.title}: {', '.join(found)}. "
                "Leave one of them."
            )
        return found[0]

    def class_labels(self, place: str) -> dict[str, int]:
        """Class index of every class folder at a place."""
        return {name: label for label, name in enumerate(self.class_names)}

    @property
    def _hint(self) -> str:
        return f"{self.title} lies as {self.layout}, with the same classes in all domains"

    def _common_folders(self) -> list[str]:
        """The class folders that all domains have.

        Raises:
            ValueError: If no domain has as many as published, or another one has others.
        """
        by_domain = {name: sub_folders(self.root / name) for name in sub_folders(self.root) if self.find_domain(name)}
        whole = next((folders for folders in by_domain.values() if len(folders) == self.n_classes), None)
        if whole is None:
            found = ", ".join(f"{name} {len(folders)}" for name, folders in by_domain.items())
            raise ValueError(
                f"The classes of {self.title} are its class folders, {self.n_classes} in each domain, but no domain in "
                f"{self.root} has as many (found {found}). Is it unpacked completely, and nothing else with it? To run "
                "on a part of it, leave the empty folders of the other classes in one of the domains."
            )
        for name, folders in by_domain.items():
            check_folders(self.root / name, folders, whole, partial=self.partial, hint=self._hint)
        return whole


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


class PACSDataModule(DomainDataModule):
    """PACS, tested on one domain: seven kinds of things as paintings, cartoons, photos and sketches (9,991 pictures).

    Li et al., "Deeper, Broader and Artier Domain Generalization" (2017).

    Args:
        root: Folder with the four domains in it, or the folder that it lies in (``PACS``, ``PACS/kfold``, ...).
        domain: The domain to test on: ``art_painting``, ``cartoon``, ``photo`` or ``sketch``. Validation is a fixed
            fifth of the others, training their rest.
        **kwargs: See :class:`BenchmarkDataModule`.
    """

    title = "PACS"
    aliases = ("PACS", "PACS/kfold", "PACS/images", "pacs_data", "kfold", "images")
    draw = "pacs"
    domains: ClassVar = {
        "art_painting": Domain(2048, ("art",)),
        "cartoon": Domain(2344),
        "photo": Domain(1670),
        "sketch": Domain(3929),
    }
    n_classes = 7
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")

    def __init__(self, root: str | Path, domain: str = "art_painting", **kwargs: Any) -> None:
        super().__init__(root, domain, **kwargs)


class VLCSDataModule(DomainDataModule):
    """VLCS, tested on one domain: five kinds of things out of four photo collections (10,729 pictures).

    Fang et al., "Unbiased Metric Learning" (2013).

    The layout is DomainBed's, ``<domain>/<class>/*``, or ``<domain>/full/<0..4>/*``, whose numbers are the classes in
    alphabetical order.

    Args:
        root: Folder with the four domains in it, or the folder that it lies in as ``VLCS``.
        domain: The domain to test on: ``Caltech101``, ``LabelMe``, ``SUN09`` or ``VOC2007``. Validation is a fixed
            fifth of the others, training their rest.
        **kwargs: See :class:`BenchmarkDataModule`.
    """

    title = "VLCS"
    layout = "<domain>/<class>/* or <domain>/full/<0..4>/*"
    aliases = ("VLCS",)
    draw = "vlcs"
    domains: ClassVar = {
        "Caltech101": Domain(1415, ("Caltech",)),
        "LabelMe": Domain(2656),
        "SUN09": Domain(3282, ("SUN",)),
        "VOC2007": Domain(3376, ("VOC", "PASCAL")),
    }
    n_classes = 5
    classes = ("bird", "car", "chair", "dog", "person")

    def __init__(self, root: str | Path, domain: str = "Caltech101", **kwargs: Any) -> None:
        super().__init__(root, domain, **kwargs)

    def place(self, domain: str) -> str:
        """Where the class folders of a domain are: in ``full``, if there is one."""
        place = super().place(domain)
        return f"{place}/full" if (self.root / place / "full").is_dir() else place

    def class_labels(self, place: str) -> dict[str, int]:
        """Class index of every class folder, which in ``full`` is its name."""
        if place.endswith("/full"):
            return {str(label): label for label in range(self.n_classes)}
        return super().class_labels(place)


class OfficeHomeDataModule(DomainDataModule):
    """Office-Home, tested on one domain: 65 kinds of things in offices and homes (15,588 pictures).

    Venkateswara et al., "Deep Hashing Network for Unsupervised Domain Adaptation" (2017).

    Class names are the folders' (``Alarm_Clock``).

    Args:
        root: Folder with the four domains in it, or the folder that it lies in (``office_home``, ``OfficeHome``, ...).
        domain: The domain to test on: ``Art``, ``Clipart``, ``Product`` or ``Real World``, which some copies call
            ``Real``. Validation is a fixed fifth of the others, training their rest.
        **kwargs: See :class:`BenchmarkDataModule`.
    """

    title = "Office-Home"
    aliases = (
        "office_home",
        "OfficeHome",
        "Office-Home",
        "OfficeHomeDataset_10072016",
        "OfficeHome/OfficeHomeDataset_10072016",
    )
    draw = "office_home"
    domains: ClassVar = {
        "Art": Domain(2427),
        "Clipart": Domain(4365),
        "Product": Domain(4439),
        "Real World": Domain(4357, ("Real",)),
    }
    n_classes = 65

    def __init__(self, root: str | Path, domain: str = "Art", **kwargs: Any) -> None:
        super().__init__(root, domain, **kwargs)


class TerraIncognitaDataModule(DomainDataModule):
    """Terra Incognita as DomainBed selects it, tested on one domain: animals in front of four camera traps.

    Beery et al., "Recognition in Terra Incognita" (2018).

    The number of pictures is not checked: DomainBed's script gave 24,788 at first, and gives fewer (24,330 in later
    papers) with the newer annotations that it now downloads. Compare only results on the same number.

    Args:
        root: Folder with the four domains in it, or the folder that it lies in (``terra_incognita``, ...).
        domain: The domain to test on: ``location_38``, ``location_43``, ``location_46`` or ``location_100``, also
            called ``L38``. Validation is a fixed fifth of the others, training their rest.
        **kwargs: See :class:`BenchmarkDataModule`.
    """

    title = "Terra Incognita"
    aliases = ("terra_incognita", "TerraIncognita", "terrainc")
    draw = "terra_incognita"
    domains: ClassVar = {f"location_{place}": Domain(aliases=(f"L{place}", f"{place}")) for place in (38, 43, 46, 100)}
    n_classes = 10
    classes = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")

    def __init__(self, root: str | Path, domain: str = "location_38", **kwargs: Any) -> None:
        super().__init__(root, domain, **kwargs)


class DomainNetDataModule(DomainDataModule):
    """DomainNet, tested on one domain: 345 kinds of things in six styles (586,575 pictures without duplicates).

    Peng et al., "Moment Matching for Multi-Source Domain Adaptation" (2019).

    Class names are the folders' (``alarm_clock``). There are two protocols: DomainBed's, all pictures of the domain,
    and the official lists, ``<domain>_train.txt`` and ``<domain>_test.txt`` beside the domains or in ``splits``, of
    which test takes the test list, validation and training the other domains' train lists. Only the lists' numbers are
    checked: the archives of some domains still hold the duplicates that the lists leave out.

    Args:
        root: Folder with the six domains in it, or the folder that it lies in (``domain_net``, ``DomainNet``).
        domain: The domain to test on: ``clipart``, ``infograph``, ``painting``, ``quickdraw``, ``real`` or ``sketch``.
            Validation is a fixed fifth of the others, training their rest.
        split: ``"official"``: what the lists name. ``"all"``: all pictures. ``"auto"``: the official lists where that
            of the test domain is there, else all pictures. The result says which.
        **kwargs: See :class:`BenchmarkDataModule`.

    Raises:
        FileNotFoundError: If there are no official lists.
        ValueError: If there is no such split, or the lists are those of the release with duplicates.
    """

    title = "DomainNet"
    aliases = ("domain_net", "DomainNet")
    draw = "domain_net"
    domains: ClassVar = {name: Domain() for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")}
    n_classes = 345

    listed: ClassVar[dict[str, tuple[int, int]]] = {
        "clipart": (33525, 14604),
        "infograph": (36023, 15582),
        "painting": (50416, 21850),
        "quickdraw": (120750, 51750),
        "real": (120906, 52041),
        "sketch": (48212, 20916),
    }
    """How many pictures the train and test list of a domain have, without duplicates."""

    def __init__(self, root: str | Path, domain: str = "clipart", split: Lists = "auto", **kwargs: Any) -> None:
        if split not in get_args(Lists):
            raise ValueError(f"Expected split {', '.join(get_args(Lists))}, got {split!r}.")
        super().__init__(root, domain, **kwargs)
        self.is_official = split == "official" or (split == "auto" and self._list(self.domain).is_file())
        self.source = f"{self.domain}, {'official list' if self.is_official else 'all pictures'}"

    def size(self, domain: str) -> int | None:
        """How many pictures the list of a domain names."""
        train, test = self.listed[domain]
        if not self.is_official:
            return None
        return test if domain == self.domain else train

    def read_domain(self, domain: str) -> FilePictures:
        """Pictures of a domain, sorted by path: all of them, or those that are in its list.

        Raises:
            FileNotFoundError: If the list is missing.
            ValueError: If it is that of the release with duplicates.
        """
        pictures = super().read_domain(domain)
        expected = self.size(domain)
        if expected is None:
            return pictures
        file = self._list(domain)
        if not file.is_file():
            raise FileNotFoundError(
                f"No {file.name} in {self.root} or {self.root / 'splits'}: put the official list of {_LISTS} there, "
                "or set --data.split all."
            )
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines) > expected:
            raise ValueError(
                f"{file} names {len(lines)} pictures, more than the {expected} without duplicates: take the list of "
                f"the cleaned version at {_LISTS}."
            )
        # a line is the path below the root and the number of the class; labels go by the folder's name instead
        below = self.place(domain)
        listed = {f"{below}/{line.rsplit(maxsplit=1)[0].partition('/')[2]}" for line in lines}
        chosen = [place for place, path in enumerate(pictures.paths) if path in listed]
        return FilePictures(
            self.root, [pictures.paths[place] for place in chosen], [pictures.labels[place] for place in chosen]
        )

    def _list(self, domain: str) -> Path:
        """The list that is read of a domain: the test list of the one to test on, of the others the train list."""
        name = f"{domain}_{'test' if domain == self.domain else 'train'}.txt"
        inside = self.root / "splits" / name
        return inside if inside.is_file() else self.root / name
