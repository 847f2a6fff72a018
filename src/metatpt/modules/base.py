"""What all methods share: the frozen model, the prompt, the steps of Lightning, what is logged.

A method writes :meth:`AdaptationModule.adapt` and nothing else (``docs/write-a-method.md``).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import lightning
import open_clip
import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from metatpt.clip import FrozenCLIP, load_clip
from metatpt.clip.budget import is_out_of_memory
from metatpt.prompts import Head, PromptFactory, PromptLearner, TemplatePrompt, TextPrompt, as_factory
from metatpt.rng import run_seed, sample_generator
from metatpt.types import Adaptation, Batch, Preprocessing, State

from .checkpoints import check_fits, learned, plain
from .outcome import settle, spread

_log = logging.getLogger(__name__)

ENSEMBLE = "ensemble"
"""The template that stands for the mean over OpenAI's 80 ImageNet templates."""

_LAST_INDEX, _PROMPT = "last_index", "prompt."  # of what a stream hands on


class AdaptationModule(lightning.LightningModule, ABC):
    """Base of all methods.

    Args:
        clip: ``builtin``, a name that open_clip knows, ``hf-hub:<repository>``, or a folder with
            ``open_clip_config.json`` and weights.
        pretrained: With a name: a tag of its weights, or a file.
        template: Text with ``{}`` for the class name; where nothing is tuned also ``ensemble`` (the 80 ImageNet
            templates) or a list of templates. On the command line ``coop`` is CoOp's template for the data set.
        class_names: The C classes. The command line takes them from the data.
        memory: Megabytes that activations may take, about, or ``auto``: half of what is free on the device at first
            use. What needs more goes through in chunks, recomputed in the backward pass.
        prompt: The prompt learner, a class of :mod:`metatpt.prompts` and its options. By default the words of the
            template before the class name, where the method tunes them, else the template as it is.
    """

    tunes: ClassVar[bool] = True
    """Whether the method tunes a prompt at test time. If so it needs gradients and the reset callback."""

    checkpoint_options: ClassVar[tuple[str, ...]] = ("clip", "pretrained", "template", "prompt")
    """Options that a checkpoint's values hold for: the command line takes them from it, where the user says nothing."""

    def __init__(
        self,
        clip: str = "builtin",
        pretrained: str | None = None,
        template: str | list[str] = "a photo of a {}.",
        class_names: list[str] | None = None,
        memory: int | Literal["auto"] = "auto",
        prompt: PromptFactory | None = None,
    ) -> None:
        super().__init__()
        if not class_names:
            raise ValueError("class_names is empty: give the list of classes (the command line takes it from --data)")
        self.save_hyperparameters(ignore=["prompt"])
        self.strict_loading = False  # checkpoints leave out the frozen weights; on_load_checkpoint is our own check
        self.class_names = list(class_names)
        self.prompt = self.configure_prompt(load_clip(clip, pretrained, memory), template, prompt)
        self.save_hyperparameters({"prompt": self.prompt.config if self.prompt.tuned else None})
        self.seed: int | None = None
        self._carried: State | None = None
        self._final: State | None = None
        self._reset = False
        self._online = False
        self._last_index = -1
        self.configure_metrics()

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> Self:
        """The method on what any module of this package has learned, a training module's included.

        Args:
            path: The checkpoint.
            **options: Of the method. What the checkpoint's values hang on (:attr:`checkpoint_options`), and the class
                names, are the checkpoint's unless given.

        Raises:
            ValueError: It does not fit, or is no checkpoint of this package.
            pickle.UnpicklingError: It holds more than tensors and plain values.
        """
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint.get("hyper_parameters", {})
        theirs = {name: saved[name] for name in ("class_names", *cls.checkpoint_options) if name in saved}
        module = cls(**{**theirs, **options})
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        return module

    def configure_prompt(
        self, clip: FrozenCLIP, template: str | list[str], prompt: PromptFactory | None
    ) -> PromptLearner:
        """The prompt learner: the one asked for; else tunable context where the method tunes, or hand-written prompts.

        Raises:
            ValueError: Several templates where one is needed.
        """
        if prompt is None and not self.tunes:
            templates = [template] if isinstance(template, str) else template
            if template == ENSEMBLE:
                templates = [each("{}") for each in open_clip.OPENAI_IMAGENET_TEMPLATES]
            return TemplatePrompt(clip, self.class_names, templates)
        if not isinstance(template, str) or template == ENSEMBLE:
            who = f"{type(self).__name__} tunes" if prompt is None else "a prompt learner starts from"
            raise ValueError(
                f"{who} the words of one template; got {template!r}. Several templates serve ZeroShotModule and "
                "ViewAverageModule without a prompt learner"
            )
        return as_factory(prompt or TextPrompt)(clip, self.class_names, template)

    def configure_metrics(self) -> None:
        """Metrics that are logged; the final figures come from the record of the run."""
        self.n_labelled = SumMetric()
        self.accuracy = MeanMetric()
        self.zero_shot_accuracy = MeanMetric()

    @property
    def clip(self) -> FrozenCLIP:
        """The frozen model."""
        return self.prompt.clip

    @property
    def preprocessing(self) -> Preprocessing:
        """What the datamodule does to pictures for this model."""
        return self.clip.preprocessing

    @property
    def running(self) -> dict[str, float]:
        """Accuracy and gain of this process up to now, for progress bars; empty without labels."""
        weight = float(torch.as_tensor(self.accuracy.weight))
        if not weight:
            return {}
        accuracy = float(torch.as_tensor(self.accuracy.mean_value)) / weight
        zero_shot = float(torch.as_tensor(self.zero_shot_accuracy.mean_value)) / weight
        return {"accuracy": accuracy, "gain": accuracy - zero_shot}

    # What a method writes, and what it calls

    @abstractmethod
    def adapt(self, batch: Batch) -> Adaptation:
        """Adapt to each picture of a batch and predict it.

        Args:
            batch: B pictures, all readable, on the module's device.
        """

    def start_state(self, batch_size: int) -> State:
        """Where the samples of a batch start: the initial prompt, or where the stream is (``policy: online``)."""
        return self.prompt.initial_state(batch_size) if self._carried is None else self._carried

    def finish_state(self, state: State) -> None:
        """Hand back the tuned state, which the reset callback may carry over; one that is not finite is not."""
        if all(bool(value.isfinite().all()) for value in state.values()):
            self._final = {name: value.detach() for name, value in state.items()}
        else:
            self._final = self._carried

    def log_probs(self, head: Head, features: Tensor) -> Tensor:
        """Log-probabilities ``[B, V, C]`` of encoded views ``[B, V, D]``, in double precision.

        In float32 the gradient of a confident prediction's loss is rounding noise, which an optimiser that scales
        gradients (AdamW) turns into a full step: then the result would hang on the batch size.
        """
        logits = head(features)
        return (logits if logits.device.type == "mps" else logits.double()).log_softmax(-1)  # mps has no float64

    def run_seed(self) -> int:
        """The seed of all random numbers: the module's own where set, else the run's."""
        return run_seed() if self.seed is None else self.seed

    def generator(self, index: int, stream: str, epoch: int = 0) -> torch.Generator:
        """Random numbers for one purpose of one sample, in training of one epoch (:attr:`Batch.epoch`)."""
        return sample_generator(self.run_seed(), index, stream, epoch)

    # What the reset callback calls

    def start_run(self, online: bool = False) -> None:
        """Forget all that an earlier run left, and say whether the prompt will be carried over in this one."""
        self._carried = self._final = None
        self._online = online
        self._last_index = -1

    def start_batch(self, carry: bool) -> None:
        """Start the samples of the next batch afresh, or from where the last one ended."""
        self._carried = self._final if carry else None
        self._online = carry
        self._reset = True

    # What the record calls, so that a run that was stopped can go on

    def stream(self) -> State | None:
        """What the samples up to now hand on to the next one; None where every sample is alone."""
        if self.carries_over() is None:
            return None
        prompt = self._final if self._online else None
        held = {f"{_PROMPT}{name}": value for name, value in (prompt or {}).items()}
        return {_LAST_INDEX: torch.tensor([self._last_index]), **held}

    def resume_stream(self, stream: State) -> None:
        """Go on after the sample that :meth:`stream` was asked for; its tensors are on the module's device."""
        self._last_index = int(stream[_LAST_INDEX])
        prompt = {name.removeprefix(_PROMPT): value for name, value in stream.items() if name.startswith(_PROMPT)}
        self._final = prompt or None

    def check_resumable(self) -> None:
        """Refuse to resume a method that hands something on without saying what.

        Raises:
            ValueError: Its class defines :meth:`carries_over`, but not :meth:`stream` and :meth:`resume_stream`.
        """
        place = {name: _defined(type(self), name) for name in ("carries_over", "stream", "resume_stream")}
        if self.carries_over() is not None and place["carries_over"] < max(place["stream"], place["resume_stream"]):
            raise ValueError(
                f"{type(self).__name__} hands something on from sample to sample (carries_over), but does not say "
                "what: define stream and resume_stream, so that a run of it can be resumed"
            )

    def count_earlier(self, n_labelled: int, n_right: int, n_zero_shot_right: int) -> None:
        """Count samples of the same run that were adapted before it was stopped."""
        self.n_labelled.update(n_labelled)
        for metric, right in ((self.accuracy, n_right), (self.zero_shot_accuracy, n_zero_shot_right)):
            metric.update(1.0, weight=right)
            metric.update(0.0, weight=n_labelled - right)

    # Steps

    def process(self, batch: Batch) -> Adaptation:
        """Adapt the readable pictures of a batch; the others, and fillers, get a row of NaN and a reason.

        A sample whose adaptation is not finite keeps its zero-shot prediction. Where memory runs out, the batch is
        tried once more with half of the chunks; where that does not help, its samples are skipped.

        Raises:
            ValueError: Where one sample's state is carried over to the next: more than one sample at a time, more than
                one device, or samples out of index order.
        """
        what = self.carries_over()
        if what is not None:
            self._check_online(batch, what)
        numbers = batch.index.tolist()  # read from the device at once
        readable = [row for row in range(len(batch)) if batch.error[row] is None and numbers[row] >= 0]
        size = len(batch)
        nothing = batch.image.new_full((size, len(self.class_names)), torch.nan, dtype=torch.float32)

        def skipped(reason: str) -> Adaptation:
            reasons = [error or reason for error in batch.error]
            return Adaptation(nothing, nothing.clone(), status=["skipped"] * size, reason=reasons)

        if not readable:
            return skipped("filler")
        with self.in_precision(batch.image.device):
            whole = len(readable) == size
            result = self._adapt_within_memory(batch if whole else batch.select(readable))
        if isinstance(result, str):
            return skipped(result)
        result = settle(result)
        return result if whole else spread(result, readable, batch)

    @contextmanager
    def in_precision(self, device: torch.device) -> Iterator[None]:
        """Where towers run in the trainer's precision, which they enter themselves, and nothing else does."""
        self.clip.autocast_dtype = _autocast_dtype(device.type)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield

    def _adapt_within_memory(self, batch: Batch) -> Adaptation | str:
        """What :meth:`adapt` gives, or why memory does not suffice for it."""
        stream = self.stream()
        result = self._try(batch, stream)
        if isinstance(result, Adaptation):
            return result
        # Here, where nothing holds the tensors of the failed attempt any more.
        self.prompt.release()
        if batch.image.device.type == "cuda":
            torch.cuda.empty_cache()
        left = self.clip.budget.halve(batch.image.device)
        _log.warning(
            "Out of memory (%s): from here on activations take half as much, %d MB (--model.memory), and the batch is "
            "tried once more. A smaller --data.batch_size helps too.",
            result,
            left >> 20,
        )
        result = self._try(batch, stream)
        return f"out of memory, twice: {result}" if isinstance(result, str) else result

    def _try(self, batch: Batch, stream: State | None) -> Adaptation | str:
        """What :meth:`adapt` gives, or what torch says where memory runs out: then the stream is as it was."""
        try:
            return self.adapt(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if stream is not None:
                self.resume_stream(stream)
            return str(error).partition("\n")[0] or type(error).__name__

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Adaptation]:
        """As :meth:`test_step`, on the validation split."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Adaptation]:
        """Adapt to a batch and count."""
        return self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Adaptation:
        """Adapt to a batch; labels, where there are any, are not counted here."""
        self._check_step(batch)
        return self.process(batch)

    def _evaluate(self, batch: Batch) -> dict[str, Adaptation]:
        self._check_step(batch)
        adaptation = self.process(batch)
        labels = batch.label.tolist()
        counted = [
            row
            for row, status in enumerate(adaptation.status)
            if status != "skipped" and 0 <= labels[row] < len(self.class_names)
        ]
        self.n_labelled.update(len(counted))
        label = batch.label[counted]  # of none too: a metric that was never updated warns when it is summed up
        self.accuracy.update((adaptation.log_probs[counted].argmax(-1) == label).float())
        self.zero_shot_accuracy.update((adaptation.zero_shot_log_probs[counted].argmax(-1) == label).float())
        return {"adaptation": adaptation}

    def _check_step(self, batch: Batch) -> None:
        if not self.tunes:
            return
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{type(self).__name__} needs gradients, and Trainer(inference_mode=True), Lightning's default, "
                "forbids them: use Trainer(inference_mode=False)"
            )
        if not self._reset:
            raise RuntimeError(
                f"{type(self).__name__} was not reset before this batch: add metatpt.callbacks.ResetPrompts() to the "
                "trainer's callbacks (the command line does), so that every sample starts from the initial prompt"
            )
        self._reset = False

    def carries_over(self) -> str | None:
        """The option that makes one sample depend on the ones before it, if any does."""
        return "ResetPrompts(policy='online')" if self._online and self.tunes else None

    def _check_online(self, batch: Batch, what: str) -> None:
        """Refuse anything but one sample at a time, on one device, in index order."""
        trainer = self._trainer
        if trainer is not None and trainer.world_size > 1:
            raise ValueError(f"{what} carries over from sample to sample; use one device, not {trainer.world_size}")
        if len(batch) != 1:
            raise ValueError(
                f"{what} carries over from sample to sample; use --data.batch_size 1, not batches of {len(batch)}"
            )
        index = int(batch.index[0])
        if index <= self._last_index:
            raise ValueError(f"{what} takes samples in index order; {index} came after {self._last_index}")
        self._last_index = index

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation split."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test split."""
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        # Computed, and so summed over processes, on every one of them, whether it met a label or not.
        n_labelled = int(self.n_labelled.compute())
        if n_labelled:
            accuracy, zero_shot = self.accuracy.compute(), self.zero_shot_accuracy.compute()
            self.log(f"{split}/accuracy", accuracy)
            self.log(f"{split}/zero_shot_accuracy", zero_shot)
            self.log(f"{split}/gain", accuracy - zero_shot)
        for metric in (self.n_labelled, self.accuracy, self.zero_shot_accuracy):
            metric.reset()

    def on_fit_start(self) -> None:
        """What is trained, is trained for the classes at hand."""
        self.prompt.trained_on(self.class_names)

    def _forget_kept(self) -> None:
        """Weights may have been written past autograd (an average of them, say): nothing kept of them counts."""
        self.prompt.release()

    on_validation_start = on_test_start = on_predict_start = _forget_kept

    # Checkpoints hold what is learned, never CLIP's weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights, say whose they were, and keep to types that load without code."""
        checkpoint["state_dict"] = learned(checkpoint["state_dict"])
        checkpoint["clip"] = {
            "name": self.clip.name, "pretrained": self.clip.pretrained, "fingerprint": self.clip.fingerprint()
        }  # fmt: skip
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = plain(dict(checkpoint["hyper_parameters"]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another CLIP, and missing or unknown learned values.

        Raises:
            ValueError: Saying what was expected and what was found.
        """
        check_fits(self, checkpoint)


def _defined(cls: type, name: str) -> int:
    """How far up in the line of its classes a method is defined; the nearer, the smaller."""
    return next(place for place, each in enumerate(cls.__mro__) if name in vars(each))


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
