"""The same function under every launcher.

`launch` runs `function(world, report, **arguments)` on all ranks:

    torchrun, deepspeed, srun   this process is one rank already: join the others
    ray                         start (or join) Ray and run as many Train workers as asked for
    process                     one rank, here, whatever another launcher has left in the environment

`auto` joins where a launcher has set the ranks, and starts Ray otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from cllm4rec_dist import errors
from cllm4rec_dist.diagnosis import HANG_SECONDS
from cllm4rec_dist.errors import CLLM4RecError, ConfigError, FaultError
from cllm4rec_dist.rendezvous import forget_launcher, read_ranks, require_host

logger = logging.getLogger(__name__)

LAUNCHERS = ("auto", "ray", "process")
_CONNECT_SECONDS = 5.0
_REMINDER_SECONDS = 10.0
_RAY_ADDRESS_CURE = "Start that cluster, or unset RAY_ADDRESS to have one started on this host."

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


def joins(launcher: str, environ: Mapping[str, str]) -> bool:
    """True if this process is a rank already, as `auto` reads from the variables of torchrun, deepspeed or srun."""
    return launcher == "auto" and ("RANK" in environ or {"SLURM_PROCID", "MASTER_ADDR"} <= set(environ))


def is_main(launcher: str, environ: Mapping[str, str]) -> bool:
    """True if this process reports to the user: rank 0 where it joins other ranks, else always."""
    return not joins(launcher, environ) or environ.get("RANK", environ.get("SLURM_PROCID")) == "0"


def ranks_are_elsewhere(launcher: str, environ: Mapping[str, str]) -> bool:
    """True if the ranks are on a Ray cluster, whose hosts need not have the file systems of this one."""
    return _uses_ray(launcher, environ) and _ray_address(environ) != "local"


def _uses_ray(launcher: str, environ: Mapping[str, str]) -> bool:
    return launcher != "process" and not joins(launcher, environ)


def require_launchable(launcher: str, workers: str, environ: Mapping[str, str]) -> int | tuple[int, int]:
    """Refuse options and variables under which no rank could start; what `parse_workers` makes of `workers`.

    Raises:
        ConfigError: names the option or variable.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError("--launcher", launcher, f"is not one of {LAUNCHERS}", "Leave it out for auto.")
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
            "Export MASTER_ADDR and MASTER_PORT before srun, as launch/slurm/srun.sbatch does. In a shell that srun has"
            " left its variables to, choose --launcher ray or process.",
        )
    if joins(launcher, environ):
        read_ranks(environ)
        if "MASTER_ADDR" in environ:
            require_host(environ["MASTER_ADDR"])
    if _uses_ray(launcher, environ):
        _require_ray_address(_ray_address(environ))
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
    """Run `function` on all ranks and wait for its end. Returns what it returned on this rank; None under Ray.

    Args:
        launcher: auto, ray or process.
        workers: ranks that Ray starts, as `parse_workers` reads it.
        collective_timeout_seconds: the longest that ranks may wait for one; its name then ends the run.
        max_failures: how often Ray starts all ranks again after one was lost.
        arguments: picklable keyword arguments of `function`.

    Raises:
        CLLM4RecError: what a rank raised, also from a Ray worker.
    """
    num_workers = require_launchable(launcher, workers, os.environ)
    joined = joins(launcher, os.environ)
    if not joined and launcher != "process":
        _run_on_ray(function, num_workers, collective_timeout_seconds, max_failures, arguments)
        return None
    notes = []
    if num_workers != 1:
        reason = "the variables of another launcher are set, whose ranks are joined" if joined else "one rank runs here"
        notes.append((logging.WARNING, f"--workers {workers} is for Ray and is not used: {reason}"))
    if launcher == "process" and (ignored := forget_launcher(os.environ)):
        notes.append((logging.INFO, f"one rank: {', '.join(ignored)} in the environment are ignored"))
    return _run_here(function, lambda metrics: None, collective_timeout_seconds, arguments, sys.stderr.isatty(), notes)


