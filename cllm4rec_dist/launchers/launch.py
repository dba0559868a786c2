"""Choosing a launcher and running a function on all ranks.

`launch` runs `function(world, report, **arguments)`:

    torchrun, deepspeed, srun   this process is one rank already: join the others
    ray                         start (or join) Ray and run `--workers` Train workers
    process                     one rank in this process; variables of other launchers are ignored

`auto` joins if a launcher has set the variables of a rank, and starts Ray otherwise.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from cllm4rec_dist.distributed.diagnosis import HANG_SECONDS
from cllm4rec_dist.distributed.rendezvous import forget_launcher, read_ranks, require_host
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.launchers.ray_launcher import ray_address, require_ray_address, run_on_ray
from cllm4rec_dist.launchers.run_rank import RankFunction, run_rank
from cllm4rec_dist.suggestions import did_you_mean

LAUNCHERS = ("auto", "ray", "process")


def parse_workers(text: str) -> int | tuple[int, int]:
    """Parse `8` -> 8 and `4:8` -> (4, 8), an elastic number of workers.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise ConfigError("--workers", text, "is neither a number nor FEWEST:MOST", "Write for example 8 or 4:8.")
    return fewest if fewest == most else (fewest, most)


def joins(launcher: str, environ: Mapping[str, str]) -> bool:
    """Return True if `launcher` is auto and torchrun, deepspeed or srun has made this process a rank."""
    return launcher == "auto" and ("RANK" in environ or {"SLURM_PROCID", "MASTER_ADDR"} <= set(environ))


def is_main(launcher: str, environ: Mapping[str, str]) -> bool:
    """Return True if this process reports to the user: rank 0 if it joins other ranks, otherwise always."""
    return not joins(launcher, environ) or environ.get("RANK", environ.get("SLURM_PROCID")) == "0"


def ranks_are_elsewhere(launcher: str, environ: Mapping[str, str]) -> bool:
    """Return True if the ranks run on a Ray cluster, whose hosts may have other file systems than this one."""
    return _uses_ray(launcher, environ) and ray_address(environ) != "local"


def _uses_ray(launcher: str, environ: Mapping[str, str]) -> bool:
    return launcher != "process" and not joins(launcher, environ)


def require_launchable(launcher: str, workers: str, environ: Mapping[str, str]) -> int | tuple[int, int]:
    """Refuse options and variables with which no rank could start. Returns the parsed `workers`.

    Raises:
        ConfigError: names the option or variable.
    """
    if launcher not in LAUNCHERS:
        cure = f"Leave it out for auto.{did_you_mean(launcher, LAUNCHERS)}"
        raise ConfigError("--launcher", launcher, f"is not one of {', '.join(LAUNCHERS)}", cure)
    size, tasks = environ.get("WORLD_SIZE", "1"), environ.get("SLURM_STEP_NUM_TASKS", "1")
    if launcher == "process" and "TORCHELASTIC_RUN_ID" in environ and size != "1":
        raise ConfigError(
            "--launcher", launcher, f"under torchrun: each of {size} ranks would train alone", "Leave it out for auto."
        )
    if launcher == "auto" and not joins(launcher, environ) and tasks != "1":
        raise ConfigError(
            "MASTER_ADDR",
            None,
            f"is not set: each of {tasks} tasks would train alone",
            "Export MASTER_ADDR and MASTER_PORT before srun, as launch/slurm/srun.sbatch does. In a shell that srun"
            " started, choose --launcher ray or process.",
        )
    if joins(launcher, environ):
        read_ranks(environ)
        if "MASTER_ADDR" in environ:
            require_host(environ["MASTER_ADDR"])
    if _uses_ray(launcher, environ):
        require_ray_address(ray_address(environ))
    return parse_workers(workers)


def launch(
    function: RankFunction,
    launcher: str,
    workers: str,
    *,
    collective_timeout_seconds: float = HANG_SECONDS,
    max_failures: int = 0,
    **arguments: Any,
) -> object:
    """Run `function` on all ranks and wait for it. Returns its result on this rank; None under Ray.

    Args:
        launcher: auto, ray or process.
        workers: ranks that Ray starts, in the syntax of `parse_workers`.
        collective_timeout_seconds: longest wait for a rank in a collective; then the run ends and names that rank.
        max_failures: how often Ray restarts all ranks after one was lost.
        arguments: picklable keyword arguments of `function`.

    Raises:
        CLLM4RecError: error of a rank, also of a Ray worker.
    """
    num_workers = require_launchable(launcher, workers, os.environ)
    joined = joins(launcher, os.environ)
    if not joined and launcher != "process":
        run_on_ray(function, num_workers, collective_timeout_seconds, max_failures, arguments)
        return None
    notes = []
    if num_workers != 1:
        reason = "the variables of another launcher are set, whose ranks are joined" if joined else "one rank runs here"
        notes.append((logging.WARNING, f"--workers {workers} is for Ray and is not used: {reason}"))
    if launcher == "process" and (ignored := forget_launcher(os.environ)):
        notes.append((logging.INFO, f"one rank: {', '.join(ignored)} in the environment are ignored"))
    return run_rank(
        function,
        lambda metrics: None,
        collective_timeout_seconds,
        arguments,
        has_terminal=sys.stderr.isatty(),
        notes=notes,
    )
