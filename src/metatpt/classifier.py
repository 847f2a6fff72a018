"""Classification without a Trainer."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metatpt import modules
from metatpt.datamodules.names import read_class_names
from metatpt.images import Source, UnreadableImageError, collate, to_sample
from metatpt.modules import AdaptationModule, ViewModule
from metatpt.modules.checks import check_choice, check_number
from metatpt.types import Adaptation, Batch

METHODS: dict[str, type[AdaptationModule]] = {
    "zero_shot": modules.ZeroShotModule,
    "view_average": modules.ViewAverageModule,
    "tpt": modules.TPTModule,
    "metatpt": modules.MetaTPTModule,
}


@dataclass(frozen=True)
class Prediction:
    """What a :class:`Classifier` returns for N pictures and C classes.

    Attributes:
        class_names: The C classes.
        probabilities: ``[N, C]`` float32, after adaptation.
        zero_shot_probabilities: ``[N, C]`` float32.
        averaged_probabilities: ``[N, C]`` of the confident views without tuning, or None for a method without views.
        views: ``[N, K, 3, R, R]`` in [0, 1], the selected views as they ended, where asked for.
        kept_zero_shot: Pictures whose adaptation was not finite and which keep their zero-shot prediction.
        skipped: Pictures whose zero-shot prediction is not finite; their probabilities are NaN.
    """

    class_names: list[str]
    probabilities: Tensor
    zero_shot_probabilities: Tensor
    averaged_probabilities: Tensor | None
    views: Tensor | None
    kept_zero_shot: list[int]
    skipped: list[int]

    @property
    def labels(self) -> list[str]:
        """The most probable class of each picture, the first of equal ones; of a skipped one the empty text."""
        best = self.probabilities.argmax(-1).tolist()
        return ["" if row in self.skipped else self.class_names[number] for row, number in enumerate(best)]


class Classifier:
    """A test-time adapted CLIP as a function of pictures.

    Args:
        class_names: The classes to choose from: a list, names with commas between (``cat,dog``), or the path of a text
            file with one name a line.
        clip: ``builtin``, a name that open_clip knows, or a folder with ``open_clip_config.json`` and weights; by
            default the checkpoint's, or else ``builtin``.
        pretrained: With a name: a tag of its weights, or a file.
        method: ``zero_shot``, ``view_average``, ``tpt``, ``metatpt``, or a class on
            :class:`metatpt.modules.AdaptationModule`.
        device: Where to compute; a GPU where there is one by default.
        seed: Of the views: picture i of a call draws from (seed, i), as picture i of a data set does.
        checkpoint: File of ``metatpt fit`` or ``metatpt import-prompt``: the prompt that the method starts from.
        batch_size: Pictures that adapt at once; one where a method carries something from picture to picture.
        **options: Of the method, as on the command line (``n_views=32``, ``template="a sketch of a {}."``, ...).

    Raises:
        TypeError: An argument of another kind, or an option that the method does not have.
        ValueError: A value that an argument or option cannot have.

    Example:
        >>> from PIL import Image
        >>> classify = Classifier(["red circle", "blue square"], method="zero_shot")
        >>> prediction = classify(Image.new("RGB", (90, 60), "red"))
        >>> prediction.probabilities.shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        class_names: str | Sequence[str],
        clip: str | None = None,
        pretrained: str | None = None,
        method: str | type[AdaptationModule] = "metatpt",
        device: str | torch.device | None = None,
        seed: int = 0,
        batch_size: int = 8,
        checkpoint: str | Path | None = None,
        **options: Any,
    ) -> None:
        made = _method(method)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"batch_size is {batch_size!r}; expected a whole number")
        check_number("batch_size", batch_size, 1)
        names = _class_names(class_names)
        try:
            if checkpoint is None:
                self.module = made(clip=clip or "builtin", pretrained=pretrained, class_names=names, **options)
            else:
                given = {name: each for name, each in (("clip", clip), ("pretrained", pretrained)) if each is not None}
                self.module = made.from_checkpoint(checkpoint, class_names=names, **given, **options)
        except TypeError as error:
            known = _options(made)
            unknown = [name for name in options if name not in known]
            if not unknown:
                raise
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise TypeError(f"{made.__name__} has no option {unknown[0]!r}; {hint}") from error
        self.module.seed = seed
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.module.to(self.device).eval()
        self.batch_size = batch_size

    def __call__(self, images: Source | Iterable[Source], *, return_views: bool = False) -> Prediction:
        """Classify pictures.

        Args:
            images: One picture or many: paths, PIL pictures, or tensors ``[3, H, W]`` (uint8, or float in [0, 1]);
                a tensor ``[N, 3, H, W]`` is N pictures.
            return_views: Return the selected views too.

        Raises:
            UnreadableImageError: A picture that cannot be read, with the reason.
            TypeError: Something that is no picture.
            ValueError: `return_views` with a method that has no views, or no pictures.
        """
        sources = _as_list(images)
        if not sources:
            raise ValueError("no pictures were given")
        if return_views and not isinstance(self.module, ViewModule):
            raise ValueError(f"{type(self.module).__name__} has no views to return; use another method")
        if isinstance(self.module, ViewModule):
            self.module.keep_views = return_views
        self.module.start_run()
        size = self.batch_size if self.module.carries_over() is None else 1
        results = []
        for first in range(0, len(sources), size):
            batch = self._batch(sources[first : first + size], first)
            self.module.start_batch(carry=False)
            results.append(self.module.process(batch.to(self.device)))
        return self._gather(results)

    def _batch(self, sources: list[Source], first: int) -> Batch:
        samples = [
            to_sample(source, self.module.preprocessing, index=first + place) for place, source in enumerate(sources)
        ]
        for sample, source in zip(samples, sources, strict=True):
            if sample.error is not None:
                where = f"picture {sample.index}" + (f" ({source})" if isinstance(source, (str, Path)) else "")
                raise UnreadableImageError(f"{where} cannot be read: {sample.error}")
        return collate(samples)

    def _gather(self, results: list[Adaptation]) -> Prediction:
        averaged = [result.averaged_log_probs for result in results if result.averaged_log_probs is not None]
        views = [result.views for result in results if result.views is not None]
        status = [each for result in results for each in result.status]
        skipped = [row for row, each in enumerate(status) if each == "skipped"]
        probabilities = torch.cat([result.log_probs for result in results]).exp().cpu()
        probabilities[skipped] = torch.nan
        return Prediction(
            class_names=self.module.class_names,
            probabilities=probabilities,
            zero_shot_probabilities=torch.cat([result.zero_shot_log_probs for result in results]).exp().cpu(),
            averaged_probabilities=torch.cat(averaged).exp().cpu() if averaged else None,
            views=torch.cat(views).cpu() if views else None,
            kept_zero_shot=[row for row, each in enumerate(status) if each == "kept_zero_shot"],
            skipped=skipped,
        )


