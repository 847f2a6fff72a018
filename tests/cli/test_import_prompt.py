"""Official checkpoints become ours: what is found in them, what they predict then, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import GOLDEN, NAMES, fixture, originals, save_golden
from helpers.models import save_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from metatpt.cli.errors import RunError, UsageError
from metatpt.cli.import_prompt import import_prompt
from metatpt.modules import ZeroShotModule
from metatpt.prompts import as_factory
from metatpt.prompts.official import read_official, recognise

CHECKPOINTS = GOLDEN / "checkpoints"
CLASSES = ",".join(NAMES)
SHARED = ["coop_ctx4_end", "cocoop"]
METHODS = {
    "coop_ctx4_end": ("coop_prompt_learner", "ctx4_end/logits"),
    "cocoop": ("cocoop_forward", "logits"),
    "maple": ("maple_forward", "logits"),
    "mmrl": ("mmrl_forward", "layers23/logits_fusion"),
    "upt_official": ("upt_official", "logits"),
    "upt_mvlpt": ("upt_mvlpt", "logits"),
    "vpt": ("vpt_deep", "depth3/logits"),
}


def official(name: str) -> Path:
    return CHECKPOINTS / name / "model-best.pth.tar"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


Saved = Callable[[dict[str, Any] | Any], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    def save(content: Any) -> Path:
        file = tmp_path / "model-best.pth.tar"
        torch.save(content, file)
        return file

    return save


def run(file: Path, clip: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes."""
    assert import_prompt([str(file), "--to", "prompt.ckpt", "--clip", str(clip), *arguments]) == 0
    assert [each.name for each in Path.cwd().iterdir()] == ["prompt.ckpt"]
    content: dict[str, Any] = torch.load("prompt.ckpt", weights_only=True)
    return content


