"""Keyed dropout, input embeddings, and pooled item rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.recommender import Recommender, keyed_dropout
from tests.documents import Document, collate_each
from tests.harness import alone

WIDTH = 8
SPACE = TokenSpace(num_words=10, num_users=4, num_items=6)


def keys_of(count: int) -> Tensor:
    return torch.randint(1 << 62, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_a_fraction_p_and_scales_the_rest(p: float) -> None:
    count, width = 2000, 64
    dropped = keyed_dropout(torch.ones(count, width), keys_of(count), torch.arange(count) % 50, p)
    kept = dropped != 0
    # Five standard deviations of a fair draw of so many entries.
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5)
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - p)))
    # No row or column of the mask is special.
    assert kept.double().mean(0).sub(1 - p).abs().max() < 6 * (p * (1 - p) / count) ** 0.5
    assert kept.double().mean(1).sub(1 - p).abs().max() < 6 * (p * (1 - p) / width) ** 0.5


def test_the_mask_does_not_depend_on_how_a_batch_is_split() -> None:
    x, keys, positions = torch.ones(12, WIDTH), keys_of(12), torch.arange(12)
    whole = keyed_dropout(x, keys, positions, 0.5)
    parts = [keyed_dropout(x[i], keys[i], positions[i], 0.5) for i in (slice(0, 5), slice(5, 6), slice(6, 12))]
    assert torch.equal(torch.cat(parts), whole)
    turned = torch.arange(12).flip(0)
    assert torch.equal(keyed_dropout(x, keys[turned], positions[turned], 0.5), whole[turned])


def test_the_mask_differs_with_key_and_with_position() -> None:
    count, width = 300, 64
    x, key, position = torch.ones(count, width), keys_of(1).expand(count), torch.zeros(count, dtype=torch.int64)
    by_position = keyed_dropout(x, key, torch.arange(count), 0.5) != 0
    by_key = keyed_dropout(x, torch.arange(count), position, 0.5) != 0
    for masks in (by_position, by_key):
        assert len(masks.unique(dim=0)) == count
        agreement = (masks[1:] == masks[:-1]).double().mean().item()
        assert agreement == pytest.approx(0.5, abs=0.02), "masks that follow each other resemble each other"


def test_the_gradient_of_dropout_has_the_mask_of_its_value() -> None:
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    keys = keys_of(5)
    y = keyed_dropout(x, keys, torch.arange(5), 0.3)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(y.detach() != 0, 1 / 0.7, 0.0).to(x.dtype))


def embed(model: Recommender, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Input embeddings, and the item rows in them."""
    ((tokens, item_rows),) = model.embed([batch], model.route([batch]))
    return tokens, item_rows


def document(token_ids: list[int], queries: list[int], key: int) -> Document:
    empty = np.empty(0, dtype=np.int64)
    return Document(np.array(token_ids), np.array(queries), empty, empty, key)


# Words 0..9, users 10..13, items 14..19.
FIRST = document([3, 11, 5, 14, 19, 14], [2, 5], key=1 << 40)
SECOND = document([13, 7, 16], [0, 2], key=77)


def batch() -> MicroBatch:
    return collate_each([FIRST, SECOND], SPACE)


def recommender(
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    pool: bool = True,
    comm_dtype: torch.dtype = torch.float32,
) -> Recommender:
    random = torch.Generator().manual_seed(0)
    embedding = torch.randn(SPACE.num_words, WIDTH, generator=random).to(dtype)
    head = HeadConfig(similarity="dot", item_bias=False, pool_residual=pool)
    words = FrozenEmbeddings(embedding, embedding)
    model = Recommender(
        4, 6, words, head, alone(), dropout=dropout, comm_dtype=comm_dtype, sparse_gradients=False, content=True
    )
    assert model.content is not None
    for rows in (model.collaborative, model.content):
        for table in (rows.users, rows.items):
            table.local_rows.data = torch.randn(table.local_rows.shape, generator=random)
    return model


def with_sparse_gradients(width: int | None = None, **head: Any) -> Recommender:
    words, options = (
        FrozenEmbeddings(*torch.zeros(2, SPACE.num_words, WIDTH)),
        {"dropout": 0.0, "comm_dtype": torch.float32, "sparse_gradients": True, "content": True},
    )
    return Recommender(4, 6, words, HeadConfig(**head), alone(), **options, width=width)


