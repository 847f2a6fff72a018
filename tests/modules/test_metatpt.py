"""MetaTPT against a plain implementation, finite differences, and its own definitions."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.batches import NAMES, make_batch
from helpers.models import save_folder
from helpers.reference import metatpt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metatpt.functional import take_views
from metatpt.modules import MetaTPTModule
from metatpt.modules import metatpt as metatpt_file
from metatpt.modules.losses import INNER, teacher
from metatpt.modules.tuning import PromptSteps
from metatpt.types import Batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder("openai_vit", tmp_path_factory.mktemp("clip"))


def make(folder: Path, **options: Any) -> MetaTPTModule:
    return MetaTPTModule(**{"clip": str(folder), "class_names": NAMES, "n_views": 12, "outer_steps": 3, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"predict": "original"},
        {"schedule": "nested"},
        {"schedule": "joint"},
        {"augmentation": "fixed"},
        {"inner_steps": 3},
        {"outer_lr": 0.01},
        {"n_views": 1},
        {"n_views": 9, "selection": 0.1},
        {"ensemble_temperature": 2.0, "selection": 1.0},
    ],
    ids=str,
)
def test_equals_a_plain_implementation(folder: Path, options: dict[str, Any]) -> None:
    module = make(folder, **options).double()
    # One view is its own teacher: its first gradient is rounding noise, in both implementations.
    tolerance = 1e-5 if module.n_views == 1 else 1e-6
    for seed in range(3):
        batch = make_batch(1, 32, seed=seed, first_index=seed)
        result, expected = module.process(batch).log_probs[0].exp(), metatpt(module, batch).float()
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)


def test_only_selected_views_are_computed_and_nothing_is_lost(folder: Path) -> None:
    module = make(folder, inner_steps=2, selection=0.25).double()
    batch = make_batch(2, 32)
    look = module.look(batch)
    learned = module.inner_loop(batch, look, None, module.prompt.head())
    # All views on the tape, and the loss on the chosen ones:
    from metatpt.functional import marginal_entropy
    from metatpt.views import sample_views

    raw, flip = sample_views("crop", module.bounds, 11, batch.aspect, [0, 1], 0)
    raw = raw.double()
    for _ in range(2):
        raw = raw.detach().requires_grad_()
        views = torch.cat([batch.image[:, None].double(), module.warp(batch, raw, flip)], dim=1)
        log_probs = module.log_probs(module.prompt.head(), module.prompt.encode(views))
        (gradient,) = torch.autograd.grad(marginal_entropy(take_views(log_probs, look.chosen)).sum(), raw)
        length = gradient.norm(dim=-1, keepdim=True)
        raw = raw - module.inner_lr * gradient / length.where(length > 0, 1)
    everything = torch.cat([raw.new_zeros(2, 1, 6), raw], dim=1).detach()
    torch.testing.assert_close(learned.raw, take_views(everything, look.chosen), atol=1e-9, rtol=0)


def outer_loss(module: MetaTPTModule, batch: Batch, monkeypatch: pytest.MonkeyPatch):
    """The loss of the first outer step as a function of the context, inner loop included, and its gradient."""
    caught, frozen = [], []
    look = module.look(batch)
    monkeypatch.setattr(PromptSteps, "take", lambda self, at, loss, keep=False: caught.append((at, loss.sum())))

    def once(*args):
        frozen.append(teacher(*args))
        return frozen[0]

    monkeypatch.setattr(metatpt_file, "teacher", once)
    module.outer_steps = 1

    def loss(context: Tensor) -> Tensor:
        module.outer_loop(batch, look, {"context": context})
        return caught[-1][1]

    def gradient(context: Tensor) -> Tensor:
        value = loss(context)
        return torch.autograd.grad(value, caught[-1][0]["context"])[0]

    return loss, gradient, module.start_state(len(batch))["context"].clone()


SECOND_ORDER = [
    ("timm", {}),
    ("modified_resnet", {}),
    ("openai_vit", {}),
    ("openai_vit", {"selection": 1.0}),  # the original is in S: a gradient that is zero is normalised
    ("openai_vit", {"inner_steps": 2, "inner_momentum": 0.5}),
    (
        "openai_vit",
        {"inner_optimizer": "sgd", "inner_lr": 2.0, "inner_loss": {"entropy": 1.0, "marginal_entropy": 0.5}},
    ),
    (
        "openai_vit",
        {"inner_loss": {"diversity": 1.0, "consistency": 0.2}, "outer_loss": {"js": 1.0, "marginal_entropy": 0.5}},
    ),
]


@pytest.mark.parametrize(("kind", "options"), SECOND_ORDER, ids=str)
def test_second_order_gradient_agrees_with_finite_differences(
    tmp_path: Path, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(
        save_folder(kind, tmp_path), order="second", schedule="nested", class_names=NAMES[:2], n_views=8, **options
    )
    module.double()
    batch = make_batch(2, module.preprocessing.size)
    loss, gradient_at, context = outer_loss(module, batch, monkeypatch)
    gradient = gradient_at(context)
    torch.manual_seed(0)
    for _ in range(3):
        direction = torch.randn_like(context)
        step = 1e-6 * direction
        above, below = (loss(context + sign * step) for sign in (1, -1))
        numeric = (above - below) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-4, abs=1e-8)


def test_first_order_is_another_gradient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for order in ("first", "second"):
        module = make(folder, order=order, schedule="nested", inner_lr=1.0).double()
        _, gradient_at, context = outer_loss(module, make_batch(2, 32), monkeypatch)
        gradients.append(gradient_at(context))
    first, second = gradients
    assert (first - second).norm() > 1e-3 * second.norm()


ALL = [
    {},
    {"order": "second", "schedule": "nested"},
    {"schedule": "joint"},
    {"augmentation": "random_step"},
    {"inner_optimizer": "adam"},
    {"outer_optimizer": "sgd", "outer_lr": 0.1},
    {"outer_optimizer": "normalised_sgd"},
    {"init": "affine", "predict": "original"},
    {"inner_loss": "diversity", "outer_loss": {"kl": 1.0, "js": 0.3, "marginal_entropy": 0.2}},
]


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_batch_gives_what_its_samples_give_alone(folder: Path, options: dict[str, Any]) -> None:
    module = make(folder, **options)
    batch = make_batch(8, 32)
    together = module.process(batch)
    for row in range(8):
        alone = module.process(batch.select([row]))
        torch.testing.assert_close(together.log_probs[row].exp(), alone.log_probs[0].exp(), atol=1e-5, rtol=0)
    assert not torch.allclose(together.log_probs, together.zero_shot_log_probs, atol=1e-3)


@pytest.mark.parametrize("augmentation", ["episodic", "random_step"])
def test_length_of_an_inner_step(folder: Path, augmentation: str) -> None:
    module = make(folder, augmentation=augmentation, n_views=32).double()
    look = module.look(batch := make_batch(3, 32))
    learned = module.inner_loop(batch, look, None, module.prompt.head())
    length = (learned.raw - look.raw).norm(dim=-1)
    torch.testing.assert_close(length[~look.original], torch.full_like(length[~look.original], 0.3))
    assert (length[look.original] == 0).all()
    # whatever its parameters, the original is the model's own view 0
    pixels = module.selected_pixels(batch, look, learned.raw)
    for row in range(3):
        for place in look.original[row].nonzero().flatten():
            torch.testing.assert_close(pixels[row, place], batch.image[row].double())


def test_fixed_views_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(folder, augmentation="fixed")
    passes = []
    encode = module.clip.encode_image
    monkeypatch.setattr(
        module.clip, "encode_image", lambda images, **kw: passes.append(len(images)) or encode(images, **kw)
    )
    module.process(make_batch(2, 32))
    assert sum(passes) == 24


@pytest.mark.parametrize("schedule", ["sequential", "nested", "joint"])
def test_what_does_not_move_is_not_encoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    module = make(folder, schedule=schedule, outer_steps=3, selection=0.5)
    batch = make_batch(3, 32)
    chosen = module.look(batch).chosen
    moving = int((chosen != 0).sum())
    assert 0 < moving < chosen.numel()  # the original is among the confident views of one picture, and not of all
    passes, graphs, texts = [], [], []
    images, prompts = module.clip.encode_image, module.clip.encode_prompts

    def encode_image(views: Tensor, **kw: Any) -> Tensor:
        (graphs if views.requires_grad else passes).append(len(views))
        return images(views, **kw)

    monkeypatch.setattr(module.clip, "encode_image", encode_image)
    monkeypatch.setattr(module.clip, "encode_prompts", lambda *args, **kw: texts.append(1) or prompts(*args, **kw))
    module.process(batch)
    inner_loops = 1 if schedule == "sequential" else 3
    assert sum(graphs) == inner_loops * moving
    assert sum(passes) == 3 * 12 + (1 if schedule == "joint" else inner_loops) * moving
    texts.clear()
    module.process(batch)
    assert len(texts) == 3 * 3  # each picture's prompt after each of three steps; the initial one is kept


class Reads(TorchDispatchMode):
    """Counts single values that the host reads (`item`, `bool`, `float`): on a GPU each waits for all work before it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "nested", "order": "second"}, {"schedule": "joint"}, {"inner_optimizer": "sgd"}],
    ids=str,
)
def test_the_loops_read_nothing_from_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    module = make(folder, outer_steps=2, **options)
    module.process(make_batch(1, 32))  # what is read and measured once for a run
    counts = []
    for name in ("outer_loop", "joint_loop"):
        loop = getattr(module, name)

        def counted(*args: Any, loop: Any = loop) -> Any:
            with Reads() as reads:
                result = loop(*args)
            counts.append(reads.count)
            return result

        monkeypatch.setattr(module, name, counted)
    module.process(make_batch(2, 32))
    assert counts == [0]
    with Reads() as reads:
        bool(torch.ones(1))
    assert reads.count == 1


