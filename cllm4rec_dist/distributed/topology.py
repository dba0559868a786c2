"""Who is in the run, and which rank holds which rows.

`World` is the run as one rank sees it and is passed as an argument: there is no global process group in the package
beyond torch's default one, which the launcher or `engine.start_world` made. `RowPartition` is the one rule for row
ranges; tables, heads, ranking and checkpoints all ask it.
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
        local_rank: index of this rank on its host; picks the GPU.
        device: where this rank computes.
        watch: told where this rank is (`with world.watch.collective(...)`); tells it where another one hangs.
        has_terminal: whether progress is watched on a terminal, which under Ray is that of the driver.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    has_terminal: bool = False

    @property
    def is_main(self) -> bool:
        """True on the one rank that talks to people and writes shared files."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's contiguous, near-equal part of positions [start, stop); may be empty."""
        total = stop - start
        return start + total * self.rank // self.size, start + total * (self.rank + 1) // self.size


def lone_world() -> World:
    """A run of this process alone, without a process group, on a GPU where there is one."""
    return World(0, 1, 0, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def find_device(name: str | None) -> torch.device:
    """The CPU or GPU of this host with a name of torch's; None is a GPU where there is one, else the CPU.

    Raises:
        ConfigError: for a name that torch does not know, and a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    try:
        found = torch.device(str(name))
    except RuntimeError:
        found = None
    if found is None or f"{found.type}:{found.index or 0}" not in ("cpu:0", *gpus):
        there = ", ".join(["cpu", *gpus])
        raise ConfigError(
            "device", name, f"is no device of this host, which has {there}", "Name one of them, or leave it out."
        )
    return found


def adopt_slurm_environment(environ: dict[str, str] | os._Environ[str]) -> None:
    """Give torch's names to what `srun` says, where only Slurm's names are set.

    `srun python ...` and `deepspeed --launcher slurm` set SLURM_PROCID and its kin but neither RANK nor LOCAL_RANK;
    every other launcher sets RANK itself, and then nothing is touched.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ or "MASTER_ADDR" not in environ:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ.get("SLURM_NTASKS", "1")
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")


@dataclass(frozen=True)
class RowPartition:
    """`num_rows` rows in blocks of ceil(num_rows / world_size) over the ranks.

    Trailing ranks hold fewer rows or none. Owners are `row // block`, so sorted ids are grouped by owner.
    """

    num_rows: int
    world_size: int

    @property
    def block(self) -> int:
        """Rows in a full block (1 for an empty table, so that division by it is defined)."""
        return max(1, -(-self.num_rows // self.world_size))

    def range(self, rank: int) -> tuple[int, int]:
        """Global rows [start, stop) of `rank`."""
        return min(rank * self.block, self.num_rows), min((rank + 1) * self.block, self.num_rows)

    def num_local(self, rank: int) -> int:
        """How many rows `rank` holds."""
        start, stop = self.range(rank)
        return stop - start
