"""The towers against open_clip's own forward."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from helpers.models import CONFIGS, frozen

from metatpt.clip.blocks import BlockHook
from metatpt.clip.budget import Budget, kept_bytes
from metatpt.clip.free import free_in_groups
from metatpt.clip.packed import PackedPrompts, packable
from metatpt.clip.text import PlainPrompts, token_embedding, trimmable
from metatpt.clip.vit import plain_vit

NAMES = ["cat", "golden retriever", "hand-held computer", "Boeing 737-800", "person practicing tai chi and slow arts"]
TEMPLATES = ["a photo of a {}.", "{}", "a photo of {}, a type of food."]
KINDS = [kind for kind in CONFIGS if kind != "timm"]


def short(kind: str) -> list[str]:
    return NAMES if CONFIGS[kind]["text_cfg"]["context_length"] > 16 else NAMES[:2]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_class_features_equal_encode_text(kind: str, template: str) -> None:
    clip = frozen(kind)
    names = short(kind)
    tokens = clip.tokenize(template, names)
    expected = F.normalize(clip.model.encode_text(clip.tokenizer([template.format(n) for n in names])), dim=-1)
    for prompts in (clip.layout(tokens), PlainPrompts(clip.model, tokens)):
        torch.testing.assert_close(clip.encode_prompts(prompts)[0], expected, atol=1e-5, rtol=0)


def plain_features(clip, tokens, context):
    """Each sample and class on its own, the context spliced into the embedded row by hand."""
    table = token_embedding(clip.model)
    rows = []
    for vectors in context:
        for ids in tokens.ids:
            embedded = F.embedding(ids, table.weight).clone()
            embedded[tokens.start : tokens.start + tokens.n_context] = vectors

            original = table.forward
            table.forward = lambda _, embedded=embedded: embedded[None]
            try:
                rows.append(clip.model.encode_text(ids[None])[0])
            finally:
                table.forward = original
    return F.normalize(torch.stack(rows), dim=-1).unflatten(0, (len(context), -1))


@pytest.mark.parametrize("memory", [2**32, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_tuned_context_and_its_gradient(kind: str, memory: int) -> None:
    clip = frozen(kind)
    clip.budget = Budget(memory)  # 1 byte: every prompt is a chunk of its own, recomputed in the backward pass
    tokens = clip.tokenize("a photo of a {}.", NAMES)
    torch.manual_seed(1)
    context = clip.embed_context(tokens)[None] + 0.1 * torch.randn(
        2, tokens.n_context, CONFIGS[kind]["text_cfg"]["width"]
    )
    context.requires_grad_()
    weight = torch.randn(2, len(NAMES), 24)
    expected = plain_features(clip, tokens, context)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), context)
    for prompts in (clip.layout(tokens), PlainPrompts(clip.model, tokens)):
        features = clip.encode_prompts(prompts, context)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
        (gradient,) = torch.autograd.grad((features * weight).sum(), context)
        assert (gradient - expected_gradient).abs().max() <= 1e-4 * expected_gradient.abs().max()


def test_which_towers_are_packed() -> None:
    assert {kind for kind in CONFIGS if packable(frozen(kind).model)} == {
        "openai_vit",
        "modified_resnet",
        "custom_text",
        "average_pool",
        "timm",
    }


def test_which_towers_take_rows_without_padding() -> None:
    kinds = {kind for kind in CONFIGS if trimmable(frozen(kind).model)}
    assert kinds == {"hugging_face"}
    clip = frozen("hugging_face")
    prompts = clip.layout(clip.tokenize("a photo of a {}.", NAMES[:2]))
    lengths = []
    clip.model.text.transformer.encoder.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    clip.encode_prompts(prompts)
    assert set(lengths) == {9}  # start, 4 words, at most 2 of the name, full stop, end; of 24


def test_which_image_towers_are_computed_in_parts() -> None:
    kinds = {kind for kind in CONFIGS if plain_vit(frozen(kind).model.visual)}
    assert kinds == {"openai_vit", "average_pool", "custom_text", "bidirectional", "class_token", "hugging_face"}


def test_packing_computes_each_token_once() -> None:
    clip = frozen("openai_vit")
    layout = clip.layout(clip.tokenize("a photo of a {}.", NAMES))
    assert isinstance(layout, PackedPrompts)
    assert layout.prefix == 5
    clip.encode_prompts(layout)  # the first time a few are encoded to measure them
    counted = []
    handle = clip.model.transformer.resblocks[0].mlp.register_forward_hook(
        lambda m, a, out: counted.append(out.shape[1])
    )
    clip.encode_prompts(layout)
    handle.remove()
    assert sum(counted) == 5 + sum(layout.tail)


def test_padding_id_is_a_real_token() -> None:
    # "wow!$%" is 49406 2781 0 3 260 49407: a length counted by zeros would cut it short.
    clip = frozen("openai_vit")
    tokens = clip.tokenize("{}", ["wow!$%", "a"])
    assert tokens.length.tolist() == [6, 3]
    assert 0 in tokens.ids[0, :6]
    expected = F.normalize(clip.model.encode_text(clip.tokenizer(["wow!$%", "a"])), dim=-1)
    torch.testing.assert_close(clip.encode_prompts(clip.layout(tokens))[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_image_features_equal_encode_image_and_its_gradient(kind: str) -> None:
    clip = frozen(kind)
    size = clip.preprocessing.size
    torch.manual_seed(0)
    images = torch.rand(3, 3, size, size, requires_grad=True)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    expected = F.normalize(clip.model.encode_image((images - mean) / std), dim=-1)
    weight = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), images)
    for memory in (2**32, 1):  # all at once, and one picture at a time
        clip.budget = Budget(memory)
        features = clip.encode_image(images)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
        (gradient,) = torch.autograd.grad((features * weight).sum(), images)
        assert (gradient - expected_gradient).abs().max() <= 1e-4 * expected_gradient.abs().max()


def test_pictures_whose_graphs_do_not_fit_are_computed_again() -> None:
    clip = frozen("openai_vit")
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    graph = 3 * clip._bytes_per_picture(images)
    sizes = []
    clip.model.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    gradients = []
    for total, held, expected in (
        (4 * graph, 1, [3]),
        (4 * graph, 2, [3, 3]),  # with the graph of another sample it would not fit
        (8 * graph, 2, [3]),
        (graph, 1, [1, 1, 1, 1, 1, 1]),
    ):
        clip.budget = Budget(total)
        sizes.clear()
        gradients += torch.autograd.grad(clip.encode_image(images, held=held).square().sum(), images)
        assert sizes == expected
    assert torch.equal(gradients[0], gradients[1])  # the same chunks, to the last bit
    torch.testing.assert_close(gradients[3], gradients[0])


@pytest.mark.parametrize("memory", [2**32, 1])
def test_small_gradients_survive_half_precision(memory: int) -> None:
    """The gradient of a confident prediction is below what float16 holds."""
    clip = frozen("openai_vit")
    clip.budget = Budget(memory)
    tokens = clip.tokenize("a photo of a {}.", NAMES)
    layout = clip.layout(tokens)
    torch.manual_seed(0)
    weights = 1e-9 * torch.randn(len(NAMES), 24), 1e-9 * torch.randn(2, 24)
    found = {}
    for dtype in (None, torch.float16, torch.bfloat16):
        clip.autocast_dtype = dtype
        context = clip.embed_context(tokens)[None].requires_grad_()
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        texts, pictures = clip.encode_prompts(layout, context)[0], clip.encode_image(images)
        found[dtype] = (
            *torch.autograd.grad((texts * weights[0]).sum(), context),
            *torch.autograd.grad((pictures * weights[1]).sum(), images),
        )
    for gradients in zip(*found.values(), strict=True):
        exact, half, brain = (1e9 * gradient for gradient in gradients)
        assert exact.abs().max() > 0.01
        assert F.cosine_similarity(half.flatten(), exact.flatten(), dim=0) > 0.9999
        assert F.cosine_similarity(brain.flatten(), exact.flatten(), dim=0) > 0.99
        assert 0.99 < half.norm() / exact.norm() < 1.01


def test_memory_is_measured_and_bounded() -> None:
    clip = frozen("openai_vit", memory="auto")
    device = torch.device("cpu")
    assert 0 < clip.budget.total(device) < psutil.virtual_memory().total
    assert frozen("openai_vit", memory=3).budget.total(device) == 3 * 2**20
    assert Budget(2**40).chunk(2**20, device) == 512  # no more than keeps a processor busy
    assert Budget(64 * 2**20).chunk(2**20, device) == 16
    assert Budget(64 * 2**20).chunk(2**20, device, graph=False) == 128
    # What a graph of two linear layers and an activation keeps: the activation's input, nothing of the weights.
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).requires_grad_(False)
    x = torch.ones(10, 5, requires_grad=True)
    assert kept_bytes(lambda: (layers(x), 10), layers.parameters) == 4 * 7


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (
            "0::/job/step",
            {
                "job/memory.max": "max",
                "job/step/memory.max": "1000",
                "job/step/memory.current": "700",
                "job/step/memory.stat": "anon 300\ninactive_file 400",
            },
            [700],  # the cache of files gives way
        ),
        (
            "4:cpu:/\n3:memory:/docker/elsewhere\n0::/",
            {
                "memory/memory.limit_in_bytes": "500",
                "memory/memory.usage_in_bytes": "600",
                "memory/memory.stat": "total_inactive_file 0",
            },
            [0],
        ),
        ("0::/", {}, []),
        (None, {}, []),
    ],
)
def test_limits_of_containers_and_jobs(
    tmp_path: Path, membership: str | None, files: dict[str, str], expected: list[int]
) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    if membership is not None:
        (tmp_path / "self").write_text(membership)
    assert list(free_in_groups(tmp_path / "self", tmp_path / "groups")) == expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_cast_once_for_autocast(kind: str) -> None:
    clip = frozen(kind)
    size = clip.preprocessing.size
    images = torch.rand(2, 3, size, size, requires_grad=True)
    tokens = clip.tokenize("a photo of a {}.", short(kind))
    own = {name: weight.clone() for name, weight in clip.model.named_parameters()}
    clip.autocast_dtype = torch.bfloat16
    copied = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.untyped_storage().data_ptr())
        return tensor

    def features() -> tuple[torch.Tensor, torch.Tensor]:
        return clip.encode_image(images), clip.encode_prompts(clip.layout(tokens))[0]

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        ours = features()
    assert all(torch.equal(weight, own[name]) for name, weight in clip.model.named_parameters())
    cast = {weight.data_ptr() for weight in clip._cast_weights.tensors}
    assert bool(cast) == (plain_vit(clip.model.visual) or packable(clip.model))
    assert bool(cast & set(copied)) == plain_vit(clip.model.visual)

    clip._cast_weights.used = lambda dtype: nullcontext()  # autocast's own casts
    for a, b in zip(ours, features(), strict=True):
        assert torch.equal(a, b)
    assert (ours[0] - frozen(kind).encode_image(images)).abs().max() > 1e-5  # it was in low precision


def test_other_weights_are_cast_again() -> None:
    clip = frozen("openai_vit")
    images = torch.rand(2, 3, 32, 32)
    clip.autocast_dtype = torch.bfloat16
    before = clip.encode_image(images)
    torch.manual_seed(1)
    other = {name: value + 0.1 * torch.randn_like(value) for name, value in clip.model.state_dict().items()}
    clip.model.load_state_dict(other)
    after = clip.encode_image(images)
    assert not torch.allclose(before, after, atol=0.01)
    fresh = frozen("openai_vit")
    fresh.model.load_state_dict(other)
    fresh.autocast_dtype = torch.bfloat16
    assert torch.equal(fresh.encode_image(images), after)


@pytest.mark.parametrize("kind", ["openai_vit", "average_pool", "modified_resnet", "timm"])
def test_second_derivative_through_recomputed_chunks(kind: str) -> None:
    clip = frozen(kind)
    clip.double_backward = True
    size = clip.preprocessing.size
    torch.manual_seed(0)
    images = torch.rand(2, 3, size, size, requires_grad=True)
    results = []
    for memory in (2**32, 1):
        clip.budget = Budget(memory)
        features = clip.encode_image(images)
        (first,) = torch.autograd.grad(features.square()[:, :4].sum(), images, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), images)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6 * float(results[0].abs().max()))
    assert results[0].abs().max() > 0


def test_frozen_and_in_evaluation_mode() -> None:
    clip = frozen("modified_resnet")
    clip.train()
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    images = torch.rand(4, 3, 64, 64)
    together = clip.encode_image(images)
    alone = torch.cat([clip.encode_image(each[None]) for each in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_wrong_image_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"Expected images of shape \[N, 3, 32, 32\], got \[1, 3, 30, 32\]"):
        frozen("openai_vit").encode_image(torch.rand(1, 3, 30, 32))


@pytest.mark.parametrize("kind", ["openai_vit", "bidirectional", "timm"])
def test_name_that_does_not_fit(kind: str) -> None:
    clip = frozen(kind)
    length = CONFIGS[kind]["text_cfg"]["context_length"]
    long = " ".join(["word"] * 80)
    with pytest.raises(ValueError, match=rf"'word word.*needs 80 tokens.* leaves room for {length - 7} of .*{length}"):
        clip.tokenize("a photo of a {}.", ["cat", long])
    # One that just fits is taken.
    fits = " ".join(["word"] * (length - 7))
    assert clip.tokenize("a photo of a {}.", ["cat", fits]).length.tolist() == [8, length]
    with pytest.raises(ValueError, match="alone fills"):
        clip.tokenize("word " * length + "{}", ["cat"])


@pytest.mark.parametrize("template", ["a photo.", "a {} of a {}"])
def test_template_without_one_place(template: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        frozen("openai_vit").tokenize(template, ["cat"])


def test_template_that_runs_into_the_name() -> None:
    with pytest.raises(ValueError, match="tokenised differently"):
        frozen("openai_vit").tokenize("a photo of super{}.", ["cat", "dog"])


def test_words_that_a_model_never_saw() -> None:
    clip = frozen("openai_vit")
    clip.known_words = frozenset({"a", "photo", "of", "cat"})
    assert clip.tokenize("a photo of a {}.", ["cat"]).n_context == 4
    with pytest.raises(ValueError, match=r"'dog' has the word 'dog'.*It knows: a, cat, of, photo.*--model.clip ViT"):
        clip.tokenize("a photo of a {}.", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"template.*'sketch'"):
        clip.tokenize("a sketch of a {}.", ["cat"])


def test_equal_names_share_a_row() -> None:
    clip = frozen("openai_vit")
    tokens = clip.tokenize("a {}", ["missile", "cat", "missile"])
    assert len(tokens.ids) == 2
    assert tokens.column.tolist() == [0, 1, 0]


class DeepPrompts(BlockHook):
    """New vectors for the first context tokens, or behind the patches, before every block."""

    def __init__(self, vectors: torch.Tensor, place: int | None) -> None:
        self.vectors = vectors  # [blocks, n, d]
        self.place = place

    def enter(self, block: int, x: torch.Tensor) -> torch.Tensor:
        new = self.vectors[block].expand(len(x), -1, -1)
        if self.place is not None:
            return torch.cat([x[:, : self.place], new, x[:, self.place + new.shape[1] :]], dim=1)
        return torch.cat([x if block == 0 else x[:, : -new.shape[1]], new], dim=1)


class LowRank(BlockHook):
    """Low-rank updates of all four projections of every block."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        self.down, self.up = down, up  # [blocks, 4, r, d] and [blocks, 4, d, r]

    def project(self, block: int, which: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        number = ("query", "key", "value", "out").index(which)
        return y + x @ self.down[block, number].T @ self.up[block, number].T


def low_rank(width: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return (
        torch.randn(blocks, 4, 2, width).requires_grad_(),
        (0.1 * torch.randn(blocks, 4, width, 2)).requires_grad_(),
    )


def with_updates(blocks, down, up):
    """The blocks' weights with the updates added: what low-rank updates mean."""
    deltas = up @ down
    for number, block in enumerate(blocks):
        attention = block.attn
        for module, name, delta in (
            (attention, "in_proj_weight", deltas[number, :3].flatten(0, 1)),
            (attention.out_proj, "weight", deltas[number, 3]),
        ):
            weight = getattr(module, name) + delta
            delattr(module, name)
            setattr(module, name, weight)


@pytest.mark.parametrize("memory", [2**32, 1])
@pytest.mark.parametrize("kind", ["openai_vit", "average_pool"])
def test_low_rank_updates_of_both_towers(kind: str, memory: int) -> None:
    clip = frozen(kind)
    clip.budget = Budget(memory)
    plain = copy.deepcopy(clip.model)
    tokens = clip.tokenize("a photo of a {}.", NAMES)
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    for width, n_blocks, blocks, ours, theirs in (
        (
            64, 2, plain.visual.transformer.resblocks,
            lambda hook: clip.encode_image(images, hook),
            lambda: plain.encode_image((images - mean) / std),
        ),
        (
            32, 3, plain.transformer.resblocks,
            lambda hook: clip.encode_prompts(clip.layout(tokens), hook=hook)[0],
            lambda: plain.encode_text(tokens.ids),
        ),
    ):  # fmt: skip
        updates = low_rank(width, n_blocks)
        features = ours(LowRank(*updates))
        with_updates(blocks, *updates)
        expected = F.normalize(theirs(), dim=-1)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
        weight = torch.randn_like(features)
        for gradient, other in zip(
            torch.autograd.grad((features * weight).sum(), updates),
            torch.autograd.grad((expected * weight).sum(), updates),
            strict=True,
        ):
            assert (gradient - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("memory", [2**32, 1])
def test_deep_prompts_in_both_towers(memory: int) -> None:
    clip = frozen("openai_vit")
    clip.budget = Budget(memory)
    plain = copy.deepcopy(clip.model)
    tokens = clip.tokenize("a photo of a {}.", NAMES)
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    torch.manual_seed(4)
    visual, textual = torch.randn(2, 3, 64).requires_grad_(), torch.randn(3, 2, 32).requires_grad_()

    def hooked(blocks, hook):
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(
                lambda m, args, kwargs, number=number: (
                    (hook.enter(number, args[0]), *args[1:]),
                    kwargs,
                ),
                with_kwargs=True,
            )

    hooked(plain.visual.transformer.resblocks, DeepPrompts(visual, None))
    hooked(plain.transformer.resblocks, DeepPrompts(textual, 1))
    for features, expected, vectors in (
        (clip.encode_image(images, DeepPrompts(visual, None)), plain.encode_image((images - mean) / std), visual),
        (
            clip.encode_prompts(clip.layout(tokens), hook=DeepPrompts(textual, 1))[0],
            plain.encode_text(tokens.ids),
            textual,
        ),
    ):
        expected = F.normalize(expected, dim=-1)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
        weight = torch.randn_like(features)
        (gradient,) = torch.autograd.grad((features * weight).sum(), vectors)
        (other,) = torch.autograd.grad((expected * weight).sum(), vectors)
        assert (gradient - other).abs().max() <= 1e-4 * other.abs().max()


def test_towers_without_a_place_for_hooks_say_so() -> None:
    hook = LowRank(*low_rank(32, 3))
    clip = frozen("modified_resnet")
    with pytest.raises(ValueError, match="LowRank reaches into a vision transformer.*ModifiedResNet is not"):
        clip.encode_image(torch.rand(1, 3, 64, 64), hook)
    clip = frozen("bidirectional")
    with pytest.raises(ValueError, match="LowRank reaches into a causal tower.*TextTransformer is not"):
        clip.encode_prompts(clip.layout(clip.tokenize("a {}", ["cat"])), hook=hook)