def test_averaged_control_needs_no_tuning(folder: Path) -> None:
    batch = make_batch(2, 32)
    tuned, untuned = make(folder).process(batch), make(folder, outer_steps=0, augmentation="fixed").process(batch)
    torch.testing.assert_close(tuned.averaged_log_probs, untuned.averaged_log_probs)
    torch.testing.assert_close(untuned.log_probs, untuned.averaged_log_probs)
    torch.testing.assert_close(tuned.zero_shot_log_probs, untuned.zero_shot_log_probs)


def test_online_augmentation_carries_views_over(folder: Path) -> None:
    module = make(folder, augmentation="online")
    batch = make_batch(2, 32)
    first, second = batch.select([0]), batch.select([1])
    module.process(first)
    after = module.process(second)
    module.start_run()
    fresh = module.process(second)
    assert not torch.equal(after.log_probs, fresh.log_probs)
    torch.testing.assert_close(fresh.log_probs, make(folder).process(second).log_probs)
    with pytest.raises(ValueError, match=r"index order; 0 came after 1"):
        module.process(first)
    module.start_run()
    with pytest.raises(ValueError, match=r"batch_size 1, not batches of 2"):
        module.process(batch)


def test_a_loss_that_is_not_finite_keeps_zero_shot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(folder)
    batch = make_batch(3, 32)
    expected = module.process(batch)
    warp = module.warp

    def broken(batch, raw, flip):
        views = warp(batch, raw, flip).clone()
        views[batch.index == 1] = torch.nan
        return views

    monkeypatch.setattr(module, "warp", broken)
    result = module.process(batch)
    assert result.status == ["ok", "kept_zero_shot", "ok"]
    assert "not finite" in result.reason[1]
    torch.testing.assert_close(result.log_probs[1], expected.zero_shot_log_probs[1])
    torch.testing.assert_close(result.log_probs[[0, 2]], expected.log_probs[[0, 2]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inner_steps": 2},
        {"schedule": "joint"},
        {"order": "second", "schedule": "nested"},
        {"inner_optimizer": "adam"},
    ],
    ids=str,
)
def test_an_inner_loss_that_is_not_finite(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    # CPU's grid_sample crashes the process on a grid of NaN in its backward pass, and hides it in its forward pass.
    module = make(folder, **options)
    batch = make_batch(3, 32)
    expected = module.process(batch)
    right = INNER["marginal_entropy"]
    factor = torch.tensor([1.0, torch.nan, 1.0])
    monkeypatch.setitem(INNER, "marginal_entropy", lambda p: right(p) * factor)
    result = module.process(batch)
    assert result.status == ["ok", "kept_zero_shot", "ok"]
    torch.testing.assert_close(result.log_probs[[0, 2]].exp(), expected.log_probs[[0, 2]].exp(), atol=1e-5, rtol=0)


def test_a_stream_survives_a_loss_that_is_not_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(folder, augmentation="online")
    batch = make_batch(4, 32)
    right = INNER["marginal_entropy"]
    status = []
    for row in range(4):
        monkeypatch.setitem(INNER, "marginal_entropy", lambda p, row=row: right(p) * (torch.nan if row == 1 else 1.0))
        status += module.process(batch.select([row])).status
    assert status == ["ok", "kept_zero_shot", "ok", "ok"]


def test_what_a_stream_carries_over(folder: Path) -> None:
    module = make(folder, augmentation="online", selection=0.5).double()
    batch = make_batch(2, 32)
    first = batch.select([0])
    look = module.look(first)
    learned = module.inner_loop(first, look, None, module.prompt.head())
    added = (learned.raw - look.raw)[0][~look.original[0]].mean(0)
    drawn = module.look(batch.select([1]))
    module.process(first)
    start = module.start_views(first, torch.zeros(1, 1, 6, dtype=torch.float64))
    torch.testing.assert_close(start[0, 0], added)
    # and a start never leaves its bounds
    module._offset = torch.full((6,), 100.0, dtype=torch.float64)
    assert module.start_views(first, drawn.raw).tanh().max() <= 0.9 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_loss": "entrpy"}, "inner_loss is 'entrpy'.*did you mean 'entropy'"),
        ({"inner_loss": {}}, "inner_loss is empty"),
        ({"inner_loss": "adversarial"}, "adversarial without anchor"),
        ({"outer_loss": {"anchor": 1.0}}, "outer_loss is 'anchor'; expected one of consistency"),
        ({"inner_optimizer": "adamw"}, "inner_optimizer is 'adamw'; expected one of normalised_sgd, sgd, adam"),
        ({"inner_optimizer": "adam", "order": "second"}, "adam cannot be differentiated"),
        ({"schedule": "joint", "order": "second"}, "use order first"),
        ({"schedule": "joint", "augmentation": "random_step"}, "no inner loop"),
        ({"schedule": "joint", "inner_steps": 2}, "inner_steps 2 would do nothing"),
        ({"selection": 0.0}, "selection is 0.0; expected a number above 0 and at most 1"),
        ({"n_views": 0}, "n_views is 0"),
        ({"outer_lr_relative": None}, "both null"),
        ({"outer_lr": -1.0}, "outer_lr is -1"),
        ({"augmentation": "ofline"}, "augmentation is 'ofline'.*'offline'"),
        ({"template": "ensemble"}, "tunes the words of one template"),
        ({"template": "{} in a photo"}, "nothing to tune"),
        ({"class_names": []}, "class_names is empty"),
    ],
)
def test_options_that_do_not_work_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


