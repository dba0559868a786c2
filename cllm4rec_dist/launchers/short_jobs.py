"""Jobs that take one process less time than starting Ray or DeepSpeed: evaluation and recommendations of small runs.

`auto` means this process if one worker is requested and there are no ranks to join; otherwise it means the same as for
`launchers.launch`. A single rank needs no process group and does not import DeepSpeed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cllm4rec_dist.launchers.launch import (
    RankFunction,
    joins,
    launch,
    parse_workers,
    ranks_are_elsewhere,
    require_launchable,
)

LAUNCHER_HELP = (
    "auto: join torchrun, deepspeed or srun; else this process for one worker, and Ray for more or if RAY_ADDRESS"
    " names a cluster. Or ray, or process."
)


def runs_here(launcher: str, workers: str, environ: Mapping[str, str]) -> bool:
    """Return True if a short job runs in this process alone."""
    if launcher == "auto" and not joins(launcher, environ):
        return parse_workers(workers) == 1 and not ranks_are_elsewhere(launcher, environ)
    return launcher == "process"


def launch_short(function: RankFunction, launcher: str, workers: str, **arguments: Any) -> None:
    """Run `function(world, report, **arguments)` in this process if `runs_here`, otherwise as `launchers.launch` does.

    Raises:
        CLLM4RecError: error of a rank.
    """
    require_launchable(launcher, workers, os.environ)
    if not runs_here(launcher, workers, os.environ):
        launch(function, launcher, workers, **arguments)
        return
    from cllm4rec_dist.distributed.topology import lone_world
    from cllm4rec_dist.log import setup_logging

    world = replace(lone_world(), has_terminal=sys.stderr.isatty())
    setup_logging(world)
    function(world, lambda metrics: None, **arguments)
