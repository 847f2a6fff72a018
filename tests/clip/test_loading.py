"""Loading: what fits is taken as it is, what does not is an error that says what to do."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.models import CONFIGS, build, save_folder
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file

from metatpt.clip import load_clip

NAME = "tiny-test"


@pytest.fixture
def registered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small architecture that open_clip knows by name, without tags."""
    folder = tmp_path_factory.mktemp("configs")
    for name, quick in ((NAME, False), (f"{NAME}-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps({**CONFIGS["openai_vit"], "quick_gelu": quick}))
    open_clip.add_model_config(folder)
    return NAME


def add_tags(monkeypatch: pytest.MonkeyPatch, name: str, tags: dict[str, dict]) -> None:
    from open_clip import pretrained

    monkeypatch.setitem(
        pretrained._PRETRAINED, name, {tag: {"url": "", "hf_hub": "", **cfg} for tag, cfg in tags.items()}
    )


def weights(folder: Path, suffix: str = ".safetensors") -> Path:
    file = folder / f"weights{suffix}"
    state = {key: value.contiguous().clone() for key, value in build("openai_vit").state_dict().items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    return file


def test_folder_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder("openai_vit", tmp_path / "clip", resize_mode="squash", interpolation="bilinear")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network"))
    clip = load_clip(str(folder))
    assert clip.preprocessing.resize_mode == "squash"
    assert clip.preprocessing.interpolation == "bilinear"
    assert clip.preprocessing.mean == (0.5, 0.4, 0.3)
    reference = build("openai_vit")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(clip.model.encode_image(images), reference.encode_image(images))
    assert load_clip(str(folder)).fingerprint() == clip.fingerprint() != load_clip_of_seed(tmp_path, 1).fingerprint()


def load_clip_of_seed(tmp_path: Path, seed: int):
    return load_clip(str(save_folder("openai_vit", tmp_path / f"clip{seed}", seed)))


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    folder = save_folder("openai_vit", tmp_path / "clip")
    config = folder / "open_clip_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({"model_cfg": content["model_cfg"]}))
    with pytest.raises(ValueError, match=r"no preprocess_cfg.*\"preprocess_cfg\": \{\"mean\""):
        load_clip(str(folder))
    config.write_text(json.dumps({"preprocess_cfg": content["preprocess_cfg"]}))
    with pytest.raises(ValueError, match="has no model_cfg"):
        load_clip(str(folder))
    config.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_clip(str(folder))
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"open_clip_config.json is missing"):
        load_clip(str(folder))
    config.write_text(json.dumps(content))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in"):
        load_clip(str(folder))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"'ViT-B-23'; did you mean .*ViT-B-32"):
        load_clip("ViT-B-23", "openai")
    with pytest.raises(ValueError, match=r"did you mean builtin"):
        load_clip("buildin")
    with pytest.raises(
        ValueError, match=r"'opena' is neither a tag of ViT-B-32-quickgelu nor a file; did you mean openai"
    ):
        load_clip("ViT-B-32-quickgelu", "opena")
    with pytest.raises(ValueError, match=r"needs weights: --model.pretrained .*laion2b_s34b_b79k"):
        load_clip("ViT-B-32")
    with pytest.raises(FileNotFoundError, match=r"no folder ./no/such"):
        load_clip("./no/such")
    with pytest.raises(ValueError, match="leave out --model.pretrained"):
        load_clip("builtin", "openai")


def test_activation_of_the_weights() -> None:
    with pytest.raises(
        ValueError, match=r"ViT-B-32 has GELU, but the tag 'openai' .* use --model.clip ViT-B-32-quickgelu"
    ):
        load_clip("ViT-B-32", "openai")
    from metatpt.clip.loading import _check_activation

    with pytest.raises(
        ValueError, match=r"has QuickGELU, but a file was trained with GELU.* use --model.clip ViT-B-32$"
    ):
        _check_activation("ViT-B-32-quickgelu", {"quick_gelu": True}, {}, "a file")


def test_file_takes_the_preprocessing_that_all_tags_share(
    registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    add_tags(monkeypatch, registered, {"one": shared, "two": shared})
    clip = load_clip(registered, str(weights(tmp_path)))
    assert (clip.preprocessing.mean, clip.preprocessing.resize_mode) == ((0.5,) * 3, "squash")
    add_tags(monkeypatch, registered, {"one": shared, "two": {}})
    with pytest.raises(ValueError, match=r"tags of tiny-test differ in it .*one: .*squash.*two: .*shortest"):
        load_clip(registered, str(weights(tmp_path)))


def test_file_without_tags_asks_and_takes_a_config_beside_it(registered: str, tmp_path: Path) -> None:
    file = weights(tmp_path)
    with pytest.raises(ValueError, match=r"tiny-test has no tags to take it from"):
        load_clip(registered, str(file))
    beside = tmp_path / "open_clip_config.json"
    config = {"model_cfg": {"quick_gelu": False}, "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.9] * 3}}
    beside.write_text(json.dumps(config))
    assert load_clip(registered, str(file)).preprocessing.mean == (0.1,) * 3
    beside.write_text(json.dumps({**config, "model_cfg": {"quick_gelu": True}}))
    with pytest.raises(ValueError, match=r"tiny-test has GELU, but .*open_clip_config.json .* tiny-test-quickgelu"):
        load_clip(registered, str(file))


def test_siglip_from_a_file_has_its_own_preprocessing() -> None:
    from open_clip.pretrained import list_pretrained_tags_by_model

    from metatpt.clip.loading import _shared_preprocessing

    name = "ViT-B-16-SigLIP"
    found = _shared_preprocessing(name, list_pretrained_tags_by_model(name), Path("weights.safetensors"))
    assert found["mean"] == [0.5, 0.5, 0.5]
    assert found["resize_mode"] == "squash"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_kinds_of_files(registered: str, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tags(monkeypatch, registered, {"one": {}})
    file = weights(tmp_path, suffix)
    images = torch.rand(1, 3, 32, 32)
    loaded = load_clip(registered, str(file)).model.encode_image(images)
    model = open_clip.create_model(registered, str(file)).eval()
    torch.testing.assert_close(loaded, model.encode_image(images))


class Malicious:
    def __reduce__(self):
        return (print, ("code was run",))


def test_files_that_do_not_fit(
    registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_tags(monkeypatch, registered, {"one": {}})
    code = tmp_path / "code.pt"
    torch.save({"weight": Malicious()}, code)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_clip(registered, str(code))
    code.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match=str(code)):
        load_clip(registered, str(code))
    assert "code was run" not in capsys.readouterr().out
    cut = weights(tmp_path)
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"weights.safetensors"):
        load_clip(registered, str(cut))
    other = tmp_path / "other.safetensors"
    save_file({key: value.contiguous() for key, value in build("modified_resnet").state_dict().items()}, other)
    with pytest.raises(ValueError, match="of another architecture than tiny-test"):
        load_clip(registered, str(other))


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip.factory

    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    with pytest.raises(ValueError, match=r"no route to host.*name the file"):
        load_clip("RN50-quickgelu", "openai")


def test_a_tokenizer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metatpt.clip import loading

    model = build("openai_vit")

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(open_clip, "get_tokenizer", missing)
    with pytest.raises(ImportError, match=r"tokenizer of SomeSigLIP needs the package transformers"):
        loading._tokenizer("SomeSigLIP", model)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"rows of 77 tokens, its text tower takes 24"):
        loading._tokenizer("ViT-B-32", build("bidirectional"))
    model.vocab_size = 32000
    with pytest.raises(ValueError, match=r"vocabulary of 32000"):
        loading._tokenizer("ViT-B-32", model)


def test_preprocessing_of_a_tag_is_open_clips() -> None:
    from metatpt.clip.loading import _preprocessing

    model = build("openai_vit")
    for config in ({}, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash", "interpolation": "bilinear"}):
        ours = _preprocessing(config, model)
        theirs = PreprocessCfg(**{"size": 32, **config})
        assert (ours.size, ours.mean, ours.std) == (theirs.size, theirs.mean, theirs.std)
        assert (ours.resize_mode, ours.interpolation) == (theirs.resize_mode, theirs.interpolation)
        assert image_transform_v2(theirs, is_train=False)
