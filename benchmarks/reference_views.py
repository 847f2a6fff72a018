"""How our views differ from the reference's: the same boxes by two ways, from files to TPT's accuracy.

The reference crops the full picture bicubically with PIL (torchvision's ``resized_crop``); ours warp bilinearly out of
the canvas, on the device. Boxes and flips are the same. Prints a table; run it as

    python benchmarks/reference_views.py --clip ../shared/models/pacs-tiny --root ../shared/data/pacs128
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, hflip, resized_crop, to_tensor

from metatpt.datamodules import PACSDataModule
from metatpt.datamodules.subsets import balanced_subset
from metatpt.images import collate, decode, to_sample
from metatpt.modules import TPTModule
from metatpt.views import bounded, sample_views


def reference_views(module: TPTModule, picture: Image.Image, image: Tensor, raw: Tensor, flip: Tensor) -> Tensor:
    """View 0 and the same boxes through torchvision, ``[V, 3, R, R]``."""
    size, (width, height) = module.preprocessing.size, picture.size
    x, y, _, log_scale, stretch, _ = bounded(raw, module.bounds).double().unbind(-1)
    side = log_scale.exp() * min(width, height)
    box_width, box_height = side * stretch.exp(), side * (-stretch).exp()
    left, top = (x + 1) / 2 * width - box_width / 2, (y + 1) / 2 * height - box_height / 2
    views = [image]
    for number in range(len(raw)):
        box = [round(float(each[number])) for each in (top, left, box_height, box_width)]
        box[2:] = [max(1, each) for each in box[2:]]
        view = resized_crop(picture, *box, [size, size], InterpolationMode.BICUBIC)
        views.append(to_tensor(hflip(view) if flip[number] else view))
    return torch.stack(views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--domain", default="art_painting")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--views", type=int, default=64)
    options = parser.parse_args()

    data = PACSDataModule(options.root, domain=options.domain)
    module = TPTModule(clip=options.clip, class_names=data.class_names, n_views=options.views)
    pictures = data.pictures("test")
    head = module.prompt.head()
    cosines, agreements, right = [], [], {"zero-shot": [], "reference": [], "ours": []}
    for index in balanced_subset(pictures.labels, options.samples, 0):
        source, label, _ = pictures[index]
        picture = decode(source)
        batch = collate([to_sample(source, module.preprocessing, index=index)])
        raw, flip = sample_views("crop", module.bounds, options.views - 1, batch.aspect, [index], 0)
        with torch.no_grad():
            ours = torch.cat([batch.image[:, None], module.warp(batch, raw, flip)], dim=1)
        theirs = reference_views(module, picture, batch.image[0], raw[0], flip[0])[None]
        features = [module.look_at(views).features[0, 1:] for views in (ours, theirs)]
        cosines.append((features[0] * features[1]).sum(-1))
        predictions = [head(each[None])[0].argmax(-1) for each in features]
        agreements.append((predictions[0] == predictions[1]).float())
        for name, views in (("ours", ours), ("reference", theirs)):
            result = module.adapt_views(views)
            right[name].append(int(result.log_probs.argmax()) == label)
            if name == "ours":
                right["zero-shot"].append(int(result.zero_shot_log_probs.argmax()) == label)
    cosine, agreement = torch.cat(cosines), torch.cat(agreements)
    print(f"| figure | {options.domain}, {options.samples} pictures, {options.views} views |\n|---|---|")
    print(
        f"| cosine of a view's features, median (5 % quantile) | {cosine.median():.3f} ({cosine.quantile(0.05):.3f}) |"
    )
    print(f"| views whose zero-shot prediction agrees | {100 * agreement.mean():.1f} % |")
    for name, values in right.items():
        print(
            f"| accuracy, {'TPT on ' if name != 'zero-shot' else ''}{name} | {100 * sum(values) / len(values):.1f} % |"
        )


if __name__ == "__main__":
    main()
