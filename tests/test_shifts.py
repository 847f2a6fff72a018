import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from metatpt import shifts
from metatpt.shapes import ShiftedShapes

SEVERITIES = (1, 2, 3, 4, 5)


def pixels(picture):
    return np.asarray(picture, np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def originals():
    data = ShiftedShapes("val", 8)
    return [data[index][0] for index in range(8)]


@pytest.mark.parametrize("name", shifts.SHIFTS)
class TestEveryShift:
    def test_each_severity_changes_more_than_the_one_before(self, name, originals):
        """Mean absolute difference to the original, over pictures.

        That of "zoom_out" is bounded by the object's own: what grows is tested below.
        """
        change = [
            np.mean(
                [
                    np.abs(pixels(shifts.apply_shift(name, picture, severity, rng(k))) - pixels(picture)).mean()
                    for k, picture in enumerate(originals)
                ]
            )
            for severity in SEVERITIES
        ]
        assert change[0] > 0.5
        assert np.all(np.diff(change) > 0) or (name == "zoom_out" and np.all(np.diff(change) > -1)), change

    def test_same_generator_same_picture(self, name, originals):
        picture = originals[0]
        before = picture.tobytes()
        first, again, other = (shifts.apply_shift(name, picture, 3, rng(seed)) for seed in (1, 1, 2))
        assert first.tobytes() == again.tobytes()
        assert first.tobytes() != other.tobytes()
        assert picture.tobytes() == before, "the shift wrote into its input"

    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
    @pytest.mark.parametrize("size", [(40, 90), (90, 40), (300, 200), (1, 1), (200, 2)])
    def test_any_picture_keeps_its_size(self, name, mode, size):
        for severity in (1, 5):
            shifted = shifts.apply_shift(name, Image.new(mode, size), severity, rng())
            assert shifted.size == size
            assert shifted.mode == "RGB"

    @pytest.mark.parametrize("severity", [0, 6, -1, 2.5, True, "3", None])
    def test_no_such_severity(self, name, severity, originals):
        message = f"severity {severity!r} is none of 1, 2, 3, 4, 5"
        with pytest.raises(ValueError, match=re.escape(message)):
            shifts.apply_shift(name, originals[0], severity, rng())


def test_severity_does_not_depend_on_the_resolution(originals):
    """The shifted large picture, made small, is about the shifted small picture."""
    for name in ("blur", "noise", "zoom_out", "darkness", "color_cast", "rotation"):
        small = originals[0]
        large = small.resize((4 * small.width, 4 * small.height), Image.Resampling.BICUBIC)
        shifted = shifts.apply_shift(name, large, 3, rng(3)).resize(small.size, Image.Resampling.BOX)
        change = np.abs(pixels(shifted) - pixels(small)).mean()
        expected = np.abs(pixels(shifts.apply_shift(name, small, 3, rng(3))) - pixels(small)).mean()
        assert change == pytest.approx(expected, rel=0.2), name


def test_zoom_out_shrinks():
    picture = Image.new("RGB", (120, 120), "black")
    picture.paste("white", (30, 30, 90, 90))
    # The blurred frame is grey, the object stays white.
    areas = [(pixels(shifts.zoom_out(picture, severity, rng())) > 245).all(-1).mean() for severity in SEVERITIES]
    assert np.all(np.diff(areas) < 0), areas
    assert areas[-1] < 0.05


def test_rotation_turns_about_the_centre_and_fills_the_corners():
    picture = Image.new("RGB", (101, 101), "white")
    picture.paste("red", (48, 48, 53, 53))
    turned = pixels(shifts.rotation(picture, 5, rng()))
    assert turned[50, 50].tolist() == [255, 0, 0]
    assert turned[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 255


@pytest.mark.parametrize(("name", "nearest"), [("rotations", "rotation"), ("Blurr", "blur"), ("dark", "darkness")])
def test_unknown_shift_names_the_nearest(name, nearest, originals):
    with pytest.raises(ValueError, match=f"shift '{name}' is none of .*; the nearest is '{nearest}'"):
        shifts.apply_shift(name, originals[0], 3, rng())


def test_wild_severity_has_no_nearest():
    with pytest.raises(ValueError, match=r"severity 'high' is none of 1, 2, 3, 4, 5$"):
        shifts.check_severity("high")
    with pytest.raises(ValueError, match="the nearest is 5"):
        shifts.check_severity(9)


class TestRandomShift:
    def test_each_shift_and_severity_is_as_likely_as_another(self, monkeypatch):
        drawn = Counter()

        def note(name, picture, severity, generator):
            drawn[name, severity] += 1
            return picture

        monkeypatch.setattr(shifts, "apply_shift", note)
        shift, picture = shifts.RandomShift(("none", "noise", "blur"), (2, 3, 5)), Image.new("RGB", (4, 4))
        for seed in range(1800):
            assert shift(picture, rng(seed)) is picture
        assert set(drawn) == {(name, severity) for name in ("noise", "blur") for severity in (2, 3, 5)}
        assert all(150 < count < 250 for count in drawn.values()), drawn
        assert 500 < 1800 - drawn.total() < 700

    def test_it_is_that_shift(self, originals):
        picture, generator = originals[0], rng(5)
        generator.integers(1), generator.integers(1)
        expected = shifts.apply_shift("darkness", picture, 4, generator)
        assert shifts.RandomShift(("darkness",), (4,))(picture, rng(5)).tobytes() == expected.tobytes()
