"""Class prompts as token ids: where the vectors of a tunable context stand, and which class has which row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Tokenizer = Callable[..., Tensor]
"""open_clip's: ``tokenizer(texts, context_length=n) -> [len(texts), n]`` int64, padded, cut without a word."""

Init = Literal["words", "random"]
"""Context vectors that start as the words of the template before the class name, or in place of these from noise."""

Position = Literal["end", "middle", "front"]
"""Of the class name: behind the context, between its halves, or before it."""

_ROOM = 8  # a text is tokenised again in this many times the context length, to see whether it was cut
_RANDOM = 16  # vectors, by default


@dataclass(frozen=True)
class ContextLayout:
    """Where the vectors of a context stand in each prompt.

    Attributes:
        n_context: How many; by default as many as there are words (tokens) before the class name, or 16 random ones.
            With fewer the last words stay as they are, behind the vectors.
        init: Whether they stand in the place of these words, or the words are left out.
        per_class: Whether each class has vectors, and so a row, of its own; else equal prompts share one.
        position: Of the class name. In the ``middle`` half of the vectors, rounded down, stand before it.

    Raises:
        ValueError: Options that are not known, or do not go together.
    """

    n_context: int | None = None
    init: Init = "words"
    per_class: bool = False
    position: Position = "end"

    def __post_init__(self) -> None:
        for name, known in (("init", get_args(Init)), ("position", get_args(Position))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.n_context is not None and self.n_context < 1:
            raise ValueError(f"n_context is {self.n_context}; expected at least 1")

    def count(self, n_words: int, template: str) -> int:
        """Number of vectors, for a template with so many tokens before the class name.

        Raises:
            ValueError: More than there are words to start from, or fewer where the words that are left have no place.
        """
        if self.init == "random":
            return self.n_context or _RANDOM
        n = n_words if self.n_context is None else self.n_context
        if n > n_words:
            raise ValueError(
                f"n_context is {n}, and template {template!r} has {n_words} tokens before the class name to start "
                "from; take fewer, a template with more words, or init: random"
            )
        if n < n_words and self.position != "end":
            raise ValueError(
                f"n_context {n} leaves words of template {template!r} ({n_words} tokens) as they are, and these have "
                f"a place with position: end only, not {self.position}; take all words, or init: random"
            )
        return n


@dataclass(frozen=True)
class PromptTokens:
    """Prompts of C classes, of which U have a row.

    Attributes:
        ids: ``[U, L]`` int64, padded to the tower's context length L. Where a context vector stands it is the word
            that this starts from, or a placeholder.
        length: ``[U]`` int64: tokens of each prompt, start and end token included, padding not.
        start: Position of the first token behind the start token (0 where the tokenizer has none).
        place: ``[U, n]`` int64: position of each context vector in each row.
        prefix: Number of leading tokens that all rows share, context vectors among them.
        column: ``[C]`` int64: the row of each class. Equal prompts share a row, so that they tie exactly.
    """

    ids: Tensor
    length: Tensor
    start: int
    place: Tensor
    prefix: int
    column: Tensor

    @property
    def n_context(self) -> int:
        """Number n of context vectors."""
        return self.place.shape[1]

    @property
    def n_shared(self) -> int:
        """Number of context vectors, the first ones, that stand in what all rows share."""
        return int((self.place[0] < self.prefix).sum())

    def few(self, rows: int) -> PromptTokens:
        """The first rows, without the classes; where they have no context vector, in place of the first token."""
        place = self.place[:rows] if self.n_context else self.place.new_zeros(len(self.ids[:rows]), 1)
        prefix = max(self.prefix, 1) if not self.n_context else self.prefix
        return PromptTokens(self.ids[:rows], self.length[:rows], self.start, place, prefix, self.column[:0])


def format_prompt(template: str, class_name: str) -> str:
    """Put a class name into a template; underscores become spaces."""
    return template.replace("{}", class_name.replace("_", " "))


def tokenize_prompts(
    tokenizer: Tokenizer,
    context_length: int,
    template: str,
    class_names: Sequence[str],
    known_words: frozenset[str] | None = None,
    layout: ContextLayout | None = None,
) -> PromptTokens:
    """Tokenise one prompt for each class.

    Args:
        tokenizer: The tokenizer of the model's exact name.
        context_length: Length L of the tower's token rows.
        template: Text with one ``{}`` for the class name.
        class_names: One name for each of the C classes.
        known_words: The words that the model was trained on, or None where it knows any.
        layout: Where context vectors stand; by default in place of all words before the class name.

    Raises:
        ValueError: A template without exactly one ``{}``, a prompt longer than L, a word that the model never saw, or
            a layout that the template does not allow.
    """
    layout = layout or ContextLayout()
    if template.count("{}") != 1:
        raise ValueError(
            f"template {template!r} has {template.count('{}')} places for the class name; expected exactly one '{{}}', "
            "as in 'a photo of a {}.'"
        )
    if not class_names:
        raise ValueError("no class names: give at least one, for instance --data.class_names cat,dog")
    inserted = 0
    if layout.init == "random":  # the words before the name are left out
        template, inserted = template[template.index("{}") :], layout.count(0, template)
    texts = [format_prompt(template, name) for name in class_names]
    if known_words is not None:
        _check_words(texts, class_names, known_words)
    unique = texts if layout.per_class else list(dict.fromkeys(texts))
    ids = tokenizer(unique, context_length=context_length)
    roomy = tokenizer(unique, context_length=_ROOM * context_length)
    lengths = _token_counts(roomy)
    _check_lengths(roomy, ids, lengths, unique, texts, class_names, template, tokenizer, context_length, inserted)
    before = template.split("{}")[0].strip()
    start, n_words = _context_place(tokenizer, context_length, before, ids, template)
    n_context = layout.count(n_words, template)
    name = None
    if layout.position != "end":
        name = _name_lengths(tokenizer, context_length, template, unique, class_names, texts, ids, start + n_words)
    if inserted:
        placeholder = tokenizer(["X"], context_length=context_length)[:, start : start + 1].expand(len(ids), inserted)
        ids = torch.cat([ids[:, :start], placeholder, ids[:, start : context_length - inserted]], dim=1)
    place = torch.arange(start, start + n_context).expand(len(ids), -1)
    if name is None:
        prefix = start + n_words + inserted
    else:
        first = n_context // 2 if layout.position == "middle" else 0
        ids, place = _move_names(ids, place, start + n_context, name, first)
        prefix = start + first
    row = {text: number for number, text in enumerate(unique)}
    column = range(len(texts)) if layout.per_class else [row[text] for text in texts]
    return PromptTokens(
        ids=ids,
        length=lengths + inserted,
        start=start,
        place=place,
        prefix=start if layout.per_class else prefix,
        column=torch.tensor(column, dtype=torch.int64),
    )


def _token_counts(roomy: Tensor) -> Tensor:
    # Padding is what ends every row; its id may also be a real token inside the text, so count from the right.
    padded = roomy == roomy[:, -1:]
    return roomy.shape[1] - padded.flip(1).int().cumprod(1).sum(1)


def _check_lengths(
    roomy: Tensor,
    ids: Tensor,
    lengths: Tensor,
    unique: list[str],
    texts: list[str],
    class_names: Sequence[str],
    template: str,
    tokenizer: Tokenizer,
    context_length: int,
    inserted: int,
) -> None:
    whole = (roomy[:, :context_length] == ids).all(1) & (lengths + inserted <= context_length)
    cut = (~whole).nonzero().flatten().tolist()
    if not cut:
        return
    name = class_names[texts.index(unique[cut[0]])]
    around = _token_counts(tokenizer([template.replace("{}", "").strip()], context_length=_ROOM * context_length))
    room = context_length - int(around[0]) - inserted
    needed = int(lengths[cut[0]]) - int(around[0])
    vectors = f" with {inserted} context vectors before it" * bool(inserted)
    if room <= 0:
        raise ValueError(
            f"template {template!r}{vectors} alone fills the model's context of {context_length} tokens; use a "
            f"shorter one{', or fewer vectors (n_context)' * bool(inserted)}"
        )
    raise ValueError(
        f"class name {name!r} needs {needed} tokens, and template {template!r}{vectors} leaves room for {room} of the "
        f"model's {context_length}; shorten the name (it would be cut, and predictions for it be wrong)"
    )


def _context_place(
    tokenizer: Tokenizer, context_length: int, before: str, ids: Tensor, template: str
) -> tuple[int, int]:
    empty, words = tokenizer(["", before or "a"], context_length=context_length)
    differs = (empty != words).nonzero().flatten()
    start = int(differs[0])  # 1 where the tokenizer has a start token, else 0
    if not before:
        return start, 0
    count = int(_token_counts(words[None])[0]) - int(_token_counts(empty[None])[0])
    if not bool((ids[:, start : start + count] == words[start : start + count]).all()):
        raise ValueError(
            f"the words before the class name in template {template!r} are tokenised differently next to a name; "
            "end them with a space or a whole word"
        )
    return start, count


def _name_lengths(
    tokenizer: Tokenizer,
    context_length: int,
    template: str,
    unique: list[str],
    class_names: Sequence[str],
    texts: list[str],
    ids: Tensor,
    start: int,
) -> list[int]:
    """Number of tokens of the class name in each row, of which the first stands at `start`."""
    names = [class_names[texts.index(text)] for text in unique]
    cut_off = [format_prompt(template.split("{}")[0] + "{}", name).strip() for name in names]
    rows = tokenizer([template.split("{}")[0].strip(), *cut_off], context_length=_ROOM * context_length)
    counts = _token_counts(rows)
    lengths = (counts[1:] - counts[0]).tolist()
    for name, length, whole, alone in zip(names, lengths, ids, rows[1:], strict=True):
        if length < 1 or not bool((whole[start : start + length] == alone[start : start + length]).all()):
            raise ValueError(
                f"class name {name!r} is tokenised differently next to what stands behind it in template "
                f"{template!r}, so that no context can stand between; use position: end"
            )
    return lengths


def _move_names(ids: Tensor, place: Tensor, start: int, lengths: list[int], first: int) -> tuple[Tensor, Tensor]:
    """Put the class names behind the first context vectors, of which the last one stood before `start`."""
    ids, place = ids.clone(), place.clone()
    for row, length in enumerate(lengths):
        later = place[row, first:].clone()
        begin = start - len(later)
        words, name = ids[row, later].clone(), ids[row, start : start + length].clone()
        ids[row, begin : begin + length] = name
        ids[row, begin + length : start + length] = words
        place[row, first:] = later + length
    return ids, place


def _check_words(texts: list[str], class_names: Sequence[str], known_words: frozenset[str]) -> None:
    for text, name in zip(texts, class_names, strict=True):
        unknown = [word for word in re.findall(r"\w+", text.lower()) if word not in known_words]
        if unknown:
            where = f"class name {name!r}" if unknown[0] in name.lower() else f"the template, as in {text!r},"
            raise ValueError(
                f"{where} has the word {unknown[0]!r}, which the bundled model never saw. It knows: "
                f"{', '.join(sorted(known_words))}. For any other words use a real CLIP: "
                "--model.clip ViT-B-16-quickgelu --model.pretrained openai (downloads 600 MB once)"
            )
