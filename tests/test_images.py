"""Decoding, view 0 and the canvas, against Pillow's, torchvision's and open_clip's own."""

import io
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile, ImageOps

from metatpt.images import (
    BACKGROUND,
    Sample,
    UnreadableImageError,
    canvas,
    collate,
    decode,
    empty_sample,
    preprocess,
    to_sample,
)
from metatpt.types import Preprocessing

P32 = Preprocessing(size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def open_clips(picture, preprocessing):
    """open_clip's own transform without normalisation."""
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(
            size=preprocessing.size,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            interpolation=preprocessing.interpolation,
            resize_mode=preprocessing.resize_mode,
            fill_color=preprocessing.fill_color,
        ),
        is_train=False,
    )
    return transform(picture)


def pixels(picture):
    return np.asarray(picture).astype(int)


# Decoding


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("opened", [False, True], ids=["path", "opened"])
def test_exif_orientation(tmp_path, orientation, opened):
    path = tmp_path / "a.jpg"
    picture = noise(6, 4).resize((60, 40))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif, quality=95)
    turned = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    sample = to_sample(Image.open(path) if opened else path, P32)
    assert sample.aspect == pytest.approx(40 / 60 if orientation >= 5 else 60 / 40)
    assert torch.equal(sample.image, open_clips(turned, P32))
    expected = np.asarray(turned.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(sample.canvas.numpy(), expected)
    assert decode(path, plain=True).size == (60, 40)


def test_an_opened_picture_stays_as_it_is():
    picture = noise(20, 10).convert("RGBA")
    picture.putalpha(0)
    decode(picture)
    assert picture.mode == "RGBA"
    assert picture.size == (20, 10)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey(tmp_path, suffix):
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16)
    levels[128] = 32768
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.tile(levels, (4, 1))).save(path)
    row = pixels(decode(path))[0]
    assert (row[:, 0] == row[:, 1]).all()
    assert row[0, 0] == 0
    assert abs(row[128, 0] - 128) <= 1
    assert row[255, 0] == 255
    assert len(np.unique(row)) >= 250


def test_16_bit_grey_with_a_transparent_level(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16)).save(path, transparency=1000)
    assert pixels(decode(path))[0].tolist() == [[0, 0, 0], list(BACKGROUND), [255, 255, 255]]


def hidden(mode, colour):
    """A picture whose left half is transparent; `colour` is what lies under it."""
    picture = Image.new("RGBA", (16, 16), (*colour, 0))
    picture.paste((0, 0, 255, 255), (8, 0, 16, 16))
    if mode == "LA":
        grey = Image.new("LA", (16, 16), (colour[0], 0))
        grey.paste((29, 255), (8, 0, 16, 16))
        return grey
    if mode == "P":
        palette = Image.new("P", (16, 16), 0)
        palette.putpalette([*colour, 0, 0, 255])
        palette.paste(1, (8, 0, 16, 16))
        palette.info["transparency"] = 0
        return palette
    return picture


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("P", "gif")]
)
def test_hidden_colours_do_not_show(tmp_path, mode, suffix):
    decoded = []
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        path = tmp_path / f"{name}.{suffix}"
        hidden(mode, colour).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
        decoded.append(pixels(decode(path)))
    assert (decoded[0] == decoded[1]).all()
    assert (decoded[0][:, :8] == BACKGROUND).all()


def test_palette_with_alpha_bytes(tmp_path):
    path = tmp_path / "a.png"
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    picture.save(path, transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns in convert("RGB"): not the user's business
        assert pixels(decode(path))[0].tolist() == [[255, 255, 255], [127, 127, 255]]
        assert pixels(decode(path, plain=True))[0].tolist() == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "I"])
def test_every_mode_becomes_rgb(mode):
    picture = noise(8, 8)
    converted = Image.new(mode, (8, 8)) if mode in ("LAB", "I") else picture.convert(mode)
    decoded = decode(converted)
    assert decoded.mode == "RGB"
    if mode not in ("I", "LAB"):
        assert (pixels(decoded) == pixels(converted.convert("RGB"))).all()


@pytest.mark.parametrize("opened", [False, True], ids=["path", "opened"])
def test_floats_have_no_known_range(tmp_path, opened):
    path = tmp_path / "a.tif"
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path)
    source = Image.open(path) if opened else path
    with pytest.raises(UnreadableImageError, match=r"floating-point pixels \(mode F\).*without a known range"):
        decode(source)
    sample = to_sample(source, P32)
    assert sample.error.startswith("floating-point")
    assert not sample.image.any()


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = pixels(decode(tmp_path / "a.jpg"))[0, 0]
    assert red > 200
    assert max(green, blue) < 60


