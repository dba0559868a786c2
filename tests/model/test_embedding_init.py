"""Initial rows: equal at any world size, scaled like the words, item rows from interactions and texts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cllm4rec_dist.config import EmbeddingsConfig
from cllm4rec_dist.corpus.catalog import Reviews
from cllm4rec_dist.corpus.reviews import ReviewStore
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.model import embedding_init
from cllm4rec_dist.model.embedding_init import (
    init_content,
    init_items,
    init_prior,
    spectral_item_factors,
    vectors_from_file,
)
from cllm4rec_dist.model.init_cache import InitCache
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding
from tests.harness import alone, make_backbone, make_catalog, make_corpus, run_ranks

SCALE = 0.02
NUM_ROWS = 9001  # three noise blocks of 4,096 rows, which no shard of 2 or 3 ranks begins or ends with
WIDTH, NUM_FACTORS = 6, 4


def table(num_rows: int, width: int, world: World) -> RowShardedEmbedding:
    return RowShardedEmbedding(num_rows, width, world, sparse_gradients=False)


def factors() -> Tensor:
    """Unit rows, and zero for every third item."""
    rows = torch.randn(NUM_ROWS, NUM_FACTORS, generator=torch.Generator().manual_seed(1))
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows[::3] = 0
    return rows


def started(world: World) -> dict[str, Tensor]:
    users, items, content = (table(NUM_ROWS, WIDTH, world) for _ in range(3))
    few = table(2, WIDTH, world)  # more ranks than rows
    init_prior(users, SCALE, world, seed=3, index=1)
    init_prior(items, SCALE, world, seed=3, index=0)
    init_items(items, factors()[slice(*items.partition.range(world.rank))], SCALE, seed=3)
    init_content(content, items, EmbeddingsConfig(lambda_l=0.1, lambda_c=0.4), SCALE, world, seed=3, index=2)
    init_prior(few, SCALE, world, seed=3, index=1)
    tables = {"users": users, "items": items, "content": content, "few": few}
    return {name: rows.local_rows.detach().clone() for name, rows in tables.items()}


@pytest.fixture(scope="module")
def starts() -> dict[int, dict[str, Tensor]]:
    """Whole tables by world size."""
    whole: dict[int, dict[str, Tensor]] = {}
    for size in (1, 2, 3):
        ranks = run_ranks(size, started)
        whole[size] = {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["users", "items", "content", "few"])
@pytest.mark.parametrize("size", [2, 3])
def test_initial_rows_do_not_depend_on_the_world_size(starts: Any, size: int, name: str) -> None:
    torch.testing.assert_close(starts[size][name], starts[1][name], rtol=0, atol=0)


def test_items_start_from_their_factors_or_from_the_prior(starts: Any) -> None:
    items, factor = starts[1]["items"], factors()
    has_factors = factor.norm(dim=1) > 0
    # A rotation into more dimensions keeps inner products.
    some = items[has_factors][:50].double()
    expected = (factor[has_factors] @ factor[has_factors].T)[:50, :50].double() * (WIDTH * SCALE**2)
    torch.testing.assert_close(some @ some.T, expected, rtol=0, atol=1e-9)
    drawn = table(NUM_ROWS, WIDTH, alone())
    init_prior(drawn, SCALE, alone(), seed=3, index=0)
    assert torch.equal(items[~has_factors], drawn.local_rows[~has_factors])
    # Both kinds have entries of root mean square `scale`.
    for part in (items[has_factors], items[~has_factors]):
        assert part.square().mean().sqrt().item() == pytest.approx(SCALE, rel=0.02)


def test_collaborative_rows_are_samples_of_the_prior() -> None:
    rows = table(20_000, 10, alone())
    init_prior(rows, SCALE, alone(), seed=0, index=1)
    values = rows.local_rows.detach().double()
    assert values.std().item() == pytest.approx(SCALE, rel=0.01)
    assert abs(values.mean().item()) < SCALE * 0.01
    # Fourth moment of a normal distribution: three times the squared variance.
    assert values.pow(4).mean().item() == pytest.approx(3 * SCALE**4, rel=0.05)
    assert len(rows.local_rows.unique(dim=0)) == 20_000, "a row comes twice"


@pytest.mark.parametrize(
    ("lambda_l", "lambda_c", "ratio"),
    [(0.1, 0.4, 0.5), (1e-3, 1e-2, math.sqrt(0.1)), (0.4, 0.1, 1.0), (0.1, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.1, 0.0)],
)
def test_content_rows_are_samples_around_the_collaborative_ones(lambda_l: float, lambda_c: float, ratio: float) -> None:
    collaborative, content = table(20_000, 10, alone()), table(20_000, 10, alone())
    init_prior(collaborative, SCALE, alone(), seed=0, index=1)
    init_content(
        content, collaborative, EmbeddingsConfig(lambda_l=lambda_l, lambda_c=lambda_c), SCALE, alone(), seed=0, index=2
    )
    difference = (content.local_rows - collaborative.local_rows).detach().double()
    assert difference.std().item() == pytest.approx(SCALE * ratio, rel=0.01, abs=1e-9)
    if ratio:
        pair = torch.stack([difference.flatten(), collaborative.local_rows.detach().double().flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.02, "the noise must not depend on the rows"


def test_noise_depends_on_seed_and_table() -> None:
    def noise(seed: int, index: int) -> Tensor:
        rows = table(50, 4, alone())
        init_prior(rows, SCALE, alone(), seed, index)
        return rows.local_rows.detach()

    assert torch.equal(noise(1, 0), noise(1, 0))
    assert not torch.equal(noise(1, 0), noise(2, 0))
    assert not torch.equal(noise(1, 0), noise(1, 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """17 items, the last of which has neither interactions nor texts."""
    folder, catalog = tmp_path_factory.mktemp("init"), make_catalog()
    last = catalog.num_items - 1
    none = np.empty(0, np.int64)
    catalog = dataclasses.replace(
        catalog,
        train=catalog.train.keep(catalog.train.values != last),
        item_titles=pl.Series([*catalog.item_titles[:last], ""]),
        reviews=Reviews(none, none, none, ReviewStore()),
    )
    return make_corpus(folder / "corpus", catalog, make_backbone(folder / "backbone", catalog))


def item_factors(world: World, url: str, width: int = 16, **options: Any) -> Tensor:
    vectors, cache = options.pop("vectors", None), options.pop("cache", None)
    partition = RowPartition(17, world.size)
    source = None if vectors is None else vectors_from_file(vectors, Corpus.open(url), partition, world)
    cache = None if cache is None else InitCache(cache, cache, world)
    return spectral_item_factors(
        Corpus.open(url), EmbeddingsConfig(**options), 300, width, partition, world, 0, vectors=source, cache=cache
    )


def write_vectors(path: Path, num_items: int = 17) -> str:
    vectors = np.random.default_rng(0).standard_normal((num_items, 4)).tolist()
    ids = [f"item-{i:03d}" for i in range(num_items)]
    pq.write_table(pa.table({"item": ids, "vector": vectors}), path)
    return str(path)


def test_items_have_factors_of_unit_norm_or_zero_without_data(corpus: str) -> None:
    rows = item_factors(alone(), corpus)
    assert (rows.shape, rows.dtype) == ((17, 16), torch.float32)
    torch.testing.assert_close(rows[:16].norm(dim=1), torch.ones(16))
    assert not rows[16].any()
    assert item_factors(alone(), corpus, width=5).shape == (17, 5)


def test_items_of_one_taste_are_nearer_to_each_other(corpus: str) -> None:
    rows = item_factors(alone(), corpus, init_text_weight=0.0)[:16]
    cosines = rows @ rows.T
    same = torch.arange(16)[:, None] % 2 == torch.arange(16)[None] % 2
    off_diagonal = ~torch.eye(16, dtype=torch.bool)
    assert cosines[same & off_diagonal].mean() > cosines[~same].mean() + 0.2


def test_vectors_count_by_their_share(corpus: str, tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors.parquet")
    without = item_factors(alone(), corpus)
    assert torch.equal(item_factors(alone(), corpus, vectors=vectors, init_vectors_share=0.0), without)
    some = item_factors(alone(), corpus, vectors=vectors)
    assert (some @ some.T - without @ without.T).abs().max() > 0.05
    assert some[16].norm().item() == pytest.approx(1.0), "an item with a vector alone has factors"
    fewer = write_vectors(tmp_path / "fewer.parquet", 9)
    assert not item_factors(alone(), corpus, vectors=fewer)[16].any()


def test_vectors_of_no_item_are_refused(corpus: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"item": ["other"], "vector": [[1.0]]}), tmp_path / "v")
    with pytest.raises(DataError, match="no vector of an item"):
        item_factors(alone(), corpus, vectors=str(tmp_path / "v"))


def test_unknown_ids_are_counted_in_a_warning(corpus: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item_factors(alone(), corpus, vectors=write_vectors(tmp_path / "v", 20))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "vectors of 17 of 17 items, and 3 of unknown items" in warning


@pytest.mark.parametrize("size", [2, 3])
def test_factors_do_not_depend_on_the_world_size(corpus: str, tmp_path: Path, size: int) -> None:
    options: dict[str, Any] = {"vectors": write_vectors(tmp_path / "v")}
    rows = torch.cat(run_ranks(size, _with_options, corpus, options))
    torch.testing.assert_close(rows, item_factors(alone(), corpus, **options), rtol=0, atol=1e-4)


def _with_options(world: World, url: str, options: dict[str, Any]) -> Tensor:
    return item_factors(world, url, **options)


def test_factors_are_computed_once_for_the_same_settings(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, vectors = str(tmp_path / "cache"), write_vectors(tmp_path / "v")
    first = item_factors(alone(), corpus, cache=cache)
    with_vectors = item_factors(alone(), corpus, cache=cache, vectors=vectors)
    computed: list[int] = []

    def compute(*_: Any) -> Tensor:
        computed.append(1)
        return first

    monkeypatch.setattr(embedding_init, "spectral_rows", compute)
    assert torch.equal(item_factors(alone(), corpus, cache=cache), first)
    assert torch.equal(item_factors(alone(), corpus, cache=cache, vectors=vectors), with_vectors)
    assert not computed
    write_vectors(tmp_path / "v", 12)
    changes: list[dict[str, Any]] = [{"init_text_weight": 0.3}, {"width": 8}, {"vectors": vectors}]
    for changed in changes:
        item_factors(alone(), corpus, cache=cache, **changed)
    assert len(computed) == 3
