"""Files of user sequences: one line a user, the items in time order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from cllm4rec_dist.corpus.raw import (
    RawData,
    Row,
    SkipLog,
    clean_title,
    collect_interactions,
    collect_texts,
    known_ids,
    no_texts,
)
from cllm4rec_dist.corpus.recipe import SequencesSource
from cllm4rec_dist.corpus.sources.files import open_binary, read_lines
from cllm4rec_dist.errors import DataError

# Not str.split(): the wide blanks of other scripts may be part of an id.
_BLANKS = re.compile("[ \t]+")
_JSON_NAMES = (".json", ".json.gz")


def read_sequences(source: SequencesSource) -> RawData:
    """Sequences without ratings and times; a user with several lines goes on in the next one."""
    log = SkipLog(source.on_bad_line)
    rows = _rows(source.sequences, log)
    interactions = collect_interactions(rows, source.sequences, log, has_rating=False, has_text=False)
    items = no_texts("item", ("title", "description"))
    if source.titles is not None:
        titles = (
            _json_titles(source.titles) if source.titles.endswith(_JSON_NAMES) else _text_titles(source.titles, log)
        )
        items = collect_texts(titles, "item", ("title", "description"), known_ids(interactions, "item"), log)
    return RawData(interactions, items, no_texts("user", ("text",)), log.skipped)


def _rows(path: str, log: SkipLog) -> Iterator[Row]:
    for line, text in read_lines(path, log):
        user, *items = _BLANKS.split(text.strip(" \t"))
        if not items:
            log.bad_line(path, line, text, "has a user without items")
        for item in items:
            yield line, user, item, None, None, None


def _json_titles(path: str) -> Iterator[tuple[str, str, str]]:
    with open_binary(path) as file:
        try:
            titles = json.loads(file.read())
        except ValueError as error:
            raise DataError("file", path, f"is not JSON ({error})", "Fetch the file again.") from error
    if not isinstance(titles, dict):
        raise DataError("file", path, "is not a JSON object {item: title}", "Choose another file of titles.")
    return ((item, clean_title(title), "") for item, title in titles.items())


def _text_titles(path: str, log: SkipLog) -> Iterator[tuple[str, str, str]]:
    for _, text in read_lines(path, log):
        item, *words = _BLANKS.split(text.strip(" \t"), maxsplit=1)
        yield item, clean_title(" ".join(words)), ""
