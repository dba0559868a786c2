"""torch: versions of tensors, values of sparse gradients, and what the planner watches."""

from __future__ import annotations

import gc

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from cllm4rec_dist.planning import tracing
from tests.private_apis.listing import relies_on


@relies_on("model/sharded_embedding.py", "_version")
def test_torch_counts_changes_of_a_tensor() -> None:
    """A lookup asserts by `_version` that a table has not changed between its start and its backward.

    If this fails, the assertion sees nothing, or fails in each step: see `start_lookup`.
    """
    rows = torch.nn.Parameter(torch.zeros(3, 2))
    before = rows._version
    rows.index_select(0, torch.tensor([1]))
    assert rows._version == before
    with torch.no_grad():
        rows[1:].add_(1)
    assert rows._version > before


@relies_on("step.py", "_values")
@relies_on("model/embedding_optimizer.py", "_nnz")
def test_torch_gives_the_values_of_a_sparse_gradient_to_change() -> None:
    """Gradients of tables are divided and clipped in place through `_values`; `values()` would be a copy in autograd.

    If this fails, tables are trained on gradients that are not clipped: see `_values` in step.py.
    """
    indices = torch.tensor([[2, 0, 2]])
    gradient = torch.sparse_coo_tensor(indices, torch.ones(3, 2), (4, 2), check_invariants=True).coalesce()
    assert gradient._nnz() == 2
    gradient._values().mul_(3)
    assert gradient.to_dense().tolist() == [[3, 3], [0, 0], [6, 6], [0, 0]]


@relies_on("planning/zero3_simulation.py", "_C", "_current_graph_task_id")
def test_torch_numbers_the_backward_that_is_running() -> None:
    """The planner tells a forward that backward repeats, for an activation checkpoint, from the first one by this.

    If this fails, plans of runs with activation checkpointing count what is gathered wrongly: see `_hook`.
    """
    inside: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        inside.append(torch._C._current_graph_task_id() != -1)
        return x.exp()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert inside == [False, True]
    assert torch._C._current_graph_task_id() == -1


@relies_on("planning/tracing.py", "_python_dispatch", "_pytree", "_overloadpacket", "_counted_for")
@relies_on("planning/zero3_simulation.py", "_pytree")
def test_torch_shows_every_operator_and_keeps_a_storage_the_same_object() -> None:
    """`Trace` counts products by the packet of an operator and storages once, by an attribute that it sets on them.

    If this fails, plans count FLOPs or memory wrongly: see torch/utils/_python_dispatch.py and flop_counter.py, which
    does the same.
    """
    assert torch.ops.aten.mm.default._overloadpacket in flop_registry
    with tracing.Trace("here") as trace:
        x = torch.empty(4, 8, device="meta")
        y = x.view(8, 4) @ x  # a view is the same storage
    assert trace.live == {"here": 4 * (32 + 64)}
    assert trace.flops == {"here": 2 * 8 * 4 * 8}
    assert y.view(-1).untyped_storage()._counted_for == ["here"]  # type: ignore[attr-defined]
    del x, y
    gc.collect()
    assert trace.live == {"here": 0}
