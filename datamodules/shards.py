"""WebDataset shards as a split, each place of which is taken once by all processes and workers together."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import IterableDataset, get_worker_info

from metatpt.images import Sample, empty_sample, to_sample

from .base import BaseDataModule, Picture, PictureDataset, Split
from .names import nearest, read_class_names, some
from .sampler import FILLER
from .shard_files import Label, Shard, find_shards, is_url, package, read_index, read_samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.utils.data import DataLoader

INDEX_NAME = "metatpt-index.json"
"""The index file, beside local shards."""


class WebDatasetDataModule(BaseDataModule):
    """Pictures in tar shards, local or over http, read through the package webdataset (``metatpt[webdataset]``).

    A sample is a picture ``<key>.jpg`` (or another picture's ending) and its label in ``<key>.cls``, the class's number
    or name as text, or under ``label`` in ``<key>.json``; without either it has no label. Numbers count `class_names`
    from 0, names are matched with them. A key ends at the first dot of a file's name, as everywhere in webdataset.

    A sample's index is its place in all shards put together in the order of their names: their paths below the folder
    that they have in common. In results it is called ``<shard>/<key>``. Each process, and in it each worker, takes a
    run of these places, opens only the shards that it lies in, and reads those up to its end; so there may be fewer
    shards than workers. With several workers batches come from each in turn: where one sample's prompt is carried over
    to the next, take `num_workers` 0 or 1. Validation and test are the same pictures.

    How many samples a shard has, and their labels, is read once from all of the shard and kept in the index file, with
    the shard's size and time of change; one that is new or has changed is read again.

    Args:
        shards: A folder with .tar files, a file, a pattern (``val-{0000..0063}.tar``, ``val-*.tar``), an address with
            or without braces (``https://host/val-{0000..0063}.tar``; read by curl), or a list of these. Tar files are
            not compressed.
        class_names: A list, names with commas between (``cat,dog``), or a text file with one name a line.
        index_file: Where counts and labels are kept. By default ``metatpt-index.json`` in the folder of local shards;
            shards on the web need it.
        **kwargs: See :class:`BaseDataModule`.

    Raises:
        ImportError: The package webdataset is not installed.
        FileNotFoundError: There is no such shard on the disk.
        ValueError: A shard stands twice, `index_file` is missing, or `class_names` is not as it should be.
    """

    splits = ("val", "test")

    def __init__(
        self,
        shards: str | list[str],
        class_names: str | list[str],
        index_file: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        package("webdataset")  # a missing one is reported before the data are read
        self.class_names = read_class_names(class_names)
        self.shards = find_shards([shards] if isinstance(shards, str) else shards)
        if index_file is not None:
            self.index_file = Path(index_file).expanduser().absolute()
        elif any(is_url(shard.url) for shard in self.shards):
            raise ValueError(
                "Shards on the web need index_file, a file here to keep the numbers of their samples in: add "
                f"--data.index_file {INDEX_NAME}, one for each data set."
            )
        else:
            first = self.shards[0]
            self.index_file = Path(first.url.removesuffix(first.name), INDEX_NAME)

    def prepare_data(self) -> None:
        """Bring the index file up to date, on one process of each machine."""
        read_index(self.index_file, self.shards)

    def pictures(self, split: Split) -> ShardPictures:
        """All samples of all shards, in either split.

        Raises:
            OSError: A shard cannot be read, or is cut off.
            ValueError: There is no sample, one does not have one picture, or its label is none of the classes.
        """
        by_shard = read_index(self.index_file, self.shards)
        given = [label for of_shard in by_shard for label in of_shard]
        if not given:
            raise ValueError(f"No sample in {some([str(shard) for shard in self.shards])}.")
        times = Counter(self.class_names)
        known: dict[Label, int] = {None: -1}
        for number, name in enumerate(self.class_names):
            known[number] = number
            if times[name] == 1:
                known[name] = number
        pictures = ShardPictures(
            self.shards, [len(of_shard) for of_shard in by_shard], [known.get(label, -1) for label in given]
        )
        for place, label in enumerate(given):
            if label not in known:
                like = f" ({nearest(label, self.class_names)})" if isinstance(label, str) else ""
                raise ValueError(
                    f"Sample {pictures[place].path} has the label {label!r}: expected a class's number, 0 to "
                    f"{len(self.class_names) - 1}, or its name, where no other class has the same{like}."
                )
        unlabelled = f"; {pictures.labels.count(-1)} without label" if None in given else ""
        rank_zero_info(f"{len(self.shards)} shards with {len(pictures)} pictures{unlabelled}.")
        return pictures

    def _in_order(self, split: Split) -> DataLoader[Sample]:
        dataset, indices = self._set_up(split)
        processes, rank = self._place()
        start, stop = _run(len(indices), rank, processes)
        return self._loader(ShardStream(dataset, indices[start:stop] or [FILLER], self.batch_size), None)


@dataclass(frozen=True)
class ShardPictures:
    """The samples of shards put together.

    Attributes:
        shards: The shards in their order.
        sizes: How many samples each has.
        labels: Class index of each sample, -1 where unknown.
    """

    shards: list[Shard]
    sizes: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Picture:
        for _, picture in self.read([index]):
            return picture
        raise IndexError(f"Expected an index from 0 to {len(self) - 1}, got {index}.")

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Picture]]:
        """Pictures with their places; a shard is read from its front to the last of them that it has.

        Args:
            indices: Places of the pictures, in ascending order.

        Raises:
            OSError: A shard cannot be read, or has fewer samples than it had when they were counted.
        """
        start = 0
        for shard, size in zip(self.shards, self.sizes, strict=True):
            wanted = indices[bisect_left(indices, start) : bisect_left(indices, start + size)]
            if wanted:
                chosen = set(wanted)
                with closing(read_samples(shard)) as samples:
                    for place, sample in enumerate(samples, start):
                        if place in chosen:
                            yield place, Picture(sample.picture, self.labels[place], sample.path)
                        if place == wanted[-1]:
                            break
                    else:
                        raise OSError(
                            f"Shard {shard} ended early: it had {size} samples when they were counted, and has changed."
                        )
            start += size


class ShardStream(IterableDataset[Sample]):
    """A process's samples; each worker of a DataLoader takes a run of them, in whole batches.

    Args:
        dataset: The split, whose pictures are :class:`ShardPictures`.
        indices: Places of the samples in the whole split, in ascending order; or only :data:`FILLER`.
        batch_size: That of the DataLoader. No worker but the last has a batch that is not full, so there are as many
            as with one worker.
    """

    def __init__(self, dataset: PictureDataset, indices: list[int], batch_size: int) -> None:
        self.dataset = dataset
        self.indices = indices
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        place, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first, last = _run(-(-len(self.indices) // self.batch_size), place, of)
        indices = self.indices[first * self.batch_size : last * self.batch_size]
        pictures, preprocessing, plain = self.dataset.pictures, self.dataset.preprocessing, self.dataset.plain
        assert isinstance(pictures, ShardPictures)
        if indices == [FILLER]:
            yield empty_sample(preprocessing)
            return
        for index, (source, label, path) in pictures.read(indices):
            yield to_sample(source, preprocessing, plain=plain, label=label, index=index, path=path)


def _run(count: int, place: int, of: int) -> tuple[int, int]:
    """Where one of so many runs of `count` things begins, and where it has ended."""
    return count * place // of, count * (place + 1) // of
