"""A folder with broken files among its pictures: those are named, the others are predicted as without them."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers.broken_files import REFUSED, broken_files, mix_in
from helpers.command_line import CommandLine, rows, write_pictures
from PIL import Image

from metatpt.clip import FrozenCLIP
from metatpt.images import collate, to_sample
from metatpt.modules import MetaTPTModule

CLASSES = ["cat", "dog"]
FEW_VIEWS = {"n_views": 4, "selection": 1.0, "outer_steps": 2}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures."""
    return write_pictures(tmp_path_factory.mktemp("good") / "pets", *CLASSES, n=10)


@pytest.fixture(scope="module")
def mixed(good: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The same pictures with broken files between them, and a pattern of the reason for each of these."""
    root = shutil.copytree(good, tmp_path_factory.mktemp("mixed") / "pets")
    return root, mix_in(root, CLASSES)


@pytest.fixture
def metatpt(
    capsys: pytest.CaptureFixture[str],
    tiny_clip_folder: Path,
    mixed: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> CommandLine:
    """The command line on the mixed folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return CommandLine(capsys, tiny_clip_folder, mixed[0])


def by_path(run: Path) -> dict[str, dict[str, str]]:
    return {row["path"]: row for row in rows(run)}


def settled(row: dict[str, str]) -> tuple[str, str, float, float, float]:
    """What is predicted of a picture, its index apart."""
    figures = (float(row[name]) for name in ("probability", "label_probability", "entropy"))
    return row["status"], row["prediction"], *(pytest.approx(figure, abs=1e-5) for figure in figures)


def check(run: Path, good: dict[str, dict[str, str]], reasons: dict[str, str]) -> None:
    found = by_path(run)
    assert found.keys() == good.keys() | reasons.keys()
    for path, row in good.items():
        assert settled(found[path]) == settled(row), path
    for path, reason in reasons.items():
        row = found[path]
        assert row["status"] == "skipped", path
        assert re.search(reason, row["reason"]), f"{path}: {row['reason']}"
        assert row["label"] == path.partition("/")[0]
        assert not row["prediction"] + row["probability"] + row["zero_shot_prediction"]


def decodes(content: bytes) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            Image.open(io.BytesIO(content)).load()
    except Exception:  # of many types
        return False
    return True


def test_pillow_cannot_read_the_broken_files() -> None:
    files = broken_files()
    assert len(files) >= 40
    assert len({file.kind for file in files}) >= 12
    assert [f"{file.kind}.{file.ending}" for file in files if file.kind not in REFUSED and decodes(file.content)] == []
    assert [file.content for file in broken_files(1)] != [file.content for file in files]
    assert broken_files() == files


def test_predict_names_each_broken_file_and_predicts_the_others(
    metatpt: CommandLine, good: Path, mixed: tuple[Path, dict[str, str]]
) -> None:
    method = ("--model", "ZeroShotModule")
    assert metatpt.small("predict", *method, "--data.root", good, "--run", "good").status == 0
    expected = by_path(Path("good"))
    assert {row["status"] for row in expected.values()} == {"ok"}
    for batch_size, workers in ((8, 0), (3, 2)):
        run = Path(f"mixed-{workers}")
        options = ["--data.batch_size", batch_size, "--data.num_workers", workers, "--run", run]
        result = metatpt.small("predict", *method, *options)
        assert result.status == 0, result.err
        assert "Traceback" not in result.err
        check(run, expected, mixed[1])
        assert f"20 predictions, {len(mixed[1])} skipped" in result.out
        metrics = json.loads((run / "metrics.json").read_text())
        assert (metrics["n"], metrics["n_skipped"]) == (20 + len(mixed[1]), len(mixed[1]))


@pytest.mark.parametrize("command", ["test", "validate"])
def test_test_fails_in_the_end_and_names_broken_files(
    metatpt: CommandLine, good: Path, mixed: tuple[Path, dict[str, str]], command: str
) -> None:
    method = ("--model", "ZeroShotModule")
    assert metatpt.small(command, *method, "--data.root", good, "--run", "good").status == 0
    expected, figures = by_path(Path("good")), json.loads(Path("good/metrics.json").read_text())
    listed = sorted(mixed[1])[:10]
    for option, status in (((), 1), (("--on_error", "raise"), 1), (("--on_error", "skip"), 0)):
        run = Path(f"run-{len(list(Path.cwd().iterdir()))}")
        result = metatpt.small(command, *method, *option, "--run", run)
        assert result.status == status
        assert "Traceback" not in result.err
        check(run, expected, mixed[1])
        found = json.loads((run / "metrics.json").read_text())
        assert found["n_labelled"] == 20
        assert found["accuracy"] == figures["accuracy"]
        assert found["nll"] == pytest.approx(figures["nll"], abs=1e-5)
        assert "top-1 accuracy" in result.out
        if status == 0:
            assert not result.message
            continue
        assert str(len(mixed[1])) in result.message
        for path in listed:
            assert path in result.message
            assert by_path(run)[path]["reason"] in result.message
        assert sorted(mixed[1])[10] not in result.message
        assert f"{len(mixed[1]) - 10} more" in result.message


def test_predict_fails_for_broken_files_where_it_is_told_to(metatpt: CommandLine) -> None:
    result = metatpt.small("predict", "--model", "ZeroShotModule", "--on_error", "raise")
    assert result.status == 1
    assert "With --on_error skip that is no failure" in result.message


def test_tuning_beside_broken_files_is_tuning_alone(
    metatpt: CommandLine, tiny_clip_folder: Path, good: Path, mixed: tuple[Path, dict[str, str]]
) -> None:
    """Each good picture, by itself, under the index that it has among the broken ones: its views come from that."""
    options = [text for name, value in FEW_VIEWS.items() for text in (f"--model.{name}", value)]
    result = metatpt.small("predict", "--model", "MetaTPTModule", *options, "--run", "run")
    assert result.status == 0, result.err
    module = MetaTPTModule(clip=str(tiny_clip_folder), class_names=CLASSES, **FEW_VIEWS)
    found = by_path(Path("run"))
    assert sum(row["status"] == "ok" for row in found.values()) == 20
    changed = 0
    for path in (f"{name}/{number:04}.png" for name in CLASSES for number in range(10)):
        row = found[path]
        sample = to_sample(good / path, module.preprocessing, index=int(row["index"]))
        probabilities = module.process(collate([sample])).log_probs[0].exp()
        assert float(row["probability"]) == pytest.approx(float(probabilities.max()), abs=1e-5)
        changed += abs(float(row["probability"]) - float(row["zero_shot_probability"])) > 1e-3
    assert changed > 10  # tuning does something


@pytest.mark.parametrize("method", ["ZeroShotModule", "MetaTPTModule"])
def test_a_picture_that_the_model_turns_into_nan_is_skipped_alone(
    metatpt: CommandLine, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    root = shutil.copytree(good, tmp_path / "pets")
    Image.new("RGB", (50, 40), "white").save(root / "cat" / "0003.png")
    options = ["--model", method, "--data.root", root, "--data.batch_size", 4]
    if method == "MetaTPTModule":
        options += [text for name, value in FEW_VIEWS.items() for text in (f"--model.{name}", value)]
    assert metatpt.small("predict", *options, "--run", "whole").status == 0
    encode = FrozenCLIP.encode_image

    def overflows(self: FrozenCLIP, images: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        white = (images == 1).flatten(1).all(1)
        return encode(self, images, *args, **kwargs).masked_fill(white[:, None], torch.nan)

    monkeypatch.setattr(FrozenCLIP, "encode_image", overflows)
    result = metatpt.small("predict", *options, "--run", "nan")
    assert result.status == 0, result.err
    expected = by_path(Path("whole"))
    del expected["cat/0003.png"]
    check(Path("nan"), expected, {"cat/0003.png": r"model's output is not finite \(NaN\)"})
    assert "cat/0003.png: the model's output is not finite" in result.out
