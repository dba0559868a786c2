"""Bracket tokens are atomic; brackets in texts are words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.model.build_backbone import train_tokenizer
from tests.documents import decode

patient = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
"""A loaded machine is no failure."""

TEXTS = ["the quiet trail", "río чай 音楽", "blue espresso mountain"]
TOKENIZER = WordTokenizer(train_tokenizer(TEXTS, 320))
SPACE = TokenSpace(num_words=400, num_users=50, num_items=1200)  # more words in the backbone than in the tokenizer


def test_words_users_and_items_follow_each_other() -> None:
    assert (SPACE.first_user, SPACE.first_item, SPACE.size) == (400, 450, 1650)
    assert len(TOKENIZER) <= SPACE.num_words


@patient
@given(user=st.integers(0, 49), item=st.integers(0, 1199))
def test_a_bracket_is_one_token_behind_the_words(user: int, item: int) -> None:
    assert TOKENIZER.encode(f"<user_{user}>", SPACE) == [SPACE.num_words + user]
    assert TOKENIZER.encode(f"<item_{item}>", SPACE) == [SPACE.num_words + SPACE.num_users + item]


def test_neighbouring_brackets_and_words_are_not_mixed() -> None:
    ids = TOKENIZER.encode("<user_12> has read<item_3><item_1199>, quiet", SPACE)
    assert ids[0] == 412
    at = ids.index(453)
    assert ids[at + 1] == 450 + 1199
    words = [token_id for token_id in ids if token_id < SPACE.first_user]
    assert ids[1:at] + ids[at + 2 :] == words
    assert ids[1:at] == TOKENIZER.encode_batch([" has read"])[0]
    assert ids[at + 2 :] == TOKENIZER.encode_batch([", quiet"])[0]


BRACKETS = st.one_of(
    st.integers(0, 49).map(lambda row: f"<user_{row}>"), st.integers(0, 1199).map(lambda row: f"<item_{row}>")
)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1, max_size=8)


@patient
@given(parts=st.lists(st.one_of(BRACKETS, PLAIN), max_size=8))
def test_decode_reverses_encode(parts: list[str]) -> None:
    text = "".join(parts)
    assert decode(TOKENIZER, TOKENIZER.encode(text, SPACE), SPACE) == text


@pytest.mark.parametrize("text", ["<user_1> is me", "I love <item_3>!", "<user_99999>", "<item_-1>"])
def test_brackets_in_peoples_texts_stay_words(text: str) -> None:
    (ids,) = TOKENIZER.encode_batch([text])
    assert len(ids) > 1
    assert max(ids) < len(TOKENIZER) <= SPACE.first_user
    assert decode(TOKENIZER, ids, SPACE) == text


@pytest.mark.parametrize(("bracket", "count"), [("<user_50>", "50 users"), ("<item_1200>", "1200 items")])
def test_a_row_out_of_range_is_refused_by_name(bracket: str, count: str) -> None:
    with pytest.raises(DataError, match=f"{bracket}.*{count}"):
        TOKENIZER.encode(f"The title of {bracket} is:", SPACE)


def test_texts_get_no_special_tokens_and_are_not_cut() -> None:
    long = "the quiet trail " * 5000
    ids, empty = TOKENIZER.encode_batch([long, ""])
    assert decode(TOKENIZER, ids, SPACE) == long
    assert empty == []
    assert TOKENIZER.encode_batch([]) == []
    assert TOKENIZER.encode("", SPACE) == []
    assert TOKENIZER.prefix == []


def test_a_bos_token_that_the_backbone_expects_is_the_prefix() -> None:
    from tokenizers.processors import TemplateProcessing

    raw = train_tokenizer(TEXTS, 320)
    backend = raw.backend_tokenizer
    end = backend.token_to_id("<|end|>")
    backend.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", end)])
    tokenizer = WordTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>"))
    assert tokenizer.prefix == [end]
    assert tokenizer.encode_batch(["quiet"]) == TOKENIZER.encode_batch(["quiet"])
    # One that has a BOS token and does not put it anywhere expects none.
    assert WordTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw_copy(), bos_token="<|end|>")).prefix == []


def raw_copy() -> object:
    return train_tokenizer(TEXTS, 320).backend_tokenizer


def test_the_fingerprint_is_that_of_the_rules(tmp_path: Path) -> None:
    raw = train_tokenizer(TEXTS, 320)
    raw.save_pretrained(tmp_path)
    assert WordTokenizer.load(tmp_path).fingerprint == TOKENIZER.fingerprint
    assert WordTokenizer(train_tokenizer(TEXTS, 270)).fingerprint != TOKENIZER.fingerprint
    assert WordTokenizer(train_tokenizer([*TEXTS, "another text " * 9], 320)).fingerprint != TOKENIZER.fingerprint


def test_use_does_not_change_the_fingerprint() -> None:
    raw = train_tokenizer(TEXTS, 320)
    before = WordTokenizer(raw).fingerprint
    raw(["the quiet", "trail"], padding=False, truncation=True, max_length=1)
    WordTokenizer(raw).encode_batch(TEXTS)
    assert WordTokenizer(raw).fingerprint == before


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        WordTokenizer.load(tmp_path)


def test_control_tokens_in_peoples_texts_are_words() -> None:
    raw = train_tokenizer(TEXTS, 320)
    raw.add_tokens(["<tool_call>", "\n\n"])  # added, and not called special
    raw.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer = WordTokenizer(raw)
    control = {raw.convert_tokens_to_ids(token) for token in ("<|end|>", "<|im_end|>", "<tool_call>")}
    for text in ("the <|end|> quiet", "<|im_end|>", "a<tool_call>b"):
        (ids,) = tokenizer.encode_batch([text])
        assert not control & set(ids)
        assert decode(tokenizer, ids, SPACE) == text
    (blank,) = tokenizer.encode_batch(["quiet\n\ntrail"])
    assert raw.convert_tokens_to_ids("\n\n") in blank, "what is no markup stays a token"


def test_ordinary_texts_have_the_tokens_that_transformers_gives_them() -> None:
    raw = train_tokenizer(TEXTS, 320)
    texts = [*TEXTS, "a  b\n\nc", "", "🙂 ok", "<b>x</b> & 5 < 6"]
    assert WordTokenizer(raw).encode_batch(texts) == raw(texts, add_special_tokens=False).input_ids
