"""Bytes that a rank sends in a step, by collective.

Only the payload is counted: for an all-to-all the part for other ranks; for other collectives that of the ring
algorithm, which is optimal: (W-1)/W of an all-gather's result or of a reduce-scatter's input, and twice that of an
all-reduce's input. Headers and copies of a backend are not counted.

There is one function per part of the code that communicates. `tests/planning/test_traffic.py` compares them with the
calls of torch's collectives.

Legend: W ranks, G ranks that together hold a copy of the tables, D width.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.planning.sampling import MicroBatchSample, StepSample
from cllm4rec_dist.planning.zero3_simulation import Gathers

INTEGER, INDEX, HALF, FLOAT, DOUBLE = 8, 4, 2, 4, 8
"""Bytes of int64, int32, bf16, fp32 and fp64."""

Traffic = Counter[str]
"""Bytes by content."""


IN_GROUP = frozenset(
    {
        "lookup counts",
        "row ids",
        "rows",
        "row gradients",
        "query counts",
        "queries",
        "targets",
        "log-sum-exps",
        "scores",
        "query gradients",
        "gradients of shared words",
    }
)
"""Contents that stay in a group of ranks that together hold a copy of the tables."""


def all_gather(part: int, num_ranks: int) -> int:
    """Bytes sent by a rank whose part has `part` bytes."""
    return (num_ranks - 1) * part


reduce_scatter = all_gather
"""Bytes sent by a rank that keeps `part` bytes of the sum."""


def all_reduce(size: int, num_ranks: int) -> int:
    """Bytes sent by a rank for a tensor of `size` bytes, whose W chunks go around the ring twice."""
    return 2 * (num_ranks - 1) * -(-size // num_ranks)


@dataclass(frozen=True)
class Model:
    """Properties of a run that determine its traffic.

    Attributes:
        width: D.
        gathers: ZeRO-3's gathers in a step.
        hpz: ranks of a group of hpZ.
        trained: elements that ZeRO-3 reduces in each micro-batch, padded, over all ranks.
        element: bytes per element of the backbone.
        num_groups: number of flat groups of ZeRO-3's optimizer.
        replicated: entries of the replicated parameters.
        dense: `users` or `items`, and entries of a row, of each sharded parameter whose gradient is dense.
        sparse: width of each sharded parameter with a sparse gradient, by name.
        num_negatives: items that this rank samples for a micro-batch, which are taken to be different ones.
        shared_words: entries of the parts of the words that items share.
    """

    width: int
    gathers: Gathers
    hpz: int
    trained: int
    element: int
    num_groups: int
    replicated: int
    dense: list[tuple[str, int]]
    sparse: dict[str, int]
    num_negatives: int
    shared_words: int


def step_traffic(model: Model, config: RunConfig, sample: StepSample, rank: int) -> Traffic:
    """Bytes that `rank` sends in `step.train_step`, by content."""
    total = lookup_traffic(model, config, sample, rank)
    for batch in sample.micro_batches:
        total += item_head_traffic(model, config, batch, rank)
    total += replica_traffic(model, sample, rank)
    if model.shared_words:
        total["gradients of shared words"] += all_reduce(model.shared_words * FLOAT, sample.num_shards)
    return total + zero_traffic(model, sample) + bookkeeping_traffic(model, sample.num_ranks)


def lookup_traffic(model: Model, config: RunConfig, sample: StepSample, rank: int) -> Traffic:
    """Traffic of `Recommender.route` and `embed`: counts, ids, rows, and row gradients in backward."""
    lookups = [lookup for batch in sample.micro_batches for lookup in batch.lookups.values()]
    row = model.width * (HALF if config.embeddings.comm_dtype == "bf16" else FLOAT)
    received = sum(lookup.received_by(rank) for lookup in lookups)
    return Counter(
        {
            "lookup counts": (sample.num_shards - 1) * len(lookups) * INTEGER,
            "row ids": received * INDEX,
            "rows": sum(lookup.sent_by(rank) for lookup in lookups) * row,
            "row gradients": received * row,
        }
    )


def item_head_traffic(model: Model, config: RunConfig, batch: MicroBatchSample, rank: int) -> Traffic:
    """Traffic of `GatheringQueries`: queries, targets, log-sum-exps, scores, and their gradients."""
    queries, targets = batch.queries_with(rank), batch.targets_with(rank)
    num_ranks = len(queries)
    rounded = config.head.comm_dtype == "bf16"
    query = model.width * (HALF if rounded else FLOAT)
    sent: Traffic = Counter()
    sent["query counts"] += 2 * all_gather(INTEGER, num_ranks)
    sent["queries"] += all_gather(max(queries) * query, num_ranks)
    sent["targets"] += all_gather(max(targets) * 2 * INTEGER, num_ranks)
    sent["log-sum-exps"] += 2 * all_reduce(sum(queries) * FLOAT, num_ranks)
    sent["scores"] += reduce_scatter(max(queries) * FLOAT, num_ranks)
    # Backward: gradients of scores, of log-sum-exps, of queries.
    sent["scores"] += all_gather(max(queries) * FLOAT, num_ranks)
    sent["log-sum-exps"] += all_gather(max(queries) * FLOAT, num_ranks)
    if rounded:  # an all-to-all without padding
        sent["query gradients"] += (sum(queries) - queries[rank]) * query
    else:
        sent["query gradients"] += reduce_scatter(max(queries) * query, num_ranks)
    return sent


def replica_traffic(model: Model, sample: StepSample, rank: int) -> Traffic:
    """Traffic of `model/table_replicas.py`: touched rows and table gradients, among ranks that hold the same rows."""
    replicas = sample.replicas_of(rank)
    num_replicas = sample.num_ranks // sample.num_shards
    if num_replicas == 1:
        return Counter()
    sent: Traffic = Counter()
    for rows in sample.touched.values():
        sent["touched rows"] += all_gather(INTEGER, num_replicas) + all_gather(
            max(rows[replicas]) * INTEGER, num_replicas
        )
    for kind, width in model.dense:
        sent["table gradients"] += all_reduce(sample.num_rows[kind][rank] * width * FLOAT, num_replicas)
    for name, width in model.sparse.items():
        longest = max(_gradient_rows(model, sample, name, rank) for rank in range(sample.num_ranks)[replicas])
        row = INTEGER + width * FLOAT
        sent["table gradients"] += all_gather(INTEGER, num_replicas) + all_gather(longest * row, num_replicas)
    return sent


def _gradient_rows(model: Model, sample: StepSample, name: str, rank: int) -> int:
    """Number of rows of a rank's sparse gradient: those that were looked up, predicted or sampled."""
    looked_up = sample.looked_up[name][rank] if name in sample.looked_up else 0
    if name not in ("collaborative.items", "head.bias"):
        return looked_up
    return looked_up + sum(batch.owned_targets[rank] + model.num_negatives for batch in sample.micro_batches)