def _run_here(
    function: RankFunction,
    report: Callable[[dict[str, float]], None],
    collective_timeout_seconds: float,
    arguments: dict[str, Any],
    has_terminal: bool,
    notes: Sequence[tuple[int, str]] = (),
) -> object:
    import torch.distributed as dist  # after the launcher's choice: a Ray driver needs neither torch nor DeepSpeed

    from cllm4rec_dist.engine import start_world
    from cllm4rec_dist.log import setup_logging

    ours = not dist.is_initialized()
    world = replace(start_world(collective_timeout_seconds), has_terminal=has_terminal)
    setup_logging(world)
    for level, note in notes if world.is_main else ():
        logger.log(level, note)
    try:
        with world.watch:
            return function(world, report, **arguments)
    finally:
        if ours:
            dist.destroy_process_group()


def _run_on_ray(
    function: RankFunction,
    workers: int | tuple[int, int],
    collective_timeout_seconds: float,
    max_failures: int,
    arguments: dict[str, Any],
) -> None:
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DEDUP_LOGS": "0",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    _start_ray()
    gpu = bool(ray.cluster_resources().get("GPU"))
    unit = "GPU" if gpu else "CPU"
    _require_room(workers, unit, ray.cluster_resources().get(unit, 0.0), ray.available_resources().get(unit, 0.0))
    refusals = _start_refusals()
    settings = _WorkerSettings(function, collective_timeout_seconds, arguments, sys.stderr.isatty(), refusals)
    # Ray's records of a run are of no use after it (checkpoints are ours), and are written by this host alone.
    with tempfile.TemporaryDirectory(prefix="cllm4rec-ray-", ignore_cleanup_errors=True) as records:
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"settings": settings},
            scaling_config=ScalingConfig(
                num_workers=workers,  # type: ignore[arg-type]  # typed as an older class
                use_gpu=gpu,
                resources_per_worker={} if gpu else {"CPU": 1},
            ),
            # What fails is raised below; Ray's own account of it, and of its tidying up, is only noise beside it.
            run_config=RunConfig(  # type: ignore[call-arg]  # typed as an older class
                name=function.__name__,
                storage_path=records,
                logging_config=LoggingConfig(log_level="CRITICAL"),
                failure_config=FailureConfig(max_failures=max_failures),
            ),
        )
        try:
            _wait_for(trainer.fit)
        except ray.train.TrainingFailedError as error:
            raise _original(error) from error
    refusal = ray.get(refusals.first.remote())
    if refusal is not None:
        raise _as_error(*refusal)


def _ray_address(environ: Mapping[str, str]) -> str:
    # A job and RAY_ADDRESS=auto name the cluster to join; else never one that somebody left behind on this host.
    return environ.get("RAY_ADDRESS") or "local"


def _start_ray() -> None:
    """Start Ray on this host, or join the cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: for an address at which no cluster can be joined.
    """
    import ray

    address = _ray_address(os.environ)
    if ray.is_initialized():
        return
    reminder = threading.Timer(_REMINDER_SECONDS, logger.warning, ("waiting for the Ray cluster at %s", address))
    reminder.daemon = True
    if address != "local":
        reminder.start()
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except Exception as error:  # of many kinds: Ray's, grpc's, ValueError, ConnectionError
        if address == "local":
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            "RAY_ADDRESS", address, f"is no cluster that can be joined ({reason})", _RAY_ADDRESS_CURE
        ) from error
    finally:
        reminder.cancel()


