"""Documents are those of the paper, read back through the tokenizer; batches hold them unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cllm4rec_dist.config import MethodConfig
from cllm4rec_dist.corpus.collate import TABLES, collate
from cllm4rec_dist.corpus.documents import Documents
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import ContentKind
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.model.build_backbone import train_tokenizer
from tests.documents import Document, collate_each, decode, each

TOKENIZER = WordTokenizer(train_tokenizer(["the quiet trail", "blue espresso"], 320))
SPACE = TokenSpace(num_words=len(TOKENIZER), num_users=30, num_items=100)
ITEMS = np.array([7, 3, 99, 12, 41, 0, 25, 64], dtype=np.int32)


class Single:
    """Split documents into batches of one document each."""

    def __init__(self, made: PromptBuilder) -> None:
        self.all = made

    def collaborative(self, user: int, items: np.ndarray, epoch: int) -> Document:
        return one(plan_and_make(self.all, "collaborative", array(user), Ragged.from_lists([items]), array(epoch)))

    def recommendation(self, user: int, items: np.ndarray, epoch: int) -> Document:
        return one(plan_and_make(self.all, "recommendation", array(user), Ragged.from_lists([items]), array(epoch)))

    def prediction(self, user: int, items: np.ndarray) -> Document:
        return one(self.all.prediction(array(user), Ragged.from_lists([items])))

    def content(self, kind: int, user: int, item: int, words: np.ndarray, epoch: int, example: int) -> Document:
        plan = self.all.plan_content(array(kind), array(len(words)), array(epoch), array(example))
        texts = Ragged.from_lists([words])
        document = one(self.all.content(array(kind), array(user), array(item), texts, plan["keys"]))
        assert len(document.token_ids) == plan["num_tokens"]
        return document


def plan_and_make(
    prompts: PromptBuilder, kind: str, users: np.ndarray, histories: Ragged, epochs: np.ndarray
) -> Documents:
    """Documents of histories, as long as they were planned to be."""
    plan = getattr(prompts, f"plan_{kind}")(users, histories.lengths, epochs)
    num_tokens = plan.pop("num_tokens")
    documents: Documents = getattr(prompts, kind)(users, histories, **plan)
    assert documents.tokens.lengths.tolist() == num_tokens.tolist()
    return documents


def one(documents: Documents) -> Document:
    (document,) = each(documents)
    return document


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def prompts(seed: int = 0, **method: Any) -> Single:
    return Single(PromptBuilder(TOKENIZER, SPACE, MethodConfig(**method), seed))


def text_of(document: Document) -> str:
    """The document in bracket notation, without spaces next to a slot (`with<item_3>`)."""
    return decode(TOKENIZER, document.token_ids.tolist(), SPACE)


def brackets(items: Any) -> str:
    return "".join(f"<item_{item}>" for item in items)


def shown_items(document: Document) -> list[int]:
    return [t - SPACE.first_item for t in document.token_ids.tolist() if t >= SPACE.first_item]


def test_the_collaborative_document_is_the_papers() -> None:
    document = prompts(order="fixed").collaborative(4, ITEMS, epoch=0)
    assert text_of(document) == f"<user_4> has interacted with{brackets(ITEMS)}"


def test_every_item_is_predicted_from_the_token_before_it() -> None:
    for order in ("fixed", "shuffled"):
        document = prompts(order=order).collaborative(4, ITEMS, epoch=0)
        assert sorted(document.targets.tolist()) == sorted(ITEMS.tolist())
        assert document.target_query.tolist() == list(range(len(ITEMS)))
        predicted = document.token_ids[document.queries + 1] - SPACE.first_item
        assert predicted.tolist() == document.targets.tolist()
        # The first one from the last token of the prompt, which is a word.
        prompt = TOKENIZER.encode("<user_4> has interacted with", SPACE)
        assert document.queries[0] == len(prompt) - 1
        assert document.token_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("make", ["collaborative", "recommendation"])
def test_shuffled_orders_differ_between_visits_and_users_and_are_repeatable(make: str) -> None:
    def order(epoch: int, user: int = 4, seed: int = 0, **method: Any) -> list[int]:
        return shown_items(getattr(prompts(seed, **method), make)(user, ITEMS, epoch))

    assert order(0) == order(0)
    visits = [order(epoch) for epoch in range(5)]
    assert len({tuple(visit) for visit in visits}) == 5
    assert order(0, user=5) != order(0)
    assert order(0, seed=1) != order(0)


def test_a_fixed_order_is_the_stored_one_at_every_visit() -> None:
    fixed = prompts(order="fixed")
    for epoch in range(3):
        assert shown_items(fixed.collaborative(4, ITEMS, epoch)) == ITEMS.tolist()
        shown = shown_items(fixed.recommendation(4, ITEMS, epoch))
        assert shown == [item for item in ITEMS.tolist() if item in shown]


def test_the_recommendation_document_is_the_papers() -> None:
    document = prompts().recommendation(4, ITEMS, epoch=1)
    shown = shown_items(document)
    assert text_of(document) == f"<user_4> has interacted with{brackets(shown)},<user_4> will interact with"
    assert document.queries.tolist() == [len(document.token_ids) - 1], "read from the last position"
    assert set(document.target_query.tolist()) == {0}


def test_held_out_targets_are_those_that_are_not_shown() -> None:
    for epoch in range(20):
        document = prompts(target="held_out").recommendation(4, ITEMS, epoch)
        assert sorted([*shown_items(document), *document.targets.tolist()]) == sorted(ITEMS.tolist())


def test_all_targets_are_all_items_though_some_are_masked() -> None:
    for epoch in range(20):
        document = prompts(target="all").recommendation(4, ITEMS, epoch)
        assert sorted(document.targets.tolist()) == sorted(ITEMS.tolist())
        assert 0 < len(shown_items(document)) < len(ITEMS)


def test_masked_shares_fill_their_range() -> None:
    items = np.arange(100)
    made = prompts(mask_ratio=(0.3, 0.6))
    masked = [len(made.recommendation(4, items, epoch).targets) for epoch in range(200)]
    assert 30 <= min(masked) <= 35
    assert 55 <= max(masked) <= 60
    counts = np.bincount(
        np.concatenate([made.recommendation(4, items, epoch).targets for epoch in range(200)]), minlength=100
    )
    assert counts.min() > 50, "an item is hardly ever masked"


def test_one_item_at_least_is_masked_and_one_shown() -> None:
    for share in (0.01, 0.99):
        made = prompts(mask_ratio=(share, share))
        for count in (2, 3, 8):
            document = made.recommendation(4, ITEMS[:count], epoch=0)
            assert len(document.targets) == (1 if share < 0.5 else count - 1)
            assert len(shown_items(document)) == count - len(document.targets)


@pytest.mark.parametrize("target", ["held_out", "all"])
def test_the_only_item_of_a_user_is_masked(target: str) -> None:
    document = prompts(target=target).recommendation(4, ITEMS[:1], epoch=0)
    assert text_of(document) == "<user_4> has interacted with,<user_4> will interact with"
    assert document.targets.tolist() == [7]


def test_a_long_history_is_cut_to_random_items_or_to_the_last_ones() -> None:
    seen: set[int] = set()
    for epoch in range(20):
        items = shown_items(prompts(max_history=3).collaborative(4, ITEMS, epoch))
        assert len(items) == len(set(items)) == 3
        seen |= set(items)
    assert seen == set(ITEMS.tolist())
    fixed = prompts(max_history=3, order="fixed")
    assert fixed.collaborative(4, ITEMS, 0).targets.tolist() == [0, 25, 64]
    document = prompts(max_history=3, target="all").recommendation(4, ITEMS, 0)
    assert len(document.targets) == 3


def test_a_prediction_shows_the_last_items_in_stored_order() -> None:
    document = prompts(max_history=5).prediction(4, ITEMS)
    assert text_of(document) == f"<user_4> has interacted with{brackets(ITEMS[-5:])},<user_4> will interact with"
    assert document.queries.tolist() == [len(document.token_ids) - 1]
    assert len(document.targets) == 0


CONTENT = {
    ContentKind.USER_ITEM: "<user_4> writes the review for<item_9>:",
    ContentKind.ITEM_TITLE: "The title of<item_9> is:",
    ContentKind.ITEM_DESCRIPTION: "The description of<item_9> is:",
    ContentKind.USER_PROFILE: "The profile of<user_4> is:",
}


@pytest.mark.parametrize("kind", CONTENT)
def test_content_documents_are_the_papers_and_every_word_is_predicted(kind: ContentKind) -> None:
    words = np.array(TOKENIZER.encode_batch([" quiet trail <item_3>"])[0], dtype=np.int32)
    document = prompts().content(int(kind), 4, 9, words, epoch=0, example=17)
    assert text_of(document) == f"{CONTENT[kind]} quiet trail <item_3>"
    assert (document.token_ids >= SPACE.first_user).sum() == CONTENT[kind].count("<"), "a text's bracket is no token"
    assert document.targets.tolist() == words.tolist()
    assert document.token_ids[document.queries + 1].tolist() == words.tolist()
    assert document.target_query.tolist() == list(range(len(words)))
    assert document.token_ids.dtype == np.int64


def test_dropout_keys_differ_between_visits_documents_and_kinds() -> None:
    made = prompts()
    words = np.array([1, 2], dtype=np.int32)
    keys = [
        document.key
        for epoch in range(3)
        for row in range(3)
        for document in (
            made.collaborative(row, ITEMS, epoch),
            made.recommendation(row, ITEMS, epoch),
            made.content(1, row, 0, words, epoch, example=row),
        )
    ]
    assert len(set(keys)) == 27
    assert all(0 <= key < 1 << 62 for key in keys)


def some_histories(count: int = 60) -> Ragged:
    random = np.random.default_rng(0)
    return Ragged.from_lists([random.permutation(100)[: random.integers(1, 40)] for _ in range(count)])


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
@pytest.mark.parametrize("target", ["held_out", "all"])
def test_documents_of_a_batch_are_those_made_alone(order: str, target: str) -> None:
    made = prompts(order=order, target=target, max_history=30)
    histories, random = some_histories(), np.random.default_rng(1)
    users, items, epochs = (random.integers(0, 30, 60) for _ in range(3))
    kinds = random.integers(0, 4, 60)
    alone = [(int(u), h, int(e)) for u, h, e in zip(users, histories, epochs, strict=True)]
    batches = {
        "collaborative": [made.collaborative(*one) for one in alone],
        "recommendation": [made.recommendation(*one) for one in alone],
        "prediction": [made.prediction(u, h) for u, h, _ in alone],
        "content": [
            made.content(int(k), u, int(i), h, e, 7 * n)
            for n, ((u, h, e), k, i) in enumerate(zip(alone, kinds, items, strict=True))
        ],
    }
    plan = made.all.plan_content(kinds, histories.lengths, epochs, 7 * np.arange(60))
    together = {
        "collaborative": plan_and_make(made.all, "collaborative", users, histories, epochs),
        "recommendation": plan_and_make(made.all, "recommendation", users, histories, epochs),
        "prediction": made.all.prediction(users, histories),
        "content": made.all.content(kinds, users, items, histories, plan["keys"]),
    }
    for name, documents in together.items():
        assert len(documents) == 60
        for got, expected in zip(each(documents), batches[name], strict=True):
            for field, value in vars(expected).items():
                np.testing.assert_array_equal(getattr(got, field), value, err_msg=f"{name} {field}")
    assert plan["num_tokens"].tolist() == together["content"].tokens.lengths.tolist()


def test_every_order_and_every_mask_is_equally_likely() -> None:
    count = 24_000
    histories = Ragged.from_lengths(np.full(count, 4), np.tile(np.arange(4), count))
    users, epochs = np.arange(count) % 30, np.arange(count) // 30
    made = prompts(mask_ratio=0.5).all
    orders = plan_and_make(made, "collaborative", users, histories, epochs).targets.values.reshape(count, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    expected = count / 24
    # Five standard deviations of a fair draw.
    assert abs(counts - expected).max() < 5 * expected**0.5
    again = orders[:-30] == orders[30:]  # a user's next epoch
    assert again.mean() == pytest.approx(1 / 4, abs=5 * (3 / 16 / again.size) ** 0.5)

    masks = np.sort(
        plan_and_make(made, "recommendation", users, histories, epochs).targets.values.reshape(count, 2), axis=1
    )
    _, counts = np.unique(masks, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - count / 6).max() < 5 * (count / 6) ** 0.5
    shown = (
        plan_and_make(made, "recommendation", users, histories, epochs).tokens.values.reshape(count, -1)
        - SPACE.first_item
    )
    shown = shown[shown >= 0].reshape(count, 2)
    assert (shown[:, 0] < shown[:, 1]).mean() == pytest.approx(0.5, abs=5 * (0.25 / count) ** 0.5)


@pytest.mark.slow
def test_masked_shares_are_uniform() -> None:
    count = 20_000
    histories = Ragged.from_lengths(np.full(count, 100), np.tile(np.arange(100), count))
    made = prompts(mask_ratio=(0.2, 0.6)).all
    share = (
        plan_and_make(made, "recommendation", np.zeros(count, np.int64), histories, np.arange(count)).targets.lengths
        / 100
    )
    assert share.mean() == pytest.approx(0.4, abs=5 * 0.4 / (12 * count) ** 0.5)
    assert share.std() == pytest.approx(0.4 / 12**0.5, rel=0.03)


def test_a_prefix_that_the_backbone_expects_comes_first() -> None:
    tokenizer = WordTokenizer(train_tokenizer(["the quiet trail", "blue espresso"], 320))
    tokenizer.prefix = [0]
    made = Single(PromptBuilder(tokenizer, SPACE, MethodConfig(order="fixed"), 0))
    bare = prompts(order="fixed")
    for name in ("collaborative", "recommendation"):
        document, without = getattr(made, name)(4, ITEMS, 0), getattr(bare, name)(4, ITEMS, 0)
        assert document.token_ids.tolist() == [0, *without.token_ids.tolist()]
        assert document.queries.tolist() == (without.queries + 1).tolist()


def test_collate_holds_uneven_documents_unchanged() -> None:
    made = prompts(order="fixed")
    words = np.array(TOKENIZER.encode_batch([" quiet trail"])[0], dtype=np.int32)
    documents = [
        made.collaborative(4, ITEMS[:2], 0),
        made.recommendation(29, ITEMS, 0),
        made.content(int(ContentKind.USER_ITEM), 1, 99, words, 0, 5),
    ]
    batch = collate_each(documents[:2], SPACE, documents[2:])
    assert batch.num_tokens == sum(len(d.token_ids) for d in documents)
    assert batch.word_ids.shape == batch.positions.shape == batch.keys.shape

    tokens = batch.word_ids.flatten().clone()
    for loss, (users, items) in TABLES.items():
        for table, first in ((users, SPACE.first_user), (items, SPACE.first_item)):
            positions = batch.id_positions[table]
            assert not tokens[positions].any()
            assert positions.tolist() == sorted(positions.tolist())
            assert ((positions < batch.content_start) == (loss == "items")).all()
            tokens[positions] = batch.ids[table] + first
    positions, keys = batch.positions.flatten(), batch.keys.flatten()
    left = torch.ones(len(tokens), dtype=torch.bool)
    for index, document in enumerate(documents):
        loss = ("items", "text")[index // 2]
        queries = batch.query_positions[loss][batch.target_query[loss]]
        (start,) = torch.nonzero((keys == document.key) & (positions == 0)).flatten().tolist()
        stop = start + len(document.token_ids)
        assert tokens[start:stop].tolist() == document.token_ids.tolist()
        assert positions[start:stop].tolist() == list(range(stop - start))
        assert (keys[start:stop] == document.key).all()
        assert start // batch.word_ids.shape[1] == (stop - 1) // batch.word_ids.shape[1], "cut by the end of a row"
        # Each target's query and value.
        mine = (queries >= start) & (queries < stop)
        assert (queries[mine] - start).tolist() == document.queries[document.target_query].tolist()
        assert batch.targets[loss][mine].tolist() == document.targets.tolist()
        left[start:stop] = False
    assert not tokens[left].any()
    assert not positions[left].any()
    assert sum(map(len, batch.query_positions.values())) == sum(len(d.queries) for d in documents)


def test_collate_of_no_document_is_one_padding_token_that_predicts_nothing() -> None:
    batch = collate_each([], SPACE)
    assert batch.word_ids.tolist() == [[0]]
    assert batch.num_tokens == 0
    assert [*batch.targets] == ["items"]
    assert [*batch.ids] == [*TABLES["items"]]
    for empty in (batch, collate_each([], SPACE, [])):
        for tensors in (empty.ids, empty.id_positions, empty.query_positions, empty.target_query, empty.targets):
            assert all(len(tensor) == 0 for tensor in tensors.values())
    assert batch.keys.tolist() == batch.positions.tolist() == [[0]]


def test_a_batch_moves_with_every_tensor() -> None:
    batch = collate_each([prompts().collaborative(4, ITEMS, 0)], SPACE, []).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    tensors += [tensor for value in vars(batch).values() if isinstance(value, dict) for tensor in value.values()]
    assert len(tensors) == 3 + 2 * 4 + 3 * 2
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.num_tokens > 0


def named(documents: Documents) -> np.ndarray:
    """The user row of each document's first user token."""
    return np.array([tokens[tokens >= SPACE.first_user][0] for tokens in documents.tokens])


