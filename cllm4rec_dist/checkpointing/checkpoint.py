"""Checkpoints: what of a run is kept, and how it comes back at any number of ranks.

    checkpoints/step-00000500/
        shard-00000-of-00002.safetensors   this rank's rows of every table, its slice of every adapter weight,
                                           and Adam's moments of both
        replicated.safetensors             what every rank holds whole, and Adam's step counts
        users.parquet, items.parquet       external ids of the rows, by which a later corpus finds them again
        trained-on.safetensors             a sample of the interactions that were trained on (`lineage.py`)
        state.json                         position, best result, fingerprints, configuration
        COMMIT.json                        size and sha256 of every file; written last (`store.py`)

Rows and slices follow one rule, `RowPartition`, which is also how ZeRO-3 cuts a flattened parameter. So a rank of a run
of any size reads its own range from whichever files hold it: nothing is converted, nothing is gathered, nothing is
unpickled (DeepSpeed's own checkpoint files and torch.distributed.checkpoint's index are pickles). The position in the
data is the number of completed steps, and all randomness follows from it.

`best-00000500` is the same without moments: enough to evaluate, to recommend and to start another run, not to resume.
Writing is left to `async_saver.py`.

Legend: W ranks.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cllm4rec_dist.checkpointing.find_run import find, newest_step
from cllm4rec_dist.checkpointing.lineage import Lineage, SeenInteractions, TrainedOn
from cllm4rec_dist.checkpointing.run_folder import BEST, STEP, Kind
from cllm4rec_dist.checkpointing.store import SCHEMA_VERSION, Marker, Store, parse
from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.distributed.adam import MOMENTS
from cllm4rec_dist.distributed.collectives import gather_integers
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.errors import CheckpointError, DamagedCheckpointError
from cllm4rec_dist.system import InferenceSystem, System

__all__ = ["BEST", "STEP", "Kind", "find", "newest_step"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
STATE_FILE, REPLICATED_FILE = "state.json", "replicated.safetensors"
SEEN_FILE = "trained-on.safetensors"
ADAPTER = "adapter."
"""In front of the names of what the engine trains."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: completed optimizer steps, skipped ones included; everything about the data follows from it.
        best, best_metric, best_step: best validation result so far, the metric it is of, and the step it was seen at.
        validations_since_best: for early stopping.
        mean_loss: running mean, by which an explosion is known.
        skipped_in_a_row: steps left out since the last good one.
        validated_step: step of the last validation.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    mean_loss: float | None = None
    skipped_in_a_row: int = 0
    best_metric: str | None = None
    validated_step: int | None = None


