"""Looks a data set over before a run: splits and counts, readable pictures, class names, and a sheet to look at.

The commonest fault in this field is an accuracy of about 0 from labels in another order, which no count shows: hence
the sheet, with the class name that each picture has here under it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from open_clip.tokenizer import SimpleTokenizer
from PIL import Image, ImageDraw, ImageFont

from metatpt.clip.tokens import tokenize_prompts
from metatpt.datamodules.base import BaseDataModule, Picture, Pictures, Split
from metatpt.datamodules.benchmark import BenchmarkDataModule
from metatpt.datamodules.names import some
from metatpt.datamodules.shards import ShardPictures
from metatpt.datamodules.subsets import balanced_subset
from metatpt.images import UnreadableImageError, decode

_TILE, _TEXT, _COLUMNS = 128, 32, 8
_LISTED = 5
_TEMPLATE = "a photo of a {}."
_CONTEXT = 77  # of OpenAI's towers and most others


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        what: What was looked at.
        found: What was found.
        wrong: Whether it is a fault.
    """

    what: str
    found: str
    wrong: bool = False


@dataclass
class Report:
    """What a data set looks like.

    Attributes:
        findings: Line by line.
        sheet: Pictures with their class names, if there are any.
    """

    findings: list[Finding] = field(default_factory=list)
    sheet: Image.Image | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether anything is."""
        return any(finding.wrong for finding in self.findings)

    def note(self, what: str, found: object, wrong: bool = False) -> None:
        """Add a line."""
        self.findings.append(Finding(what, str(found), wrong))


def examine(data: BaseDataModule, pictures: int | None = 200, on_sheet: int = 48) -> Report:
    """Look a data set over.

    Args:
        data: Its datamodule. It need not be set up.
        pictures: How many of each split are decoded, evenly over the classes; None for all.
        on_sheet: How many of the test split are shown, at most one of each class where there are more classes.

    Returns:
        The report. A split that is missing or not what was published is a fault in it, not an exception.
    """
    report = Report()
    report.note("data set", type(data).__name__)
    if isinstance(data, BenchmarkDataModule):
        report.note("layout", data.layout)
    if hasattr(data, "root"):
        report.note("root", data.root)
    read = {split: _read(report, data, split) for split in data.splits}
    tested = read.get("test")
    for split, found in read.items():
        if found is None:
            continue
        if split != "test" and tested is not None and _same(found, tested):
            # Training on the pictures that are tested on is a fault; to validate on them is said in the docs.
            report.note(split, "the pictures of test", wrong=split == "train")
        else:
            _examine_split(report, data, split, found, pictures, on_sheet if split == "test" else 0)
    if data.source is not None:
        report.note("which", data.source)
    _examine_names(report, data.class_names)
    return report


def _read(report: Report, data: BaseDataModule, split: Split) -> Pictures | None:
    try:
        return data.pictures(split)
    except FileNotFoundError as error:
        # Only the split that is tested on must be there: a copy without training pictures is in common use.
        report.note(split, error, wrong=split == "test")
    except (ValueError, OSError, ImportError) as error:
        report.note(split, error, wrong=True)
    return None


def _same(one: Pictures, other: Pictures) -> bool:
    same_labels = len(one) > 0 and list(one.labels) == list(other.labels)
    return same_labels and one[0].path == other[0].path


def _examine_split(
    report: Report, data: BaseDataModule, split: Split, found: Pictures, pictures: int | None, on_sheet: int
) -> None:
    count = f"{len(found)}"
    published = data.published(split) if isinstance(data, BenchmarkDataModule) else None
    if published is not None:
        count += f" of {published} published"
    report.note(split, count, wrong=len(found) == 0)
    seen = Counter(found.labels)
    if set(seen) - {-1}:
        without = [name for label, name in enumerate(data.class_names) if label not in seen]
        spread = sorted(count for label, count in seen.items() if label >= 0)
        report.note(
            f"{split}: of each class",
            f"{spread[0]} to {spread[-1]}" + (f"; none of {len(without)}: {some(without)}" if without else ""),
        )
    chosen = balanced_subset(found.labels, pictures, seed=0)
    unreadable = _unreadable(found, chosen)
    listed = "; ".join(f"{path}: {reason}" for path, reason in unreadable[:_LISTED])
    report.note(
        f"{split}: cannot be read",
        f"{len(unreadable)} of {len(chosen)} looked at" + (f": {listed}" if unreadable else ""),
        wrong=bool(unreadable),
    )
    if on_sheet:
        report.sheet = contact_sheet(found, balanced_subset(found.labels, on_sheet, seed=0), data.class_names)


def _unreadable(pictures: Pictures, chosen: Sequence[int]) -> list[tuple[str, str]]:
    def fault(picture: Picture) -> tuple[str, str] | None:
        try:
            decode(picture.source)
        except UnreadableImageError as error:
            return picture.path, str(error)
        return None

    if isinstance(pictures, ShardPictures):  # one picture after the other: each shard is read once, and held by nobody
        found = [fault(picture) for picture in _each(pictures, chosen)]
    else:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda index: fault(pictures[index]), chosen))
    return [each for each in found if each is not None]


def _each(pictures: Pictures, chosen: Sequence[int]) -> Iterator[Picture]:
    """The pictures at some places, which ascend."""
    if isinstance(pictures, ShardPictures):
        for _, picture in pictures.read(chosen):
            yield picture
    else:
        for index in chosen:
            yield pictures[index]


def _examine_names(report: Report, names: Sequence[str]) -> None:
    report.note("classes", f"{len(names)}: {some(names)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:  # no fault: ImageNet has two of them
        report.note("names that stand twice", f"{some(twice)}; pictures of either go to the first")
    tokenizer, too_long = SimpleTokenizer(), []
    for name in dict.fromkeys(names):
        try:
            tokenize_prompts(tokenizer, _CONTEXT, _TEMPLATE, [name])
        except ValueError:
            too_long.append(name)
    found = f"{len(too_long)} (with {_TEMPLATE!r}, of {_CONTEXT} tokens)"
    report.note("names too long", found + (f": {some(too_long)}" if too_long else ""), wrong=bool(too_long))


def contact_sheet(pictures: Pictures, chosen: Sequence[int], class_names: Sequence[str]) -> Image.Image:
    """Pictures side by side, each with its class name under it.

    Args:
        pictures: A split.
        chosen: Which of them, in ascending order.
        class_names: Names by label; a picture without a label has its path under it.
    """
    rows = -(-len(chosen) // _COLUMNS)
    sheet = Image.new("RGB", (min(len(chosen), _COLUMNS) * _TILE, rows * (_TILE + _TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for place, picture in enumerate(_each(pictures, chosen)):
        left, top = place % _COLUMNS * _TILE, place // _COLUMNS * (_TILE + _TEXT)
        try:
            tile = decode(picture.source)
        except UnreadableImageError:
            tile = Image.new("RGB", (_TILE, _TILE), "red")
        tile.thumbnail((_TILE - 4, _TILE - 4))
        sheet.paste(tile, (left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2))
        text = class_names[picture.label] if picture.label >= 0 else picture.path
        for line, words in enumerate(_lines(text, font)[:2]):
            draw.text((left + 2, top + _TILE + 14 * line), words, "black", font)
    return sheet


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Text in lines as wide as a tile."""
    lines = [""]
    for word in text.replace("_", " ").split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > _TILE - 4:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
