"""The reset between samples, through a Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from helpers.batches import NAMES, make_batch
from torch.utils.data import DataLoader

from metatpt.callbacks import ResetPrompts
from metatpt.modules import AdaptationModule, MetaTPTModule, TPTModule, ZeroShotModule
from metatpt.types import Batch

OPTIONS = {"class_names": NAMES, "n_views": 4, "outer_steps": 2}


def loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)


def trainer(*callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        **{"inference_mode": False, **options}, logger=False, accelerator="cpu", callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, barebones=False,
    )  # fmt: skip


def predict(module: AdaptationModule, batches: list[Batch], policy: str = "episodic") -> dict[int, torch.Tensor]:
    results = trainer(ResetPrompts(policy)).predict(module, loader(batches))
    assert results is not None
    rows = {}
    for batch, result in zip(batches, results, strict=True):
        rows.update(zip(batch.index.tolist(), result.log_probs, strict=True))
    return rows


@pytest.mark.parametrize("kind", [MetaTPTModule, TPTModule])
def test_order_changes_no_episodic_prediction(tiny_clip_folder: Path, kind: type[AdaptationModule]) -> None:
    batch = make_batch(5, 32)
    module = kind(clip=str(tiny_clip_folder), **OPTIONS)
    forward = predict(module, [batch.select([0, 1]), batch.select([2, 3]), batch.select([4])])
    backward = predict(module, [batch.select([4, 2, 0]), batch.select([3]), batch.select([1])])
    for index in range(5):
        torch.testing.assert_close(forward[index].exp(), backward[index].exp(), atol=1e-5, rtol=0)
    # and it is what `adapt` gives, called directly
    direct = module.process(batch).log_probs
    together = torch.stack([forward[i] for i in range(5)])
    torch.testing.assert_close(direct.exp(), together.exp(), atol=1e-5, rtol=0)


def test_online_goes_on_from_the_last_sample(tiny_clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = TPTModule(clip=str(tiny_clip_folder), **OPTIONS)
    batch = make_batch(3, 32)
    singles = [batch.select([row]) for row in range(3)]
    with caplog.at_level(logging.INFO):
        online = predict(module, singles, "online")
    assert "carried over" in caplog.text
    episodic = predict(module, singles)
    torch.testing.assert_close(online[0], episodic[0])
    assert not torch.allclose(online[1], episodic[1], atol=1e-6)
    # by hand: the second sample starts from the context that the first one left
    module.process(singles[0])
    module.start_batch(carry=True)
    torch.testing.assert_close(module.process(singles[1]).log_probs[0], online[1])
    # what is not finite is not carried over
    module.start_batch(carry=True)
    module.finish_state({"context": torch.full_like(module.start_state(1)["context"], torch.nan)})
    module.start_batch(carry=True)
    assert module.start_state(1)["context"].isfinite().all()
    # a second run starts afresh
    torch.testing.assert_close(predict(module, singles, "online")[2], online[2])


def test_online_takes_one_sample_at_a_time_in_order(tiny_clip_folder: Path) -> None:
    module = TPTModule(clip=str(tiny_clip_folder), **OPTIONS)
    batch = make_batch(3, 32)
    with pytest.raises(ValueError, match=r"use --data.batch_size 1, not batches of 2"):
        predict(module, [batch.select([0]), batch.select([1, 2])], "online")
    with pytest.raises(ValueError, match=r"index order; 1 came after 2"):
        predict(module, [batch.select([0]), batch.select([2]), batch.select([1])], "online")


@pytest.mark.parametrize("step", ["test", "validate", "predict"])
def test_a_forgotten_reset_is_an_error(tiny_clip_folder: Path, step: str) -> None:
    module = MetaTPTModule(clip=str(tiny_clip_folder), **OPTIONS)
    with pytest.raises(RuntimeError, match=r"add metatpt.callbacks.ResetPrompts\(\)"):
        getattr(trainer(), step)(
            module, loader([make_batch(1, 32)]), verbose=False
        ) if step != "predict" else trainer().predict(module, loader([make_batch(1, 32)]))
    # nothing to reset, nothing to forget
    zero_shot = ZeroShotModule(clip=str(tiny_clip_folder), class_names=NAMES)
    assert trainer().predict(zero_shot, loader([make_batch(1, 32)]))


def test_one_reset_serves_one_batch(tiny_clip_folder: Path) -> None:
    class Once(lightning.Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
            if batch_idx == 0:
                pl_module.start_batch(carry=False)

    module = TPTModule(clip=str(tiny_clip_folder), **OPTIONS)
    batch = make_batch(2, 32)
    assert trainer(Once()).predict(module, loader([batch.select([0])]))
    with pytest.raises(RuntimeError, match="was not reset before this batch"):
        trainer(Once()).predict(module, loader([batch.select([0]), batch.select([1])]))


def test_inference_mode_is_an_error(tiny_clip_folder: Path) -> None:
    module = MetaTPTModule(clip=str(tiny_clip_folder), **OPTIONS)
    with pytest.raises(RuntimeError, match=r"use Trainer\(inference_mode=False\)"):
        trainer(ResetPrompts(), inference_mode=True).predict(module, loader([make_batch(1, 32)]))


def test_only_a_metatpt_module_can_be_reset() -> None:
    class Other(lightning.LightningModule):
        def predict_step(self, batch: Batch) -> None: ...

    with pytest.raises(TypeError, match="not Other"):
        trainer(ResetPrompts()).predict(Other(), loader([make_batch(1, 32)]))
    with pytest.raises(ValueError, match="did you mean 'episodic'"):
        ResetPrompts("episodc")


def test_logged_means_are_over_samples(tiny_clip_folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    # 7 pictures in batches of 2, right on the last one alone: exactly 1/7.
    module = ZeroShotModule(clip=str(tiny_clip_folder), class_names=NAMES)
    batch = make_batch(7, 32)
    predicted = module.process(batch).log_probs.argmax(-1)
    batch.label = (predicted + 1) % len(NAMES)
    batch.label[6] = predicted[6]
    run = trainer()
    run.test(module, loader([batch.select([0, 1]), batch.select([2, 3]), batch.select([4, 5]), batch.select([6])]))
    assert float(run.callback_metrics["test/accuracy"]) == pytest.approx(1 / 7, abs=1e-7)
    assert float(run.callback_metrics["test/gain"]) == 0
    assert not [
        each for each in recwarn if "batch" in str(each.message)
    ]  # Lightning guesses a size where none is given


def test_no_labels_no_accuracy(tiny_clip_folder: Path) -> None:
    module = ZeroShotModule(clip=str(tiny_clip_folder), class_names=NAMES)
    batch = make_batch(3, 32)
    batch.label[:] = -1
    run = trainer()
    run.test(module, loader([batch]), verbose=False)
    assert not run.callback_metrics
    assert module.running == {}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precision_keeps_what_is_tuned_exact(tiny_clip_folder: Path, precision: str) -> None:
    module = MetaTPTModule(clip=str(tiny_clip_folder), **OPTIONS)
    exact = module.prompt.tuned["context"].detach().clone()
    batch = make_batch(4, 32)
    seen: dict[str, torch.Tensor] = {}
    adapt = module.adapt

    def spy(given: Batch):
        seen["aspect"], seen["raw"] = given.aspect, module.look(given).raw
        return adapt(given)

    module.adapt = spy
    results = trainer(ResetPrompts(), precision=precision).predict(module, loader([batch]))
    assert results is not None
    assert torch.equal(seen["aspect"], batch.aspect)
    assert seen["raw"].dtype == torch.float32
    context = module.prompt.tuned["context"]
    assert context.dtype == torch.float32
    # A tower in bfloat16 has rounded embeddings; what was read from it before stays as it was.
    assert torch.equal(context, exact)
    assert results[0].log_probs.dtype == torch.float32
    assert torch.isfinite(results[0].log_probs).all()
    module.float()
