"""Losses and gradients of rows that are narrower than the backbone equal a dense fp64 reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.embedding_init import init_input_projection
from cllm4rec_dist.model.recommender import Recommender, keyed_dropout
from tests.documents import Document, collate_each
from tests.harness import alone, run_ranks

WORDS, USERS, ITEMS, HIDDEN, WIDTH, DROPOUT = 10, 7, 11, 8, 5, 0.3
LAMBDAS = 0.3, 0.7
SPACE = TokenSpace(WORDS, USERS, ITEMS)
FIRST_USER, FIRST_ITEM = SPACE.first_user, SPACE.first_item


def item_document(user: int, items: list[int], targets: list[int], key: int) -> Document:
    """A user and items, of which the last one predicts; the first position predicts, too, before any item."""
    tokens = np.array([3, FIRST_USER + user, 5, *(FIRST_ITEM + item for item in items)])
    return Document(
        tokens, np.array([2, len(tokens) - 1]), np.array([0, *[1] * (len(targets) - 1)]), np.array(targets), key
    )


ITEM_DOCUMENTS = [
    item_document(0, [1, 4, 10], [2, 3], key=11),
    item_document(6, [10], [0, 1, 9], key=1 << 40),
    item_document(3, [7, 7, 2, 5], [10, 10], key=5),
    item_document(2, [0, 3], [4, 6, 8], key=77),
]
TEXT_DOCUMENTS = [
    Document(
        np.array([1, FIRST_USER + 1, 2, FIRST_ITEM + 9, 4, 8]), np.array([3, 4]), np.array([0, 1]), np.array([4, 8]), 21
    ),
    Document(np.array([FIRST_ITEM + 10, 6, FIRST_USER + 6]), np.array([2]), np.array([0]), np.array([7]), 22),
]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    """Whole parameters, fp32."""
    projection = torch.zeros(WIDTH, HIDDEN)
    init_input_projection(projection, alone(), seed=1)
    return {
        "collaborative.users": normal(USERS, WIDTH, seed=1),
        "collaborative.items": normal(ITEMS, WIDTH, seed=2),
        "content.users": normal(USERS, WIDTH, seed=3),
        "content.items": normal(ITEMS, WIDTH, seed=4),
        "head.bias": normal(ITEMS, 1, seed=5),
        "head.projection": normal(HIDDEN, WIDTH, seed=6) * 0.4,
        "input_projection": projection,
    }


WORD_EMBEDDINGS, WORD_HEAD = normal(WORDS, HIDDEN, seed=7), normal(WORDS, HIDDEN, seed=8)
BACKBONE = normal(HIDDEN, HIDDEN, seed=9)


def backbone(tokens: Tensor, positions: Tensor, content_start: int) -> Tensor:
    """Mixes nothing between positions, so that packing needs no mask."""
    return torch.tanh(tokens @ BACKBONE.to(tokens))


def sharded(world: World, head: dict[str, str]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss sums over ranks, and this rank's gradients of their sum; two micro-batches, the last rank may have none."""
    model = Recommender(
        USERS,
        ITEMS,
        FrozenEmbeddings(WORD_EMBEDDINGS, WORD_HEAD),
        HeadConfig(**head),
        world,
        dropout=DROPOUT,
        comm_dtype=torch.float32,
        sparse_gradients=True,
        content=True,
        width=WIDTH,
        max_logits=7,
    )
    whole = weights()
    with torch.no_grad():
        for name, parameter, partition in model.sharded_parameters():
            parameter.copy_(whole[name][slice(*partition.range(world.rank))])
        for name, parameter in model.replicated_parameters():
            parameter.copy_(whole.get(name, parameter))
    first = max(1, world.size - 1)  # the last of several ranks has nothing to read
    items, texts = (
        documents[world.rank :: first] if world.rank < first else [] for documents in (ITEM_DOCUMENTS, TEXT_DOCUMENTS)
    )
    batches = [collate_each(items[half::2], SPACE, texts[half::2]) for half in (0, 1)]
    routes = model.route(batches)
    losses: dict[str, Tensor] = {"mutual": model.mutual_loss(model.touched(routes), *LAMBDAS)}
    for batch, (tokens, item_rows) in zip(batches, model.embed(batches, routes), strict=True):
        for name, loss in model(batch, tokens, item_rows, backbone).items():
            losses[name] = losses.get(name, torch.zeros(())) + loss
    torch.stack([*losses.values()]).sum().backward()
    gradients = {name: p.grad.to_dense() for name, p, _ in model.sharded_parameters() if p.grad is not None}
    for name, parameter in model.replicated_parameters():
        assert parameter.grad is not None, name
        gradients[name] = all_reduce_sum(parameter.grad, world)
    return {name: all_reduce_sum(loss, world).item() for name, loss in losses.items()}, gradients


