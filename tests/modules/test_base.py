"""What all methods share."""

from __future__ import annotations

import copy
import enum
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.batches import NAMES, make_batch
from helpers.models import CONFIGS, save_folder
from torch import Tensor

from metatpt.clip.budget import Budget
from metatpt.modules import AdaptationModule, MetaTPTModule, TPTModule, ViewAverageModule, ZeroShotModule
from metatpt.modules.base import ENSEMBLE
from metatpt.modules.checkpoints import plain
from metatpt.types import Adaptation, Batch
from metatpt.views import ViewBounds

METHODS: list[tuple[type[AdaptationModule], dict[str, Any]]] = [
    (ZeroShotModule, {}),
    (ViewAverageModule, {"n_views": 6}),
    (TPTModule, {"n_views": 6}),
    (TPTModule, {"n_views": 6, "outer_lr": None, "outer_lr_relative": 0.5, "outer_steps": 4}),
    (MetaTPTModule, {"n_views": 6, "outer_steps": 2}),
]


@pytest.mark.parametrize(("kind", "options"), METHODS, ids=str)
def test_a_batch_gives_what_its_samples_give_alone(
    tiny_clip_folder: Path, kind: type[AdaptationModule], options: dict[str, Any]
) -> None:
    module = kind(clip=str(tiny_clip_folder), class_names=NAMES, **options)
    batch = make_batch(8, 32)
    together = module.process(batch)
    for row in range(8):
        alone = module.process(batch.select([row]))
        for name in ("log_probs", "zero_shot_log_probs", "averaged_log_probs"):
            if getattr(together, name) is not None:
                expected = getattr(together, name)[row].exp()
                torch.testing.assert_close(getattr(alone, name)[0].exp(), expected, atol=1e-5, rtol=0)
    assert (together.averaged_log_probs is None) == (kind is ZeroShotModule)


@pytest.mark.parametrize(("kind", "options"), METHODS, ids=str)
def test_unreadable_pictures_keep_their_row(
    tiny_clip_folder: Path, kind: type[AdaptationModule], options: dict[str, Any]
) -> None:
    module = kind(clip=str(tiny_clip_folder), class_names=NAMES, **options)
    batch = make_batch(4, 32)
    expected = module.process(batch)
    batch.error[1] = "it is cut off"
    batch.index[3] = -1
    result = module.process(batch)
    assert result.status == ["ok", "skipped", "ok", "skipped"]
    assert result.reason == ["", "it is cut off", "", "filler"]
    torch.testing.assert_close(result.log_probs[[0, 2]].exp(), expected.log_probs[[0, 2]].exp(), atol=1e-5, rtol=0)
    assert result.log_probs[[1, 3]].isnan().all()
    assert {name: len(values) for name, values in result.diagnostics.items()} == dict.fromkeys(expected.diagnostics, 4)
    batch.error[0] = batch.error[2] = "gone"
    nothing = module.process(batch)
    assert nothing.status == ["skipped"] * 4
    assert nothing.log_probs.isnan().all()


