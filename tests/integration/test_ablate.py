"""`cllm4rec ablate` trains and evaluates variants by their commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cllm4rec_dist import cli
from cllm4rec_dist.cli import child
from tests.integration.runs import ROOT, write_config


@pytest.mark.slow
@pytest.mark.integration
def test_two_variants_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainings are commands; `evaluate` runs in this process, which has imported torch already."""

    def run_command(name: str, *arguments: str) -> None:
        if name == "evaluate":
            cli.app([name, *arguments], standalone_mode=False)
        else:
            child.run_command(name, *arguments)

    monkeypatch.setattr("cllm4rec_dist.cli.ablate.run_command", run_command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = str(write_config(tmp_path))
    command = ["ablate", "--pretrain", config, "--finetune", config, "--output", "table"]
    choices = ["--variants", "llm-scratch,llm-prerec", "--seeds", "0", "--no-baselines", "--launcher", "process"]
    cli.app([*command, *choices, "max_steps=2"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "| LLM-Scratch | 1 |" in printed
    assert "| LLM-PreRec | 1 |" in printed
    content = json.loads((tmp_path / "table/ablation.json").read_text())
    scratch, pretrained = content["variants"]
    assert scratch["num_trained"] > pretrained["num_trained"], "a random decoder is trained whole"
    assert pretrained["against_first"]["verdict"] in ("ahead", "level", "behind", "too few users")
