"""UPT against both published codes (tests/data/golden/README.md), and as a prompt learner."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import NAMES, fixture, golden_clip, originals
from helpers.learners import (
    CLASSES,
    assert_chunks_change_nothing,
    assert_finite_differences,
    assert_samples_are_alone,
    pictures,
    sized,
)
from helpers.models import frozen
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from metatpt.prompts import UnifiedPrompt

TEMPLATE = "a photo of a {}."
KINDS = [
    {"variant": variant, "mixing": mixing, **options}
    for variant, options in (("upt", {"dropout": 0.0}), ("mvlpt", {"width": 16, "depth": 2}))
    for mixing in ("attention", "token")
]
SIZES = [(*size, options) for size, options in zip([(64, 96), (96, 64), (96, 64), (64, 96)], KINDS, strict=True)]


def by_our_names(variant: str, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their parameters, or gradients, under our names and shapes."""
    if variant == "upt":
        rows = theirs["uni_ctx"][0]
        names = {"self_attn.in_proj_": "attention_in_", "self_attn.out_proj.": "attention_out_", "norm1.": "norm_1_",
                 "norm2.": "norm_2_", "linear1.": "hidden_", "linear2.": "out_", "mlp.": "visual_out_"}  # fmt: skip
        ours = {"text_rows": rows[:4], "visual_rows": rows[None, 4:]}
    else:
        block, maps = "mvlpt_proj.resblocks.0.", "mvlpt_proj_ctx_"
        names = {f"{block}attn.in_proj_": "attention_in_", f"{block}attn.out_proj.": "attention_out_",
                 f"{block}ln_1.": "norm_1_", f"{block}ln_2.": "norm_2_", f"{block}mlp.c_fc.": "hidden_",
                 f"{block}mlp.c_proj.": "out_", f"{maps}coop_pre.": "text_in_", f"{maps}coop_post.": "text_out_",
                 f"{maps}vpt_pre.": "visual_in_", f"{maps}vpt_post.": "visual_out_"}  # fmt: skip
        visual = torch.cat([theirs["vpt_embeddings"], theirs["vpt_embeddings_deep"]])
        ours = {"text_rows": theirs["ctx"], "visual_rows": visual}
    for their_name, our_name in names.items():
        ours |= {our_name + kind: theirs[their_name + kind] for kind in ("weight", "bias")}
    return ours