def dense(head: dict[str, str]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients in fp64, document by document."""
    cosine = head["similarity"] == "cosine"
    parameters = {name: value.double().requires_grad_() for name, value in weights().items()}
    parameters["head.log_temperature"] = torch.tensor(math.log(0.1), dtype=torch.float64, requires_grad=True)

    def embed(document: Document, llm: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Input embedding of each token, and its row if it is an item."""
        for position, token in enumerate(document.token_ids.tolist()):
            if token < FIRST_USER:
                yield WORD_EMBEDDINGS[token].double(), None
                continue
            kind, index = ("users", token - FIRST_USER) if token < FIRST_ITEM else ("items", token - FIRST_ITEM)
            mask = keyed_dropout(
                torch.ones(1, WIDTH, dtype=torch.float64),
                torch.tensor([document.key]),
                torch.tensor([position]),
                DROPOUT,
            )[0]
            row = parameters[f"{llm}.{kind}"][index] * mask
            yield row @ parameters["input_projection"], row if kind == "items" else None

    items, texts = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    table = parameters["collaborative.items"]
    for document in ITEM_DOCUMENTS:
        inputs, rows = zip(*embed(document, "collaborative"), strict=True)
        hidden = torch.tanh(torch.stack(inputs) @ BACKBONE.double())
        for query, target in zip(document.target_query, document.targets, strict=True):
            position = int(document.queries[query])
            state = hidden[position] / hidden[position].norm() * HIDDEN**0.5 @ parameters["head.projection"]
            read = [row for row in rows[: position + 1] if row is not None]
            if read:
                state = state + F.normalize(torch.stack(read).sum(0), dim=0) * WIDTH**0.5
            if cosine:
                state = state / state.norm().clamp_min(WIDTH**0.5 / 2) / parameters["head.log_temperature"].exp()
            logits = (F.normalize(table, dim=1) if cosine else table) @ state + parameters["head.bias"][:, 0]
            items = items - logits.log_softmax(0)[target]
    for document in TEXT_DOCUMENTS:
        inputs, _ = zip(*embed(document, "content"), strict=True)
        hidden = torch.tanh(torch.stack(inputs) @ BACKBONE.double())
        logits = hidden[document.queries] @ WORD_HEAD.double().T
        texts = texts + F.cross_entropy(logits, torch.from_numpy(document.targets), reduction="sum")
    tokens = {int(t) for document in [*ITEM_DOCUMENTS, *TEXT_DOCUMENTS] for t in document.token_ids if t >= FIRST_USER}
    collaborative, content = (
        torch.cat([parameters[f"{llm}.users"], parameters[f"{llm}.items"]])[torch.tensor(sorted(tokens)) - FIRST_USER]
        for llm in ("collaborative", "content")
    )
    mutual = LAMBDAS[1] / 2 * (content - collaborative).square().sum() + LAMBDAS[0] / 2 * collaborative.square().sum()
    losses = {"items": items, "text": texts, "mutual": mutual}
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_losses_and_gradients_equal_the_dense_reference(size: int, similarity: str) -> None:
    head = {"similarity": similarity}
    ranks = run_ranks(size, sharded, head)
    losses, gradients = dense(head)
    assert len(gradients) == (8 if similarity == "cosine" else 7)
    for rank, (got, _) in enumerate(ranks):
        assert got == pytest.approx(losses, rel=1e-6), rank
    for name, expected in gradients.items():
        parts = [rank[1][name] for rank in ranks]
        replicated = name in ("head.log_temperature", "head.projection", "input_projection")
        whole = parts[0] if replicated else torch.cat(parts)
        assert (whole - expected).abs().max() <= 2e-6 * expected.abs().max(), name


def test_projected_rows_start_on_the_scale_of_the_rows_at_the_same_angles() -> None:
    projection = torch.zeros(WIDTH, HIDDEN)
    init_input_projection(projection, alone(), seed=3)
    torch.testing.assert_close(projection @ projection.T, torch.eye(WIDTH) * HIDDEN / WIDTH)
    rows = normal(50, WIDTH, seed=1)
    projected = rows @ projection
    torch.testing.assert_close(projected.square().mean(), rows.square().mean())
    torch.testing.assert_close(
        F.cosine_similarity(projected[:25], projected[25:]), F.cosine_similarity(rows[:25], rows[25:])
    )
    other = torch.zeros(WIDTH, HIDDEN)
    init_input_projection(other, alone(), seed=4)
    assert not torch.allclose(other, projection)
