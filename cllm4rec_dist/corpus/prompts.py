"""Prompts: build documents from a heterogeneous prompt and a homogeneous main text when a batch is made.

Everything that may change between epochs (order, masking) or between runs (templates) happens here and not on disk.
Random draws are a function of (seed, epoch, row), so a document is the same on every rank. `plan_collaborative`,
`plan_recommendation` and `plan_content` make the draws and compute the lengths, once, for the whole global batch. Each
rank then builds its documents from them, with operations on whole arrays.

The documents of the paper, in bracket notation:

    collaborative   <user_i> has interacted with | <item_j> <item_k> ...             every item is predicted
    recommendation  <user_i> has interacted with <the rest>, <user_i> will interact with |     held-out items
    content         <user_i> writes the review for <item_j>: | words ...             every word is predicted

Legend: n documents.
"""

from __future__ import annotations

import re
from copy import copy
from dataclasses import replace
from typing import Literal

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
"""Index of the template of histories; the template of a text has the index of its kind."""
_COLLABORATIVE, _RECOMMENDATION, _CONTENT = range(3)
"""Streams of documents; part of the keys of their random numbers."""
_ORDER, _MASK_RATIO, _MASK, _DROPOUT, _SHARED_USER = range(5)
"""Draws of a document; part of the keys of their random numbers."""


