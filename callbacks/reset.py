"""The reset between samples, which makes test-time adaptation what it says."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import lightning
from lightning.pytorch.callbacks import Callback

from metatpt.modules import AdaptationModule
from metatpt.modules.base import check_choice

Policy = Literal["episodic", "online"]

_log = logging.getLogger(__name__)


class ResetPrompts(Callback):
    """Say before each batch where its samples start.

    Args:
        policy: ``episodic``: each sample starts from the initial prompt, with a fresh optimiser and fresh views, so its
            prediction depends on no other sample. ``online``: the prompt goes on from where the last sample left it
            (batch size 1, one device, samples in index order; the optimiser is fresh); a new run starts afresh.
    """

    def __init__(self, policy: Policy = "episodic") -> None:
        self.policy = check_choice("policy", policy, get_args(Policy))

    def _start_run(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not isinstance(pl_module, AdaptationModule):
            raise TypeError(
                f"ResetPrompts resets an AdaptationModule of metatpt.modules, not {type(pl_module).__name__}"
            )
        pl_module.start_run(online=self.policy == "online")

    def _start_batch(self, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, AdaptationModule)
        pl_module.start_batch(carry=self.policy == "online")

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse, before the first picture is read, a batch size or devices that a stream cannot have."""
        self._start_run(trainer, pl_module)
        assert isinstance(pl_module, AdaptationModule)
        if self.policy == "online" and pl_module.tunes:
            _log.info("policy online: the prompt is carried over from sample to sample; results depend on their order")
        what = pl_module.carries_over()
        size = getattr(getattr(trainer, "datamodule", None), "batch_size", 1)
        if what is not None and (size != 1 or trainer.world_size > 1):
            raise ValueError(
                f"{what} carries over from sample to sample: use --data.batch_size 1, not {size}, and one device, not "
                f"{trainer.world_size}"
            )

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget an earlier run."""
        self._start_run(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget an earlier run."""
        self._start_run(trainer, pl_module)

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget an earlier run."""
        self._start_run(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Reset."""
        self._start_batch(pl_module)

    def on_test_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Reset."""
        self._start_batch(pl_module)

    def on_predict_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Reset."""
        self._start_batch(pl_module)
