"""Writing checkpoints in a background thread while training continues.

`format.py` describes the files; `store.py` commits a checkpoint as a whole or not at all; `increments.py` describes
checkpoints that hold changed rows only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from cllm4rec_dist.checkpointing.format import (
    ADAPTER,
    ID_FILES,
    LINEAR_NEIGHBORS,
    LINEAR_WEIGHTS,
    REPLICATED_FILE,
    SEEN_FILE,
    CheckpointMetadata,
    RunState,
    changed_rows_name,
    shard_file,
)
from cllm4rec_dist.checkpointing.increments import STATE_FILE, Base, read_base, superseded
from cllm4rec_dist.checkpointing.lineage import TrainedOn
from cllm4rec_dist.checkpointing.run_folder import BEST, STEP, CheckpointKind
from cllm4rec_dist.checkpointing.store import FileEntry, Store
from cllm4rec_dist.distributed.adam import MOMENTS
from cllm4rec_dist.distributed.collectives import barrier, gather_integers
from cllm4rec_dist.errors import CheckpointError, DamagedCheckpointError
from cllm4rec_dist.model.embedding_optimizer import rows_on_host
from cllm4rec_dist.model.linear_memory import LinearMemory
from cllm4rec_dist.model.table_replicas import require_equal_replicas
from cllm4rec_dist.system import System

logger = logging.getLogger(__name__)

_REMINDER_SECONDS = 60.0


@dataclass(frozen=True)
class _Snapshot:
    """A checkpoint in memory.

    Attributes:
        files: functions that write each file of this rank to a path.
        best: name of the best checkpoint so far, if there is one.
        base: the checkpoint whose changed rows it holds; None if it is whole.
        copy_seconds: time that the training loop waited for the copy.
    """

    name: str
    files: dict[str, Callable[[Path], object]]
    best: str | None
    base: Base | None
    copy_seconds: float


class AsyncSaver:
    """Writes checkpoints in a background thread.

    `save` copies the state into host memory and returns. A thread writes the files, the ranks compare the outcome over
    a process group of this object, and rank 0 commits and then removes old checkpoints. One checkpoint is written at a
    time: `save` waits for the one before. A checkpoint that cannot be written is logged as an error and leaves earlier
    ones intact; training continues, and the next one is tried.

    Args:
        store: destination.
        system: the system to save.
        keep: number of newest checkpoints to keep, and of newest whole ones, in addition to the best.
        trained_on: stored in every checkpoint; only rank 0's is used.
        full_every: every how many checkpoints one is whole, beginning with the first; the best one always is.
    """

    def __init__(
        self, store: Store, system: System, keep: int, trained_on: TrainedOn | None = None, full_every: int = 1
    ) -> None:
        self._store, self._system, self._keep, self._world = store, system, keep, system.world
        self._trained_on, self._full_every = trained_on, full_every
        self._base: Base | None = None
        self._num_on_base = 0
        self._bases: dict[str, str | None] = {}
        self._group = dist.new_group(backend="gloo") if self._world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        if self._world.is_main:
            store.sweep((STEP, BEST))
        # Without it the sweep could remove files that another rank has begun to write.
        barrier(self._world, "leftovers to be swept")

    def save(self, state: RunState, kind: CheckpointKind) -> None:
        """Start a checkpoint of this step. Collective; waits for the one before it."""
        self.wait()
        started = time.perf_counter()
        name = f"{kind}{state.step:08d}"
        if self._store.is_committed(name):
            return  # a resumed run may reach the best step of the run before it again
        best = None if state.best_step is None else f"{BEST}{state.best_step:08d}"
        require_equal_replicas(self._system.recommender)
        base = self._next_base() if kind == STEP else None
        files = _snapshot(self._system, state, self._trained_on, moments=kind == STEP, base=base)
        if base is not None:
            self._num_on_base += 1
        elif kind == STEP and self._full_every > 1:
            # From now on changes are those since this copy, which `_try_to_write` makes the base once it is committed.
            self._base, self._num_on_base = None, 0
            self._system.embedding_optimizer.record_changes()
        snapshot = _Snapshot(name, files, best, base, time.perf_counter() - started)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def _next_base(self) -> Base | None:
        """Return the base of the next checkpoint; None if it must be whole. One small all-gather unless all are."""
        if self._full_every == 1:
            return None
        usable = self._base is not None and self._num_on_base + 1 < self._full_every
        if usable and self._world.is_main:
            assert self._base is not None
            try:
                self._store.marker(self._base.name, self._base.marker)
            except CheckpointError as error:
                logger.warning("this checkpoint is whole, because the last whole one cannot be its base: %s", error)
                usable = False
        agreed = all(flag for (flag,) in gather_integers([int(usable)], self._world, what="usable base checkpoints"))
        return self._base if agreed else None

    def wait(self) -> None:
        """Wait until the last checkpoint is written or has failed; log a reminder every minute."""
        if self._thread is None:
            return
        started = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_REMINDER_SECONDS)
            if self._thread.is_alive():
                waited = time.monotonic() - started
                logger.warning("waiting since %.0f s for a checkpoint to be written to %s", waited, self._store.url)
        self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint. Collective.

        Raises:
            CheckpointError: if it could not be written.
        """
        self.wait()
        if self._problem is not None:
            raise CheckpointError(
                "checkpoint.dir",
                self._store.url,
                f"could not store the last checkpoint ({self._problem})",
                "Repair the storage and run the same command again; earlier checkpoints are intact.",
            )

    def _write(self, snapshot: _Snapshot) -> None:
        try:
            self._problem = self._try_to_write(snapshot)
        except Exception as error:
            # A rank that died broke the group; the training loop's collectives will report that.
            self._problem = f"{type(error).__name__}: {error}"
        if self._problem is not None:
            logger.error("CHECKPOINT %s NOT WRITTEN: %s", self._store.path(snapshot.name), self._problem)

    def _try_to_write(self, snapshot: _Snapshot) -> str | None:
        """Write, compare the outcome with other ranks, commit and prune. Return the problem, or None."""
        started = time.perf_counter()
        files: dict[str, FileEntry] = {}
        problem = None
        try:
            for file, write in snapshot.files.items():
                files[file] = self._store.write(snapshot.name, file, write)
        except Exception as error:
            problem = f"rank {self._world.rank}: {type(error).__name__}: {error}"
        entry = files.get(shard_file(self._world.rank, self._world.size))
        outcomes = gather_integers([int(problem is not None), *_as_integers(entry)], self._world, self._group)
        failed = [rank for rank, (bad, *_) in enumerate(outcomes) if bad]
        marker: FileEntry | None = None
        if self._world.is_main:
            if not failed:
                shards = {
                    shard_file(rank, self._world.size): _from_integers(e) for rank, (_, *e) in enumerate(outcomes)
                }
                marker, problem = self._commit(snapshot, files | shards, started)
            if failed or problem:
                self._discard(snapshot.name)
        marked = [int(problem is not None), *_as_integers(marker)]
        ((bad, *values), *_) = gather_integers(marked, self._world, self._group)
        if not (problem or failed or bad) and snapshot.name.startswith(STEP) and snapshot.base is None:
            self._base = Base(name=snapshot.name, marker=_from_integers(values))
        return problem or (f"ranks {failed or [0]} failed" if failed or bad else None)

    def _commit(
        self, snapshot: _Snapshot, files: dict[str, FileEntry], started: float
    ) -> tuple[FileEntry | None, str | None]:
        """Commit and prune. Return size and digest of the marker, or the problem."""
        name = snapshot.name
        try:
            unseen = self._store.unseen(name, files)
            if unseen:
                return None, f"rank 0 cannot see {unseen}: checkpoint.dir must be storage that all hosts share"
            marker = self._store.commit(name, files)
        except Exception as error:
            return None, f"rank 0: {type(error).__name__}: {error}"
        self._bases[name] = None if snapshot.base is None else snapshot.base.name
        self._prune(snapshot.best)
        megabytes = sum(entry.num_bytes for entry in files.values()) / 1e6
        logger.info(
            "checkpoint %s: copied in %.2f s, %.1f MB written in %.1f s%s",
            name,
            snapshot.copy_seconds,
            megabytes,
            time.perf_counter() - started,
            "" if snapshot.base is None else f" (rows that changed since {snapshot.base.name})",
        )
        return marker, None

    def _prune(self, best: str | None) -> None:
        """Remove old checkpoints. A failure is only logged, because the new checkpoint is committed already.

        The best checkpoint need not be the newest of its kind: a run that resumes from an earlier step may select by
        another metric.
        """
        try:
            bests = self._store.names(BEST)
            self._bases = {name: self._base_of(name) for name in self._store.names(STEP)}
            too_old = superseded(self._bases, self._keep)
            too_old += [name for name in bests if name != best] if best in bests else bests[:-1]
        except Exception as error:
            logger.warning("old checkpoints at %s are not removed: %s", self._store.url, error)
            return
        for name in too_old:
            self._discard(name)

    def _base_of(self, name: str) -> str | None:
        """Return the name of the checkpoint that a committed one needs; None if it is whole or damaged."""
        if name in self._bases:
            return self._bases[name]
        try:
            base = read_base(self._store, name)
        except DamagedCheckpointError:
            return None
        return None if base is None else base.name

    def _discard(self, name: str) -> None:
        """Remove a folder. If that fails, a later save or the next start removes it."""
        try:
            self._store.remove(name)
        except Exception as error:
            logger.warning("leftovers of %s are not removed: %s", self._store.path(name), error)


