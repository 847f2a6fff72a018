"""What adapting to one image costs: against encoding its views with open_clip, and against the official code's TPT.

    python benchmarks/methods.py --model ViT-B-16 --classes 100
    python benchmarks/methods.py --model ViT-B-32 --classes 100 1000 --plain

Random weights of the real sizes, noise for a picture, ImageNet's class names, one image at a time. What is computed
once for a run (the initial class features and their graph) is computed before. The official code's crops by PIL are not
counted.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from measure import costs, machine, parser, random_batch, random_model
from plain import PlainTPT

from metatpt.modules import MetaTPTModule, TPTModule, ViewModule
from metatpt.views import sample_views

ONE_STEP: dict[str, Any] = {"inner_steps": 1, "outer_steps": 1}
METHODS: dict[str, tuple[type[ViewModule], dict[str, Any]]] = {
    "TPT": (TPTModule, {}),
    "MetaTPT, 10 %": (MetaTPTModule, {**ONE_STEP, "selection": 0.1}),
    "MetaTPT, 10 %, second order": (MetaTPTModule, {**ONE_STEP, "selection": 0.1, "order": "second"}),
    "MetaTPT, 30 %": (MetaTPTModule, {**ONE_STEP, "selection": 0.3}),
    "MetaTPT, 30 %, second order": (MetaTPTModule, {**ONE_STEP, "selection": 0.3, "order": "second"}),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="ViT-B-16")
    arguments.add_argument("--classes", type=int, nargs="+", default=[100])
    arguments.add_argument("--views", type=int, default=64)
    arguments.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments.add_argument("--plain", action="store_true", help="compare with the official code's step too")
    arguments.add_argument("--chunk", type=int, default=100, help="classes at once of the plain way")
    arguments.add_argument("--memory", type=int, default=None, help="as --model.memory; automatic by default")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        clip = str(random_model(options.model, Path(folder)))
        for n_classes in options.classes:
            measure(clip, n_classes, options)


def measure(clip: str, n_classes: int, options: Any) -> None:
    """Print the table of one number of classes."""
    names = open_clip.IMAGENET_CLASSNAMES[:n_classes]
    memory = options.memory or "auto"
    shared: ViewModule | None = None
    modules: dict[str, ViewModule] = {}
    for method in options.methods:
        kind, given = METHODS[method]
        modules[method] = kind(clip=clip, class_names=names, n_views=options.views, memory=memory, **given)
        if shared is None:
            shared = modules[method]
        else:
            modules[method].prompt = shared.prompt  # one copy of the weights, and of what is kept
            gc.collect()
    assert shared is not None
    model: Any = shared.clip.model
    batch = random_batch(1, shared.preprocessing.size)
    pixels = torch.rand(options.views, 3, shared.preprocessing.size, shared.preprocessing.size)

    def encode(size: int) -> None:
        with torch.no_grad():
            for part in pixels.split(size):
                model.encode_image(part)

    def make_views() -> None:
        with torch.no_grad():
            raw, flip = sample_views("crop", shared.bounds, options.views - 1, batch.aspect, [0], 0)
            views = torch.cat([batch.image[:, None], shared.warp(batch, raw, flip)], dim=1)
            mean, std = shared.clip._constants(views[0])
            views[0].sub(mean).div(std)

    cases: dict[str, Any] = {
        "open_clip's image forward, all at once": lambda: encode(options.views),
        "open_clip's image forward, 8 at once": lambda: encode(8),
        "making the views": make_views,
    }
    for name, module in modules.items():
        module.process(batch)  # what is computed once for a run
        cases[name] = lambda module=module: module.process(batch)
    if options.plain:
        plain = PlainTPT(shared.clip, shared.clip.tokenize("a photo of a {}.", names))
        chunk = None if n_classes <= options.chunk else options.chunk
        cases["TPT, plain"] = lambda: plain.step(pixels, chunk=chunk)
    cost = costs(cases, options.repeats)
    forward = min(each.seconds for name, each in cost.items() if name.startswith("open_clip"))
    print(f"\n{options.model}, {n_classes} classes, {options.views} views, {machine(options.threads)}, ", end="")
    print(f"median of {options.repeats}\n")
    print("| | seconds | of open_clip's image forward | against plain TPT | MB above what was there | MB in all |")
    print("|---|---|---|---|---|---|")
    for name, each in cost.items():
        faster = (
            f"{cost['TPT, plain'].seconds / each.seconds:.1f} x faster" if options.plain and name in modules else ""
        )
        cells = [name, f"{each.seconds:.2f}", f"{each.seconds / forward:.2f} x", faster]
        print(f"| {' | '.join([*cells, f'{each.above:,.0f}', f'{each.in_all:,.0f}'])} |")
    print()
    for name, each in cost.items():
        first = cost.get(name.removesuffix(", second order"))
        if first is not None and first is not each:
            print(f"{name}: {each.seconds / first.seconds:.2f} x first order")
    if "TPT" in cost:
        share = cost["making the views"].seconds / cost["TPT"].seconds
        print(f"making the views: {100 * share:.1f} % of a TPT step", flush=True)


if __name__ == "__main__":
    main()
