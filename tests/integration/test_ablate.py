"""`cllm4rec ablate` trains and evaluates variants by their commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cllm4rec_dist import cli
from tests.integration.runs import ROOT, write_config


@pytest.mark.slow
@pytest.mark.integration
def test_two_variants_at_once_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = str(write_config(tmp_path))
    command = ["ablate", "--pretrain", config, "--finetune", config, "--output", "table", "--jobs", "2"]
    choices = ["--variants", "llm-scratch,llm-prerec", "--seeds", "0", "--no-baselines", "--launcher", "process"]
    cli.app([*command, *choices, "max_steps=2"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "| LLM-Scratch | 1 |" in printed
    assert "| LLM-PreRec | 1 |" in printed
    content = json.loads((tmp_path / "table/ablation.json").read_text())
    scratch, pretrained = content["variants"]
    assert scratch["num_trained"] > pretrained["num_trained"], "a random decoder is trained whole"
    assert pretrained["against_first"]["verdict"] in ("ahead", "level", "behind", "too few users")
    for name in ("llm-scratch", "llm-prerec"):
        assert "\nReport: " in (tmp_path / f"table/{name}/seed-0/log.txt").read_text()
