"""VPT against the official code (golden files), open_clip's own forward, and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import models
from helpers.golden import NAMES, fixture, golden_clip, golden_views
from helpers.models import CONFIGS, frozen
from helpers.plain_prompts import image_features
from torch import Tensor

from metatpt.clip.budget import Budget
from metatpt.prompts import TemplatePrompt, VisualPrompt, as_factory

CLASSES = ["cat", "golden retriever", "ox"]
TEMPLATE = "a photo of a {}."
KINDS = ["openai_vit", "average_pool", "custom_text", "bidirectional", "class_token", "hugging_face"]


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers of three blocks, of which one or the other is the wider."""
    for kind, text, image in (("wide_image", 64, 96), ("wide_text", 96, 64)):
        config = copy.deepcopy(CONFIGS["openai_vit"])
        config["text_cfg"] |= {"width": text, "heads": text // 32}
        config["vision_cfg"] |= {"width": image, "layers": 3}
        monkeypatch.setitem(models.CONFIGS, kind, config)


def moved(learner: VisualPrompt, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (value + 0.5 * torch.randn(value.shape, generator=generator).to(value)).requires_grad_()
        for name, value in learner.initial_state(size).items()
    }


def own_tokens(state: dict[str, Tensor], sample: int) -> list[Tensor]:
    deep = state["visual_deep"][sample].unbind() if "visual_deep" in state else ()
    return [state["visual"][sample], *deep]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_official_logits_features_and_gradients(depth: int) -> None:
    golden, images = fixture("vpt_deep", f"depth{depth}/"), golden_views()[:, 0]
    every = fixture("vpt_deep")
    learner = VisualPrompt(golden_clip(), NAMES, TEMPLATE, depth=depth)
    keys = ["image_encoder.VPT", *(f"image_encoder.transformer.resblocks.{i}.VPT_shallow" for i in range(1, depth))]
    first, *deep = (golden[f"params/{key}"] for key in keys)
    learner.tuned["visual"].data.copy_(first)
    if deep:
        learner.tuned["visual_deep"].data.copy_(torch.stack(deep))
    loss, logits = learner.training_loss(images, every["labels"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss[None], golden["loss"], atol=1e-4, rtol=0)
    torch.testing.assert_close(learner.encode(images[None])[0], golden["image_features"], atol=1e-4, rtol=0)
    texts = learner.head()(torch.eye(64)[None])[0].T / learner.clip.logit_scale
    torch.testing.assert_close(texts, every["text_features"], atol=1e-4, rtol=0)
    loss.backward()
    found = [learner.tuned["visual"].grad, *(learner.tuned["visual_deep"].grad if deep else ())]
    for gradient, key in zip(found, keys, strict=True):
        expected = golden[f"grad/{key}"]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.usefixtures("widths")
@pytest.mark.parametrize(
    ("kind", "depth"),
    [*((kind, 2) for kind in KINDS), ("openai_vit", 1), ("average_pool", 1), *((f"wide_{t}", d) for t in ("image", "text") for d in (1, 2, 3))],
)  # fmt: skip
def test_features_and_gradients_of_every_tower_equal_open_clips(kind: str, depth: int) -> None:
    clip = frozen(kind)
    learner = VisualPrompt(clip, CLASSES, TEMPLATE, n_visual=3, depth=depth)
    torch.manual_seed(0)
    views = torch.rand(2, 2, 3, 32, 32)
    state = moved(learner, 2)
    expected = torch.stack([image_features(clip, each, own_tokens(state, b)) for b, each in enumerate(views)])
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), list(state.values()))
    for memory in (2**32, 1):  # all at once, and one picture at a time, recomputed in the backward pass
        clip.budget = Budget(memory)
        features = learner.encode(views, state)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
        gradients = torch.autograd.grad((features * weight).sum(), list(state.values()))
        for gradient, right in zip(gradients, expected_gradients, strict=True):
            assert (gradient - right).abs().max() <= 1e-4 * right.abs().max()


