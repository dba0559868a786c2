"""A new run that starts from a run on another catalog: more users and items, fewer, or both.

Rows are matched by external id, so neither their number nor their order has to be the same. A matched row is the
trained one. A new one starts where a fresh run would start it, moved to where training has taken its like:

    collaborative item      A x its fresh start, with A the [D, D] map that best takes the fresh starts of the matched
                            items to their trained rows (ridge regression); drawn from the prior with
                            embeddings.init=prior
    collaborative user      drawn from the prior
    shared user             that of the checkpoint, moved behind the new users; without one, as a new user
    content row             drawn around the collaborative row, as in a fresh run
    item bias               mean of the matched ones

The map is needed because a spectral start is known up to a rotation only: that of the new catalog does not lie in the
coordinates of the old one.

Optimizer moments and the position in the data are not carried over: the data are other ones.

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
from cllm4rec_dist.checkpointing.checkpoint import Checkpoint, Contents
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import RowPartition
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.system import System

logger = logging.getLogger(__name__)

Kind = Literal["users", "items"]
GROWTH_FILE = "growth.json"
"""In a run's folder: counts of matched and new rows, and the external ids of removed ones."""
_RIDGE = 1e-2
"""Of the map, in units of the mean eigenvalue of the fresh starts' second moments."""


@dataclass(frozen=True)
class Matches:
    """Where a checkpoint has the rows of one kind.

    Attributes:
        rows: int64 [this rank's rows], row in the checkpoint; -1 for a new one. That of a shared user is the last.
        num_matched, num_new: over all ranks; a shared user is not counted.
        removed: external ids that the checkpoint has and the catalog has not.
    """

    rows: Tensor
    num_matched: int
    num_new: int
    removed: list[str]

    @classmethod
    def of(
        cls, wanted: pa.ChunkedArray, known: pa.ChunkedArray, partition: RowPartition, rank: int, shared: int = -1
    ) -> Matches:
        """Match the external ids `wanted` with those that a checkpoint knows.

        Args:
            partition: of the run's rows; it has one row more than there are ids where there is a shared user.
            shared: the checkpoint's row of the shared user; -1 where it has none.
        """
        found = pc.fill_null(pc.index_in(wanted, value_set=known), -1).to_numpy().astype(np.int64)
        removed = known.filter(pc.invert(pc.is_in(known, value_set=wanted))).to_pylist()
        num_matched, num_new = int((found >= 0).sum()), int((found < 0).sum())
        start, stop = partition.range(rank)
        rows = np.append(found, shared)[: partition.num_rows][start:stop]
        return cls(torch.from_numpy(rows.copy()), num_matched, num_new, removed)


@dataclass(frozen=True)
class WarmStart:
    """What a rank takes from a checkpoint of another catalog.

    Attributes:
        contents: what does not belong to rows.
        matches: of users and items.
        trained: by table, the checkpoint's rows of this rank's matched rows, in their order.
    """

    contents: Contents
    matches: dict[Kind, Matches]
    trained: dict[str, Tensor]


def read(system: System, candidate: Checkpoint) -> WarmStart:
    """This rank's part. Changes nothing yet; no collective.

    Raises:
        DamagedCheckpointError: for damage.
        CheckpointError: where no item is known, or adapters have other settings.
    """
    corpus, about, model = system.corpus, candidate.about, system.recommender
    tables: dict[Kind, tuple[str, pa.Table, RowPartition]] = {
        "users": ("user", corpus.users(), model.collaborative.users.partition),
        "items": ("item", corpus.items(), model.item_partition),
    }
    shared = {"users": about.num_users if about.has_shared_user else -1, "items": -1}
    matches = {
        kind: Matches.of(table[column], candidate.external_ids(kind), partition, system.world.rank, shared[kind])
        for kind, (column, table, partition) in tables.items()
    }
    if matches["items"].num_matched == 0:
        raise CheckpointError(
            f"{candidate.path}: items",
            f"{about.num_items} other ones",
            f"are not in the corpus {system.config.corpus}: no row could be kept",
            "Start from a run on an earlier form of this corpus, or without init_from.",
        )
    trained = {}
    for name, kind in _kinds(system).items():
        size = about.num_user_rows if kind == "users" else about.num_items
        own = matches[kind].rows
        rows = candidate.take(name, size, own[own >= 0])
        if rows is not None:
            trained[name] = rows
    return WarmStart(checkpoint.read(system, candidate, moments=False, tables=False), matches, trained)


