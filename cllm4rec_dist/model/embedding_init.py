"""Initialization of user and item embeddings.

The paper draws collaborative rows from N(0, 1/lambda_l) and content rows from N(z_l, 1/lambda_c). Both are scaled by s,
the root mean square of the backbone's word embeddings: z_l has entries of standard deviation s, and z_c has a standard
deviation of min(s, s * sqrt(lambda_l / lambda_c)) around z_l.

Rows that are narrower than the backbone (d < D) start the same way in d dimensions, and the matrix that takes them into
the backbone is random and orthogonal.

With `spectral`, item rows are instead initialized from the training data, which decides most of the final quality: left
singular vectors of the transposed, degree-normalized interactions, with the items' TF-IDF word counts and dense vectors
as further columns (`item_features.py`, `spectral.py`). An item without any of them is drawn from the prior. All ranks
compute them together, once for a corpus and its settings (`init_cache.py`).

Noise is a function of (seed, table, row), so that the initialization does not depend on the world size, but for the
rounding of the singular vectors.

Legend: I items, U users, D width of the backbone, d that of the tables, k factors, n rows of this rank.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.config import EmbeddingsConfig
from cllm4rec_dist.corpus.item_vectors import read_item_vectors
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.collectives import all_reduce_sum, require_agreement
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.filesystems import as_os_errors, locate
from cllm4rec_dist.model.init_cache import InitCache, cache_key
from cllm4rec_dist.model.item_features import build_item_features
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding
from cllm4rec_dist.model.spectral import spectral_rows
from cllm4rec_dist.model.text_vectors import whiten

logger = logging.getLogger(__name__)

_NOISE_BLOCK = 4096
_MAX_FACTORS = 512
"""Maximum number of singular vectors; more cost time and add noise."""
_SPECTRAL_TABLE = 21
"""Index of the noise from which singular vectors are computed; tables have smaller ones."""
_CHUNK_ROWS = 1 << 14


@dataclass(frozen=True)
class TextVectors:
    """Source of dense vectors of the items' texts.

    Attributes:
        digest: of everything that the vectors depend on.
        compute: returns this rank's rows, fp32 [n, d], zero for an item without a vector; a collective.
    """

    digest: str
    compute: Callable[[], Tensor]


def noise_blocks(
    partition: RowPartition, width: int, world: World, seed: int, table: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of this rank's rows and fp32 N(0, 1) samples for them that do not depend on the world size."""
    start, stop = partition.range(world.rank)
    for block in range(start // _NOISE_BLOCK, -(-stop // _NOISE_BLOCK) if stop > start else 0):
        random = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, 20, table, block]).generate_state(1)[0])
        )
        rows = torch.randn(_NOISE_BLOCK, width, generator=random)
        first = block * _NOISE_BLOCK
        noise = rows[max(start - first, 0) : stop - first]
        begin = max(first - start, 0)
        yield slice(begin, begin + len(noise)), noise.to(world.device)


def spectral_item_factors(
    corpus: Corpus,
    config: EmbeddingsConfig,
    num_words: int,
    width: int,
    partition: RowPartition,
    world: World,
    seed: int,
    *,
    vectors: TextVectors | None = None,
    cache: InitCache | None = None,
) -> Tensor:
    """Return this rank's rows of the items' factors, fp32 [n, k] of unit norm, or zero for items without any data.

    The factors are U S^1/2 of the truncated singular value decomposition of the features. S^1/2 is a compromise between
    S, which is dominated by popular items, and 1, which amplifies noise. They are read from the cache if it has them.
    Collective.

    Args:
        num_words: words of the backbone.
        width: D; k is at most D.
        partition: of the items.
    """
    num_factors = min(_MAX_FACTORS, width, corpus.num_items, corpus.num_users + num_words)
    share = config.init_vectors_share if vectors is not None else 0.0
    key = cache_key(
        {
            "corpus": corpus.fingerprint,
            "num_words": num_words,
            "text_weight": config.init_text_weight,
            "vectors_share": share,
            "vectors": None if vectors is None else vectors.digest,
            "num_factors": num_factors,
            "seed": seed,
        }
    )
    cached = None if cache is None else cache.read(key, partition, num_factors)
    if cached is not None:
        return cached.to(world.device)
    started = time.perf_counter()
    if world.is_main:
        logger.info("computing the spectral initialization of %d items", corpus.num_items)
    features = build_item_features(
        corpus,
        num_words,
        partition,
        world,
        word_weight=config.init_text_weight * math.sqrt(1 - share),
        vectors=None if vectors is None or share == 0 else whiten(vectors.compute(), world),
        vectors_weight=config.init_text_weight * math.sqrt(share),
    )
    noise = torch.empty(partition.num_local(world.rank), num_factors, device=world.device)
    for rows, block in noise_blocks(partition, num_factors, world, seed, _SPECTRAL_TABLE):
        noise[rows] = block
    factors = spectral_rows(features, noise, world)
    if world.is_main:
        logger.info("computed %d factors in %.1f s", num_factors, time.perf_counter() - started)
    if cache is not None:
        cache.write(key, factors, partition)
    return factors