class About(StrictModel):
    """Contents of `state.json`."""

    schema_version: int = SCHEMA_VERSION
    run: RunState
    world_size: int = Field(ge=1)
    """Ranks that wrote it."""
    num_users: int = Field(ge=1)
    num_items: int = Field(ge=1)
    steps_taken: float = Field(ge=0)
    """Adam's count of the adapters."""
    shapes: dict[str, tuple[int, ...]]
    """Of the adapters' whole parameters, which are stored flat."""
    fingerprints: dict[str, str]
    """Of backbone, corpus and tokenizer."""
    config: dict[str, Any]
    """Resolved configuration of the run."""
    lineage: Lineage | None = None
    """What the model was trained on; None where an earlier version wrote the checkpoint."""
    has_shared_user: bool = False
    """True if the user tables have a shared row behind those of the users."""

    @property
    def num_user_rows(self) -> int:
        """Rows of the user tables."""
        return self.num_users + self.has_shared_user


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened."""

    store: Store
    name: str
    marker: Marker
    about: About

    @classmethod
    def open(cls, store: Store, name: str) -> Self:
        """Read marker and state.

        Raises:
            DamagedCheckpointError: where they are not whole; another checkpoint may be.
        """
        marker = store.marker(name)
        content = _fetch(store, name, marker, STATE_FILE).read_bytes()
        about = parse(About, content, f"{store.path(name)}/{STATE_FILE}")
        if not name.endswith(f"-{about.run.step:08d}"):
            raise DamagedCheckpointError(
                f"{store.path(name)}/{STATE_FILE}: step", about.run.step, f"is not that of {name}", _OTHER
            )
        return cls(store, name, marker, about)

    @property
    def path(self) -> str:
        """Where it is, for people."""
        return self.store.path(self.name)

    def file(self, name: str) -> Path:
        """A verified local copy of one of its files."""
        return _fetch(self.store, self.name, self.marker, name)

    def replicated(self) -> dict[str, Tensor]:
        """Everything that is stored whole, by name."""
        with _reading(self, REPLICATED_FILE) as path:
            return load_file(path)

    def trained_on(self) -> TrainedOn | None:
        """What the model was trained on; None where an earlier version wrote the checkpoint."""
        if self.about.lineage is None:
            return None
        try:
            return TrainedOn(self.about.lineage, SeenInteractions.load(self.file(SEEN_FILE)))
        except ValueError as error:
            raise DamagedCheckpointError(f"{self.path}/{SEEN_FILE}", "content", str(error), _OTHER) from error

    def rows(self, name: str, num_rows: int, start: int, stop: int) -> Tensor | None:
        """Rows [start, stop) of a sharded tensor of `num_rows` rows, from the files that hold them.

        Returns None where no such tensor was saved. Every file that is read is verified first.
        """
        partition = RowPartition(num_rows, self.about.world_size)
        parts: list[Tensor] = []
        for rank in range(partition.world_size):
            first, last = partition.range(rank)
            low, high = max(start, first), min(stop, last)
            if low >= high and (parts or rank + 1 < partition.world_size):
                continue  # nothing here; the last file gives an empty part its width
            file = shard_file(rank, partition.world_size)
            with _reading(self, file) as path, safe_open(path, framework="pt") as tensors:
                if name not in tensors.keys():  # noqa: SIM118 - not a dict
                    return None
                block = tensors.get_slice(name)
                found = block.get_dtype(), block.get_shape()[:1]
                if found != ("F32", [last - first]):
                    raise DamagedCheckpointError(
                        f"{self.path}/{file}: {name}", found, f"should be {last - first} rows of F32", _OTHER
                    )
                parts.append(block[max(low - first, 0) : max(high - first, 0)])
        widths = {tuple(part.shape[1:]) for part in parts}
        if len(widths) > 1:
            raise DamagedCheckpointError(f"{self.path}: {name}", widths, "should be one shape of rows", _OTHER)
        return torch.cat(parts)

    def take(self, name: str, num_rows: int, ids: Tensor) -> Tensor | None:
        """Rows `ids` (int64, any order) of a sharded tensor of `num_rows` rows: [len(ids), ...].

        Returns None where no such tensor was saved. Memory: the span of `ids` in one file at a time.
        """
        partition = RowPartition(num_rows, self.about.world_size)
        taken = self.rows(name, num_rows, 0, 0)
        if taken is None:
            return None
        taken = taken.new_empty((len(ids), *taken.shape[1:]))
        for rank in range(partition.world_size):
            first, last = partition.range(rank)
            here = (ids >= first) & (ids < last)
            if here.any():
                low = int(ids[here].min())
                block = self.rows(name, num_rows, low, int(ids[here].max()) + 1)
                assert block is not None
                taken[here] = block[ids[here] - low]
        return taken

    def external_ids(self, kind: Literal["users", "items"]) -> pa.ChunkedArray:
        """External ids of the rows, in their order."""
        size = self.about.num_users if kind == "users" else self.about.num_items
        path = self.file(f"{kind}.parquet")
        try:
            ids = pq.read_table(path, columns=[kind.removesuffix("s")]).column(0).cast(pa.string())
        except (pa.ArrowException, OSError, IndexError) as error:
            raise DamagedCheckpointError(f"{self.path}/{kind}.parquet", str(error), "cannot be read", _OTHER) from error
        if len(ids) != size or pc.count_distinct(ids).as_py() != size:
            raise DamagedCheckpointError(
                f"{self.path}/{kind}.parquet", len(ids), f"should be {size} different ids", _OTHER
            )
        return ids


_OTHER = "Use another checkpoint."


@contextmanager
def _reading(checkpoint: Checkpoint, file: str) -> Iterator[Path]:
    """The path of a verified file; what safetensors then finds wrong in it is damage too."""
    try:
        yield checkpoint.file(file)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{checkpoint.path}/{file}", str(error), "cannot be read", _OTHER) from error


def _fetch(store: Store, name: str, marker: Marker, file: str) -> Path:
    if file not in marker.files:
        raise DamagedCheckpointError(f"{store.path(name)}/{file}", "missing", "was never committed", _OTHER)
    return store.fetch(name, file, marker.files[file])


def shard_file(rank: int, size: int) -> str:
    """Name of what `rank` of `size` ranks writes."""
    return f"shard-{rank:05d}-of-{size:05d}.safetensors"


def load_first_valid(
    store: Store, names: Sequence[str], world: World, read: Callable[[Checkpoint], T], *, quarantine: bool = False
) -> tuple[Checkpoint, T] | None:
    """The first checkpoint that every rank can read, and what `read` made of it; None if none can. Collective.

    Damage is told loudly and the next one is tried.

    Args:
        names: in the order to try.
        read: may raise DamagedCheckpointError on any rank; any other error is raised here.
        quarantine: also take what is damaged out of the committed ones.
    """
    seen = gather_integers([zlib.crc32("/".join(names).encode())], world)
    if any(other != seen[0] for other in seen):
        raise CheckpointError(
            "checkpoint.dir",
            store.url,
            f"shows other checkpoints to rank {world.rank} or to others",
            "Put it where all hosts see the same files.",
        )
    for place, name in enumerate(names):
        found: tuple[Checkpoint, T] | None = None
        try:
            checkpoint = Checkpoint.open(store, name)
            found = checkpoint, read(checkpoint)
        except DamagedCheckpointError as error:
            logger.error("DAMAGED CHECKPOINT: %s", error)
        failed = [rank for rank, (bad,) in enumerate(gather_integers([int(found is None)], world)) if bad]
        if not failed:
            return found
        if world.is_main:
            then = f"; trying {names[place + 1]}" if place + 1 < len(names) else ""
            logger.error("%s cannot be used (ranks %s)%s", store.path(name), failed, then)
            if quarantine:
                store.quarantine(name)
    return None


def none_whole(path: str, store: Store, names: Sequence[str]) -> CheckpointError:
    """The error where `load_first_valid` found none of the checkpoints that a path means."""
    if len(names) == 1:
        return CheckpointError("checkpoint", store.path(names[0]), "is damaged", "Use another checkpoint.")
    return CheckpointError("checkpoint", path, f"has {len(names)} checkpoints, all damaged", "Use another run.")


def require_same(checkpoint: Checkpoint, own: dict[str, str]) -> None:
    """Refuse a checkpoint of another backbone, corpus or tokenizer, with both fingerprints named."""
    saved = checkpoint.about.fingerprints
    for name, fingerprint in own.items():
        if saved.get(name) != fingerprint:
            raise CheckpointError(
                f"{checkpoint.path}: {name} fingerprint",
                saved.get(name),
                f"is not this run's, {fingerprint}",
                f"Use the {name} that the checkpoint was made with, or start a new run.",
            )


@dataclass(frozen=True)
class Contents:
    """What a rank of this run reads of a checkpoint.

    Attributes:
        weights: this rank's rows and slices by name; without those the checkpoint does not have.
        moments: Adam's, of the same.
        replicated: what is stored whole.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    replicated: dict[str, Tensor]