def test_gif_named_jpg_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    path = (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert (pixels(decode(path)) == (255, 0, 0)).all()


def test_a_damaged_exif_block_costs_nothing(tmp_path):
    noise(8, 8).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "a.jpg").size == (8, 8)


# What cannot be read


def jpeg_bytes(picture):
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    return stream.getvalue()


def test_half_a_jpeg(tmp_path):
    content = jpeg_bytes(noise(64, 64))
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    Image.open(tmp_path / "a.jpg").verify()  # does not see it
    with pytest.raises(UnreadableImageError, match=r"damaged picture: .*truncated"):
        decode(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImageError, match=r"damaged picture: .*truncated"):
        decode(Image.open(tmp_path / "a.jpg"))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("cut", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_pictures_of_every_kind_are_named(tmp_path, kind, cut):
    stream = io.BytesIO()
    noise(64, 64).save(stream, kind)
    content = stream.getvalue()
    (tmp_path / "a").write_bytes(content[: int(cut * len(content))])
    sample = to_sample(tmp_path / "a", P32, label=3, index=5, path="a")
    assert sample.error
    assert (sample.label, sample.index, sample.path) == (3, 5, "a")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty file"), (b"not a picture\n" * 10, r"not a picture .*140 bytes")]
)
def test_no_picture(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason):
        decode(tmp_path / "a.jpg")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnreadableImageError, match="No such file"):
        decode(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImageError, match="directory"):
        decode(tmp_path)


@pytest.mark.parametrize("size", [(20_000, 10_000), (10_000, 10_000)], ids=["over twice the limit", "over the limit"])
def test_decompression_bomb_is_named_with_its_size(tmp_path, size):
    path = tmp_path / "a.png"
    Image.new("1", size).save(path)
    limit = Image.MAX_IMAGE_PIXELS
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = to_sample(path, P32)
    assert sample.error
    assert f"{size[0]} x {size[1]}" in sample.error
    assert str(size[0] * size[1]) in sample.error
    assert limit == Image.MAX_IMAGE_PIXELS == 89_478_485
    assert warnings.filters == filters


def test_a_raised_limit_is_respected(tmp_path, monkeypatch):
    noise(20, 10).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with pytest.raises(UnreadableImageError, match="20 x 10 = 200 pixels, more than 150"):
        decode(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(tmp_path / "a.png").size == (20, 10)


def test_picture_without_pixels():
    with pytest.raises(UnreadableImageError, match="without pixels \\(0 x 5\\)"):
        decode(Image.new("RGB", (0, 5)))


# Tensors


def test_tensors():
    picture = noise(7, 5)
    as_bytes = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for tensor in (as_bytes, as_bytes.float() / 255, as_bytes.double() / 255):
        assert (pixels(decode(tensor)) == pixels(picture)).all()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(5, 7), r"shape \[3, H, W\], got \[5, 7\]"),
        (torch.zeros(2, 3, 5, 7), r"got \[2, 3, 5, 7\]"),
        (torch.zeros(5, 7, 3), r"got \[5, 7, 3\]"),
        (torch.zeros(3, 0, 7), "without pixels"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), "uint8.*got torch.int64"),
        (torch.full((3, 5, 7), 255.0), r"\[0, 1\], got 255 to 255"),
        (torch.full((3, 5, 7), -0.1), r"got -0.1 to -0.1"),
        (torch.full((3, 5, 7), torch.nan), r"got nan"),
    ],
)
def test_other_tensors_are_named(tensor, message):
    with pytest.raises(UnreadableImageError, match=message):
        decode(tensor)


def test_other_types_are_a_mistake_in_the_code():
    with pytest.raises(TypeError, match="got ndarray"):
        decode(np.zeros((5, 7, 3), dtype=np.uint8))


# View 0


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(
    "size",
    [(1, 1), (5, 3), (33, 33), (32, 32), (32, 50), (64, 31), (107, 363), (363, 107), (245, 823), (500, 499), (3, 90)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_view_0_is_open_clips(size, resize_mode, interpolation):
    if resize_mode == "longest" and size == (3, 90):
        size = (3, 60)
    preprocessing = Preprocessing(33, (0,) * 3, (1,) * 3, interpolation, resize_mode, fill_color=77)
    picture = noise(*size)
    image = preprocess(picture, preprocessing)
    assert image.dtype == torch.float32
    assert image.shape == (3, 33, 33)
    assert torch.equal(image, open_clips(picture, preprocessing))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(9000, 10), (10, 9000), (4000, 7), (7, 4001), (20_000, 90)])
