"""Restoring a run from a checkpoint: choose one that is valid, read this rank's shard, load it into a system.

`format.py` has the files and their metadata; `async_saver.py` writes them.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cllm4rec_dist.checkpointing.format import ADAPTER, Checkpoint
from cllm4rec_dist.checkpointing.run_folder import BEST
from cllm4rec_dist.checkpointing.store import USE_ANOTHER, Store
from cllm4rec_dist.config.embedding_width import embedding_width, require_same_width
from cllm4rec_dist.distributed.adam import MOMENTS
from cllm4rec_dist.distributed.collectives import gather_integers
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.errors import CheckpointError, DamagedCheckpointError
from cllm4rec_dist.model.linear_fit import LinearSettings
from cllm4rec_dist.system import InferenceSystem, System

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointShard:
    """This rank's part of a checkpoint.

    Attributes:
        weights: this rank's rows and slices by name, without those that the checkpoint lacks.
        moments: Adam's moments of the same.
        replicated: tensors that are stored whole.
        linear: this rank's neighbors and weights of the linear memory; None without one.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    replicated: dict[str, Tensor]
    linear: tuple[Tensor, Tensor] | None = None


def load_first_valid(
    store: Store, names: Sequence[str], world: World, read: Callable[[Checkpoint], T], *, quarantine: bool = False
) -> tuple[Checkpoint, T] | None:
    """Return the first checkpoint that every rank can read and the result of `read`; None if there is none.

    Collective. A damaged checkpoint is logged as an error and the next one is tried.

    Args:
        names: in the order to try.
        read: may raise DamagedCheckpointError on any rank; any other error is raised here.
        quarantine: also remove damaged checkpoints from the committed ones.
    """
    hashes = gather_integers([zlib.crc32("/".join(names).encode())], world)
    if any(other != hashes[0] for other in hashes):
        raise CheckpointError(
            "checkpoint.dir",
            store.url,
            f"shows different checkpoints to rank {world.rank} and other ranks",
            "Use storage in which all hosts see the same files.",
        )
    for index, name in enumerate(names):
        valid: tuple[Checkpoint, T] | None = None
        try:
            checkpoint = Checkpoint.open(store, name)
            valid = checkpoint, read(checkpoint)
        except DamagedCheckpointError as error:
            logger.error("DAMAGED CHECKPOINT: %s", error)
        failed = [rank for rank, (bad,) in enumerate(gather_integers([int(valid is None)], world)) if bad]
        if not failed:
            return valid
        if world.is_main:
            then = f"; trying {names[index + 1]}" if index + 1 < len(names) else ""
            logger.error("%s cannot be used (ranks %s)%s", store.path(name), failed, then)
            if quarantine:
                store.quarantine(name)
    return None


def all_damaged(path: str, store: Store, names: Sequence[str]) -> CheckpointError:
    """Return the error for a path of which `load_first_valid` accepts no checkpoint."""
    if len(names) == 1:
        return CheckpointError("checkpoint", store.path(names[0]), "is damaged", USE_ANOTHER)
    return CheckpointError("checkpoint", path, f"has {len(names)} checkpoints, all damaged", "Use another run.")


def require_same_fingerprints(checkpoint: Checkpoint, fingerprints: dict[str, str]) -> None:
    """Refuse a checkpoint of another backbone, corpus or tokenizer.

    Raises:
        CheckpointError: names both fingerprints.
    """
    saved = checkpoint.metadata.fingerprints
    for name, fingerprint in fingerprints.items():
        if saved.get(name) != fingerprint:
            raise CheckpointError(
                f"{checkpoint.path}: {name} fingerprint",
                saved.get(name),
                f"is not this run's, {fingerprint}",
                f"Use the {name} that the checkpoint was made with, or start a new run.",
            )


