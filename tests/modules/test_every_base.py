"""Every method on every prompt learner: its samples alone, in little memory, each part, against plain definitions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.batches import NAMES, make_batch
from helpers.models import save_folder

from metatpt.functional import entropy, marginal_entropy
from metatpt.modules import (
    AdaptationModule,
    MetaTPTModule,
    MetaTrainingModule,
    TPTModule,
    ViewAverageModule,
    ZeroShotModule,
)
from metatpt.prompts import (
    ConditionalPrompt,
    MultiModalPrompt,
    RepresentationPrompt,
    TextPrompt,
    UnifiedPrompt,
    VisualPrompt,
)

BASES = {
    "CoOp": partial(TextPrompt, n_context=3, init="random"),
    "class-specific CoOp": partial(TextPrompt, per_class=True, position="middle"),
    "CoCoOp": ConditionalPrompt,
    "VPT": partial(VisualPrompt, depth=2),
    "MaPLe": partial(MultiModalPrompt, depth=2),
    "MMRL": partial(RepresentationPrompt, width=16, first_block=2, last_block=2, prediction="fused"),
    "UPT": UnifiedPrompt,
}
METHODS: dict[str, tuple[type[AdaptationModule], dict[str, Any]]] = {
    "zero-shot": (ZeroShotModule, {}),
    "average": (ViewAverageModule, {"n_views": 5, "selection": 0.6}),
    "TPT": (TPTModule, {"n_views": 5, "selection": 0.6, "outer_steps": 2, "outer_lr": None, "outer_lr_relative": 0.1}),
    "MetaTPT": (MetaTPTModule, {"n_views": 5, "selection": 0.6, "outer_steps": 2, "outer_lr_relative": 0.1}),
    "nested, second order": (
        MetaTPTModule,
        {
            "n_views": 5, "selection": 0.6, "outer_steps": 2, "schedule": "nested", "order": "second",
            "outer_lr_relative": 0.1, "outer_optimizer": "normalised_sgd", "predict": "original",
        },
    ),
    "joint": (MetaTPTModule, {"n_views": 5, "selection": 0.6, "outer_steps": 2, "schedule": "joint"}),
}  # fmt: skip
TUNE_PIXELS = ("VPT", "MaPLe", "MMRL", "UPT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder("openai_vit", tmp_path_factory.mktemp("clip"))


def make(folder: Path, base: str, method: str, **options: Any) -> AdaptationModule:
    cls, its_options = METHODS[method]
    return cls(clip=str(folder), class_names=NAMES, prompt=BASES[base], **{**its_options, **options})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_samples_together_alone_and_in_chunks(folder: Path, base: str, method: str) -> None:
    module = make(folder, base, method)
    batch = make_batch(3, 32)
    together = module.process(batch)
    assert together.status == ["ok"] * 3
    small = make(folder, base, method, memory=1)
    small.load_state_dict(module.state_dict())
    for row in range(3):
        alone = module.process(batch.select([row]))
        torch.testing.assert_close(together.log_probs[row].exp(), alone.log_probs[0].exp(), atol=1e-5, rtol=0)
    chunked = small.process(batch)
    torch.testing.assert_close(together.log_probs.exp(), chunked.log_probs.exp(), atol=1e-4, rtol=0)
    changes = not torch.allclose(together.log_probs, together.zero_shot_log_probs, atol=1e-4)
    assert changes == (method != "zero-shot")


@pytest.mark.parametrize("base", TUNE_PIXELS)
def test_tpt_through_pictures_is_plain_gradient_descent_on_them(folder: Path, base: str) -> None:
    """TPT by hand: all views encoded anew under the prompt at each step, torch's own optimiser."""
    module = make(folder, base, "TPT").double()
    views = make_views(module)
    result = module.adapt_views(views)
    learner = module.prompt
    start = {name: value.detach().clone()[None].requires_grad_() for name, value in learner.tuned.items()}
    spread = {name: float(value.detach().std()) for name, value in learner.tuned.items()}
    adam = torch.optim.AdamW([{"params": [value], "lr": 0.1 * spread[name]} for name, value in start.items()])

    def log_probs() -> torch.Tensor:
        return learner.head(start)(learner.encode(views, start)).log_softmax(-1)

    chosen = entropy(log_probs().detach())[0].argsort()[:3]
    for _ in range(2):
        adam.zero_grad()
        marginal_entropy(log_probs()[:, chosen]).sum().backward()
        adam.step()
    expected = log_probs()[:, 0].detach().float()
    torch.testing.assert_close(result.log_probs, expected, atol=1e-5, rtol=0)


def make_views(module: AdaptationModule) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    size = module.preprocessing.size
    return torch.rand(1, 5, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("base", "part", "moves"),
    [
        ("VPT", "visual", {"visual", "visual_deep"}),
        ("MaPLe", "text", {"context", "context_deep"}),
        ("MaPLe", "visual", {"coupling_weight", "coupling_bias"}),
        ("MMRL", "text", {"to_text_weight", "to_text_bias"}),
        ("MMRL", "visual", {"to_image_weight", "to_image_bias", "projection"}),
        ("CoOp", "text", {"context"}),
    ],
)
def test_only_the_part_that_was_asked_for_is_tuned(folder: Path, base: str, part: str, moves: set[str]) -> None:
    module = make(folder, base, "TPT", tuned_part=part)
    module.process(make_batch(2, 32))
    assert module._final is not None
    assert set(module._final) == moves
    start = module.prompt.initial_state(2)
    changed = {name for name, value in module._final.items() if not torch.equal(value, start[name])}
    assert changed >= moves - {"coupling_bias", "to_text_bias", "to_image_bias"}  # equal ones have no spread to move by


@pytest.mark.parametrize(("base", "part"), [("CoOp", "visual"), ("VPT", "text")])
def test_a_part_that_is_not_there_is_refused(folder: Path, base: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"has no {part} part to tune"):
        make(folder, base, "TPT", tuned_part=part)


def test_a_method_that_forgets_to_encode_is_told(folder: Path) -> None:
    class Forgetful(TPTModule):
        def selected_features(self, look, state):
            return super().selected_features(look, None)

    module = Forgetful(clip=str(folder), class_names=NAMES, prompt=BASES["MaPLe"], n_views=4)
    with pytest.raises(RuntimeError, match="original_features and selected_features"):
        module.process(make_batch(1, 32))


NESTED = {"schedule": "nested", "order": "second", "outer_steps": 2}


@pytest.mark.parametrize(
    ("base", "options"),
    [("VPT", {"outer_steps": 2}), ("MaPLe", NESTED), ("MMRL", NESTED), ("UPT", {"outer_steps": 2}), ("CoCoOp", NESTED)],
)
def test_meta_gradients_through_pictures_agree_with_finite_differences(
    folder: Path, base: str, options: dict[str, Any]
) -> None:
    module = MetaTrainingModule(
        clip=str(folder), class_names=NAMES[:2], prompt=BASES[base], n_views=4, selection=0.5, outer_lr=0.02,
        outer_loss="marginal_entropy", predict="original", **options,
    ).double()  # fmt: skip
    batch = make_batch(1, 32)
    batch.label[:] = 1
    parameters = module.trained_parameters()
    gradients = torch.autograd.grad(module.meta_loss(batch)[0].sum(), parameters, materialize_grads=True)
    torch.manual_seed(0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.nn.functional.normalize(torch.randn_like(parameter).flatten(), dim=0).view_as(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-7 * direction
            values.append(float(module.meta_loss(batch)[0].detach().sum()))
            with torch.no_grad():
                parameter -= sign * 1e-7 * direction
        assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-3, abs=1e-6)
