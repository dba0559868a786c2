"""Ranks, and the assignment of rows to ranks.

`World` is passed as an argument; the only global state is torch's default process group, which the launcher or
`engine.start_world` made. `RowPartition` defines the row ranges of tables, heads, ranking and checkpoints.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from cllm4rec_dist.distributed.watchdog import Watch
from cllm4rec_dist.errors import ConfigError


@dataclass(frozen=True)
class World:
    """One rank's view of the run.

    Attributes:
        rank: 0..size-1.
        size: number of ranks.
        local_rank: index of this rank on its host; selects the GPU.
        device: device of this rank.
        watch: records the current operation of this rank (`with world.watch.collective(...)`), and ends the run if a
            rank fails or hangs.
        has_terminal: True if progress is shown on a terminal (under Ray, the driver's).
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    has_terminal: bool = False

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes shared files."""
        return self.rank == 0

    def local_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return this rank's contiguous part of [start, stop); parts differ in length by at most one, may be empty."""
        total = stop - start
        return start + total * self.rank // self.size, start + total * (self.rank + 1) // self.size


def lone_world() -> World:
    """World of this process alone, without a process group, on a GPU if there is one."""
    return World(0, 1, 0, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


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
