"""CoOp's prompt: against the official code, against open_clip's own forward, and what it refuses."""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import models
from helpers.batches import make_batch
from helpers.golden import NAMES, fixture, originals, save_golden
from torch import Tensor

from metatpt.clip import ContextLayout, FrozenCLIP, load_clip
from metatpt.clip.blocks import BlockHook
from metatpt.clip.budget import Budget
from metatpt.clip.text import PlainPrompts, token_embedding
from metatpt.modules import TPTModule
from metatpt.prompts import TextPrompt

frozen = functools.cache(models.frozen)
FEW = ["cat", "golden retriever", "hand-held computer", "cat"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> FrozenCLIP:
    return load_clip(str(save_golden(tmp_path_factory.mktemp("golden"))))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("ctx4_end", {}),
        ("ctx4_end", {"n_context": 4, "init": "random"}),
        ("ctx16_end", {"init": "random"}),
        ("ctx4_middle", {"position": "middle"}),
        ("ctx4_middle", {"n_context": 4, "init": "random", "position": "middle"}),
        ("ctx4_front", {"position": "front"}),
        ("ctx4_csc_end", {"per_class": True}),
        ("ctx4_csc_end", {"n_context": 4, "init": "random", "per_class": True}),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_official_logits(golden: FrozenCLIP, variant: str, options: dict[str, Any], plain: bool) -> None:
    expected = fixture("coop_prompt_learner")
    prompt = TextPrompt(golden, NAMES, "a photo of a {}.", **options)
    if plain:  # through open_clip's own forward
        prompt._layout = PlainPrompts(golden.model, prompt._layout.tokens)
    given = expected.get(f"{variant}/ctx", expected["ctx4_end/ctx"])
    prompt.tuned["context"].data.copy_(given)
    with torch.no_grad():
        logits = prompt.head()(prompt.encode(originals()))[:, 0]
        texts = prompt.class_features(None, prompt._compute)[0][prompt.column]
    torch.testing.assert_close(texts, expected[f"{variant}/text_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected[f"{variant}/logits"], atol=1e-4, rtol=0)


def by_hand(clip: FrozenCLIP, rows: list[list[int | Tensor]]) -> Tensor:
    """Features of rows of token ids and vectors, each alone through open_clip's own forward."""
    table = token_embedding(clip.model)
    texts = []
    for row in rows:
        ids = torch.tensor([each if isinstance(each, int) else 320 for each in row])
        ids = F.pad(ids, (0, clip.context_length - len(ids)))[None]
        embedded = F.embedding(ids, table.weight)[0].clone()
        for place, each in enumerate(row):
            if isinstance(each, Tensor):
                embedded[place] = each
        original = table.forward
        table.forward = lambda _, embedded=embedded: embedded[None]  # type: ignore[method-assign, misc]
        try:
            texts.append(clip.model.encode_text(ids)[0])
        finally:
            table.forward = original  # type: ignore[method-assign]
    return F.normalize(torch.stack(texts), dim=-1)


def expected_rows(clip: FrozenCLIP, context: Tensor, position: str, left: str) -> list[list[int | Tensor]]:
    """Start, context and name, the full stop, end; `context` is ``[n, d]``, or ``[4, n, d]`` per class."""

    def ids(text: str) -> list[int]:
        row = clip.tokenizer([text], context_length=77)[0].tolist()
        return row[1 : row.index(49407)]

    rows: list[list[int | Tensor]] = []
    for number, name in enumerate(FEW):
        vectors = list(context if context.ndim == 2 else context[number])
        before = {"end": len(vectors), "middle": len(vectors) // 2, "front": 0}[position]
        words = ids(left) if left else []
        body = [*vectors[:before], *words, *ids(name), *vectors[before:], *ids(".")]
        rows.append([49406, *body, 49407])
    return rows


@pytest.mark.parametrize("memory", [2**32, 1])
@pytest.mark.parametrize("kind", ["openai_vit", "custom_blocks"])
@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"n_context": 2}, "of a"),
        ({"n_context": 3, "per_class": True}, "a"),
        ({"n_context": 3, "init": "random", "position": "middle"}, ""),
        ({"n_context": 3, "init": "random", "position": "front", "per_class": True}, ""),
        ({"position": "front"}, ""),
    ],
)
def test_layouts_and_their_gradients(kind: str, options: dict[str, Any], left: str, memory: int) -> None:
    clip = frozen(kind)
    clip.budget = Budget(memory)  # 1 byte: every class is a chunk of its own, computed again in the backward pass
    prompt = TextPrompt(clip, FEW, "a photo of a {}.", **options)
    torch.manual_seed(0)
    start = prompt.tuned["context"].detach()
    state = {"context": (start + 0.1 * torch.randn(2, *start.shape)).requires_grad_()}
    features = prompt.class_features(state, prompt._compute)[:, prompt.column]
    position = options.get("position", "end")
    expected = torch.stack([by_hand(clip, expected_rows(clip, each, position, left)) for each in state["context"]])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((features * weight).sum(), state["context"])
    (other,) = torch.autograd.grad((expected * weight).sum(), state["context"])
    assert (gradient - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("options", [{"position": "middle"}, {"per_class": True}, {"n_context": 2}])
def test_finite_differences(options: dict[str, Any]) -> None:
    clip = models.frozen("openai_vit").double()
    prompt = TextPrompt(clip, FEW, "a photo of a {}.", **options)
    state = prompt.initial_state(2)
    assert state["context"].dtype == torch.float64
    moved = {"context": (state["context"] + 0.1 * torch.randn_like(state["context"])).requires_grad_()}
    features = F.normalize(torch.randn(2, 3, 24, dtype=torch.float64), dim=-1)

    def loss(context: Tensor) -> Tensor:
        return prompt.head({"context": context})(features).log_softmax(-1)[..., 1].sum()

    (gradient,) = torch.autograd.grad(loss(moved["context"]), moved["context"])
    direction = torch.randn_like(gradient)
    step = 1e-5 * direction
    with torch.no_grad():
        difference = (loss(moved["context"] + step) - loss(moved["context"] - step)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{"position": "middle"}, {"per_class": True, "init": "random", "n_context": 2}])
