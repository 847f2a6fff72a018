"""The reset between samples, which makes test-time adaptation what it says."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from metatpt.modules import AdaptationModule
from metatpt.modules.checks import check_choice

Policy = Literal["episodic", "online"]

_log = logging.getLogger(__name__)


class ResetPrompts(Callback):
    """Say before each batch where its samples start.

    Args:
        policy: ``episodic``: each sample starts from the initial prompt, with a fresh optimiser and fresh views, so its
            prediction depends on no other sample. ``online``: the prompt goes on from where the last sample left it
            (batch size 1, one device, samples in index order; the optimiser is fresh); a new run starts afresh. It is
            for `validate`, `test` and `predict`: the validation within `fit` is always episodic.
    """

    def __init__(self, policy: Policy = "episodic") -> None:
        self.policy = check_choice("policy", policy, get_args(Policy))

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Forget an earlier run, and refuse a batch size or devices that a stream cannot have."""
        if not isinstance(pl_module, AdaptationModule):
            raise TypeError(
                f"ResetPrompts resets an AdaptationModule of metatpt.modules, not {type(pl_module).__name__}"
            )
        online = self._is_online(trainer)
        pl_module.start_run(online=online)
        if self.policy == "online" and not online:
            _log.info("policy online is for testing: validation within fit is episodic")
        if online and pl_module.tunes:
            _log.info("policy online: the prompt is carried over from sample to sample; results depend on their order")
        what = pl_module.carries_over()
        size = getattr(getattr(trainer, "datamodule", None), "batch_size", 1)
        wrong = [f"--data.batch_size 1, not {size}"] if size != 1 else []
        wrong += [f"one device, not {trainer.world_size}"] if trainer.world_size > 1 else []
        if what is not None and wrong:
            raise ValueError(f"{what} carries over from sample to sample: use {', and '.join(wrong)}")

    def _start_batch(self, trainer: lightning.Trainer, pl_module: AdaptationModule, *args: Any, **kwargs: Any) -> None:
        pl_module.start_batch(carry=self._is_online(trainer))

    def _is_online(self, trainer: lightning.Trainer) -> bool:
        return self.policy == "online" and trainer.state.fn != TrainerFn.FITTING

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _start_batch  # type: ignore[assignment]