def _sharded(system: InferenceSystem) -> dict[str, RowPartition]:
    """Everything of which a rank holds a range: rows of tables, elements of adapters."""
    tables = {name: partition for name, _, partition in system.recommender.sharded_parameters()}
    return tables | {ADAPTER + name: partition for name, partition in system.engine.partitions().items()}


def read(system: InferenceSystem, checkpoint: Checkpoint, *, moments: bool, tables: bool = True) -> Contents:
    """This rank's part of a checkpoint that any number of ranks wrote. Changes nothing yet; no collective.

    Args:
        moments: Adam's too.
        tables: False leaves out what has a row for each user or item (of another catalog: `warm_start.py`).

    Raises:
        DamagedCheckpointError: for damage, or missing moments where they are asked for.
        CheckpointError: for adapters of other settings.
    """
    saved = {name: tuple(shape) for name, shape in checkpoint.about.shapes.items()}
    own = system.engine.shapes()
    if saved != own:
        other = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
        raise CheckpointError(
            f"{checkpoint.path}: adapter",
            other[:3],
            "do not match this run's adapter",
            "Use the same adapter settings.",
        )
    contents = Contents({}, {}, checkpoint.replicated())
    shapes = _local_shapes(system)
    for name, partition in _sharded(system).items():
        if not (tables or name.startswith(ADAPTER)):
            continue
        span = partition.num_rows, *partition.range(system.world.rank)
        weights = checkpoint.rows(name, *span)
        if weights is not None:
            contents.weights[name] = _shaped(checkpoint, name, weights, shapes[name])
        if moments:
            found = {key: checkpoint.rows(f"{name}.{key}", *span) for key in MOMENTS}
            contents.moments[name] = {
                key: _shaped(checkpoint, f"{name}.{key}", value, shapes[name])
                for key, value in found.items()
                if value is not None
            }
    return contents