def restore(system: System, grown: WarmStart) -> None:
    """Put weights in place, over rows that have been started as for a new run, and tell what is new. Collective."""
    fresh = {name: p.detach() for name, p, _ in system.recommender.sharded_parameters()}
    weights: dict[str, Tensor] = {}
    for name, kind in _kinds(system).items():
        start = fresh[name]
        if name == "collaborative.items" and system.config.embeddings.init == "spectral":
            start = _moved(system, start, grown)
        elif name.startswith("content."):
            own = name.replace("content.", "collaborative.")
            start = start + (weights[own] - fresh[own])
        elif name == "head.bias":
            start = _mean_bias(system, start, grown)
        weights[name] = _with_trained(start, name, kind, grown)
    checkpoint.restore_weights(system, Contents(grown.contents.weights | weights, {}, grown.contents.replicated))
    if system.world.is_main:
        _tell(system, grown)


def _kinds(system: System) -> dict[str, Kind]:
    """Of every sharded table, collaborative ones first, whether its rows are users or items."""
    names = (name for name, _, _ in system.recommender.sharded_parameters())
    return {name: "users" if name.endswith(".users") else "items" for name in names}


def _with_trained(start: Tensor, name: str, kind: Kind, grown: WarmStart) -> Tensor:
    if name not in grown.trained:
        return start
    known = (grown.matches[kind].rows >= 0).to(start.device)
    full = start.clone()
    full[known] = grown.trained[name].to(start.device)
    return full


def _moved(system: System, start: Tensor, grown: WarmStart) -> Tensor:
    """`start` A, [local items, D], with the root mean square of the trained rows. All-reduces two [D, D] in fp64.

    A minimizes |S A - T|^2 + r |A|^2 over the matched rows, S their fresh starts and T their trained rows.
    """
    matched = (grown.matches["items"].rows >= 0).to(start.device)
    inputs, targets = start[matched].double(), grown.trained["collaborative.items"].to(start.device).double()
    moments = torch.stack([inputs.T @ inputs, inputs.T @ targets])
    gram, cross = all_reduce_sum(moments, system.world, "moments of matched items")
    width = gram.shape[0]
    ridge = _RIDGE * gram.trace() / width
    move = torch.linalg.solve(gram + ridge * torch.eye(width, dtype=gram.dtype, device=gram.device), cross)
    # Ridge shrinks; new rows should be as long as their like.
    shrunk = ((move.T @ gram) * move.T).sum()
    (length,) = all_reduce_sum(targets.square().sum()[None], system.world, "squares of matched items")
    return (start.double() @ (move * (length / shrunk.clamp_min(1e-30)).sqrt())).to(start.dtype)


def _mean_bias(system: System, start: Tensor, grown: WarmStart) -> Tensor:
    trained = grown.trained.get("head.bias")
    if trained is None:
        return start
    (total,) = all_reduce_sum(trained.sum()[None].to(start.device), system.world, "biases of matched items")
    return torch.full_like(start, float(total) / grown.matches["items"].num_matched)


def _tell(system: System, grown: WarmStart) -> None:
    told = {
        kind: {"matched": found.num_matched, "new": found.num_new, "removed": found.removed}
        for kind, found in grown.matches.items()
    }
    path = Path(system.config.output) / GROWTH_FILE
    path.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if not any(found.num_new or found.removed for found in grown.matches.values()):
        logger.info("the same users and items as in the run that this one starts from, in another corpus")
        return
    for kind, found in grown.matches.items():
        logger.warning(
            "ANOTHER CATALOG: %d %s go on from their trained rows, %d are new, %d are gone (%s)",
            found.num_matched,
            kind,
            found.num_new,
            len(found.removed),
            path,
        )
