"""Readers of user sequences: a user and the items in time order, as lines or JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.about import TextCollector
from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import SequencesSource
from cllm4rec_dist.corpus.row_batch import BATCH_ROWS, Batch
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.encoding import escaped, first_lines, first_text, resolve_encoding, text_lines
from cllm4rec_dist.corpus.sources.files import RawFile, find_files
from cllm4rec_dist.corpus.sources.objects import read_members, read_objects
from cllm4rec_dist.corpus.values import BadValue, id_text, plain_text
from cllm4rec_dist.errors import DataError

# Unlike str.split(), keeps the wide spaces of other scripts, which may be part of an id.
_BLANKS = re.compile("[ \t]+")
_OTHER_SEPARATORS = (",", ";", "|")
Row = tuple[int, str | None, str | None]
"""Line, user and item."""


def read_sequences(source: SequencesSource) -> RawData:
    """Read sequences without ratings and times; several lines of a user are concatenated."""
    log = SkipLog(source.on_bad_line, source.max_lost)
    rules = Rules(missing=source.missing, allow_unmatched=source.allow_unmatched, new_items=source.new_items)
    collector = InteractionCollector(log, rules)
    for file in find_files(source.sequences):
        rows = _json_rows(file, source, log) if _is_json(file.path, source.encoding) else _line_rows(file, source, log)
        collector.add_file(file.path, _batches(file.path, rows, ("user", "item")))
    raw = collector.finish()
    if source.titles is None:
        return raw
    titles = TextCollector("item", ("title",), raw.item_ids, log, rules, one_line=("title",))
    for file in find_files(source.titles):
        rows = (
            _json_titles(file, source, log) if _is_json(file.path, source.encoding) else _text_titles(file, source, log)
        )
        titles.add_file(file.path, _batches(file.path, rows, ("item", "title")))
    table = titles.finish().with_columns(pl.lit(None, pl.String).alias("description"))
    return replace(raw, items=table)


def _is_json(path: str, encoding: str) -> bool:
    return first_text(path, encoding).lstrip().startswith(("{", "["))


def _batches(path: str, rows: Iterator[Row], names: tuple[str, str]) -> Iterator[Batch]:
    while chunk := list(islice(rows, BATCH_ROWS)):
        lines, *columns = zip(*chunk, strict=True)
        frame = pl.DataFrame(dict(zip(names, columns, strict=True)), schema=dict.fromkeys(names, pl.String))
        yield Batch(path, np.array(lines, dtype=np.int64), frame)


def _line_rows(file: RawFile, source: SequencesSource, log: SkipLog) -> Iterator[Row]:
    encoding = resolve_encoding(file.path, source.encoding)
    if source.separator is None:
        _refuse_other_separators(file.path, encoding)
    for line_number, content in text_lines(file.path, encoding):
        line = _decoded(content, file.path, line_number, log)
        if line is None or not line.strip():
            continue
        user, items = _split(line, source.separator)
        if not items:
            log.read(file.path, 1)
            log.lose("has a user without items", file.path, line_number, line)
        log.read(file.path, len(items))
        for item in items:
            yield line_number, user, item


def _decoded(content: bytes, path: str, line_number: int, log: SkipLog) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        log.read(path, 1)
        log.lose("is not UTF-8 text", path, line_number, escaped(content[:100]))
        return None


def _split(line: str, separator: str | None) -> tuple[str, list[str]]:
    """Split a line into user and items. With a separator, the user ends at the separator or the first space."""
    if separator is None:
        user, *items = _BLANKS.split(line.strip(" \t"))
    else:
        first, *rest = line.split(separator)
        user, *more = _BLANKS.split(first.strip(" \t"), maxsplit=1)
        items = [item for item in [*more, *rest] if item.strip()]
    return user.removesuffix(":"), items


def _refuse_other_separators(path: str, encoding: str) -> None:
    lines = [_BLANKS.split(line.decode(errors="replace").strip(" \t")) for line in first_lines(path, encoding, 1000)]
    words = [word for line in lines for word in line[1:] or line]
    for separator in _OTHER_SEPARATORS:
        example = next((word for word in words if separator in word), "")
        if sum(separator in word for word in words) * 2 > len(words):
            raise DataError(
                path,
                example,
                f"and most other items contain {separator!r}, which looks like the separator of the items",
                f"Set separator: {separator!r} in the recipe, or separator: ' ' if it belongs to the ids.",
            )


def _json_rows(file: RawFile, source: SequencesSource, log: SkipLog) -> Iterator[Row]:
    members = read_members(file.path, source.encoding)
    first = None if members is None else next(members, None)
    if members is not None and first is not None and isinstance(first[1], list):
        for line_number, (user, items) in enumerate(chain([first], members), start=1):
            if not isinstance(items, list):
                raise DataError(f"{file.path}: {user}", items, "is not a list of items", "Write {user: [items]}.")
            yield from _items_of(file.path, line_number, user, items, log)
        return
    for line_number, entry in read_objects(file, log, source.encoding):
        lists = [value for value in entry.values() if isinstance(value, list)]
        others = [value for value in entry.values() if not isinstance(value, list | dict)]
        if len(lists) != 1 or len(others) != 1:
            raise DataError(
                f"{file.path} line {line_number}",
                list(entry),
                "are not one user and one list of items",
                "Use format: table, or write {user: [items]}.",
            )
        yield from _items_of(file.path, line_number, others[0], lists[0], log)


def _items_of(path: str, line_number: int, user: Any, items: list[Any], log: SkipLog) -> Iterator[Row]:
    try:
        row = id_text(user), [id_text(item) for item in items]
    except BadValue as error:
        log.read(path, 1)
        log.lose(f"has an id that {error}", path, line_number, error.value)
        return
    log.read(path, len(row[1]))
    yield from ((line_number, row[0], item) for item in row[1])


def _json_titles(file: RawFile, source: SequencesSource, log: SkipLog) -> Iterator[Row]:
    members = read_members(file.path, source.encoding)
    if members is None:
        raise DataError("file", file.path, "is not a JSON object {item: title}", "Choose another file of titles.")
    for line_number, (item, value) in enumerate(members, start=1):
        log.read(file.path, 1)
        if isinstance(value, dict):
            value = value.get("title", value)
        if isinstance(value, dict):
            raise DataError(
                f"{file.path}: title of {item!r}",
                value,
                "is not a text",
                "Write {item: title} or {item: {title: ...}}.",
            )
        yield line_number, item, plain_text(value)


def _text_titles(file: RawFile, source: SequencesSource, log: SkipLog) -> Iterator[Row]:
    for line_number, content in text_lines(file.path, source.encoding):
        line = _decoded(content, file.path, line_number, log)
        if line is not None and line.strip():
            log.read(file.path, 1)
            item, *words = _BLANKS.split(line.strip(" \t"), maxsplit=1)
            yield line_number, item, " ".join(words)