def test_initial_class_features_are_computed_once(tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = TPTModule(clip=str(tiny_clip_folder), class_names=NAMES, n_views=4)
    contexts = []
    encode = module.clip.encode_prompts
    monkeypatch.setattr(module.clip, "encode_prompts", lambda p, c=None, **kw: contexts.append(c) or encode(p, c, **kw))
    module.process(make_batch(1, 32))
    for size in (1, 3):
        before = len(contexts)
        module.process(make_batch(size, 32))
        assert len(contexts) - before == size  # one tuned prompt each; the initial one's graph is there
    # but not kept where the prompt was changed
    before = module.prompt.head()(torch.eye(24)[None])
    with torch.no_grad():
        module.prompt.tuned["context"].mul_(0)
    assert not torch.equal(before, module.prompt.head()(torch.eye(24)[None]))
    # nor where it was replaced, by parameters that were never written to
    heads = []
    for _ in range(2):
        module.prompt.tuned["context"] = torch.nn.Parameter(torch.randn_like(module.prompt.tuned["context"]))
        heads.append(module.prompt.head()(torch.eye(24)[None]))
    assert not torch.equal(*heads)


def test_eighty_templates(tiny_clip_folder: Path) -> None:
    import open_clip

    module = ZeroShotModule(clip=str(tiny_clip_folder), class_names=NAMES, template=ENSEMBLE)
    model, tokenizer = module.clip.model, module.clip.tokenizer
    rows = []
    for name in NAMES:
        texts = [each(name.replace("_", " ")) for each in open_clip.OPENAI_IMAGENET_TEMPLATES]
        rows.append(torch.nn.functional.normalize(model.encode_text(tokenizer(texts)), dim=-1).mean(0))
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    logits = module.prompt.head()(torch.eye(24)[None])[0].T / module.clip.logit_scale
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_text_after_the_class_name_stays(tiny_clip_folder: Path) -> None:
    template = "a photo of {}, a type of food."
    tuned = TPTModule(clip=str(tiny_clip_folder), class_names=NAMES, template=template, n_views=2)
    fixed = ZeroShotModule(clip=str(tiny_clip_folder), class_names=NAMES, template=template)
    unit = torch.eye(24)[None]
    torch.testing.assert_close(tuned.prompt.head()(unit), fixed.prompt.head()(unit), atol=1e-5, rtol=0)
    state = tuned.prompt.initial_state(1)
    assert state["context"].shape[1] == 3
    torch.testing.assert_close(tuned.prompt.head(state)(unit), fixed.prompt.head()(unit), atol=1e-5, rtol=0)


class Broken(AdaptationModule):
    """A user's method that fails on one sample, and on another the model itself does."""

    def adapt(self, batch: Batch) -> Adaptation:
        log_probs: Tensor = torch.zeros(len(batch), len(NAMES), dtype=torch.float64).log_softmax(-1)
        adapted, zero_shot = log_probs.clone(), log_probs.clone()
        adapted[batch.index == 1] = torch.nan
        zero_shot[batch.index == 2] = torch.nan
        return Adaptation(adapted, zero_shot)


def test_what_is_not_finite_is_settled_for_any_method(tiny_clip_folder: Path) -> None:
    result = Broken(clip=str(tiny_clip_folder), class_names=NAMES).process(make_batch(3, 32))
    assert result.status == ["ok", "kept_zero_shot", "skipped"]
    assert "not finite" in result.reason[1]
    assert "model's output" in result.reason[2]
    assert result.log_probs.dtype == torch.float32
    torch.testing.assert_close(result.log_probs[1], result.zero_shot_log_probs[1])


def save(module: AdaptationModule, path: Path) -> dict[str, Any]:
    """A checkpoint as Lightning writes it."""
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def test_a_checkpoint_holds_the_prompt_alone_and_no_code(tiny_clip_folder: Path, tmp_path: Path) -> None:
    options = {"clip": str(tiny_clip_folder), "bounds": ViewBounds(rotation=10.0), "inner_loss": {"entropy": 1.0}}
    module = MetaTPTModule(**options, class_names=NAMES)
    module.prompt.tuned["context"].data.add_(1.0)
    checkpoint = save(module, tmp_path / "a.ckpt")
    assert list(checkpoint["state_dict"]) == ["prompt.tuned.context"]
    assert (tmp_path / "a.ckpt").stat().st_size < module.prompt.tuned["context"].nbytes + 64 * 1024
    again = MetaTPTModule(**{**checkpoint["hyper_parameters"], "class_names": ["cat", "ox"]})
    assert again.bounds.rotation == 10
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=again.strict_loading)
    torch.testing.assert_close(again.prompt.tuned["context"], module.prompt.tuned["context"])


class Kind(enum.Enum):
    A = "a"


