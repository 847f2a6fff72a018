"""The image tower, forward and backward to the pixels, against a forward pass without a graph.

python benchmarks/image_tower.py --model ViT-B-16
"""

from __future__ import annotations

import open_clip
import torch
from measure import costs, machine, parser
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from metatpt.clip import FrozenCLIP
from metatpt.types import Preprocessing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="ViT-B-16")
    arguments.add_argument("--pictures", type=int, default=6)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = open_clip.create_model(options.model)
    size = model.visual.image_size[0]
    clip = FrozenCLIP(model, SimpleTokenizer(), Preprocessing(size, (0.0,) * 3, (1.0,) * 3))
    pixels = torch.rand(options.pictures, 3, size, size)
    weight = torch.randn(options.pictures, model.visual.output_dim)
    encoders = {
        "open_clip": lambda images: torch.nn.functional.normalize(model.encode_image(images), dim=-1),
        "ours": clip.encode_image,
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(name: str) -> None:
        with torch.no_grad():
            encoders[name](pixels)

    def both(name: str) -> None:
        images = pixels.clone().requires_grad_()
        features = encoders[name](images)
        (gradient,) = torch.autograd.grad((features * weight).sum(), images)
        found[name] = features.detach(), gradient

    cases = {
        f"{name}, {run.__name__}": lambda name=name, run=run: run(name) for name in encoders for run in (forward, both)
    }
    cost = costs(cases, options.repeats)
    wrong = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found["ours"], found["open_clip"], strict=True)]
    print(f"{options.model}'s image tower, {options.pictures} pictures, {machine(options.threads)}, median of "
          f"{options.repeats}; features equal to {wrong[0]:.0e}, gradients to {wrong[1]:.0e} relative\n")  # fmt: skip
    print("| | seconds | of its own forward | of open_clip's forward | MB above the model |\n|---|---|---|---|---|")
    reference = cost["open_clip, forward"].seconds
    for name, each in cost.items():
        own = cost[name.split(",")[0] + ", forward"].seconds
        cells = [name.replace("both", "forward and backward"), f"{each.seconds:.2f}", f"{each.seconds / own:.2f} x"]
        print(f"| {' | '.join([*cells, f'{each.seconds / reference:.2f} x', f'{each.above:,.0f}'])} |")


if __name__ == "__main__":
    main()