def _snapshot(
    system: System, state: RunState, trained_on: TrainedOn | None, *, moments: bool, base: Base | None
) -> dict[str, Callable[[Path], object]]:
    """Copy this rank's state into host memory. Return a function for each file that writes it to a path.

    The first replica stores the tables.

    Args:
        base: if not None, only rows that changed since it are copied, and nothing that never changes.
    """
    world, model = system.world, system.recommender
    holds_tables = model.world.replica == 0
    changed = system.embedding_optimizer.changed_rows() if base is not None and holds_tables else {}
    tables = system.embedding_optimizer.state(changed) if moments and holds_tables else {}
    adapters = {ADAPTER + name: adam for name, adam in system.engine.moments().items()} if moments else {}
    sharded = {ADAPTER + name: value for name, value in system.engine.weights().items()}
    if holds_tables:
        sharded |= _tables(system, changed)
    whole = {name: p.detach() for name, p in model.replicated_parameters()}
    for name, adam in (tables | adapters).items():
        destination = sharded if name in sharded else whole
        destination |= {f"{name}.{key}": adam[key] for key in MOMENTS}
        if "step" in adam:
            whole[f"{name}.step"] = adam["step"]
    shard = _copies(sharded)
    if holds_tables:
        shard |= _linear_memory(system.linear, has_base=base is not None)
    files: dict[str, Callable[[Path], object]] = {
        shard_file(world.rank, world.size): lambda path: save_file(shard, path)
    }
    if world.is_main:
        replicated = _copies(whole)
        metadata = _metadata(system, state, trained_on, base).model_dump_json(indent=1)
        files |= {
            REPLICATED_FILE: lambda path: save_file(replicated, path),
            STATE_FILE: lambda path: path.write_text(metadata, encoding="utf-8"),
        }
        if base is None:
            files |= {
                ID_FILES["users"]: lambda path: pq.write_table(system.corpus.ids("users"), path),
                ID_FILES["items"]: lambda path: pq.write_table(system.corpus.ids("items"), path),
            }
        if trained_on is not None:
            files[SEEN_FILE] = trained_on.seen.save
    return files


