"""Ray launcher: one Train worker for each rank, on a local or a running cluster, without Ray's log output.

Ray starts, watches and restarts the workers; checkpoints are written by this package. Ray's log output is turned off by
its settings, each explained where it is set. The output of a rank is shown unchanged, and its error is raised here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cllm4rec_dist import errors
from cllm4rec_dist.errors import CLLM4RecError, ConfigError, FaultError
from cllm4rec_dist.launchers.run_rank import RankFunction, run_rank

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_REMINDER_SECONDS = 10.0
_RAY_ADDRESS_CURE = "Start that cluster, or unset RAY_ADDRESS to have one started on this host."

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS": "0",
    # This package's log lines name the rank.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # An actor that polls a cloud for preemption notices, which are not used here; starting it logs an error.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
"""Variables that Ray reads in the driver and in its workers."""


def run_on_ray(
    function: RankFunction,
    workers: int | tuple[int, int],
    collective_timeout_seconds: float,
    max_failures: int,
    arguments: dict[str, Any],
) -> None:
    """Run `function` on Train workers, with one GPU each if the cluster has GPUs, and wait for the end.

    Args:
        workers: number of ranks, or the minimum and maximum of an elastic run.
        max_failures: how often Ray restarts all ranks after one was lost.
        arguments: picklable keyword arguments of `function`.

    Raises:
        CLLM4RecError: error of a rank.
    """
    _quiet_ray()
    address = ray_address(os.environ)
    action = "starting Ray" if address == "local" else f"joining the Ray cluster at {address}"
    logger.info("%s with %s (takes about 10 s)", action, _describe_workers(workers))
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    start_ray()
    gpu = bool(ray.cluster_resources().get("GPU"))
    unit = "GPU" if gpu else "CPU"
    _require_room(workers, unit, ray.cluster_resources().get(unit, 0.0), ray.available_resources().get(unit, 0.0))
    refusals = _start_refusals()
    logger.info("waiting for the ranks to import torch and join (takes about 15 s)")
    settings = _WorkerSettings(function, collective_timeout_seconds, arguments, sys.stderr.isatty(), refusals)
    # Ray's records of a run are not needed after it, and only this host writes them.
    with tempfile.TemporaryDirectory(prefix="cllm4rec-ray-", ignore_cleanup_errors=True) as records:
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"settings": settings},
            scaling_config=ScalingConfig(
                num_workers=workers,  # type: ignore[arg-type]  # typed as an older class
                use_gpu=gpu,
                resources_per_worker={} if gpu else {"CPU": 1},
            ),
            # The error is raised below; Ray's logs of it and of its cleanup would only be noise.
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


def _describe_workers(workers: int | tuple[int, int]) -> str:
    if isinstance(workers, int):
        return f"{workers} worker{'s' * (workers > 1)}"
    return f"{workers[0]} to {workers[1]} workers"


def ray_address(environ: Mapping[str, str]) -> str:
    """Return RAY_ADDRESS, which a Ray job sets, too, or `local`; never join another cluster on this host."""
    return environ.get("RAY_ADDRESS") or "local"


def _quiet_ray() -> None:
    """Set the variables that turn off Ray's log output. Must be called before Ray is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def start_ray() -> None:
    """Start Ray on this host, or join the cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: if no cluster can be joined at that address.
    """
    _quiet_ray()
    import ray

    address = ray_address(os.environ)
    if ray.is_initialized():
        return
    reminder = threading.Timer(_REMINDER_SECONDS, logger.warning, ("waiting for the Ray cluster at %s", address))
    reminder.daemon = True
    if address != "local":
        reminder.start()
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,  # a warning about token authentication at every start
            runtime_env={"worker_process_setup_hook": _set_ray_address},
        )
    except Exception as error:  # many types: Ray's, grpc's, ValueError, ConnectionError
        if address == "local":
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            "RAY_ADDRESS", address, f"is no cluster that can be joined ({reason})", _RAY_ADDRESS_CURE
        ) from error
    finally:
        reminder.cancel()


