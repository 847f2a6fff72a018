"""A method of a user that `fit` trains, and her data, as files of the working folder."""

from __future__ import annotations

from pathlib import Path

METHOD = '''"""A prompt learned with labels."""

from typing import Any

import torch
from torch import Tensor

from metatpt.modules import ZeroShotModule
from metatpt.prompts import TextPrompt
from metatpt.types import Batch


class Training(ZeroShotModule):
    """Cross-entropy of a prompt; tested as it is.

    Args:
        lr: Learning rate.
        **kwargs: See AdaptationModule.
    """

    def __init__(self, lr: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lr = lr

    def configure_prompt(self, clip: Any, template: Any, prompt: Any) -> Any:
        """By default a prompt that learns."""
        return super().configure_prompt(clip, template, prompt or TextPrompt)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss, _ = self.prompt.training_loss(batch.image, batch.label)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.label))
        return loss

    def configure_optimizers(self) -> Any:
        """SGD with momentum, which has a state."""
        values = [each for each in self.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(values, self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}
'''

DATA = '''"""A folder of pictures, to train on."""

from metatpt.datamodules import FolderDataModule


class Pets(FolderDataModule):
    """All splits are the same pictures."""

    splits = ("train", "val", "test")


class Unvalidated(FolderDataModule):
    """Has no validation split."""

    splits = ("train", "test")
'''

PROMPT = '''"""A prompt learner of a user."""

from typing import Any

from metatpt.prompts import TextPrompt


class MyPrompt(TextPrompt):
    """A context that is scaled.

    Args:
        clip: The frozen model.
        class_names: The C classes.
        template: Words.
        scale: By how much.
        kind: Of what kind.
    """

    def __init__(
        self, clip: Any, class_names: Any, template: str, scale: float = 1.0, kind: str | None = None
    ) -> None:
        super().__init__(clip, class_names, template)
        self.tuned["context"].data.mul_(scale)


class Other(TextPrompt):
    """Another.

    Args:
        clip: The frozen model.
        class_names: The C classes.
        template: Words.
        n: A number.
    """

    def __init__(self, clip: Any, class_names: Any, template: str, n: int = 3) -> None:
        super().__init__(clip, class_names, template)


class NoLearner:
    """Something else."""
'''


def write_training(folder: Path) -> None:
    """Writes ``training.py`` (Training), ``pets.py`` (Pets, Unvalidated), ``my_prompt.py`` (MyPrompt, Other)."""
    for name, text in (("training", METHOD), ("pets", DATA), ("my_prompt", PROMPT)):
        (folder / f"{name}.py").write_text(text)
