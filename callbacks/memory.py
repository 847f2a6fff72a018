"""How much memory a run takes at most."""

from __future__ import annotations

import sys

import torch

_MB = 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Starts the count anew, where it can be: on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory of this process, in units of 2**20 bytes.

    On a GPU what tensors took at most since :func:`reset_peak_memory`; else the largest resident set of the process so
    far, workers not included; None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MB
    if sys.platform == "win32":  # has no getrusage
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak * 1024 / _MB  # macOS counts bytes, Linux 1024 of them
