"""Forward and backward of one rank's micro-batch on meta tensors.

The forward is `Recommender.forward`. Collectives are replaced by tensors of the sizes that are sent and received.
`dry_run` returns the peak memory by part between each two of ZeRO-3's events, to which gathered weights can be added.

Legend: R rows, L their length, D hidden size, n ids looked up by this rank, u of them distinct, m rows of this rank
that all ranks look up, k touched rows of this rank, Q queries, N queries of all ranks, M targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.backbone import DualBackbone
from cllm4rec_dist.model.linear_cross_entropy import count_targets
from cllm4rec_dist.model.losses import mutual_regularization
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding
from cllm4rec_dist.planning.tracing import Trace, emulate_kernels, exclude
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
    """Sizes of a lookup in one table: n ids, u of them distinct, m rows sent."""

    num_ids: int
    distinct: int
    sent: int


@dataclass(frozen=True)
class RankMicroBatch:
    """A micro-batch of one rank.

    Attributes:
        batch: tensors on the meta device.
        exchanges: lookups by table.
        touched: number of this rank's `users` and `items` rows that appear in any document of the step.
        item_queries: number of item queries of each rank, this rank first.
        owned_targets: number of targets whose item this rank owns.
    """

    batch: MicroBatch
    exchanges: dict[str, Exchange]
    touched: dict[str, int]
    item_queries: tuple[int, ...]
    owned_targets: int


@dataclass(frozen=True)
class DryRun:
    """Trace of a dry run. Counters are by part.

    Attributes:
        events: ZeRO-3's events, in order.
        peaks: peak bytes alive before the first event, between each two, and after the last.
        at_events: bytes alive at each event.
        remaining: bytes alive at the end: dense gradients.
        flops, operators: FLOPs and number of operators.
    """

    events: list[Event]
    peaks: list[Counter[str]]
    at_events: list[Counter[str]]
    remaining: Counter[str]
    flops: Counter[str]
    operators: Counter[str]


def dry_run(
    dual: DualBackbone, model: Recommender, config: RunConfig, micro_batches: Sequence[RankMicroBatch]
) -> DryRun:
    """Run micro-batches one after the other, accumulating gradients; trace the last one.

    Args:
        dual, model: on the meta device; the model has the rows of one rank.
    """
    trace = Trace(LOOKUP)
    parameters = [*dual.parameters(), *model.parameters()]
    exclude([*parameters, *dual.buffers(), model.words.embedding, model.words.head])
    events: list[Event] = []
    peaks: list[Counter[str]] = []
    at_events: list[Counter[str]] = []

    def note(event: Event) -> None:
        events.append(event)
        peaks.append(trace.mark())
        at_events.append(trace.live.copy())
        if not event.fetch and not event.forward:  # ZeRO-3 takes a layer's gradients at the end of its backward
            for parameter in event.module.parameters():
                parameter.grad = None

    def count_as_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.is_sparse:
            trace.reassign(parameter.grad, GRADIENTS)

    record(dual, dual.layers, note)
    _mask_packed_rows(dual)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count_as_gradient)
    for micro_batch in micro_batches:
        events.clear()
        peaks.clear()
        at_events.clear()
        trace.flops.clear()
        trace.operators.clear()
        trace.mark()
        with trace, emulate_kernels(trace):
            _run(dual, model, config, micro_batch, trace)
        for parameter in model.parameters():  # the item softmax does not pass its gradient through the hooks
            count_as_gradient(parameter)
        peaks.append(trace.mark())
    return DryRun(events, peaks, at_events, trace.live.copy(), trace.flops, trace.operators)


def _mask_packed_rows(dual: DualBackbone) -> None:
    """Pass the decoder the attention mask of packed documents, which would be made from the values of positions."""
    attention = dual.decoder.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return

    def packed_mask(embeddings: Tensor, _: Tensor) -> Tensor:
        rows, length = embeddings.shape[:2]
        dtype = torch.bool if attention == "sdpa" else embeddings.dtype
        return torch.empty(rows, 1, length, length, dtype=dtype, device=META)

    dual.packed_mask = packed_mask


def _run(dual: DualBackbone, model: Recommender, config: RunConfig, micro_batch: RankMicroBatch, trace: Trace) -> None:
    """Run forward and backward of one micro-batch with the mutual loss, as in `train_step`."""

    def backbone(tokens: Tensor, positions: Tensor, content_start: int) -> Tensor:
        trace.part = BACKBONE
        hidden = dual(tokens, positions, content_start)
        trace.at_gradient_of(hidden, BACKBONE)
        trace.part = HEAD
        return hidden

    trace.part = LOOKUP
    tokens, item_rows = model.input_embeddings(micro_batch.batch, _lookup(model, micro_batch.exchanges))
    trace.at_gradient_of(tokens, LOOKUP)
    losses = model(micro_batch.batch, tokens, item_rows, backbone, partial(_GatheringQueries, micro_batch, trace))
    for name, part in (("text", WORD_HEAD), ("items", HEAD)):
        if name in losses:
            trace.at_gradient_of(losses[name], part)
    trace.part = LOOKUP
    losses["mutual"] = _mutual_loss(model, config, micro_batch.touched)
    torch.stack([*losses.values()]).sum().backward()


def _empty_index(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=META)


class _GatheringQueries(GatheringQueries):
    """`GatheringQueries` on meta tensors, with the counts of a sampled micro-batch."""

    def __init__(
        self,
        micro_batch: RankMicroBatch,
        trace: Trace,
        queries: Tensor,
        target_query: Tensor,
        target_row: Tensor,
        partition: RowPartition,
        world: World,
        comm_dtype: torch.dtype | None = None,
    ) -> None:
        self._micro_batch, self._trace, self._num_rows = micro_batch, trace, partition.num_rows
        self.queries, counts = queries, micro_batch.item_queries
        if comm_dtype is not None:
            self._gathered = _AllGatherRounded.apply(queries, counts, comm_dtype)
        else:
            self._gathered = _AllGather.apply(queries, counts) if len(counts) > 1 else queries
        self.num_targets = count_targets(target_query, len(queries))
        trace.part = WORD_HEAD  # what the model computes until it waits

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        self._trace.part = HEAD
        owned = self._micro_batch.owned_targets
        return self._gathered, _empty_index(owned), _empty_index(owned)

    def sample(
        self, num_negatives: int, key: Tensor, target_row: Tensor, cumulative_counts: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """Return the maximum number of rows; in a run, duplicates make it smaller."""
        drawn = -(-num_negatives // len(self._micro_batch.item_queries)) + self._micro_batch.owned_targets
        rows = _empty_index(min(self._num_rows, drawn))
        return rows, torch.empty(len(rows), device=META)

    def reduce(self, lse: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        num_local = self._micro_batch.item_queries[0]
        return lse[:num_local], scores[:num_local]


def _lookup(model: Recommender, exchanges: Mapping[str, Exchange]) -> dict[str, Tensor]:
    """Replace `PendingLookup.wait`."""
    tables = {name: model.tables[name] for name in exchanges}
    rows = _LookupRows.apply(model.comm_dtype, tables, exchanges, *(table.local_rows for table in tables.values()))
    num_ids = [exchange.num_ids for exchange in exchanges.values()]
    return dict(zip(tables, rows.index_select(0, _empty_index(sum(num_ids))).split(num_ids), strict=True))


class _LookupRows(torch.autograd.Function):
    """Allocates the tensors of a lookup. Sparse gradients are left out, since meta tensors are dense."""

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
        return received.float().clone()  # a new tensor even if nothing is rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        received = grad.to(ctx.comm_dtype).new_empty(sum(e.sent for e in ctx.exchanges.values()), ctx.width)
        gradients = []
        for name, table in ctx.tables.items():
            values = received.new_empty(ctx.exchanges[name].sent, ctx.width).float()
            gradients.append(_gradient_of_rows(values, table.sparse_gradients, table.local_rows.shape))
        return None, None, None, *gradients


class _LocalLookup(torch.autograd.Function):
    """Allocates the tensors of `RowShardedEmbedding.local_lookup`."""

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
    """Allocates the tensors of `collectives.all_gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts, longest = counts, max(counts)
        padded, gathered = x.new_empty(longest, x.shape[1]), x.new_empty(longest * len(counts), x.shape[1])
        del padded
        return gathered if min(counts) == longest else gathered.new_empty(sum(counts), x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.new_empty(max(ctx.counts) * len(ctx.counts), grad.shape[1])
        local = padded.new_empty(max(ctx.counts), grad.shape[1])
        return local[: ctx.counts[0]], None


class _AllGatherRounded(torch.autograd.Function):
    """Allocates the tensors of `sharded_cross_entropy._GatherRoundedQueries`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], comm_dtype: torch.dtype) -> Tensor:
        ctx.counts = counts
        rounded = x.to(comm_dtype)
        return rounded if len(counts) == 1 else _AllGather.forward(ctx, rounded, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        received = grad if len(ctx.counts) == 1 else grad.new_empty(len(ctx.counts) * ctx.counts[0], grad.shape[1])
        return received.view(len(ctx.counts), ctx.counts[0], grad.shape[1]).sum(0, dtype=torch.float32), None, None


def _mutual_loss(model: Recommender, config: RunConfig, touched: Mapping[str, int]) -> Tensor:
    """Replace `Recommender.mutual_loss`."""

    def local_lookup(table: RowShardedEmbedding, num_rows: int) -> Tensor:
        return _LocalLookup.apply(table.local_rows, num_rows, table.sparse_gradients)

    collaborative, *content = (
        torch.cat([local_lookup(llm.users, touched["users"]), local_lookup(llm.items, touched["items"])])
        for llm in (model.collaborative, model.content)
        if llm is not None
    )
    return mutual_regularization(
        collaborative, content[0] if content else None, config.embeddings.lambda_l, config.embeddings.lambda_c
    )
