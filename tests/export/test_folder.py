"""What is exported computes what the run computes, in plain PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError, ConfigError
from cllm4rec_dist.evaluation.topk import rank_users
from cllm4rec_dist.evaluation.trained_run import load_sharded
from cllm4rec_dist.export.folder import SCORING_FILE, TABLES_FILE, export
from cllm4rec_dist.export.models import CAUSAL_LM
from cllm4rec_dist.export.options import ExportOptions
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import Made, make_config, run

EMBEDDINGS = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(0))
LLMS = ("collaborative", "content")
FILES = [
    "item_embeddings.parquet",
    "items.parquet",
    SCORING_FILE,
    TABLES_FILE,
    "user_embeddings.parquet",
    "users.parquet",
]


def make(folder: Path, family: str) -> Made:
    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog, family=family)
    return folder, make_corpus(folder / "corpus", catalog, backbone), str(backbone)


def computed(world: World, folder: str) -> dict[str, Any]:
    """What the run computes: hidden states of both LLMs, and every user's scores of every item."""
    system, _ = load_sharded(folder, world)
    system.train(False)
    result: dict[str, Any] = {}
    with torch.no_grad():
        for llm, boundary in zip(LLMS, (EMBEDDINGS.shape[:2].numel(), 0), strict=True):
            result[llm] = system.engine(EMBEDDINGS, None, boundary)
            result[f"{llm} of words"] = system.engine(
                F.embedding(WORDS, system.recommender.words.embedding), None, boundary
            )
    result |= {name: p.detach().clone() for name, p, _ in system.recommender.sharded_parameters()}
    users, items = np.arange(system.corpus.num_users), system.corpus.num_items
    history = system.corpus.split("train")
    for name, named in (("scores", users), ("scores without row", np.full_like(users, -1))):
        result[name] = torch.zeros(len(users), items)
        for block in rank_users(system, named, history, items, 5):
            rows = torch.from_numpy(users[block.index])
            result[name][rows[:, None], torch.from_numpy(block.items)] = torch.from_numpy(block.scores)
    result["history"] = [history[user].tolist() for user in users]
    return result


@torch.no_grad()
def exported_scores(
    output: Path, decoder: Any, embed: Tensor, histories: list[list[int]], *, without_row: bool = False
) -> Tensor:
    """[users, items] by what `scoring.json` says, of the users or of people without a row who have their histories."""
    scoring, tables = json.loads((output / SCORING_FILE).read_text()), load_file(output / TABLES_FILE)
    users, items, head = tables["collaborative.users"], tables["collaborative.items"], scoring["head"]
    result = []
    for user, history in enumerate(histories):
        shown = items[history[-scoring["history"]["longest"] :]]
        row = tables[scoring["users"]["without_row"]] if without_row else users[user : user + 1]
        slots = {"user": row, "history": shown}
        tokens = [slots[t] if isinstance(t, str) else embed[t : t + 1] for t in scoring["prompt"]]
        query = decoder(inputs_embeds=torch.cat(tokens)[None])[0][0, -1]
        length = items.shape[1] ** 0.5
        if head["projection"]:
            query = query / query.square().mean().sqrt() @ tables["head.projection"]
        if head["pool_residual"]:
            query = query + length * F.normalize(shown.sum(dim=0), dim=0)
        if head["similarity"] == "cosine":
            direction = query / query.norm().clamp_min(length / 2 if head["projection"] else 0.0)
            score = direction @ F.normalize(items, dim=1).T / head["temperature"]
        else:
            score = query @ items.T
        result.append(score + tables["head.bias"] if head["item_bias"] else score)
    return torch.stack(result)


