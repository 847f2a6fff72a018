"""MMRL against the official implementation (tests/data/golden/README.md), and as a prompt learner."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import GOLDEN, NAMES, fixture, golden_clip, originals
from helpers.learners import (
    CLASSES,
    assert_chunks_change_nothing,
    assert_finite_differences,
    assert_samples_are_alone,
    pictures,
    sized,
)
from helpers.models import frozen
from torch import Tensor

from metatpt.prompts import RepresentationPrompt

TEMPLATE = "a photo of a {}."


def official(blocks: str) -> dict[str, Tensor]:
    """The official code's parameters with tokens in blocks 2 and 3, or in block 2 alone."""
    if blocks == "layers23":
        file = GOLDEN / "checkpoints" / "mmrl" / "model-best.pth.tar"
        return torch.load(file, weights_only=True)["state_dict"]
    prefix = "layers2/state/"
    return {key.removeprefix(prefix): value for key, value in fixture("mmrl_forward").items() if prefix in key}


def golden(blocks: str, **options: object) -> RepresentationPrompt:
    state, learner = official(blocks), "representation_learner.compound_rep_tokens"
    last = {"layers23": 3, "layers2": 2}[blocks]
    prompt = RepresentationPrompt(golden_clip(), NAMES, TEMPLATE, 5, 32, 2, last, **options)

    def of_maps(which: str, kind: str) -> Tensor:
        return torch.stack([state[f"{learner}_{which}proj.{index}.{kind}"] for index in range(last - 1)])

    values = {
        "tokens": state[learner],
        "to_text_weight": of_maps("r2t", "weight"),
        "to_text_bias": of_maps("r2t", "bias"),
        "to_image_weight": of_maps("r2v", "weight"),
        "to_image_bias": of_maps("r2v", "bias"),
        "projection": state["image_encoder.proj_rep"],
    }
    prompt.tuned.load_state_dict(values)
    return prompt


two_and_three_blocks = functools.cache(functools.partial(frozen, "openai_vit"))


def small(text: int = 64, image: int = 96, **options: object) -> RepresentationPrompt:
    return RepresentationPrompt(sized(text, image), CLASSES, TEMPLATE, 2, 16, 2, 3, **options)


@pytest.mark.parametrize("blocks", ["layers23", "layers2"])
def test_forward_is_the_official_one(blocks: str) -> None:
    expected = {key.removeprefix(f"{blocks}/"): value for key, value in fixture("mmrl_forward").items()}
    prompt = golden(blocks)
    with torch.no_grad():
        features = prompt.encode(originals()[:, 0][None])
        classes = prompt.class_features(None, prompt._compute)[0]
        fused = prompt.head()(features)[0]
        plain = golden(blocks, prediction="plain").head()(features)[0]
        of_tokens = golden(blocks, alpha=0.0).head()(features)[0]
    of_class_token = features[0, :, :64] * 2**0.5
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 4))
    for ours, name in (
        (fused, "logits_fusion"),
        (plain, "logits"),
        (of_tokens, "logits_rep"),
        (of_class_token, "image_features"),
        (classes, "text_features"),
    ):
        torch.testing.assert_close(ours, expected[name], atol=1e-4, rtol=0)


def test_training_loss_is_the_official_one() -> None:
    expected, zero_shot = fixture("mmrl_forward"), fixture("zero_shot")
    labels = torch.tensor([3, 0, 11, 5])
    own, other = (F.cross_entropy(expected[f"layers23/{name}"], labels) for name in ("logits", "logits_rep"))
    away_images = 1 - F.cosine_similarity(expected["layers23/image_features"], zero_shot["image_features_raw"][:, 0])
    away_texts = 1 - F.cosine_similarity(expected["layers23/text_features"], zero_shot["text_features"])
    loss, logits = golden("layers23", regularisation=6.0).training_loss(originals()[:, 0], labels)
    reference = 0.7 * own + 0.3 * other + 6 * away_images.mean() + 6 * away_texts.mean()
    torch.testing.assert_close(loss, reference, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, expected["layers23/logits_fusion"], atol=1e-4, rtol=0)


def test_classes_of_equal_names_count_one_by_one_in_the_regulariser() -> None:
    clip, names = sized(), ["cat", "ox", "ox", "ox"]
    images, labels = pictures(2), torch.tensor([0, 1])

    def learner(regularisation: float) -> RepresentationPrompt:
        return RepresentationPrompt(clip, names, TEMPLATE, 2, 16, 2, 3, regularisation=regularisation)

    prompt = learner(1.0)
    with torch.no_grad():
        classes = prompt.class_features(None, prompt._compute)[0]
        towards = clip.encode_prompts(clip.layout(clip.tokenize(TEMPLATE, ["cat", "ox"])))[0]
        cat, ox = 1 - F.cosine_similarity(classes, towards)
        images_away = 1 - F.cosine_similarity(prompt.encode(images[None])[0, :, :24], clip.encode_image(images)).mean()
        with_it, without = (learner(weight).training_loss(images, labels)[0] for weight in (1.0, 0.0))
    assert abs(cat - ox) / 4 > 1e-4  # what counting them once would change
    torch.testing.assert_close(with_it - without, (cat + 3 * ox) / 4 + images_away, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("text", "image"), [(64, 96), (96, 64)])
def test_training_gradients_are_finite_differences(text: int, image: int) -> None:
    prompt = RepresentationPrompt(sized(text, image, torch.float64), CLASSES, TEMPLATE, 2, 16, 2, 3, regularisation=2.0)
    assert_finite_differences(prompt)


@pytest.mark.parametrize(("text", "image"), [(64, 96), (96, 64)])
def test_samples_are_alone(text: int, image: int) -> None:
    assert_samples_are_alone(small(text, image))