def _method(method: str | type[AdaptationModule]) -> type[AdaptationModule]:
    if isinstance(method, str):
        return METHODS[check_choice("method", method, list(METHODS))]
    if isinstance(method, type) and issubclass(method, AdaptationModule):
        return method
    raise TypeError(f"method is {method!r}; expected {', '.join(METHODS)}, or a class on AdaptationModule")


def _class_names(given: str | Sequence[str]) -> list[str]:
    if isinstance(given, (bytes, Mapping, set, frozenset)) or not isinstance(given, Iterable):
        raise TypeError(
            f"class_names is {reprlib.repr(given)}; expected a list, names with commas between, or a text file's path"
        )
    return read_class_names(given if isinstance(given, str) else list(given))


def _options(method: type[AdaptationModule]) -> list[str]:
    """Options of a method: of its ``__init__``, and of those that it hands the rest on to."""
    found: dict[str, None] = {}
    for cls in method.__mro__:
        if "__init__" not in cls.__dict__:
            continue
        parameters = list(inspect.signature(cls.__dict__["__init__"]).parameters.values())[1:]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found.update((each.name, None) for each in parameters if each.kind in named)
        if all(each.kind != inspect.Parameter.VAR_KEYWORD for each in parameters):
            break
    return [name for name in found if name not in ("clip", "pretrained", "class_names")]


def _as_list(images: Source | Iterable[Source]) -> list[Source]:
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    if isinstance(images, Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (bytes, Mapping)) or not isinstance(images, Iterable):
        raise TypeError(
            f"images is {reprlib.repr(images)} ({type(images).__name__}); expected a path, a PIL picture, a tensor, or "
            "several of them"
        )
    sources = list(images)
    for place, source in enumerate(sources):
        if not isinstance(source, (str, Path, Image.Image, Tensor)):
            raise TypeError(
                f"picture {place} is {reprlib.repr(source)} ({type(source).__name__}); expected a path, a PIL picture "
                "or a tensor"
            )
    return sources
