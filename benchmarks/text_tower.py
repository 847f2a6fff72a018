"""The text tower, forward and backward to the context, against open_clip's modules at 77 tokens a class.

    python benchmarks/text_tower.py --classes 100 1000

ImageNet's class names, random weights. The plain way goes in chunks of classes that fit, added up.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from measure import costs, machine, parser
from open_clip.tokenizer import SimpleTokenizer
from plain import PlainTPT
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import Preprocessing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="ViT-B-32")
    arguments.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    arguments.add_argument("--chunk", type=int, default=100, help="classes at once of the plain way")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = open_clip.create_model(options.model)
    clip = FrozenCLIP(model, SimpleTokenizer(), Preprocessing(model.visual.image_size[0], (0.5,) * 3, (0.5,) * 3))
    print(f"{options.model}'s text tower, {machine(options.threads)}, median of {options.repeats}\n")
    print("| classes | plain, s | ours, s | faster | plain, MB | ours, MB | less memory | features | gradient |")
    print("|---|---|---|---|---|---|---|---|---|")
    for n_classes in options.classes:
        print(row(clip, n_classes, options), flush=True)


def row(clip: FrozenCLIP, n_classes: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    tokens = clip.tokenize("a photo of a {}.", open_clip.IMAGENET_CLASSNAMES[:n_classes])
    plain, layout = PlainTPT(clip, tokens), clip.layout(tokens)
    weight = torch.randn(len(tokens.ids), clip.model.text_projection.shape[1])
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def run_plain() -> None:
        context = plain.context.clone().requires_grad_()
        parts = []
        for first in range(0, len(tokens.ids), options.chunk):
            part = slice(first, first + options.chunk)
            features = plain.text_features(context, part)
            features.backward(weight[part])
            parts.append(features.detach())
        assert context.grad is not None
        found["plain"] = torch.cat(parts), context.grad

    def run_ours() -> None:
        context = plain.context[None].clone().requires_grad_()
        features = clip.encode_prompts(layout, context)[0]
        (gradient,) = torch.autograd.grad((features * weight).sum(), context)
        found["ours"] = features.detach(), gradient[0]

    clip.encode_prompts(layout)
    cost = costs({"plain": run_plain, "ours": run_ours}, options.repeats)
    wrong = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found["ours"], found["plain"], strict=True)]
    cells = [
        f"{n_classes}",
        f"{cost['plain'].seconds:.2f}",
        f"{cost['ours'].seconds:.2f}",
        f"{cost['plain'].seconds / cost['ours'].seconds:.1f} x",
        f"{cost['plain'].above:,.0f}",
        f"{cost['ours'].above:,.0f}",
        f"{cost['plain'].above / cost['ours'].above:.1f} x",
        f"{wrong[0]:.0e}",
        f"{wrong[1]:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
