"""One rank: join the others, set up logging, and run a function under the watchdog."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cllm4rec_dist.launchers.imports import importing_libraries
from cllm4rec_dist.log import hide_accelerator_notice, setup_logging

logger = logging.getLogger(__name__)

RankFunction = Callable[..., object]
"""`function(world, report, **arguments)`; importable, because Ray pickles it by name."""


def run_rank(
    function: RankFunction,
    report: Callable[[dict[str, float]], None],
    collective_timeout_seconds: float,
    arguments: Mapping[str, Any],
    *,
    has_terminal: bool,
    notes: Sequence[tuple[int, str]] = (),
) -> object:
    """Run `function` as the rank that the environment defines. Returns its result. Collective.

    Args:
        notes: levels and texts that rank 0 logs first.
    """
    hide_accelerator_notice()
    if "torch" not in sys.modules:
        logger.info("importing torch and DeepSpeed")
    with importing_libraries():  # after the launcher's choice: a Ray driver needs neither torch nor DeepSpeed
        import torch.distributed as dist

        from cllm4rec_dist.distributed.engine import start_world

    owns_group = not dist.is_initialized()
    world = replace(start_world(collective_timeout_seconds), has_terminal=has_terminal)
    setup_logging(world)
    for level, note in notes if world.is_main else ():
        logger.log(level, note)
    try:
        with world.watch:
            return function(world, report, **arguments)
    finally:
        if owns_group:
            dist.destroy_process_group()
