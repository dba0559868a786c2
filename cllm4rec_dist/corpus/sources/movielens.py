"""Readers of RecBole's atomic files, of MovieLens and other data sets, and of GroupLens' MovieLens files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import polars as pl

from cllm4rec_dist.corpus.about import TextCollector, joined
from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import GroupLensSource, RecboleSource
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.delimited import read_delimited, read_header
from cllm4rec_dist.corpus.sources.encoding import resolve_encoding
from cllm4rec_dist.corpus.sources.files import RawFile, exists, find_files
from cllm4rec_dist.corpus.sources.records import Dialect
from cllm4rec_dist.corpus.values import clean_texts
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_AGES = {
    "1": "under 18 years old",
    "18": "18 to 24 years old",
    "25": "25 to 34 years old",
    "35": "35 to 44 years old",
    "45": "45 to 49 years old",
    "50": "50 to 55 years old",
    "56": "56 years old or more",
}
_OCCUPATIONS = (
    "other",
    "academic or educator",
    "artist",
    "clerical or administrative",
    "college or graduate student",
    "customer service",
    "doctor or health care",
    "executive or managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales or marketing",
    "scientist",
    "self-employed",
    "technician or engineer",
    "tradesman or craftsman",
    "unemployed",
    "writer",
)
_GENDERS = {"M": "male", "F": "female"}
_PHRASES = {
    "age": "{} years old",
    "release_year": "released in {}",
    "class": "genres: {}",
    "gender": "{}",
    "occupation": "{}",
}
_BENCHMARK_PARTS = ("train", "valid", "test")


def _sentence(columns: pl.DataFrame, fields: Sequence[str], missing: Sequence[str]) -> pl.Series:
    """Join phrases of the fields with a value, such as `24 years old, male, writer`; null if there is none."""
    phrases = {}
    for index, name in enumerate(fields):
        values = clean_texts(columns[name], missing, one_line=True)
        values = values.replace(_GENDERS) if name == "gender" else values.str.replace(r"^(\d+)\.0+$", "$1")
        phrase = _PHRASES.get(name, f"{name.replace('_', ' ')}: {{}}")
        phrases[f"{index}"] = pl.select(pl.format(phrase, values)).to_series()
    table = pl.DataFrame(phrases) if phrases else pl.DataFrame({"": [None] * len(columns)}, schema={"": pl.String})
    return table.select(joined(table, table.columns, ", ")).to_series()


def read_recbole(source: RecboleSource) -> RawData:
    """Read atomic files, or the three files of a benchmark split."""
    log = SkipLog(source.on_bad_line, source.max_lost)
    files = _benchmark_files(source)
    parts: Sequence[int | None] = range(3)
    if not files:
        files = find_files(source.interactions)
        parts = [None] * len(files)
    dialects = {file.path: _dialect(source, file) for file in files}
    names = _interaction_fields(source, files[0], dialects[files[0].path])
    rules = Rules(
        missing=source.missing,
        has_rating="rating" in names,
        has_text="text" in names,
        allow_unmatched=source.allow_unmatched,
        new_items=source.new_items,
    )
    collector = InteractionCollector(log, rules, names)
    for file, part in zip(files, parts, strict=True):
        collector.add_file(file.path, _atomic(file, names, dialects[file.path], log), part)
    raw = collector.finish()
    if source.items is not None:
        title = {} if source.title_field is None else {"title": source.title_field}
        optional = {f"d{name}": name for name in source.description_fields}
        described = TextCollector("item", ("title", "description"), raw.item_ids, log, rules, one_line=("title",))
        for file in find_files(source.items):
            dialect = _dialect(source, file)
            present = _present(source, file, dialect, title | optional, ("title_field", "description_fields"))
            batches = _atomic(file, {"item": source.item_field, **present}, dialect, log)
            described.add_file(file.path, _with_sentence(batches, "item", "description", present, source.missing))
        raw = replace(raw, items=described.finish())
    if source.users is not None:
        profiles = TextCollector("user", ("text",), raw.user_ids, log, rules)
        for file in find_files(source.users):
            dialect = _dialect(source, file)
            fields = {f"d{name}": name for name in source.profile_fields}
            present = _present(source, file, dialect, fields, ("profile_fields",))
            batches = _atomic(file, {"user": source.user_field, **present}, dialect, log)
            profiles.add_file(file.path, _with_sentence(batches, "user", "text", present, source.missing))
        raw = replace(raw, users=profiles.finish())
    return raw


def _benchmark_files(source: RecboleSource) -> list[RawFile]:
    """Return the files of a split if they exist and the configured file does not, else none."""
    if len(source.interactions) != 1 or exists(path := source.interactions[0]):
        return []
    stem = path.removesuffix(".inter")
    names = [f"{stem}.{part}.inter" for part in _BENCHMARK_PARTS]
    if not exists(names[0]):
        return []
    logger.info("%s does not exist; the split of %s is kept", path, ", ".join(names))
    return find_files(names)


def _interaction_fields(source: RecboleSource, file: RawFile, dialect: Dialect) -> dict[str, str]:
    names = {"user": source.user_field, "item": source.item_field}
    optional = {"rating": source.rating_field, "timestamp": source.timestamp_field, "text": source.text_field}
    configured = {role: name for role, name in optional.items() if name is not None}
    return names | _present(source, file, dialect, configured, tuple(f"{role}_field" for role in configured))


def _present(
    source: RecboleSource, file: RawFile, dialect: Dialect, names: dict[str, str], keys: Sequence[str]
) -> dict[str, str]:
    """Return the fields that the file has; log each missing default, and refuse a missing field of the recipe."""
    header, _ = read_header(file, dialect)
    in_file = [name.rpartition(":")[0] for name in header]
    absent = {role: name for role, name in names.items() if name not in in_file}
    set_keys = {key for key in keys if key in source.model_fields_set}
    for role, name in absent.items():
        key = next((key for key in keys if _is_of(key, role)), keys[0])
        if key in set_keys:
            raise DataError(
                f"{file.path} line 1",
                name,
                f"is not among its columns {in_file!r:.300}",
                f"Fix {key} in the recipe, or set it to {'null' if key.endswith('_field') else '[]'}.",
            )
        logger.info("%s has no field %r and is read without it (set %s to name another)", file.path, name, key)
    return {role: name for role, name in names.items() if role not in absent}


def _is_of(key: str, role: str) -> bool:
    return key == f"{role}_field" or (role.startswith("d") and key.endswith("_fields"))


def _dialect(source: RecboleSource, file: RawFile) -> Dialect:
    return Dialect(source.field_separator, "none", None, resolve_encoding(file.path, source.encoding))


def _atomic(file: RawFile, names: dict[str, str], dialect: Dialect, log: SkipLog) -> Iterator[Batch]:
    """Yield the fields of each line, with their roles as column names."""
    header, separator = read_header(file, dialect)
    fields = [name.rpartition(":")[0] for name in header]
    if not all(fields):
        raise DataError(
            f"{file.path} line 1",
            separator.join(header)[:100],
            "is not a header of typed fields (user_id:token)",
            "Choose another format, or set field_separator.",
        )
    typed = dict(zip(fields, header, strict=True))
    missing = [name for name in names.values() if name not in typed]
    if missing:
        key = "field_separator" if len(header) == 1 else "the names"
        raise DataError(
            f"{file.path} line 1", missing[0], f"is not among its columns {fields!r:.300}", f"Fix {key} in the recipe."
        )
    columns = list(dict.fromkeys(typed[name] for name in names.values()))
    numeric = [typed[names[role]] for role in ("rating", "timestamp") if role in names]
    for batch in read_delimited(file, columns, dialect, log, numeric):
        renamed = batch.columns.select(batch.columns[typed[name]].alias(role) for role, name in names.items())
        yield Batch(batch.path, batch.lines, renamed)


def _with_sentence(
    batches: Iterator[Batch], kind: str, text: str, present: dict[str, str], missing: Sequence[str]
) -> Iterator[Batch]:
    """Yield the id, the title of an item, and the other fields joined into a text."""
    fields = {role: name for role, name in present.items() if role != "title"}
    for batch in batches:
        named = batch.columns.select(kind, *(pl.col(role).alias(name) for role, name in fields.items() if name != kind))
        columns = {kind: batch.columns[kind], text: _sentence(named, list(fields.values()), missing)}
        if kind == "item":
            none = pl.Series([None] * len(batch.lines), dtype=pl.String)
            columns["title"] = batch.columns["title"] if "title" in present else none
        yield Batch(batch.path, batch.lines, pl.DataFrame(columns))


def read_grouplens(source: GroupLensSource) -> RawData:
    """Read a MovieLens edition of GroupLens."""
    log = SkipLog(source.on_bad_line, source.max_lost)
    folder = source.folder.rstrip("/")
    names = ("userId", "movieId", "rating", "timestamp")
    match source.edition:
        case "100k":
            ratings, movies, profiles = f"{folder}/u.data", f"{folder}/u.item", f"{folder}/u.user"
            dialect = Dialect("\t", "none", None, source.encoding, names)
        case "1m" | "10m":
            ratings, movies, profiles = (f"{folder}/{name}.dat" for name in ("ratings", "movies", "users"))
            dialect = Dialect("::", "none", None, source.encoding, names)
        case _:
            ratings, movies, profiles = f"{folder}/ratings.csv", f"{folder}/movies.csv", ""
            dialect = Dialect(",", "double", None, source.encoding)
    rules = Rules(
        missing=source.missing, has_rating=True, allow_unmatched=source.allow_unmatched, new_items=source.new_items
    )
    roles = dict(zip(("user", "item", "rating", "timestamp"), names, strict=True))
    collector = InteractionCollector(log, rules, roles)
    for file in find_files([ratings]):
        collector.add_file(file.path, _as_roles(read_delimited(file, names, dialect, log, names[2:]), roles))
    raw = collector.finish()
    described = TextCollector("item", ("title", "description"), raw.item_ids, log, rules, one_line=("title",))
    for file in find_files([movies]):
        described.add_file(file.path, _movies(file, source, dialect, log))
    raw = replace(raw, items=described.finish())
    if profiles and (source.edition == "100k" or exists(profiles)):
        about = TextCollector("user", ("text",), raw.user_ids, log, rules)
        for file in find_files([profiles]):
            about.add_file(file.path, _profiles(file, source, log))
        raw = replace(raw, users=about.finish())
    return raw


def _as_roles(batches: Iterator[Batch], roles: dict[str, str]) -> Iterator[Batch]:
    for batch in batches:
        yield Batch(batch.path, batch.lines, batch.columns.rename({name: role for role, name in roles.items()}))


def _movies(file: RawFile, source: GroupLensSource, dialect: Dialect, log: SkipLog) -> Iterator[Batch]:
    names: tuple[str, ...] = ("movieId", "title", "genres")
    make: Callable[[pl.DataFrame], pl.Expr] = _listed_genres
    if source.edition == "100k":
        names = ("movieId", "title", "date", "video", "url", *_GENRES)
        dialect = Dialect("|", "none", None, source.encoding, names)
        make = _flagged_genres
    elif dialect.names is not None:
        dialect = replace(dialect, names=names)
    for batch in read_delimited(file, names, dialect, log):
        columns = batch.columns.select(
            pl.col("movieId").alias("item"), "title", make(batch.columns).alias("description")
        )
        yield Batch(batch.path, batch.lines, columns)


def _genres(names: pl.Expr) -> pl.Expr:
    """Format lists of names as `genres: Drama, War`; null if there is none."""
    genres = names.list.eval(
        pl.element().filter(pl.element().is_not_null() & ~pl.element().is_in(["", "unknown", "(no genres listed)"]))
    )
    return pl.when(genres.list.len() > 0).then("genres: " + genres.list.join(", "))


def _listed_genres(columns: pl.DataFrame) -> pl.Expr:
    return _genres(pl.col("genres").str.split("|"))


def _flagged_genres(columns: pl.DataFrame) -> pl.Expr:
    return _genres(
        pl.concat_list([pl.when(pl.col(name).str.strip_chars() == "1").then(pl.lit(name)) for name in _GENRES])
    )


def _profiles(file: RawFile, source: GroupLensSource, log: SkipLog) -> Iterator[Batch]:
    if source.edition == "100k":
        names, separator = ("user", "age", "gender", "occupation", "zip"), "|"
    else:
        names, separator = ("user", "gender", "age", "occupation", "zip"), "::"
    dialect = Dialect(separator, "none", None, source.encoding, names)
    for batch in read_delimited(file, names, dialect, log):
        if source.edition != "100k":
            batch = _decoded(batch, log)
            texts = batch.columns.select(joined(batch.columns, ("age", "gender", "occupation"), ", ")).to_series()
        else:
            texts = _sentence(batch.columns, ("age", "gender", "occupation"), source.missing)
        yield Batch(batch.path, batch.lines, pl.DataFrame({"user": batch.columns["user"], "text": texts}))


def _decoded(batch: Batch, log: SkipLog) -> Batch:
    """Replace codes of MovieLens 1M with words; a row with an unknown occupation is lost."""
    jobs = {str(index): name for index, name in enumerate(_OCCUPATIONS)}
    is_valid = batch.columns["occupation"].is_in(list(jobs)).to_numpy()
    for line, job in zip(
        batch.lines[~is_valid].tolist(), batch.columns["occupation"].filter(~is_valid).to_list(), strict=True
    ):
        log.lose("has an occupation that MovieLens 1M does not have", batch.path, line, job)
    batch = batch.keep(is_valid)
    words = {"age": _AGES, "gender": _GENDERS, "occupation": jobs}
    columns = [
        pl.col(name).replace_strict(table, default=None, return_dtype=pl.String) for name, table in words.items()
    ]
    return Batch(batch.path, batch.lines, batch.columns.with_columns(columns))
