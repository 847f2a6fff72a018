"""CIFAR-10, CIFAR-100 and their corrupted test sets in their files, with few pictures."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from metatpt.datamodules.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES


def write_batch(file: Path, n: int, n_classes: int, key: str, seed: int) -> None:
    """A batch of CIFAR's, equally many of each class in random order; rows have the red pixels first."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (n, 3072), dtype=np.uint8)
    labels = random.permutation(n) % n_classes
    names = [f"{number:06}.png" for number in range(n)]
    content = {"data": data, key: labels.tolist(), "filenames": names, "batch_label": file.name}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))


def write_cifar10(root: Path) -> None:
    """The five training batches, the test batch and the names of the classes."""
    folder = root / "cifar-10-batches-py"
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        write_batch(folder / name, 20, 10, "labels", seed)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES), "num_vis": 3072}))


def write_cifar100(root: Path) -> None:
    """Training pictures, test pictures and the names of the classes."""
    folder = root / "cifar-100-python"
    for seed, (name, n) in enumerate([("train", 300), ("test", 100)]):
        write_batch(folder / name, n, 100, "fine_labels", seed)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list(CIFAR100_CLASSES)}))


def write_corrupted(folder: Path, n: int, n_classes: int, dtype: str, *corruptions: str) -> None:
    """Corrupted test pictures, `n` at each severity, and their labels."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in corruptions:
        np.save(folder / f"{name}.npy", random.integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(random.permutation(n) % n_classes, 5).astype(dtype))


def write_cifar10_c(root: Path) -> None:
    """Two corruptions."""
    write_corrupted(root / "CIFAR-10-C", 20, 10, "uint8", "gaussian_noise", "fog")


def write_cifar100_c(root: Path) -> None:
    """One corruption."""
    write_corrupted(root / "CIFAR-100-C", 100, 100, "int64", "gaussian_noise")
