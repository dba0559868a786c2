"""Prompts: a heterogeneous prompt and a homogeneous main text become a document when a batch is made.

Everything that may change between visits (order, masking) or between runs (templates) happens here and not on disk.
Random draws are a function of (seed, epoch, row), so a document is the same on whichever rank it is made. What is drawn
for a document, and its length, are computed once, for the whole global batch: by `plan_collaborative`,
`plan_recommendation` and `plan_content`. The documents that a rank reads are made of these draws, all at once, by
operations on whole arrays.

The documents of the paper, in bracket notation:

    collaborative   <user_i> has interacted with | <item_j> <item_k> ...             every item is predicted
    recommendation  <user_i> has interacted with <the rest>, <user_i> will interact with |     held-out items
    content         <user_i> writes the review for <item_j>: | words ...             every word is predicted

Legend: n documents.
"""

from __future__ import annotations

import re

import numpy as np

from cllm4rec_dist.config import MethodConfig
from cllm4rec_dist.corpus.documents import Documents
from cllm4rec_dist.corpus.ragged import Ragged, ranges
from cllm4rec_dist.corpus.shards import ContentKind
from cllm4rec_dist.corpus.stateless_rng import keyed_bits, keyed_permutations, keyed_uniform
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
_ORDER, _MASK_RATIO, _MASK, _DROPOUT, _SHARED_USER = range(5)


class PromptBuilder:
    """Makes documents of corpus examples, a batch at a time.

    Args:
        tokenizer: of the backbone.
        space: its words and user and item rows; the last user row is the shared one, where the method has it.
        method: order, target, mask share, longest history, share of prompts with the shared user row.
        seed: of orders, masks and dropout keys.

    Arguments of the methods, for n documents: `users`, `items`, `kinds`: int64 [n] rows or kinds; `histories`, `words`:
    n lists of item rows or word ids; `counts`: int64 [n] their lengths; `epochs`: int64 [n], the visits; `keys`,
    `num_masked`: what was drawn for them.
    """

    def __init__(self, tokenizer: WordTokenizer, space: TokenSpace, method: MethodConfig, seed: int) -> None:
        self.space, self.method, self.seed = space, method, seed
        begin, end = RECOMMENDATION_PROMPT.split("{items}")
        assert begin + "{items}" == COLLABORATIVE_PROMPT
        texts = [CONTENT_PROMPTS[ContentKind(kind)] for kind in range(len(ContentKind))]
        self._templates = Ragged.from_lists([_compile(tokenizer, text, space) for text in (*texts, begin)], np.int64)
        self._end = np.array(_encode(tokenizer, end, space), np.int64)
        self._anyone = space.num_users - 1 if method.shared_user_ratio > 0 else space.no_user - space.first_user

    def plan_collaborative(self, users: np.ndarray, counts: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Draws of documents for item language modeling: `keys` uint64 [n] and `num_tokens` int64 [n]."""
        num_tokens = self._templates.lengths[_HISTORY] + np.minimum(counts, self.method.max_history)
        return {"keys": self._keys(_COLLABORATIVE, epochs, users), "num_tokens": num_tokens}

    def collaborative(self, users: np.ndarray, histories: Ragged, keys: np.ndarray) -> Documents:
        """Item language modeling: every item is predicted, the first one from the prompt's last token."""
        prompts = self._prompts(_HISTORY, self._named(users, keys))
        return self._predicted(prompts, self._arrange(histories, keys), keys, are_items=True)

    def plan_recommendation(self, users: np.ndarray, counts: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Draws of documents for finetuning: `keys`, `num_masked` items of each history, and `num_tokens`; each [n]."""
        keys, counts = self._keys(_RECOMMENDATION, epochs, users), np.minimum(counts, self.method.max_history)
        low, high = self.method.mask_ratio
        ratio = low + (high - low) * keyed_uniform(keys, _MASK_RATIO)
        num_masked = np.clip(np.rint(ratio * counts).astype(np.int64), 1, np.maximum(1, counts - 1))
        num_tokens = self._templates.lengths[_HISTORY] + counts - num_masked + len(self._end)
        return {"keys": keys, "num_masked": num_masked, "num_tokens": num_tokens}

    def recommendation(
        self, users: np.ndarray, histories: Ragged, keys: np.ndarray, num_masked: np.ndarray
    ) -> Documents:
        """Multinomial finetuning: a random share of the items is masked and predicted from the last position.

        At least one item is masked; at least one is shown where the user has two or more.
        """
        arranged = self._arrange(histories, keys)
        order = keyed_permutations(keyed_bits(keys, _MASK), arranged.lengths)
        masked = order < np.repeat(num_masked, arranged.lengths)
        targets = arranged.keep(masked) if self.method.target == "held_out" else arranged
        return self._recommended(self._named(users, keys), arranged.keep(~masked), targets, keys)

    def prediction(self, users: np.ndarray, histories: Ragged) -> Documents:
        """The same prompt over the whole history, in stored order, with nothing to predict but from its end.

        Args:
            users: -1 for somebody without a row: the shared row stands for them, or the zero vector without one.
        """
        users = np.where(users < 0, self._anyone, users)
        nothing = Ragged.from_lengths(np.zeros(len(users), np.int64), np.empty(0, np.int64))
        shown = histories.last(self.method.max_history)
        return self._recommended(users, shown, nothing, np.zeros(len(users), np.uint64))

    def plan_content(
        self, kinds: np.ndarray, counts: np.ndarray, epochs: np.ndarray, text_ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Draws of documents over texts: `keys` and `num_tokens`; `text_ids`: int64 [n], different for each text."""
        num_tokens = self._templates.lengths[kinds] + counts
        return {"keys": self._keys(_CONTENT, epochs, text_ids), "num_tokens": num_tokens}

    def content(
        self, kinds: np.ndarray, users: np.ndarray, items: np.ndarray, words: Ragged, keys: np.ndarray
    ) -> Documents:
        """Language modeling of texts about a user, an item or both."""
        return self._predicted(self._prompts(kinds, users, items), words, keys, are_items=False)

    def _named(self, users: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The users that prompts name: a share of them, drawn by their keys, by the shared row."""
        return np.where(keyed_uniform(keys, _SHARED_USER) < self.method.shared_user_ratio, self._anyone, users)

    def _keys(self, stream: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return keyed_bits(self.seed, stream, epochs, rows)

    def _arrange(self, histories: Ragged, keys: np.ndarray) -> Ragged:
        """The users' items in this visit's order, at most `max_history` of each."""
        longest = self.method.max_history
        if self.method.order == "fixed":
            return histories.last(longest)
        places = keyed_permutations(keyed_bits(keys, _ORDER), histories.lengths)
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
        return Documents(
            tokens=Ragged.hstack([prompts, Ragged(main.offsets, tokens)]),
            queries=Ragged(main.offsets, ranges(prompts.lengths - 1, main.lengths)),
            target_query=Ragged(main.offsets, ranges(np.zeros(len(main), np.int64), main.lengths)),
            targets=main,
            keys=_dropout_keys(keys),
        )

    def _recommended(self, users: np.ndarray, shown: Ragged, targets: Ragged, keys: np.ndarray) -> Documents:
        """Everything is predicted from the last token."""
        items = Ragged(shown.offsets, shown.values.astype(np.int64) + self.space.first_item)
        ends = Ragged.from_lengths(np.full(len(users), len(self._end)), np.tile(self._end, len(users)))
        tokens = Ragged.hstack([self._prompts(_HISTORY, users), items, self._about(ends, users)])
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
