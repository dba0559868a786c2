"""Ranks, and the assignment of rows to ranks.

`World` is passed as an argument; the only global state is torch's default process group, which the launcher or
`engine.start_world` made. `RowPartition` defines the row ranges of tables, heads, ranking and checkpoints.

Tables are sharded over all ranks, or over groups of G ranks that each hold a copy of them (`split_world`, torchrec's 2D
parallelism): with 8 ranks and G = 4, ranks 0-3 and 4-7 are the two groups, and 1 and 5 hold the same rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from cllm4rec_dist.distributed.watchdog import Watch
from cllm4rec_dist.errors import ConfigError

BACKEND_EXTRA_SECONDS = 60.0
"""How much later than the watchdog, which can name a rank at fault, torch ends a collective."""


@dataclass(frozen=True)
class World:
    """One rank's view of the run, or of a group of its ranks.

    Attributes:
        rank: 0..size-1.
        size: number of ranks.
        local_rank: index of this rank on its host; selects the GPU.
        device: device of this rank.
        watch: records the current operation of this rank (`with world.watch.collective(...)`), and ends the run if a
            rank fails or hangs.
        has_terminal: True if progress is shown on a terminal (under Ray, the driver's).
        group: process group of these ranks; torch's default one if None.
        replica: index of this group among those that hold copies of the same tables.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    has_terminal: bool = False
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    replica: int = 0

    @property
    def is_main(self) -> bool:
        """True on rank 0 (of the first replica), which logs and writes shared files."""
        return self.rank == 0 and self.replica == 0

    def local_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return this rank's contiguous part of [start, stop); parts differ in length by at most one, may be empty."""
        total = stop - start
        return start + total * self.rank // self.size, start + total * (self.rank + 1) // self.size


def lone_world() -> World:
    """World of this process alone, without a process group, on a GPU if there is one."""
    return World(0, 1, 0, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def shard_group_size(requested: int | None, num_ranks: int) -> int:
    """Return the number of ranks that together hold a copy of the tables: all of them if None is requested.

    Raises:
        ConfigError: if the ranks cannot be divided into such groups.
    """
    if requested is None:
        return num_ranks
    if num_ranks % requested:
        raise ConfigError(
            "embeddings.shard_group",
            requested,
            f"does not divide the {num_ranks} ranks",
            "Use a divisor of their number, such as the GPUs of a host, or leave it out.",
        )
    return requested


def split_world(world: World, num_shards: int | None, timeout_seconds: float) -> tuple[World, World]:
    """Return this rank's group of `num_shards` consecutive ranks, and the ranks with the same place in each group.

    The first shares a copy of the tables, the second holds equal rows. Collective: makes process groups.

    Args:
        num_shards: ranks that together hold a copy of the tables; all of them if None.
        timeout_seconds: the longest time that a collective may take.

    Raises:
        ConfigError: if the ranks cannot be divided into such groups.
    """
    num_shards = shard_group_size(num_shards, world.size)
    if num_shards == world.size:
        return world, replace(world, rank=0, size=1)
    replica, rank = divmod(world.rank, num_shards)
    every_rank = range(world.size)
    timeout = timeout_seconds + BACKEND_EXTRA_SECONDS
    shards = _own_group([every_rank[i : i + num_shards] for i in every_rank[::num_shards]], world, timeout)
    replicas = _own_group([every_rank[i::num_shards] for i in range(num_shards)], world, timeout)
    return (
        replace(world, rank=rank, size=num_shards, group=shards, replica=replica),
        replace(world, rank=replica, size=world.size // num_shards, group=replicas),
    )


def _own_group(groups: list[range], world: World, timeout_seconds: float) -> dist.ProcessGroup | None:
    """Make process groups, all ranks in the same order, and return the one with this rank; None for a rank alone."""
    own = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group([*ranks], timeout=timedelta(seconds=timeout_seconds))
            own = group if world.rank in ranks else own
    return own


def find_device(name: str | None) -> torch.device:
    """Return the device with a torch device name; None selects a GPU if there is one, else the CPU.

    Raises:
        ConfigError: for an invalid name, or a device that this host does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    try:
        device = torch.device(str(name))
    except RuntimeError:
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in ("cpu:0", *gpus):
        available = ", ".join(["cpu", *gpus])
        raise ConfigError(
            "device", name, f"is no device of this host, which has {available}", "Name one of them, or leave it out."
        )
    return device


def adopt_slurm_environment(environ: dict[str, str] | os._Environ[str]) -> None:
    """Set torch's rank variables from Slurm's, if only Slurm's are set.

    `srun python ...` and `deepspeed --launcher slurm` set SLURM_PROCID and others but neither RANK nor LOCAL_RANK. All
    other launchers set RANK; then nothing is changed.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ or "MASTER_ADDR" not in environ:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ.get("SLURM_NTASKS", "1")
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")


@dataclass(frozen=True)
class RowPartition:
    """Partition of `num_rows` rows into blocks of ceil(num_rows / world_size), one per rank.

    The last ranks may have fewer rows or none. The owner of a row is `row // block`: sorted ids are grouped by owner.
    """

    num_rows: int
    world_size: int

    @property
    def block(self) -> int:
        """Rows in a full block; 1 for an empty table, because owners are computed by division."""
        return max(1, -(-self.num_rows // self.world_size))

    def range(self, rank: int) -> tuple[int, int]:
        """Global rows [start, stop) of `rank`."""
        return min(rank * self.block, self.num_rows), min((rank + 1) * self.block, self.num_rows)

    def num_local(self, rank: int) -> int:
        """Number of rows of `rank`."""
        start, stop = self.range(rank)
        return stop - start
