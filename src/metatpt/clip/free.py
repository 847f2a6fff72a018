"""How much memory a device has left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, within the limits of the container or the batch system's job."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    within = free_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([int(psutil.virtual_memory().available), *within])


def free_in_groups(membership: Path, root: Path) -> Iterator[int]:
    """What each limit of this process's control groups leaves; psutil shows the machine's alone. Versions 1 and 2.

    Args:
        membership: Linux's list of the groups that a process is in; elsewhere there is none.
        root: Where the groups are mounted.
    """
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, place = line.split(":", 2)
        if not controllers:  # version 2
            base, most, used, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base = root / "memory"
            most, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = base / place.strip("/")
        for folder in (group, *group.parents):  # a limit holds for all groups inside
            if (folder / most).exists() and (limit := (folder / most).read_text().strip()) != "max":
                taken = int((folder / used).read_text())
                if (folder / "memory.stat").exists():
                    pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    taken -= int(dict(pairs).get(cached, 0))  # what is kept of files gives way
                yield max(0, int(limit) - taken)
            if folder == base:
                break