def row_of(model: Recommender, which: str, token_id: int) -> Tensor:
    """The embedding of a token of the common id space."""
    rows = getattr(model, which)
    if token_id < SPACE.first_user:
        return model.words.embedding[token_id]
    if token_id < SPACE.first_item:
        return rows.users.local_rows[token_id - SPACE.first_user]
    return rows.items.local_rows[token_id - SPACE.first_item]


@pytest.mark.parametrize("which", ["collaborative", "content"])
def test_embeddings_are_at_the_positions_of_their_tokens(which: str) -> None:
    model = recommender()
    documents = batch() if which == "collaborative" else collate_each([], SPACE, [FIRST, SECOND])
    embedded, item_rows = embed(model, documents)
    assert embedded.shape == (1, 9, WIDTH), "both in one row"
    token_ids = [*FIRST.token_ids.tolist(), *SECOND.token_ids.tolist()]
    for position, token_id in enumerate(token_ids):
        assert torch.equal(embedded[0, position], row_of(model, which, token_id)), position
    items = [t for doc in (FIRST, SECOND) for t in doc.token_ids.tolist() if t >= SPACE.first_item]
    if which == "collaborative":
        assert torch.equal(item_rows, torch.stack([row_of(model, which, t) for t in items]))


def test_every_use_of_a_row_adds_to_its_gradient() -> None:
    model = recommender()
    embedded, _ = embed(model, batch())
    embedded.sum().backward()
    users, items = model.collaborative.users.local_rows.grad, model.collaborative.items.local_rows.grad
    assert users is not None
    assert items is not None
    assert users[:, 0].tolist() == [0, 1, 0, 1]
    assert items.to_dense()[:, 0].tolist() == [2, 0, 1, 0, 0, 1]
    assert model.content is not None
    assert model.content.users.local_rows.grad is None


def test_embeddings_have_the_dtype_of_the_words_and_item_rows_stay_fp32() -> None:
    model = recommender(dtype=torch.bfloat16)
    embedded, item_rows = embed(model, batch())
    assert (embedded.dtype, item_rows.dtype) == (torch.bfloat16, torch.float32)


def test_bf16_communication_rounds_only_the_looked_up_rows() -> None:
    exact, rounded = recommender(), recommender(comm_dtype=torch.bfloat16)
    (expected, expected_rows), (embedded, item_rows) = embed(exact, batch()), embed(rounded, batch())
    assert torch.equal(item_rows, expected_rows.bfloat16().float())
    flat_index = torch.cat([*batch().id_positions.values()])
    expected.flatten(0, 1)[flat_index] = expected.flatten(0, 1)[flat_index].bfloat16().float()
    assert torch.equal(embedded, expected)
    assert torch.equal(rounded.output_weight(), exact.output_weight())


def test_the_lookup_of_the_next_micro_batch_is_started_before_one_is_used() -> None:
    model = recommender()
    batches = [collate_each([document], SPACE) for document in (FIRST, SECOND)]
    embedded = model.embed(batches, model.route(batches))
    next(embedded)
    with torch.no_grad():
        model.collaborative.users.local_rows.add_(1)
    with pytest.raises(AssertionError, match="changed"):
        next(embedded)


def test_dropout_touches_users_and_items_alone_and_only_in_training() -> None:
    model, plain = recommender(dropout=0.5), recommender()
    expected, _ = embed(plain, batch())
    embedded, item_rows = embed(model, batch())
    words = torch.ones(9, dtype=torch.bool)
    users, items = batch().id_positions.values()
    words[torch.cat([users, items])] = False
    assert torch.equal(embedded.flatten(0, 1)[words], expected.flatten(0, 1)[words])
    for positions in (users, items):
        rows, exact = embedded.flatten(0, 1)[positions], expected.flatten(0, 1)[positions]
        assert (rows == 0).any()
        assert torch.equal(rows[rows != 0], 2 * exact[rows != 0])
    assert torch.equal(embedded.flatten(0, 1)[items], item_rows)
    # Two positions of an item in one document have different masks.
    assert not torch.equal(embedded[0, 3], embedded[0, 5])
    model.eval()
    assert torch.equal(embed(model, batch())[0], expected)


def test_dropout_does_not_depend_on_the_batch_a_document_is_in() -> None:
    model = recommender(dropout=0.5)
    together, _ = embed(model, batch())
    alone_, _ = embed(model, collate_each([SECOND], SPACE))
    assert torch.equal(together[0, 6:], alone_[0])


