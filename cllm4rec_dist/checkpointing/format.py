"""Files of a checkpoint, their metadata, and reading them at any number of ranks.

    checkpoints/step-00000500/
        shard-00000-of-00002.safetensors   one rank's rows of every table, its slice of every adapter weight,
                                           and Adam's moments of both; its rows of the linear memory
        replicated.safetensors             tensors that every rank holds whole, and Adam's step counts
        users.parquet, items.parquet       external ids of the rows, by which a later corpus matches them
        trained-on.safetensors             a sample of the interactions that were trained on (`lineage.py`)
        state.json                         position, best result, fingerprints, configuration (`CheckpointMetadata`)
        COMMIT.json                        size and sha256 of every file; written last (`store.py`)

Rows and slices are partitioned by one rule, `RowPartition`, which is also how ZeRO-3 cuts a flattened parameter. So
each rank of a run of any size reads its range from the files that hold it: nothing is converted, gathered or unpickled
(DeepSpeed's checkpoint files and torch.distributed.checkpoint's index are pickles). The position in the data is the
number of completed steps, from which all randomness follows.

`best-00000500` is the same without moments: enough to evaluate, to recommend and to start another run, not to resume.
A checkpoint with a base holds changed rows only (`increments.py`); `Checkpoint` reads both as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cllm4rec_dist.checkpointing.increments import STATE_FILE, Base
from cllm4rec_dist.checkpointing.lineage import Lineage, SeenInteractions, TrainedOn
from cllm4rec_dist.checkpointing.store import SCHEMA_VERSION, USE_ANOTHER, FileEntry, Marker, Store, parse
from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.distributed.adam import MOMENTS
from cllm4rec_dist.distributed.topology import RowPartition
from cllm4rec_dist.errors import DamagedCheckpointError
from cllm4rec_dist.model.linear_fit import LinearSettings

REPLICATED_FILE = "replicated.safetensors"
SEEN_FILE = "trained-on.safetensors"
ID_FILES = {"users": "users.parquet", "items": "items.parquet"}
"""External ids, which are read from the base of a checkpoint that has one."""
ADAPTER = "adapter."
"""Prefix of the names of the parameters that the engine trains."""
LINEAR_NEIGHBORS, LINEAR_WEIGHTS = "linear.neighbors", "linear.weights"
"""Rows of the linear memory: int32 and fp32 [I, K]."""


@dataclass(frozen=True)
class RunState:
    """Progress of a run.

    Attributes:
        step: completed optimizer steps, skipped ones included; it fixes the position in the data.
        best, best_metric, best_step: best validation result so far, its metric and its step.
        validations_since_best: for early stopping; without those during the warm-up.
        mean_loss: running mean, against which loss spikes are detected.
        skipped_in_a_row: steps skipped since the last accepted one.
        validated_step: step of the last validation.
        linear_weight: weight of the linear memory that the last validation chose; None without one.
        new_item_offset: offset of new items' biases, chosen for the best validation; None if none was chosen.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    mean_loss: float | None = None
    skipped_in_a_row: int = 0
    best_metric: str | None = None
    validated_step: int | None = None
    linear_weight: float | None = None
    new_item_offset: float | None = None


