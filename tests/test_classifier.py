"""Classification without a Trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batches import NAMES
from helpers.models import save_folder
from PIL import Image

from metatpt import Classifier
from metatpt.images import UnreadableImageError


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
