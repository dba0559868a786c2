"""The word tokenizer, and the token ids of users and items.

A user is `<user_3>` and an item `<item_7>`: one token each, with ids after the V words of the backbone. The word
tokenizer never splits them, and brackets in a review stay words: `encode` reads only the project's templates, and
`encode_batch` reads texts from data.

Legend: V words of the backbone, U users, I items.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cllm4rec_dist.errors import ConfigError, DataError

_BRACKET = re.compile(r"<(user|item)_(\d+)>")
_MARKUP = re.compile(r"\s*(<[^<>]+>|<\|.*\|>|\[[^\[\]\s]+\]|\{[^{}\s]+\})\s*", re.DOTALL)
"""Added tokens that are markup rather than words."""


@dataclass(frozen=True)
class TokenSpace:
    """Token ids of words, users and items: [0, V), [V, V+U) and [V+U, V+U+I).

    Attributes:
        num_users: rows of a user table (`MethodConfig.num_user_rows`).
    """

    num_words: int
    num_users: int
    num_items: int

    @property
    def first_user(self) -> int:
        """Token id of user row 0."""
        return self.num_words

    @property
    def first_item(self) -> int:
        """Token id of item row 0."""
        return self.num_words + self.num_users

    @property
    def size(self) -> int:
        """V + U + I."""
        return self.first_item + self.num_items

    @property
    def no_user(self) -> int:
        """Token id, after all others, of a user without a row; its embedding is the zero vector."""
        return self.size


def _without_control_tokens(backend: Tokenizer) -> Tokenizer:
    """Return a copy that can read control tokens as words, also those that the tokenizer does not mark as special.

    `<|endoftext|>` or `<tool_call>` in a review must not act as a control token. Added tokens that are no markup (runs
    of spaces, line breaks) stay tokens.
    """
    rules = json.loads(backend.to_str())
    for token in rules.get("added_tokens", []):
        token["special"] = token["special"] or _MARKUP.fullmatch(token["content"]) is not None
    return _untruncated(Tokenizer.from_str(json.dumps(rules)))


def _untruncated(backend: Tokenizer) -> Tokenizer:
    """Return a copy without truncation and padding, which an earlier call may have set."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


class WordTokenizer:
    """The backbone's tokenizer, without truncation or added special tokens.

    Attributes:
        fingerprint: sha256 of everything that determines the ids.
        prefix: ids that the backbone expects at the start of a sequence: a BOS token, or none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else _untruncated(backend).to_str()
        self.fingerprint = hashlib.sha256(rules.encode()).hexdigest()
        self._texts = None if backend is None else _without_control_tokens(backend)
        bos = tokenizer.bos_token_id
        self.prefix = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []

    @classmethod
    def load(cls, folder: str | Path) -> WordTokenizer:
        """Load a Hugging Face tokenizer from a folder; ConfigError if that fails."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:
            raise ConfigError(
                "tokenizer", str(folder), f"cannot be loaded ({error})", "Give a backbone folder with tokenizer.json."
            ) from error
        return cls(tokenizer)

    def __len__(self) -> int:
        """Number of word ids; at most the V of the backbone."""
        return len(self._tokenizer)

    @property
    def largest_id(self) -> int:
        """Largest word id, including added tokens; may be `len` or more."""
        return max(self._tokenizer.get_vocab().values())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the word ids of each text; brackets and control tokens in a text are read as words."""
        if not len(texts):
            return []
        if self._texts is None:
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return self._tokenizer(list(texts), **options).input_ids
        self._texts.encode_special_tokens = True  # lost when a tokenizer is pickled to another process
        return [encoding.ids for encoding in self._texts.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, template: str, space: TokenSpace) -> list[int]:
        """Return the ids of a text in bracket notation: words by the word tokenizer, each bracket as one token.

        Raises:
            DataError: for a user or item row that does not exist.
        """
        token_ids: list[int] = []
        end = 0
        for match in _BRACKET.finditer(template):
            token_ids += self._words(template[end : match.start()])
            kind, row = match[1], int(match[2])
            count = space.num_users if kind == "user" else space.num_items
            if row >= count:
                raise DataError(
                    match[0], row, f"is not below the {count} {kind}s of the corpus", "Use an existing row."
                )
            token_ids.append((space.first_user if kind == "user" else space.first_item) + row)
            end = match.end()
        return token_ids + self._words(template[end:])

    def _words(self, text: str) -> list[int]:
        return self.encode_batch([text])[0] if text else []