def load(checkpoint: dict[str, Any], clip: Path, names: list[str] = NAMES) -> ZeroShotModule:
    options = checkpoint["hyper_parameters"]
    assert options["clip"] == str(clip)
    module = ZeroShotModule(str(clip), None, options["template"], names, prompt=as_factory(options["prompt"]))
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_official_logits(name: str, clip: Path) -> None:
    module = load(run(official(name), clip, "--class_names", CLASSES), clip)
    file, key = METHODS[name]
    with torch.no_grad():
        logits = module.prompt.head()(module.prompt.encode(originals()))[:, 0]
    torch.testing.assert_close(logits, fixture(file)[key], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
@pytest.mark.parametrize("name", SHARED)
def test_lightning_loads_it(name: str, clip: Path) -> None:
    checkpoint = run(official(name), clip, "--class_names", CLASSES)
    prompt = as_factory(checkpoint["hyper_parameters"]["prompt"])
    module = ZeroShotModule.load_from_checkpoint("prompt.ckpt", prompt=prompt, weights_only=True)
    assert module.class_names == NAMES
    assert torch.equal(module.prompt.tuned["context"], read_official(official(name))["ctx"])


LAYOUTS = {
    "coop_ctx4_end": 'start, 4 learned vectors, the name, ".", end',
    "cocoop": 'start, 4 learned vectors, the name, ".", end',
    "maple": 'start, 2 learned vectors, the fixed words "of a", the name, ".", end',
    "mmrl": 'start, the fixed words "a photo of a", the name, ".", end',
    "upt_official": 'start, 4 learned vectors, the name, ".", end',
    "upt_mvlpt": 'start, 2 learned vectors, the name, 2 learned vectors, ".", end',
    "vpt": 'start, the fixed words "a photo of a", the name, ".", end',
}
FOUND = {
    "coop_ctx4_end": ("CoOp", {"n_context": 4, "init": "random"}),
    "cocoop": ("CoCoOp", {"n_context": 4, "init": "random"}),
    "maple": ("MaPLe", {"n_context": 2, "depth": 3}),
    "mmrl": ("MMRL", {"n_tokens": 5, "width": 32}),
    "upt_official": ("UPT", {"variant": "upt", "mixing": "token", "n_context": 4}),
    "upt_mvlpt": (
        "UPT of MVLPT", {"variant": "mvlpt", "mixing": "token", "n_context": 4, "width": 64, "depth": 3}
    ),
    "vpt": ("VPT", {"n_visual": 4, "depth": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_what_is_found(name: str) -> None:
    state = read_official(official(name))
    found = recognise(state)
    assert (found.method, found.options) == FOUND[name]
    assert found.layout == LAYOUTS[name]
    numbers = sum(value.numel() for key, value in state.items() if "token_" not in key)
    assert sum(value.numel() for value in found.parameters.values()) == numbers


@pytest.mark.parametrize("name", ["maple", "mmrl", "vpt"])
def test_the_frozen_clip_of_a_full_file_is_left_out(name: str) -> None:
    keys = json.loads((CHECKPOINTS / name / "official_full_key_list.json").read_text())
    keys = [key if isinstance(key, str) else key[0] for key in keys]
    full = {key: torch.zeros(1) for key in keys} | read_official(official(name))
    assert len(full) > 70
    found, alone = recognise(full), recognise(read_official(official(name)))
    assert found.options == alone.options
    assert found.parameters.keys() == alone.parameters.keys()
    assert "weights of the frozen CLIP" in found.ignored[-1]


def test_what_is_said(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run(official("coop_ctx4_end"), clip, "--class_names", "cat,dog")
    out = capsys.readouterr().out
    assert 'Layout: start, 4 learned vectors, the name, ".", end' in out
    assert "Found: CoOp; width 128" in out
    assert "Prompt: metatpt.prompts.TextPrompt (n_context 4, init random" in out
    assert "Ignored: token_prefix, token_suffix" in out
    assert "trained on 12 classes, and --class_names has 2" in out
    assert "class_names" not in checkpoint["hyper_parameters"]
    assert load(checkpoint, clip, ["cat", "dog"]).prompt.column.tolist() == [0, 1]


def test_without_class_names(clip: Path) -> None:
    checkpoint = run(official("cocoop"), clip)
    assert set(checkpoint["hyper_parameters"]) == {"clip", "pretrained", "template", "prompt"}
    assert set(checkpoint) >= {"clip", "state_dict", "pytorch-lightning_version"}
    assert all(key.startswith("prompt.tuned.") for key in checkpoint["state_dict"])
    load(checkpoint, clip, ["ox"])


def test_a_context_per_class_belongs_to_its_classes(clip: Path, saved: Saved) -> None:
    context = fixture("coop_prompt_learner")["ctx4_csc_end/ctx"]
    file = saved({"state_dict": {"ctx": context}})
    with pytest.raises(RunError, match="needs the names of the 12 classes that it was trained on.*--class_names"):
        run(file, clip)
    with pytest.raises(RunError, match="trained on 12 classes, and --class_names has 2"):
        run(file, clip, "--class_names", "cat,dog")
    checkpoint = run(file, clip, "--class_names", CLASSES)
    module = load(checkpoint, clip)
    with torch.no_grad():
        logits = module.prompt.head()(module.prompt.encode(originals()))[:, 0]
    torch.testing.assert_close(logits, fixture("coop_prompt_learner")["ctx4_csc_end/logits"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="class 0 was 'golden retriever', and is 'wall clock' here"):
        load(checkpoint, clip, NAMES[::-1])


@pytest.mark.parametrize("position", ["middle", "front"])
def test_the_place_of_the_name_is_given(position: str, clip: Path) -> None:
    module = load(run(official("coop_ctx4_end"), clip, "--position", position), clip)
    with torch.no_grad():
        logits = module.prompt.head()(module.prompt.encode(originals()))[:, 0]
    expected = fixture("coop_prompt_learner")[f"ctx4_{position}/logits"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def changed(name: str, **tensors: Tensor | None) -> dict[str, Any]:
    """A checkpoint with other tensors, or without some; `__` in a name stands for a dot."""
    state: dict[str, Tensor | None] = {**read_official(official(name))}
    state |= {key.replace("__", "."): value for key, value in tensors.items()}
    return {"state_dict": {key: value for key, value in state.items() if value is not None}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            partial(changed, "coop_ctx4_end", ctx_2=torch.ones(1)),
            "looks like CoOp's, but has keys .* not known.*: ctx_2",
        ),
        (partial(changed, "vpt", image_encoder__adapter=torch.ones(1)), "VPT's, but has keys.*image_encoder.adapter"),
        (partial(changed, "cocoop", meta_net__linear2__bias=None), "the file lacks meta_net.linear2.bias"),
        (partial(changed, "maple", prompt_learner__proj__weight=None), "the file lacks prompt_learner.proj.weight"),
        (partial(changed, "coop_ctx4_end", ctx=torch.ones(4)), r"ctx has shape \[4\]; expected 2 or 3 dimensions"),
        (
            partial(changed, "coop_ctx4_end", ctx=torch.ones(4, 128) / 0),
            "ctx of type torch.float32 does not hold finite",
        ),
        (partial(changed, "upt_official", uni_ctx=torch.ones(1, 7, 128)), r"uni_ctx has shape \[1, 7, 128\]"),
        (lambda: {"state_dict": {"weight": torch.ones(1)}}, "of no method that is known.*found weight"),
        (lambda: {"model": {}}, "expected the dictionary with a state_dict .*found a dictionary with model"),
        (lambda: [1], "found an object of type list"),
        (lambda: {"state_dict": {"ctx": "words"}}, "ctx in its state_dict is of type str; expected tensors"),
        (
            partial(changed, "coop_ctx4_end", ctx=torch.ones(4, 512)),
            r"context: width 128 expected, 512 found .*another CLIP.*--clip",
        ),
        (partial(changed, "coop_ctx4_end", ctx=torch.ones(80, 128)), "80 context vectors before it alone fills"),
    ],
)
def test_what_does_not_fit_is_refused(content: Callable[[], Any], message: str, clip: Path, saved: Saved) -> None:
    with pytest.raises(RunError, match=message):
        run(saved(content()), clip)
    assert list(Path.cwd().iterdir()) == []


class Code:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("marker", "w")


def test_files_with_code_and_broken_ones(clip: Path, saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match="holds more than tensors and plain values.*may run code.*expected the dictionary"
    ):
        run(saved({"state_dict": {"ctx": torch.ones(4, 128)}, "epoch": Code()}), clip)
    whole = official("coop_ctx4_end").read_bytes()
    broken = tmp_path / "broken.tar"
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint", pickle.dumps(Code())[:20]):
        broken.write_bytes(content)
        with pytest.raises(
            RunError, match=r"broken.tar (is no whole file|is no file|holds more).*expected the dictionary"
        ):
            run(broken, clip)
    with pytest.raises(RunError, match="there is no file .*nowhere.tar"):
        run(tmp_path / "nowhere.tar", clip)
    assert list(Path.cwd().iterdir()) == []


def test_another_clip_is_named(tmp_path: Path) -> None:
    other = save_folder("openai_vit", tmp_path / "other")
    with pytest.raises(RunError, match="context: width 32 expected, 128 found"):
        run(official("coop_ctx4_end"), other)


def test_nothing_is_half_written(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(checkpoint: Any, stream: Any) -> None:
        stream.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="--to prompt.ckpt: the checkpoint cannot be written: PytorchStreamWriter"):
        run(official("coop_ctx4_end"), clip)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which file"),
        (["a.tar"], "Where to"),
        (["a.tar", "--to", "b.ckpt"], "Which CLIP.*ViT-B-16-quickgelu"),
        (["a.tar", "--to", "b.ckpt", "--clip", "builtin", "--templte", "x"], "--templte: there is no such.*--template"),
        (["a.tar", "--to", "b.ckpt", "--clip", "builtin", "--position", "back"], "position.*'back'"),
        (["a.tar", "--to", "b.ckpt", "--clip", "builtin", "--class_names", "nowhere.txt"], "--class_names: .*nowhere"),
        (["a.tar", "--to", ".", "--clip", "builtin"], "there is such a file already"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        import_prompt(arguments)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("cocoop", ["--position", "front"], "an option of CoOp's files; this is CoCoOp"),
        ("cocoop", ["--first_block", "2"], "an option of MMRL's files; this is CoCoOp"),
    ],
)
def test_options_of_other_methods(name: str, option: list[str], message: str, clip: Path) -> None:
    with pytest.raises(RunError, match=message):
        run(official(name), clip, *option)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert import_prompt(["--help"]) == 0
    assert "usage: metatpt import-prompt FILE --to FILE" in capsys.readouterr().out


def test_another_clip_of_the_same_sizes_is_refused(clip: Path, tmp_path: Path) -> None:
    """Its embeddings differ, which most files hold some of."""
    other = tmp_path / "other"
    shutil.copytree(clip, other)
    weights = load_file(other / "open_clip_model.safetensors")
    weights["token_embedding.weight"] = weights["token_embedding.weight"].flip(1).contiguous()
    save_file(weights, other / "open_clip_model.safetensors")
    for name in ("coop_ctx4_end", "maple"):
        with pytest.raises(RunError, match="another CLIP of the same sizes"):
            import_prompt([str(official(name)), "--to", "prompt.ckpt", "--clip", str(other)])
        assert not Path("prompt.ckpt").exists()
