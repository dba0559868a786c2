"""A pretrained LLaMA-architecture backbone with LoRA on real review texts: loss falls, the checkpoint resumes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cllm4rec_dist import cli
from tests.harness import run_ranks
from tests.integration.smollm2 import build
from tests.training import make_config, metrics, run

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CLLM4REC_DATA", ROOT.parent / "shared" / "data"))

CONFIG = {
    "precision": "bf16",
    "activation_checkpointing": True,
    "adapter": {"kind": "lora", "rank": 8},
    "batch": {"users": 8, "texts": 8},
    "optimizer": {"lr": 1e-3, "embeddings_lr": 1e-3, "warmup_steps": 2},
    "checkpoint": {"every_steps": 2},
}


@pytest.mark.integration
@pytest.mark.skipif(not (DATA / "musical-instruments").is_dir(), reason="the review data set is not on this machine")
def test_smollm2_with_lora_learns_from_real_reviews_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, corpus, output = build(tmp_path / "smollm2", layers=2), tmp_path / "corpus", tmp_path / "run"
    monkeypatch.setenv("CLLM4REC_DATA", str(DATA))
    recipe = str(ROOT / "shards/musical-instruments.yaml")
    cli.app(["prepare", recipe, str(corpus), "--tokenizer", str(backbone), "max_text_tokens=64"], standalone_mode=False)
    config = make_config((tmp_path, str(corpus), str(backbone)), output, **CONFIG)

    for steps in (4, 6):
        run_ranks(2, run, config.model_copy(update={"max_steps": steps}))

    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, 7))
    words = [line["loss/text"] for line in lines]
    assert sum(words[-2:]) < 0.95 * sum(words[:2])
    assert sum(line["loss"] for line in lines[-2:]) < sum(line["loss"] for line in lines[:2])
