"""MaPLe against the official code (golden files), open_clip's own forward, and finite differences."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import models
from helpers.golden import NAMES, checkpoint, fixture, golden_clip, golden_views
from helpers.models import CONFIGS, frozen
from helpers.plain_prompts import class_features, image_features
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.clip.budget import Budget
from metatpt.functional import marginal_entropy, take_views
from metatpt.modules import TPTModule
from metatpt.prompts import MultiModalPrompt, TextPrompt, as_factory

CLASSES = ["cat", "golden retriever", "ox"]
TEMPLATE = "a photo of a {}."
TEXTS = [TEMPLATE.format(name) for name in CLASSES]


@pytest.fixture(autouse=True)
def widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers of which one or the other is the wider and the deeper."""
    for kind, text, image in (("wide_image", (64, 4), (96, 3)), ("wide_text", (96, 3), (64, 4))):
        config = copy.deepcopy(CONFIGS["openai_vit"])
        config["text_cfg"] |= {"width": text[0], "heads": text[0] // 32, "layers": text[1]}
        config["vision_cfg"] |= {"width": image[0], "layers": image[1]}
        monkeypatch.setitem(models.CONFIGS, kind, config)


def official() -> MultiModalPrompt:
    """With the parameters of the official checkpoint."""
    held = checkpoint("maple")
    learner = MultiModalPrompt(golden_clip(), NAMES, TEMPLATE, depth=3)
    maps = ["proj", "compound_prompt_projections.0", "compound_prompt_projections.1"]
    values = {
        "context": held["prompt_learner.ctx"],
        "context_deep": torch.stack([held[f"prompt_learner.compound_prompts_text.{i}"] for i in range(2)]),
        "coupling_weight": torch.stack([held[f"prompt_learner.{each}.weight"] for each in maps]),
        "coupling_bias": torch.stack([held[f"prompt_learner.{each}.bias"] for each in maps]),
    }
    assert values.keys() == learner.tuned.keys()
    for name, value in values.items():
        learner.tuned[name].data.copy_(value)
    return learner


def moved(learner: MultiModalPrompt, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (value + 0.2 * torch.randn(value.shape, generator=generator).to(value)).requires_grad_()
        for name, value in learner.initial_state(size).items()
    }


def plain_logits(clip: FrozenCLIP, state: dict[str, Tensor], sample: int, views: Tensor) -> Tensor:
    """One sample's logits: linear maps one by one, both towers through open_clip's own forward."""
    context = [state["context"][sample]]
    if "context_deep" in state:
        context += state["context_deep"][sample].unbind()
    maps = zip(state["coupling_weight"][sample], state["coupling_bias"][sample], strict=True)
    tokens = [vectors @ weight.T + bias for vectors, (weight, bias) in zip(context, maps, strict=True)]
    return clip.logit_scale * image_features(clip, views, tokens) @ class_features(clip, TEXTS, context).T


def official_names(state: dict[str, Tensor], golden: dict[str, Tensor], what: str) -> list[tuple[str, Tensor]]:
    """What a golden file has of a state's values; of the maps only the biases."""
    pairs = [
        (f"{what}ctx", state["context"]),
        *((f"{what}compound_prompts_text.{i}", state["context_deep"][:, i]) for i in range(2)),
        (f"{what}proj.bias", state["coupling_bias"][:, 0]),
        (f"{what}compound_prompt_projections.0.bias", state["coupling_bias"][:, 1]),
    ]
    assert {name for name, _ in pairs} == {name for name in golden if name.startswith(what)}
    return pairs


def test_official_logits_and_features() -> None:
    golden, learner, images = fixture("maple_forward"), official(), golden_views()[:, :1]
    tokens = learner.visual_tokens(learner.values(None))[0]
    torch.testing.assert_close(tokens[0], golden["shared_ctx_visual"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[1:], golden["visual_deep_prompts"], atol=1e-5, rtol=0)
    features = learner.encode(images)
    torch.testing.assert_close(features[:, 0], golden["image_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(learner.head()(features)[:, 0], golden["logits"], atol=1e-4, rtol=0)
    texts = learner.head()(torch.eye(64)[None])[0].T / learner.clip.logit_scale
    torch.testing.assert_close(texts, golden["text_features"], atol=1e-4, rtol=0)


def test_official_gradients_of_the_entropy_of_confident_views() -> None:
    golden, learner = fixture("promptalign", "entropy_only_maple_tpt_steps1/"), official()
    state = {name: value.requires_grad_() for name, value in learner.initial_state(4).items()}
    views = take_views(golden_views(), golden["selected_idx"])
    log_probs = learner.head(state)(learner.encode(views, state)).double().log_softmax(-1)
    loss = marginal_entropy(log_probs)
    torch.testing.assert_close(loss.float()[:, None], golden["losses"], atol=1e-4, rtol=0)
    found = dict(zip(state, torch.autograd.grad(loss.sum(), list(state.values())), strict=True))
    for name, gradient in official_names(found, golden, "grad_step1/"):
        assert (gradient - golden[name]).abs().max() <= 1e-4 * golden[name].abs().max(), name


@pytest.mark.parametrize("together", [True, False])
def test_official_test_time_tuning(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    golden, views, start = fixture("promptalign", "entropy_only_maple_tpt_steps1/"), golden_views(), official()
    monkeypatch.setattr("metatpt.modules.base.load_clip", lambda *args: start.clip)
    module = TPTModule(class_names=NAMES, template=TEMPLATE, prompt=partial(MultiModalPrompt, depth=3), outer_lr=4e-3)
    for name, value in start.tuned.items():
        module.prompt.tuned[name].data.copy_(value)
    for part in [slice(0, 4)] if together else [slice(b, b + 1) for b in range(4)]:
        chosen = module.look_at(views[part]).chosen
        assert chosen.sort().values.tolist() == golden["selected_idx"][part].sort().values.tolist()
        result = module.adapt_views(views[part])
        torch.testing.assert_close(
            result.diagnostics["first_loss"].float(), golden["losses"][part, 0], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(result.log_probs, golden["final_logits"][part].log_softmax(-1), atol=1e-3, rtol=0)
        assert module._final is not None
        for name, after in official_names(module._final, golden, "after/"):
            # A step of AdamW is as long as its rate, whatever the gradient's size.
            torch.testing.assert_close(after, golden[name][part], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "n_context", "depth"),
    [
        ("openai_vit", 2, 2),
        ("openai_vit", 4, 2),
        ("openai_vit", 1, 1),
        ("average_pool", 2, 2),
        ("custom_text", 2, 2),
        ("wide_image", 2, 3),
        ("wide_image", 2, 2),
        ("wide_text", 2, 3),
        ("wide_text", 2, 1),
    ],
)
def test_logits_and_gradients_of_every_tower_equal_open_clips(kind: str, n_context: int, depth: int) -> None:
    clip = frozen(kind)
    learner = MultiModalPrompt(clip, CLASSES, TEMPLATE, n_context, depth)
    torch.manual_seed(0)
    views = torch.rand(2, 2, 3, 32, 32)
    state = moved(learner, 2)
    expected = torch.stack([plain_logits(clip, state, b, each) for b, each in enumerate(views)])
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), list(state.values()))
    for memory in (2**32, 1):  # all at once, and each picture and prompt alone, recomputed in the backward pass
        clip.budget = Budget(memory)
        logits = learner.head(state)(learner.encode(views, state))
        torch.testing.assert_close(logits, expected, atol=3e-4, rtol=0)
        gradients = torch.autograd.grad((logits * weight).sum(), list(state.values()))
        for gradient, right in zip(gradients, expected_gradients, strict=True):
            assert (gradient - right).abs().max() <= 1e-4 * right.abs().max()


def test_first_and_second_derivatives_equal_finite_differences() -> None:
    learner = MultiModalPrompt(frozen("average_pool"), CLASSES, TEMPLATE, depth=2).double()
    learner.clip.double_backward = True
    state = moved(learner, 1)
    torch.manual_seed(0)
    views = torch.rand(1, 2, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def logits(views: Tensor, *values: Tensor) -> Tensor:
        own = dict(zip(state, values, strict=True))
        return learner.head(own)(learner.encode(views, own))

    assert torch.autograd.gradcheck(logits, (views, *state.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(logits, (views, *state.values()), fast_mode=True)


@pytest.mark.parametrize("part", ["text", "visual", "both"])
@pytest.mark.parametrize("start", ["initial", "moved"])
def test_samples_together_equal_samples_alone(part: str, start: str) -> None:
    learner = MultiModalPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
    learner.choose_part(part)
    torch.manual_seed(0)
    views, weight = torch.rand(3, 2, 3, 32, 32), torch.randn(3, 2, len(CLASSES))
    initial = {name: value.requires_grad_() for name, value in learner.initial_state(3).items()}
    state = initial if start == "initial" else moved(learner, 3)

    def logits_and_gradients(rows: slice) -> tuple[Tensor, ...]:
        own = {name: value[rows] for name, value in state.items()}
        logits = learner.head(own)(learner.encode(views[rows], own))
        return logits, *torch.autograd.grad((logits * weight[rows]).sum(), list(own.values()))

    together = logits_and_gradients(slice(0, 3))
    alone = [logits_and_gradients(slice(b, b + 1)) for b in range(3)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert not torch.allclose(together[1][0], together[1][1])
    # What the state does not hold is used as it is.
    for b in range(3):
        whole = {name: value.expand(3, *value.shape[1:]) for name, value in learner.values(state).items()}
        torch.testing.assert_close(together[0][b], plain_logits(learner.clip, whole, b, views[b]), atol=3e-4, rtol=0)


def test_the_initial_state_has_the_gradient_of_one_that_is_computed_anew() -> None:
    learner = MultiModalPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
    torch.manual_seed(0)
    views, weight = torch.rand(2, 2, 3, 32, 32), torch.randn(2, 2, len(CLASSES))
    found = []
    for copied in (False, True):
        state = learner.initial_state(2)
        state = {name: (value.clone() if copied else value).requires_grad_() for name, value in state.items()}
        logits = learner.head(state)(learner.encode(views, state))
        found.append(torch.autograd.grad((logits * weight).sum(), list(state.values())))
    for kept, anew in zip(*found, strict=True):
        torch.testing.assert_close(kept, anew, atol=1e-5 * float(anew.abs().max()), rtol=0)


def test_training_reaches_every_parameter() -> None:
    learner = MultiModalPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loss, logits = learner.training_loss(images, labels)
    values = {name: value.detach()[None].requires_grad_() for name, value in learner.tuned.items()}
    expected = plain_logits(learner.clip, values, 0, images)
    torch.testing.assert_close(logits, expected, atol=3e-4, rtol=0)
    loss.backward()
    plain = torch.nn.functional.cross_entropy(expected, labels)
    for value, right in zip(learner.tuned.values(), torch.autograd.grad(plain, list(values.values())), strict=True):
        assert value.grad is not None
        assert (value.grad - right[0]).abs().max() <= 1e-3 * right.abs().max()
        assert right.abs().max() > 0


def test_classes_are_computed_anew_only_where_the_text_changed() -> None:
    learner = MultiModalPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
    passes = []
    block = learner.clip.model.transformer.resblocks[0]
    block.mlp.register_forward_hook(lambda m, args, out: passes.append(out.shape))
    unit = torch.eye(24)[None]
    logits = learner.head()(unit)
    for name in learner.tuned:
        passes.clear()
        with torch.no_grad():
            learner.tuned[name].add_(0.1)
        changed = not torch.equal(learner.head()(unit), logits)
        logits = learner.head()(unit)
        assert bool(passes) == changed == name.startswith("context")


@pytest.mark.parametrize("precision", ["autocast", "true"])
def test_low_precision_stays_near(precision: str) -> None:
    views = torch.rand(1, 4, 3, 32, 32)
    learner = MultiModalPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
    state = {name: value.detach() for name, value in moved(learner, 1).items()}
    exact = learner.head(state)(learner.encode(views, state))
    if precision == "autocast":
        learner.clip.autocast_dtype = torch.bfloat16
    else:
        learner.to(torch.bfloat16)
    rounded = learner.head(state)(learner.encode(views, state))
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).abs().max() < 0.05 * learner.clip.logit_scale


def test_parameters_and_where_they_start() -> None:
    clip = frozen("wide_image")
    learner = MultiModalPrompt(clip, CLASSES, TEMPLATE, n_context=3, depth=3)
    assert {name: list(value.shape) for name, value in learner.tuned.items()} == {
        "context": [3, 64], "context_deep": [2, 3, 64], "coupling_weight": [3, 96, 64], "coupling_bias": [3, 96],
    }  # fmt: skip
    words = TextPrompt(clip, CLASSES, TEMPLATE).tuned["context"]
    assert torch.equal(learner.tuned["context"], words[:3])
    deep, weight, bias = (learner.tuned[name].detach() for name in ("context_deep", "coupling_weight", "coupling_bias"))
    assert abs(float(deep.std()) - 0.02) < 2e-3
    # As torch.nn.Linear's own: uniform within 1 / sqrt(64).
    for value in (weight, bias):
        assert 0.12 < value.abs().max() <= 0.125
        assert abs(float(value.std()) - 0.125 / 3**0.5) < 5e-3
    torch.manual_seed(5)
    again = as_factory(learner.config)(clip, CLASSES, TEMPLATE)
    assert all(torch.equal(again.tuned[name], value) for name, value in learner.tuned.items())


def test_parts_and_what_reaches_the_pixels() -> None:
    learner = MultiModalPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
    assert list(MultiModalPrompt(learner.clip, CLASSES, TEMPLATE, depth=1).tuned) == [
        "context", "coupling_weight", "coupling_bias",
    ]  # fmt: skip
    views = torch.rand(1, 2, 3, 32, 32)
    for part, names in (
        ("text", ["context", "context_deep"]),
        ("visual", ["coupling_weight", "coupling_bias"]),
        ("both", ["context", "context_deep", "coupling_weight", "coupling_bias"]),
    ):
        learner.choose_part(part)
        assert learner.state_names == names
        assert learner.reaches_pixels
        state = moved(learner, 1)
        for name in names:
            assert not torch.allclose(learner.encode(views, {name: state[name]}), learner.encode(views), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("openai_vit", {}, "depth is 9, and the image tower has 2 blocks: choose a depth from 1 to 2"),
        ("wide_text", {}, "depth is 9, and the text tower has 3 blocks: choose a depth from 1 to 3"),
        ("openai_vit", {"depth": 0}, "depth is 0, and the image tower has 2 blocks"),
        ("openai_vit", {"depth": 2, "n_context": 5}, r"n_context is 5, and template 'a photo of a \{\}.' has 4 tokens"),
        ("openai_vit", {"depth": 2, "n_context": 0}, "n_context is 0, and template"),
        ("modified_resnet", {}, "MultiModalPrompt puts tokens .* ModifiedResNet is not open_clip's"),
        ("bidirectional", {}, "TextTransformer of bidirectional is not: use another"),
    ],
)
def test_what_does_not_go_is_named(kind: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiModalPrompt(frozen(kind), CLASSES, TEMPLATE, **options)
