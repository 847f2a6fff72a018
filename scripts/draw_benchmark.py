"""Draw docs/shifted_shapes.png: a few test pictures of the bundled benchmark under each shift."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from metatpt.shapes import SHIFT_NAMES, ShiftedShapes

_SIDE, _GAP, _TITLE = 96, 4, 16
_PICTURES = (1, 8, 14)


def main() -> None:
    """One column a shift, at severity 3."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/shifted_shapes.png"))
    options = parser.parse_args()
    columns = list(SHIFT_NAMES)
    sheet = Image.new("RGB", (len(columns) * (_SIDE + _GAP), _TITLE + len(_PICTURES) * (_SIDE + _GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, shift in enumerate(columns):
        left = column * (_SIDE + _GAP)
        pen.text((left + _SIDE / 2, _TITLE / 2), shift.replace("_", " "), fill="black", anchor="mm")
        data = ShiftedShapes("test", 24, shift, 3)
        for row, number in enumerate(_PICTURES):
            picture, _ = data[number]
            sheet.paste(picture.resize((_SIDE, _SIDE)), (left, _TITLE + row * (_SIDE + _GAP)))
    sheet.quantize(128).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