def zero_traffic(model: Model, sample: StepSample) -> Traffic:
    """Traffic of ZeRO-3: gathers of weights, reduce-scatters of gradients, and all-reduces before an optimizer step."""
    num_ranks = sample.num_ranks
    sent: Traffic = Counter()
    sent["weights"] += all_gather(sum(model.gathers.calls) // num_ranks * model.element, num_ranks)
    if model.gathers.group_calls:
        part = sum(model.gathers.group_calls) // model.hpz * model.element
        sent["weights in hpZ groups"] += all_gather(part, model.hpz)
    reduced = model.trained // num_ranks * model.element
    sent["weight gradients"] += len(sample.micro_batches) * reduce_scatter(reduced, num_ranks)
    sent["norms"] += model.num_groups * all_reduce(DOUBLE, num_ranks)
    return sent


def bookkeeping_traffic(model: Model, num_ranks: int) -> Traffic:
    """Traffic of `step._global_counts`, of the losses and the norm, and of the replicated parameters' gradients."""
    sent: Traffic = Counter()
    sent["counts"] += all_reduce(5 * INTEGER, num_ranks)
    sent["norms"] += all_reduce(4 * DOUBLE, num_ranks)
    if model.replicated:
        sent["replicated gradients"] += all_reduce(model.replicated * FLOAT, num_ranks)
    return sent


def loop_traffic(num_ranks: int) -> Traffic:
    """Traffic of `train._sync_control_flags`, which the loop calls once per step."""
    return Counter({"agreement": 2 * all_gather(2 * INTEGER, num_ranks)})