class CheckpointMetadata(StrictModel):
    """Contents of `state.json`."""

    schema_version: int = SCHEMA_VERSION
    run: RunState
    world_size: int = Field(ge=1)
    """Number of ranks that wrote the checkpoint."""
    num_users: int = Field(ge=1)
    num_items: int = Field(ge=1)
    steps_taken: float = Field(ge=0)
    """Adam's step count of the adapters."""
    shapes: dict[str, tuple[int, ...]]
    """Whole shapes of the adapter parameters, which are stored flat."""
    fingerprints: dict[str, str]
    """Fingerprints of backbone, corpus and tokenizer."""
    config: dict[str, Any]
    """Resolved configuration of the run."""
    lineage: Lineage | None = None
    """Corpora that the model was trained on; None if an earlier version wrote the checkpoint."""
    linear: LinearSettings | None = None
    """What the linear memory was fitted with; None without one, or if an earlier version wrote the checkpoint."""
    shard_group: int | None = None
    """Number of files, the first ones, that hold the tables; all of them if None."""
    has_shared_user: bool = False
    """True if the user tables have a shared row after those of the users."""
    embedding_width: int | None = Field(default=None, ge=1)
    """Width of the rows of users and items; None if an earlier version wrote the checkpoint."""
    base: Base | None = None
    """The checkpoint that this one holds the changed rows of; None if it is whole."""

    @property
    def num_user_rows(self) -> int:
        """Rows of the user tables."""
        return self.num_users + self.has_shared_user

    def partition(self, name: str, num_rows: int) -> RowPartition:
        """Return the partition over files of a sharded tensor: rows of a table, or elements of an adapter weight."""
        if self.shard_group is None or name.startswith(ADAPTER):
            return RowPartition(num_rows, self.world_size)
        return RowPartition(num_rows, self.shard_group)


