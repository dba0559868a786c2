"""The loop, one for all stages and launchers.

A stage is data: `pretrain` and `finetune` differ in the documents that `BatchSource` makes and in nothing here. The
loop reads a batch, takes a step (`step.py`), tells about it, and at its times validates and saves.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cllm4rec_dist import checkpoint, ranking
from cllm4rec_dist.checkpoint import RunState
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.batches import BatchSource
from cllm4rec_dist.corpus.stream import ahead
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.log import Bar, MetricsLog, Report, progress_bar
from cllm4rec_dist.step import StepResult, learning_rate_factor, train_step
from cllm4rec_dist.system import System, assemble, start_rows
from cllm4rec_dist.topology import World

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_NOT_OF_THE_TRAJECTORY = {
    "output", "corpus", "backbone", "deepspeed", "epochs", "max_steps", "log_every", "validation", "checkpoint",
    "init_from", "activation_checkpointing",
}  # fmt: skip
"""Settings that may differ between a run and its resumption. Corpus and backbone may have moved: their fingerprints are
held against each other. Epochs and steps may be raised; under a falling schedule they also move its end."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        state: of the last step.
        losses: of the last step, by term.
        checkpoint: the last one written.
    """

    state: RunState
    losses: dict[str, float]
    checkpoint: Path


def train(world: World, report: Report, config: RunConfig) -> TrainResult:
    """Train a stage from its start, from `init_from`, or from the newest checkpoint in `output`. Collective.

    Raises:
        CLLM4RecError: for input that does not fit; nothing that exists is lost.
    """
    run = Path(config.output).absolute()
    system = assemble(config, world)
    state = _begin(system, run)
    source = BatchSource(system.corpus, system.composer, config, world)
    total_steps = min(config.epochs * source.steps_per_epoch, config.max_steps or 1 << 62)
    last_step = state.step if _gave_up(config, state) else total_steps
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (run / CONFIG_FILE).write_text(text, encoding="utf-8")
        logger.info("%s: %d users, %d items, steps %d to %d, %d an epoch",
                    config.stage, system.corpus.num_users, system.corpus.num_items, state.step, total_steps,
                    source.steps_per_epoch)  # fmt: skip

    losses: dict[str, float] = {}
    saved = checkpoint.latest(run)
    bar = progress_bar(world, total_steps, config.stage, "step", state.step)
    with MetricsLog(run, world, state.step) as metrics:
        for batches in ahead(source.make, state.step, last_step):
            started = time.perf_counter()
            system.train(True)
            result = train_step(system, batches, learning_rate_factor(state.step, total_steps, config.optimizer))
            state, losses = replace(state, step=state.step + 1), result.losses
            epoch = (state.step - 1) // source.steps_per_epoch
            _tell(metrics, bar, config, state, epoch, result, time.perf_counter() - started)
            if _validates(config, state.step, source.steps_per_epoch, total_steps):
                state = _validate(system, state, epoch, run, metrics, report)
            stop = _gave_up(config, state)
            if stop or state.step == total_steps or state.step % config.checkpoint.every_steps == 0:
                saved = checkpoint.save(system, state, run)
            if stop:
                logger.info("no better validation since step %s: stopping at step %d", state.best_step, state.step)
                break
    bar.close()
    if saved is None:
        raise CheckpointError("epochs", config.epochs, "leave no step to take", "Raise epochs or max_steps.")
    report({f"loss/{term}": value for term, value in losses.items()})
    return TrainResult(state, losses, saved)


def _begin(system: System, run: Path) -> RunState:
    """Resume, continue from another run's weights, or start the rows."""
    config = system.config
    newest = checkpoint.latest(run)
    if newest is not None:
        _require_same_trajectory(newest, config)
        state = checkpoint.resume(system, newest)
        logger.info("resumed %s at step %d", newest, state.step)
        return state
    start_rows(system)
    if config.init_from is not None:
        folder = checkpoint.find(config.init_from)
        checkpoint.require_same(folder, checkpoint.read_state(folder)["fingerprints"], system.fingerprints)
        checkpoint.load_weights(system, folder)
        logger.info("starting from the weights of %s", folder)
    return RunState()


def _require_same_trajectory(folder: Path, config: RunConfig) -> None:
    own = config.model_dump(mode="json", exclude=_NOT_OF_THE_TRAJECTORY)
    saved: dict[str, Any] = checkpoint.read_state(folder, verify=False)["config"]
    changed = {key: (saved.get(key), value) for key, value in own.items() if saved.get(key) != value}
    if changed:
        raise CheckpointError(
            f"{folder}: configuration", changed, "differs between the checkpoint (first) and this run (second)",
            "Go on with the settings of the checkpoint, or choose another output folder.",
        )  # fmt: skip


def _tell(
    metrics: MetricsLog, bar: Bar, config: RunConfig, state: RunState, epoch: int, result: StepResult, seconds: float
) -> None:
    speed = result.tokens / seconds
    if state.step % config.log_every == 0:
        values = {f"loss/{term}": value for term, value in result.losses.items()}
        metrics.write(state.step, {
            "stage": config.stage, "epoch": epoch, "loss": result.loss, **values, "grad_norm": result.grad_norm,
            "tokens": result.tokens, "tokens_per_second": round(speed, 1),
        })  # fmt: skip
    terms = " ".join(f"{term} {value:.3f}" for term, value in result.losses.items())
    bar.set_description(f"{config.stage} epoch {epoch} {terms} {speed:,.0f} tok/s")
    bar.update()


def _gave_up(config: RunConfig, state: RunState) -> bool:
    """Whether validation has not improved for as long as the run is patient."""
    return 0 < config.validation.patience <= state.validations_since_best


def _validates(config: RunConfig, step: int, steps_per_epoch: int, total_steps: int) -> bool:
    every = config.validation.every_epochs * steps_per_epoch
    # Before finetuning there is no recommendation prompt to validate.
    return config.stage == "finetune" and every > 0 and (step % every == 0 or step == total_steps)


def _validate(system: System, state: RunState, epoch: int, run: Path, metrics: MetricsLog, report: Report) -> RunState:
    """Rank the validation items; a better result than any before is kept as the `best` checkpoint."""
    config = system.config.validation
    found = ranking.evaluate(system, "valid", config.metrics, config.batch_users).mean
    metrics.write(state.step, {"epoch": epoch, **{f"valid/{name}": value for name, value in found.items()}})
    logger.info("epoch %d: %s", epoch, ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    value = found[config.metrics[0]]
    report({f"valid/{name}": value for name, value in found.items()})
    if state.best is not None and value <= state.best:
        return replace(state, validations_since_best=state.validations_since_best + 1)
    state = replace(state, best=value, best_step=state.step, validations_since_best=0)
    checkpoint.save(system, state, run, checkpoint.BEST)
    return state
