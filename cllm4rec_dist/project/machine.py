"""Cores, memory and GPUs of this machine, detected without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 5.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Cores, memory and GPUs.

    Attributes:
        cores: cores available to this process.
        memory: bytes of memory available to it.
        gpu_memory: bytes of each GPU; empty without GPUs.
    """

    cores: int
    memory: int
    gpu_memory: tuple[int, ...] = ()

    def __str__(self) -> str:
        gpus = (
            f", {len(self.gpu_memory)} x GPU of {min(self.gpu_memory) / _GIB:.0f} GiB"
            if self.gpu_memory
            else ", no GPU"
        )
        return f"{self.cores} {'core' if self.cores == 1 else 'cores'}, {self.memory / _GIB:.1f} GiB{gpus}"


def this_machine() -> Machine:
    """Return the resources available to this process, within the limits of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(cores, min(memory, _container_limit() or memory), _gpus())


def _container_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _gpus() -> tuple[int, ...]:
    """Return the bytes of each NVIDIA GPU, as reported by nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        completed = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) << 20 for line in completed.stdout.split() if line.isdigit())
