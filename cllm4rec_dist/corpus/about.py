"""Collect texts about users and items, and match them with the ids of the interactions."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.ids import IdCodes
from cllm4rec_dist.corpus.raw import Rules, read_texts
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog, base_name
from cllm4rec_dist.corpus.values import column_ids, whole_ids, without_missing
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.suggestions import plural

logger = logging.getLogger(__name__)

_LOCATIONS = {"code": pl.UInt32, "file": pl.UInt32, "line": pl.Int64}
"""Code of a text's id, and its file and line."""
_MAX_COMPARED = 100_000
"""Ids of each side that are compared to find similar ones for a message."""


class TextCollector:
    """Collects texts about the users or items with interactions, and about new items if the rules keep them.

    If several rows have the same id, the first value of each column is used.

    Args:
        kind: `user` or `item`; also the name of the id column.
        columns: names of the text columns.
        interaction_ids: ids with interactions.
        log: counts what is left out.
        rules: how to read the source.
        one_line: columns whose white space is collapsed into single spaces.
    """

    def __init__(
        self,
        kind: str,
        columns: Sequence[str],
        interaction_ids: pl.Series,
        log: SkipLog,
        rules: Rules,
        one_line: Sequence[str] = (),
    ) -> None:
        self._kind, self._texts, self._log, self._rules, self._one_line = kind, list(columns), log, rules, one_line
        self._ids, self._num_ids = interaction_ids, len(interaction_ids)
        self._keeps_new = kind == "item" and rules.new_items
        # `100.0` on one side matches `100` on the other, unless the interactions have both.
        whole = whole_ids(interaction_ids)
        self._ignores_zero = whole.n_unique() == len(interaction_ids)
        self._codes = IdCodes()
        self._codes.encode(whole if self._ignores_zero else interaction_ids)
        self._rows: list[pl.DataFrame] = []
        self._num_rows = 0
        self._unmatched: list[pl.DataFrame] = []
        self._paths: list[str] = []

    def add_file(self, path: str, batches: Iterable[Batch]) -> None:
        """Add all rows of a file: columns `kind` and the texts."""
        self._paths.append(path)
        for batch in batches:
            self._add(batch)
        self._log.close_file(path)

    def _add(self, batch: Batch) -> None:
        ids = without_missing(
            column_ids(batch.columns[self._kind], f"{batch.path}: {self._kind} id"), self._rules.missing
        )
        has_no_id = ids.is_null().to_numpy()
        if has_no_id.any():
            first = int(np.flatnonzero(has_no_id)[0])
            self._log.lose(
                f"is a text about {_an(self._kind)} without id",
                batch.path,
                int(batch.lines[first]),
                ", ".join("" if value is None else str(value) for value in batch.columns.row(first)),
                int(has_no_id.sum()),
                is_gap=True,
            )
        ids, batch = ids.filter(~has_no_id), batch.keep(~has_no_id)
        codes = self._codes.encode(whole_ids(ids) if self._ignores_zero else ids)
        is_matched = codes < self._num_ids
        self._num_rows += len(ids)
        paths = pl.Series("file", [len(self._paths) - 1], dtype=pl.UInt32).new_from_index(0, len(ids))
        locations = pl.DataFrame({"code": codes, "file": paths, "line": batch.lines})
        self._unmatched.append(locations.filter(pl.Series(~is_matched)))
        is_kept = is_matched | self._keeps_new
        kept = batch.keep(is_kept)
        texts = {
            name: read_texts(
                kept, name, f"{batch.path}: {name}", self._rules, self._log, one_line=name in self._one_line
            )
            for name in self._texts
        }
        self._rows.append(locations.filter(pl.Series(is_kept)).with_columns(**texts))

    def finish(self) -> pl.DataFrame:
        """Return a table with columns `kind` and the texts (null if missing), a row for each id that is kept.

        Raises:
            DataError: if no id matches, unless the recipe allows that.
        """
        kind = self._kind
        self._all_ids = pl.concat([self._ids.alias("id"), self._codes.ids()[self._num_ids :]])
        columns = {**_LOCATIONS, **dict.fromkeys(self._texts, pl.String)}
        rows = pl.concat([pl.DataFrame(schema=columns), *self._rows])
        table = rows.group_by("code", maintain_order=True).agg(
            pl.col(name).drop_nulls().first() for name in self._texts
        )
        self._check_matches(table["code"].filter(table["code"] < self._num_ids))
        table = self._without_doubtful_items(table)
        self._count_unmatched(table)
        different = self._differing(rows, table)
        if len(different):
            code, file, line = different.row(0)[:3]
            self._log.skip(
                f"second text about the same {kind}",
                len(different),
                len(rows),
                file=self._paths[file],
                line=line,
                value=self._all_ids[code],
            )
        return table.select(self._all_ids.gather(table["code"]).alias(kind), *self._texts)

    def _without_doubtful_items(self, table: pl.DataFrame) -> pl.DataFrame:
        """Leave out new items that have neither title nor description, or the id of a known item without a text.

        An id that differs only in case, signs or zeros is far more likely a known item than a second product.
        """
        texts = [name for name in self._texts if name != "category"]
        has_text = pl.any_horizontal(pl.col(name).is_not_null() for name in texts) if texts else pl.lit(value=False)
        table = table.filter((pl.col("code") < self._num_ids) | has_text)
        is_new = table["code"] >= self._num_ids
        if not is_new.any():
            return table
        is_matched = np.zeros(self._num_ids, bool)
        is_matched[table["code"].filter(~is_new).to_numpy()] = True
        ours, theirs = self._ids.filter(~is_matched), self._all_ids.gather(table["code"])
        alike = alike_ids(theirs.filter(is_new).to_list(), ours.to_list())
        if not alike:
            return table
        theirs_first, ours_first = alike[0]
        logger.warning(
            "%s: some texts are not used.%s", self._files(), spelling_hint(ours_first, theirs_first, len(alike))
        )
        return table.filter(~theirs.is_in([name for name, _ in alike]))

    def _count_unmatched(self, kept: pl.DataFrame) -> None:
        """Count the texts about ids without interactions that are not kept, and report the new items that are."""
        unmatched = pl.concat([pl.DataFrame(schema=_LOCATIONS), *self._unmatched])
        left_out = unmatched.filter(~pl.col("code").is_in(kept["code"].implode()))
        if len(left_out):
            code, file, line = left_out.row(0)
            reason = f"text about {_an(self._kind)} without interactions"
            self._log.skip(
                reason, len(left_out), self._num_rows, file=self._paths[file], line=line, value=self._all_ids[code]
            )
        if num_new := int((kept["code"] >= self._num_ids).sum()):
            logger.info("%s: %s without interactions kept as new", self._files(), plural(num_new, "item"))

    def _files(self) -> str:
        return ", ".join(map(base_name, self._paths[:3]))

    def _differing(self, rows: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
        """Return the rows with a text that differs from the kept one. Equal texts are no loss: orders repeat titles."""
        if not self._texts:
            return rows.clear()
        both = rows.join(kept, on="code", suffix=" kept", maintain_order="left")
        return both.filter(pl.any_horizontal(pl.col(name) != pl.col(f"{name} kept") for name in self._texts))

    def _check_matches(self, matched: pl.Series) -> None:
        """Warn if less than half of the ids match; refuse if none does."""
        if len(matched) * 2 >= self._num_ids:
            return
        ours, theirs, num_alike = self._examples(matched)
        hint = spelling_hint(ours, theirs, num_alike)
        files = self._files()
        if not len(matched) and not self._rules.allow_unmatched:
            raise DataError(
                files,
                theirs,
                f"is not among the {self._kind}s of the interactions, such as {ours!r}, nor is any other of its"
                f" {self._num_rows:,} ids"
                if self._num_rows
                else f"has no ids of {self._kind}s",
                f"Fix the column in the recipe or the ids, or set allow_unmatched: true.{hint}",
            )
        logger.warning(
            "%s: only %s of %s %ss of the interactions are in it (%.3g %%): the interactions have for example %r, the"
            " file %r.%s",
            files,
            f"{len(matched):,}",
            f"{self._num_ids:,}",
            self._kind,
            100 * len(matched) / self._num_ids,
            ours,
            theirs,
            hint,
        )

    def _examples(self, matched: pl.Series) -> tuple[str, str, int]:
        """Return an unmatched id of each side, similar ones if possible, and the number of similar ids."""
        is_matched = np.zeros(self._num_ids, bool)
        is_matched[matched.to_numpy()] = True
        ours = self._ids.filter(~is_matched).head(_MAX_COMPARED)
        theirs = self._codes.ids()[self._num_ids :].head(_MAX_COMPARED)
        alike = alike_ids(ours.to_list(), theirs.to_list())
        if alike:
            return *alike[0], len(alike)
        if not len(theirs):
            theirs = self._ids.filter(is_matched)
        return ours[0], theirs[0] if len(theirs) else "", 0


def alike_ids(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of ids that differ only in case, leading zeros, punctuation or `.0`."""
    like = {_plain(text): text for text in reversed(theirs)}
    return [(text, like[_plain(text)]) for text in ours if _plain(text) in like]


def spelling_hint(ours: str, theirs: str, count: int) -> str:
    """Return a sentence about the difference between similar ids, for the end of a message; empty if there are none."""
    if not count:
        return ""
    if unicodedata.normalize("NFKC", ours) == unicodedata.normalize("NFKC", theirs):
        what = "Unicode form (such as one character or two for an accented letter)"
    elif ours.casefold() == theirs.casefold():
        what = "upper and lower case"
    elif ours.casefold().lstrip("0") == theirs.casefold().lstrip("0"):
        what = "leading zeros"
    else:
        what = "punctuation, zeros or case"
    return (
        f" {count:,} ids of the two sides differ only in {what}, such as {ours!r} and {theirs!r}: write them equally"
        " in both files."
    )


def _plain(name: str) -> str:
    """Normalize an id: without case, Unicode forms, leading zeros, punctuation and `.0`."""
    parts = re.findall(r"[^\W\d_]+|\d+", unicodedata.normalize("NFKC", name).casefold().removesuffix(".0"))
    return "".join(part.lstrip("0") for part in parts)


def _an(kind: str) -> str:
    return f"{'an' if kind == 'item' else 'a'} {kind}"


def joined(table: pl.DataFrame, columns: Sequence[str], separator: str = " ") -> pl.Expr:
    """Join the columns' texts; null where all are null."""
    if not columns:
        return pl.lit(None, pl.String)
    parts = pl.concat_list(list(columns)).list.drop_nulls().list.join(separator)
    return pl.when(parts.str.len_bytes() > 0).then(parts)
