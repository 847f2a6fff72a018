"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.command_line import write_pictures

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def test_write_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, script = blocks("write-a-method.md", "python")
    body = [line for line in method.splitlines() if line.strip()]
    assert len(body) <= 45
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_method.py").write_text(method)
    from metatpt.cli import main

    (command,) = blocks("write-a-method.md", "bash")
    arguments = command.split()[1:]
    small = ["--model.n_views", "4", "--data.max_samples", "4", "--run", "out", "--trainer.accelerator", "cpu"]
    assert main([*arguments, *small]) == 0
    assert "share: 0.3" in (tmp_path / "out" / "config.yaml").read_text()
    assert (tmp_path / "out" / "predictions.csv").exists()
    namespace: dict[str, object] = {}
    exec(method, namespace)
    exec(
        script.replace("max_samples=24", "max_samples=4").replace(
            "inference_mode", "accelerator='cpu', inference_mode"
        ),
        namespace,
    )
    assert (tmp_path / "runs" / "mixture" / "metrics.json").exists()


def test_write_a_prompt_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (learner,) = blocks("training.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_prompt.py").write_text(learner)
    monkeypatch.delitem(sys.modules, "my_prompt", raising=False)  # of another test in this process
    from metatpt.cli import main

    (command,) = blocks("training.md", "bash")
    small = ["--model.n_views", "4", "--data.max_samples", "4", "--run", "out", "--trainer.accelerator", "cpu"]
    assert main([*command.split()[1:], *small]) == 0
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]["init_args"]
    assert saved["prompt"] == {"class_path": "my_prompt.ShiftPrompt", "init_args": {"size": 0.5}}
    few = ["--data.shots", "1", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--data.max_samples", "4"]
    assert (
        main(
            ["fit", "--model", "PromptTrainingModule", "--model.prompt", "my_prompt.ShiftPrompt", "--run", "fit", *few]
        )
        == 0
    )
    checkpoint = torch.load(tmp_path / "fit" / "checkpoints" / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ["prompt.tuned.shift"]


def test_own_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("data.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_birds.py").write_text(code)
    for split in ("train", "val", "test"):
        write_pictures(tmp_path / "birds" / split, "crow", "owl", n=2)
    from metatpt.cli import main

    options = ["--data", "my_birds.BirdsDataModule", "--data.root", "."]
    assert main(["doctor", *options]) == 1  # too few
    assert main(["doctor", *options, "--data.partial", "true"]) == 0


def test_a_run_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, script = blocks("runs.md", "python")
    monkeypatch.chdir(tmp_path)
    small = script.replace("max_samples=24", "max_samples=4").replace(
        "    logger=False", "    accelerator='cpu',\n    logger=False"
    )
    exec(small, {})
    exec(reads, {})
    left = {file.name for file in (tmp_path / "runs" / "mine").iterdir()}
    assert {"metrics.json", "predictions.csv", "views", "cost.json"} <= left


def test_callbacks_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks("runs.md", "yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "callbacks.yaml").write_text(text)
    from metatpt.cli import main

    small = ["--model.n_views", "4", "--data.max_samples", "4", "--run", "out", "--trainer.accelerator", "cpu"]
    assert main(["test", "-c", "default", "-c", "callbacks.yaml", *small]) == 0
    assert (tmp_path / "out" / "cost.json").exists()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in DOCS.glob("*.md"))])
def test_pages_are_finished_and_their_links_lead_somewhere(page: str) -> None:
    file = DOCS.parent / page
    text = file.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target
