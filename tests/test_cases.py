"""Cases that go through several parts: from a picture's file, or a list of names, to predictions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers.batches import NAMES
from helpers.command_line import CommandLine, rows, write_pictures
from PIL import Image, ImageOps

from metatpt import Classifier
from metatpt.images import collate, to_sample
from metatpt.modules import AdaptationModule, MetaTPTModule, TPTModule, ViewAverageModule

ORIENTATION = 0x0112
TURNS = {  # what undoes the orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture
def metatpt(
    capsys: pytest.CaptureFixture[str], tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return CommandLine(capsys, tiny_clip_folder, tmp_path)


def scene(width: int = 60, height: int = 40) -> Image.Image:
    """A smooth picture without symmetry."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def save_tagged(picture: Image.Image, path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def probabilities(run: Path) -> list[dict[str, str]]:
    """What a run predicted, without names of files and times."""
    return [{key: value for key, value in row.items() if key not in ("path", "seconds")} for row in rows(run)]


# Equal prompts (ImageNet's)


@pytest.mark.parametrize("method", [TPTModule, MetaTPTModule])
def test_imagenets_equal_names_tie_to_the_last_bit(
    tiny_clip_folder: Path, method: type[AdaptationModule], tmp_path: Path
) -> None:
    names = list(open_clip.IMAGENET_CLASSNAMES)
    assert names[657] == names[744]
    assert names[836] == names[837]
    module = method(clip=str(tiny_clip_folder), class_names=names, n_views=2, selection=1.0, outer_steps=1)
    module.seed = 0
    module.start_batch(carry=False)
    result = module.process(collate([to_sample(scene(), module.preprocessing, index=0)]))
    assert not torch.equal(result.log_probs, result.zero_shot_log_probs)
    for found in (result.log_probs, result.zero_shot_log_probs, result.averaged_log_probs):
        assert found is not None
        assert found.shape == (1, 1000)
        for first, second in ((657, 744), (836, 837)):
            assert found[0, first] == found[0, second]
            pair = torch.full_like(found, -torch.inf)
            pair[0, [first, second]] = found[0, [first, second]]
            assert pair.argmax(-1).item() == first


# Orientation


def test_orientations_of_one_upright_picture_predict_the_same(metatpt: CommandLine, tmp_path: Path) -> None:
    upright = scene()
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = []
    for orientation in range(1, 9):
        stored = upright.transpose(TURNS[orientation]) if orientation > 1 else upright
        path = save_tagged(stored, folder / f"{orientation}.png", orientation)  # without loss
        assert np.array_equal(ImageOps.exif_transpose(Image.open(path)), upright)
        files.append(path)
    options = ["--model", "ZeroShotModule", "--data.class_names", ",".join(NAMES), "--run", "out"]
    result = metatpt.small("predict", *options, "--data.root", folder)
    assert result.status == 0, result.err
    found = [{key: value for key, value in row.items() if key != "index"} for row in probabilities(tmp_path / "out")]
    assert len(found) == 8
    assert all(row == found[0] for row in found)
    classify = Classifier(NAMES, clip=str(metatpt.clip), method="zero_shot", device="cpu")
    for sources in (files, [Image.open(path) for path in files]):
        by_class = classify(sources).probabilities
        assert (by_class == by_class[0]).all()


def test_eight_orientations_of_a_jpeg_predict_as_the_turned_pixels(metatpt: CommandLine, tmp_path: Path) -> None:
    tagged, turned = tmp_path / "tagged", tmp_path / "turned"
    tagged.mkdir()
    turned.mkdir()
    for orientation in range(1, 9):
        path = save_tagged(scene(), tagged / f"{orientation}.jpg", orientation)
        upright = ImageOps.exif_transpose(Image.open(path))
        assert upright.size == ((40, 60) if orientation >= 5 else (60, 40))
        upright.save(turned / f"{orientation}.png", exif=b"")
    options = ["--model.n_views", 4, "--model.outer_steps", 1, "--data.class_names", ",".join(NAMES)]
    for folder in (tagged, turned):
        run = tmp_path / f"{folder.name}_run"
        result = metatpt.small("predict", *options, "--data.root", folder, "--run", run)
        assert result.status == 0, result.err
    found = probabilities(tmp_path / "tagged_run")
    assert found == probabilities(tmp_path / "turned_run")
    assert len({tuple(sorted(row.items())) for row in found}) == 8
    classify = Classifier(NAMES, clip=str(metatpt.clip), device="cpu", n_views=4, outer_steps=1)
    files = sorted(tagged.iterdir())
    expected = classify(sorted(turned.iterdir())).probabilities
    assert torch.equal(classify(files).probabilities, expected)
    assert torch.equal(classify([Image.open(path) for path in files]).probabilities, expected)


# Transparency


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_hidden_colours_change_no_prediction(tiny_clip_folder: Path, tmp_path: Path, mode: str) -> None:
    files = []
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        picture = Image.new("RGBA", (60, 40), (*colour, 0))
        picture.paste((0, 0, 255, 255), (20, 0, 60, 30))
        if mode == "P":
            picture = Image.new("P", (60, 40), 0)
            picture.putpalette([*colour, 0, 0, 255])
            picture.paste(1, (20, 0, 60, 30))
        path = tmp_path / f"{name}.png"
        picture.save(path, **({"transparency": 0} if mode == "P" else {}))
        assert Image.open(path).mode == mode
        files.append(path)
    classify = Classifier(NAMES, clip=str(tiny_clip_folder), device="cpu", n_views=4, outer_steps=1)
    red, green = (classify(path) for path in files)
    assert torch.equal(red.probabilities, green.probabilities)
    assert torch.equal(red.zero_shot_probabilities, green.zero_shot_probabilities)
    opened = [classify(Image.open(path)).probabilities for path in files]
    assert torch.equal(opened[0], red.probabilities)
    assert torch.equal(opened[1], red.probabilities)


# Few views


@pytest.mark.parametrize("n_views", range(1, 10))
@pytest.mark.parametrize("method", [ViewAverageModule, TPTModule, MetaTPTModule])
def test_few_views(tiny_clip_folder: Path, method: type[AdaptationModule], n_views: int) -> None:
    options: dict[str, Any] = {} if method is ViewAverageModule else {"outer_steps": 1}
    classify = Classifier(
        NAMES, clip=str(tiny_clip_folder), device="cpu", method=method, n_views=n_views, selection=0.1, **options
    )
    prediction = classify([scene(), scene(30, 50)], return_views=True)
    assert prediction.kept_zero_shot == prediction.skipped == []
    torch.testing.assert_close(prediction.probabilities.sum(1), torch.ones(2))
    assert prediction.views is not None
    assert prediction.views.shape == (2, 1, 3, 32, 32)  # a tenth, and at least one
    assert prediction.averaged_probabilities is not None
    if n_views == 1:
        torch.testing.assert_close(prediction.averaged_probabilities, prediction.zero_shot_probabilities)


# No labels


def test_a_flat_folder_has_no_accuracy(tiny_clip_folder: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "flat", n=3)
    command = [sys.executable, "-m", "metatpt", "test", "--model.clip", str(tiny_clip_folder), "--model.n_views", "2"]
    command += ["--data", "FolderDataModule", "--data.root", str(folder), "--data.class_names", "cat,dog"]
    command += ["--trainer.accelerator", "cpu", "--run", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "no labels" in result.stdout
    assert "accuracy" not in result.stdout
    said = result.stderr.splitlines()
    assert [line.split(":")[0] for line in said] == ["config", str(folder)], result.stderr
    assert [row["label"] for row in rows(tmp_path / "out")] == [""] * 3
