"""A micro-batch of one rank, forward and backward, on meta tensors.

The forward is the model's own (`Recommender.forward`). What a rank exchanges with others is put in as tensors of the
sizes that are sent and received, because there is nobody to exchange with. `dry_run` gives what is alive at its
fullest, by part, in each stretch between two of ZeRO-3's events, so that gathered weights can be added to it.

Legend: R rows, L their length, D hidden size, n ids looked up by this rank, u of them distinct, m rows that are looked
up here, k touched rows of this rank, Q queries, N queries of all ranks, M targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.backbone import DualBackbone
from cllm4rec_dist.model.losses import mutual_regularization
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, count_targets
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding
from cllm4rec_dist.planning.tracing import Trace, as_run, leave_out
from cllm4rec_dist.planning.zero3_simulation import Event, record

BACKBONE, ATTENTION, HEAD, WORD_HEAD, LOOKUP, GRADIENTS = (
    "backbone",
    "attention",
    "item head",
    "word head",
    "lookup",
    "gradients",
)
META = torch.device("meta")


@dataclass(frozen=True)
class Exchange:
    """A lookup in one table: n ids, u of them distinct, m rows sent."""

    num_ids: int
    distinct: int
    sent: int


@dataclass(frozen=True)
class Share:
    """A micro-batch of one rank.

    Attributes:
        batch: on the meta device.
        exchanges: lookups by table.
        touched: of `users` and `items`, rows of this rank that are in any document of the step.
        item_queries: of each rank, this one first.
        owned_targets: pairs whose item this rank owns.
    """

    batch: MicroBatch
    exchanges: dict[str, Exchange]
    touched: dict[str, int]
    item_queries: tuple[int, ...]
    owned_targets: int


@dataclass(frozen=True)
class DryRun:
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


def dry_run(dual: DualBackbone, model: Recommender, config: RunConfig, micro_batches: Sequence[Share]) -> DryRun:
    """Run micro-batches one after the other, with their gradients added up; reports the last one.

    Args:
        dual, model: on the meta device, the model with the rows of one rank.
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
            _run(dual, model, config, share, trace)
        stretches.append(trace.mark())
    return DryRun(events, stretches, at_events, trace.live.copy(), trace.flops, trace.operators)