def _require_ray_address(address: str) -> None:
    """Refuse an address at which nobody answers: Ray itself would ask for a minute and tell of it in many lines.

    Raises:
        ConfigError: names it.
    """
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            "RAY_ADDRESS", address, "is an address for `ray job submit`", "A driver joins the cluster's GCS: HOST:6379."
        )
    found = address
    with suppress(OSError):
        if address == "auto":  # where `ray start` has written down the cluster that it started last on this host
            found = (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray/ray_current_cluster").read_text().strip()
    host, _, port = found.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # local, or nothing to ask: Ray says so itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        where = "does not answer" if found == address else f"is {found}, which does not answer"
        raise ConfigError("RAY_ADDRESS", address, f"{where} ({error})", _RAY_ADDRESS_CURE) from None


def _require_room(workers: int | tuple[int, int], unit: str, total: float, free: float) -> None:
    """Refuse more workers than the cluster can ever start, and say if it must free some first.

    Raises:
        ConfigError: gives both numbers. Ray itself would wait without end.
    """
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    if fewest > total:
        asked = str(most) if fewest == most else f"{fewest}:{most}"
        cure = f"Give --workers 1:{most} for as many as there are" + (f", or {int(total)}." if total >= 1 else ".")
        raise ConfigError("--workers", asked, f"takes {fewest} {unit}s, but the cluster has {total:g}", cure)
    if fewest > free:
        logger.warning("waiting for the cluster: %d workers take as many %ss, %g are free", fewest, unit, free)


def _wait_for(work: Callable[[], object]) -> None:
    """Run `work` in a thread, so that SIGINT and SIGTERM end the wait.

    In the main thread Ray would handle SIGINT by asking its controller, which does not answer while workers have no
    room, and SIGTERM by aborting the process.

    Raises:
        FaultError: for a signal.
        Exception: what `work` raised.
    """
    import ray

    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    is_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if is_main_thread else ()
    before = {number: signal.signal(number, _raise_fault) for number in signals}
    try:
        thread.start()
        thread.join()
    except FaultError:
        ray.shutdown()  # ends the thread, too, which would crash the interpreter at its end
        thread.join(_CONNECT_SECONDS)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if raised:
        raise raised[0]


def _raise_fault(number: int, frame: FrameType | None) -> None:
    raise FaultError(
        "signal",
        signal.Signals(number).name,
        "ended the run before it was done",
        "The same command runs it again; training goes on from the newest checkpoint.",
    )


@dataclass(frozen=True)
class _WorkerSettings:
    """What a Ray worker is sent.

    Attributes:
        has_terminal: of the driver.
        refusals: handle of the run's `_Refusals`.
    """

    function: RankFunction
    collective_timeout_seconds: float
    arguments: dict[str, Any]
    has_terminal: bool
    refusals: Any


class _Refusals:
    """An actor that keeps the first refusal of a rank's input: raised, it would be retried, and shown amid traces."""

    def __init__(self) -> None:
        self._first: list[Any] | None = None

    def add(self, refusal: list[Any]) -> None:
        """Keep it if it is the first."""
        self._first = self._first or refusal

    def first(self) -> list[Any] | None:
        """The first one, as `_as_error` takes it."""
        return self._first


def _start_refusals() -> Any:
    """The actor, on the driver's host: it must not be lost with a host of workers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Refusals).options(num_cpus=0, scheduling_strategy=here).remote()


def _ray_worker(config: dict[str, _WorkerSettings]) -> None:
    import ray
    import ray.train

    settings = config["settings"]

    def report(metrics: dict[str, float]) -> None:
        ray.train.report(metrics)

    if ray.get(settings.refusals.first.remote()) is not None:
        return  # Ray tries again, but what was wrong with the input still is
    try:
        _run_here(
            settings.function, report, settings.collective_timeout_seconds, settings.arguments, settings.has_terminal
        )
    except CLLM4RecError as error:
        if error.exit_status != CLLM4RecError.exit_status:
            raise
        value = json.loads(json.dumps(error.value, default=str))
        ray.get(settings.refusals.add.remote([type(error).__name__, error.field, value, error.constraint, error.cure]))


def _as_error(kind: str, field: str, value: object, constraint: str, cure: str) -> CLLM4RecError:
    """The error of a worker, made again."""
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
