"""The training loop of all stages and launchers.

`pretrain` and `finetune` differ only in the documents that `BatchLoader` makes. The loop reads a batch, takes a step
(`step.py`), reports it, and validates and saves when due. It resumes from the newest valid checkpoint of its output, on
any number of ranks.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout

from cllm4rec_dist import preflight
from cllm4rec_dist.audit.log import AuditLog
from cllm4rec_dist.checkpointing import checkpoint, leaks, warm_start
from cllm4rec_dist.checkpointing.async_saver import AsyncSaver
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import Checkpoint, RunState
from cllm4rec_dist.checkpointing.lineage import TrainedOn
from cllm4rec_dist.checkpointing.run_folder import BEST, CONFIG_FILE, LOCK_FILE, STEP, store_url
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.checkpointing.trajectory import require_same_rankings, require_same_trajectory
from cllm4rec_dist.config import FaultsConfig, RunConfig
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.stream import prefetch
from cllm4rec_dist.distributed.collectives import gather_integers, require_agreement
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError, ConfigError, FaultError
from cllm4rec_dist.evaluation.linear_tuning import init_linear_memory
from cllm4rec_dist.evaluation.validation import choose_new_item_offset, validate
from cllm4rec_dist.log import ReportMetrics
from cllm4rec_dist.model.table_replicas import copy_first_replica
from cllm4rec_dist.monitoring.progress import Schedule, Validation
from cllm4rec_dist.monitoring.run_reporter import RunReporter
from cllm4rec_dist.signals import GracefulShutdown
from cllm4rec_dist.step import StepResult, learning_rate_factor, train_step
from cllm4rec_dist.system import System, assemble, init_content_embeddings, init_embeddings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_SKIPPED_IN_A_ROW = 20
"""Bad steps in a row after which a run that skips them stops."""
_LOCK_TIMEOUT_SECONDS = 60.0
"""How long to wait for a previous run that is exiting to release the output."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        state: state after the last step.
        losses: loss terms of the last step; empty if no step was left to take.
        interrupted: True if a signal stopped the run after a checkpoint.
    """

    state: RunState
    losses: dict[str, float]
    interrupted: bool


def train(world: World, report: ReportMetrics, config: RunConfig) -> TrainResult:
    """Train a stage from its newest checkpoint, from the weights of `init_from`, or from scratch. Collective.

    Raises:
        FaultError: for a non-finite or exploding loss.
        CLLM4RecError: for invalid input; existing files are kept.
    """
    preflight.require_ready(config, writes_output=world.is_main)
    run = Path(config.output).absolute()
    with _lock_output(run, world), RunReporter(run, world, config, report) as reporter, GracefulShutdown() as stop:
        require_agreement({"configuration": zlib.crc32(config.model_dump_json().encode())}, world)
        system = assemble(config, world)
        store = Store(store_url(config))
        source = BatchLoader(system.corpus, system.prompts, config, world)
        total_steps = min(config.epochs * source.steps_per_epoch, config.max_steps or 1 << 62)
        state, trained_on, origin = _resume_or_init(system, store, total_steps)
        state = _reset_best_of_other_metric(state, config, world)
        last_step = state.step if _should_stop_early(config, state) else total_steps
        if world.is_main:
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            (run / CONFIG_FILE).write_text(text, encoding="utf-8")
        reporter.start(system, Schedule(state.step, total_steps, source.steps_per_epoch), origin)
        losses: dict[str, float] = {}
        interrupted = False
        save_timer = _SaveTimer(config.checkpoint.every_minutes)
        with (
            closing(AuditLog(run, world, config, source, state.step)) as audit,
            _open_saver(store, system, trained_on) as saver,
        ):
            for batch in _watch_reading(world, prefetch(source.make, state.step, last_step)):
                started = time.perf_counter()
                _seed_dropout(config.seed, state.step, world.rank)
                system.train(True)
                factor = learning_rate_factor(state.step, total_steps, config.optimizer)
                result = train_step(system, batch.micro_batches, factor, _max_loss(state, config.faults))
                state, losses = _advance(state, result, config.faults, source), result.losses
                audit.record(state.step - 1, batch, accepted=result.accepted)
                reporter.step(state, result, factor, time.perf_counter() - started)
                if _should_validate(config, state.step, source.steps_per_epoch, total_steps):
                    state = _validate(system, state, saver, reporter)
                reporter.finish_step(state)
                interrupted, due = _sync_control_flags(system, state, stop.signal_name is not None, save_timer.is_due())
                stops = interrupted or _should_stop_early(config, state) or state.step == total_steps
                if stops or due or state.step % config.checkpoint.every_steps == 0:
                    if system.linear.is_empty and (not interrupted or state.step == total_steps):  # a signal is urgent
                        init_linear_memory(system)
                    audit.sync()
                    saver.save(_with_fixed_linear_weight(system, state), STEP)
                    save_timer.restart()
                if stops:
                    break
        reporter.finish(
            state,
            losses,
            signal_name=(stop.signal_name or "a signal to another rank") if interrupted else None,
            stopped_early=_should_stop_early(config, state) and state.step < total_steps,
        )
        return TrainResult(state, losses, interrupted)


@contextmanager
def _lock_output(run: Path, world: World) -> Iterator[None]:
    """Create the run's folder and lock it, so that two runs do not write to the same output."""
    if not world.is_main:
        yield
        return
    lock = FileLock(run / LOCK_FILE)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS)
    except Timeout:
        raise ConfigError(
            "output", str(run), "is being written by another run", "Stop that run or choose another output."
        ) from None
    except OSError as error:
        raise ConfigError("output", str(run), f"cannot be written ({error})", "Choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _open_saver(store: Store, system: System, trained_on: TrainedOn | None) -> Iterator[AsyncSaver]:
    """Open a saver that completes its writes before the run ends, even if the run fails."""
    config = system.config.checkpoint
    saver = AsyncSaver(store, system, config.keep, trained_on, config.full_every)
    try:
        yield saver
    except BaseException:
        saver.wait()
        raise
    saver.finish()


def _resume_or_init(system: System, store: Store, total_steps: int) -> tuple[RunState, TrainedOn | None, str]:
    """Resume, load another run's weights, or initialize the embeddings.

    Args:
        total_steps: steps after which the run is finished.

    Returns:
        The state, on rank 0 what the model has been trained on, and a description of where it comes from.
    """
    config = system.config
    names = [*reversed(store.names(STEP))]
    source = store
    if config.resume != "auto":
        source, requested = find(config.resume, (STEP,))
        if names and source.url == store.url and requested[0] != names[0]:
            raise CheckpointError(
                "resume",
                config.resume,
                f"is not this run's newest checkpoint, {names[0]}",
                "Choose another output to continue from it, or remove the newer ones.",
            )
        source, names = (store, names) if names else (source, requested)
    width = system.recommender.collaborative.items.width
    resumed = checkpoint.resume(system, source, names, partial(require_same_trajectory, config=config, width=width))
    if resumed is not None:
        before = resumed.metadata.run
        if before.step >= total_steps or _should_stop_early(config, before):
            require_same_rankings(resumed, config)
        _warn_if_init_from_is_ignored(resumed, system)
        trained_on = leaks.trained_on_by_resumed_run(resumed, system.corpus) if system.world.is_main else None
        return before, trained_on, f"resumes {resumed.path}"
    damaged = store.quarantined_names(STEP)
    if names or damaged:
        raise CheckpointError(
            "checkpoint.dir",
            store.url,
            f"holds no whole checkpoint, but damaged ones ({damaged or names})",
            "Restore one from a copy, or choose another output to start from scratch.",
        )
    trained_on = leaks.trained_on_by_new_run(system, config.init_from)
    origin = "from scratch"
    if config.init_from is None:
        init_embeddings(system)
    else:
        origin = f"weights of {_load_initial_weights(system, config.init_from)}"
    copy_first_replica(system.recommender)
    return RunState(), trained_on, origin


def _with_fixed_linear_weight(system: System, state: RunState) -> RunState:
    """Return the state with the weight of the linear memory that the settings name, if they name one."""
    weight = system.config.linear.weight
    return state if system.linear.is_empty or weight is None else replace(state, linear_weight=weight)


def _warn_if_init_from_is_ignored(resumed: Checkpoint, system: System) -> None:
    """Log a warning if the resumed run started from other weights than `init_from` names."""
    started_from, named = resumed.metadata.config.get("init_from"), system.config.init_from
    if named != started_from and system.world.is_main:
        logger.warning(
            "init_from=%s is ignored: the run resumes from its own checkpoint, and it started from %s; to start from"
            " other weights, choose another output",
            named,
            started_from or "no other run",
        )


def _load_initial_weights(system: System, path: str) -> str:
    """Load the weights of another run, whose catalog and shared user may differ; return the checkpoint's path.

    Only rows that the other run lacks are initialized.
    """
    fingerprints = dict(system.fingerprints)
    corpus = fingerprints.pop("corpus")

    def read(candidate: Checkpoint) -> checkpoint.CheckpointShard | warm_start.WarmStart:
        checkpoint.require_same_fingerprints(candidate, fingerprints)
        checkpoint.require_same_embedding_width(system, candidate)
        same_rows = candidate.metadata.has_shared_user == (system.config.method.shared_user_ratio > 0)
        if same_rows and candidate.metadata.fingerprints.get("corpus") == corpus:
            return checkpoint.read(system, candidate, moments=False)
        return warm_start.read(system, candidate)

    store, names = find(path)
    loaded = checkpoint.load_first_valid(store, names, system.world, read)
    if loaded is None:
        raise CheckpointError("init_from", path, "holds no whole checkpoint", "Use another one.")
    candidate, contents = loaded
    if isinstance(contents, warm_start.WarmStart):
        init_embeddings(system, items=contents.matches["items"].num_new > 0)
        warm_start.restore(system, contents)
    else:
        checkpoint.restore_weights(system, contents)
        if "content.items" not in contents.weights:
            init_content_embeddings(system)
    return candidate.path


class _SaveTimer:
    """Time since the last checkpoint; rank 0's decides whether one is due."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._started = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._started >= self._seconds


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout in the backbone and its adapters by (seed, step, rank), so that it has no state to save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, 30, step, rank]).generate_state(1, np.uint64)[0]))


def _max_loss(state: RunState, config: FaultsConfig) -> float:
    """Loss above which a step counts as exploded."""
    return math.inf if state.mean_loss is None else config.loss_spike_factor * max(1.0, state.mean_loss)


def _advance(state: RunState, result: StepResult, config: FaultsConfig, source: BatchLoader) -> RunState:
    """Return the state after a step; count a bad step, or stop the run.

    Raises:
        FaultError: for a bad step with `faults.on_bad_step=stop`, or after too many of them in a row.
    """
    step = state.step + 1
    if result.accepted:
        mean = result.loss if state.mean_loss is None else 0.98 * state.mean_loss + 0.02 * result.loss
        return replace(state, step=step, mean_loss=mean, skipped_in_a_row=0)
    values = {**result.losses, "grad_norm": result.grad_norm}
    where = f"step {state.step} ({source.describe(state.step)})"
    if config.on_bad_step == "stop" or state.skipped_in_a_row + 1 >= _MAX_SKIPPED_IN_A_ROW:
        raise FaultError(
            where,
            values,
            f"is not finite or above {_max_loss(state, config):.4g}",
            "The weights are those of the previous step. Lower the learning rates, inspect the batch, or set"
            " faults.on_bad_step=skip.",
        )
    logger.error("skipped %s: %s", where, values)
    return replace(state, step=step, skipped_in_a_row=state.skipped_in_a_row + 1)


def _sync_control_flags(system: System, state: RunState, got_signal: bool, save_is_due: bool) -> tuple[bool, bool]:
    """Return True if any rank got a signal, and True if a checkpoint is due on rank 0. Two small all-gathers.

    Raises:
        FaultError: if ranks disagree; continuing would train diverged replicas.
    """
    must_match = {"step": state.step, "replicated weights": _checksum(system)}
    require_agreement(must_match, system.world)
    flags = gather_integers([got_signal, save_is_due], system.world)
    return any(signal for signal, _ in flags), bool(flags[0][1])


def _checksum(system: System) -> int:
    """Sum of the bits of the replicated parameters as integers, computed on their device."""
    sums = [p.detach().view(torch.int32).sum() for _, p in system.recommender.replicated_parameters()]
    return int(torch.stack(sums).sum()) if sums else 0


def _watch_reading(world: World, batches: Iterator[T]) -> Iterator[T]:
    """Yield the batches, and report to the watchdog when this rank waits for one."""
    while True:
        with world.watch.doing("reading a batch"):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _should_stop_early(config: RunConfig, state: RunState) -> bool:
    """True if the last `early_stopping_patience` validations after the warm-up have not improved the best result."""
    return 0 < config.validation.early_stopping_patience <= state.validations_since_best


def _should_validate(config: RunConfig, step: int, steps_per_epoch: int, total_steps: int) -> bool:
    every = config.validation.every_epochs * steps_per_epoch
    # Pretraining has no recommendation prompt to validate.
    return config.stage == "finetune" and every > 0 and (step % every == 0 or step == total_steps)


def _reset_best_of_other_metric(state: RunState, config: RunConfig, world: World) -> RunState:
    """Drop the best result if it is of another metric than the one that selects this run's best checkpoint."""
    metric = next(iter(config.validation.metrics), None)
    if state.best is None or config.validation.every_epochs == 0 or state.best_metric == metric:
        return state
    if world.is_main:
        logger.warning(
            "the best result so far, %.4f at step %s, is of %s, but this run selects by %s: the next validation starts"
            " a new comparison and saves the best checkpoint",
            state.best,
            state.best_step,
            state.best_metric or "an unnamed metric",
            metric,
        )
    return replace(state, best=None, best_metric=None, best_step=None, validations_since_best=0)


def _validate(system: System, state: RunState, saver: AsyncSaver, reporter: RunReporter) -> RunState:
    """Validate (`evaluation/validation.py`), and save a new best result as the `best` checkpoint. Collective."""
    if system.linear.is_empty:
        init_linear_memory(system)
    mixed = validate(system)
    metric = system.config.validation.metrics[0]
    value = mixed.metrics[metric]
    is_best = state.best is None or value > state.best
    offset = choose_new_item_offset(system) if is_best else None
    reporter.validation(state, Validation(mixed.metrics, is_best, mixed.parts, mixed.weight, offset))
    weight = None if system.linear.is_empty else mixed.weight
    state = replace(state, validated_step=state.step, linear_weight=weight)
    if not is_best:
        # While the learning rates still rise, no improvement does not mean that there will be none.
        counts = state.step > system.config.optimizer.warmup_steps
        return replace(state, validations_since_best=state.validations_since_best + counts)
    state = replace(
        state,
        best=value,
        best_metric=metric,
        best_step=state.step,
        validations_since_best=0,
        new_item_offset=offset,
    )
    saver.save(state, BEST)
    return state
