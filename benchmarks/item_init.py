"""How good initial item rows are without any training, and how long they take.

    python -m benchmarks.item_init CORPUS [--vectors FILE.parquet] [--factors 256] [--text-weight 0.4] [--share 0.5]

A user is the sum of the initial rows of the training items; items are ranked by cosine. Prints Recall@20, Recall@40 and
NDCG@100 on the validation items, and seconds. `--power` whitens vectors by the inverse of another root than the square
root: 0 only centres them.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import show
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import RowPartition, lone_world
from cllm4rec_dist.model.embedding_init import noise_blocks, vectors_from_file
from cllm4rec_dist.model.item_features import build_item_features
from cllm4rec_dist.model.spectral import gram_matrix, matrix_function, spectral_rows
from cllm4rec_dist.model.text_vectors import whiten

_BATCH_USERS = 1024


def centred(vectors: Tensor, power: float) -> Tensor:
    """Centre and scale to unit norm, after a multiplication with the covariance to -`power`."""
    has_vector = vectors.any(dim=1, keepdim=True)
    rows = torch.where(has_vector, vectors - vectors[has_vector[:, 0]].mean(0), 0.0)
    covariance = gram_matrix(rows, lone_world()) / len(rows)
    rows = rows @ matrix_function(covariance, lambda values: values.clamp_min(1e-9).pow(-power)).float()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def ranking_quality(rows: Tensor, train: Ragged, held_out: Ragged) -> dict[str, float]:
    """Mean metrics of the users with held-out items."""
    users = np.flatnonzero(held_out.lengths)
    totals = dict.fromkeys(("recall@20", "recall@40", "ndcg@100"), 0.0)
    discounts = 1 / torch.log2(torch.arange(100) + 2.0)
    for start in range(0, len(users), _BATCH_USERS):
        batch = users[start : start + _BATCH_USERS]
        seen, wanted = train.take(batch), held_out.take(batch)
        row, item = torch.from_numpy(seen.rows), torch.from_numpy(seen.values).long()
        pooled = torch.zeros(len(batch), rows.shape[1]).index_add_(0, row, rows[item])
        scores = pooled @ rows.T
        scores[row, item] = -torch.inf
        is_wanted = torch.zeros_like(scores, dtype=torch.bool)
        is_wanted[torch.from_numpy(wanted.rows), torch.from_numpy(wanted.values).long()] = True
        hits = is_wanted.gather(1, scores.topk(100).indices).float()
        count = torch.from_numpy(wanted.lengths).float()
        for cutoff in (20, 40):
            totals[f"recall@{cutoff}"] += float((hits[:, :cutoff].sum(1) / count.clamp_max(cutoff)).sum())
        best = discounts.cumsum(0)[count.clamp_max(100).long() - 1]
        totals["ndcg@100"] += float((hits @ discounts / best).sum())
    return {name: total / len(users) for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--vectors")
    parser.add_argument("--factors", type=int, default=256)
    parser.add_argument("--text-weight", type=float, default=0.4)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--power", type=float)
    options = parser.parse_args()

    world, corpus = lone_world(), Corpus.open(options.corpus, verify=False)
    partition = RowPartition(corpus.num_items, 1)
    started = time.perf_counter()
    vectors = None
    if options.vectors:
        raw = vectors_from_file(options.vectors, corpus, partition, world).compute()
        vectors = whiten(raw, world) if options.power is None else centred(raw, options.power)
    share = 0.0 if vectors is None else options.share
    num_words = 1 + max(int(corpus.content.read_record(i)["tokens"].max(initial=0)) for i in range(len(corpus.content)))
    features = build_item_features(
        corpus,
        num_words,
        partition,
        world,
        word_weight=options.text_weight * math.sqrt(1 - share),
        vectors=vectors,
        vectors_weight=options.text_weight * math.sqrt(share),
    )
    built = time.perf_counter()
    noise = torch.cat([block for _, block in noise_blocks(partition, options.factors, world, 0, 21)])
    rows = spectral_rows(features, noise, world)
    done = time.perf_counter()
    quality = ranking_quality(rows, corpus.split("train"), corpus.split("valid"))
    figures = " ".join(f"{name} {value:.4f}" for name, value in quality.items())
    show(f"{figures} features {built - started:.1f} s factors {done - built:.1f} s")


if __name__ == "__main__":
    main()