def _set_ray_address() -> None:
    """Set RAY_ADDRESS in a worker process to its cluster.

    Ray Train's placement group cleaner queries the state of its controller at the address in RAY_ADDRESS or, without
    it, at any cluster that runs on this host. It then fails with a traceback or delays the end of a run by 12 s.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def _current_cluster(environ: Mapping[str, str]) -> Path:
    """The file in which `ray start` notes the address of the cluster that it started last on this host."""
    folder = environ.get("RAY_TMPDIR", environ.get("TMPDIR", "/tmp"))
    return Path(folder) / "ray" / "ray_current_cluster"


def require_ray_address(address: str) -> None:
    """Refuse an address that does not answer: Ray itself would retry for a minute and log many lines.

    Raises:
        ConfigError: names the address.
    """
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            "RAY_ADDRESS", address, "is an address for `ray job submit`", "A driver joins the cluster's GCS: HOST:6379."
        )
    resolved = address
    with suppress(OSError):
        if address == "auto":
            resolved = _current_cluster(os.environ).read_text().strip()
    host, _, port = resolved.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # local, or not an address: Ray reports that itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        constraint = "does not answer" if resolved == address else f"is {resolved}, which does not answer"
        raise ConfigError("RAY_ADDRESS", address, f"{constraint} ({error})", _RAY_ADDRESS_CURE) from None


def _require_room(workers: int | tuple[int, int], unit: str, total: float, free: float) -> None:
    """Refuse more workers than the cluster can ever start; warn if it must free resources first.

    Raises:
        ConfigError: gives both numbers. Ray itself would wait forever.
    """
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    if fewest > total:
        requested = str(most) if fewest == most else f"{fewest}:{most}"
        cure = f"Give --workers 1:{most} for as many as there are" + (f", or {int(total)}." if total >= 1 else ".")
        raise ConfigError("--workers", requested, f"takes {fewest} {unit}s, but the cluster has {total:g}", cure)
    if fewest > free:
        logger.warning("waiting for the cluster: %d workers take as many %ss, %g are free", fewest, unit, free)


def _wait_for(work: Callable[[], object]) -> None:
    """Run `work` in a thread, so that SIGINT and SIGTERM end the wait.

    In the main thread Ray would handle SIGINT by calling its controller, which does not answer while workers wait for
    resources, and SIGTERM by aborting the process.

    Raises:
        FaultError: for a signal.
        Exception: any error of `work`.
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
    handlers = {signum: signal.signal(signum, _raise_fault) for signum in signals}
    try:
        thread.start()
        thread.join()
    except FaultError:
        ray.shutdown()  # also ends the thread, which would crash the interpreter at exit
        thread.join(_CONNECT_SECONDS)
        raise
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if raised:
        raise raised[0]


def _raise_fault(signum: int, frame: FrameType | None) -> None:
    raise FaultError(
        "signal",
        signal.Signals(signum).name,
        "ended the run before it was done",
        "Run the same command again; training resumes from the newest checkpoint.",
    )


@dataclass(frozen=True)
class _WorkerSettings:
    """Arguments of a Ray worker.

    Attributes:
        has_terminal: True if the driver has a terminal.
        refusals: handle of the run's `_Refusals`.
    """

    function: RankFunction
    collective_timeout_seconds: float
    arguments: dict[str, Any]
    has_terminal: bool
    refusals: Any


class _Refusals:
    """Actor that stores the first input error of a rank. If it were raised, Ray would retry and log tracebacks."""

    def __init__(self) -> None:
        self._first: list[Any] | None = None

    def add(self, refusal: list[Any]) -> None:
        """Store an error if it is the first."""
        self._first = self._first or refusal

    def first(self) -> list[Any] | None:
        """Return the first error as arguments of `_as_error`; None if there is none."""
        return self._first


def _start_refusals() -> Any:
    """Start the actor on the driver's host, so that it survives the loss of a worker's host."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Refusals).options(num_cpus=0, scheduling_strategy=here).remote()


def _ray_worker(config: dict[str, _WorkerSettings]) -> None:
    import ray
    import ray.train

    settings = config["settings"]
    # Ray Train logs each report to the root logger at level INFO.
    logging.getLogger().setLevel(logging.WARNING)

    def report(metrics: dict[str, float]) -> None:
        ray.train.report(metrics)

    if ray.get(settings.refusals.first.remote()) is not None:
        return  # Ray retries, but the input is still wrong
    try:
        run_rank(
            settings.function,
            report,
            settings.collective_timeout_seconds,
            settings.arguments,
            has_terminal=settings.has_terminal,
        )
    except CLLM4RecError as error:
        if error.exit_status != CLLM4RecError.exit_status:
            raise
        value = json.loads(json.dumps(error.value, default=str))
        ray.get(settings.refusals.add.remote([type(error).__name__, error.field, value, error.constraint, error.cure]))


def _as_error(kind: str, field: str, value: object, constraint: str, cure: str) -> CLLM4RecError:
    """Recreate the error of a worker."""
    error_type = getattr(errors, kind, None)
    if not (isinstance(error_type, type) and issubclass(error_type, CLLM4RecError)):
        error_type = CLLM4RecError
    return error_type(field, value, constraint, cure)


def _original(error: BaseException) -> BaseException:
    """Return the CLLM4RecError that Ray wrapped, or Ray's error if there is none."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, CLLM4RecError):
            return current
        for failure in getattr(current, "worker_failures", {}).values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, CLLM4RecError):
                return cause
        current = current.__cause__
    return error
