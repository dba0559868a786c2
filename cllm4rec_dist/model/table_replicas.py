"""Copies of the tables, which training keeps equal bit for bit.

With `embeddings.shard_group: G` each group of G ranks holds all rows (`topology.split_world`). Lookups and the item
softmax stay within a group, so its gradients are those of the group's losses. Before the optimizer steps, replicas
sum their gradients; the sum has the same bits on each, and so have the rows after the step.

Legend: R rows of this rank, D width, k rows of a sparse gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cllm4rec_dist.distributed.collectives import (
    all_gather_rows,
    all_reduce_in_place,
    broadcast_in_place,
    gather_counts,
    gather_integers,
)
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import FaultError

if TYPE_CHECKING:
    from cllm4rec_dist.model.recommender import Recommender

_CHECKED_ENTRIES = 1 << 24
"""Entries whose bits are added at a time."""


def share_touched_rows(rows: Tensor, replicas: World) -> Tensor:
    """Return this replica's part of the distinct rows, int64 [..], that any replica touches in a step.

    Collectives: all-gathers of counts and rows; none for one replica.
    """
    if replicas.size == 1:
        return rows
    union = torch.unique(all_gather_rows(rows, gather_counts(len(rows), replicas), replicas))
    return union[slice(*replicas.local_range(0, len(union)))]


@torch.no_grad()
def sum_gradient(gradient: Tensor, replicas: World) -> Tensor:
    """Sum a table's gradient over its replicas; a sparse one is returned coalesced.

    Collectives: an all-reduce of a dense gradient [R, D], in place; all-gathers of a sparse one's counts, rows [k] and
    values [k, D]. None for one replica.
    """
    if not gradient.is_sparse:
        all_reduce_in_place(gradient, replicas, "table gradients")
        return gradient
    gradient = gradient.coalesce()
    if replicas.size == 1:
        return gradient
    counts = gather_counts(len(gradient.values()), replicas)
    index = all_gather_rows(gradient.indices()[0], counts, replicas)
    values = all_gather_rows(gradient.values(), counts, replicas)
    return torch.sparse_coo_tensor(index[None], values, gradient.shape, check_invariants=False).coalesce()


@torch.no_grad()
def copy_first_replica(model: Recommender) -> None:
    """Overwrite this rank's rows with those of the first replica. One broadcast of each table.

    Replicas that computed their start on other hardware may differ in the last bits, and would stay different.
    """
    for _, rows, _ in model.sharded_parameters():
        broadcast_in_place(rows, model.replicas, "tables")


@torch.no_grad()
def require_equal_replicas(model: Recommender) -> None:
    """Require that all replicas hold the same rows. One all-gather of a checksum of each table.

    Raises:
        FaultError: on every rank that holds these rows, if they differ.
    """
    replicas = model.replicas
    if replicas.size == 1:
        return
    checksums = {name: _checksum(rows) for name, rows, _ in model.sharded_parameters()}
    by_replica = gather_integers([*checksums.values()], replicas, what="checksums of tables")
    different = [
        name for name, column in zip(checksums, zip(*by_replica, strict=True), strict=True) if len({*column}) > 1
    ]
    if different:
        raise FaultError(
            "embeddings.shard_group",
            ", ".join(different),
            f"differ between the {replicas.size} replicas, so that they no longer train one model",
            "Resume from the last checkpoint; if it happens again, suspect a host.",
        )


def _checksum(rows: Tensor) -> int:
    """Sum of the bits of all entries, each as an integer times an odd weight of its position in a chunk."""
    total = 0
    for chunk in rows.detach().flatten().view(torch.int32).split(_CHECKED_ENTRIES):
        weights = torch.arange(1, 2 * len(chunk), 2, device=chunk.device)
        total += int((chunk.long() * weights).sum())
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)
