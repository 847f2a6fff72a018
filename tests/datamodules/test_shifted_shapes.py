from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

from metatpt.datamodules.shifted_shapes import SIZES, ShiftedShapesDataModule, ShiftName
from metatpt.shapes import (
    CLASSES,
    COLORS,
    COMBINATIONS,
    DRAWN_SHIFTS,
    HELD_OUT,
    SHAPES,
    SHIFT_NAMES,
    SPLIT_SEEDS,
    TEXTURES,
    ShiftedShapes,
    class_name,
    draw_scene,
    shifted_scene,
)
from metatpt.types import Preprocessing

PREPROCESSING = Preprocessing(size=64, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3))
SHIFTED = SHIFT_NAMES[1:]


def pixels(data, index):
    return np.asarray(data[index][0], np.float32)


class TestShiftedShapes:
    @pytest.mark.parametrize("shift", SHIFT_NAMES)
    def test_a_sample_depends_on_split_and_index_alone(self, shift):
        small, large = ShiftedShapes("test", 30, shift), ShiftedShapes("test", 900, shift)
        backwards = {index: large[index] for index in (29, 24, 7, 0)}
        for index, (picture, label) in reversed(backwards.items()):
            assert small[index][0].tobytes() == picture.tobytes()
            assert small[index][1] == label == large.label(index)

    def test_splits_differ(self):
        splits = [ShiftedShapes(split, 48) for split in SPLIT_SEEDS]
        drawn = [data[index][0].tobytes() for data in splits for index in range(48)]
        assert len(set(drawn)) == len(drawn)
        val, test = ShiftedShapes("val", 48), ShiftedShapes("test", 48)
        assert [val.label(index) for index in range(48)] != [test.label(index) for index in range(48)]

    def test_no_training_picture_shows_a_held_out_combination(self):
        data = ShiftedShapes("train", 2000)
        shown = {data.scene(index).combination for index in range(len(data))}
        assert shown == set(COMBINATIONS) - set(HELD_OUT)
        assert shown == {data.combinations[data.label(index)] for index in range(len(data))}

    def test_parts_of_held_out_combinations_are_trained(self):
        trained = set(COMBINATIONS) - set(HELD_OUT)
        assert len(HELD_OUT) == len(COMBINATIONS) // 8
        for texture, color, shape in HELD_OUT:
            assert any(one[:2] == (texture, color) for one in trained)
            assert any(one[1:] == (color, shape) for one in trained)
            assert any((one[0], one[2]) == (texture, shape) for one in trained)

    def test_some_classes_are_held_out(self):
        assert {class_name(one) for one in set(CLASSES) & set(HELD_OUT)} == {
            "plain red triangle",
            "dotted yellow square",
            "plain green star",
            "dotted blue heart",
        }

    def test_color_and_shape_tell_the_class(self):
        """So an outline drawing, which has no texture, has one right answer."""
        assert len(CLASSES) == 24
        assert len({(color, shape) for _, color, shape in CLASSES}) == 24
        assert {texture for texture, _, _ in CLASSES} == set(TEXTURES)

    @pytest.mark.parametrize("split", ["val", "test", "few_shot"])
    def test_classes_are_balanced(self, split):
        data = ShiftedShapes(split, 72)
        assert set(Counter(data.label(index) for index in range(72)).values()) == {3}
        assert sorted(data.label(index) for index in range(24, 48)) == list(range(24))

    @pytest.mark.parametrize("shift", SHIFTED)
    def test_each_severity_changes_more_than_the_one_before(self, shift):
        """Mean absolute difference to the clean picture, over pictures.

        "scale" and "outline" take away a share of the object, "position" moves it: the differences are bounded by the
        object's own, so the last steps are small.
        """
        clean = ShiftedShapes("val", 12)
        change = []
        for severity in (1, 2, 3, 4, 5):
            data = ShiftedShapes("val", 12, shift, severity)
            change.append(np.mean([np.abs(pixels(data, index) - pixels(clean, index)).mean() for index in range(12)]))
            assert [data.label(index) for index in range(12)] == [clean.label(index) for index in range(12)]
        assert change[0] > 0.5
        assert np.all(np.diff(change) > 0), change

    @pytest.mark.parametrize("shape", SHAPES)
    def test_an_outline_drawing_is_a_line(self, shape):
        data = ShiftedShapes("train", 168)
        index = next(i for i in range(168) if data.scene(i).combination[2] == shape)
        scene = data.scene(index)
        rng = np.random.default_rng(0)
        outlined, _ = shifted_scene(scene, "outline", 5, rng)
        empty, _ = shifted_scene(scene, "scale", 5, rng)
        background = np.asarray(draw_scene(empty, np.random.default_rng(1)), np.float32)
        full = np.asarray(draw_scene(scene, np.random.default_rng(1)), np.float32)
        line = np.asarray(draw_scene(outlined, np.random.default_rng(1)), np.float32)
        inside, drawn = (np.abs(one - background).max(-1) > 40 for one in (full, line))
        assert 0.05 < drawn.mean() < 0.2
        assert (inside & ~drawn).sum() > 0.2 * inside.sum()

    @pytest.mark.parametrize("index", [-1, 30])
    def test_no_such_sample(self, index):
        with pytest.raises(IndexError, match=f"index {index}: the split has samples 0 to 29"):
            ShiftedShapes("test", 30)[index]

    def test_errors_name_what_there_is(self):
        with pytest.raises(ValueError, match=r"shift 'positions' is none of none, .*; the nearest is 'position'"):
            ShiftedShapes("test", 10, "positions")
        with pytest.raises(ValueError, match="severity 0 is none of 1, 2, 3, 4, 5; the nearest is 1"):
            ShiftedShapes("test", 10, "blur", 0)
        with pytest.raises(ValueError, match="split 'dev' is none of train, val, test, few_shot"):
            ShiftedShapes("dev", 10)
        with pytest.raises(ValueError, match="n 0: a split has at least 1 sample"):
            ShiftedShapes("test", 0)
        with pytest.raises(ValueError, match="'blur' is not drawn; those that are: " + ", ".join(DRAWN_SHIFTS)):
            shifted_scene(ShiftedShapes("val", 1).scene(0), "blur", 1, np.random.default_rng(0))

    def test_every_word_is_said(self):
        said = {word for one in COMBINATIONS for word in class_name(one).split()}
        assert said == {*TEXTURES, *COLORS, *SHAPES}