def test_given_views_cannot_move(folder: Path) -> None:
    with pytest.raises(ValueError, match="use augmentation fixed, not episodic"):
        make(folder).adapt_views(torch.rand(1, 4, 3, 32, 32))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize(("order", "graphs"), [("first", 1), ("second", 3)])
def test_graphs_that_an_inner_loop_holds_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, order: str, graphs: int
) -> None:
    """Second order keeps those of all inner steps, and of the views that they led to, until the prompt's gradient."""
    module = make(folder, order=order, inner_steps=2, outer_steps=1)
    held = []
    encode = module.clip.encode_image

    def counted(views: Tensor, **options: Any) -> Tensor:
        if views.requires_grad:
            held.append(options["held"])
        return encode(views, **options)

    monkeypatch.setattr(module.clip, "encode_image", counted)
    module.process(make_batch(2, 32))
    assert set(held) == {2 * graphs}


@pytest.mark.parametrize("order", ["first", "second"])
def test_memory_does_not_grow(folder: Path, order: str) -> None:
    module = make(folder, order=order, n_views=4, outer_steps=1, class_names=NAMES[:2])
    batch = make_batch(1, 32)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    for _ in range(50):
        module.process(batch)
    before = resident()
    for _ in range(450):
        module.process(batch)
    assert resident() - before < 20