def require_same_embedding_width(system: InferenceSystem, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of the same backbone whose embeddings have another width.

    Raises:
        CheckpointError: names both widths.
    """
    model, about = system.recommender, checkpoint.metadata
    dim = about.config.get("embeddings", {}).get("dim")
    default = embedding_width(dim, model.words.embedding.shape[1], about.num_users + about.num_items)
    before = about.embedding_width or default  # checkpoints of early versions do not record it
    require_same_width(model.collaborative.items.width, checkpoint.path, before)


def read(
    system: InferenceSystem, checkpoint: Checkpoint, *, moments: bool, tables: bool = True, maps: bool = False
) -> CheckpointShard:
    """Read this rank's part of a checkpoint that any number of ranks wrote. Changes nothing; no collective.

    Args:
        moments: read Adam's moments, too.
        tables: False leaves out tensors with a row for each user or item (of another catalog: `warm_start.py`).
        maps: map tables into memory where one file has this rank's rows (`Checkpoint.rows`).

    Raises:
        DamagedCheckpointError: for damage.
        CheckpointError: for other adapter settings.
    """
    _require_same_shapes(system, checkpoint)
    shards = system.recommender.world
    linear = checkpoint.linear_memory(*system.linear.partition.range(shards.rank), maps=maps) if tables else None
    shard = CheckpointShard({}, {}, checkpoint.replicated(), linear)
    shapes = _local_shapes(system)
    for name, partition in _partitions(system).items():
        if not (tables or name.startswith(ADAPTER)):
            continue
        rank = system.world.rank if name.startswith(ADAPTER) else shards.rank
        span = partition.num_rows, *partition.range(rank)
        weights = checkpoint.rows(name, *span, maps=maps)
        if weights is not None:
            shard.weights[name] = _checked_shape(checkpoint, name, weights, shapes[name])
        if moments:
            saved = {key: checkpoint.rows(f"{name}.{key}", *span) for key in MOMENTS}
            shard.moments[name] = {
                key: _checked_shape(checkpoint, f"{name}.{key}", value, shapes[name])
                for key, value in saved.items()
                if value is not None
            }
    return shard


def _require_same_shapes(system: InferenceSystem, checkpoint: Checkpoint) -> None:
    saved = {name: tuple(shape) for name, shape in checkpoint.metadata.shapes.items()}
    current = system.engine.shapes()
    if saved != current:
        different = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
        raise CheckpointError(
            f"{checkpoint.path}: adapter",
            different[:3],
            "do not match this run's adapter",
            "Use the same adapter settings.",
        )


def _partitions(system: InferenceSystem) -> dict[str, RowPartition]:
    """Return the partitions of everything sharded: rows of tables, elements of adapters."""
    tables = {name: partition for name, _, partition in system.recommender.sharded_parameters()}
    return tables | {ADAPTER + name: partition for name, partition in system.engine.partitions().items()}


def _local_shapes(system: InferenceSystem) -> dict[str, tuple[int, ...]]:
    """Return the shapes of this rank's part of everything sharded."""
    tables = {name: tuple(p.shape) for name, p, _ in system.recommender.sharded_parameters()}
    return tables | {ADAPTER + name: tuple(value.shape) for name, value in system.engine.weights().items()}


def _checked_shape(checkpoint: Checkpoint, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise DamagedCheckpointError(
            f"{checkpoint.path}: {name}", tuple(value.shape), f"should be {shape}", USE_ANOTHER
        )
    return value


def _require_all(system: System, checkpoint: Checkpoint, shard: CheckpointShard) -> None:
    """Refuse a checkpoint that lacks a tensor: a run must not resume from part of its state."""
    whole = {name: tuple(p.shape) for name, p in system.recommender.replicated_parameters()}
    optimizer = system.embedding_optimizer
    scalars = {f"{name}.step": () for name in optimizer.moment_names}
    moments = {f"{name}.{key}": shape for name, shape in optimizer.replicated_shapes.items() for key in MOMENTS}
    for name, shape in (whole | moments | scalars).items():
        if name not in shard.replicated:
            raise DamagedCheckpointError(f"{checkpoint.path}: {name}", "missing", "should be there", USE_ANOTHER)
        _checked_shape(checkpoint, name, shard.replicated[name], shape)
    for name in _partitions(system):
        if name not in shard.weights or len(shard.moments[name]) < len(MOMENTS):
            raise DamagedCheckpointError(f"{checkpoint.path}: {name}", "missing", "should be there", USE_ANOTHER)


def restore_weights(system: InferenceSystem, shard: CheckpointShard, *, shares_tables: bool = False) -> None:
    """Load weights. What the checkpoint lacks (tables of a run without texts) is unchanged, with a warning.

    Args:
        shares_tables: on a CPU, use the tables of `shard` instead of copying them.
    """
    replicated = dict(system.recommender.replicated_parameters())
    missing = [*(_partitions(system).keys() - shard.weights.keys()), *(replicated.keys() - shard.replicated.keys())]
    if missing:
        logger.warning("the checkpoint holds no %s; they stay as they are", ", ".join(sorted(missing)))
    if "head.projection" in shard.replicated.keys() - replicated.keys():
        logger.warning("the checkpoint's head.projection is not used, because this run has head.projection=false")
    parameters = {name: p for name, p, _ in system.recommender.sharded_parameters()} | replicated
    shared = shard.weights if shares_tables and system.world.device.type == "cpu" else {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = (shard.weights | shard.replicated).get(name)
            if name in shared:
                parameter.data = shared[name].to(parameter.dtype)
            elif value is not None:
                parameter.copy_(value)
    system.engine.set_weights(_adapter_entries(shard.weights))


def restore_linear_memory(system: InferenceSystem, checkpoint: Checkpoint, shard: CheckpointShard) -> None:
    """Load the linear memory and its weight. Without one in the checkpoint nothing changes."""
    if shard.linear is not None:
        settings = checkpoint.metadata.linear or LinearSettings.of(system.config.linear)
        system.linear.fill(*shard.linear, settings)
        system.linear.weight = checkpoint.metadata.run.linear_weight or 0.0


def _restore_moments(system: System, shard: CheckpointShard, steps_taken: float) -> None:
    device, whole = system.world.device, shard.replicated
    states = {}
    for name in system.embedding_optimizer.moment_names:
        moments = shard.moments.get(name) or {
            key: whole[f"{name}.{key}"] for key in MOMENTS if f"{name}.{key}" in whole
        }
        if moments:
            states[name] = {key: v.to(device) for key, v in moments.items()} | {"step": whole[f"{name}.step"]}
    system.embedding_optimizer.load_state(states)
    system.engine.set_moments(_adapter_entries(shard.moments), steps_taken)


def _adapter_entries(values: dict[str, T]) -> dict[str, T]:
    return {name.removeprefix(ADAPTER): value for name, value in values.items() if name.startswith(ADAPTER)}


def resume(
    system: System, store: Store, names: Sequence[str], check: Callable[[Checkpoint], None]
) -> Checkpoint | None:
    """Restore everything that an `AsyncSaver` wrote, at any number of ranks, from the first valid one of `names`.

    Collective. At the same number of ranks the run then continues bit for bit as if it had not stopped.

    Args:
        check: raises CheckpointError for a checkpoint of another run.

    Returns the checkpoint; None if none is valid.
    """

    def read_all(checkpoint: Checkpoint) -> CheckpointShard:
        if checkpoint.name.startswith(BEST):
            raise CheckpointError(
                "resume", checkpoint.path, "holds weights only", "Use it as init_from, or resume from a step-* one."
            )
        require_same_fingerprints(checkpoint, system.fingerprints)
        check(checkpoint)
        checkpoint.trained_on()  # raises for damage before anything is restored
        shard = read(system, checkpoint, moments=True)
        _require_all(system, checkpoint, shard)
        return shard

    valid = load_first_valid(store, names, system.world, read_all, quarantine=True)
    if valid is None:
        return None
    checkpoint, shard = valid
    restore_weights(system, shard)
    restore_linear_memory(system, checkpoint, shard)
    _restore_moments(system, shard, checkpoint.metadata.steps_taken)
    if system.world.is_main:
        logger.info(
            "resumed %s (written by %d ranks) at step %d",
            checkpoint.path,
            checkpoint.metadata.world_size,
            checkpoint.metadata.run.step,
        )
    return checkpoint