def _local_shapes(system: InferenceSystem) -> dict[str, tuple[int, ...]]:
    """Of this rank's part of everything sharded."""
    tables = {name: tuple(p.shape) for name, p, _ in system.recommender.sharded_parameters()}
    return tables | {ADAPTER + name: tuple(value.shape) for name, value in system.engine.weights().items()}


def _shaped(checkpoint: Checkpoint, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise DamagedCheckpointError(f"{checkpoint.path}: {name}", tuple(value.shape), f"should be {shape}", _OTHER)
    return value


def _require_all(system: System, checkpoint: Checkpoint, contents: Contents) -> None:
    """A run goes on with everything that it has, or with nothing of it."""
    whole = {name: tuple(p.shape) for name, p in system.recommender.replicated_parameters()}
    scalars = {f"{name}.step": () for name in system.embedding_optimizer.names}
    moments = {f"{name}.{key}": shape for name, shape in whole.items() for key in MOMENTS}
    for name, shape in (whole | moments | scalars).items():
        if name not in contents.replicated:
            raise DamagedCheckpointError(f"{checkpoint.path}: {name}", "missing", "should be there", _OTHER)
        _shaped(checkpoint, name, contents.replicated[name], shape)
    for name in _sharded(system):
        if name not in contents.weights or len(contents.moments[name]) < len(MOMENTS):
            raise DamagedCheckpointError(f"{checkpoint.path}: {name}", "missing", "should be there", _OTHER)


def restore_weights(system: InferenceSystem, contents: Contents) -> None:
    """Put weights in place. Rows that the checkpoint does not have (a run without texts) stay, with a warning."""
    missing = sorted(_sharded(system).keys() - contents.weights.keys())
    if missing:
        logger.warning("the checkpoint holds no %s; they stay as they are", ", ".join(missing))
    parameters = {name: p for name, p, _ in system.recommender.sharded_parameters()}
    parameters |= dict(system.recommender.replicated_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = (contents.weights | contents.replicated).get(name)
            if value is not None:
                parameter.copy_(value)
    system.engine.set_weights(_of_engine(contents.weights))


def _restore_moments(system: System, contents: Contents, steps_taken: float) -> None:
    device, whole = system.world.device, contents.replicated
    states = {}
    for name in system.embedding_optimizer.names:
        found = contents.moments.get(name) or {
            key: whole[f"{name}.{key}"] for key in MOMENTS if f"{name}.{key}" in whole
        }
        if found:
            states[name] = {key: v.to(device) for key, v in found.items()} | {"step": whole[f"{name}.step"]}
    system.embedding_optimizer.load_state(states)
    system.engine.set_moments(_of_engine(contents.moments), steps_taken)


def _of_engine(tensors: dict[str, T]) -> dict[str, T]:
    return {name.removeprefix(ADAPTER): value for name, value in tensors.items() if name.startswith(ADAPTER)}


def resume(
    system: System, store: Store, names: Sequence[str], check: Callable[[Checkpoint], None]
) -> Checkpoint | None:
    """Restore everything that a `Saver` kept, at any number of ranks, from the first of `names` that is good.

    Collective. The run then goes on as if it had not stopped: bit for bit at the same number of ranks.

    Args:
        check: refuses a checkpoint that is not of this run, by a CheckpointError.

    Returns the checkpoint; None where no name is left.
    """

    def read_all(checkpoint: Checkpoint) -> Contents:
        if checkpoint.name.startswith(BEST):
            raise CheckpointError(
                "resume", checkpoint.path, "holds weights only", "Use it as init_from, or resume from a step-* one."
            )
        require_same(checkpoint, system.fingerprints)
        check(checkpoint)
        checkpoint.trained_on()  # damage is found before anything is restored
        contents = read(system, checkpoint, moments=True)
        _require_all(system, checkpoint, contents)
        return contents

    found = load_first_valid(store, names, system.world, read_all, quarantine=True)
    if found is None:
        return None
    checkpoint, contents = found
    restore_weights(system, contents)
    _restore_moments(system, contents, checkpoint.about.steps_taken)
    if system.world.is_main:
        logger.info(
            "resumed %s (written by %d ranks) at step %d",
            checkpoint.path,
            checkpoint.about.world_size,
            checkpoint.about.run.step,
        )
    return checkpoint
