"""Warm start: a new run that starts from a run on another catalog with more users and items, fewer, or both.

Rows are matched by external id, so that neither their number nor their order has to be the same. A matched row takes
the trained values. A new row takes its fresh initialization, mapped as training moved the matched rows:

    collaborative item      fresh row x A, with A the [D, D] map from the fresh rows of the matched items to their
                            trained rows (ridge regression); drawn from the prior if embeddings.init=prior
    collaborative user      drawn from the prior
    shared user             that of the checkpoint, moved after the new users; as a new user if it has none
    content row             drawn around the collaborative row, as in a fresh run
    item bias               mean of the matched ones

The map is needed because spectral initialization is unique only up to a rotation: that of the new catalog has other
coordinates than that of the old one.

Optimizer moments and the position in the data are not carried over, because the data differ.

Legend: I items, D width, n matched items.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.checkpoint import CheckpointShard
from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import RowPartition
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.system import System

logger = logging.getLogger(__name__)

Kind = Literal["users", "items"]
GROWTH_FILE = "growth.json"
"""File in a run's folder: counts of matched and new rows, and the external ids of removed ones."""
_RIDGE = 1e-2
"""Ridge weight of the map, in units of the mean eigenvalue of the fresh rows' second moments."""


@dataclass(frozen=True)
class Matches:
    """Rows of a checkpoint that match this rank's users or items.

    Attributes:
        rows: int64 [local rows], row in the checkpoint; -1 for a new one. A shared user comes last.
        num_matched, num_new: over all ranks; a shared user is not counted.
        removed: external ids that the checkpoint has and the catalog lacks.
    """

    rows: Tensor
    num_matched: int
    num_new: int
    removed: list[str]

    @classmethod
    def of(
        cls, new_ids: pa.ChunkedArray, saved_ids: pa.ChunkedArray, partition: RowPartition, rank: int, shared: int = -1
    ) -> Matches:
        """Match the external ids of this run with those of a checkpoint.

        Args:
            partition: partition of the run's rows, which has one row more than `new_ids` if there is a shared user.
            shared: the checkpoint's row of the shared user; -1 if it has none.
        """
        saved_rows = pc.fill_null(pc.index_in(new_ids, value_set=saved_ids), -1).to_numpy().astype(np.int64)
        removed = saved_ids.filter(pc.invert(pc.is_in(saved_ids, value_set=new_ids))).to_pylist()
        num_matched, num_new = int((saved_rows >= 0).sum()), int((saved_rows < 0).sum())
        start, stop = partition.range(rank)
        rows = np.append(saved_rows, shared)[: partition.num_rows][start:stop]
        return cls(torch.from_numpy(rows.copy()), num_matched, num_new, removed)


@dataclass(frozen=True)
class WarmStart:
    """This rank's part of a checkpoint of another catalog.

    Attributes:
        shard: everything but the tables.
        matches: matched rows of users and of items.
        trained: by table, the trained values of this rank's matched rows, in their order.
    """

    shard: CheckpointShard
    matches: dict[Kind, Matches]
    trained: dict[str, Tensor]


def read(system: System, candidate: Checkpoint) -> WarmStart:
    """Read this rank's part of a checkpoint. Changes nothing; no collective.

    Raises:
        DamagedCheckpointError: for damage.
        CheckpointError: if no item matches, or for other adapter settings.
    """
    corpus, metadata, model = system.corpus, candidate.metadata, system.recommender
    tables: dict[Kind, tuple[str, pa.Table, RowPartition]] = {
        "users": ("user", corpus.ids("users"), model.collaborative.users.partition),
        "items": ("item", corpus.ids("items"), model.item_partition),
    }
    shared = {"users": metadata.num_users if metadata.has_shared_user else -1, "items": -1}
    matches = {
        kind: Matches.of(table[column], candidate.external_ids(kind), partition, model.world.rank, shared[kind])
        for kind, (column, table, partition) in tables.items()
    }
    if matches["items"].num_matched == 0:
        raise CheckpointError(
            f"{candidate.path}: items",
            f"{metadata.num_items} items",
            f"are not in the corpus {system.config.corpus}: no row matches",
            "Start from a run on an earlier version of this corpus, or without init_from.",
        )
    trained = {}
    for name, kind in _kinds(system).items():
        size = metadata.num_user_rows if kind == "users" else metadata.num_items
        local = matches[kind].rows
        rows = candidate.take(name, size, local[local >= 0])
        if rows is not None:
            trained[name] = rows
    return WarmStart(checkpoint.read(system, candidate, moments=False, tables=False), matches, trained)


