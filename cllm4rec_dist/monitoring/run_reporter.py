"""All reports of a training run, in one object that the training loop calls.

It logs the banner, the progress bar, a line for each epoch and the last lines (formatted by `progress.py`), writes
`metrics.jsonl`, feeds the trackers, and keeps `status.json`, which `cllm4rec status` reads. All of this happens on rank
0; only metrics for Ray Train are reported on every rank, as it requires.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from cllm4rec_dist import preflight
from cllm4rec_dist.checkpointing.format import RunState
from cllm4rec_dist.checkpointing.run_folder import RunRecord, store_url, write_record
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.log import ProgressBar, ReportMetrics, progress_bar
from cllm4rec_dist.monitoring.banner import banner_rows, describe_ranks, device_name
from cllm4rec_dist.monitoring.metrics_log import MetricsLog
from cllm4rec_dist.monitoring.progress import (
    EpochMeter,
    EpochReport,
    Schedule,
    Validation,
    format_best,
    format_end,
    format_epoch,
    format_loss,
    format_losses,
    format_rows,
)
from cllm4rec_dist.monitoring.trackers import BackgroundTracker, End, open_trackers
from cllm4rec_dist.step import StepResult
from cllm4rec_dist.system import System

logger = logging.getLogger(__name__)


class RunReporter:
    """Reports one run. A context manager around the whole run, so that `status.json` records an error.

    Args:
        run: folder of the run, which exists on rank 0.
        report: called with the latest metrics on every rank.
    """

    _bar: ProgressBar
    _metrics: MetricsLog
    _schedule: Schedule
    _loop_started: float
    _lr: float

    def __init__(self, run: Path, world: World, config: RunConfig, report: ReportMetrics) -> None:
        self._run, self._world, self._config, self._report = run, world, config, report
        self._open = ExitStack()
        self._meter = EpochMeter()
        self._validation = Validation({})
        self._end: End = "failed"
        self._started = time.monotonic()
        self._record = RunRecord(
            stage=config.stage,
            state="starting",
            started=time.time(),
            host=platform.node(),
            num_ranks=world.size,
            device=device_name(world),
        )
        self._update_record()

    def start(self, system: System, schedule: Schedule, origin: str) -> None:
        """Log the banner, open the metrics file and start the trackers. Collective: gathers the host names.

        Args:
            origin: text that names the checkpoint or run that the weights come from.
        """
        config, world = self._config, self._world
        self._schedule = schedule
        ranks = describe_ranks(world)
        if world.is_main:
            logger.info(
                "%s of %s\n%s", config.stage, self._run, format_rows(banner_rows(system, schedule, ranks, origin))
            )
            warning = preflight.warmup_warning(config, system.corpus.manifest)
            if warning is not None:
                logger.warning(warning)
            self._update_record(
                state="running",
                first_step=schedule.first_step,
                total_steps=schedule.total_steps,
                steps_per_epoch=schedule.steps_per_epoch,
            )
        trackers = open_trackers(config, self._run, schedule.first_step) if world.is_main else []
        for tracker in trackers:
            self._open.push(partial(self._close_tracker, tracker))
        self._metrics = self._open.enter_context(closing(MetricsLog(self._run, world, schedule.first_step, trackers)))
        self._bar = progress_bar(world, schedule.total_steps, config.stage, "step", schedule.first_step)
        self._open.callback(self._bar.close)
        self._loop_started = time.monotonic()

    def step(self, state: RunState, result: StepResult, lr_factor: float, seconds: float) -> None:
        """Report a step: a line of metrics and the progress bar.

        Args:
            state: state after the step.
            seconds: duration of the step.
        """
        config, schedule = self._config, self._schedule
        epoch = schedule.epoch(state.step)
        speed = result.tokens / seconds
        self._lr = config.optimizer.lr * lr_factor
        if state.step % config.log_every == 0:
            self._metrics.write(
                state.step,
                {
                    "stage": config.stage,
                    "epoch": epoch - 1,
                    "loss": result.loss,
                    **{f"loss/{term}": value for term, value in result.losses.items()},
                    "grad_norm": result.grad_norm,
                    "lr": self._lr,
                    "embeddings_lr": config.optimizer.embeddings_lr * lr_factor,
                    "accepted": result.accepted,
                    "tokens": result.tokens,
                    "tokens_per_second": round(speed, 1),
                    "packing_efficiency": round(result.tokens / result.positions, 4),
                },
            )
        if result.accepted:
            self._meter.add(result.losses, result.tokens, seconds)
        terms = " ".join(f"{term} {format_loss(value)}" for term, value in result.losses.items())
        within = f"{(state.step - 1) % schedule.steps_per_epoch + 1}/{schedule.steps_per_epoch}"
        self._bar.set_description(
            f"{config.stage} epoch {epoch}/{schedule.num_epochs} step {within} {terms} {speed:,.0f} tokens/s"
        )
        self._bar.update()

    def validation(self, state: RunState, validation: Validation) -> None:
        """Report a validation."""
        logged = {f"valid/{name}": value for name, value in validation.metrics.items()}
        parts = {
            f"valid_{part}/{name}": value
            for part, metrics in validation.parts.items()
            for name, value in metrics.items()
        }
        if parts:
            parts["linear_weight"] = validation.linear_weight
        if validation.new_item_offset is not None:
            parts["new_item_offset"] = validation.new_item_offset
        self._metrics.write(state.step, {"epoch": self._schedule.epoch(state.step) - 1, **logged, **parts})
        self._report(logged)
        self._validation = validation

    def finish_step(self, state: RunState) -> None:
        """Log the epoch's line if the step, of which validation is done, ends an epoch."""
        schedule, meter = self._schedule, self._meter
        if not schedule.ends_epoch(state.step):
            return
        steps_left = schedule.total_steps - state.step
        seconds_per_step = (time.monotonic() - self._loop_started) / (state.step - schedule.first_step)
        line = EpochReport(
            schedule.epoch(state.step),
            schedule.num_epochs,
            meter.losses,
            self._lr,
            self._validation,
            meter.tokens_per_second,
            steps_left * seconds_per_step if steps_left else None,
        )
        logger.info(format_epoch(line))
        meter.reset()
        self._validation = Validation({})

    def finish(
        self, state: RunState, losses: Mapping[str, float], *, signal_name: str | None, stopped_early: bool
    ) -> None:
        """Report the end of a run, after its last checkpoint is written."""
        self._report({f"loss/{term}": value for term, value in losses.items()})
        self._end = "done" if signal_name is None else "interrupted"
        self._record = self._record.model_copy(update={"message": signal_name or ""})
        self._bar.close()
        if state.best is not None and state.best_step is not None:
            metric = state.best_metric or "validation result"
            result = format_best(metric, state.best, state.best_step, self._schedule)
        else:
            result = f"step {state.step:,}" + (f", loss {format_losses(losses)}" if losses else "")
        seconds = time.monotonic() - self._started
        line = format_end(
            self._config.stage,
            state.step,
            self._schedule,
            seconds,
            result=result,
            signal_name=signal_name,
            stopped_early=stopped_early,
        )
        if self._world.is_main:
            logger.log(logging.INFO if signal_name is None else logging.WARNING, line)
            logger.info("checkpoints: %s", store_url(self._config))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        message = self._record.message if error is None else _one_line(error)
        self._update_record(state=self._end, ended=time.time(), message=message)

    def _close_tracker(self, tracker: BackgroundTracker, *error: object) -> None:
        tracker.close(self._end)

    def _update_record(self, **changes: object) -> None:
        """Write `status.json` on rank 0. A failure, such as a full disk, is only logged."""
        if not self._world.is_main:
            return
        self._record = self._record.model_copy(update=changes)
        try:
            write_record(self._run, self._record)
        except OSError as error:
            logger.warning("the state of the run cannot be written to %s: %s", self._run, error)


def _one_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, CLLM4RecError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
