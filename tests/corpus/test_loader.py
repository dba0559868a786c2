"""All ranks together read each global batch once, in parts of equally many tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.catalog import Catalog, Reviews
from cllm4rec_dist.corpus.loader import BatchLoader, StepBatch
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.reviews import ReviewStore
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.corpus.writer import write_corpus
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.build_backbone import train_tokenizer
from tests.documents import Document, documents_of_step

NUM_USERS, NUM_ITEMS, NUM_TEXTS = 230, 300, 170
TOKENIZER = WordTokenizer(train_tokenizer(["the quiet trail", "blue espresso"], 320))
STAGES = ["pretrain", "finetune"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Histories with a heavy tail: half of them have 1 or 2 items, one has hundreds."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.pareto(1.0, NUM_USERS) + 1, 1, NUM_ITEMS).astype(np.int64)
    train = Ragged.from_lists([random.permutation(NUM_ITEMS)[:length] for length in lengths])
    held = Ragged.from_lists([[0]] * NUM_USERS)
    texts = [" ".join(["quiet"] * int(n)) for n in np.clip(random.lognormal(2, 1, NUM_TEXTS), 1, 100)]
    store = ReviewStore()
    store.append(np.arange(NUM_TEXTS), pl.Series(texts))
    catalog = Catalog(
        user_ids=pl.Series([f"u{n}" for n in range(NUM_USERS)]),
        item_ids=pl.Series([f"i{n}" for n in range(NUM_ITEMS)]),
        user_texts=pl.Series([""] * NUM_USERS),
        item_titles=pl.Series([""] * NUM_ITEMS),
        item_descriptions=pl.Series([""] * NUM_ITEMS),
        train=train,
        valid=held,
        test=held,
        reviews=Reviews(np.arange(NUM_TEXTS), train.values[train.offsets[:NUM_TEXTS]], np.arange(NUM_TEXTS), store),
        log=SkipLog(),
    )
    recipe = PrepareConfig.model_validate(
        {"name": "test", "source": {"format": "synthetic"}, "examples_per_record": 16, "records_per_shard": 3}
    )
    folder = tmp_path_factory.mktemp("batches") / "corpus"
    write_corpus(catalog, TOKENIZER, str(folder), recipe, progress=False)
    return Corpus.open(str(folder))


def source(corpus: Corpus, stage: str = "pretrain", rank: int = 0, size: int = 1, **batch: Any) -> BatchLoader:
    tree = {
        "stage": stage,
        "corpus": corpus.url,
        "backbone": "unused",
        "output": "unused",
        "shuffle_window": 4,
        "batch": {"users": 64, "texts": 40, "gradient_accumulation_steps": 2} | batch,
        "method": {"max_history": 200},
    }
    config = validate(RunConfig, tree, "test")
    space = TokenSpace(len(TOKENIZER), NUM_USERS, NUM_ITEMS)
    prompts = PromptBuilder(TOKENIZER, space, config.method, config.seed)
    return BatchLoader(corpus, prompts, config, World(rank, size, rank, torch.device("cpu")))


def ranks(corpus: Corpus, stage: str, size: int, **batch: Any) -> list[BatchLoader]:
    return [source(corpus, stage, rank, size, **batch) for rank in range(size)]


def contents(documents: list[Document]) -> list[tuple[Any, ...]]:
    return sorted(tuple(map(str, (d.key, d.token_ids.tolist(), d.targets.tolist()))) for d in documents)


@pytest.mark.parametrize("stage", STAGES)
def test_worlds_of_1_to_4_make_the_same_documents(corpus: Corpus, stage: str) -> None:
    alone = source(corpus, stage)
    # Into the second epoch of the users, and of the texts in the middle of a step.
    expected = [documents_of_step(alone, step) for step in range(6)]
    for size in range(2, 5):
        made = [[documents_of_step(s, step) for step in range(6)] for s in ranks(corpus, stage, size)]
        for step, (users, texts) in enumerate(expected):
            assert contents([d for rank in made for d in rank[step][0]]) == contents(users)
            assert contents([d for rank in made for d in rank[step][1]]) == contents(texts)


def test_what_is_told_is_what_is_read_and_everything_comes_once_an_epoch(corpus: Corpus) -> None:
    made = ranks(corpus, "pretrain", 3)
    assert made[0].steps_per_epoch == 4
    users, texts = [], []
    for step in range(17):  # 4 epochs of 230 users in 4 steps each, 4 passes over 170 texts in 4.25 steps each
        batches = [s.make(step) for s in made]
        assert {batch.epoch for batch in batches} == {step // 4}
        users += [(batch.epoch, user) for batch in batches for user in batch.users]
        texts += [text for batch in batches for text in batch.texts]
        for batch in batches:
            shown = torch.cat([m.ids["collaborative.users"] for m in batch.micro_batches])
            assert sorted(shown.tolist()) == sorted(batch.users)
            assert sum(len(m.ids["content.users"]) for m in batch.micro_batches) == len(batch.texts)
    whole = users[: 4 * NUM_USERS]
    assert Counter(whole) == Counter((epoch, user) for epoch in range(4) for user in range(NUM_USERS))
    sizes = made[0].text_record_sizes
    every = [(visit, record, i) for visit in range(4) for record, n in enumerate(sizes) for i in range(n)]
    assert Counter(texts) == Counter(every)


def tokens(batch: StepBatch) -> list[int]:
    """Real tokens of each micro-batch."""
    return [m.num_tokens for m in batch.micro_batches]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_micro_batches_of_all_ranks_have_equally_many_tokens(corpus: Corpus, stage: str, size: int) -> None:
    made = ranks(corpus, stage, size, gradient_accumulation_steps=1)
    for step in range(6):
        batches = [s.make(step) for s in made]
        loads = [load for batch in batches for load in tokens(batch)]
        longest = max(int(batch.micro_batches[0].positions.max()) + 1 for batch in batches)
        # Documents are not split: no part is longer than the mean and a few tokens, or than the longest document.
        assert max(loads) <= max(1.02 * sum(loads) / size, longest + 30), (step, loads, longest)


def test_later_micro_batches_have_shorter_rows_and_as_many_tokens(corpus: Corpus) -> None:
    made = ranks(corpus, "pretrain", 2, gradient_accumulation_steps=3)
    for step in range(3):
        batches = [s.make(step).micro_batches for s in made]
        longest = [max(int(batch[index].positions.max()) for batch in batches) for index in range(3)]
        assert longest == sorted(longest, reverse=True)
        assert longest[2] < longest[0] / 2
        loads = [batch[index].num_tokens for batch in batches for index in range(3)]
        assert max(loads) - min(loads) <= 2 * (longest[0] + 1)


def test_every_rank_has_every_micro_batch_even_without_documents(corpus: Corpus) -> None:
    for rank in ranks(corpus, "finetune", 4, users=2, texts=1):
        batches = rank.make(0).micro_batches
        assert len(batches) == 2
        for batch in batches:
            assert "text" in batch.targets
    assert all("text" not in m.targets for m in source(corpus, texts=0).make(0).micro_batches)


def test_a_step_can_be_made_anew_in_any_order(corpus: Corpus) -> None:
    first, second = source(corpus), source(corpus)
    forward = [contents(documents_of_step(first, step)[0]) for step in range(8)]
    assert [contents(documents_of_step(second, step)[0]) for step in reversed(range(8))] == forward[::-1]
