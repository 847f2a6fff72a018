"""Files of weights, checkpoints, data and configs that carry code: they are refused, and none of it runs."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import open_clip
import pytest
import torch
from helpers.command_line import CommandLine, write_pictures
from helpers.fake_data import cifar, coop, shards
from helpers.models import CONFIGS, save_folder
from PIL import EpsImagePlugin, Image

from metatpt import Classifier
from metatpt.callbacks import ResetPrompts
from metatpt.clip import load_clip
from metatpt.datamodules import CIFAR10CDataModule, CIFAR10DataModule, FolderDataModule, WebDatasetDataModule
from metatpt.images import UnreadableImageError, decode
from metatpt.modules import TPTModule
from metatpt.types import Preprocessing

NAME = "tiny-without-code"


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.fixture
def code(tmp_path: Path) -> Iterator[Code]:
    """Something to hide in a file; that it has run is a failure of the test."""
    code = Code(tmp_path / "marker")
    pickle.loads(pickle.dumps(code)).close()
    assert code.marker.exists()
    code.marker.unlink()
    yield code
    assert not code.marker.exists()


@pytest.fixture
def metatpt(
    capsys: pytest.CaptureFixture[str], tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """The command line on two pictures; the working folder is empty."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return CommandLine(capsys, tiny_clip_folder, write_pictures(tmp_path / "pets", "cat", "dog", n=1))


def refused(metatpt: CommandLine, pattern: str, *arguments: object, status: int = 1) -> None:
    """A command ends before anything is made, and says why."""
    result = metatpt(*arguments)
    assert result.status == status, result.err
    assert "Traceback" not in result.err
    assert pattern in result.message
    assert list(Path.cwd().iterdir()) == []


def write_zip(content: Any, file: Path) -> None:
    torch.save(content, file)


def write_legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def write_pickle(content: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(content))


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle])


# Weights


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small architecture that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIGS["openai_vit"]))
    (folder / f"{NAME}-timm.json").write_text(json.dumps(CONFIGS["timm"]))
    open_clip.add_model_config(folder)
    return NAME


