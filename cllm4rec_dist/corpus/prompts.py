"""Documents: a heterogeneous prompt and a homogeneous main text, composed when a batch is made.

Everything that may change between visits (order, masking) or between runs (templates) happens here and not on disk.
Randomness is a function of (seed, epoch, row), so that a document is the same on whichever rank it is made. All
documents of a batch are made at once, by operations on whole arrays.

The documents of the paper, in bracket notation:

    collaborative   <user_i> has interacted with | <item_j> <item_k> ...             every item is predicted
    recommendation  <user_i> has interacted with <the rest>, <user_i> will interact with |     held-out items
    content         <user_i> writes the review for <item_j>: | words ...             every word is predicted

Legend: n documents, R rows, L their length, Q places that predict, M targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.config import MethodConfig
from cllm4rec_dist.corpus.keyed import keyed_bits, keyed_places, keyed_uniform
from cllm4rec_dist.corpus.packing import pack
from cllm4rec_dist.corpus.ragged import Ragged, ranges
from cllm4rec_dist.corpus.shards import ContentKind
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer

COLLABORATIVE_PROMPT = "{user} has interacted with {items}"
RECOMMENDATION_PROMPT = "{user} has interacted with {items}, {user} will interact with"
CONTENT_PROMPTS = {
    ContentKind.USER_ITEM: "{user} writes the review for {item}:",
    ContentKind.ITEM_TITLE: "The title of {item} is:",
    ContentKind.ITEM_DESCRIPTION: "The description of {item} is:",
    ContentKind.USER_PROFILE: "The profile of {user} is:",
}
_HISTORY = len(ContentKind)
"""Number of the template that a history follows; those of texts have the numbers of their kinds."""
_COLLABORATIVE, _RECOMMENDATION, _CONTENT = range(3)
"""Streams of documents, and below what is drawn for each document: part of the keys of their random numbers."""
_ORDER, _SHARE, _MASK, _DROPOUT, _SHARED_USER = range(5)


@dataclass(frozen=True)
class Document:
    """One sequence and what is predicted in it.

    Attributes:
        token_ids: int64 [t] in the common id space.
        queries: int64 [q] positions whose hidden state predicts.
        target_query: int64 [m] index into `queries` for each target.
        targets: int64 [m] item rows, or word ids.
        key: seed of this document's embedding dropout.
    """

    token_ids: np.ndarray
    queries: np.ndarray
    target_query: np.ndarray
    targets: np.ndarray
    key: int


@dataclass(frozen=True)
class Documents:
    """n documents, in the form in which they are made: the attributes of `Document`, a row for each.

    Attributes:
        tokens, queries, target_query, targets: n rows.
        keys: int64 [n].
    """

    tokens: Ragged
    queries: Ragged
    target_query: Ragged
    targets: Ragged
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Document]:
        keys = self.keys.tolist()
        return map(Document, self.tokens, self.queries, self.target_query, self.targets, keys)

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Documents:
        """Of single ones."""
        rows = lambda name: Ragged.from_lists([getattr(document, name) for document in documents], np.int64)  # noqa: E731
        keys = np.array([document.key for document in documents], np.int64)
        return cls(rows("token_ids"), rows("queries"), rows("target_query"), rows("targets"), keys)


@dataclass(frozen=True)
class DocumentBatch:
    """What the documents of one LLM ask of the rows of a micro-batch. A place is flat: row * L + column.

    Attributes:
        user_places, user_ids: int64 [..]; where user tokens stand, in rising order, and their rows.
        item_places, item_ids: the same for items.
        query_places: int64 [Q].
        target_query, targets: int64 [M]; index into query_places, item row or word id.
    """

    user_places: Tensor
    user_ids: Tensor
    item_places: Tensor
    item_ids: Tensor
    query_places: Tensor
    target_query: Tensor
    targets: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> DocumentBatch:
        """The same with `change` made to every tensor."""
        return DocumentBatch(**{name: change(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class MicroBatch:
    """What one engine forward reads: documents of both LLMs, packed into R rows of L places (`packing.py`).

    Attributes:
        word_ids: int64 [R, L]; 0 where no word stands.
        positions: int64 [R, L] of each token in its own document.
        keys: int64 [R, L] of the document that a token is of.
        items: documents over items; they stand before `boundary`.
        words: documents over words, behind it; None without content LLM.
        boundary: flat place.
        num_tokens: real tokens, padding not counted.
        no_user_places: int64 [..], flat; where somebody stands who has no row. None where nobody does.
    """

    word_ids: Tensor
    positions: Tensor
    keys: Tensor
    items: DocumentBatch
    words: DocumentBatch | None
    boundary: int
    num_tokens: int
    no_user_places: Tensor | None = None

    @property
    def documents(self) -> list[DocumentBatch]:
        """Those over items, and those over words if there are any."""
        return [self.items] if self.words is None else [self.items, self.words]

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`; out of pinned memory it is copied while the caller goes on."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same batch in memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, DocumentBatch):
                changed[name] = value.each(change)
        return replace(self, **changed)


class Composer:
    """Makes documents of corpus examples, a batch at a time.

    Args:
        tokenizer: of the backbone.
        space: its words and user and item rows; the last user row is the shared one, where the method has it.
        method: order, target, mask share, longest history, share of prompts with the shared user row.
        seed: of orders, masks and dropout keys.

    Arguments of the methods, for n documents: `users`, `items`, `kinds`: int64 [n] rows or kinds; `histories`, `words`:
    n rows of items or word ids; `counts`: int64 [n] values of each of them; `epochs`: int64 [n], the visits.
    """

    def __init__(self, tokenizer: WordTokenizer, space: TokenSpace, method: MethodConfig, seed: int) -> None:
        self.space, self.method, self.seed = space, method, seed
        begin, end = RECOMMENDATION_PROMPT.split("{items}")
        assert begin + "{items}" == COLLABORATIVE_PROMPT
        texts = [CONTENT_PROMPTS[ContentKind(kind)] for kind in range(len(ContentKind))]
        self._templates = Ragged.from_lists([_compile(tokenizer, text, space) for text in (*texts, begin)], np.int64)
        self._end = np.array(_encode(tokenizer, end, space), np.int64)
        self._anyone = space.num_users - 1 if method.shared_user_ratio > 0 else space.no_user - space.first_user

    def collaborative(self, users: np.ndarray, histories: Ragged, epochs: np.ndarray) -> Documents:
        """Item language modeling: every item is predicted, the first one from the prompt's last token."""
        keys = self._keys(_COLLABORATIVE, epochs, users)
        prompts = self._prompts(_HISTORY, self._named(users, keys))
        return self._predicted(prompts, self._arrange(histories, keys), keys, are_items=True)

    def collaborative_lengths(self, users: np.ndarray, counts: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """int64 [n] tokens that `collaborative` makes."""
        return self._templates.lengths[_HISTORY] + np.minimum(counts, self.method.max_history)

    def recommendation(self, users: np.ndarray, histories: Ragged, epochs: np.ndarray) -> Documents:
        """Multinomial finetuning: a random share of the items is masked and predicted from the last position.

        At least one item is masked; at least one is shown where the user has two or more.
        """
        keys = self._keys(_RECOMMENDATION, epochs, users)
        arranged = self._arrange(histories, keys)
        num_masked = self._num_masked(keys, arranged.lengths)
        masked = keyed_places(keyed_bits(keys, _MASK), arranged.lengths) < np.repeat(num_masked, arranged.lengths)
        targets = arranged.keep(masked) if self.method.target == "held_out" else arranged
        return self._recommended(self._named(users, keys), arranged.keep(~masked), targets, keys)

    def recommendation_lengths(self, users: np.ndarray, counts: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """int64 [n] tokens that `recommendation` makes."""
        counts = np.minimum(counts, self.method.max_history)
        num_shown = counts - self._num_masked(self._keys(_RECOMMENDATION, epochs, users), counts)
        return self._templates.lengths[_HISTORY] + num_shown + len(self._end)

    def prediction(self, users: np.ndarray, histories: Ragged) -> Documents:
        """The same prompt over the whole history, in stored order, with nothing to predict but from its end.

        Args:
            users: -1 for somebody without a row: the shared row stands for them, or the zero vector without one.
        """
        users = np.where(users < 0, self._anyone, users)
        nothing = Ragged.from_lengths(np.zeros(len(users), np.int64), np.empty(0, np.int64))
        shown = histories.last(self.method.max_history)
        return self._recommended(users, shown, nothing, np.zeros(len(users), np.uint64))

    def content(
        self, kinds: np.ndarray, users: np.ndarray, items: np.ndarray, words: Ragged, epochs: np.ndarray,
        numbers: np.ndarray,
    ) -> Documents:  # fmt: skip
        """Language modeling of texts about a user, an item or both; `numbers`: int64 [n] that tell texts apart."""
        keys = self._keys(_CONTENT, epochs, numbers)
        return self._predicted(self._prompts(kinds, users, items), words, keys, are_items=False)

    def content_lengths(self, kinds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """int64 [n] tokens that `content` makes."""
        return self._templates.lengths[kinds] + counts

    def _named(self, users: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The users that prompts name: a share of them, drawn by their keys, by the shared row."""
        return np.where(keyed_uniform(keys, _SHARED_USER) < self.method.shared_user_ratio, self._anyone, users)

    def _keys(self, stream: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return keyed_bits(self.seed, stream, epochs, rows)

    def _num_masked(self, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
        low, high = self.method.mask_ratio
        share = low + (high - low) * keyed_uniform(keys, _SHARE)
        return np.clip(np.rint(share * counts).astype(np.int64), 1, np.maximum(1, counts - 1))

    def _arrange(self, histories: Ragged, keys: np.ndarray) -> Ragged:
        """The users' items in this visit's order, at most `max_history` of each."""
        longest = self.method.max_history
        if self.method.order == "fixed":
            return histories.last(longest)
        places = keyed_places(keyed_bits(keys, _ORDER), histories.lengths)
        shuffled = np.empty_like(histories.values)
        shuffled[places + np.repeat(histories.offsets[:-1], histories.lengths)] = histories.values
        return Ragged(histories.offsets, shuffled).last(longest)

    def _prompts(self, templates: int | np.ndarray, users: np.ndarray, items: np.ndarray | None = None) -> Ragged:
        """Templates with their users and items put in."""
        return self._about(self._templates.take(np.broadcast_to(templates, len(users))), users, items)

    def _about(self, prompts: Ragged, users: np.ndarray, items: np.ndarray | None = None) -> Ragged:
        """Prompts about user 0 and item 0 -> the same about others."""
        tokens, rows = prompts.values, prompts.rows
        tokens = tokens + np.where(tokens == self.space.first_user, users[rows], 0)
        if items is not None:
            tokens += np.where(prompts.values == self.space.first_item, items[rows], 0)
        return Ragged(prompts.offsets, tokens)

    def _predicted(self, prompts: Ragged, main: Ragged, keys: np.ndarray, *, are_items: bool) -> Documents:
        """Prompts and main texts of which every token is predicted from the one before it."""
        tokens = main.values.astype(np.int64) + (self.space.first_item if are_items else 0)
        each = lambda starts: Ragged(main.offsets, ranges(starts, main.lengths))  # noqa: E731
        return Documents(
            Ragged.beside([prompts, Ragged(main.offsets, tokens)]),
            each(prompts.lengths - 1),
            each(np.zeros(len(main), np.int64)),
            main,
            _dropout_keys(keys),
        )

    def _recommended(self, users: np.ndarray, shown: Ragged, targets: Ragged, keys: np.ndarray) -> Documents:
        """Everything is predicted from the last token."""
        items = Ragged(shown.offsets, shown.values.astype(np.int64) + self.space.first_item)
        ends = Ragged.from_lengths(np.full(len(users), len(self._end)), np.tile(self._end, len(users)))
        tokens = Ragged.beside([self._prompts(_HISTORY, users), items, self._about(ends, users)])
        queries = Ragged(np.arange(len(users) + 1), tokens.lengths - 1)
        first = Ragged(targets.offsets, np.zeros_like(targets.values))
        return Documents(tokens, queries, first, targets, _dropout_keys(keys))


def largest_prompt_id(tokenizer: WordTokenizer) -> int:
    """Largest word id in any prompt, the start of a sequence included."""
    texts = [*CONTENT_PROMPTS.values(), *RECOMMENDATION_PROMPT.split("{items}")]
    # Without words the tokens of user 0 and item 0 are 0 and 1, so the largest id is a word's.
    return max(token_id for text in texts for token_id in _compile(tokenizer, text, TokenSpace(0, 1, 1)))


def _compile(tokenizer: WordTokenizer, template: str, space: TokenSpace) -> list[int]:
    """A prompt's tokens about user 0 and item 0, with what the backbone expects at the start of a sequence."""
    return [*tokenizer.prefix, *_encode(tokenizer, template, space)]


def _encode(tokenizer: WordTokenizer, template: str, space: TokenSpace) -> list[int]:
    # A byte-level tokenizer keeps the blank before a word in the word; the one before a slot belongs to the slot.
    bare = re.sub(r" (?=\{|$)", "", template)
    return tokenizer.encode(bare.format(user="<user_0>", item="<item_0>"), space)


def _dropout_keys(keys: np.ndarray) -> np.ndarray:
    return (keyed_bits(keys, _DROPOUT) >> np.uint64(2)).astype(np.int64)


def collate(
    items: Documents | Sequence[Document], space: TokenSpace, words: Documents | Sequence[Document] | None = None
) -> MicroBatch:
    """Pack documents over items, and over words where there is a content LLM, into one batch.

    No document at all gives one place of padding that predicts nothing, because every rank must run every forward.
    """
    groups = [d if isinstance(d, Documents) else Documents.of(d) for d in (items, words if words is not None else ())]
    lengths = [documents.tokens.lengths for documents in groups]
    packing = pack(lengths[0], lengths[1])
    # Each place that is left is a document of one token, which nobody reads.
    tokens, positions, keys = np.zeros((3, packing.num_places), np.int64)
    for documents, starts, length in zip(groups, packing.starts, lengths, strict=True):
        places = ranges(starts, length)
        tokens[places] = documents.tokens.values
        positions[places] = ranges(np.zeros_like(length), length)
        keys[places] = np.repeat(documents.keys, length)
    found = [
        _asked(documents, starts, tokens, places, space)
        for documents, starts, places in zip(
            groups, packing.starts, (slice(0, packing.boundary), slice(packing.boundary, None)), strict=True
        )
    ]
    shaped = lambda values: _tensor(values.reshape(packing.shape))  # noqa: E731
    no_user = np.flatnonzero(tokens == space.no_user)
    return MicroBatch(
        word_ids=shaped(np.where(tokens < space.first_user, tokens, 0)),
        positions=shaped(positions),
        keys=shaped(keys),
        items=found[0],
        words=None if words is None else found[1],
        boundary=packing.boundary,
        num_tokens=sum(int(length.sum()) for length in lengths),
        no_user_places=_tensor(no_user) if len(no_user) else None,
    )


def _asked(
    documents: Documents, starts: np.ndarray, tokens: np.ndarray, places: slice, space: TokenSpace
) -> DocumentBatch:
    """Of documents that stand from `starts` on, and have `places` of the flat `tokens` for themselves."""
    own = tokens[places]
    is_item = (own >= space.first_item) & (own < space.size)
    is_user = (own >= space.first_user) & (own < space.first_item)
    return DocumentBatch(
        user_places=_tensor(np.flatnonzero(is_user) + places.start),
        user_ids=_tensor(own[is_user] - space.first_user),
        item_places=_tensor(np.flatnonzero(is_item) + places.start),
        item_ids=_tensor(own[is_item] - space.first_item),
        query_places=_tensor(_shifted(documents.queries, starts)),
        target_query=_tensor(_shifted(documents.target_query, documents.queries.offsets[:-1])),
        targets=_tensor(documents.targets.values),
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def _shifted(lists: Ragged, shifts: np.ndarray) -> np.ndarray:
    """The values of all lists, those of each shifted by its own number."""
    return lists.values + np.repeat(shifts, lists.lengths)