def test_long_pictures_are_cropped_before_they_are_resized(monkeypatch, size, interpolation):
    preprocessing = Preprocessing(64, (0,) * 3, (1,) * 3, interpolation)
    picture = noise(*size)
    reference = open_clips(picture, preprocessing)
    monkeypatch.setattr("metatpt.images._SMALL", 0)
    assert (preprocess(picture, preprocessing) - reference).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("size", [(30_000, 10), (10, 30_000)], ids=["wide", "tall"])
def test_memory_of_30000_by_10(tmp_path, size):
    noise(*size).save(tmp_path / "a.png")
    script = """
        import resource, sys, torch
        from metatpt.images import to_sample
        from metatpt.types import Preprocessing
        preprocessing = Preprocessing(224, (0,) * 3, (1,) * 3)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sample = to_sample(sys.argv[1], preprocessing)
        assert sample.error is None
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        torch.save(sample.image, sys.argv[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a.png"), str(tmp_path / "a.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout) < 300 * 1024  # kilobytes
    # What open_clip makes of it, without its 1.6 GB: the resized middle depends on the 40 pixels around it alone.
    middle = Image.open(tmp_path / "a.png").crop(
        (14_980, 0, 15_020, 10) if size[0] > size[1] else (0, 14_980, 10, 15_020)
    )
    reference = open_clips(middle, Preprocessing(224, (0,) * 3, (1,) * 3))
    assert (torch.load(tmp_path / "a.pt", weights_only=True) - reference).abs().max() <= 1.01 / 255


def test_longest_of_a_very_long_picture_keeps_a_line():
    preprocessing = Preprocessing(32, (0,) * 3, (1,) * 3, resize_mode="longest")
    assert preprocess(Image.new("RGB", (3000, 1), "white"), preprocessing).sum() == 3 * 32


def test_fine_stripes_become_even_grey():
    stripes = np.zeros((3000, 4000, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    sample = to_sample(Image.fromarray(stripes), P32)
    for view in (sample.image, sample.canvas / 255):
        assert view.std() < 0.02
        assert abs(view.mean() - 0.5) < 0.02


def test_canvas_is_the_whole_picture():
    picture = Image.new("RGB", (400, 100), "black")
    ImageDraw.Draw(picture).rectangle((0, 0, 99, 99), fill="white")  # outside the centre crop
    whole = canvas(picture, 64)
    assert whole.dtype == torch.uint8
    assert whole.shape == (3, 64, 64)
    assert whole[:, :, :14].min() > 250
    assert whole[:, :, 18:].max() < 5


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_thin_pictures(size):
    sample = to_sample(noise(*size), P32)
    assert sample.error is None
    assert sample.aspect == size[0] / size[1]
    assert sample.image.isfinite().all()


# Batches


def test_collate_stacks_samples():
    good = to_sample(noise(40, 20), P32, label=1, index=7, path="a/b.png", epoch=4)
    bad = to_sample("/no/such/file.png", P32, label=2, index=8, path="a/c.png", epoch=4)
    batch = collate([good, bad, empty_sample(P32)])
    assert batch.epoch.tolist() == [4, 4, 0]
    assert batch.select([2, 0]).to("cpu").epoch.tolist() == [0, 4]
    assert batch.image.is_contiguous()
    assert batch.canvas.is_contiguous()
    assert len(batch) == 3
    assert batch.image.shape == (3, 3, 32, 32)
    assert batch.canvas.shape == (3, 3, 64, 64)
    assert batch.aspect.tolist() == [2, 1, 1]
    assert batch.label.tolist() == [1, 2, -1]
    assert batch.index.tolist() == [7, 8, -1]
    assert batch.path == ["a/b.png", "a/c.png", ""]
    assert batch.error[0] is None
    assert "No such file" in batch.error[1]
    assert batch.error[2] is None
    assert batch.image[1:].abs().sum() == 0
    assert batch.canvas[1:].sum() == 0
    dtypes = [batch.image.dtype, batch.canvas.dtype, batch.aspect.dtype, batch.label.dtype]
    assert dtypes == [torch.float32, torch.uint8, torch.float32, torch.int64]
    assert (batch.index.dtype, batch.epoch.dtype) == (torch.int64, torch.int64)
    assert isinstance(good, Sample)