@dataclass(frozen=True)
class Checkpoint:
    """An opened, committed checkpoint, together with its base if it has one."""

    store: Store
    name: str
    marker: Marker
    metadata: CheckpointMetadata
    base: Self | None = None

    @classmethod
    def open(cls, store: Store, name: str, expected: FileEntry | None = None) -> Self:
        """Read marker and metadata, also those of the base.

        Args:
            expected: size and digest of the marker, if they are known.

        Raises:
            DamagedCheckpointError: if any of them is damaged; another checkpoint may be valid.
        """
        marker = store.marker(name, expected)
        content = _fetch(store, name, marker, STATE_FILE).read_bytes()
        metadata = parse(CheckpointMetadata, content, f"{store.path(name)}/{STATE_FILE}")
        if not name.endswith(f"-{metadata.run.step:08d}"):
            raise DamagedCheckpointError(
                f"{store.path(name)}/{STATE_FILE}: step", metadata.run.step, f"is not that of {name}", USE_ANOTHER
            )
        if metadata.base is None:
            return cls(store, name, marker, metadata)
        with _needing(store.path(name), metadata.base.name):
            base = cls.open(store, metadata.base.name, metadata.base.marker)
        return cls(store, name, marker, metadata, base)

    @property
    def path(self) -> str:
        """URL for messages."""
        return self.store.path(self.name)

    def file(self, name: str) -> Path:
        """Return the path of a verified local copy of a file."""
        if self.base is not None and name in ID_FILES.values():
            with _needing(self.path, self.base.name):
                return self.base.file(name)
        return _fetch(self.store, self.name, self.marker, name)

    def replicated(self) -> dict[str, Tensor]:
        """Read all tensors that are stored whole, by name."""
        with _reading(self, REPLICATED_FILE) as path:
            return load_file(path)

    def trained_on(self) -> TrainedOn | None:
        """Read what the model was trained on; None if an earlier version wrote the checkpoint."""
        if self.metadata.lineage is None:
            return None
        try:
            return TrainedOn(self.metadata.lineage, SeenInteractions.load(self.file(SEEN_FILE)))
        except ValueError as error:
            raise DamagedCheckpointError(f"{self.path}/{SEEN_FILE}", "content", str(error), USE_ANOTHER) from error

    def rows(
        self,
        name: str,
        num_rows: int,
        start: int,
        stop: int,
        dtype: Literal["F32", "I32"] = "F32",
        *,
        maps: bool = False,
    ) -> Tensor | None:
        """Read rows [start, stop) of a sharded tensor of `num_rows` rows from the files that hold them.

        Args:
            dtype: what it must have, as safetensors names it.
            maps: map rows of a single file into memory, to be read where they are used. Changing them changes no file;
                the file must not change, but may be removed.

        Returns None if no such tensor was saved. Every file is verified before it is read.
        """
        partition = self.metadata.partition(name, num_rows)
        parts: list[Tensor] = []
        for rank in range(partition.world_size):
            first, last = partition.range(rank)
            low, high = max(start, first), min(stop, last)
            if low >= high and (parts or rank + 1 < partition.world_size):
                continue  # no row here; for an empty range the last file gives the width
            wanted = range(max(low - first, 0), max(high - first, 0))
            found = self._rows_of_file(shard_file(rank, self.metadata.world_size), name, last - first, wanted, dtype)
            if found is None:
                return None
            part, changed = found
            if changed is not None:
                part = self._over_base(name, num_rows, range(first + wanted.start, first + wanted.stop), part, changed)
            parts.append(part)
        widths = {tuple(part.shape[1:]) for part in parts}
        if len(widths) > 1:
            raise DamagedCheckpointError(f"{self.path}: {name}", widths, "should be one shape of rows", USE_ANOTHER)
        return parts[0] if maps and len(parts) == 1 else torch.cat(parts)

    def _rows_of_file(
        self, file: str, name: str, num_rows: int, wanted: range, dtype: str
    ) -> tuple[Tensor, Tensor | None] | None:
        """Read what a file of `num_rows` rows holds of the rows `wanted`, counted from its first one.

        Returns the rows, and for changed ones their indices from the start of `wanted`; None without such a tensor.
        """
        origin, changed = f"{self.path}/{file}: {name}", None
        with _reading(self, file) as path, safe_open(path, framework="pt") as tensors:
            names, index_name = tensors.keys(), changed_rows_name(name)
            if name not in names:
                return None
            span = slice(wanted.start, wanted.stop)
            if self.base is not None and index_name in names:
                index = tensors.get_tensor(index_name)
                _require_index(f"{self.path}/{file}: {index_name}", index, num_rows)
                bounds = torch.tensor([wanted.start, wanted.stop], dtype=index.dtype)
                num_rows, span = len(index), slice(*torch.searchsorted(index, bounds).tolist())
                changed = index[span].long() - wanted.start
            block = tensors.get_slice(name)
            saved_dtype, num_saved = block.get_dtype(), block.get_shape()[:1]
            if (saved_dtype, num_saved) != (dtype, [num_rows]):
                raise DamagedCheckpointError(
                    origin, (saved_dtype, num_saved), f"should be {num_rows} rows of {dtype}", USE_ANOTHER
                )
            return block[span], changed

    def _over_base(self, name: str, num_rows: int, wanted: range, rows: Tensor, changed: Tensor) -> Tensor:
        """Read the rows `wanted` of the base and replace those at `changed` by `rows`."""
        assert self.base is not None
        dtype: Literal["F32", "I32"] = "F32" if rows.is_floating_point() else "I32"
        with _needing(self.path, self.base.name):
            result = self.base.rows(name, num_rows, wanted.start, wanted.stop, dtype)
            if result is None or result.shape[1:] != rows.shape[1:]:
                shape = None if result is None else tuple(result.shape[1:])
                raise DamagedCheckpointError(name, shape, f"should be {tuple(rows.shape[1:])}", USE_ANOTHER)
        result[changed] = rows
        return result

    def linear_memory(self, start: int, stop: int, *, maps: bool = False) -> tuple[Tensor, Tensor] | None:
        """Read neighbors, int32, and weights, fp32, of items [start, stop) of the linear memory; None without one.

        Args:
            maps: as for `rows`.
        """
        num_items = self.metadata.num_items
        neighbors = self.rows(LINEAR_NEIGHBORS, num_items, start, stop, "I32", maps=maps)
        weights = self.rows(LINEAR_WEIGHTS, num_items, start, stop, maps=maps)
        if neighbors is None and weights is None:
            return None
        if neighbors is None or weights is None or neighbors.shape != weights.shape:
            shapes = [None if part is None else tuple(part.shape) for part in (neighbors, weights)]
            raise DamagedCheckpointError(
                f"{self.path}: linear memory", shapes, "should be neighbors and weights of one shape", USE_ANOTHER
            )
        return neighbors, weights

    def take(self, name: str, num_rows: int, ids: Tensor) -> Tensor | None:
        """Read rows `ids` (int64, any order) of a sharded tensor of `num_rows` rows: [len(ids), ...].

        Returns None if no such tensor was saved. Memory: the span of `ids` in one file at a time.
        """
        partition = self.metadata.partition(name, num_rows)
        no_rows = self.rows(name, num_rows, 0, 0)
        if no_rows is None:
            return None
        result = no_rows.new_empty((len(ids), *no_rows.shape[1:]))
        for rank in range(partition.world_size):
            first, last = partition.range(rank)
            in_file = (ids >= first) & (ids < last)
            if in_file.any():
                low = int(ids[in_file].min())
                block = self.rows(name, num_rows, low, int(ids[in_file].max()) + 1)
                assert block is not None
                result[in_file] = block[ids[in_file] - low]
        return result

    def external_ids(self, kind: Literal["users", "items"]) -> pa.ChunkedArray:
        """Read the external ids of the rows, in their order."""
        size = self.metadata.num_users if kind == "users" else self.metadata.num_items
        path = self.file(ID_FILES[kind])
        try:
            ids = pq.read_table(path, columns=[kind.removesuffix("s")]).column(0).cast(pa.string())
        except (pa.ArrowException, OSError, IndexError) as error:
            raise DamagedCheckpointError(
                f"{self.path}/{kind}.parquet", str(error), "cannot be read", USE_ANOTHER
            ) from error
        if len(ids) != size or pc.count_distinct(ids).as_py() != size:
            raise DamagedCheckpointError(
                f"{self.path}/{kind}.parquet", len(ids), f"should be {size} different ids", USE_ANOTHER
            )
        return ids


