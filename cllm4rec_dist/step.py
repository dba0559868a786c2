"""One training step.

    batches -> routes -> embeddings -> forward (one backbone for both LLMs, heads, losses) -> joint clip -> step

`train_step` is the only function that scales losses and steps, `_clip` the only one that clips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm4rec_dist.config import OptimizerConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.distributed.collectives import all_reduce_sum, sum_on_host
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.table_replicas import sum_gradient
from cllm4rec_dist.system import System

SQUARE_CHUNK = 1 << 22
"""Entries of a gradient that are squared at a time."""
TERMS = ("items", "text", "mutual")
"""Loss terms: over the catalog, over the vocabulary, and the mutual regularizer of the embeddings."""


@dataclass(frozen=True)
class StepResult:
    """Losses and counts of one step over all ranks.

    Attributes:
        losses: mean of each term over the step's predictions (or embedding rows), in nats.
        grad_norm: joint norm before clipping.
        tokens: tokens of all ranks, without padding.
        positions: positions that the backbone computes for them, padding included.
        accepted: False if the step was skipped because of a bad loss or gradient; no weight has changed then.
    """

    losses: dict[str, float]
    grad_norm: float
    tokens: int
    positions: int
    accepted: bool

    @property
    def loss(self) -> float:
        """Sum of all terms, which the step minimizes."""
        return sum(self.losses.values())


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Fraction of the peak learning rate at `step`. It has no state to save or resume."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    decay = progress if config.schedule == "linear" else (1 - math.cos(math.pi * min(1.0, progress))) / 2
    return 1 - (1 - config.min_lr_ratio) * decay


def train_step(
    system: System, micro_batches: list[MicroBatch], lr_factor: float, max_loss: float = math.inf
) -> StepResult:
    """Forward and backward of every micro-batch, then one clipped optimizer step. Collective.

    Args:
        micro_batches: this rank's part of the global batch, equally many on all ranks.
        lr_factor: fraction of the peak learning rates.
        max_loss: all ranks skip a step with a larger or non-finite loss.
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
            # One all-reduce for the losses and the joint norm.
            local_sums = torch.cat([sums, _complete_gradients(system)[None]])
            *totals, squared_norm = sum_on_host(local_sums, world, "losses and gradient norm")
            grad_norm = math.sqrt(squared_norm)
            means = {term: total / max(1, counts[term]) for term, total in zip(TERMS, totals, strict=True)}
            accepted = math.isfinite(grad_norm) and sum(means.values()) <= max_loss
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
    """Divisor of each loss sum, and the step's tokens and positions. One all-reduce of five integers."""
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
    """Average the gradients outside the engine over the ranks, as ZeRO-3 does its own; return this rank's squared norm.

    Tables hold the gradient of the sum over ranks of losses that carry a factor W, so they are divided by W once.
    Replicated parameters and replicas of tables are summed first; each of the ranks that hold the same values counts
    its share of their squared norm.
    """
    world, replicas = system.world, system.recommender.replicas
    squared_norm = torch.zeros((), dtype=torch.float64, device=world.device)
    replicated = dict(system.recommender.replicated_parameters())
    _sum_over_ranks([*replicated.values()], world)
    for name, parameter in zip(system.embedding_optimizer.names, system.embedding_optimizer.parameters, strict=True):
        if parameter.grad is None:
            continue
        if name not in replicated:
            parameter.grad = sum_gradient(parameter.grad, replicas)
        values = _values(parameter.grad).div_(world.size)
        squared_norm += _sum_of_squares(values) / (world.size if name in replicated else replicas.size)
    for gradient in system.engine.gradients().values():
        squared_norm += gradient.double().square().sum()
    return squared_norm


def _sum_over_ranks(parameters: list[nn.Parameter], world: World) -> None:
    """Sum the gradients of replicated parameters over the ranks. One all-reduce of all of them."""
    gradients = {p: p.grad for p in parameters if p.grad is not None}
    if not gradients or world.size == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
    total = all_reduce_sum(flat, world, "gradients of replicated parameters")
    parts = total.split([gradient.numel() for gradient in gradients.values()])
    for (parameter, gradient), part in zip(gradients.items(), parts, strict=True):
        parameter.grad = part.view_as(gradient)


def _sum_of_squares(values: Tensor) -> Tensor:
    """Sum of squares in fp64, in chunks: two fp64 copies of a whole table would be the step's peak of memory."""
    chunks = values.flatten().split(SQUARE_CHUNK)
    return torch.stack([chunk.double().square().sum() for chunk in chunks]).sum()


def _clip(system: System, norm: float) -> None:
    """Scale all gradients, inside and outside of the engine, to a joint norm of at most `max_grad_norm`."""
    factor = system.config.optimizer.max_grad_norm / (norm + 1e-6)
    if factor < 1:
        for parameter in system.embedding_optimizer.parameters:
            if parameter.grad is not None:
                _values(parameter.grad).mul_(factor)
        system.engine.scale_gradients(factor)


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient
