"""A backbone is copied as transformers reads it, without the paths that were noted in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm4rec_dist.export.models import copy_backbone
from tests.harness import make_backbone, make_catalog


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_copied_backbone_is_the_same_and_forgets_where_it_was(tmp_path: Path, max_shard_size: str) -> None:
    made = make_backbone(tmp_path / "made", make_catalog())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    model.save_pretrained(tmp_path / "from", max_shard_size=max_shard_size)
    tokenizer.save_pretrained(tmp_path / "from")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        file = tmp_path / "from" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: str(made)}))
    (tmp_path / "from" / "optimizer.pt").write_bytes(b"not the model's")
    copy_backbone(tmp_path / "from", tmp_path / "to")

    assert (len(list((tmp_path / "to").glob("model-*.safetensors"))) > 1) == (max_shard_size == "20KB")
    assert not (tmp_path / "to" / "optimizer.pt").exists()
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "to").iterdir())
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "to", local_files_only=True)
    for (name, expected), (_, result) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert torch.equal(expected, result), name
    assert AutoTokenizer.from_pretrained(tmp_path / "to")("espresso trail") == tokenizer("espresso trail")
