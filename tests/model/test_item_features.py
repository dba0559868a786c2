"""Features of items: those of scikit-learn on the whole corpus, in rows of this rank, at any world size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from torch import Tensor

from cllm4rec_dist.corpus.manifest import ContentKind
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.views import interaction_matrix
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.item_features import build_item_features, local_item_counts
from tests.harness import alone, make_backbone, make_catalog, make_corpus, run_ranks

NUM_WORDS = 300
WORD_WEIGHT, VECTORS_WEIGHT = 0.3, 0.5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, catalog = tmp_path_factory.mktemp("features"), make_catalog()
    return make_corpus(folder / "corpus", catalog, make_backbone(folder / "backbone", catalog))


def vectors() -> Tensor:
    return torch.randn(17, 3, generator=torch.Generator().manual_seed(0))


def features(world: World, url: str, word_weight: float, vectors_weight: float | None) -> Tensor:
    """This rank's rows as a dense matrix, and a check of the transpose."""
    partition = RowPartition(17, world.size)
    local = vectors()[slice(*partition.range(world.rank))]
    built = build_item_features(
        Corpus.open(url, verify=False),
        NUM_WORDS,
        partition,
        world,
        word_weight=word_weight,
        vectors=None if vectors_weight is None else local,
        vectors_weight=vectors_weight or 0.0,
    )
    assert torch.equal(built.sparse.to_dense().T, built.transposed.to_dense())
    return torch.cat([built.sparse.to_dense(), built.dense], dim=1)


def expected(url: str, word_weight: float, vectors_weight: float | None) -> np.ndarray:
    corpus = Corpus.open(url, verify=False)
    train = interaction_matrix(corpus.split("train"), corpus.num_items).toarray().astype(float)
    users, items = (np.maximum(train.sum(axis), 1) for axis in (1, 0))
    blocks = [(train / np.sqrt(users[:, None] * items)).T]
    scale = np.linalg.norm(blocks[0])
    if word_weight:
        counts = np.zeros((17, NUM_WORDS))
        for index in range(len(corpus.content)):
            record = corpus.content.read_record(index)
            for text, (kind, item) in enumerate(zip(record["kind"], record["items"], strict=True)):
                words = record["tokens"][record["offsets"][text] : record["offsets"][text + 1]]
                if kind != ContentKind.USER_PROFILE:
                    np.add.at(counts[item], words, 1)
        tfidf = TfidfTransformer(sublinear_tf=True).fit_transform(sp.csr_matrix(counts)).toarray()
        blocks.append(tfidf * word_weight * scale / np.linalg.norm(tfidf))
    if vectors_weight:
        blocks.append(vectors().double().numpy() * vectors_weight * scale / vectors().norm().item())
    return np.concatenate(blocks, axis=1)


CASES = [(WORD_WEIGHT, None), (0.0, VECTORS_WEIGHT), (WORD_WEIGHT, VECTORS_WEIGHT), (0.0, None), (WORD_WEIGHT, 0.0)]


@pytest.mark.parametrize(("word_weight", "vectors_weight"), CASES)
def test_features_are_those_of_scikit_learn(corpus: str, word_weight: float, vectors_weight: float | None) -> None:
    built = features(alone(), corpus, word_weight, vectors_weight).double().numpy()
    np.testing.assert_allclose(built, expected(corpus, word_weight, vectors_weight), rtol=1e-5, atol=1e-7)
    weight = math.hypot(word_weight, vectors_weight or 0.0)
    assert np.square(built).sum() / np.square(built[:, :23]).sum() == pytest.approx(1 + weight**2, rel=1e-5)


@pytest.mark.parametrize("size", [2, 5])
def test_rows_do_not_depend_on_the_world_size(corpus: str, size: int) -> None:
    # Blocks of four rows of 17 for five ranks: the last one has one.
    rows = torch.cat(run_ranks(size, features, corpus, WORD_WEIGHT, VECTORS_WEIGHT))
    torch.testing.assert_close(rows, features(alone(), corpus, WORD_WEIGHT, VECTORS_WEIGHT), rtol=1e-6, atol=1e-8)


def item_counts(world: World, url: str) -> Tensor:
    return torch.from_numpy(local_item_counts(Corpus.open(url, verify=False), RowPartition(17, world.size), world))


@pytest.mark.parametrize("size", [1, 3])
def test_items_are_counted_by_their_owners(corpus: str, size: int) -> None:
    opened = Corpus.open(corpus, verify=False)
    exact = interaction_matrix(opened.split("train"), opened.num_items).toarray().sum(0)
    assert torch.cat(run_ranks(size, item_counts, corpus)).tolist() == exact.tolist()