class PromptBuilder:
    """Builds documents from corpus examples, a batch at a time.

    Args:
        tokenizer: tokenizer of the backbone.
        space: token ids of words, users and items; the last user row is the shared one, if the method has one.
        method: order, target, mask ratio, longest history, ratio of prompts with the shared user row.
        seed: seed of orders, masks and dropout keys.
        stage: stage of the run, whose prompt predictions use.

    Arguments of the methods, for n documents: `users`, `items`, `kinds`: int64 [n] rows or kinds; `histories`, `words`:
    n lists of item rows or word ids; `counts`: int64 [n] lengths of these lists; `epochs`: int64 [n]; `keys`,
    `num_masked`: the draws of a `plan_...` method.
    """

    def __init__(
        self,
        tokenizer: WordTokenizer,
        space: TokenSpace,
        method: MethodConfig,
        seed: int,
        stage: Literal["pretrain", "finetune"] = "finetune",
    ) -> None:
        self.space, self.method, self.seed, self.stage = space, method, seed, stage
        begin, end = RECOMMENDATION_PROMPT.split("{items}")
        assert begin + "{items}" == COLLABORATIVE_PROMPT
        texts = [CONTENT_PROMPTS[ContentKind(kind)] for kind in range(len(ContentKind))]
        self._templates = Ragged.from_lists([_compile(tokenizer, text, space) for text in (*texts, begin)], np.int64)
        self._end = np.array(_encode(tokenizer, end, space), np.int64)

    @property
    def _fallback_user(self) -> int:
        """Row of a user without one: the shared row, or the zero vector's."""
        space = self.space
        return space.num_users - 1 if self.method.shared_user_ratio > 0 else space.no_user - space.first_user

    def with_num_items(self, num_items: int) -> PromptBuilder:
        """Return a builder of the same prompts for another number of items."""
        other = copy(self)
        other.space = replace(self.space, num_items=num_items)
        return other

    def plan_collaborative(self, users: np.ndarray, counts: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the draws for item language modeling: `keys` uint64 [n] and `num_tokens` int64 [n]."""
        num_tokens = self._templates.lengths[_HISTORY] + np.minimum(counts, self.method.max_history)
        return {"keys": self._keys(_COLLABORATIVE, epochs, users), "num_tokens": num_tokens}

    def collaborative(self, users: np.ndarray, histories: Ragged, keys: np.ndarray) -> Documents:
        """Build documents for item language modeling: the prompt's last token predicts the first item, and so on."""
        prompts = self._prompts(_HISTORY, self._with_shared_user(users, keys))
        return self._predicted(prompts, self._arrange(histories, keys), keys, are_items=True)

    def plan_recommendation(self, users: np.ndarray, counts: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the draws for finetuning, each [n]: `keys`, `num_masked` items of the history, and `num_tokens`."""
        keys, counts = self._keys(_RECOMMENDATION, epochs, users), np.minimum(counts, self.method.max_history)
        low, high = self.method.mask_ratio
        ratio = low + (high - low) * keyed_uniform(keys, _MASK_RATIO)
        num_masked = np.clip(np.rint(ratio * counts).astype(np.int64), 1, np.maximum(1, counts - 1))
        num_tokens = self._templates.lengths[_HISTORY] + counts - num_masked + len(self._end)
        return {"keys": keys, "num_masked": num_masked, "num_tokens": num_tokens}

    def recommendation(
        self, users: np.ndarray, histories: Ragged, keys: np.ndarray, num_masked: np.ndarray
    ) -> Documents:
        """Build documents for multinomial finetuning: the last position predicts the masked items.

        At least one item is masked; at least one is shown if the user has two or more.
        """
        arranged = self._arrange(histories, keys)
        order = keyed_permutations(keyed_bits(keys, _MASK), arranged.lengths)
        masked = order < np.repeat(num_masked, arranged.lengths)
        targets = arranged.keep(masked) if self.method.target == "held_out" else arranged
        return self._recommended(self._with_shared_user(users, keys), arranged.keep(~masked), targets, keys)

    def prediction(self, users: np.ndarray, histories: Ragged) -> Documents:
        """Build prompts over whole histories in stored order, without targets; the last position predicts.

        They have the form that the stage trains: the finetuning prompt, or after pretraining the items alone, of which
        the last one predicts the next.

        Args:
            users: -1 for a user without a row, who gets the shared row, or the zero vector if there is none.
        """
        users = np.where(users < 0, self._fallback_user, users)
        no_targets = Ragged.from_lengths(np.zeros(len(users), np.int64), np.empty(0, np.int64))
        shown = histories.last(self.method.max_history)
        return self._recommended(users, shown, no_targets, np.zeros(len(users), np.uint64))

    def plan_content(
        self, kinds: np.ndarray, counts: np.ndarray, epochs: np.ndarray, text_ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the draws for texts: `keys` and `num_tokens`. `text_ids`: int64 [n], unique for each text."""
        num_tokens = self._templates.lengths[kinds] + counts
        return {"keys": self._keys(_CONTENT, epochs, text_ids), "num_tokens": num_tokens}

    def content(
        self, kinds: np.ndarray, users: np.ndarray, items: np.ndarray, words: Ragged, keys: np.ndarray
    ) -> Documents:
        """Build documents for language modeling of texts about a user, an item or both."""
        return self._predicted(self._prompts(kinds, users, items), words, keys, are_items=False)

    def _with_shared_user(self, users: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Replace a random `shared_user_ratio` of the users with the shared user."""
        return np.where(keyed_uniform(keys, _SHARED_USER) < self.method.shared_user_ratio, self._fallback_user, users)

    def _keys(self, stream: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return keyed_bits(self.seed, stream, epochs, rows)

    def _arrange(self, histories: Ragged, keys: np.ndarray) -> Ragged:
        """Return the histories in this epoch's order, at most `max_history` items of each."""
        longest = self.method.max_history
        if self.method.order == "fixed":
            return histories.last(longest)
        positions = keyed_permutations(keyed_bits(keys, _ORDER), histories.lengths)
        shuffled = np.empty_like(histories.values)
        shuffled[positions + np.repeat(histories.offsets[:-1], histories.lengths)] = histories.values
        return Ragged(histories.offsets, shuffled).last(longest)

    def _prompts(self, templates: int | np.ndarray, users: np.ndarray, items: np.ndarray | None = None) -> Ragged:
        """Fill the templates with users and items."""
        return self._fill(self._templates.take(np.broadcast_to(templates, len(users))), users, items)

    def _fill(self, prompts: Ragged, users: np.ndarray, items: np.ndarray | None = None) -> Ragged:
        """Replace user 0 and item 0 of compiled templates with the given users and items."""
        tokens, rows = prompts.values, prompts.rows
        tokens = tokens + np.where(tokens == self.space.first_user, users[rows], 0)
        if items is not None:
            tokens += np.where(prompts.values == self.space.first_item, items[rows], 0)
        return Ragged(prompts.offsets, tokens)

    def _predicted(self, prompts: Ragged, main: Ragged, keys: np.ndarray, *, are_items: bool) -> Documents:
        """Join prompts and main texts; the token before each main token predicts it."""
        tokens = main.values.astype(np.int64) + (self.space.first_item if are_items else 0)
        return Documents(
            tokens=Ragged.hstack([prompts, Ragged(main.offsets, tokens)]),
            queries=Ragged(main.offsets, ranges(prompts.lengths - 1, main.lengths)),
            target_query=Ragged(main.offsets, ranges(np.zeros(len(main), np.int64), main.lengths)),
            targets=main,
            keys=_dropout_keys(keys),
        )

    def _recommended(self, users: np.ndarray, shown: Ragged, targets: Ragged, keys: np.ndarray) -> Documents:
        """Build finetuning prompts whose last token predicts every target."""
        items = Ragged(shown.offsets, shown.values.astype(np.int64) + self.space.first_item)
        end = self._end if self.stage == "finetune" else self._end[:0]
        ends = Ragged.from_lengths(np.full(len(users), len(end)), np.tile(end, len(users)))
        tokens = Ragged.hstack([self._prompts(_HISTORY, users), items, self._fill(ends, users)])
        queries = Ragged(np.arange(len(users) + 1), tokens.lengths - 1)
        only_query = Ragged(targets.offsets, np.zeros_like(targets.values))
        return Documents(tokens, queries, only_query, targets, _dropout_keys(keys))


def largest_prompt_id(tokenizer: WordTokenizer) -> int:
    """Return the largest word id in any prompt, including the start-of-sequence token."""
    texts = [*CONTENT_PROMPTS.values(), *RECOMMENDATION_PROMPT.split("{items}")]
    # In this space user 0 and item 0 have ids 0 and 1, so the largest id is a word's.
    return max(token_id for text in texts for token_id in _compile(tokenizer, text, TokenSpace(0, 1, 1)))


def _compile(tokenizer: WordTokenizer, template: str, space: TokenSpace) -> list[int]:
    """Return a prompt's tokens for user 0 and item 0, after the backbone's start-of-sequence token, if any."""
    return [*tokenizer.prefix, *_encode(tokenizer, template, space)]


def _encode(tokenizer: WordTokenizer, template: str, space: TokenSpace) -> list[int]:
    # A byte-level tokenizer makes a space part of the next word, so a space before a slot would be a token by itself.
    text = re.sub(r" (?=\{|$)", "", template)
    return tokenizer.encode(text.format(user="<user_0>", item="<item_0>"), space)


def _dropout_keys(keys: np.ndarray) -> np.ndarray:
    return (keyed_bits(keys, _DROPOUT) >> np.uint64(2)).astype(np.int64)
