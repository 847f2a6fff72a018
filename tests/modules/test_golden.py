"""TPT and zero-shot against the official implementations (tests/data/golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.golden import MANIFEST, NAMES, fixture, golden_views, save_golden
from torch import Tensor

from metatpt.functional import take_views
from metatpt.modules import MetaTPTModule, TPTModule, ViewAverageModule, ZeroShotModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def views() -> Tensor:
    return golden_views()


def test_zero_shot(folder: Path, views: Tensor) -> None:
    golden = fixture("zero_shot")
    module = ZeroShotModule(clip=str(folder), class_names=NAMES)
    with torch.no_grad():
        logits = module.prompt.head()(module.prompt.encode(views))
    torch.testing.assert_close(logits, golden["logits_all_views"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, 0], golden["logits_view0"], atol=1e-4, rtol=0)


def test_ensemble_of_templates(folder: Path) -> None:
    golden = fixture("zero_shot")
    module = ZeroShotModule(clip=str(folder), class_names=NAMES, template=MANIFEST["templates_7"])
    unit = torch.eye(64)[None]
    expected = module.clip.logit_scale * golden["text_features_7_templates"].T
    torch.testing.assert_close(module.prompt.head()(unit)[0], expected, atol=1e-4, rtol=0)


@pytest.fixture(params=[TPTModule, MetaTPTModule])
def tpt(request: pytest.FixtureRequest, folder: Path) -> Callable[..., TPTModule | MetaTPTModule]:
    """TPT as its own module, and as the options of MetaTPT that amount to it."""

    def make(steps: int) -> TPTModule | MetaTPTModule:
        if request.param is TPTModule:
            return TPTModule(clip=str(folder), class_names=NAMES, outer_steps=steps)
        return MetaTPTModule(
            clip=str(folder), class_names=NAMES, outer_steps=steps, outer_lr=5e-3, selection=0.1,
            outer_loss="marginal_entropy", augmentation="fixed", predict="original",
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("variant", "steps", "atol"), [("steps1", 1, 1e-3), ("steps4", 4, 5e-3), ("coop_init4_steps1", 1, 1e-3)]
)
@pytest.mark.parametrize("together", [True, False])
def test_tpt(
    tpt: Callable[..., TPTModule | MetaTPTModule], views: Tensor, variant: str, steps: int, atol: float, together: bool
) -> None:
    golden = fixture("tpt", f"{variant}/")
    module = tpt(steps)
    module.prompt.tuned["context"].data.copy_(golden["ctx_init"])
    for part in [slice(0, 4)] if together else [slice(i, i + 1) for i in range(4)]:
        look = module.look_at(views[part])
        torch.testing.assert_close(
            look.log_probs.float(), golden["initial_logits_all_views"][part].log_softmax(-1), atol=1e-3, rtol=0
        )
        assert look.chosen.sort().values.tolist() == golden["selected_idx"][part].sort().values.tolist()
        result = module.adapt_views(views[part])
        assert module._final is not None
        context = module._final["context"]
        torch.testing.assert_close(context, golden["ctx_after"][part], atol=1e-5 if steps > 1 else 1e-6, rtol=0)
        torch.testing.assert_close(result.log_probs, golden["final_logits"][part].log_softmax(-1), atol=atol, rtol=0)
        torch.testing.assert_close(
            result.diagnostics["first_loss"].float(), golden["losses"][part, 0], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            result.diagnostics["last_loss"].float(), golden["losses"][part, -1], atol=1e-4, rtol=0
        )


def test_views_that_average_are_the_confident_ones(folder: Path, views: Tensor) -> None:
    module = ViewAverageModule(clip=str(folder), class_names=NAMES, selection=0.1, ensemble_temperature=1e6)
    golden = fixture("tpt")
    log_probs = golden["steps1/initial_logits_all_views"].log_softmax(-1)
    result = module.adapt_views(views)
    # At a very high temperature the ensemble is the plain mean over the original and the confident views.
    for sample in range(4):
        rows = sorted({0, *golden["steps1/selected_idx"][sample].tolist()})
        expected = log_probs[sample, rows].exp().mean(0)
        torch.testing.assert_close(result.log_probs[sample].exp(), expected, atol=1e-4, rtol=0)
    assert take_views(log_probs, golden["steps1/selected_idx"]).shape == (4, 6, 12)