def test_options_of_any_type_load_without_code(tmp_path: Path) -> None:
    options = {
        "path": Path("x/y"),
        "kind": Kind.A,
        "list": [1, Path("z")],
        "bounds": ViewBounds(),
        "none": None,
        "f": 0.5,
    }
    torch.save(plain(options), tmp_path / "options.ckpt")
    loaded = torch.load(tmp_path / "options.ckpt", weights_only=True)
    assert loaded == {
        "path": "x/y", "kind": "a", "list": [1, "z"], "bounds": vars(ViewBounds()), "none": None, "f": 0.5
    }  # fmt: skip


def test_checkpoints_that_do_not_fit(tiny_clip_folder: Path, tmp_path: Path) -> None:
    module = TPTModule(clip=str(tiny_clip_folder), class_names=NAMES)
    checkpoint = save(module, tmp_path / "a.ckpt")
    other = TPTModule(clip=str(save_folder("openai_vit", tmp_path / "other", seed=1)), class_names=NAMES)
    with pytest.raises(ValueError, match=r"checkpoint was made for .*tiny .*choose that model with --model.clip"):
        other.on_load_checkpoint(checkpoint)
    longer = TPTModule(clip=str(tiny_clip_folder), class_names=NAMES, template="one more photo of a {}.")
    with pytest.raises(ValueError, match=r"prompt.tuned.context is \[4, 32\] in the checkpoint and \[5, 32\] here"):
        longer.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="no checkpoint of metatpt"):
        module.on_load_checkpoint({"state_dict": {}})


def test_inner_momentum_starts_afresh(tiny_clip_folder: Path) -> None:
    options = {"inner_momentum": 0.9, "inner_steps": 3, "n_views": 6, "outer_steps": 1}
    module = MetaTPTModule(clip=str(tiny_clip_folder), class_names=NAMES, **options)
    batch = make_batch(2, 32)
    alone = module.process(batch.select([1]))
    module.process(batch.select([0]))
    after = module.process(batch.select([1]))
    assert torch.equal(alone.log_probs, after.log_probs)
    # and what is learned reaches the outer loss
    fixed = MetaTPTModule(clip=str(tiny_clip_folder), class_names=NAMES, augmentation="fixed", **options)
    assert not torch.equal(alone.diagnostics["first_loss"], fixed.process(batch.select([1])).diagnostics["first_loss"])


@pytest.mark.parametrize("kind", ["modified_resnet", "custom_text", "bidirectional", "class_token", "timm"])
def test_every_kind_of_tower_runs(tmp_path: Path, kind: str) -> None:
    module = MetaTPTModule(
        clip=str(save_folder(kind, tmp_path)), class_names=["cat", "ox"], n_views=4, outer_steps=2, order="second"
    )
    result = module.process(make_batch(2, module.preprocessing.size))
    assert result.status == ["ok", "ok"]
    assert not torch.allclose(result.log_probs, result.averaged_log_probs, atol=1e-4)