@pytest.fixture(autouse=True)
def preprocessing(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag, from which a file takes its preprocessing."""
    for name in (named, f"{named}-timm"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"one": {"url": "", "hf_hub": ""}})


@WRITERS
@pytest.mark.parametrize("ending", ["pt", "bin"])
def test_file_of_weights(
    metatpt: CommandLine, code: Code, named: str, tmp_path: Path, write: Callable[..., None], ending: str
) -> None:
    file = tmp_path / f"weights.{ending}"
    write({"visual.proj": code}, file)
    message = f"{file} holds more than tensors and is not loaded, since that may run code"
    refused(metatpt, message, "test", "--model.clip", named, "--model.pretrained", file)
    with pytest.raises(ValueError, match=message):
        load_clip(named, str(file))
    with pytest.raises(ValueError, match=message):
        Classifier(["cat", "dog"], clip=named, pretrained=str(file))


@WRITERS
@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "any.bin"])
def test_folder_of_a_model(
    metatpt: CommandLine, code: Code, tmp_path: Path, write: Callable[..., None], name: str
) -> None:
    folder = save_folder("openai_vit", tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    write({"visual.proj": code}, folder / name)
    message = f"{folder} holds more than tensors and is not loaded, since that may run code"
    refused(metatpt, message, "test", "--model.clip", folder)
    with pytest.raises(ValueError, match=message):
        Classifier(["cat", "dog"], clip=str(folder))


def test_torchscript_archive(metatpt: CommandLine, named: str, tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    file = tmp_path / "weights.pt"
    torch.jit.script(Module()).save(str(file))
    refused(
        metatpt, "TorchScript archive, which can hold code", "test", "--model.clip", named, "--model.pretrained", file
    )


def test_numpy_weights(code: Code, named: str, tmp_path: Path) -> None:
    held = np.array([code], dtype=object)
    np.savez(tmp_path / "weights.npz", **{"img/embedding/kernel": held})
    write_pickle(code, tmp_path / "weights.npy")
    for file in (tmp_path / "weights.npz", tmp_path / "weights.npy"):
        with pytest.raises(ValueError, match=f"{file} holds more than tensors"):
            load_clip(f"{named}-timm", str(file))


@pytest.mark.parametrize("told", [True, False])
def test_tokenizer_with_code_of_its_own(
    metatpt: CommandLine, code: Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = save_folder("hugging_face", tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "its own"
    if told:
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (folder / "own.py").write_text(f"open({str(code.marker)!r}, 'w')\nclass Own: ...\n")
    refused(metatpt, "is code of its own, which is not run", "test", "--model.clip", folder)


# Checkpoints


@WRITERS
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "callbacks", "all of it"])
def test_checkpoint(
    metatpt: CommandLine, code: Code, tmp_path: Path, write: Callable[..., None], place: str, tiny_clip_folder: Path
) -> None:
    module = TPTModule(clip=str(tiny_clip_folder), class_names=["cat", "dog"], n_views=2)
    before = module.prompt.tuned["context"].detach().clone()
    content: dict[str, Any] = {"state_dict": {"prompt.tuned.context": before + 1}, "hyper_parameters": {}}
    content |= {"pytorch-lightning_version": lightning.__version__, "callbacks": {}, "epoch": 0, "global_step": 0}
    if place != "all of it":
        content[place] = {**content[place], "one": code}
    file = tmp_path / "one.ckpt"
    write(code if place == "all of it" else content, file)
    message = f"--ckpt_path {file}: not a checkpoint that loads without running code: it holds more than tensors"
    refused(metatpt, message, "test", *metatpt.small_options, "--ckpt_path", file, status=2)
    trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, inference_mode=False, accelerator="cpu", callbacks=[ResetPrompts()]
    )
    data = FolderDataModule(metatpt.pictures)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.test(module, datamodule=data, ckpt_path=file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TPTModule.load_from_checkpoint(file)
    assert torch.equal(module.prompt.tuned["context"], before)


def test_checkpoint_that_names_a_function(metatpt: CommandLine, code: Code, tmp_path: Path) -> None:
    """Lightning calls what a checkpoint calls its instantiator."""
    options = {"_instantiator": "os.system", "_class_path": f"touch {code.marker}"}
    content = {"state_dict": {}, "hyper_parameters": options, "pytorch-lightning_version": lightning.__version__}
    write_zip(content, tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="blocked to prevent arbitrary code execution"):
        TPTModule.load_from_checkpoint(tmp_path / "one.ckpt")
    result = metatpt.small("test", "--ckpt_path", tmp_path / "one.ckpt")
    assert result.status == 2
    assert "no checkpoint of metatpt" in result.message
    write_zip({**content, "hyper_parameters": ["os.system"]}, tmp_path / "one.ckpt")
    assert "its hyper_parameters are no options" in metatpt.small("test", "--ckpt_path", tmp_path / "one.ckpt").message


# Data


def set_up(datamodule: Any) -> Any:
    datamodule.preprocessing = Preprocessing(32, (0,) * 3, (1,) * 3)
    datamodule.setup("test")
    return datamodule


@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
def test_cifars_pickles(code: Code, tmp_path: Path, name: str) -> None:
    cifar.write_cifar10(tmp_path)
    assert len(set_up(CIFAR10DataModule(tmp_path, partial=True)).pictures("test")) == 20
    file = tmp_path / "cifar-10-batches-py" / name
    write_pickle({**pickle.loads(file.read_bytes()), "more": code}, file)
    with pytest.raises(ValueError, match=rf"{name}: .*calls io.open. Another may run code, and is not read"):
        set_up(CIFAR10DataModule(tmp_path, partial=True))
    with pytest.raises(ValueError, match="their checksums differ"):
        set_up(CIFAR10DataModule(tmp_path))


@pytest.mark.parametrize("name", ["gaussian_noise", "labels"])
def test_numpy_arrays_of_corrupted_cifar(code: Code, tmp_path: Path, name: str) -> None:
    cifar.write_cifar10_c(tmp_path)
    file = tmp_path / "CIFAR-10-C" / f"{name}.npy"
    np.save(file, np.full(100, code, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=rf"{name}.npy: expected an array .* Python objects in dtype"):
        set_up(CIFAR10CDataModule(tmp_path, partial=True))
    write_pickle(code, file)
    with pytest.raises(ValueError, match=rf"{name}.npy: expected an array .* magic string is not correct"):
        set_up(CIFAR10CDataModule(tmp_path, partial=True))
    np.savez(tmp_path / "more.npz", np.full(100, code, dtype=object))
    (tmp_path / "more.npz").replace(file)
    with pytest.raises(ValueError, match=rf"{name}.npy: expected an array .* magic string is not correct"):
        set_up(CIFAR10CDataModule(tmp_path, partial=True))


def test_matlab_files(metatpt: CommandLine, code: Code, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    clip = ("test", "--model.clip", metatpt.clip)
    coop.write_stanford_cars(tmp_path / "cars", official=True)
    write_pickle(code, tmp_path / "cars" / "stanford_cars" / "cars_test_annos_withlabels.mat")
    data = ("--data", "StanfordCarsDataModule", "--data.root", tmp_path / "cars", "--data.split", "official")
    refused(metatpt, "does not find the official split of StanfordCars", *clip, *data)
    write_pictures(tmp_path / "imagenet" / "val", n=1)
    (tmp_path / "imagenet/val/0000.png").rename(tmp_path / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    devkit = tmp_path / "imagenet" / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    write_pickle(code, devkit / "meta.mat")
    data = ("--data", "ImageNetDataModule", "--data.root", tmp_path / "imagenet", "--data.partial", "true")
    refused(metatpt, "meta.mat is not the devkit's", *clip, *data)


def test_shards(code: Code, tmp_path: Path) -> None:
    held = pickle.dumps(code)
    beside = {"png": shards.picture(0), "pyd": held, "pickle": held, "pkl": held, "pth": held}
    shards.write_shard(tmp_path / "beside.tar", [("0", beside)])
    (batch,) = set_up(WebDatasetDataModule(str(tmp_path / "beside.tar"), "cat,dog")).test_dataloader()
    assert batch.label.tolist() == [-1]  # they are no labels
    assert batch.error == [None]
    shards.write_shard(tmp_path / "label.tar", [("0", {"png": shards.picture(0), "cls": held})])
    with pytest.raises(ValueError, match=r"The label of sample label.tar/0 cannot be read"):
        set_up(WebDatasetDataModule(str(tmp_path / "label.tar"), "cat,dog"))
    shards.write_shard(tmp_path / "alone.tar", [("0", {"pyd": held})])
    with pytest.raises(ValueError, match=r"alone.tar/0 has 0 pictures"):
        set_up(WebDatasetDataModule(str(tmp_path / "alone.tar"), "cat,dog"))
    with pytest.raises(FileNotFoundError, match="No shard .*pipe:touch"):
        WebDatasetDataModule(f"pipe:touch {code.marker}", "cat,dog")


@pytest.mark.skipif(os.name != "posix", reason="the program in Ghostscript's place is a shell script")
@pytest.mark.parametrize("plain", [False, True])
def test_postscript(code: Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{code.marker}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    file = tmp_path / "picture.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n%%EndComments\nshowpage\n%%EOF\n")
    for source in (file, file.read_bytes(), Image.open(file)):
        with pytest.raises(UnreadableImageError, match="PostScript .* is not run"):
            decode(source, plain=plain)
    assert not code.marker.exists()
    with suppress(OSError):  # the program in Ghostscript's place writes no picture
        Image.open(file).load()
    code.marker.unlink()


# Configs


@pytest.mark.parametrize(
    "text",
    [
        "model: {tag}",
        "model: {{class_path: ZeroShotModule, init_args: {{template: {tag}}}}}",
        "trainer: {{callbacks: [{tag}]}}",
        "{tag}",
    ],
)
def test_config(metatpt: CommandLine, code: Code, tmp_path: Path, text: str) -> None:
    tag = f"!!python/object/apply:builtins.open [{code.marker}, w]"
    file = tmp_path / "config.yaml"
    file.write_text(text.format(tag=tag))
    message = "config.yaml, line 1: no YAML: could not determine a constructor for the tag"
    refused(metatpt, message, "test", "-c", file, status=2)


@pytest.mark.parametrize("option", ["--model", "--data", "--trainer.callbacks", "--trainer.logger"])
def test_option(metatpt: CommandLine, code: Code, option: str) -> None:
    for value in ("{{class_path: {}}}", "[{}]"):
        tag = f"!!python/object/apply:builtins.open [{code.marker}, w]"
        refused(metatpt, "", "test", option, value.format(tag), status=2)
