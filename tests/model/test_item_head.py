"""The item head's queries and output weight equal the paper's formulas, and those of its options by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cllm4rec_dist.model.item_head import ItemHead
from tests.harness import alone

WIDTH = 5


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


HIDDEN, POOLED, ITEMS = normal(3, WIDTH, seed=1), normal(3, WIDTH, seed=2), normal(4, WIDTH, seed=3)
TEMPERATURE = 0.2


def unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def head_scores(**form: Any) -> Tensor:
    settings = {"similarity": "dot", "temperature": TEMPERATURE, "item_bias": False, "pool_residual": False} | form
    head = ItemHead(4, alone(), **settings).double()
    if head.local_bias is not None:
        assert head.output_weight(ITEMS)[:, -1].eq(0).all(), "a bias starts at zero"
        head.local_bias.data = torch.arange(4.0, dtype=torch.float64)[:, None]
    return head.with_bias_column(head.queries(HIDDEN, POOLED)) @ head.output_weight(ITEMS).T


def test_the_papers_head_is_the_tied_inner_product() -> None:
    torch.testing.assert_close(head_scores(), HIDDEN @ ITEMS.T)


def test_the_cosine_head_divides_the_product_of_directions_by_the_temperature() -> None:
    expected = unit(HIDDEN) @ unit(ITEMS).T / TEMPERATURE
    torch.testing.assert_close(head_scores(similarity="cosine"), expected, rtol=1e-6, atol=0)


def test_the_bias_is_added_to_each_items_score() -> None:
    torch.testing.assert_close(head_scores(item_bias=True), HIDDEN @ ITEMS.T + torch.arange(4.0, dtype=torch.float64))


def test_the_pool_residual_adds_the_direction_of_the_items_read() -> None:
    query = HIDDEN + unit(POOLED) * math.sqrt(WIDTH)
    torch.testing.assert_close(head_scores(pool_residual=True), query @ ITEMS.T)
    expected = unit(query) @ unit(ITEMS).T / TEMPERATURE + torch.arange(4.0, dtype=torch.float64)
    both = head_scores(similarity="cosine", item_bias=True, pool_residual=True)
    torch.testing.assert_close(both, expected, rtol=1e-6, atol=0)


def test_a_position_that_has_read_no_item_adds_nothing() -> None:
    head = ItemHead(4, alone(), similarity="dot", temperature=1.0, item_bias=False, pool_residual=True)
    torch.testing.assert_close(head.queries(HIDDEN, torch.zeros_like(HIDDEN)), HIDDEN)


PROJECTION = normal(7, WIDTH, seed=5)
WIDE = normal(3, 7, seed=6)


def projecting_head(projection: Tensor, **form: Any) -> ItemHead:
    settings = {"similarity": "cosine", "temperature": TEMPERATURE, "item_bias": False, "pool_residual": True} | form
    head = ItemHead(4, alone(), **settings, projection=tuple(projection.shape)).double()
    assert head.projection is not None
    assert not head.projection.any(), "it starts at zero"
    head.projection.data = projection
    return head


def test_the_projection_multiplies_hidden_states_of_unit_root_mean_square() -> None:
    added = WIDE / WIDE.square().mean(1, keepdim=True).sqrt() @ PROJECTION
    pooled = unit(POOLED) * math.sqrt(WIDTH)
    for form, query in (({"pool_residual": False}, added), ({}, added + pooled)):
        got = projecting_head(PROJECTION, **form, similarity="dot").queries(WIDE, POOLED)
        torch.testing.assert_close(got, query)
    query = added + pooled
    assert query.norm(dim=1).min() > math.sqrt(WIDTH) / 2
    got = projecting_head(PROJECTION).queries(WIDE, POOLED)
    torch.testing.assert_close(got, unit(query) / TEMPERATURE, rtol=1e-6, atol=0)


def test_a_projection_of_zero_scores_as_the_pooled_rows_alone() -> None:
    zero = torch.zeros_like(PROJECTION)
    for scale in (1, 1e6):  # whatever the backbone says
        queries = projecting_head(zero).queries(WIDE * scale, POOLED)
        torch.testing.assert_close(queries, unit(POOLED) / TEMPERATURE, rtol=1e-6, atol=0)


def test_a_projected_query_shorter_than_half_the_pooled_direction_is_not_normalized() -> None:
    """Without items a query starts at zero; normalizing zero would have a gradient of 1e12."""
    nothing = torch.zeros_like(POOLED)
    for scale in (0.0, 1e-12, 1e-3):
        head = projecting_head(PROJECTION * scale)
        queries = head.queries(WIDE, nothing)
        expected = WIDE / WIDE.square().mean(1, keepdim=True).sqrt() @ PROJECTION * scale
        torch.testing.assert_close(queries, 2 * expected / math.sqrt(WIDTH) / TEMPERATURE)
        queries.sum().backward()
        assert head.projection is not None
        assert head.projection.grad is not None
        assert 0 < head.projection.grad.abs().max() < 100


def test_queries_of_half_precision_states_are_fp32() -> None:
    head = ItemHead(4, alone(), similarity="cosine", temperature=1.0, item_bias=True, pool_residual=True)
    assert head.queries(HIDDEN.bfloat16(), POOLED.bfloat16()).dtype is torch.float32