@pytest.mark.parametrize(("text", "image"), [(64, 96), (96, 64)])
def test_no_width_is_written_into_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: int, image: int
) -> None:
    config = copy.deepcopy(CONFIGS["openai_vit"])
    config["text_cfg"]["width"], config["vision_cfg"]["width"] = text, image
    monkeypatch.setitem(CONFIGS, "other_widths", config)
    folder = str(save_folder("other_widths", tmp_path))
    for kind in (TPTModule, MetaTPTModule):
        module = kind(clip=folder, class_names=["cat", "ox"], n_views=3, outer_steps=1)
        assert module.prompt.initial_state(2)["context"].shape == (2, 4, text)
        assert module.process(make_batch(2, 32)).status == ["ok", "ok"]


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_second_order_in_chunks_of_one_picture(tiny_clip_folder: Path, inner_steps: int) -> None:
    options = {"order": "second", "schedule": "nested", "n_views": 6, "selection": 0.5, "outer_steps": 2}
    options["inner_steps"] = inner_steps
    module = MetaTPTModule(clip=str(tiny_clip_folder), class_names=NAMES, **options).double()
    whole = module.process(make_batch(2, 32))
    module.clip.budget = Budget(1)  # byte: every picture and every prompt is a chunk of its own, recomputed
    torch.testing.assert_close(module.process(make_batch(2, 32)).log_probs, whole.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", [2**32, 1])
def test_one_graph_serves_all_samples(tiny_clip_folder: Path, memory: int) -> None:
    """Gradients at the initial prompt go through one kept graph: the same as through a graph of each sample's own."""
    prompt = TPTModule(clip=str(tiny_clip_folder), class_names=NAMES).prompt
    prompt.clip.budget = Budget(memory)
    weight = torch.randn(3, len(NAMES), 24)
    for _ in range(2):
        gradients = []
        for copied in (False, True):
            context = prompt.initial_state(3)["context"]
            context = (context.clone() if copied else context).detach().requires_grad_()
            logits = prompt.head({"context": context})(weight)
            gradients += torch.autograd.grad(logits.square().sum(), context)
        assert torch.equal(*gradients)
        assert len({float(each.norm()) for each in gradients[0]}) == 3
    assert torch.equal(copy.deepcopy(prompt).head()(weight), prompt.head()(weight))


def test_graphs_that_do_not_fit_together_are_computed_again(tiny_clip_folder: Path) -> None:
    """Eight samples may take a pass more than one of them alone; their numbers are the same."""
    module = TPTModule(clip=str(tiny_clip_folder), class_names=NAMES, n_views=2, outer_steps=3)
    calls = []
    module.clip.model.transformer.resblocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))

    batch = make_batch(8, 32)

    def run(total: int, batch_size: int) -> tuple[int, torch.Tensor]:
        module.clip.budget = Budget(total)
        module.process(batch)
        calls.clear()
        log_probs = module.process(batch.select(list(range(batch_size)))).log_probs
        return len(calls), log_probs

    layout = module.prompt._layout
    tight = 4 * layout.size * module.clip._bytes_of_prompts(layout)
    (alone, one), (together, eight) = run(tight, 1), run(tight, 8)
    assert together > 8 * alone
    assert run(8 * tight, 8)[0] == 8 * alone
    assert torch.equal(run(8 * tight, 8)[1], eight)
    torch.testing.assert_close(eight[:1], one, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_chunks_and_goes_on(
    tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    module = MetaTPTModule(clip=str(tiny_clip_folder), class_names=NAMES, n_views=6, memory=64)
    batch = make_batch(3, 32)
    batch.error[1] = "it is cut off"
    expected = module.process(batch)
    adapt, failures = module.adapt, [error]
    seen: list[bool] = []

    def sometimes(batch: Batch) -> Adaptation:
        if failures:
            raise failures.pop()
        seen.append(module.prompt._kept is None)
        return adapt(batch)

    monkeypatch.setattr(module, "adapt", sometimes)
    result = module.process(batch)
    assert result.status == ["ok", "skipped", "ok"]
    torch.testing.assert_close(result.log_probs[[0, 2]], expected.log_probs[[0, 2]])
    assert module.clip.budget.total(batch.image.device) == 32 * 2**20
    assert seen == [True]  # what was kept has been let go
    assert "half as much, 32 MB" in caplog.text

    failures[:] = [error, error]
    result = module.process(batch)
    assert result.status == ["skipped"] * 3
    assert result.reason[0].startswith("out of memory, twice: ")
    assert result.reason[1] == "it is cut off"
    assert result.log_probs.isnan().all()
    assert module.process(batch).status == ["ok", "skipped", "ok"]  # the run goes on


def test_an_error_that_is_not_of_memory_is_not_caught(tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ZeroShotModule(clip=str(tiny_clip_folder), class_names=NAMES)

    def fail(batch: Batch) -> Adaptation:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(module, "adapt", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        module.process(make_batch(1, 32))


@pytest.mark.parametrize(
    "options", [{"augmentation": "online"}, {"policy": True}, {"augmentation": "online", "policy": True}]
)
def test_a_stream_goes_on_where_it_was_stopped(tiny_clip_folder: Path, options: dict[str, Any]) -> None:
    online = options.pop("policy", False)

    def start() -> MetaTPTModule:
        module = MetaTPTModule(
            clip=str(tiny_clip_folder),
            class_names=NAMES,
            n_views=6,
            outer_lr_relative=2.0,
            predict="original",
            **options,
        )
        module.start_run(online)
        return module

    def take(module: MetaTPTModule, indices: range) -> list[Tensor]:
        found = []
        for index in indices:
            module.start_batch(carry=online)
            found.append(module.process(make_batch(6, 32).select([index])).log_probs)
        return found

    whole = start()
    expected = take(whole, range(6))
    first, second = start(), start()
    assert first.stream() is not None
    take(first, range(3))
    stream = first.stream()
    assert stream is not None
    second.resume_stream({name: value.clone() for name, value in stream.items()})
    for found, value in zip(take(second, range(3, 6)), expected[3:], strict=True):
        assert torch.equal(found, value)
    fresh = take(start(), range(3, 6))
    assert not torch.equal(fresh[0], expected[3])  # it does carry something over
    with pytest.raises(ValueError, match="index order"):
        take(second, range(2, 3))


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_leaves_a_stream_as_it_was(
    tiny_clip_folder: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Memory may run out once the state has been handed on: after the loops, where pixels are made for a gallery."""

    def take(fails_at: int | None, left_out: int | None = None) -> list[Tensor]:
        module = MetaTPTModule(
            clip=str(tiny_clip_folder), class_names=NAMES, n_views=6, outer_lr_relative=2.0, predict="original",
            augmentation="online",
        )  # fmt: skip
        module.start_run(online=True)
        module.keep_views = True
        pixels, left, found = module.selected_pixels, [0], []

        def sometimes(*args: Any) -> Tensor:
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return pixels(*args)

        monkeypatch.setattr(module, "selected_pixels", sometimes)
        for index in range(4):
            if index == left_out:
                continue
            left[0] = failures if index == fails_at else 0
            module.start_batch(carry=True)
            found.append(module.process(make_batch(4, 32).select([index])).log_probs)
        return found

    found = take(fails_at=1)
    expected = take(None) if failures == 1 else take(None, left_out=1)
    if failures == 2:
        assert found.pop(1).isnan().all()
    for each, value in zip(found, expected, strict=True):
        assert torch.equal(each, value)


def test_a_stream_that_is_not_told_cannot_be_resumed(tiny_clip_folder: Path) -> None:
    class Counts(ZeroShotModule):
        def carries_over(self) -> str | None:
            return "the count"

    class Tells(Counts):
        def stream(self) -> dict[str, Tensor] | None:
            return {}

        def resume_stream(self, stream: dict[str, Tensor]) -> None: ...

    options = {"clip": str(tiny_clip_folder), "class_names": NAMES}
    with pytest.raises(ValueError, match="Counts hands something on .*define stream and resume_stream"):
        Counts(**options).check_resumable()
    for kind in (Tells, ZeroShotModule, MetaTPTModule):
        kind(**options).check_resumable()
    MetaTPTModule(augmentation="online", **options).check_resumable()


def test_where_every_sample_is_alone_there_is_no_stream(tiny_clip_folder: Path) -> None:
    module = MetaTPTModule(clip=str(tiny_clip_folder), class_names=NAMES, n_views=6)
    module.start_run()
    module.start_batch(carry=False)
    module.process(make_batch(1, 32))
    assert module.stream() is None


def test_samples_of_an_earlier_session_count(tiny_clip_folder: Path) -> None:
    module = ZeroShotModule(clip=str(tiny_clip_folder), class_names=NAMES)
    module.count_earlier(0, 0, 0)
    assert module.running == {}
    module.count_earlier(7, 5, 4)
    batch = make_batch(1, 32)
    batch.label[:] = module.process(batch).log_probs.argmax(-1)
    module.test_step(batch, 0)
    assert int(module.n_labelled.compute()) == 8
    assert module.running["accuracy"] == pytest.approx(6 / 8)
    assert module.running["gain"] == pytest.approx(1 / 8)
