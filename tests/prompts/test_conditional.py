"""CoCoOp's prompt: against the official code, finite differences, and one sample or view at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import NAMES as FEW
from helpers.batches import make_batch
from helpers.golden import NAMES, fixture, originals, save_golden
from helpers.models import frozen
from torch import Tensor

from metatpt.clip import FrozenCLIP, load_clip
from metatpt.clip.budget import Budget
from metatpt.modules import TPTModule
from metatpt.prompts import ConditionalPrompt, TextPrompt

OFFICIAL = {
    "context": "ctx",
    "net_1_weight": "meta_net.linear1.weight",
    "net_1_bias": "meta_net.linear1.bias",
    "net_2_weight": "meta_net.linear2.weight",
    "net_2_bias": "meta_net.linear2.bias",
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> FrozenCLIP:
    return load_clip(str(save_golden(tmp_path_factory.mktemp("golden"))))


@pytest.mark.parametrize("memory", [2**32, 1])
def test_official_logits_and_gradients(golden: FrozenCLIP, memory: int) -> None:
    golden.budget = Budget(memory)  # 1 byte: view by view and class by class, computed again in the backward pass
    expected = fixture("cocoop_forward")
    prompt = ConditionalPrompt(golden, NAMES, "a photo of a {}.")
    for name, theirs in OFFICIAL.items():
        prompt.tuned[name].data.copy_(expected[f"params/{theirs}"])
    loss, logits = prompt.training_loss(originals()[:, 0], expected["labels"].long())
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss[None], expected["loss"], atol=1e-5, rtol=0)
    contexts = prompt.contexts(prompt.values(None), expected["image_features"])
    torch.testing.assert_close(contexts, expected["ctx_shifted"], atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(loss, list(prompt.tuned.values()))
    for name, gradient in zip(prompt.tuned, gradients, strict=True):
        theirs = expected[f"grad/{OFFICIAL[name]}"]
        assert (gradient - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


def moved(prompt: ConditionalPrompt, size: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = prompt.initial_state(size)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in state.items()
    }


@pytest.mark.parametrize("options", [{}, {"n_context": 2}, {"n_context": 3, "init": "random"}])
def test_each_view_has_class_features_of_its_own(options: dict[str, Any]) -> None:
    clip = frozen("openai_vit")
    prompt = ConditionalPrompt(clip, FEW, "a photo of a {}.", **options)
    shared = TextPrompt(clip, FEW, "a photo of a {}.", **options)
    state = moved(prompt, 2)
    features = F.normalize(torch.randn(2, 3, 24), dim=-1)
    logits = prompt.head(state)(features)
    for sample in range(2):
        for view in range(3):
            feature = features[sample, view]
            net = torch.nn.Sequential(torch.nn.Linear(24, 1), torch.nn.ReLU(), torch.nn.Linear(1, 32))
            for layer, number in ((0, 1), (2, 2)):
                net[layer].weight.data = state[f"net_{number}_weight"][sample]
                net[layer].bias.data = state[f"net_{number}_bias"][sample]
            context = state["context"][sample] + net(feature)
            expected = shared.head({"context": context[None]})(feature[None, None])[0, 0]
            torch.testing.assert_close(logits[sample, view], expected, atol=1e-4, rtol=0)
    alone = [
        prompt.head({name: value[i : i + 1] for name, value in state.items()})(features[i : i + 1]) for i in range(2)
    ]
    assert torch.equal(logits, torch.cat(alone))


def test_finite_differences_of_states_and_features() -> None:
    clip = frozen("openai_vit").double()
    prompt = ConditionalPrompt(clip, FEW[:3], "a photo of a {}.")
    state = moved(prompt, 2)
    inputs = [F.normalize(torch.randn(2, 2, 24, dtype=torch.float64), dim=-1), *state.values()]
    inputs = [each.requires_grad_() for each in inputs]

    def loss(features: Tensor, *values: Tensor) -> Tensor:
        return prompt.head(dict(zip(state, values, strict=True)))(features).log_softmax(-1)[..., 1].sum()

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for number, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        ends = []
        for sign in (1, -1):
            at = [each.detach() for each in inputs]
            at[number] = at[number] + sign * 1e-6 * direction
            with torch.no_grad():
                ends.append(loss(*at))
        torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)
        assert gradient.abs().max() > 0


def test_views_go_through_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = frozen("openai_vit")
    prompt = ConditionalPrompt(clip, FEW, "a photo of a {}.")
    features = F.normalize(torch.randn(1, 6, 24), dim=-1)
    whole = prompt.head()(features)
    encode, sizes = clip.encode_prompts, []
    monkeypatch.setattr(clip, "encode_prompts", lambda p, c, **kw: sizes.append(len(c)) or encode(p, c, **kw))
    monkeypatch.setattr(clip, "contexts_at_once", lambda prompts: 4)
    torch.testing.assert_close(prompt.head()(features), whole)
    assert sizes == [4, 2]


def test_how_many_views_fit() -> None:
    clip = frozen("openai_vit")
    layout = clip.layout(clip.tokenize("a photo of a {}.", FEW))
    each = clip._bytes_of_prompts(layout)
    clip.budget = Budget(4 * 3 * layout.size * each)  # a quarter is for what goes through
    assert clip.contexts_at_once(layout) == 3
    clip.budget = Budget(1)
    assert clip.contexts_at_once(layout) == 1


def test_the_network_starts_as_torch_starts_its_own() -> None:
    clip = frozen("openai_vit")
    prompt = ConditionalPrompt(clip, FEW, "a photo of a {}.")
    assert {name: list(value.shape) for name, value in prompt.tuned.items()} == {
        "context": [4, 32], "net_1_weight": [1, 24], "net_1_bias": [1], "net_2_weight": [32, 1], "net_2_bias": [32]
    }  # fmt: skip
    assert 0.7 * 24**-0.5 < prompt.tuned["net_1_weight"].abs().max() <= 24**-0.5
    assert 0.8 < prompt.tuned["net_2_bias"].abs().max() <= 1
    torch.manual_seed(7)
    again = ConditionalPrompt(clip, FEW, "a photo of a {}.")
    assert all(torch.equal(again.tuned[name], value) for name, value in prompt.tuned.items())
    assert prompt.state_names == list(prompt.tuned)
    assert not prompt.reaches_pixels
    with pytest.raises(ValueError, match="ConditionalPrompt has no visual part"):
        prompt.choose_part("visual")


def test_a_method_tunes_it(tiny_clip_folder: Path) -> None:
    module = TPTModule(clip=str(tiny_clip_folder), class_names=FEW, prompt=ConditionalPrompt)
    batch = make_batch(2, 32)
    result = module.adapt(batch)
    assert (result.log_probs - result.zero_shot_log_probs).abs().max() > 1e-4
    torch.testing.assert_close(module.adapt(batch.select([1])).log_probs[0], result.log_probs[1])