def _tables(system: System, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's rows of the tables.

    Args:
        changed: by table, the local rows to return, int64 [k], which are then copies on the host, with their indices.
    """
    tensors = {}
    for name, parameter, _ in system.recommender.sharded_parameters():
        tensors[name] = parameter.detach()
        if name in changed:
            tensors[name] = rows_on_host(tensors[name], changed[name])
            tensors[changed_rows_name(name)] = changed[name].int()
    return tensors


def _linear_memory(memory: LinearMemory, *, has_base: bool) -> dict[str, Tensor]:
    """Return this rank's rows of the linear memory on the host, made for it alone; none of an empty one.

    Args:
        has_base: return no row as changed, because the memory is fitted before the first checkpoint.
    """
    if memory.is_empty:
        return {}
    if not has_base:
        return dict(zip((LINEAR_NEIGHBORS, LINEAR_WEIGHTS), memory.rows(), strict=True))
    width, unchanged = memory.num_neighbors, torch.zeros(0, dtype=torch.int32)
    return {
        LINEAR_NEIGHBORS: torch.zeros(0, width, dtype=torch.int32),
        LINEAR_WEIGHTS: torch.zeros(0, width),
        changed_rows_name(LINEAR_NEIGHBORS): unchanged,
        changed_rows_name(LINEAR_WEIGHTS): unchanged.clone(),
    }


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _metadata(system: System, state: RunState, trained_on: TrainedOn | None, base: Base | None) -> CheckpointMetadata:
    return CheckpointMetadata(
        run=state,
        world_size=system.world.size,
        shard_group=None if system.recommender.replicas.size == 1 else system.recommender.world.size,
        num_users=system.corpus.num_users,
        num_items=system.corpus.num_items,
        steps_taken=system.engine.steps_taken(),
        shapes=system.engine.shapes(),
        fingerprints=system.fingerprints,
        config=system.config.model_dump(mode="json"),
        lineage=None if trained_on is None else trained_on.lineage,
        linear=None if system.linear.is_empty else system.linear.settings,
        has_shared_user=system.config.method.shared_user_ratio > 0,
        embedding_width=system.recommender.collaborative.items.width,
        base=base,
    )


def _as_integers(entry: FileEntry | None) -> list[int]:
    """Encode a file's size and digest as five int64, which any process group can send."""
    if entry is None:
        return [0] * 5
    digest = bytes.fromhex(entry.sha256)
    return [entry.num_bytes, *(int.from_bytes(digest[i : i + 8], signed=True) for i in range(0, 32, 8))]


def _from_integers(values: Sequence[int]) -> FileEntry:
    num_bytes, *digest = values
    return FileEntry(num_bytes=num_bytes, sha256=b"".join(i.to_bytes(8, signed=True) for i in digest).hex())
