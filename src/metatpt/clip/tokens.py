"""Class prompts as token ids: where the tunable context stands, and which class has which row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tokenizer = Callable[..., Tensor]
"""open_clip's: ``tokenizer(texts, context_length=n) -> [len(texts), n]`` int64, padded, cut without a word."""

_ROOM = 8  # a text is tokenised again in this many times the context length, to see whether it was cut


@dataclass(frozen=True)
class PromptTokens:
    """Prompts of C classes, of which U differ.

    Attributes:
        ids: ``[U, L]`` int64, padded to the tower's context length L.
        length: ``[U]`` int64: tokens of each prompt, start and end token included, padding not.
        start: Position of the first token of the words before the class name (the context).
        n_context: Number of tokens of the context.
        column: ``[C]`` int64: the row of each class. Equal prompts share a row, so that they tie exactly.
    """

    ids: Tensor
    length: Tensor
    start: int
    n_context: int
    column: Tensor


def format_prompt(template: str, class_name: str) -> str:
    """Put a class name into a template; underscores become spaces."""
    return template.replace("{}", class_name.replace("_", " "))


def tokenize_prompts(
    tokenizer: Tokenizer,
    context_length: int,
    template: str,
    class_names: Sequence[str],
    known_words: frozenset[str] | None = None,
) -> PromptTokens:
    """Tokenise one prompt for each class.

    Args:
        tokenizer: The tokenizer of the model's exact name.
        context_length: Length L of the tower's token rows.
        template: Text with one ``{}`` for the class name.
        class_names: One name for each of the C classes.
        known_words: The words that the model was trained on, or None where it knows any.

    Raises:
        ValueError: A template without exactly one ``{}``, a prompt longer than L, or a word that the model never saw.
    """
    if template.count("{}") != 1:
        raise ValueError(
            f"template {template!r} has {template.count('{}')} places for the class name; expected exactly one '{{}}', "
            "as in 'a photo of a {}.'"
        )
    if not class_names:
        raise ValueError("no class names: give at least one, for instance --data.class_names cat,dog")
    texts = [format_prompt(template, name) for name in class_names]
    if known_words is not None:
        _check_words(texts, class_names, known_words)
    unique = list(dict.fromkeys(texts))
    ids = tokenizer(unique, context_length=context_length)
    roomy = tokenizer(unique, context_length=_ROOM * context_length)
    lengths = _token_counts(roomy)
    _check_lengths(roomy, ids, lengths, texts, class_names, template, tokenizer, context_length)
    before = template.split("{}")[0].strip()
    start, n_context = _context_place(tokenizer, context_length, before, ids, template)
    row = {text: number for number, text in enumerate(unique)}
    return PromptTokens(
        ids=ids,
        length=lengths,
        start=start,
        n_context=n_context,
        column=torch.tensor([row[text] for text in texts], dtype=torch.int64),
    )


def _token_counts(roomy: Tensor) -> Tensor:
    # Padding is what ends every row; its id may also be a real token inside the text, so count from the right.
    padded = roomy == roomy[:, -1:]
    return roomy.shape[1] - padded.flip(1).int().cumprod(1).sum(1)


def _check_lengths(
    roomy: Tensor,
    ids: Tensor,
    lengths: Tensor,
    texts: list[str],
    class_names: Sequence[str],
    template: str,
    tokenizer: Tokenizer,
    context_length: int,
) -> None:
    cut = ((roomy[:, :context_length] != ids).any(1) | (lengths > context_length)).nonzero().flatten().tolist()
    if not cut:
        return
    unique = list(dict.fromkeys(texts))
    name = class_names[texts.index(unique[cut[0]])]
    around = _token_counts(tokenizer([template.replace("{}", "").strip()], context_length=_ROOM * context_length))
    room = context_length - int(around[0])
    needed = int(lengths[cut[0]]) - int(around[0])
    if room <= 0:
        raise ValueError(
            f"template {template!r} alone fills the model's context of {context_length} tokens; use a shorter one"
        )
    raise ValueError(
        f"class name {name!r} needs {needed} tokens, and template {template!r} leaves room for {room} of the model's "
        f"{context_length}; shorten the name (it would be cut, and predictions for it be wrong)"
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
