"""Documents: a heterogeneous prompt and a homogeneous main text, composed when a batch is made.

Everything that may change between visits (order, masking) or between runs (templates) happens here and not on disk.
Randomness is a function of (seed, epoch, row), so that a document is the same on whichever rank it is made.

The documents of the paper, in bracket notation:

    collaborative   <user_i> has interacted with | <item_j> <item_k> ...             every item is predicted
    recommendation  <user_i> has interacted with <the rest>, <user_i> will interact with |     held-out items
    content         <user_i> writes the review for <item_j>: | words ...             every word is predicted

Legend: R rows, L their length, Q places that predict, M targets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.config import MethodConfig
from cllm4rec_dist.corpus.packing import Packing, pack, ranges
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
_SLOT = re.compile(r"(\{\w+\})")


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
class DocumentBatch:
    """Documents as tensors, packed into R rows of L positions (`packing.py`). A place is flat: row * L + column.

    Attributes:
        word_ids: int64 [R, L]; 0 where no word stands.
        positions: int64 [R, L] of each token in its own document.
        keys: int64 [R, L] of the document that a token is of.
        user_places, user_ids: int64 [..]; where user tokens stand and their rows.
        item_places, item_ids: the same for items.
        query_places: int64 [Q].
        target_query, targets: int64 [M]; index into query_places, item row or word id.
        num_tokens: real tokens, padding not counted.
    """

    word_ids: Tensor
    positions: Tensor
    keys: Tensor
    user_places: Tensor
    user_ids: Tensor
    item_places: Tensor
    item_ids: Tensor
    query_places: Tensor
    target_query: Tensor
    targets: Tensor
    num_tokens: int

    def to(self, device: torch.device) -> DocumentBatch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


class Composer:
    """Makes documents of corpus examples.

    Args:
        tokenizer: of the backbone.
        space: its words and the corpus's users and items.
        method: order, target, mask share, longest history.
        seed: of orders, masks and dropout keys.
    """

    def __init__(self, tokenizer: WordTokenizer, space: TokenSpace, method: MethodConfig, seed: int) -> None:
        self.space, self.method, self.seed = space, method, seed
        self._collaborative = self._compile(tokenizer, COLLABORATIVE_PROMPT)
        self._recommendation = self._compile(tokenizer, RECOMMENDATION_PROMPT)
        self._content = {int(kind): self._compile(tokenizer, text) for kind, text in CONTENT_PROMPTS.items()}

    def _compile(self, tokenizer: WordTokenizer, template: str) -> list[np.ndarray | str]:
        pieces = [piece for piece in _SLOT.split(template) if piece.strip()]
        # A byte-level tokenizer keeps the blank before a word in the word; the one after it belongs to the slot.
        compiled: list[np.ndarray | str] = [np.array(tokenizer.prefix, dtype=np.int64)]
        for piece in pieces:
            words = np.array(tokenizer.encode(piece.rstrip(), self.space), dtype=np.int64)
            compiled.append(piece if _SLOT.fullmatch(piece) else words)
        return compiled

    def _fill(self, template: list[np.ndarray | str], **slots: np.ndarray) -> np.ndarray:
        return np.concatenate([slots[piece[1:-1]] if isinstance(piece, str) else piece for piece in template])

    def _user(self, row: int) -> np.ndarray:
        return np.array([self.space.first_user + row], dtype=np.int64)

    def _random(self, stream: int, epoch: int, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, epoch, row])

    def _arrange(self, items: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The user's items in this visit's order, at most `max_history` of them."""
        longest = self.method.max_history
        if self.method.order == "shuffled":
            return random.permutation(items)[:longest]
        return items[-longest:]

    def collaborative(self, user: int, items: np.ndarray, epoch: int) -> Document:
        """Item language modeling: every item is predicted, the first one from the prompt's last token."""
        random = self._random(0, epoch, user)
        arranged = self._arrange(items.astype(np.int64), random)
        token_ids = self._fill(self._collaborative, user=self._user(user), items=self.space.first_item + arranged)
        start = len(token_ids) - len(arranged)
        queries = np.arange(start - 1, len(token_ids) - 1)
        return Document(token_ids, queries, np.arange(len(queries)), arranged, _key(random))

    def recommendation(self, user: int, items: np.ndarray, epoch: int) -> Document:
        """Multinomial finetuning: a random share of the items is masked and predicted from the last position.

        At least one item is masked; at least one is shown where the user has two or more.
        """
        random = self._random(1, epoch, user)
        arranged = self._arrange(items.astype(np.int64), random)
        share = random.uniform(*self.method.mask_share)
        num_masked = min(max(1, round(share * len(arranged))), max(1, len(arranged) - 1))
        masked = np.zeros(len(arranged), dtype=bool)
        masked[random.choice(len(arranged), num_masked, replace=False)] = True
        targets = arranged[masked] if self.method.target == "held_out" else arranged
        return self._recommend(user, arranged[~masked], targets, _key(random))

    def prediction(self, user: int, items: np.ndarray) -> Document:
        """The same prompt over the whole history, in stored order, with nothing to predict but from its end."""
        return self._recommend(user, items.astype(np.int64)[-self.method.max_history :], np.empty(0, np.int64), 0)

    def _recommend(self, user: int, shown: np.ndarray, targets: np.ndarray, key: int) -> Document:
        token_ids = self._fill(self._recommendation, user=self._user(user), items=self.space.first_item + shown)
        return Document(token_ids, np.array([len(token_ids) - 1]), np.zeros(len(targets), np.int64), targets, key)

    def content(self, kind: int, user: int, item: int, words: np.ndarray, epoch: int, example: int) -> Document:
        """Language modeling of a text about a user, an item or both."""
        item_token = np.array([self.space.first_item + item], dtype=np.int64)
        prompt = self._fill(self._content[kind], user=self._user(user), item=item_token)
        token_ids = np.concatenate([prompt, words.astype(np.int64)])
        queries = np.arange(len(prompt) - 1, len(token_ids) - 1)
        return Document(token_ids, queries, np.arange(len(queries)), words, _key(self._random(2, epoch, example)))