@pytest.mark.parametrize(("variant", "options"), [("upt", {"dropout": 0.0}), ("mvlpt", {"width": 64})])
def test_forward_and_gradients_are_the_official_ones(variant: str, options: dict[str, float]) -> None:
    golden = fixture({"upt": "upt_official", "mvlpt": "upt_mvlpt"}[variant])

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}

    prompt = UnifiedPrompt(golden_clip(), NAMES, TEMPLATE, variant, "token", **options)
    prompt.tuned.load_state_dict(by_our_names(variant, under("params/")))
    context, tokens = prompt.prompts(prompt.values(None))
    torch.testing.assert_close(context, golden["text_prompt"], atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens[:1], golden["visual_prompt"].reshape(1, 4, -1), atol=1e-5, rtol=0)
    if variant == "mvlpt":
        torch.testing.assert_close(tokens[1:], golden["visual_prompt_deep"], atol=1e-5, rtol=0)
    with torch.no_grad():
        features, classes = prompt.encode(originals()[:, 0][None]), prompt.class_features(None, prompt._compute)
        logits = prompt.head()(features)
    torch.testing.assert_close(features[0], golden["image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(classes[0], golden["text_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[0], golden["logits"], atol=1e-4, rtol=0)

    loss, logits = prompt.training_loss(originals()[:, 0], golden["labels"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss[None], golden["loss"], atol=1e-4, rtol=0)
    expected = by_our_names(variant, under("grad/"))
    found = dict(zip(prompt.tuned, torch.autograd.grad(loss, list(prompt.tuned.values())), strict=True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max(), name
    width = len(found["norm_1_bias"])
    for name in ("attention_in_weight", "attention_in_bias"):  # query and key
        assert not found[name][: 2 * width].any()


def torchs_block(prompt: UnifiedPrompt) -> nn.Module:
    """The paper's block out of torch's and open_clip's own modules, with the learner's parameters."""
    tuned = {name: value.detach() for name, value in prompt.tuned.items()}
    width = len(tuned["norm_1_bias"])
    block = ResidualAttentionBlock(width, 1, act_layer=QuickGELU)
    if prompt.variant == "upt":
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, width), nn.Linear(width, width)
    names = {"attn.in_proj_": "attention_in_", "attn.out_proj.": "attention_out_", "ln_1.": "norm_1_",
             "ln_2.": "norm_2_", "mlp.c_fc.": "hidden_", "mlp.c_proj.": "out_"}  # fmt: skip
    block.load_state_dict(
        {theirs + kind: tuned[ours + kind] for theirs, ours in names.items() for kind in ("weight", "bias")}
    )
    return block


@pytest.mark.parametrize("variant", ["upt", "mvlpt"])
def test_attention_lets_all_rows_see_each_other(variant: str) -> None:
    options = {"width": 96} if variant == "mvlpt" else {}  # of the image tower: no map into the block
    prompt = UnifiedPrompt(sized(96, 96), CLASSES, TEMPLATE, variant, n_context=3, **options)
    for name, value in prompt.tuned.items():
        with torch.no_grad():
            value += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    rows = torch.cat([prompt.tuned["text_rows"], prompt.tuned["visual_rows"].flatten(0, 1)])[None]
    block = torchs_block(prompt)
    if variant == "upt":
        rows = block.ln_1(rows + block.attn(rows, rows, rows)[0])
        rows = rows + block.mlp.c_proj(F.relu(block.mlp.c_fc(block.ln_2(rows))))
        expected = F.linear(rows[0, 3:], prompt.tuned["visual_out_weight"], prompt.tuned["visual_out_bias"])
    else:
        rows = block(rows)
        expected = rows[0, 3:]
    context, tokens = prompt.prompts(prompt.values(None))
    torch.testing.assert_close(context, rows[0, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("text", "image", "options"), SIZES)
def test_training_gradients_are_finite_differences(text: int, image: int, options: dict[str, object]) -> None:
    assert_finite_differences(
        UnifiedPrompt(sized(text, image, torch.float64), CLASSES, TEMPLATE, n_context=3, **options)
    )


@pytest.mark.parametrize(("text", "image", "options"), SIZES)
def test_samples_are_alone(text: int, image: int, options: dict[str, object]) -> None:
    assert_samples_are_alone(UnifiedPrompt(sized(text, image), CLASSES, TEMPLATE, **options))


@pytest.mark.parametrize("options", KINDS)
def test_chunks_give_the_gradients_of_the_whole(options: dict[str, object]) -> None:
    assert_chunks_change_nothing(UnifiedPrompt(sized(), CLASSES, TEMPLATE, **options))


@pytest.mark.parametrize("mixing", ["attention", "token"])
@pytest.mark.parametrize("part", ["text", "visual"])
@pytest.mark.parametrize("variant", ["upt", "mvlpt"])
def test_a_part_reaches_the_other_tower_through_attention_alone(variant: str, part: str, mixing: str) -> None:
    prompt = UnifiedPrompt(sized(), CLASSES, TEMPLATE, variant, mixing)
    prompt.choose_part(part)
    views, start = pictures(1, 2), prompt.initial_state(1)
    generator = torch.Generator().manual_seed(0)
    state = {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in start.items()}
    with torch.no_grad():
        features_move = not torch.equal(prompt.encode(views, state), prompt.encode(views))
        fixed = prompt.encode(views)
        classes_move = not torch.equal(prompt.head(state)(fixed), prompt.head()(fixed))
    assert features_move == prompt.reaches_pixels == (part == "visual" or mixing == "attention")
    assert classes_move == (part == "text" or mixing == "attention")


def test_parameters_of_the_variants() -> None:
    def shapes(variant: str, **options: int) -> dict[str, list[int]]:
        prompt = UnifiedPrompt(sized(64, 96), CLASSES, TEMPLATE, variant, n_context=2, **options)
        prompt.choose_part("both")
        assert set(prompt.state_names) == set(prompt.tuned)
        return {name: list(value.shape) for name, value in prompt.tuned.items()}

    upt = shapes("upt")
    assert upt["text_rows"] == [2, 64]
    assert upt["visual_rows"] == [1, 2, 64]
    assert upt["visual_out_weight"] == [96, 64]
    assert upt["hidden_weight"] == [64, 64]
    assert not upt.keys() & {"text_in_weight", "text_out_weight", "visual_in_weight"}
    mvlpt = shapes("mvlpt")
    assert mvlpt["visual_rows"] == [3, 2, 96]  # all blocks
    assert mvlpt["attention_in_weight"] == [3 * 128, 128]
    assert mvlpt["hidden_weight"] == [4 * 128, 128]
    assert mvlpt["text_in_weight"] == [128, 64]
    assert mvlpt["visual_out_weight"] == [96, 128]
    assert shapes("mvlpt", depth=2)["visual_rows"] == [2, 2, 96]
    # A map between equal widths is left out, as in MVLPT's code.
    assert {name for name in mvlpt if "text_" in name} - shapes("mvlpt", width=64).keys() == {
        "text_in_weight", "text_in_bias", "text_out_weight", "text_out_bias"
    }  # fmt: skip
    assert {name for name in mvlpt if "visual_" in name} - shapes("mvlpt", width=96).keys() == {
        "visual_in_weight", "visual_in_bias", "visual_out_weight", "visual_out_bias"
    }  # fmt: skip


def test_start_is_that_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> UnifiedPrompt:
        return UnifiedPrompt(sized(), CLASSES, TEMPLATE, "mvlpt", n_context=64)

    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    again = make()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    other = make()
    for name, value in first.tuned.items():
        assert torch.equal(value, again.tuned[name])
        constant = name in ("attention_in_bias", "attention_out_bias") or name.startswith("norm_")
        assert torch.equal(value, other.tuned[name]) == constant
    assert float(first.tuned["text_rows"].detach().std()) == pytest.approx(0.02, rel=0.05)
    bound = (6 / (3 * 8 * 8 + 96)) ** 0.5
    assert float(first.tuned["visual_rows"].detach().abs().max()) == pytest.approx(bound, rel=0.01)


def test_dropout_is_of_training_alone_and_follows_seed_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(2), torch.tensor([0, 1])

    def losses(prompt: UnifiedPrompt, n: int) -> list[float]:
        return [prompt.training_loss(images, labels)[0].item() for _ in range(n)]

    clip = sized()
    prompt = UnifiedPrompt(clip, CLASSES, TEMPLATE, dropout=0.5)
    first = losses(prompt, 4)
    assert len(set(first)) == 4
    torch.manual_seed(5)
    assert losses(UnifiedPrompt(clip, CLASSES, TEMPLATE, dropout=0.5), 4) == first  # on every process
    resumed = UnifiedPrompt(clip, CLASSES, TEMPLATE, dropout=0.5)
    losses(resumed, 2)
    state = copy.deepcopy(resumed.state_dict())
    resumed = UnifiedPrompt(clip, CLASSES, TEMPLATE, dropout=0.5)
    resumed.load_state_dict(state)
    assert losses(resumed, 2) == first[2:]

    without = losses(UnifiedPrompt(clip, CLASSES, TEMPLATE, dropout=0.0), 1)
    before = prompt.step.clone()
    assert losses(prompt.eval(), 1) == without
    views = images[None]
    with torch.no_grad():
        for mode in (True, False):  # nothing but the training loss drops anything
            prompt.train(mode)
            logits = prompt.head()(prompt.encode(views))[0]
            assert float(F.cross_entropy(logits, labels)) == pytest.approx(without[0], abs=1e-5)
    assert torch.equal(prompt.step, before)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    other = UnifiedPrompt(clip, CLASSES, TEMPLATE, dropout=0.5)
    other.tuned.load_state_dict(prompt.tuned.state_dict())
    assert losses(other, 1) != first[:1]


def test_dropout_keeps_the_mean_and_passes_gradients_of_what_it_kept() -> None:
    prompt = UnifiedPrompt(sized(), CLASSES, TEMPLATE, dropout=0.25)
    x = torch.ones(400, 100, requires_grad=True)
    y = prompt._next_dropout()(x)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())


def test_only_dropout_has_something_to_remember() -> None:
    def buffers(**options: object) -> list[str]:
        prompt = UnifiedPrompt(sized(), CLASSES, TEMPLATE, **options)
        return [name for name in prompt.state_dict() if not name.startswith(("clip.", "tuned."))]

    assert buffers() == ["step"]
    assert buffers(dropout=0.0) == buffers(variant="mvlpt") == []


@pytest.mark.parametrize("variant", ["upt", "mvlpt"])
def test_low_precision_towers(variant: str) -> None:
    full = UnifiedPrompt(sized(), CLASSES, TEMPLATE, variant)
    low = copy.deepcopy(full).bfloat16()
    assert {value.dtype for value in low.tuned.values()} == {torch.float32}
    views = pictures(1, 2)
    features, expected = low.encode(views), full.encode(views)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=0.03, rtol=0)
    assert low.head()(features).dtype == torch.float32


def test_words_before_the_name_are_not_used_and_those_behind_it_are() -> None:
    clip, views = sized(), pictures(1, 2)
    same, other = (UnifiedPrompt(clip, CLASSES, text) for text in ("the best of all {}.", "a photo of a {}, a pet."))
    prompt = UnifiedPrompt(clip, CLASSES, TEMPLATE)
    with torch.no_grad():
        logits = [each.head()(each.encode(views)) for each in (prompt, same, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [
        ("modified_resnet", "ModifiedResNet is not open_clip's VisionTransformer"),
        ("average_pool", "it does not pool its class token"),
    ],
)
def test_towers_that_lack_something(kind: str, lacks: str) -> None:
    with pytest.raises(
        ValueError, match=f"UnifiedPrompt.*that of {kind} takes none: {lacks}.*--model.clip, or TextPrompt"
    ):
        UnifiedPrompt(frozen(kind), CLASSES, TEMPLATE)


@pytest.mark.parametrize("kind", ["bidirectional", "hugging_face"])
def test_any_text_tower_will_do(kind: str) -> None:
    clip = frozen(kind)
    prompt = UnifiedPrompt(clip, CLASSES[:2], TEMPLATE, "mvlpt", width=16)
    loss, logits = prompt.training_loss(pictures(2), torch.tensor([0, 1]))
    assert logits.shape == (2, 2)
    assert all(
        gradient.any()
        for gradient in torch.autograd.grad(loss, [prompt.tuned["text_rows"], prompt.tuned["visual_rows"]])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "UPT"}, "variant is 'UPT'; expected one of upt, mvlpt"),
        ({"mixing": "none"}, "mixing is 'none'; expected one of attention, token"),
        ({"n_context": 0}, "n_context is 0; expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; expected a share of at least 0 and below 1"),
        ({"width": 64}, "width is 64, and variant upt has no such option, only mvlpt"),
        ({"depth": 2}, "depth is 2, and variant upt has no such option, only mvlpt"),
        ({"variant": "mvlpt", "dropout": 0.1}, "dropout is 0.1, and variant mvlpt has no such option, only upt"),
        ({"variant": "mvlpt", "width": 0}, "width is 0; expected at least 1"),
        ({"variant": "mvlpt", "depth": 4}, "depth is 4, and the image tower has 3 blocks"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        UnifiedPrompt(sized(), CLASSES, TEMPLATE, **options)


def test_a_checkpoint_names_its_options() -> None:
    config = UnifiedPrompt(sized(), CLASSES, TEMPLATE, "mvlpt", depth=2).config
    assert config["class_path"] == "metatpt.prompts.UnifiedPrompt"
    assert config["init_args"] == {
        "variant": "mvlpt", "mixing": "attention", "n_context": 4, "dropout": None, "width": None, "depth": 2,
    }  # fmt: skip