def test_chunks_give_the_gradients_of_the_whole() -> None:
    assert_chunks_change_nothing(small())


def test_other_classes_get_plain_logits() -> None:
    views = pictures(1, 2)
    fused, plain = small(prediction="fused"), small(prediction="plain")
    auto = small()
    features = auto.encode(views)
    with torch.no_grad():
        of_fused, of_plain = fused.head()(features), plain.head()(features)
        assert not torch.allclose(of_fused, of_plain)
        assert torch.equal(auto.head()(features), of_fused)  # nothing was loaded
        auto.trained_on(["dog", "ox"])
        assert torch.equal(auto.head()(features), of_plain)
        auto.trained_on(CLASSES[::-1])  # in another order
        assert torch.equal(auto.head()(features), of_fused)
        for prompt, expected in ((fused, of_fused), (plain, of_plain)):
            prompt.trained_on(["dog"])
            assert torch.equal(prompt.head()(features), expected)


def test_training_goes_over_to_the_classes_at_hand() -> None:
    prompt = small()
    features = prompt.encode(pictures(1, 2)).detach()
    fused = prompt.head()(features)
    prompt.trained_on(["dog"])
    prompt.training_loss(pictures(2), torch.tensor([0, 1]))
    assert torch.equal(prompt.head()(features), fused)


def test_parts_of_the_parameters() -> None:
    prompt = small()
    shapes = {name: list(value.shape) for name, value in prompt.tuned.items()}
    assert shapes == {
        "tokens": [2, 16],
        "to_text_weight": [2, 64, 16],
        "to_text_bias": [2, 64],
        "to_image_weight": [2, 96, 16],
        "to_image_bias": [2, 96],
        "projection": [96, 24],
    }
    prompt.choose_part("text")
    assert prompt.state_names == ["to_text_weight", "to_text_bias"]
    assert not prompt.reaches_pixels
    prompt.choose_part("visual")
    assert prompt.state_names == ["to_image_weight", "to_image_bias", "projection"]
    assert prompt.reaches_pixels


def test_start_is_that_of_the_official_code_and_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    first = RepresentationPrompt(sized(), CLASSES, TEMPLATE, 50, 100, 2, 3)
    torch.manual_seed(2)
    again = RepresentationPrompt(sized(), CLASSES, TEMPLATE, 50, 100, 2, 3)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    other = RepresentationPrompt(sized(), CLASSES, TEMPLATE, 50, 100, 2, 3)
    for name, value in first.tuned.items():
        assert torch.equal(value, again.tuned[name])
        assert not torch.equal(value, other.tuned[name])
    assert float(first.tuned["tokens"].detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(first.tuned["projection"].detach().std()) == pytest.approx(96**-0.5, rel=0.05)
    for name in ("to_text_weight", "to_image_weight", "to_text_bias", "to_image_bias"):
        value = first.tuned[name]
        assert torch.equal(value[0], value[1])  # clones of one layer
        assert 0.09 < float(value.detach().abs().max()) <= 0.1


def test_low_precision_towers() -> None:
    full, autocast = small(), small()
    low = copy.deepcopy(full).bfloat16()
    autocast.clip.autocast_dtype = torch.bfloat16
    assert {value.dtype for value in low.tuned.values()} == {torch.float32}
    views = pictures(1, 2)
    expected = full.encode(views)
    for prompt in (low, autocast):
        features = prompt.encode(views)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, expected, atol=0.03, rtol=0)
        assert not torch.equal(features, expected)
        assert prompt.head()(features).dtype == torch.float32


def test_template_without_words_before_the_name() -> None:
    clip = sized()
    prompt = RepresentationPrompt(clip, CLASSES, "{} texture.", 2, 16, 2, 3)
    assert prompt.head()(prompt.encode(pictures(1, 2))).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("modified_resnet", "ModifiedResNet is not open_clip's VisionTransformer"),
        ("average_pool", "it does not pool its class token"),
        ("bidirectional", "TextTransformer of bidirectional is not"),
    ],
)
def test_towers_that_lack_something(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"RepresentationPrompt.*{re.escape(message)}.*--model.clip, or TextPrompt"):
        RepresentationPrompt(frozen(kind), CLASSES, TEMPLATE, first_block=1, last_block=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "first_block is 6 and last_block is 12, and openai_vit has 3 in the text tower and 2 in the image tower: "
         "choose both from 1 to 2"),
        ({"first_block": 2, "last_block": 1}, "first_block not above last_block"),
        ({"first_block": 0, "last_block": 2}, "first_block is 0"),
        ({"n_tokens": 0}, "n_tokens is 0; expected at least 1"),
        ({"width": 0}, "width is 0; expected at least 1"),
        ({"alpha": 1.1}, "alpha is 1.1; expected a weight from 0 to 1"),
        ({"regularisation": -1.0}, "regularisation is -1.0; expected a weight of at least 0"),
        ({"prediction": "fuse"}, "prediction is 'fuse'; expected one of auto, fused, plain"),
    ],
)  # fmt: skip
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    blocks = {} if not options else {"first_block": 1, "last_block": 2}
    with pytest.raises(ValueError, match=re.escape(message)):
        RepresentationPrompt(two_and_three_blocks(), CLASSES, TEMPLATE, **{**blocks, **options})


def test_a_checkpoint_names_its_options() -> None:
    config = small(alpha=0.6).config
    assert config["class_path"] == "metatpt.prompts.RepresentationPrompt"
    assert config["init_args"] == {
        "n_tokens": 2, "width": 16, "first_block": 2, "last_block": 3, "alpha": 0.6, "regularisation": 0.5,
        "prediction": "auto",
    }  # fmt: skip