def restore(system: System, warm: WarmStart) -> None:
    """Load weights over tables that are initialized as for a new run, and log what is new. Collective.

    Collaborative items need no spectral initialization if none of them is new.
    """
    fresh = {name: p.detach() for name, p, _ in system.recommender.sharded_parameters()}
    weights: dict[str, Tensor] = {}
    for name, kind in _kinds(system).items():
        table = fresh[name]
        has_new_items = warm.matches["items"].num_new > 0
        if name == "collaborative.items" and has_new_items and system.config.embeddings.init == "spectral":
            table = _mapped(system, table, warm)
        elif name.startswith("content."):
            collaborative = name.replace("content.", "collaborative.")
            table = table + (weights[collaborative] - fresh[collaborative])
        elif name == "head.bias":
            table = _mean_bias(system, table, warm)
        weights[name] = _with_trained(table, name, kind, warm)
    checkpoint.restore_weights(system, CheckpointShard(warm.shard.weights | weights, {}, warm.shard.replicated))
    if system.world.is_main:
        _log_warm_start(system, warm)


def _kinds(system: System) -> dict[str, Kind]:
    """Return the kind of rows, users or items, of every sharded table, collaborative ones first."""
    names = (name for name, _, _ in system.recommender.sharded_parameters())
    return {name: "users" if name.endswith(".users") else "items" for name in names}


def _with_trained(fresh: Tensor, name: str, kind: Kind, warm: WarmStart) -> Tensor:
    if name not in warm.trained:
        return fresh
    matched = (warm.matches[kind].rows >= 0).to(fresh.device)
    table = fresh.clone()
    table[matched] = warm.trained[name].to(fresh.device)
    return table


def _mapped(system: System, fresh: Tensor, warm: WarmStart) -> Tensor:
    """Return `fresh` A, [local items, D], scaled to the root mean square of the trained rows.

    A minimizes |S A - T|^2 + r |A|^2 over the matched rows, S fresh and T trained. All-reduces two [D, D] in fp64.
    """
    matched = (warm.matches["items"].rows >= 0).to(fresh.device)
    inputs, targets = fresh[matched].double(), warm.trained["collaborative.items"].to(fresh.device).double()
    moments = torch.stack([inputs.T @ inputs, inputs.T @ targets])
    gram, cross = all_reduce_sum(moments, system.recommender.world, "moments of matched items")
    width = gram.shape[0]
    ridge = _RIDGE * gram.trace() / width
    linear_map = torch.linalg.solve(gram + ridge * torch.eye(width, dtype=gram.dtype, device=gram.device), cross)
    # Ridge regression shrinks; new rows should have the norm of trained ones.
    mapped_squares = ((linear_map.T @ gram) * linear_map.T).sum()
    (trained_squares,) = all_reduce_sum(
        targets.square().sum()[None], system.recommender.world, "squares of matched items"
    )
    scale = (trained_squares / mapped_squares.clamp_min(1e-30)).sqrt()
    return (fresh.double() @ (linear_map * scale)).to(fresh.dtype)


def _mean_bias(system: System, fresh: Tensor, warm: WarmStart) -> Tensor:
    trained = warm.trained.get("head.bias")
    if trained is None:
        return fresh
    biases = trained.sum()[None].to(fresh.device)
    (total,) = all_reduce_sum(biases, system.recommender.world, "biases of matched items")
    return torch.full_like(fresh, float(total) / warm.matches["items"].num_matched)


def _log_warm_start(system: System, warm: WarmStart) -> None:
    """Write counts and removed ids to `GROWTH_FILE` and log the counts."""
    counts = {
        kind: {"matched": matches.num_matched, "new": matches.num_new, "removed": matches.removed}
        for kind, matches in warm.matches.items()
    }
    path = Path(system.config.output) / GROWTH_FILE
    path.write_text(json.dumps(counts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if not any(matches.num_new or matches.removed for matches in warm.matches.values()):
        logger.info("the same users and items as in the run that this one starts from, in another corpus")
        return
    for kind, matches in warm.matches.items():
        logger.warning(
            "ANOTHER CATALOG: %d %s keep their trained rows, %d are new, %d are gone (%s)",
            matches.num_matched,
            kind,
            matches.num_new,
            len(matches.removed),
            path,
        )