def vectors_from_file(url: str, corpus: Corpus, partition: RowPartition, world: World) -> TextVectors:
    """Dense vectors from a file of the user (`corpus/item_vectors.py`). All-gathers a digest of the file.

    Every rank reads the file, so that none waits for another.

    Raises:
        FaultError: if ranks see different files.
    """

    def compute() -> Tensor:
        found = read_item_vectors(url, corpus.items()["item"], *partition.range(world.rank))
        if found.num_found == 0:
            raise DataError(
                "embeddings.item_vectors",
                url,
                "has no vector of an item of the corpus",
                "Its ids must be the external ids of the items, as in items.parquet.",
            )
        if world.is_main:
            report = logger.warning if found.num_unknown else logger.info
            report(
                "%s has vectors of %d of %d items, and %d of unknown items, which are ignored",
                url,
                found.num_found,
                corpus.num_items,
                found.num_unknown,
            )
        return torch.from_numpy(found.values)

    digest = _file_digest(url)
    require_agreement({f"contents of {url}": int(digest[:14], 16)}, world)
    return TextVectors(digest, compute)


def _file_digest(url: str) -> str:
    fs, path = locate("embeddings.item_vectors", url, DataError)
    try:
        with as_os_errors(), fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("embeddings.item_vectors", url, f"cannot be read ({error})", "Fix the path.") from error


def init_items(items: RowShardedEmbedding, factors: Tensor, scale: float, seed: int) -> None:
    """Overwrite collaborative item rows that have factors; the others keep what they are. No collective.

    A random orthonormal matrix rotates the factors into D dimensions, so that no dimension of a pretrained backbone is
    special.

    Args:
        factors: result of `spectral_item_factors`, [n, k].
    """
    width, num_factors = items.width, factors.shape[1]
    random = np.random.default_rng([seed, 21])
    rotation = torch.from_numpy(np.linalg.qr(random.standard_normal((width, num_factors)))[0].T).to(factors)
    with torch.no_grad():
        for rows, part in zip(items.local_rows.split(_CHUNK_ROWS), factors.split(_CHUNK_ROWS), strict=True):
            has_factors = part.any(dim=1, keepdim=True)
            rows.copy_(torch.where(has_factors, part @ rotation * (math.sqrt(width) * scale), rows))


def init_prior(table: RowShardedEmbedding, scale: float, world: World, seed: int, index: int) -> None:
    """Fill collaborative rows with samples of N(0, scale^2)."""
    with torch.no_grad():
        for rows, noise in noise_blocks(table.partition, table.width, world, seed, index):
            table.local_rows[rows] = noise * scale


def init_input_projection(projection: Tensor, world: World, seed: int) -> None:
    """Fill the projection [d, D] of rows into the backbone with random orthogonal rows of norm sqrt(D / d).

    So projected rows have the root mean square of the rows, that of word embeddings, and the angles between them.
    One all-reduce, because linear algebra on other processors may round differently.
    """
    width, hidden_size = projection.shape
    columns = np.linalg.qr(np.random.default_rng([seed, 22]).standard_normal((hidden_size, width)))[0]
    start = torch.from_numpy(columns.T * math.sqrt(hidden_size / width)).to(projection)
    if not world.is_main:
        start.zero_()
    with torch.no_grad():
        projection.copy_(all_reduce_sum(start, world, "the input projection"))


def init_content(
    content: RowShardedEmbedding,
    collaborative: RowShardedEmbedding,
    config: EmbeddingsConfig,
    scale: float,
    world: World,
    seed: int,
    index: int,
) -> None:
    """Fill content rows with samples of N(z_l, 1/lambda_c) in units of the backbone's scale."""
    ratio = 1.0 if config.lambda_c == 0 else min(1.0, math.sqrt(config.lambda_l / config.lambda_c))
    with torch.no_grad():
        for rows, noise in noise_blocks(content.partition, content.width, world, seed, index):
            content.local_rows[rows] = collaborative.local_rows[rows] + noise * (scale * ratio)