@pytest.mark.parametrize("make", ["collaborative", "recommendation"])
def test_a_share_of_prompts_names_the_shared_user_and_nothing_else_changes(make: str) -> None:
    count = 600
    users, histories = np.arange(count) % 29, Ragged.from_lists([ITEMS] * count)
    epochs = np.arange(count) // 29

    def documents(ratio: float) -> Documents:
        prompts = PromptBuilder(TOKENIZER, SPACE, MethodConfig(shared_user_ratio=ratio), 0)
        return plan_and_make(prompts, make, users, histories, epochs)

    user_rows, some, everybody = (documents(ratio) for ratio in (0.0, 0.3, 1.0))
    shared = SPACE.first_user + SPACE.num_users - 1
    assert (named(user_rows) == SPACE.first_user + users).all()
    assert (named(everybody) == shared).all()
    drawn = named(some) == shared
    assert drawn.mean() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / count) ** 0.5)
    assert (named(some)[~drawn] == named(user_rows)[~drawn]).all()
    # A user has different rows in different epochs, but only one in a document.
    assert 0 < drawn[users == 3].mean() < 1
    users_of = [{t for t in d.token_ids.tolist() if SPACE.first_user <= t < SPACE.first_item} for d in each(some)]
    assert {len(rows) for rows in users_of} == {1}
    for one_, other in zip(each(some), each(user_rows), strict=True):
        is_user = (other.token_ids >= SPACE.first_user) & (other.token_ids < SPACE.first_item)
        assert (one_.token_ids[~is_user] == other.token_ids[~is_user]).all()
        assert (one_.targets == other.targets).all()
        assert one_.key == other.key