def _key(random: np.random.Generator) -> int:
    return int(random.integers(1 << 62))


def collate(documents: Sequence[Document], space: TokenSpace) -> DocumentBatch:
    """Pack documents into one batch."""
    return collate_groups([documents], space)[0]


def collate_groups(groups: Sequence[Sequence[Document]], space: TokenSpace) -> list[DocumentBatch]:
    """Pack each group of documents into a batch of its own, all with rows of one length L.

    A group without documents gives one row of padding that predicts nothing, because every rank must run every forward.
    """
    packings = pack([np.array([len(d.token_ids) for d in documents], dtype=np.int64) for documents in groups])
    return [_place(documents, packing, space) for documents, packing in zip(groups, packings, strict=True)]


def _place(documents: Sequence[Document], packing: Packing, space: TokenSpace) -> DocumentBatch:
    """The documents at their places as tensors."""
    lengths = np.array([len(d.token_ids) for d in documents], dtype=np.int64)
    places, within = ranges(packing.starts, lengths), ranges(np.zeros_like(lengths), lengths)
    size = packing.shape[0] * packing.shape[1]
    tokens, keys = np.zeros(size, np.int64), np.zeros(size, np.int64)
    positions = np.zeros(size, np.int64)  # each place that is left is a document of one token, which nobody reads
    if len(documents):
        tokens[places] = np.concatenate([d.token_ids for d in documents])
        positions[places] = within
        keys[places] = np.repeat([d.key for d in documents], lengths)
    is_item = tokens >= space.first_item
    is_user = (tokens >= space.first_user) & ~is_item
    num_queries = np.array([len(d.queries) for d in documents], dtype=np.int64)
    num_targets = np.array([len(d.targets) for d in documents], dtype=np.int64)
    return DocumentBatch(
        word_ids=torch.from_numpy(np.where(is_user | is_item, 0, tokens).reshape(packing.shape)),
        positions=torch.from_numpy(positions.reshape(packing.shape)),
        keys=torch.from_numpy(keys.reshape(packing.shape)),
        user_places=torch.from_numpy(np.flatnonzero(is_user)),
        user_ids=torch.from_numpy(tokens[is_user] - space.first_user),
        item_places=torch.from_numpy(np.flatnonzero(is_item)),
        item_ids=torch.from_numpy(tokens[is_item] - space.first_item),
        query_places=_join([d.queries for d in documents], packing.starts, num_queries),
        target_query=_join([d.target_query for d in documents], np.cumsum(num_queries) - num_queries, num_targets),
        targets=_join([d.targets for d in documents], np.zeros_like(num_targets), num_targets),
        num_tokens=int(lengths.sum()),
    )


def _join(parts: list[np.ndarray], shifts: np.ndarray, lengths: np.ndarray) -> Tensor:
    """All parts in a row, each shifted by its own number."""
    joined = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
    return torch.from_numpy(joined + np.repeat(shifts, lengths))
