"""The same function under every launcher.

`launch` runs `function(world, report, **arguments)` on all ranks:

    torchrun, deepspeed, srun   this process is one rank already: join the others
    ray                         start (or join) Ray and run as many Train workers as asked for
    process                     one rank, here

`auto` joins where a launcher has set the ranks, and starts Ray otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cllm4rec_dist import errors
from cllm4rec_dist.diagnosis import HANG_SECONDS
from cllm4rec_dist.errors import CLLM4RecError, ConfigError

logger = logging.getLogger(__name__)

LAUNCHERS = ("auto", "ray", "process")


RankFunction = Callable[..., object]
"""`function(world, report, **arguments)`; importable, because Ray carries it to its workers by name."""


def parse_workers(text: str) -> int | tuple[int, int]:
    """`8` -> 8; `4:8` -> (4, 8), as many as there are between the two.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise ConfigError("--workers", text, "is neither a number nor FEWEST:MOST", "Write for example 8 or 4:8.")
    return fewest if fewest == most else (fewest, most)


def launch(
    function: RankFunction, launcher: str, workers: str, storage: Path, *,
    hang_seconds: float = HANG_SECONDS, max_failures: int = 0, **arguments: Any,
) -> object:  # fmt: skip
    """Run `function` on all ranks and wait for its end. Returns what it returned on this rank; None under Ray.

    Args:
        launcher: auto, ray or process.
        workers: ranks that Ray starts, as `parse_workers` reads it.
        storage: folder for Ray's own records of the run.
        hang_seconds: the longest that ranks may wait for one; its name then ends the run.
        max_failures: how often Ray starts all ranks again after one was lost.
        arguments: picklable keyword arguments of `function`.

    Raises:
        CLLM4RecError: what a rank raised, also from a Ray worker.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError("--launcher", launcher, f"is not one of {LAUNCHERS}", "Leave it out for auto.")
    num_workers = parse_workers(workers)
    joined = "RANK" in os.environ or {"SLURM_PROCID", "MASTER_ADDR"} <= set(os.environ)
    if launcher != "ray" and not joined and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError(
            "MASTER_ADDR", None, f"is not set: each of {os.environ['SLURM_STEP_NUM_TASKS']} tasks would train alone",
            "Export MASTER_ADDR and MASTER_PORT before srun, as launch/slurm/srun.sbatch does.",
        )  # fmt: skip
    if launcher == "process" or (launcher == "auto" and joined):
        return _run_here(function, lambda metrics: None, hang_seconds, arguments)
    _run_on_ray(function, num_workers, storage, hang_seconds, max_failures, arguments)
    return None


def _run_here(
    function: RankFunction, report: Callable[[dict[str, float]], None], hang_seconds: float, arguments: dict[str, Any]
) -> object:
    import torch.distributed as dist  # after the launcher's choice: a Ray driver needs neither torch nor DeepSpeed

    from cllm4rec_dist.engine import start_world
    from cllm4rec_dist.log import setup_logging

    ours = not dist.is_initialized()
    world = start_world(hang_seconds)
    setup_logging(world)
    try:
        with world.watch:
            return function(world, report, **arguments)
    finally:
        if ours:
            dist.destroy_process_group()


def _run_on_ray(
    function: RankFunction, workers: int | tuple[int, int], storage: Path, hang_seconds: float, max_failures: int,
    arguments: dict[str, Any],
) -> None:  # fmt: skip
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_DEDUP_LOGS": "0",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    if not ray.is_initialized():
        # A job and RAY_ADDRESS=auto name the cluster to join; else never one that somebody left behind on this host.
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.WARNING)
    gpu = bool(ray.cluster_resources().get("GPU"))
    logger.info("Ray Train with %s workers on %s", workers, "GPUs" if gpu else "CPUs")
    # A name of its own: Ray would take up its records of an earlier launch, whose failures are not this one's.
    name = f"{function.__name__}-{time.time_ns()}"
    refusal = storage / f"{name}-refused.json"
    settings = {
        "function": function, "hang_seconds": hang_seconds, "arguments": arguments, "refusal": str(refusal),
    }  # fmt: skip
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # typed as an older class
            use_gpu=gpu,
            resources_per_worker={} if gpu else {"CPU": 1},
        ),
        # What fails is raised below; Ray's own account of it, and of its tidying up, is only noise beside it.
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as an older class
            name=name, storage_path=str(storage), logging_config=LoggingConfig(log_level="CRITICAL"),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _original(error) from error
    if refusal.exists():
        raise _read_refusal(refusal)


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train

    def report(metrics: dict[str, float]) -> None:
        ray.train.report(metrics)

    refusal = Path(settings["refusal"])
    if refusal.exists():
        return  # Ray tries again, but what was wrong with the input still is
    try:
        _run_here(settings["function"], report, settings["hang_seconds"], settings["arguments"])
    except CLLM4RecError as error:
        if error.exit_status != CLLM4RecError.exit_status:
            raise
        _write_refusal(error, refusal)


def _write_refusal(error: CLLM4RecError, path: Path) -> None:
    """Tell the driver what is wrong with the input: what is raised would be retried and shown amid Ray's traces."""
    content = [type(error).__name__, error.field, error.value, error.constraint, error.cure]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, default=str), encoding="utf-8")
    part.replace(path)


def _read_refusal(path: Path) -> CLLM4RecError:
    kind, field, value, constraint, cure = json.loads(path.read_text(encoding="utf-8"))
    found = getattr(errors, kind, None)
    if not (isinstance(found, type) and issubclass(found, CLLM4RecError)):
        found = CLLM4RecError
    return found(field, value, constraint, cure)


def _original(error: BaseException) -> BaseException:
    """Our own error inside what Ray made of it, or Ray's."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, CLLM4RecError):
            return found
        for failure in getattr(found, "worker_failures", {}).values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, CLLM4RecError):
                return cause
        found = found.__cause__
    return error
