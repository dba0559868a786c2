"""A micro-batch of one rank, forward and backward, on meta tensors.

The backbone, the rows' use and the heads are the project's own modules; what a rank exchanges with others stands here
as tensors of the sizes that come and go, because nobody is there to exchange with. `rehearse` gives what is alive at
its fullest, by part, in each stretch between two of ZeRO-3's events, so that gathered weights can be laid over it.

Legend: R rows, L their length, D hidden, n wanted ids of this rank, u of them distinct, m rows that others want from
this rank, k touched rows of this rank, Q queries, N queries of all ranks, M targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist import objectives
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.prompts import MicroBatch
from cllm4rec_dist.model.backbone import DualBackbone
from cllm4rec_dist.model.heads import likelihood_parts
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.tables import ShardedTable
from cllm4rec_dist.planning.gathering import Event, record
from cllm4rec_dist.planning.tracing import Trace, as_run, leave_out

BACKBONE, ATTENTION, HEAD, WORD_HEAD, LOOKUP, GRADIENTS = (
    "backbone", "attention", "item head", "word head", "lookup", "gradients",
)  # fmt: skip
META = torch.device("meta")


@dataclass(frozen=True)
class Exchange:
    """A lookup in one table: n wanted, u distinct, m served."""

    wanted: int
    distinct: int
    served: int


@dataclass(frozen=True)
class Share:
    """A micro-batch of one rank.

    Attributes:
        batch: on the meta device.
        exchanges: users and items of the collaborative, then of the content LLM.
        touched_users, touched_items: rows of this rank that stand in any document of the step.
        item_queries: of each rank, this one first.
        owned_targets: pairs whose item this rank holds.
    """

    batch: MicroBatch
    exchanges: list[Exchange]
    touched_users: int
    touched_items: int
    item_queries: tuple[int, ...]
    owned_targets: int


@dataclass(frozen=True)
class Rehearsal:
    """What happened.

    Attributes:
        events: of ZeRO-3, in order.
        stretches: bytes alive by part at the fullest moment before the first event, between each two, after the last.
        at_events: bytes alive at each event.
        left: bytes alive afterwards by part: dense gradients.
        flops, operators: by part.
    """

    events: list[Event]
    stretches: list[Counter[str]]
    at_events: list[Counter[str]]
    left: Counter[str]
    flops: Counter[str]
    operators: Counter[str]


def rehearse(
    dual: DualBackbone, model: Recommender, config: RunConfig, micro_batches: Sequence[Share], max_logits: int
) -> Rehearsal:
    """Run micro-batches one after the other, with their gradients added up; tells of the last one.

    Args:
        dual, model: on the meta device, the model with the rows of one rank.
        max_logits: logits that a head holds at a time.
    """
    trace = Trace(LOOKUP)
    parameters = [*dual.parameters(), *model.parameters()]
    leave_out([*parameters, *dual.buffers(), model.words.embedding, model.words.head])
    events: list[Event] = []
    stretches: list[Counter[str]] = []
    at_events: list[Counter[str]] = []

    def note(event: Event) -> None:
        events.append(event)
        stretches.append(trace.mark())
        at_events.append(trace.live.copy())
        if not event.fetch and not event.forward:  # ZeRO-3 takes a layer's gradients when its backward is over
            for parameter in event.module.parameters():
                parameter.grad = None

    def hand_over(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.hand_over(parameter.grad, GRADIENTS)

    record(dual, dual.layers, note)
    _mask_packed_rows(dual)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hand_over)
    for share in micro_batches:
        events.clear()
        stretches.clear()
        at_events.clear()
        trace.flops.clear()
        trace.operators.clear()
        trace.mark()
        with trace, as_run(trace):
            _run(dual, model, config, share, max_logits, trace)
        stretches.append(trace.mark())
    return Rehearsal(events, stretches, at_events, trace.live.copy(), trace.flops, trace.operators)


def _mask_packed_rows(dual: DualBackbone) -> None:
    """Give the decoder the mask that it would make of the positions of packed documents, whose values it would read."""
    if dual.decoder.config._attn_implementation != "sdpa":
        return

    def add(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows, length = options["inputs_embeds"].shape[:2]
        mask = torch.empty(rows, 1, length, length, dtype=torch.bool, device=META)
        return arguments, options | {"attention_mask": mask}

    dual.decoder.register_forward_pre_hook(add, with_kwargs=True)


def _run(
    dual: DualBackbone, model: Recommender, config: RunConfig, share: Share, max_logits: int, trace: Trace
) -> None:
    """`step._losses` and its backward."""
    batch = share.batch
    trace.part = LOOKUP
    embedded = model.embed(batch, _lookup(model, share.exchanges))
    trace.at_gradient_of(embedded.tokens, LOOKUP)
    trace.part = BACKBONE
    hidden = dual(embedded.tokens, batch.positions, batch.boundary)
    trace.at_gradient_of(hidden, BACKBONE)
    trace.part = HEAD
    queries = model.item_queries(hidden, embedded.item_rows, batch)
    everyones = _AllGather.apply(queries, share.item_queries) if len(share.item_queries) > 1 else queries
    loss = torch.zeros((), device=META)
    if batch.words is not None:
        trace.part = WORD_HEAD
        predicting = hidden.flatten(0, 1)[batch.words.query_places]
        lse, scores = likelihood_parts(
            predicting, model.words.head, batch.words.target_query, batch.words.targets, max_logits
        )
        loss = lse.sum() - scores.sum()
        trace.at_gradient_of(loss, WORD_HEAD)
    trace.part = HEAD
    items_loss = _item_loss(model, everyones, share, max_logits)
    trace.at_gradient_of(items_loss, HEAD)
    trace.part = LOOKUP
    (loss + items_loss + _mutual(model, config, share)).backward()


def _indices(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=META)


def _lookup(model: Recommender, exchanges: list[Exchange]) -> list[Tensor]:
    """`tables.lookup`."""
    tables = model.tables[: len(exchanges)]
    distinct = _Arrival.apply(model.wire, tables, exchanges, *(table.local_rows for table in tables))
    wanted = [exchange.wanted for exchange in exchanges]
    return list(distinct.index_select(0, _indices(sum(wanted))).split(wanted))


class _Arrival(torch.autograd.Function):
    """The tensors of `tables.fetch` and `lookup`. Sparse gradients are left out, since meta tensors are dense."""

    @staticmethod
    def forward(
        ctx: Any, wire: torch.dtype, tables: list[ShardedTable], exchanges: list[Exchange], *local_rows: Tensor
    ) -> Tensor:
        ctx.wire, ctx.tables, ctx.exchanges, ctx.width = wire, tables, exchanges, local_rows[0].shape[1]
        sent = torch.empty(sum(e.served for e in exchanges), ctx.width, dtype=wire, device=META)
        arrived = sent.new_empty(sum(e.distinct for e in exchanges), ctx.width)
        return arrived.float().clone()  # not the same tensor where nothing is rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        owned = grad.to(ctx.wire).new_empty(sum(e.served for e in ctx.exchanges), ctx.width)
        gradients = []
        for table, exchange in zip(ctx.tables, ctx.exchanges, strict=True):
            values = owned.new_empty(exchange.served, ctx.width).float()
            gradients.append(_gradient_of_rows(values, table.sparse_gradients, table.local_rows.shape))
        return None, None, None, *gradients


class _Own(torch.autograd.Function):
    """The tensors of `ShardedTable.own`."""

    @staticmethod
    def forward(ctx: Any, local_rows: Tensor, touched: int, sparse: bool) -> Tensor:
        ctx.sparse, ctx.shape = sparse, local_rows.shape
        return local_rows.new_empty(touched, local_rows.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return _gradient_of_rows(grad, ctx.sparse, ctx.shape), None, None


def _gradient_of_rows(values: Tensor, sparse: bool, shape: torch.Size) -> Tensor | None:
    return None if sparse else values.new_zeros(shape)


def _item_loss(model: Recommender, everyones: Tensor, share: Share, max_logits: int) -> Tensor:
    """`objectives.item_likelihood`, of the queries that `heads.ask` has brought."""
    operand = model.item_operand()
    if model.num_negatives:  # as many as can be: targets may be drawn or asked for twice
        drawn = -(-model.num_negatives // len(share.item_queries)) + share.owned_targets
        rows = operand[_indices(min(len(operand), drawn))]
        operand, everyones = torch.cat([rows, rows.new_empty(len(rows), 1)], dim=1), F.pad(everyones, (0, 1))
    pairs = _indices(share.owned_targets), _indices(share.owned_targets)
    lse, scores = likelihood_parts(everyones, operand, *pairs, max_logits)
    return lse.sum() - scores.sum()


class _AllGather(torch.autograd.Function):
    """The tensors of `collectives.all_gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts, longest = counts, max(counts)
        padded, gathered = x.new_empty(longest, x.shape[1]), x.new_empty(longest * len(counts), x.shape[1])
        del padded
        return gathered if min(counts) == longest else gathered.new_empty(sum(counts), x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.new_empty(max(ctx.counts) * len(ctx.counts), grad.shape[1])
        own = padded.new_empty(max(ctx.counts), grad.shape[1])
        return own[: ctx.counts[0]], None


def _mutual(model: Recommender, config: RunConfig, share: Share) -> Tensor:
    """`step._mutual`."""

    def own(table: ShardedTable, touched: int) -> Tensor:
        return _Own.apply(table.local_rows, touched, table.sparse_gradients)

    parts = [
        torch.cat([own(rows.users, share.touched_users), own(rows.items, share.touched_items)])
        for rows in (model.collaborative, model.content) if rows is not None
    ]  # fmt: skip
    return objectives.mutual_regularization(
        parts[0], parts[1] if len(parts) > 1 else None, config.embeddings.lambda_l, config.embeddings.lambda_c
    )[0]
