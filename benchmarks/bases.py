r"""Methods on trained prompts: trains each base for each seed, tests each method on it, and prints a Markdown table.

    python benchmarks/bases.py --to runs/bases --bases hand-written CoOp --methods ZeroShotModule TPTModule \
        --tests "--data.shift none" "--data.shift rotation" --seeds 0 1 2 --all "--data.batch_size 16"

What is there already is not run again, so that a stopped script goes on. A cell is the mean over seeds of accuracy in %
(and its standard deviation) and of the negative log-likelihood.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from pathlib import Path

from metatpt.cli import main as metatpt

_FEW_SHOT = "--model PromptTrainingModule"
_META = "--model MetaTrainingModule --model.n_views 16 --model.outer_steps 2 --trainer.gradient_clip_val 1"

BASES = {
    "hand-written": None,
    "CoOp": _FEW_SHOT,
    "VPT": f"{_FEW_SHOT} --model.prompt VisualPrompt --model.prompt.depth 5",
    "MaPLe": f"{_FEW_SHOT} --model.prompt MultiModalPrompt --model.prompt.depth 3",
    "MMRL": f"{_FEW_SHOT} --model.prompt RepresentationPrompt --model.prompt.width 64 --model.prompt.first_block 2 "
    "--model.prompt.last_block 3",
    "UPT": f"{_FEW_SHOT} --model.prompt UnifiedPrompt",
    "CoCoOp": f"{_FEW_SHOT} --model.prompt ConditionalPrompt",
    "MAML": _META,
    "FOMAML": f"{_META} --model.meta fomaml",
    "Reptile": f"{_META} --model.meta reptile",
    "multitask": f"{_META} --model.meta multitask",
    "MAML, policy": f"{_META} --model.view_start policy --model.augmentation offline",
    "MAML, learned rates": f"{_META} --model.learned_rates per_parameter",
}
"""Options of ``metatpt fit``."""


def run(command: str, folder: Path, options: list[str], done: str) -> Path:
    """One run of the command line, unless it is there.

    Args:
        command: ``fit`` or ``test``.
        folder: Its run folder.
        options: Of the command line.
        done: File in the folder that a finished run has.
    """
    if not (folder / done).exists():
        status = metatpt([command, *options, "--run", str(folder), "--trainer.enable_progress_bar", "false"])
        if status:
            raise SystemExit(f"metatpt {command} {shlex.join(options)} ended with status {status}")
    return folder / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=["hand-written", "CoOp", "MaPLe", "MMRL"])
    parser.add_argument("--methods", nargs="+", default=["ZeroShotModule", "TPTModule", "MetaTPTModule"])
    parser.add_argument("--tests", nargs="+", default=["--data.shift none"], help="options of each test set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--all", default="", help="options of all runs")
    parser.add_argument("--fit", default="", help="options of training")
    parser.add_argument("--test", default="", help="options of tests, but for the zero-shot ones")
    options = parser.parse_args()
    print(f"| base | method | {' | '.join(options.tests)} |\n|{'---|' * (2 + len(options.tests))}")
    for base in options.bases:
        checkpoints = {}
        for seed in options.seeds:
            common = [*shlex.split(options.all), "--seed_everything", str(seed)]
            training = BASES[base]
            if training is not None:
                folder = options.to / f"{base}-{seed}".replace(", ", "-").replace(" ", "-")
                arguments = [*shlex.split(training), *common, *shlex.split(options.fit)]
                checkpoints[seed] = run("fit", folder, arguments, "checkpoints/last.ckpt")
        for method in options.methods:
            cells = []
            for test in options.tests:
                found = []
                for seed in options.seeds:
                    name = f"{base}-{seed}-{method}-{test}".replace("--data.", "").replace(", ", "-").replace(" ", "-")
                    where = ["--ckpt_path", str(checkpoints[seed])] if seed in checkpoints else []
                    more = [] if method == "ZeroShotModule" else shlex.split(options.test)
                    common = [*shlex.split(options.all), "--seed_everything", str(seed)]
                    arguments = ["--model", *shlex.split(method), *common, *where, *shlex.split(test), *more]
                    file = run("test", options.to / name.replace("/", "-"), arguments, "metrics.json")
                    found.append(json.loads(file.read_text()))
                cells.append(cell(found))
            print(f"| {base} | {method} | {' | '.join(cells)} |", flush=True)


def cell(runs: list[dict[str, float]]) -> str:
    """Means over seeds."""
    accuracies = [100 * each["accuracy"] for each in runs]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
    return f"{statistics.mean(accuracies):.1f}{spread} ({statistics.mean(each['nll'] for each in runs):.2f})"


if __name__ == "__main__":
    main()
