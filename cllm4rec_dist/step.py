"""One training step: the method, in the order of the design.

    batches -> routes -> embeddings -> forward (one backbone for both LLMs, heads, losses) -> joint clip -> step

One place scales losses, one place clips, one place steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm4rec_dist.config import OptimizerConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.distributed.collectives import all_reduce_sum, sum_on_host
from cllm4rec_dist.system import System

PIECE = 1 << 22
"""Entries of a gradient that are squared at a time."""
TERMS = ("items", "text", "mutual")
"""Losses of a step: over the catalog, over the vocabulary, between the two sets of rows."""


@dataclass(frozen=True)
class StepResult:
    """Global figures of one step.

    Attributes:
        losses: mean of each term over the step's predictions (or rows), in nats.
        grad_norm: joint norm before clipping.
        tokens: real tokens read by all ranks.
        positions: what the backbone computes for them, padding included.
        accepted: False where the step was left out, because its loss or gradient was bad: nothing has changed then.
    """

    losses: dict[str, float]
    grad_norm: float
    tokens: int
    positions: int
    accepted: bool

    @property
    def loss(self) -> float:
        """The minimised sum."""
        return sum(self.losses.values())


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at `step`, a pure function: nothing to save, nothing to resume."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    fallen = done if config.schedule == "linear" else (1 - math.cos(math.pi * min(1.0, done))) / 2
    return 1 - (1 - config.min_lr_ratio) * fallen


def train_step(
    system: System, micro_batches: list[MicroBatch], lr_factor: float, largest_loss: float = math.inf
) -> StepResult:
    """Forward and backward of every micro-batch, then one clipped optimizer step. Collective.

    Args:
        micro_batches: this rank's part of the global batch; all ranks have equally many.
        lr_factor: share of the peak learning rates.
        largest_loss: a step with a larger loss, or with one that is not finite, is left out on all ranks alike.
    """
    world, model, optimizer = system.world, system.recommender, system.config.optimizer
    routes = model.route(micro_batches)
    touched = model.touched(routes)
    counts = _global_counts(system, micro_batches, sum(map(len, touched.values())))
    sums = torch.zeros(len(TERMS), dtype=torch.float64, device=world.device)
    batches = [batch.to(world.device) for batch in micro_batches]

    for index, (tokens, item_rows) in enumerate(model.embed(batches, routes)):
        losses = model(batches[index], tokens, item_rows, system.backbone)
        if index == len(batches) - 1:
            config = system.config.embeddings
            losses["mutual"] = model.mutual_loss(touched, config.lambda_l, config.lambda_c)
        scaled = [loss * (world.size / max(1, counts[term])) for term, loss in losses.items()]
        with world.watch.collective("ZeRO-3 backward"):
            is_last = system.engine.backward(torch.stack(scaled).sum())
        for term, loss in losses.items():
            sums[TERMS.index(term)] += loss.detach().double()
        if is_last:
            # One all-reduce brings the joint norm and what the step reports of itself.
            parts = torch.cat([sums, _complete_gradients(system)[None]])
            *totals, square = sum_on_host(parts, world, "losses and gradient norm")
            grad_norm = math.sqrt(square)
            means = {term: total / max(1, counts[term]) for term, total in zip(TERMS, totals, strict=True)}
            accepted = math.isfinite(grad_norm) and sum(means.values()) <= largest_loss
            if accepted:
                _clip(system, grad_norm)
                system.embedding_optimizer.step(optimizer.embeddings_lr * lr_factor)
            else:
                system.embedding_optimizer.discard()
                system.engine.discard()
        with world.watch.collective("ZeRO-3 step"):
            system.engine.step(optimizer.lr * lr_factor)

    return StepResult(means, grad_norm, counts["tokens"], counts["positions"], accepted)


def _global_counts(system: System, batches: list[MicroBatch], num_touched: int) -> dict[str, int]:
    """What each sum of the step is divided by, and its tokens and positions. One all-reduce of five integers."""
    local = {
        "items": sum(len(batch.targets["items"]) for batch in batches),
        "text": sum(len(batch.targets["text"]) for batch in batches if "text" in batch.targets),
        "mutual": num_touched,
        "tokens": sum(batch.num_tokens for batch in batches),
        "positions": sum(batch.word_ids.numel() for batch in batches),
    }
    values = torch.tensor([*local.values()], device=system.world.device)
    return dict(zip(local, sum_on_host(values, system.world, "counts"), strict=True))


def _complete_gradients(system: System) -> Tensor:
    """Make the gradients outside the engine those of the mean, as ZeRO-3 makes its own; this rank's squared norm.

    Tables hold the gradient of the sum over ranks of losses that carry a factor W, so they are divided by W once.
    Replicated parameters are all-reduced first, and count on one W-th of each rank.
    """
    world, model = system.world, system.recommender
    square = torch.zeros((), dtype=torch.float64, device=world.device)
    replicated = dict(model.replicated_parameters())
    for name, parameter in zip(system.embedding_optimizer.names, system.embedding_optimizer.parameters, strict=True):
        if parameter.grad is None:
            continue
        if name in replicated:
            parameter.grad = all_reduce_sum(parameter.grad, world, f"the gradient of {name}")
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        values = _values(parameter.grad).div_(world.size)
        square += _square(values) / (world.size if name in replicated else 1)
    for gradient in system.engine.gradients().values():
        square += gradient.double().square().sum()
    return square


def _square(values: Tensor) -> Tensor:
    """Sum of squares in fp64, a piece at a time: twice a whole table in fp64 would be the fullest moment of a step."""
    pieces = values.flatten().split(PIECE)
    return torch.stack([piece.double().square().sum() for piece in pieces]).sum()


def _clip(system: System, norm: float) -> None:
    """Scale every gradient, in the engine and outside, to a joint norm of at most `max_grad_norm`."""
    factor = system.config.optimizer.max_grad_norm / (norm + 1e-6)
    if factor < 1:
        for parameter in system.embedding_optimizer.parameters:
            if parameter.grad is not None:
                _values(parameter.grad).mul_(factor)
        system.engine.scale_gradients(factor)


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient
