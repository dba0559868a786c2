"""What is exported computes what the run computes, in plain PEFT and transformers."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from cllm4rec_dist.errors import CheckpointError, ConfigError
from cllm4rec_dist.export import TABLES_FILE, export
from cllm4rec_dist.inference import load
from cllm4rec_dist.topology import World
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.test_train import make_config, run


def hidden(world: World, folder: str, embeddings: Tensor) -> list[Tensor]:
    system, _ = load(folder, world)
    system.train(False)
    with torch.no_grad():
        states = [system.engine(embeddings, None, boundary) for boundary in (embeddings.shape[:2].numel(), 0)]
    rows = {name: p.detach().clone() for name, p, _ in system.recommender.sharded_parameters()}
    return [*states, rows["collaborative.items"], rows["content.users"]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_exported_run_computes_the_same(tmp_path: Path, kind: str) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog)
    made = tmp_path, make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)
    adapter = {"kind": kind, "rank": 4} if kind == "lora" else {"kind": kind}
    run_ranks(3, run, make_config(made, tmp_path / "run", adapter=adapter, max_steps=5))
    output = tmp_path / "exported"
    written = export(str(tmp_path / "run"), output)
    embeddings = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    (wanted,) = run_ranks(1, hidden, str(tmp_path / "run"), embeddings)

    if kind == "lora":
        assert written == ["collaborative", "content", "items.parquet", TABLES_FILE, "users.parquet"]
        for name, states in zip(("collaborative", "content"), wanted[:2], strict=True):
            model = PeftModel.from_pretrained(AutoModel.from_pretrained(backbone), str(output / name)).eval()
            assert not torch.allclose(states, AutoModel.from_pretrained(backbone).eval()(inputs_embeds=embeddings)[0])
            torch.testing.assert_close(model(inputs_embeds=embeddings)[0], states, rtol=1e-5, atol=1e-5)
    else:
        assert written == ["backbone", "items.parquet", TABLES_FILE, "users.parquet"]
        model = AutoModel.from_pretrained(output / "backbone").eval()
        torch.testing.assert_close(model(inputs_embeds=embeddings)[0], wanted[0], rtol=1e-5, atol=1e-5)
    tables = load_file(output / TABLES_FILE)
    assert torch.equal(tables["collaborative.items"], wanted[-2])
    assert torch.equal(tables["content.users"], wanted[-1])
    assert pq.read_table(output / "items.parquet")["item"].to_pylist() == catalog.item_ids
    with pytest.raises(ConfigError, match="exists"):
        export(str(tmp_path / "run"), output)
    make_backbone(tmp_path / "backbone", catalog, seed=1)
    with pytest.raises(CheckpointError, match="is not the one that the checkpoint was trained on"):
        export(str(tmp_path / "run"), tmp_path / "other")