class TestDataModule:
    def module(self, **options):
        module = ShiftedShapesDataModule(**options)
        module.preprocessing = PREPROCESSING
        return module

    def test_smoke(self):
        module = self.module(batch_size=4, max_samples=24)
        assert module.class_names == [class_name(one) for one in CLASSES]
        module.setup("test")
        assert module.n_total == SIZES["test"]
        batches = list(module.test_dataloader())
        batch = batches[0]
        assert batch.image.shape == (4, 3, 64, 64)
        assert batch.canvas.shape == (4, 3, 128, 128)
        assert batch.canvas.dtype == torch.uint8
        assert batch.aspect.tolist() == [1.0] * 4
        assert batch.error == [None] * 4
        assert batch.path[0] == f"shifted_shapes/test/scale-3/{int(batch.index[0]):05d}"
        assert sorted(int(label) for one in batches for label in one.label) == list(range(24))

    def test_canvas_is_the_picture(self):
        module = self.module(shift="none", max_samples=3)
        module.setup("test")
        batch = next(iter(module.test_dataloader()))
        data = ShiftedShapes("test", SIZES["test"])
        for row, index in enumerate(batch.index.tolist()):
            picture, label = data[index]
            assert np.array_equal(batch.canvas[row].permute(1, 2, 0).numpy(), np.asarray(picture))
            assert batch.label[row] == label

    def test_workers_and_batches_change_nothing(self):
        runs = []
        for options in ({"batch_size": 3}, {"batch_size": 8, "num_workers": 1}):
            module = self.module(shift="clutter", max_samples=9, **options)
            module.setup("test")
            batches = list(module.test_dataloader())
            runs.append({int(i): image for batch in batches for i, image in zip(batch.index, batch.image, strict=True)})
        assert runs[0].keys() == runs[1].keys()
        assert all(torch.equal(image, runs[1][index]) for index, image in runs[0].items())

    def test_validation_is_another_split(self):
        module = self.module(shift="none", batch_size=1, max_samples=None)
        module.setup()
        val, test = next(iter(module.val_dataloader())), next(iter(module.test_dataloader()))
        assert val.index == test.index == 0
        assert not torch.equal(val.image, test.image)
        assert val.path == ["shifted_shapes/val/none/00000"]

    def test_training_has_clean_pictures_of_its_own(self):
        module = self.module(shift="noise", shots=2)
        module.setup("fit")
        assert Counter(module.pictures("train").labels) == dict.fromkeys(range(24), 64)
        data = ShiftedShapes("few_shot", SIZES["train"])
        batch = next(iter(module.train_dataloader()))
        for row, index in enumerate(batch.index.tolist()):
            picture, label = data[index]
            assert np.array_equal(batch.canvas[row].permute(1, 2, 0).numpy(), np.asarray(picture))
            assert batch.label[row] == label
            assert batch.path[row] == f"shifted_shapes/few_shot/none/{index:05d}"
        assert next(iter(module.val_dataloader())).path[0].startswith("shifted_shapes/val/noise-3/")

    def test_every_shift_is_an_option(self):
        assert get_args(ShiftName) == SHIFT_NAMES
        for shift in SHIFT_NAMES:
            assert self.module(shift=shift, severity=5).shift == shift

    @pytest.mark.parametrize("severity", [0, 6])
    def test_no_such_severity(self, severity):
        with pytest.raises(ValueError, match=f"severity {severity} is none of 1, 2, 3, 4, 5"):
            self.module(severity=severity)

    def test_no_such_shift(self):
        with pytest.raises(ValueError, match=r"shift 'rotate' is none of .*; the nearest is 'rotation'"):
            self.module(shift="rotate")