def test_samples_together_and_alone(options: dict[str, Any]) -> None:
    prompt = TextPrompt(frozen("openai_vit"), FEW, "a photo of a {}.", **options)
    start = prompt.tuned["context"].detach()
    torch.manual_seed(0)
    state = {"context": start + 0.1 * torch.randn(3, *start.shape)}
    features = F.normalize(torch.randn(3, 5, 24), dim=-1)
    together = prompt.head(state)(features)
    alone = [prompt.head({"context": state["context"][i : i + 1]})(features[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    torch.testing.assert_close(prompt.head(prompt.initial_state(3))(features), prompt.head()(features))


def test_equal_names_share_a_row_unless_each_class_has_its_own() -> None:
    clip = frozen("openai_vit")
    shared = TextPrompt(clip, FEW, "a {}")
    own = TextPrompt(clip, FEW, "a {}", per_class=True)
    assert shared.column.tolist() == [0, 1, 2, 0]
    assert own.column.tolist() == [0, 1, 2, 3]
    features = F.normalize(torch.randn(1, 1, 24), dim=-1)
    own.tuned["context"].data[3] += 1
    logits = own.head()(features)[0, 0]
    assert logits[0] != logits[3]
    torch.testing.assert_close(logits[:3], shared.head()(features)[0, 0, :3])


def test_random_vectors_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(n: int = 16) -> Tensor:
        return TextPrompt(frozen("openai_vit"), FEW, "{}", n_context=n, init="random").tuned["context"].detach()

    first = drawn()
    torch.manual_seed(5)
    assert torch.equal(first, drawn())
    assert first.shape == (16, 32)
    assert abs(float(drawn(60).std()) - 0.02) < 0.001
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.equal(first, drawn())


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("a photo of a {}.", {"n_context": 5}, r"n_context is 5.*'a photo of a {}.' has 4 tokens.*init: random"),
        ("a photo of a {}.", {"n_context": 0}, "n_context is 0; expected at least 1"),
        ("a photo of a {}.", {"n_context": 2, "position": "front"}, "n_context 2 leaves words .*position: end only"),
        ("{}", {}, "no word before the class name.*init: random"),
        ("a {}", {"init": "zeros"}, "init is 'zeros'; expected one of words, random"),
        ("a {}", {"position": "back"}, "position is 'back'; expected one of end, middle, front"),
        (
            "a {}",
            {"init": "random", "n_context": 74},
            r"'golden retriever' needs 2 tokens.*'{}' with 74 .* room for 1 ",
        ),
        (
            "a {}",
            {"init": "random", "n_context": 75},
            r"'{}' with 75 context vectors before it alone fills .*n_context",
        ),
        ("a {}s", {"position": "front"}, "'cat' is tokenised differently next to what stands behind it"),
    ],
)
def test_what_does_not_go_together(template: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextPrompt(frozen("openai_vit"), FEW, template, **options)


def test_a_context_per_class_holds_for_its_classes() -> None:
    prompt = TextPrompt(frozen("openai_vit"), ["tabby_cat", "dog"], "a {}", per_class=True)
    prompt.trained_on(["tabby cat", "dog"])
    with pytest.raises(ValueError, match="class 1 was 'wolf', and is 'dog' here"):
        prompt.trained_on(["tabby_cat", "wolf"])
    with pytest.raises(ValueError, match="these were 3, and are 2 here"):
        prompt.trained_on(["tabby cat", "dog", "ox"])
    TextPrompt(frozen("openai_vit"), ["cat"], "a {}").trained_on(["dog"])


@pytest.mark.parametrize("kind", ["openai_vit", "bidirectional"])
def test_a_context_of_another_shape_is_refused(kind: str) -> None:
    clip = frozen(kind)
    width = models.CONFIGS[kind]["text_cfg"]["width"]
    shared = clip.layout(clip.tokenize("a photo of a {}.", FEW))
    own = clip.layout(clip.tokenize("a photo of a {}.", FEW, ContextLayout(per_class=True)))
    with pytest.raises(ValueError, match=rf"Expected a context of shape \[B, 4, d\] .*, got \[1, 3, {width}\]"):
        clip.encode_prompts(shared, torch.zeros(1, 3, width))
    with pytest.raises(ValueError, match=rf"\[B, 4, d\] or \[B, 4, 4, d\] .*, got \[1, 3, 4, {width}\]"):
        clip.encode_prompts(own, torch.zeros(1, 3, 4, width))
    with pytest.raises(ValueError, match=r"Expected a context of shape \[B, 4, d\]"):
        clip.encode_prompts(shared, torch.zeros(1, 3, 4, width))


def test_hooks_see_what_all_prompts_share() -> None:
    seen = []

    class Look(BlockHook):
        def enter(self, block: int, x: Tensor) -> Tensor:
            seen.append(x.shape[1])
            return x

    clip = frozen("openai_vit")
    for layout in (ContextLayout(2), ContextLayout(position="middle"), ContextLayout(per_class=True)):
        clip.encode_prompts(clip.layout(clip.tokenize("a photo of a {}.", FEW, layout)), hook=Look())
    assert seen == [5] * 3 + [3] * 3 + [1] * 3  # with the words that are left; half of the context; the start token


def test_methods_tune_a_context_per_class(tiny_clip_folder: Path) -> None:
    prompt = partial(TextPrompt, per_class=True, position="middle")
    module = TPTModule(clip=str(tiny_clip_folder), class_names=FEW, prompt=prompt)
    result = module.adapt(make_batch(2, 32))
    assert module._final is not None
    assert module._final["context"].shape == (2, 4, 4, 32)
    assert (result.log_probs - result.zero_shot_log_probs).abs().max() > 1e-4
