"""What the measuring scripts share: seconds as medians of one run, peak memory, random models of real sizes."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import lightning
import open_clip
import torch
from safetensors.torch import save_file

from metatpt.callbacks import ResetPrompts
from metatpt.types import Batch


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that all scripts have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=3)
    return options


@dataclass(frozen=True)
class Cost:
    """What a case takes.

    Attributes:
        seconds: Median.
        above: Peak of resident memory above what was resident before, MB (Linux; median).
        in_all: Peak of resident memory, MB.
    """

    seconds: float
    above: float
    in_all: float


def costs(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """Costs of all cases, taken in turn, `repeats` times.

    In its turn a case runs once without being counted, unless that takes more than 10 seconds, and then for at least
    two seconds: what the case before left in caches and in the allocator is not its own.
    """
    found: dict[str, list[Cost]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            counted = [_once(run)]
            if counted[0].seconds < 10:
                counted = [_once(run)]
                while sum(each.seconds for each in counted) < 2:
                    counted.append(_once(run))
            found[name].append(_median(counted))
            print(f"# {name}: {found[name][-1].seconds:.3f} s", file=sys.stderr, flush=True)
    return {name: _median(each) for name, each in found.items()}


def _once(run: Callable[[], object]) -> Cost:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls left
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = _resident("VmHWM")
    return Cost(seconds, peak - before, peak)


def _median(each: list[Cost]) -> Cost:
    return Cost(*(statistics.median(values) for values in zip(*map(astuple, each), strict=True)))


def _resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def random_model(name: str, folder: Path) -> Path:
    """A model of a known architecture with random weights, as a folder that ``--model.clip`` takes."""
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def random_batch(size: int, resolution: int) -> Batch:
    """Noise in the shape of pictures."""
    torch.manual_seed(1)
    return Batch(
        image=torch.rand(size, 3, resolution, resolution),
        canvas=torch.randint(0, 256, (size, 3, 2 * resolution, 2 * resolution), dtype=torch.uint8),
        aspect=torch.ones(size),
        label=torch.full((size,), -1),
        index=torch.arange(size),
        path=[str(number) for number in range(size)],
        error=[None] * size,
    )


def quiet_trainer(folder: str, *callbacks: lightning.Callback) -> lightning.Trainer:
    """A Trainer on the CPU with the reset and these callbacks, which prints and writes nothing else."""
    return lightning.Trainer(
        accelerator="cpu",
        inference_mode=False,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ResetPrompts(), *callbacks],
    )


def machine(threads: int) -> str:
    """What the figures were measured on."""
    return f"torch {torch.__version__}, {platform.machine()}, {threads} threads, float32"
