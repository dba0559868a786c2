"""A pretrained LLaMA-architecture backbone with LoRA on real review texts: loss falls, the checkpoint resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cllm4rec_dist import cli
from tests.integration.smollm2 import build

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CLLM4REC_DATA", ROOT.parent / "shared" / "data"))

CONFIG = """
corpus: {corpus}
backbone: {backbone}
output: {output}
precision: bf16
activation_checkpointing: true
adapter: {{kind: lora, rank: 8}}
batch: {{users: 8, texts: 8}}
optimizer: {{lr: 1.0e-3, embeddings_lr: 1.0e-3, warmup_steps: 2}}
checkpoint: {{every_steps: 2}}
"""


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.integration
@pytest.mark.skipif(not (DATA / "musical-instruments").is_dir(), reason="the review data set is not on this machine")
def test_smollm2_with_lora_learns_from_real_reviews_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, corpus, output = build(tmp_path / "smollm2", layers=2), tmp_path / "corpus", tmp_path / "run"
    monkeypatch.setenv("CLLM4REC_DATA", str(DATA))
    recipe = str(ROOT / "shards/musical-instruments.yaml")
    cli.app(["prepare", recipe, str(corpus), "--tokenizer", str(backbone), "max_text_tokens=64"], standalone_mode=False)
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(corpus=corpus, backbone=backbone, output=output))
    ranks = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")

    command(*ranks, "launch/pretrain.py", "--config", str(config), "max_steps=4")
    command(*ranks, "launch/pretrain.py", "--config", str(config), "max_steps=6")

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    words = [line["loss/text"] for line in lines]
    assert sum(words[-2:]) < 0.95 * sum(words[:2])
    assert sum(line["loss"] for line in lines[-2:]) < sum(line["loss"] for line in lines[:2])
