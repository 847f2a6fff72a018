"""The bundled model's files, read with open_clip alone (how `clip/` reads them is tested beside that)."""

import json
from importlib.resources import files

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from metatpt.shapes import COLORS, COMBINATIONS, SHAPES, TEXTURES, ShiftedShapes, class_name

FOLDER = files("metatpt") / "clip" / "builtin"
FILES = ("open_clip_config.json", "weights.safetensors")


@pytest.fixture(scope="module")
def config():
    return json.loads((FOLDER / "open_clip_config.json").read_text())


@pytest.fixture(scope="module")
def state():
    return load_file(str(FOLDER / "weights.safetensors"))


@pytest.fixture(scope="module")
def model(config, state):
    model = open_clip.model.CLIP(**config["model_cfg"])
    state = {name: value.float() for name, value in state.items()}
    embedding = torch.zeros_like(model.token_embedding.weight)
    embedding[state.pop("token_embedding.row_ids").long()] = state.pop("token_embedding.rows")
    model.load_state_dict({**state, "token_embedding.weight": embedding}, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def transform(config):
    preprocess = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])
    return open_clip.transform.image_transform_v2(preprocess, is_train=False)


@torch.no_grad()
def accuracy(model, transform, data, rows):
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    text = model.encode_text(tokenizer([f"a photo of a {name}." for name in data.class_names]), normalize=True)
    images = torch.stack([transform(data[row][0]) for row in rows])
    prediction = (model.encode_image(images, normalize=True) @ text.T).argmax(1)
    return float((prediction == torch.tensor([data.label(row) for row in rows])).float().mean())


def test_size(state):
    assert sum(len((FOLDER / name).read_bytes()) for name in FILES) <= 8_000_000
    kept = {"token_embedding.row_ids": torch.int32, "logit_scale": torch.float32}
    assert all(value.dtype == kept.get(name, torch.float16) for name, value in state.items())


def test_is_an_openai_style_clip(model):
    assert isinstance(model.visual, open_clip.transformer.VisionTransformer)
    assert len(model.visual.transformer.resblocks) >= 4
    assert isinstance(model.visual.ln_pre, torch.nn.LayerNorm)
    assert model.visual.class_embedding is not None
    assert model.visual.image_size == (64, 64)
    assert model.attn_mask is not None
    assert model.text_pool_type == "argmax"
    assert model.logit_scale.exp() <= 100


def test_words_are_those_of_the_captions(config, state):
    said = {*TEXTURES, *COLORS, *SHAPES}
    for template in config["templates"]:
        said |= set(template.replace("{}", " ").replace(".", " ").split())
    assert config["words"] == sorted(said)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    captions = [t.format(class_name(one)) for t in config["templates"] for one in COMBINATIONS]
    used = set(tokenizer(captions).flatten().tolist()) - {0}
    stored = state["token_embedding.row_ids"].tolist()
    assert used == set(stored)
    assert len(stored) == len(set(stored)) == len(state["token_embedding.rows"])
    assert {tokenizer.sot_token_id, tokenizer.eot_token_id} <= used


def test_longest_caption_fits(config):
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    captions = [t.format(class_name(one)) for t in config["templates"] for one in COMBINATIONS]
    assert int(tokenizer(captions).argmax(1).max()) < config["model_cfg"]["text_cfg"]["context_length"]


def test_clean_zero_shot(model, transform):
    assert accuracy(model, transform, ShiftedShapes("test", 300), range(300)) >= 0.9


def test_held_out_classes(model, transform):
    """Words combine: the classes that no training picture showed are told from the others."""
    data = ShiftedShapes("test", 480)
    held_out = {"plain red triangle", "dotted yellow square", "plain green star", "dotted blue heart"}
    rows = [row for row in range(480) if data.class_names[data.label(row)] in held_out]
    assert accuracy(model, transform, data, rows) >= 0.8


@pytest.mark.parametrize("shift", ["rotation"])
def test_shift_leaves_work_to_do(model, transform, shift):
    figure = accuracy(model, transform, ShiftedShapes("test", 192, shift), range(192))
    assert 0.3 < figure < 0.85


@torch.no_grad()
def test_a_word_alone_names_a_thing(model, transform):
    data = ShiftedShapes("test", 96)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    text = model.encode_text(tokenizer([f"a photo of a {shape}." for shape in SHAPES]), normalize=True)
    images = torch.stack([transform(data[row][0]) for row in range(96)])
    prediction = (model.encode_image(images, normalize=True) @ text.T).argmax(1)
    truth = torch.tensor([SHAPES.index(data.scene(row).combination[2]) for row in range(96)])
    assert (prediction == truth).float().mean() >= 0.9


def test_crops_are_no_shift(model, transform):
    """Averaging over crops can only help a model that recognises them."""
    data = ShiftedShapes("test", 192)

    class Cropped:
        class_names = data.class_names
        label = staticmethod(data.label)

        def __getitem__(self, row):
            picture, label = data[row]
            left, top = (row * 7) % 26, (row * 11) % 26
            return picture.crop((left, top, left + 102, top + 102)).resize((128, 128), Image.Resampling.BICUBIC), label

    assert accuracy(model, transform, Cropped(), range(192)) >= 0.85