def test_queries_pool_the_item_rows_up_to_their_position() -> None:
    model = recommender()
    _, item_rows = embed(model, batch())
    hidden = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(2))
    queries = model.item_queries(hidden, item_rows, batch())
    items = model.collaborative.items.local_rows
    # Two items of FIRST are the same row; the first queries of both documents come before any item.
    pooled = [torch.zeros(WIDTH), 2 * items[0] + items[5], torch.zeros(WIDTH), items[2]]
    states = [hidden[0, position] for position in (2, 5, 6, 8)]
    for query, state, pool in zip(queries, states, pooled, strict=True):
        expected = state + torch.nn.functional.normalize(pool, dim=0) * WIDTH**0.5
        torch.testing.assert_close(query, expected)
    torch.testing.assert_close(recommender(pool=False).item_queries(hidden, item_rows, batch()), torch.stack(states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_user_without_a_row_is_embedded_as_zeros(dtype: torch.dtype) -> None:
    model = recommender(dtype=dtype)
    nobody = document([3, SPACE.no_user, 5, 14, SPACE.no_user], [4], key=1)
    embedded, item_rows = embed(model, collate_each([FIRST, nobody], SPACE))
    assert torch.equal(embedded[0, [7, 10]], torch.zeros(2, WIDTH, dtype=dtype))
    for position, token_id in ((6, 3), (8, 5), (9, 14), *enumerate(FIRST.token_ids.tolist())):
        assert torch.equal(embedded[0, position], row_of(model, "collaborative", token_id).to(dtype)), position
    assert len(item_rows) == 4


def test_a_batch_without_documents_passes_through() -> None:
    model = recommender(dropout=0.5)
    nothing = collate_each([], SPACE)
    embedded, item_rows = embed(model, nothing)
    assert embedded.shape == (1, 1, WIDTH)
    assert model.item_queries(embedded, item_rows, nothing).shape == (0, WIDTH)


def test_parameters_are_named_once_and_split_by_the_right_rows() -> None:
    model = with_sparse_gradients(projection=True)
    sharded = {name: partition.num_rows for name, _, partition in model.sharded_parameters()}
    assert sharded == {
        "collaborative.users": 4,
        "collaborative.items": 6,
        "content.users": 4,
        "content.items": 6,
        "head.bias": 6,
    }
    assert [name for name, _ in model.replicated_parameters()] == ["head.log_temperature", "head.projection"]
    assert [name for name, _ in with_sparse_gradients().replicated_parameters()] == ["head.log_temperature"]
    named = {id(p) for _, p, _ in model.sharded_parameters()} | {id(p) for _, p in model.replicated_parameters()}
    assert named == {id(p) for p in model.parameters()}
    assert model.content is not None


def test_rows_as_wide_as_the_backbone_have_no_projection() -> None:
    names = [[name for name, _ in with_sparse_gradients(width).named_parameters()] for width in (WIDTH, None)]
    assert names[0] == names[1]
    assert not any("projection" in name for name in names[0])


def test_narrow_rows_have_both_projections() -> None:
    for asked in (False, True):
        model = with_sparse_gradients(3, projection=asked)
        shapes = {name: tuple(p.shape) for name, p in model.replicated_parameters()}
        assert shapes == {"head.log_temperature": (), "head.projection": (WIDTH, 3), "input_projection": (3, WIDTH)}
        assert {table.local_rows.shape[1] for table in model.tables.values()} == {3}


def layouts(model: Recommender) -> dict[str, bool]:
    """Tell for each table if its gradient is sparse after two micro-batches and the mutual loss."""
    batches = [collate_each([FIRST, SECOND], SPACE, [FIRST, SECOND]) for _ in range(2)]
    routes = model.route(batches)
    for index, (tokens, item_rows) in enumerate(model.embed(batches, routes)):
        losses = model(batches[index], tokens, item_rows, lambda embedded, *_: embedded)
        if index == 1:
            losses["mutual"] = model.mutual_loss(model.touched(routes), 0.3, 0.7)
        torch.stack([*losses.values()]).sum().backward()
    gradients = {name: table.local_rows.grad for name, table in model.tables.items()}
    return {name: gradient.is_sparse for name, gradient in gradients.items() if gradient is not None}


def test_only_the_gradient_of_the_softmax_weight_is_dense() -> None:
    assert layouts(with_sparse_gradients()) == {
        "collaborative.users": True,
        "collaborative.items": False,
        "content.users": True,
        "content.items": True,
    }
    assert not any(layouts(recommender()).values())
    assert all(layouts(with_sparse_gradients(num_negatives=2)).values())
