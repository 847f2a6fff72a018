"""Trains the bundled model, from nothing, on the clean training pictures of ShiftedShapes.

    python scripts/train_builtin.py            # writes src/metatpt/clip/builtin

Nothing of val or test, no held-out combination and no shift is seen: pictures are flipped, half of them are cropped
(60 to 100 % of the area, aspect ratio 3/4 to 4/3), and brightness and contrast play by 15 %. A caption names all or
some of an object's texture, colour and shape in one of the templates below; a few templates say how dark the
background or how large the object is, so that the words before the name mean something. Every caption that is true of
a picture counts as its own (a loss with many positives), so no picture is pushed away from a true sentence.

Most steps see 36 of the 64 patches, mostly those in the middle (as FLIP, arXiv 2212.00794, which drops any), the last
ones see all.

The bundled file: the defaults below, torch 2.14, 43 minutes on 2 CPU cores (AMD EPYC, AVX2) that two or three other
jobs shared. Validation pictures passed 90 % after 700 steps and reached 100 % after 1400 of 2400.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from metatpt.shapes import COLORS, SHAPES, SHIFT_NAMES, TEXTURES, ShiftedShapes

TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "this is a {}.",
    "there is a {}.",
    "a {}.",
    "the {}.",
)
# True of some pictures only: (tone of the background, size of the object), -1 dark or small, 1 bright or large.
TELLING_TEMPLATES = {
    "a dark photo of a {}.": (-1, 0),
    "a bright photo of a {}.": (1, 0),
    "a photo of a small {}.": (0, -1),
    "a photo of a large {}.": (0, 1),
}
SIZE = 64
MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
MODEL = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "layers": 5, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
TOKENIZER = open_clip.SimpleTokenizer(context_length=16)
WORDS = sorted({*TEXTURES, *COLORS, *SHAPES, *re.findall("[a-z]+", " ".join((*TEMPLATES, *TELLING_TEMPLATES)))})


def known_ids() -> list[int]:
    """Tokens of all captions, in the order of the training model's embedding; the end token is the largest."""
    ids = {token for word in [*WORDS, "."] for token in TOKENIZER.encode(word)}
    return sorted({*ids, TOKENIZER.sot_token_id, TOKENIZER.eot_token_id})


