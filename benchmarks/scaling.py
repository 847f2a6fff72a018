"""Throughput of ``metatpt test`` on several processes against one, each with as many threads.

    python benchmarks/scaling.py --processes 1 2

The bundled model on the bundled benchmark, from the command line, over gloo; pictures a second as each run's
`metrics.json` says, which leaves out the start of processes. Runs are taken in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import machine, parser


def images_per_second(method: str, samples: int, processes: int, threads: int) -> float:
    """Of one run."""
    options = ["--model", method, "--data", "ShiftedShapesDataModule", "--data.max_samples", str(samples)]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", str(processes), "--run", "run"]
    options += ["--trainer.strategy", "ddp"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-m", "metatpt", "test", *options],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            sys.exit(result.stderr)
        metrics = json.loads(Path(folder, "run", "metrics.json").read_text())
    rate = float(metrics["images_per_second"])
    print(f"# {method} on {processes}: {rate:.2f} pictures/s", file=sys.stderr, flush=True)
    return rate


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--samples", type=int, default=96)
    arguments.add_argument("--method", nargs="+", default=["TPTModule", "MetaTPTModule"])
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="the first is compared with")
    options = arguments.parse_args()
    first, *others = options.processes
    print(
        f"bundled model, {options.samples} pictures, {machine(options.threads)} a process, {os.cpu_count()} cores, ",
        end="",
    )
    print(f"median of {options.repeats}\n")
    heads = [f"{n} process{'es' * (n > 1)}, pictures/s" for n in options.processes] + [f"{n} / {first}" for n in others]
    print(f"| method | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for method in options.method:
        found: dict[int, list[float]] = {n: [] for n in options.processes}
        for _ in range(options.repeats):
            for n, rates in found.items():
                rates.append(images_per_second(method, options.samples, n, options.threads))
        rate = {n: statistics.median(rates) for n, rates in found.items()}
        cells = [f"{rate[n]:.2f}" for n in options.processes] + [f"{rate[n] / rate[first]:.2f} x" for n in others]
        print(f"| {' | '.join([method, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
