"""Few-shot training: its schedule, its randomness, its gradients, and what it leaves."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from helpers.batches import NAMES, make_batch
from helpers.models import save_folder
from torch.utils.data import DataLoader

from metatpt.callbacks import ResetPrompts
from metatpt.modules import MetaTPTModule, MetaTrainingModule, PromptTrainingModule, TPTModule, ZeroShotModule
from metatpt.prompts import MultiModalPrompt, RepresentationPrompt, TextPrompt
from metatpt.types import Batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder("openai_vit", tmp_path_factory.mktemp("clip"))


def make(folder: Path, **options: Any) -> PromptTrainingModule:
    return PromptTrainingModule(clip=str(folder), class_names=NAMES, **options)


def trainer(**options: Any) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(
        accelerator="cpu", inference_mode=False, use_distributed_sampler=False, callbacks=[ResetPrompts()],
        **{**quiet, **options},
    )  # fmt: skip


def loader(*batches: Batch) -> DataLoader[Batch]:
    return DataLoader(list(batches), batch_size=None)


def test_the_rate_warms_up_and_falls_with_a_cosine(folder: Path) -> None:
    rates = []

    class Rates(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit = trainer(max_epochs=5)
    fit.callbacks.append(Rates())
    fit.fit(make(folder, lr=0.1, warmup_epochs=2, warmup_lr=1e-4), loader(make_batch(4, 32)))
    assert rates == pytest.approx([1e-4, 1e-4, *(0.05 * (1 + math.cos(math.pi * epoch / 5)) for epoch in (2, 3, 4))])


def test_training_on_goes_along_the_longer_cosine(folder: Path, tmp_path: Path) -> None:
    first = trainer(max_epochs=2)
    first.fit(make(folder, lr=0.1, warmup_epochs=0), loader(make_batch(4, 32)))
    first.save_checkpoint(tmp_path / "two.ckpt")
    module, rates = make(folder, lr=0.1, warmup_epochs=0), []
    module.on_train_batch_start = lambda *args: rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
    trainer(max_epochs=4).fit(module, loader(make_batch(4, 32)), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (2, 3)])


@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt,
        partial(MultiModalPrompt, depth=2),
        partial(RepresentationPrompt, width=8, first_block=2, last_block=2),
    ],
    ids=["CoOp", "MaPLe", "MMRL"],
)
def test_training_lowers_the_loss_and_every_method_starts_from_it(folder: Path, tmp_path: Path, prompt: Any) -> None:
    module = make(folder, prompt=prompt, lr=0.05, warmup_epochs=0, training_views="original")
    batch = make_batch(5, 32)
    before = ZeroShotModule(clip=str(folder), class_names=NAMES, prompt=prompt)
    before.load_state_dict(module.state_dict())
    fit = trainer(max_epochs=8)
    fit.fit(module, loader(batch), loader(batch))
    after = module.process(batch).log_probs.gather(1, batch.label[:, None]).mean()
    assert after > before.process(batch).log_probs.gather(1, batch.label[:, None]).mean() + 0.1
    assert "val/accuracy" in fit.callback_metrics
    assert all(not each.requires_grad and each.grad is None for each in module.clip.parameters())
    fit.save_checkpoint(tmp_path / "learned.ckpt", weights_only=True)
    size = sum(value.numel() * value.element_size() for value in module.prompt.tuned.values())
    assert (tmp_path / "learned.ckpt").stat().st_size <= size + 64 * 1024
    for method in (ZeroShotModule, TPTModule, MetaTPTModule):
        fresh = method.from_checkpoint(tmp_path / "learned.ckpt", class_names=NAMES[::-1])
        assert {name: value.tolist() for name, value in fresh.prompt.tuned.items()} == {
            name: value.tolist() for name, value in module.prompt.tuned.items()
        }
        assert type(fresh.prompt) is type(module.prompt)


def test_crops_are_of_seed_epoch_and_index(folder: Path) -> None:
    module = make(folder)
    batch = make_batch(3, 32)
    first = module.training_images(batch)
    assert torch.equal(first, module.training_images(batch))
    torch.testing.assert_close(first[1:2], module.training_images(batch.select([1])))
    batch.epoch += 1
    assert not torch.allclose(first, module.training_images(batch), atol=1e-2)
    batch.epoch -= 1
    module.seed = 1
    assert not torch.allclose(first, module.training_images(batch), atol=1e-2)


@pytest.mark.parametrize("meta", [False, True])
def test_unreadable_and_unlabelled_pictures_weigh_nothing(folder: Path, meta: bool) -> None:
    cls = MetaTrainingModule if meta else PromptTrainingModule
    options = {"n_views": 4, "outer_steps": 1} if meta else {"training_views": "original"}
    module = cls(clip=str(folder), class_names=NAMES, **options)
    module.log = lambda *args, **kwargs: None
    whole = make_batch(4, 32)
    whole.error[1], whole.label[3] = "broken", -1
    loss, alone = module.training_step(whole, 0), module.training_step(whole.select([0, 2]), 0)
    torch.testing.assert_close(loss, alone / 2)
    nothing = module.training_step(whole.select([1, 3]), 0)
    gradients = torch.autograd.grad(nothing, list(module.prompt.tuned.values()))
    assert float(nothing.detach()) == 0
    assert all(bool((each == 0).all()) for each in gradients)


def test_nothing_to_train_and_no_epochs_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer.max_epochs is -1"):
        trainer(max_epochs=-1, max_steps=1).fit(make(folder), loader(make_batch(2, 32)))
    for name, value in (("lr", 0), ("momentum", 2), ("warmup_epochs", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            make(folder, **{name: value})
    with pytest.raises(ValueError, match="did you mean 'crop'"):
        make(folder, training_views="crops")


def test_starts_from_a_trained_prompt(folder: Path, tmp_path: Path) -> None:
    trained = make(folder, lr=0.05, warmup_epochs=0)
    fit = trainer(max_epochs=1)
    fit.fit(trained, loader(make_batch(4, 32)))
    fit.save_checkpoint(tmp_path / "coop.ckpt", weights_only=True)
    options = {"n_views": 4, "outer_steps": 1, "lr": 1e-9, "start_from": str(tmp_path / "coop.ckpt")}
    module = MetaTrainingModule(clip=str(folder), class_names=NAMES, learned_rates="one", **options)
    assert not torch.allclose(module.prompt.tuned["context"], trained.prompt.tuned["context"], atol=1e-4)
    trainer(max_epochs=1).fit(module, loader(make_batch(4, 32)))
    torch.testing.assert_close(module.prompt.tuned["context"], trained.prompt.tuned["context"], atol=1e-6, rtol=0)
    other = make(folder, prompt=partial(TextPrompt, n_context=2), start_from=options["start_from"])
    with pytest.raises(ValueError, match=r"context is \[4, 32\] in the checkpoint and \[2, 32\] here"):
        trainer(max_epochs=1).fit(other, loader(make_batch(4, 32)))


def test_options_on_going_on_are_those_at_hand(folder: Path, tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(make(folder, lr=0.1, warmup_epochs=0), loader(make_batch(4, 32)))
    first.save_checkpoint(tmp_path / "one.ckpt")
    module = make(folder, lr=0.5, momentum=0.3, warmup_epochs=0)
    second = trainer(max_epochs=2)
    found = []
    module.on_train_batch_start = lambda *args: found.append(dict(second.optimizers[0].param_groups[0]))
    second.fit(module, loader(make_batch(4, 32)), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert found[0]["lr"] == pytest.approx(0.25)
    assert found[0]["momentum"] == 0.3


def test_a_prompt_trained_in_bfloat16_is_of_the_same_clip(folder: Path, tmp_path: Path) -> None:
    fit = trainer(max_epochs=1, precision="bf16-true")
    fit.fit(make(folder), loader(make_batch(4, 32)))
    fit.save_checkpoint(tmp_path / "low.ckpt", weights_only=True)
    assert ZeroShotModule.from_checkpoint(tmp_path / "low.ckpt").prompt.tuned["context"].dtype == torch.float32


def test_weights_written_past_autograd_are_seen(folder: Path) -> None:
    module = ZeroShotModule(clip=str(folder), class_names=NAMES, prompt=TextPrompt)
    batch = make_batch(2, 32)
    before = module.process(batch).log_probs
    module.prompt.tuned["context"].data.mul_(-1)  # as Lightning's averaging of weights does
    trainer().validate(module, loader(batch), verbose=False)
    assert not torch.allclose(module.process(batch).log_probs, before, atol=1e-3)


def test_a_meta_checkpoint_serves_other_methods(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = {"inner_loss": {"entropy": 1.0, "marginal_entropy": 0.5}, "outer_loss": "js"}
    learned = {"view_start": "policy", "learned_rates": "one", "learned_loss_weights": True, **losses}
    module = MetaTrainingModule(clip=str(folder), class_names=NAMES, n_views=4, outer_steps=1, **learned)
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(make_batch(3, 32)))
    fit.save_checkpoint(tmp_path / "meta.ckpt")
    same = MetaTPTModule.from_checkpoint(tmp_path / "meta.ckpt", n_views=4)
    batch = make_batch(2, 32)
    torch.testing.assert_close(same.process(batch).log_probs, module.process(batch).log_probs)
    assert "no use" not in caplog.text
    plain = TPTModule.from_checkpoint(tmp_path / "meta.ckpt")
    assert torch.equal(plain.prompt.tuned["context"], module.prompt.tuned["context"])
    assert "TPTModule has no use for" in caplog.text
