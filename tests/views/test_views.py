"""Geometry, samplers and the warp."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from torchvision.transforms import RandomResizedCrop

from metatpt.views import ViewBounds, affine, bounded, sample_views, warp

WIDE = ViewBounds(rotation=180.0, log_scale=3.0, stretch=1.0)


def matrices(values: dict[int, float], aspect: float = 1.0, flip: bool = False) -> torch.Tensor:
    parameters = torch.zeros(1, 1, 6)
    for place, value in values.items():
        parameters[0, 0, place] = value
    return affine(parameters, torch.tensor([[flip]]), torch.tensor([aspect]))


def canvas_of(picture: Image.Image, size: int) -> torch.Tensor:
    return TF.pil_to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))[None]


def test_identity_at_canvas_size_gives_the_canvas() -> None:
    canvas = torch.rand(1, 3, 64, 64)
    view = warp(canvas, matrices({}), 64)[:, 0]
    assert (view - canvas).abs().max() < 3e-5


def test_identity_at_half_size_is_an_exact_average() -> None:
    board = (torch.arange(448)[:, None] + torch.arange(448)) % 2 * 255
    view = warp(board.byte().expand(1, 3, -1, -1), matrices({}), 224)
    torch.testing.assert_close(view, torch.full_like(view, 0.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("degrees", [30, 90])
@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200)])
def test_rotation_of_a_rectangle_does_not_shear(width: int, height: int, degrees: int) -> None:
    picture = Image.new("RGB", (width, height))
    ImageDraw.Draw(picture).ellipse([width / 2 - 30, height / 2 - 30, width / 2 + 30, height / 2 + 30], fill="white")
    view = warp(canvas_of(picture, 128), matrices({2: math.radians(degrees)}, width / height), 64)[0, 0, 0] > 0.5
    wide, high = (int(view.any(dim).sum()) for dim in (0, 1))
    assert abs(wide - high) <= 1
    assert abs(wide - 0.6 * 64) <= 2


def test_zero_parameters_show_the_central_square() -> None:
    torch.manual_seed(0)
    picture = Image.fromarray((torch.rand(6, 12, 3) * 255).byte().numpy()).resize((192, 96), Image.Resampling.BICUBIC)
    view = warp(canvas_of(picture, 128), matrices({}, 2.0), 64)[0, 0]
    expected = TF.to_dtype(TF.pil_to_tensor(picture.crop((48, 0, 144, 96)).resize((64, 64))), torch.float32, scale=True)
    assert (view - expected).abs().mean() < 0.01


def test_known_directions() -> None:
    canvas = torch.zeros(1, 3, 128, 128)
    canvas[:, :, 32:48, 96:112] = 1  # right of the centre, above it

    def centre(view: torch.Tensor) -> list[float]:
        mass = view[0, 0, 0]
        place = torch.arange(64.0) - 31.5
        return [float((mass.sum(0) * place).sum() / mass.sum()), float((mass.sum(1) * place).sum() / mass.sum())]

    assert centre(warp(canvas, matrices({}), 64)) == pytest.approx([20, -12], abs=0.2)
    assert centre(warp(canvas, matrices({}, flip=True), 64)) == pytest.approx([-20, -12], abs=0.2)
    # The view's centre moves right, so the picture moves left.
    assert centre(warp(canvas, matrices({0: 0.25}), 64)) == pytest.approx([12, -12], abs=0.2)
    # The view turns clockwise, so the picture turns the other way.
    assert centre(warp(canvas, matrices({2: math.pi / 2}), 64)) == pytest.approx([-12, -20], abs=0.2)
    assert centre(warp(canvas, matrices({3: math.log(2)}), 64, "zeros")) == pytest.approx([10, -6], abs=0.2)


def test_whole_picture_is_not_aliased() -> None:
    stripes = (torch.arange(4000) % 2 * 255).byte().expand(3000, -1)
    picture = Image.fromarray(stripes.numpy()).convert("RGB")
    ratio = 4 / 3
    whole = {3: math.log(math.sqrt(ratio)), 4: math.log(math.sqrt(ratio))}
    view = warp(canvas_of(picture, 128), matrices(whole, ratio), 64)[0, 0]
    reference = TF.to_dtype(
        TF.pil_to_tensor(picture.resize((64, 64), Image.Resampling.BICUBIC)), torch.float32, scale=True
    )
    assert view.std() < 0.02
    assert abs(view.mean() - reference.mean()) < 0.02


def test_warp_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    canvas = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    theta = affine(
        bounded(torch.randn(2, 3, 6, dtype=torch.float64), ViewBounds()),
        torch.rand(2, 3) < 0.5,
        torch.tensor([1.4, 0.8]),
    )
    views = warp(canvas, theta, 5, "border")
    for b, v, row, column in [(0, 0, 0, 0), (1, 2, 4, 3), (0, 1, 2, 2), (1, 0, 3, 0)]:
        u = torch.tensor([(2 * column + 1) / 5 - 1, (2 * row + 1) / 5 - 1, 1.0], dtype=torch.float64)
        x, y = (((theta[b, v] @ u + 1) * 16 - 1) / 2).clamp(0, 15).tolist()
        x0, y0 = min(int(x), 14), min(int(y), 14)
        square = canvas[b, :, y0 : y0 + 2, x0 : x0 + 2]
        across = square[..., 0] * (1 - (x - x0)) + square[..., 1] * (x - x0)
        expected = across[:, 0] * (1 - (y - y0)) + across[:, 1] * (y - y0)
        torch.testing.assert_close(views[b, v, :, row, column], expected)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_gradcheck(padding: str) -> None:
    torch.manual_seed(3)
    canvas = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    raw = torch.tensor([[[0.131, -0.0531, 0.213, -0.313, 0.171, 0.093]]], dtype=torch.float64, requires_grad=True)
    flip, aspect = torch.tensor([[True]]), torch.tensor([1.31])

    def view(raw: torch.Tensor) -> torch.Tensor:
        return warp(canvas, affine(bounded(raw, ViewBounds()), flip, aspect), 3, padding)

    assert torch.autograd.gradcheck(view, raw)
    assert torch.autograd.gradgradcheck(view, raw)


@pytest.mark.parametrize("init", ["crop", "affine"])
@pytest.mark.parametrize("aspect", [0.4, 1.0, 2.0, 30.0])
def test_starts_lie_within_their_bounds(init: str, aspect: float) -> None:
    raw, flip = sample_views(init, ViewBounds(), 200, torch.tensor([aspect]), [5], seed=1)
    assert raw.shape == (1, 200, 6)
    assert raw.dtype == torch.float32
    assert raw.tanh().abs().max() <= 0.9 + 1e-6
    assert 60 < int(flip.sum()) < 140


def test_crops_are_torchvisions() -> None:
    # The same boxes, by both codes' own random numbers: compare the distributions.
    width, height, n = 300, 200, 4000
    raw, _ = sample_views(
        "crop", ViewBounds(translation=10, log_scale=20, stretch=10), n, torch.tensor([1.5]), [0], seed=0
    )
    parameters = bounded(raw, ViewBounds(translation=10, log_scale=20, stretch=10))[0]
    side = parameters[:, 3].exp() * height  # frame: the shorter side
    w, h = side * parameters[:, 4].exp(), side * (-parameters[:, 4]).exp()
    left = (parameters[:, 0] + 1) / 2 * width - w / 2
    top = (parameters[:, 1] + 1) / 2 * height - h / 2
    assert left.min() > -1e-2
    assert top.min() > -1e-2
    assert (left + w).max() < width + 1e-2
    assert (top + h).max() < height + 1e-2
    torch.manual_seed(0)
    boxes = torch.tensor(
        [RandomResizedCrop.get_params(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ).float()
    for ours, theirs in zip((top, left, h, w), boxes.T, strict=True):
        for quantile in (0.1, 0.5, 0.9):
            assert abs(float(ours.quantile(quantile)) - float(theirs.quantile(quantile))) < 7  # pixels


def test_a_start_depends_on_seed_and_index_alone() -> None:
    aspect = torch.tensor([1.0, 1.5, 0.7])
    together, flips = sample_views("crop", ViewBounds(), 8, aspect, [4, 9, 2], seed=3)
    alone, flip = sample_views("crop", ViewBounds(), 8, aspect[1:2], [9], seed=3)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(flips[1:2], flip)
    other, _ = sample_views("crop", ViewBounds(), 8, aspect[1:2], [9], seed=4)
    assert not torch.equal(alone, other)


def test_errors_echo_shapes() -> None:
    with pytest.raises(ValueError, match=r"Expected parameters of shape \[B, V, 6\], got \[4, 3\]"):
        affine(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool), torch.ones(4))
    with pytest.raises(ValueError, match=r"Expected flip of shape \[4, 3\]"):
        affine(torch.zeros(4, 3, 6), torch.zeros(4, 2, dtype=torch.bool), torch.ones(4))
    with pytest.raises(ValueError, match=r"got \[1, 3, 8, 8\] and \[2, 1, 2, 3\]"):
        warp(torch.zeros(1, 3, 8, 8), torch.zeros(2, 1, 2, 3), 4)
    with pytest.raises(ValueError, match="view bound rotation is -1"):
        ViewBounds(rotation=-1)