def _mask_packed_rows(dual: DualBackbone) -> None:
    """Give the decoder the mask that it would make of the positions of packed documents, whose values it would read."""
    if dual.decoder.config._attn_implementation != "sdpa":
        return

    def add(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows, length = options["inputs_embeds"].shape[:2]
        mask = torch.empty(rows, 1, length, length, dtype=torch.bool, device=META)
        return arguments, options | {"attention_mask": mask}

    dual.decoder.register_forward_pre_hook(add, with_kwargs=True)


def _run(dual: DualBackbone, model: Recommender, config: RunConfig, share: Share, trace: Trace) -> None:
    """Forward and backward of one micro-batch, as in `train_step`, with its mutual loss."""

    def backbone(tokens: Tensor, positions: Tensor, content_start: int) -> Tensor:
        trace.part = BACKBONE
        hidden = dual(tokens, positions, content_start)
        trace.at_gradient_of(hidden, BACKBONE)
        trace.part = HEAD
        return hidden

    trace.part = LOOKUP
    tokens, item_rows = model.input_embeddings(share.batch, _lookup(model, share.exchanges))
    trace.at_gradient_of(tokens, LOOKUP)
    losses = model(share.batch, tokens, item_rows, backbone, partial(_GatheringQueries, share, trace))
    for name, part in (("text", WORD_HEAD), ("items", HEAD)):
        if name in losses:
            trace.at_gradient_of(losses[name], part)
    trace.part = LOOKUP
    losses["mutual"] = _mutual_loss(model, config, share)
    torch.stack([*losses.values()]).sum().backward()


def _indices(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=META)


class _GatheringQueries(GatheringQueries):
    """`GatheringQueries` of a micro-batch whose counts are known and whose values nobody needs."""

    def __init__(
        self,
        share: Share,
        trace: Trace,
        queries: Tensor,
        target_query: Tensor,
        target_row: Tensor,
        partition: RowPartition,
        world: World,
    ) -> None:
        self._share, self._trace, self._num_rows = share, trace, partition.num_rows
        counts = share.item_queries
        self._gathered = _AllGather.apply(queries, counts) if len(counts) > 1 else queries
        self.num_targets = count_targets(target_query, len(queries))
        trace.part = WORD_HEAD  # what the model computes until it waits

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        self._trace.part = HEAD
        owned = self._share.owned_targets
        return self._gathered, _indices(owned), _indices(owned)

    def sample(self, num_negatives: int, key: Tensor, target_row: Tensor) -> tuple[Tensor, Tensor]:
        """As many rows as can be: some may be drawn twice, or be targets of several queries."""
        drawn = -(-num_negatives // len(self._share.item_queries)) + self._share.owned_targets
        rows = _indices(min(self._num_rows, drawn))
        return rows, torch.empty(len(rows), device=META)

    def reduce(self, lse: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        own = self._share.item_queries[0]
        return lse[:own], scores[:own]


def _lookup(model: Recommender, exchanges: Mapping[str, Exchange]) -> dict[str, Tensor]:
    """`PendingLookup.wait`."""
    tables = {name: model.tables[name] for name in exchanges}
    rows = _LookupRows.apply(model.comm_dtype, tables, exchanges, *(table.local_rows for table in tables.values()))
    num_ids = [exchange.num_ids for exchange in exchanges.values()]
    return dict(zip(tables, rows.index_select(0, _indices(sum(num_ids))).split(num_ids), strict=True))


class _LookupRows(torch.autograd.Function):
    """The tensors of a lookup. Sparse gradients are left out, since meta tensors are dense."""

    @staticmethod
    def forward(
        ctx: Any,
        comm_dtype: torch.dtype,
        tables: Mapping[str, RowShardedEmbedding],
        exchanges: Mapping[str, Exchange],
        *local_rows: Tensor,
    ) -> Tensor:
        ctx.comm_dtype, ctx.tables, ctx.exchanges = comm_dtype, tables, exchanges
        ctx.width = local_rows[0].shape[1]
        sent = torch.empty(sum(e.sent for e in exchanges.values()), ctx.width, dtype=comm_dtype, device=META)
        received = sent.new_empty(sum(e.distinct for e in exchanges.values()), ctx.width)
        return received.float().clone()  # not the same tensor where nothing is rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        received = grad.to(ctx.comm_dtype).new_empty(sum(e.sent for e in ctx.exchanges.values()), ctx.width)
        gradients = []
        for name, table in ctx.tables.items():
            values = received.new_empty(ctx.exchanges[name].sent, ctx.width).float()
            gradients.append(_gradient_of_rows(values, table.sparse_gradients, table.local_rows.shape))
        return None, None, None, *gradients


class _LocalLookup(torch.autograd.Function):
    """The tensors of `RowShardedEmbedding.local_lookup`."""

    @staticmethod
    def forward(ctx: Any, local_rows: Tensor, touched: int, sparse: bool) -> Tensor:
        ctx.sparse, ctx.shape = sparse, local_rows.shape
        return local_rows.new_empty(touched, local_rows.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return _gradient_of_rows(grad, ctx.sparse, ctx.shape), None, None


def _gradient_of_rows(values: Tensor, sparse: bool, shape: torch.Size) -> Tensor | None:
    return None if sparse else values.new_zeros(shape)


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


def _mutual_loss(model: Recommender, config: RunConfig, share: Share) -> Tensor:
    """`Recommender.mutual_loss`."""

    def local_lookup(table: RowShardedEmbedding, touched: int) -> Tensor:
        return _LocalLookup.apply(table.local_rows, touched, table.sparse_gradients)

    collaborative, *content = (
        torch.cat([local_lookup(llm.users, share.touched["users"]), local_lookup(llm.items, share.touched["items"])])
        for llm in (model.collaborative, model.content)
        if llm is not None
    )
    return mutual_regularization(
        collaborative, content[0] if content else None, config.embeddings.lambda_l, config.embeddings.lambda_c
    )
