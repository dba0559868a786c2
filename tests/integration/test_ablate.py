"""`cllm4rec ablate` trains and evaluates variants by their commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.runs import BIN, ROOT, clean_environment, write_config


@pytest.mark.slow
@pytest.mark.integration
def test_two_variants_by_one_command(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    command = [str(BIN / "cllm4rec"), "ablate", "--pretrain", config, "--finetune", config, "--output", "table"]
    choices = ["--variants", "llm-scratch,llm-prerec", "--seeds", "0", "--no-baselines", "--launcher", "process"]
    run = subprocess.run(
        [*command, *choices, "max_steps=2"],
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "| LLM-Scratch | 1 |" in run.stdout
    assert "| LLM-PreRec | 1 |" in run.stdout
    content = json.loads((tmp_path / "table/ablation.json").read_text())
    scratch, pretrained = content["variants"]
    assert scratch["num_trained"] > pretrained["num_trained"], "a random decoder is trained whole"
    assert pretrained["against_first"]["verdict"] in ("ahead", "level", "behind", "too few users")