def test_pictures_that_do_not_fit_go_through_alone_and_again() -> None:
    clip = frozen("openai_vit")
    learner = VisualPrompt(clip, CLASSES, TEMPLATE)
    views, state = torch.rand(1, 3, 3, 32, 32), moved(learner, 1)
    graph = 3 * clip._bytes_per_picture(views[0])
    sizes = []
    clip.model.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    found = []
    for total, expected in ((4 * graph, [3]), (2 * graph, [1, 1, 1] * 2)):
        clip.budget = Budget(total)
        sizes.clear()
        found += torch.autograd.grad(learner.encode(views, state).square()[..., :4].sum(), state["visual"])
        assert sizes == expected
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(("kind", "memory"), [("openai_vit", 1), ("average_pool", 2**32)])  # 1: a picture at a time
def test_first_and_second_derivatives_equal_finite_differences(kind: str, memory: int) -> None:
    clip = frozen(kind)
    learner = VisualPrompt(clip, CLASSES, TEMPLATE, n_visual=2, depth=2).double()
    clip.double_backward, clip.budget = True, Budget(memory)
    state = moved(learner, 1)
    torch.manual_seed(0)
    views = torch.rand(1, 2, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def features(views: Tensor, *values: Tensor) -> Tensor:
        return learner.encode(views, dict(zip(state, values, strict=True)))

    assert torch.autograd.gradcheck(features, (views, *state.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(features, (views, *state.values()), fast_mode=True)


@pytest.mark.parametrize("start", ["initial", "moved"])
def test_samples_together_equal_samples_alone(start: str) -> None:
    learner = VisualPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
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


@pytest.mark.parametrize("precision", ["autocast", "true"])
def test_low_precision_stays_near(precision: str) -> None:
    views = torch.rand(1, 4, 3, 32, 32)
    learner = VisualPrompt(frozen("openai_vit"), CLASSES, TEMPLATE, depth=2)
    state = {name: value.detach() for name, value in moved(learner, 1).items()}
    exact = learner.encode(views, state)
    if precision == "autocast":
        learner.clip.autocast_dtype = torch.bfloat16
    else:
        learner.to(torch.bfloat16)
    rounded = learner.encode(views, state)
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - exact).abs().max() < 0.03


def test_classes_are_the_templates_and_computed_once() -> None:
    clip = frozen("openai_vit")
    learner = VisualPrompt(clip, CLASSES, TEMPLATE)
    passes = []
    clip.model.transformer.resblocks[0].mlp.register_forward_hook(lambda m, args, out: passes.append(out.shape))
    unit, state = torch.eye(24)[None], moved(learner, 1)
    logits = learner.head()(unit)
    assert passes
    passes.clear()
    with torch.no_grad():
        learner.tuned["visual"].add_(1)  # as a step of training does
    assert torch.equal(learner.head()(unit), logits)
    assert torch.equal(learner.head(state)(unit), logits)
    assert not passes
    assert torch.equal(TemplatePrompt(clip, CLASSES, [TEMPLATE]).head()(unit), logits)


def test_parameters_are_of_the_image_and_start_from_the_seed() -> None:
    clip = frozen("openai_vit")
    learner = VisualPrompt(clip, CLASSES, TEMPLATE, n_visual=400, depth=2)
    assert {name: list(value.shape) for name, value in learner.tuned.items()} == {
        "visual": [400, 64], "visual_deep": [1, 400, 64],
    }  # fmt: skip
    for value in learner.tuned.values():
        assert abs(float(value.detach().mean())) < 5e-4
        assert abs(float(value.detach().std()) - 0.02) < 5e-4
    torch.manual_seed(5)
    again = as_factory(learner.config)(clip, CLASSES, TEMPLATE)
    assert all(torch.equal(again.tuned[name], value) for name, value in learner.tuned.items())
    assert list(VisualPrompt(clip, CLASSES, TEMPLATE).tuned) == ["visual"]
    assert learner.reaches_pixels
    learner.choose_part("visual")
    assert learner.state_names == ["visual", "visual_deep"]
    with pytest.raises(ValueError, match="VisualPrompt has no text part to tune, only visual"):
        learner.choose_part("text")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("openai_vit", {"depth": 3}, "depth is 3, and the image tower has 2 blocks: choose a depth from 1 to 2"),
        ("openai_vit", {"depth": 0}, "depth is 0, and the image tower has 2 blocks"),
        ("openai_vit", {"n_visual": 0}, "n_visual is 0; expected at least 1"),
        (
            "modified_resnet",
            {},
            "ModifiedResNet is not open_clip's VisionTransformer; use another --model.clip, or TextPrompt",
        ),
        ("timm", {}, "that of timm takes none: TimmModel is not open_clip's VisionTransformer"),
        ("custom_blocks", {}, "its blocks are not open_clip's plain ones but CustomResidualAttentionBlock"),
    ],
)
def test_what_does_not_go_is_named(kind: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualPrompt(frozen(kind), CLASSES, TEMPLATE, **options)
