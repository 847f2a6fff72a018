"""What the graphs take that are kept for a backward pass: of a view, of a class, of a class list.

    python benchmarks/footprint.py --models ViT-B-32 ViT-B-16 ViT-L-14

Measured on one view and on 32 of ImageNet's class names, float32; the rest is multiplied. 20,000 classes are ImageNet's
names 20 times over.
"""

from __future__ import annotations

import open_clip
import torch
from measure import machine, parser
from open_clip.tokenizer import SimpleTokenizer

from metatpt.clip import FrozenCLIP
from metatpt.types import Preprocessing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16", "ViT-L-14"])
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.threads)}\n")
    print("| model | weights | a view | 6 views | 19 views | a class | 100 classes | 1000 classes | 20,000 classes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models:
        model = open_clip.create_model(name)
        size = model.visual.image_size[0]
        clip = FrozenCLIP(model, SimpleTokenizer(), Preprocessing(size, (0.5,) * 3, (0.5,) * 3))
        weights = sum(weight.nbytes for weight in model.parameters())
        view = clip._bytes_per_picture(torch.rand(1, 3, size, size))
        layout = clip.layout(clip.tokenize("a photo of a {}.", open_clip.IMAGENET_CLASSNAMES))
        a_class = clip._bytes_of_prompts(layout) * layout.size // len(layout.tail)
        figures = [weights, view, 6 * view, 19 * view, a_class, 100 * a_class, 1000 * a_class, 20_000 * a_class]
        print(f"| {name} | {' | '.join(f'{figure / 2**20:,.1f} MB' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