def untie(backbone: Path) -> None:
    """Give a backbone a separate LM head."""
    model = AutoModelForCausalLM.from_pretrained(backbone, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(backbone)


def base(cls: Any, folder: Path | str) -> Any:
    return cls.from_pretrained(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exported_adapters_compute_the_same_in_both_model_classes(tmp_path: Path, family: str) -> None:
    made = make(tmp_path, family)
    run_ranks(3, run, make_config(made, tmp_path / "run", max_steps=5))
    output = tmp_path / "exported"
    folders = [*LLMS, *(llm + CAUSAL_LM for llm in LLMS)]
    assert export(str(tmp_path / "run"), output) == sorted([*folders, *FILES])
    (expected,) = run_ranks(1, computed, str(tmp_path / "run"))

    plain = base(AutoModel, made[2])(inputs_embeds=EMBEDDINGS)[0]
    logits = base(AutoModelForCausalLM, made[2])(WORDS).logits
    for llm in LLMS:
        assert not torch.allclose(expected[llm], plain, atol=1e-3)
        decoder = PeftModel.from_pretrained(base(AutoModel, made[2]), str(output / llm)).eval()
        torch.testing.assert_close(decoder(inputs_embeds=EMBEDDINGS)[0], expected[llm], rtol=1e-5, atol=1e-5)
        head = base(AutoModelForCausalLM, made[2]).get_output_embeddings()
        language_models = [
            PeftModel.from_pretrained(base(AutoModelForCausalLM, made[2]), str(output / llm)),
            PeftModel.from_pretrained(base(AutoModelForCausalLM, made[2]), str(output / (llm + CAUSAL_LM))),
            AutoPeftModelForCausalLM.from_pretrained(str(output / (llm + CAUSAL_LM))),
        ]
        for model in language_models:
            result = model.eval()(input_ids=WORDS).logits
            assert not torch.allclose(result, logits, atol=1e-3)
            torch.testing.assert_close(result, head(expected[f"{llm} of words"]), rtol=1e-4, atol=1e-5)

    tables = load_file(output / TABLES_FILE)
    assert torch.equal(tables["collaborative.items"], expected["collaborative.items"])
    assert torch.equal(tables["content.users"], expected["content.users"])
    assert pq.read_table(output / "items.parquet")["item"].to_pylist() == make_catalog().item_ids.to_list()
    decoder = PeftModel.from_pretrained(base(AutoModel, made[2]), str(output / "collaborative")).eval()
    embed = base(AutoModel, made[2]).get_input_embeddings().weight
    scores = exported_scores(output, decoder, embed, expected["history"])
    torch.testing.assert_close(scores, expected["scores"], rtol=1e-4, atol=1e-4)


HEADS = [
    {"similarity": "cosine", "item_bias": True, "pool_residual": False, "projection": True},
    {"similarity": "dot", "item_bias": False, "pool_residual": True},
    {"similarity": "dot", "item_bias": True, "pool_residual": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_an_exported_whole_backbone_keeps_its_word_head_and_every_form_of_the_item_head(
    tmp_path: Path, head: dict[str, Any]
) -> None:
    family = "gpt2" if head["item_bias"] else "llama"
    made = make(tmp_path, family)
    if family == "llama":
        untie(Path(made[2]))
    method = {"max_history": 4, "shared_user_ratio": 0.5}
    config = make_config(made, tmp_path / "run", adapter={"kind": "full"}, head=head, method=method, max_steps=4)
    run_ranks(2, run, config)
    output = tmp_path / "exported"
    assert "backbone" in export(str(tmp_path / "run"), output)
    (expected,) = run_ranks(1, computed, str(tmp_path / "run"))
    decoder = base(AutoModel, output / "backbone")
    torch.testing.assert_close(decoder(inputs_embeds=EMBEDDINGS)[0], expected["content"], rtol=1e-5, atol=1e-5)
    head_weight = base(AutoModelForCausalLM, made[2]).get_output_embeddings().weight
    model = base(AutoModelForCausalLM, output / "backbone")
    assert torch.equal(model.get_output_embeddings().weight, head_weight)
    hidden = expected["content of words"]
    torch.testing.assert_close(model(WORDS).logits, hidden @ head_weight.T, rtol=1e-4, atol=1e-5)
    scores = exported_scores(output, decoder, decoder.get_input_embeddings().weight, expected["history"])
    torch.testing.assert_close(scores, expected["scores"], rtol=1e-4, atol=1e-4)
    assert len(load_file(output / TABLES_FILE)["collaborative.users"]) == len(expected["history"])
    without_row = exported_scores(
        output, decoder, decoder.get_input_embeddings().weight, expected["history"], without_row=True
    )
    torch.testing.assert_close(without_row, expected["scores without row"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without_row, scores, atol=1e-4)


@pytest.mark.slow
def test_a_run_without_texts_exports_no_adapter_of_the_content_llm(tmp_path: Path) -> None:
    made = make(tmp_path, "gpt2")
    run_ranks(1, run, make_config(made, tmp_path / "run", max_steps=1, batch={"users": 9, "texts": 0}))
    written = export(str(tmp_path / "run"), tmp_path / "exported")
    assert [name for name in written if "." not in name] == ["collaborative", f"collaborative{CAUSAL_LM}"]


@pytest.mark.slow
def test_a_run_of_rows_alone_exports_no_model(tmp_path: Path) -> None:
    made = make(tmp_path, "gpt2")
    run_ranks(2, run, make_config(made, tmp_path / "run", "finetune", adapter={"kind": "none"}, max_steps=3))
    output = tmp_path / "exported"
    assert export(str(tmp_path / "run"), output) == FILES
    (expected,) = run_ranks(1, computed, str(tmp_path / "run"))
    decoder = base(AutoModel, made[2])
    embed = decoder.get_input_embeddings().weight
    for name in ("scores", "scores without row"):
        scores = exported_scores(output, decoder, embed, expected["history"], without_row=name != "scores")
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_backbone_without_word_head_is_exported_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path, "llama")
    weights = Path(made[2]) / "model.safetensors"
    settings = Path(made[2]) / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tie_word_embeddings": False}))
    kept = {name: value for name, value in load_file(weights).items() if "lm_head" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    config = make_config(made, tmp_path / "run", adapter={"kind": "full"}, max_steps=1, batch={"users": 9, "texts": 0})
    run_ranks(1, run, config)
    export(str(tmp_path / "run"), tmp_path / "exported")
    assert "has no LM head (lm_head.weight)" in caplog.text
    names = load_file(tmp_path / "exported" / "backbone" / "model.safetensors").keys()
    assert not any("lm_head" in name for name in names)


@pytest.mark.slow
def test_an_export_is_refused_where_it_would_be_of_something_else(tmp_path: Path) -> None:
    made = make(tmp_path, "gpt2")
    run_ranks(1, run, make_config(made, tmp_path / "run", max_steps=1))
    exported = str(tmp_path / "run"), tmp_path / "exported"
    export(*exported)
    with pytest.raises(ConfigError, match="exists"):
        export(*exported)
    other = make_corpus(tmp_path / "other", make_catalog(seed=1), Path(made[2]))
    with pytest.raises(CheckpointError, match="corpus fingerprint"):
        export(str(tmp_path / "run"), tmp_path / "again", corpus=other)
    moved = (tmp_path / "backbone").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="--backbone PATH"):
        export(str(tmp_path / "run"), tmp_path / "again")
    assert export(str(tmp_path / "run"), tmp_path / "again", backbone=str(moved))
    make_backbone(tmp_path / "backbone", make_catalog(), seed=1)
    with pytest.raises(CheckpointError, match="backbone fingerprint"):
        export(str(tmp_path / "run"), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_a_folder_to_publish_says_which_licence_is_missing_and_shows_no_bars(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    export(str(runs["cosine"]), tmp_path / "bare", ExportOptions(hub=True))
    assert "no licence: the model card names none" in caplog.text
    assert "has no licence file" in caplog.text
    assert "it/s]" not in capfd.readouterr().err
    caplog.clear()
    backbone = Path(shutil.copytree(runs["cosine"].parent / "backbone", tmp_path / "backbone"))
    (backbone / "LICENSE.txt").write_text("Use it.")
    options = ExportOptions(hub=True, license="apache-2.0")
    export(str(runs["cosine"]), tmp_path / "whole", options, backbone=str(backbone))
    assert "no licence" not in caplog.text
    assert (tmp_path / "whole/backbone/LICENSE.txt").read_text() == "Use it."