def test_texts_keep_the_users_they_are_about() -> None:
    prompts = PromptBuilder(TOKENIZER, SPACE, MethodConfig(shared_user_ratio=1.0), 0)
    kinds = array(ContentKind.USER_ITEM, ContentKind.USER_PROFILE)
    words = Ragged.from_lists([[1, 2], [3]])
    documents = prompts.content(kinds, array(4, 5), array(0, 0), words, array(0, 1).astype(np.uint64))
    assert named(documents).tolist() == [SPACE.first_user + 4, SPACE.first_user + 5]


def test_somebody_without_a_row_is_the_shared_user_or_nobody() -> None:
    users, histories = array(-1, 4), Ragged.from_lists([ITEMS, ITEMS])
    shared = PromptBuilder(TOKENIZER, SPACE, MethodConfig(shared_user_ratio=0.1), 0).prediction(users, histories)
    assert named(shared).tolist() == [SPACE.first_item - 1, SPACE.first_user + 4]
    nobody = PromptBuilder(TOKENIZER, SPACE, MethodConfig(), 0).prediction(users, histories)
    assert named(nobody)[1] == SPACE.first_user + 4
    batch = collate(nobody, SPACE)
    assert (nobody.tokens[0] == SPACE.no_user).sum() == 2, "the prompt names its user twice"
    assert batch.no_user_positions is not None
    assert len(batch.no_user_positions) == 2
    assert batch.ids["collaborative.users"].tolist() == [4, 4]
    assert batch.ids["collaborative.items"].tolist() == [*ITEMS.tolist(), *ITEMS.tolist()]
    assert int(batch.word_ids.max()) < SPACE.num_words
    assert collate(shared, SPACE).no_user_positions is None


def test_a_pretrained_run_predicts_the_next_item_of_the_documents_that_it_was_trained_on() -> None:
    histories, users = Ragged.from_lists([ITEMS, ITEMS[:0]]), array(4, 2)
    prompts = PromptBuilder(TOKENIZER, SPACE, MethodConfig(order="fixed"), 0, stage="pretrain")
    trained = prompts.collaborative(users, histories, array(0, 1).astype(np.uint64))
    predicted = prompts.prediction(users, histories)
    for index in range(len(users)):
        assert predicted.tokens[index].tolist() == trained.tokens[index].tolist()
    # Without a history the last token is the prompt's, which predicts the first item in training.
    assert predicted.queries.values.tolist() == [len(tokens) - 1 for tokens in (trained.tokens[0], trained.tokens[1])]
