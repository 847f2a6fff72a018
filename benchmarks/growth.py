"""How the cost of adapting to one image grows with views, classes, steps and batch size: one at a time.

    python benchmarks/growth.py --model ViT-S-32

Random weights, noise for pictures, ImageNet's class names; seconds a picture.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from measure import costs, machine, parser, random_batch, random_model

from metatpt.modules import MetaTPTModule, TPTModule, ViewModule

BASE: dict[str, Any] = {"views": 64, "classes": 100, "steps": 1, "batch": 1}
CHANGES: dict[str, list[int]] = {"views": [16, 256], "classes": [10, 1000], "steps": [4, 8], "batch": [4, 8]}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="ViT-S-32")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.model}, {machine(options.threads)}, median of {options.repeats}; seconds a picture\n")
    print("| views | classes | outer steps | batch | TPT | MetaTPT, 10 % selected |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        clip = str(random_model(options.model, Path(folder)))
        settings = [BASE] + [{**BASE, name: value} for name, values in CHANGES.items() for value in values]
        for setting in settings:
            print(row(clip, setting, options), flush=True)


def row(clip: str, setting: dict[str, Any], options: argparse.Namespace) -> str:
    """One line of the table."""
    names = open_clip.IMAGENET_CLASSNAMES[: setting["classes"]]
    shared: dict[str, Any] = {"n_views": setting["views"], "outer_steps": setting["steps"], "selection": 0.1}
    modules: dict[str, ViewModule] = {}
    for kind in (TPTModule, MetaTPTModule):
        modules[kind.__name__] = kind(clip=clip, class_names=names, **shared)
        gc.collect()
    batch = random_batch(setting["batch"], next(iter(modules.values())).preprocessing.size)
    for module in modules.values():
        module.process(batch)  # what is computed once for a run
    cases = {name: lambda module=module: module.process(batch) for name, module in modules.items()}
    cost = costs(cases, options.repeats)
    return f"| {' | '.join([*map(str, setting.values()), *(f'{c.seconds / len(batch):.2f}' for c in cost.values())])} |"


if __name__ == "__main__":
    main()