def main() -> None:
    """Trains, saves, and measures what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("src/metatpt/clip/builtin"))
    parser.add_argument("--pictures", type=int, default=20000, help="training pictures, drawn once and kept")
    parser.add_argument("--steps", type=int, default=2000, help="steps with 36 of the 64 patches")
    parser.add_argument("--full_steps", type=int, default=400, help="further steps with all of them")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n_test", type=int, default=600, help="pictures a shift that the saved model is measured on")
    parser.add_argument("--measure_only", action="store_true", help="measure the model in --output, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.time()
    if not arguments.measure_only:
        model = train(arguments, start)
        save(model, arguments.output)
        print(f"trained in {time.time() - start:.0f} s")
    measure(load(arguments.output), arguments.n_test, arguments.threads)
    print(f"all done in {time.time() - start:.0f} s")


# Pictures ------------------------------------------------------------------------------------------------------------


def draw(job: tuple[str, int, int, str, int]) -> np.ndarray:
    """Pictures `first` to `last` of a split, ``[n, 3, 128, 128]`` uint8."""
    split, first, last, shift, severity = job
    data = ShiftedShapes(split, last, shift, severity)  # type: ignore[arg-type]
    return np.stack([np.asarray(data[index][0]).transpose(2, 0, 1) for index in range(first, last)])


def pictures(split: str, n: int, threads: int, shift: str = "none", severity: int = 3) -> Tensor:
    """The first n pictures of a split, drawn by that many processes."""
    jobs = [(split, first, min(n, first + 250), shift, severity) for first in range(0, n, 250)]
    with multiprocessing.Pool(threads) as pool:
        return torch.from_numpy(np.concatenate(pool.map(draw, jobs)))


def shrink(images: Tensor) -> Tensor:
    """View 0 in [0, 1] of uint8 pictures: bicubic, as the preprocessing configuration says."""
    small = F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bicubic", antialias=True)
    return small.clamp(0, 1)


def normalise(images: Tensor) -> Tensor:
    """What the tower takes."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training views of uint8 pictures, normalised, and by how much their objects grew."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    crop = torch.rand(n, generator=generator) < 0.5
    area, log_aspect = uniform(0.6, 1.0), uniform(math.log(3 / 4), math.log(4 / 3))
    width = (area * log_aspect.exp()).sqrt().clamp(max=1)
    height = (area / log_aspect.exp()).sqrt().clamp(max=1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    flip = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([width * flip, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    views = torch.where(flip.view(n, 1, 1, 1) < 0, images.flip(-1), images)
    views = shrink(views)
    grid = F.affine_grid(theta[crop], [int(crop.sum()), 3, SIZE, SIZE], align_corners=False)
    views[crop] = F.grid_sample(images[crop].float() / 255, grid, align_corners=False, padding_mode="border")
    views = (views - 0.5) * uniform(0.85, 1.15).view(n, 1, 1, 1) + 0.5 * uniform(0.85, 1.15).view(n, 1, 1, 1)
    growth = torch.where(crop, (width * height).rsqrt(), torch.ones(n))
    return normalise(views.clamp(0, 1)), growth


# Captions ------------------------------------------------------------------------------------------------------------


def facts(data: ShiftedShapes) -> tuple[Tensor, Tensor, Tensor]:
    """Texture, colour and shape of all pictures as numbers ``[n, 3]``, tone of the background, radius of the object."""
    scenes = [data.scene(index) for index in range(len(data))]
    names = [(TEXTURES.index(t), COLORS.index(c), SHAPES.index(s)) for t, c, s in (one.combination for one in scenes)]
    background = torch.tensor([scene.background for scene in scenes])
    tone = (background > 0.65).long() - (background < 0.3).long()
    return torch.tensor(names), tone, torch.tensor([scene.radius for scene in scenes])


def captions(truth: Tensor, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """A true caption for each picture, and what it says ``[n, 5]``: -9 where it says nothing.

    Args:
        truth: Texture, colour, shape, tone and size of each picture, ``[n, 5]``.
        generator: Draws template and which attributes are named.
    """
    texts, claims = [], torch.full_like(truth, -9)
    # Texture and colour left out in 30 of 100 captions: shape alone and pairs must stand for themselves.
    dropped = [(), (), (), (), (), (), (), (0,), (1,), (0, 1)]
    for row, (texture, color, shape, tone, size) in enumerate(truth.tolist()):
        pick = torch.randint(1000, (4,), generator=generator).tolist()
        missing = dropped[pick[0] % len(dropped)]
        words = [TEXTURES[texture], COLORS[color], SHAPES[shape]]
        claims[row, :3] = truth[row, :3]
        for place in missing:
            claims[row, place] = -9
        template = TEMPLATES[pick[1] % len(TEMPLATES)]
        telling = [one for one, (t, s) in TELLING_TEMPLATES.items() if (t and t == tone) or (s and s == size)]
        if telling and pick[2] < 300:
            template = telling[pick[1] % len(telling)]
            place = 3 if TELLING_TEMPLATES[template][0] else 4
            claims[row, place] = truth[row, place]
        text = template.format(" ".join(word for place, word in enumerate(words) if place not in missing))
        texts.append(text if pick[3] < 850 else text.removesuffix("."))
    return texts, claims


def loss_of(image: Tensor, text: Tensor, scale: Tensor, positive: Tensor) -> Tensor:
    """Contrastive loss in both directions; the target is uniform over all true pairs of a row.

    Args:
        image: Normalised features ``[n, d]``.
        text: Normalised features ``[n, d]``.
        scale: Factor on cosines.
        positive: Which caption is true of which picture, ``[n, n]``.
    """
    logits = scale * image @ text.T
    target = positive.float()
    to_text = -(logits.log_softmax(1) * target).sum(1) / target.sum(1)
    to_image = -(logits.log_softmax(0) * target).sum(0) / target.sum(0)
    return 0.5 * (to_text.mean() + to_image.mean())


class MiddlePatches(torch.nn.Module):
    """Keeps the class token and 36 of 8 x 8 patches, mostly those of the middle 6 x 6."""

    def __init__(self) -> None:
        super().__init__()
        middle = torch.zeros(8, 8)
        middle[1:-1, 1:-1] = 0.6
        self.bonus = middle.flatten()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1 + 64, d]`` to ``[B, 1 + 36, d]``."""
        if not self.training:
            return x
        chosen = (torch.rand(len(x), 64) + self.bonus).topk(36).indices
        return torch.cat([x[:, :1], x[:, 1:][torch.arange(len(x))[:, None], chosen]], dim=1)


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """``model.encode_text`` without the padding behind the longest caption (attention is causal: the same)."""
    length = int(tokens.argmax(1).max()) + 1
    tokens = tokens[:, :length]
    hidden = model.token_embedding(tokens) + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
    return hidden[torch.arange(len(tokens)), tokens.argmax(1)] @ model.text_projection


# Training ------------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace, start: float) -> open_clip.CLIP:
    """The trained model."""
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    images = pictures("train", arguments.pictures, arguments.threads)
    names, tone, radius = facts(ShiftedShapes("train", arguments.pictures))
    val_images = pictures("val", 480, arguments.threads)
    print(f"{len(images)} pictures drawn in {time.time() - start:.0f} s", flush=True)

    ids = known_ids()
    model = open_clip.model.CLIP(**{**MODEL, "text_cfg": {**MODEL["text_cfg"], "vocab_size": len(ids)}})
    model.visual.patch_dropout = MiddlePatches()
    # Rows of the embedding that no caption uses are left out, and put back by `save`.
    row_of = torch.zeros(MODEL["text_cfg"]["vocab_size"], dtype=torch.long)
    row_of[ids] = torch.arange(len(ids))
    decay = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim >= 2 and "embedding" not in name)]
    groups = [{"params": decay, "weight_decay": arguments.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.98))
    total = arguments.steps + arguments.full_steps

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / total)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.randperm(len(images), generator=generator)
    place = 0
    for step in range(total):
        if step == arguments.steps:
            model.visual.patch_dropout = torch.nn.Identity()
        if place + arguments.batch_size > len(order):
            order, place = torch.randperm(len(images), generator=generator), 0
        rows = order[place : place + arguments.batch_size]
        place += arguments.batch_size
        views, growth = augment(images[rows], generator)
        grown = radius[rows] * growth
        size = (grown > 0.32).long() - (grown < 0.27).long()
        truth = torch.cat([names[rows], tone[rows, None], size[:, None]], dim=1)
        texts, claims = captions(truth, generator)
        positive = ((claims[None] == -9) | (claims[None] == truth[:, None])).all(-1)
        image = F.normalize(model.encode_image(views), dim=-1)
        text = F.normalize(encode_text(model, row_of[TOKENIZER(texts)]), dim=-1)
        loss = loss_of(image, text, model.logit_scale.exp().clamp(max=100), positive)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0 or step + 1 == total:
            model.eval()
            accuracy = evaluate(model, val_images, "val", row_of)
            model.train()
            scale = model.logit_scale.exp().item()
            seconds = time.time() - start
            print(
                f"step {step + 1}/{total}: loss {loss.item():.3f}, scale {scale:.1f}, "
                f"val {100 * accuracy:.1f} %, {seconds:.0f} s",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def evaluate(model: open_clip.CLIP, images: Tensor, split: str, row_of: Tensor | None = None) -> float:
    """Zero-shot accuracy on the first pictures of a split."""
    data = ShiftedShapes(split, len(images))  # type: ignore[arg-type]
    tokens = TOKENIZER([f"a photo of a {name}." for name in data.class_names])
    texts = F.normalize(encode_text(model, tokens if row_of is None else row_of[tokens]), dim=-1)
    features = torch.cat([model.encode_image(normalise(shrink(part)), normalize=True) for part in images.split(100)])
    labels = torch.tensor([data.label(index) for index in range(len(data))])
    return float(((features @ texts.T).argmax(1) == labels).float().mean())


# The file ------------------------------------------------------------------------------------------------------------


def save(model: open_clip.CLIP, folder: Path) -> None:
    """Writes configuration and weights: float16, and only the token embeddings that captions use."""
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    state["logit_scale"] = model.logit_scale.detach().clamp(max=math.log(100))
    embedding = state.pop("token_embedding.weight")
    state["token_embedding.rows"] = embedding
    state["token_embedding.row_ids"] = torch.tensor(known_ids(), dtype=torch.int32)
    preprocess = {
        "size": [SIZE, SIZE],
        "mode": "RGB",
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    templates = [*TEMPLATES, *TELLING_TEMPLATES]
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess, "words": WORDS, "templates": templates}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, folder / "weights.safetensors")


def load(folder: Path) -> open_clip.CLIP:
    """The model of such a folder."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    state = load_file(folder / "weights.safetensors")
    model = open_clip.model.CLIP(**config["model_cfg"])
    embedding = torch.zeros_like(model.token_embedding.weight)
    embedding[state.pop("token_embedding.row_ids").long()] = state.pop("token_embedding.rows").float()
    model.load_state_dict({**state, "token_embedding.weight": embedding})
    return model.eval()


def measure(model: open_clip.CLIP, n: int, threads: int) -> None:
    """Prints zero-shot accuracies of a model on the test split, clean and under every shift."""
    print(f"zero-shot on the first {n} test pictures, %: severities 1, 3, 5")
    for shift in SHIFT_NAMES:
        severities = (3,) if shift == "none" else (1, 3, 5)
        figures = [evaluate(model, pictures("test", n, threads, shift, severity), "test") for severity in severities]
        print(f"{shift:11}", *(f"{100 * figure:6.1f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