def shard_file(rank: int, size: int) -> str:
    """Return the name of the shard that `rank` of `size` ranks writes."""
    return f"shard-{rank:05d}-of-{size:05d}.safetensors"


def changed_rows_name(name: str) -> str:
    """Return the name of the tensor with the indices of the changed rows of a tensor: int32 [k], ascending.

    A table and its moments share it. They are counted from the first row of the file.
    """
    table, _, last = name.rpartition(".")
    return f"{table if last in MOMENTS else name}.changed_rows"


def _require_index(origin: str, index: Tensor, num_rows: int) -> None:
    if index.dtype == torch.int32 and index.dim() == 1:
        within = len(index) == 0 or (int(index[0]) >= 0 and int(index[-1]) < num_rows)
        if within and bool((index[1:] > index[:-1]).all()):
            return
    what = f"{index.dtype} {list(index.shape)}"
    raise DamagedCheckpointError(origin, what, f"should be ascending rows below {num_rows} in int32", USE_ANOTHER)


@contextmanager
def _needing(path: str, base: str) -> Iterator[None]:
    """Turn damage to the base inside into damage to the checkpoint at `path`, which needs it."""
    try:
        yield
    except DamagedCheckpointError as error:
        cure = f"Copy {base} beside it from where they were written, or use another checkpoint."
        raise DamagedCheckpointError(f"{path}: base", base, f"is damaged or not beside it ({error})", cure) from error


@contextmanager
def _reading(checkpoint: Checkpoint, file: str) -> Iterator[Path]:
    """Yield the path of a verified file; turn a safetensors error inside into damage."""
    try:
        yield checkpoint.file(file)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{checkpoint.path}/{file}", str(error), "cannot be read", USE_ANOTHER) from error


def _fetch(store: Store, name: str, marker: Marker, file: str) -> Path:
    if file not in marker.files:
        raise DamagedCheckpointError(f"{store.path(name)}/{file}", "missing", "was never committed", USE_ANOTHER)
    return store.fetch(name, file, marker.files[file])
