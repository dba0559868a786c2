"""Updates that items share through their words, against a model that keeps the parts of items and words apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import HeadConfig, RunConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.embedding_optimizer import EmbeddingOptimizer, Storage
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.shared_words import load_shared_words, local_item_words
from tests.harness import alone, run_ranks
from tests.training import Made, assert_equal_checkpoints, make_config, newest, run

WIDTH, NUM_WORDS, RATIO, LR, STEPS = 64, 400, 2.0, 1e-2, 4
BETAS = (0.9, 0.99)
WORDS = "collaborative.items.words"


def tables(corpus: Corpus, world: World) -> Recommender:
    return Recommender(
        corpus.num_users,
        corpus.num_items,
        FrozenEmbeddings(*torch.zeros(2, 5, WIDTH)),
        HeadConfig(item_bias=False),
        world,
        dropout=0.0,
        comm_dtype=torch.float32,
        sparse_gradients=True,
        content=False,
    )


def gradient_of(step: int, num_items: int) -> Tensor:
    return torch.randn(num_items, WIDTH, generator=torch.Generator().manual_seed(step))


def stepped(world: World, corpus_path: str, storage: Storage) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's rows after some steps, and the moments of the words."""
    corpus = Corpus.open(corpus_path)
    model = tables(corpus, world)
    words = load_shared_words(corpus, NUM_WORDS, model.item_partition, world, RATIO)
    optimizer = EmbeddingOptimizer(model, BETAS, storage, words)
    rows, (start, stop) = model.collaborative.items.local_rows, model.item_partition.range(world.rank)
    for step in range(STEPS):
        rows.grad = gradient_of(step, corpus.num_items)[start:stop].clone()
        optimizer.step(LR)
    return rows.detach().clone(), optimizer.state()[WORDS]


def with_parts_apart(corpus_path: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows, and moments of the words, of a model in fp64 whose own parts and words' parts are two parameters."""
    corpus = Corpus.open(corpus_path)
    tfidf = local_item_words(corpus, NUM_WORDS, RowPartition(corpus.num_items, 1), alone())
    weights = torch.from_numpy(tfidf.toarray()).double()
    own = torch.zeros(corpus.num_items, WIDTH, dtype=torch.float64, requires_grad=True)
    parts = torch.zeros(weights.shape[1], WIDTH, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([{"params": [own], "lr": LR}, {"params": [parts], "lr": LR * RATIO}], betas=BETAS)
    for step in range(STEPS):
        adam.zero_grad()
        ((own + weights @ parts) * gradient_of(step, corpus.num_items)).sum().backward()
        adam.step()
    return (own + weights @ parts).detach(), adam.state[parts]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_are_the_sums_of_own_and_words_parts_on_any_number_of_ranks(made: Made, size: int) -> None:
    expected, moments = with_parts_apart(made[1])
    ranks = run_ranks(size, stepped, made[1], "fp32")
    torch.testing.assert_close(torch.cat([rows for rows, _ in ranks]).double(), expected, rtol=0, atol=1e-6)
    for _, state in ranks:
        assert all(torch.equal(state[key], ranks[0][1][key]) for key in state), "words are the same on all ranks"
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key].double(), moments[key], rtol=1e-4, atol=1e-6)
    shared = expected - rows_without_words(made[1])
    assert shared.abs().max() > LR, "words change the rows"


def rows_without_words(corpus_path: str) -> Tensor:
    corpus = Corpus.open(corpus_path)
    model = tables(corpus, alone())
    optimizer = EmbeddingOptimizer(model, BETAS)
    for step in range(STEPS):
        model.collaborative.items.local_rows.grad = gradient_of(step, corpus.num_items)
        optimizer.step(LR)
    return model.collaborative.items.local_rows.detach()


@pytest.mark.parametrize("storage", ["int8", "cpu"])
def test_moments_of_words_are_stored_like_the_others(made: Made, storage: Storage) -> None:
    rows, state = stepped(alone(), made[1], storage)
    expected, whole = stepped(alone(), made[1], "fp32")
    tolerance = 4e-3 if storage == "int8" else 0.0  # an 8-bit moment has an error of 1 %
    torch.testing.assert_close(rows, expected, rtol=0, atol=tolerance)
    assert state["exp_avg"].shape == whole["exp_avg"].shape
    assert state["exp_avg"].device.type == "cpu"


def test_only_words_of_two_items_are_shared_and_the_most_frequent_ones(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus.open(made[1])
    partition = RowPartition(corpus.num_items, 1)
    whole = local_item_words(corpus, NUM_WORDS, partition, alone())
    counts = whole.getnnz(axis=0)
    assert counts.min() >= 2
    monkeypatch.setattr("cllm4rec_dist.model.shared_words.MAX_WORDS", 3)
    few = local_item_words(corpus, NUM_WORDS, partition, alone())
    assert sorted(few.getnnz(axis=0)) == sorted(counts)[-3:]


SETTINGS: dict[str, Any] = {
    "optimizer": {"lr": 1e-3, "embeddings_lr": 1e-3, "warmup_steps": 2, "words_lr_ratio": 1.0},
    "linear": {"neighbors": 0},
    "validation": {"every_epochs": 0},
}


@pytest.mark.slow
def test_a_run_that_shares_updates_resumes_bit_for_bit(made: Made, tmp_path: Path) -> None:
    def config(name: str, max_steps: int) -> RunConfig:
        return make_config(made, tmp_path / name, "finetune", max_steps=max_steps, **SETTINGS)

    run_ranks(2, run, config("whole", 4))
    run_ranks(2, run, config("stopped", 3))
    run_ranks(2, run, config("stopped", 4))
    assert_equal_checkpoints(tmp_path / "whole", tmp_path / "stopped")
    saved = Checkpoint.open(Store(f"{tmp_path}/whole/checkpoints"), newest(tmp_path / "whole").name).replicated()
    assert saved[f"{WORDS}.step"] == 4
    assert saved[f"{WORDS}.exp_avg"].any()


def test_sampled_items_cannot_share_updates(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"words_lr_ratio requires head\.num_negatives=0"):
        make_config(made, tmp_path, **(SETTINGS | {"head": {"num_negatives": 5}}))
