"""Classification without a Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.batches import NAMES
from helpers.models import save_folder
from PIL import Image

from metatpt import Classifier
from metatpt.images import UnreadableImageError
from metatpt.modules import ZeroShotModule
from metatpt.prompts import TextPrompt
from metatpt.types import Adaptation, Batch


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = []
    for number, size in enumerate([(6, 4), (4, 6), (5, 5), (9, 4)]):
        picture = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        files.append(tmp_path / f"{number}.png")
        picture.resize((size[1] * 20, size[0] * 20), Image.Resampling.BICUBIC).save(files[-1])
    return files


@pytest.mark.parametrize("method", ["zero_shot", "view_average", "tpt", "metatpt"])
def test_paths_pictures_and_tensors_are_the_same(tiny_clip_folder: Path, pictures: list[Path], method: str) -> None:
    options = {} if method == "zero_shot" else {"n_views": 4}
    classify = Classifier(NAMES, clip=str(tiny_clip_folder), method=method, **options)
    by_path = classify(pictures)
    assert by_path.probabilities.shape == (4, len(NAMES))
    torch.testing.assert_close(by_path.probabilities.sum(1), torch.ones(4))
    opened = [Image.open(file) for file in pictures]
    tensors = [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in opened]
    for other in (map(str, pictures), opened, tensors):
        torch.testing.assert_close(classify(list(other)).probabilities, by_path.probabilities)
    one = classify(pictures[0])
    torch.testing.assert_close(one.probabilities, by_path.probabilities[:1], atol=1e-5, rtol=0)
    assert one.labels == [NAMES[int(one.probabilities.argmax())]]
    assert (by_path.averaged_probabilities is None) == (method == "zero_shot")


def test_views_on_request(tiny_clip_folder: Path, pictures: list[Path]) -> None:
    classify = Classifier(NAMES, clip=str(tiny_clip_folder), n_views=10, selection=0.5)
    assert classify(pictures).views is None
    views = classify(pictures, return_views=True).views
    assert views is not None
    assert views.shape == (4, 5, 3, 32, 32)
    assert 0 <= views.min() <= views.max() <= 1
    with pytest.raises(ValueError, match="ZeroShotModule has no views"):
        Classifier(NAMES, clip=str(tiny_clip_folder), method="zero_shot")(pictures, return_views=True)


def test_residual_tower_does_not_depend_on_the_batch(tmp_path: Path, pictures: list[Path]) -> None:
    # open_clip hands out models in training mode, where batch statistics mix the pictures.
    folder = save_folder("modified_resnet", tmp_path / "clip")
    together = Classifier(NAMES, clip=str(folder), method="zero_shot")(pictures * 2)
    alone = Classifier(NAMES, clip=str(folder), method="zero_shot", batch_size=1)(pictures * 2)
    torch.testing.assert_close(together.probabilities, alone.probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bidirectional", "openai_vit"])
def test_a_bias_on_the_logits_changes_no_probability(tmp_path: Path, pictures: list[Path], kind: str) -> None:
    folder = save_folder(kind, tmp_path / "clip")
    names = ["cat", "ox"]
    classify = Classifier(names, clip=str(folder), method="zero_shot")
    clip = classify.module.clip
    found = classify(pictures).probabilities
    model = clip.model.double()  # the reference in double precision
    images = torch.stack([classify._batch([file], 0).image[0] for file in pictures]).double()
    mean, std = (
        torch.tensor(each, dtype=torch.float64).view(3, 1, 1)
        for each in (clip.preprocessing.mean, clip.preprocessing.std)
    )
    logits, _ = model.get_logits((images - mean) / std, clip.tokenizer([f"a photo of a {name}." for name in names]))
    torch.testing.assert_close(found, logits.softmax(-1).float(), atol=1e-6, rtol=0)


def test_equal_prompts_tie_to_the_last_bit(tiny_clip_folder: Path, pictures: list[Path]) -> None:
    # "hot_dog" and "hot dog" are two names with one prompt, as ImageNet's two missiles are.
    names = ["cat", "hot_dog", "ox", "hot dog"]
    prediction = Classifier(names, clip=str(tiny_clip_folder), n_views=4)(pictures)
    assert torch.equal(prediction.probabilities[:, 1], prediction.probabilities[:, 3])
    assert "hot dog" not in prediction.labels


def test_bad_input_is_named(tiny_clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'"cat".*0 and 2'):
        Classifier(["cat", "dog", "cat"], clip=str(tiny_clip_folder))
    with pytest.raises(ValueError, match="method is 'metatp'.*did you mean 'metatpt'"):
        Classifier(["cat"], clip=str(tiny_clip_folder), method="metatp")
    classify = Classifier(["cat", "dog"], clip=str(tiny_clip_folder), method="zero_shot")
    with pytest.raises(ValueError, match="no pictures"):
        classify([])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"picture 0 \(.*broken.jpg\) cannot be read"):
        classify(broken)


def test_one_class_only(tiny_clip_folder: Path, pictures: list[Path]) -> None:
    prediction = Classifier(["cat"], clip=str(tiny_clip_folder), n_views=4)(pictures)
    torch.testing.assert_close(prediction.probabilities, torch.ones(4, 1))


def test_class_names_are_read_as_on_the_command_line(tiny_clip_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("cat\n golden retriever \n\n")

    def names(given: Any) -> list[str]:
        return Classifier(given, clip=str(tiny_clip_folder), method="zero_shot").module.class_names

    assert names("cat, dog") == ["cat", "dog"]
    assert names([" cat", "dog\n"]) == ["cat", "dog"]
    assert names(name for name in ("cat", "dog")) == ["cat", "dog"]
    assert names(str(file)) == ["cat", "golden retriever"]
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        names("nowhere.txt")
    with pytest.raises(ValueError, match="Class name 1 is True, not text"):
        names(["cat", True])
    with pytest.raises(ValueError, match='"cat" stands twice'):
        names(["cat", "cat "])
    with pytest.raises(ValueError, match="Class name 1 .* is empty"):
        names(["cat", " "])
    for given in (None, 3, {"cat": 1}, {"cat"}):
        with pytest.raises(TypeError, match=f"class_names is {given}; expected"):
            names(given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected a number"),
        ({"batch_size": 1.5}, TypeError, "batch_size is 1.5; expected a whole number"),
        ({"method": None}, TypeError, "method is None; expected zero_shot, .* or a class on AdaptationModule"),
        ({"method": dict}, TypeError, "method is <class 'dict'>"),
        ({"nviews": 3}, TypeError, "MetaTPTModule has no option 'nviews'; did you mean n_views?"),
        ({"outer_step": 3}, TypeError, "no option 'outer_step'; did you mean outer_steps?"),
        ({"memori": 3}, TypeError, "no option 'memori'; did you mean memory?"),
        ({"method": "zero_shot", "xyz": 3}, TypeError, "ZeroShotModule has no option 'xyz'; it has template, memory"),
    ],
)
def test_bad_options_are_named(
    tiny_clip_folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Classifier(["cat", "dog"], clip=str(tiny_clip_folder), **options)


def test_what_is_no_picture_is_named(tiny_clip_folder: Path, pictures: list[Path]) -> None:
    classify = Classifier(["cat", "dog"], clip=str(tiny_clip_folder), method="zero_shot")
    given: Any
    for given, message in (
        (None, "images is None"),
        (3, "images is 3"),
        ({"a.png": 1}, "images is {'a.png': 1}"),
        (b"a.png", "images is b'a.png'"),
        ([pictures[0], None], "picture 1 is None"),
        ([np.zeros((2, 2, 3))], r"picture 0 is array.*\(ndarray\)"),
    ):
        with pytest.raises(TypeError, match=f"{message}.*expected a path"):
            classify(given)
    for shape in ([], [4], [8, 8], [1, 1, 3, 8, 8]):
        with pytest.raises(UnreadableImageError, match="picture 0 cannot be read: expected a tensor of shape"):
            classify(torch.zeros(shape))


class Blind(ZeroShotModule):
    """Its second picture has no finite zero-shot prediction."""

    def adapt(self, batch: Batch) -> Adaptation:
        result = super().adapt(batch)
        zero_shot = result.zero_shot_log_probs.clone()
        zero_shot[batch.index == 1] = torch.nan
        return Adaptation(result.log_probs, zero_shot)


def test_skipped_pictures_are_told(tiny_clip_folder: Path, pictures: list[Path]) -> None:
    prediction = Classifier(NAMES, clip=str(tiny_clip_folder), method=Blind)(pictures)
    assert prediction.skipped == [1]
    assert prediction.kept_zero_shot == []
    assert prediction.probabilities.isnan().any(1).tolist() == [False, True, False, False]
    assert prediction.probabilities[1].isnan().all()
    assert [bool(label) for label in prediction.labels] == [True, False, True, True]
    assert Classifier(NAMES, clip=str(tiny_clip_folder), method="zero_shot")(pictures).skipped == []


def test_a_method_that_carries_over_takes_one_picture_at_a_time(tiny_clip_folder: Path, pictures: list[Path]) -> None:
    options: dict[str, Any] = {"clip": str(tiny_clip_folder), "n_views": 4, "augmentation": "online"}
    found = Classifier(NAMES, batch_size=8, **options)(pictures)
    assert torch.equal(found.probabilities, Classifier(NAMES, batch_size=1, **options)(pictures).probabilities)


def test_starts_from_a_checkpoint(tmp_path: Path) -> None:
    names = ["red circle", "blue square"]
    module = ZeroShotModule(class_names=names[::-1], prompt=partial(TextPrompt, n_context=2))
    with torch.no_grad():
        module.prompt.tuned["context"] += 1
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "learned.ckpt")
    classify = Classifier(names, method="zero_shot", checkpoint=tmp_path / "learned.ckpt")
    picture = Image.new("RGB", (64, 64), "red")
    expected = module.process(classify._batch([picture], 0)).log_probs.exp().flip(1)
    torch.testing.assert_close(classify(picture).probabilities, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="made for builtin"):
        Classifier(
            names,
            method="zero_shot",
            checkpoint=tmp_path / "learned.ckpt",
            clip=str(save_folder("openai_vit", tmp_path)),
        )
