"""Vectors of item texts from the backbone: the hidden states of transformers' own model, under ZeRO-3, at any world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.manifest import ContentKind
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model import hidden_vectors
from cllm4rec_dist.model.hidden_vectors import local_item_texts, mean_hidden_states
from cllm4rec_dist.system import _text_vectors, assemble, init_embeddings
from tests.harness import alone, run_ranks
from tests.training import Made, make_config


def texts_of(world: World, url: str) -> list[Tensor]:
    texts = local_item_texts(Corpus.open(url, verify=False), RowPartition(17, world.size), world)
    return [torch.from_numpy(text) for text in texts]


def reference_texts(url: str) -> list[list[int]]:
    corpus = Corpus.open(url, verify=False)
    texts: list[list[int]] = [[] for _ in range(17)]
    for index in range(len(corpus.content)):
        record = corpus.content.read_record(index)
        lists = Ragged(record["offsets"].astype(np.int64), record["tokens"])
        for text, kind, item in zip(lists, record["kind"], record["items"], strict=True):
            if kind == ContentKind.ITEM_TITLE:
                texts[item] = text.tolist()
    return texts


def vectors_of(world: World, config: RunConfig) -> Tensor:
    system = assemble(config, world)
    source = _text_vectors(system)
    assert source is not None
    vectors = source.compute()
    init_embeddings(system)
    rows = system.recommender.collaborative.items.local_rows
    assert rows.shape[1] == 6
    assert rows.isfinite().all()
    return vectors


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_vectors_are_mean_hidden_states_of_the_backbone_alone(made: Made, tmp_path: Path, size: int) -> None:
    embeddings = {"init": "spectral", "item_vectors": "backbone", "dim": 6}  # rows narrower than the vectors
    config = make_config(made, tmp_path / "run", embeddings=embeddings)
    vectors = torch.cat(run_ranks(size, vectors_of, config))
    model = AutoModel.from_pretrained(made[2]).eval()
    for vector, text in zip(vectors, reference_texts(made[1]), strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        # Two layers: the middle is after the first one.
        torch.testing.assert_close(vector, hidden[1][0].mean(0), rtol=1e-4, atol=1e-6)


def test_every_rank_has_the_texts_of_its_items(made: Made) -> None:
    expected = reference_texts(made[1])
    assert [text.tolist() for text in texts_of(alone(), made[1])] == expected
    parts = run_ranks(2, texts_of, made[1])
    assert [text.tolist() for part in parts for text in part] == expected


def test_long_and_empty_texts_are_averaged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_vectors, "_BATCH_TOKENS", 5)
    texts = Ragged.from_lists([[1, 2], [], [3] * 9, [4]], dtype=np.int64)

    def encode(words: Tensor, positions: Tensor) -> Tensor:
        return torch.stack([words.float(), positions.float()], dim=-1)

    means = mean_hidden_states(texts, 2, encode, alone())
    assert means.tolist() == [[1.5, 0.5], [0, 0], [3, 4], [4, 0]]
