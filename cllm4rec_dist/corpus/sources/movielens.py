"""MovieLens: RecBole's atomic files, and the files of GroupLens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pandas as pd

from cllm4rec_dist.corpus.raw import (
    RawData,
    Row,
    SkipLog,
    clean_text,
    clean_title,
    collect_interactions,
    collect_texts,
    known_ids,
    no_texts,
)
from cllm4rec_dist.corpus.recipe import GroupLensSource, RecboleSource
from cllm4rec_dist.corpus.sources.files import column_indexes, open_binary, read_csv, read_fields
from cllm4rec_dist.errors import DataError

_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_AGES = {
    "1": "under 18 years old", "18": "18 to 24 years old", "25": "25 to 34 years old", "35": "35 to 44 years old",
    "45": "45 to 49 years old", "50": "50 to 55 years old", "56": "56 years old or more",
}  # fmt: skip
_OCCUPATIONS = (
    "other", "academic or educator", "artist", "clerical or administrative", "college or graduate student",
    "customer service", "doctor or health care", "executive or managerial", "farmer", "homemaker", "K-12 student",
    "lawyer", "programmer", "retired", "sales or marketing", "scientist", "self-employed", "technician or engineer",
    "tradesman or craftsman", "unemployed", "writer",
)  # fmt: skip
_GENDERS = {"M": "male", "F": "female"}
_PHRASES: dict[str, Callable[[str], str]] = {
    "age": "{} years old".format,
    "gender": lambda value: _GENDERS.get(value, value),
    "occupation": "{}".format,
    "release_year": "released in {}".format,
    "class": "genres: {}".format,
}


def _sentence(field_values: list[tuple[str, str]]) -> str:
    """`age: 24, gender: M, occupation: writer` in words; fields without a value are left out."""
    cleaned = [(name, clean_title(value)) for name, value in field_values]
    return ", ".join(
        _PHRASES.get(name, f"{name.replace('_', ' ')}: {{}}".format)(value) for name, value in cleaned if value
    )


def read_recbole(source: RecboleSource) -> RawData:
    """Atomic files: tab-separated fields with a header `name:type`."""
    log = SkipLog(source.on_bad_line)
    fields = [source.user_field, source.item_field, source.rating_field, source.timestamp_field, source.text_field]
    interactions = collect_interactions(
        _atomic_interactions(source.interactions, fields, log),
        source.interactions,
        log,
        has_rating=source.rating_field is not None,
        has_text=source.text_field is not None,
    )
    items, users = no_texts("item", ("title", "description")), no_texts("user", ("text",))
    if source.items is not None:
        names = [source.item_field, source.title_field, *source.description_fields]
        rows = _atomic_rows(source.items, names, log)
        described = ((f[0], clean_title(f[1]), _sentence(list(zip(names[2:], f[2:], strict=True)))) for _, f in rows)
        items = collect_texts(described, "item", ("title", "description"), known_ids(interactions, "item"), log)
    if source.users is not None:
        names = [source.user_field, *source.profile_fields]
        rows = _atomic_rows(source.users, names, log)
        profiles = ((f[0], _sentence(list(zip(names[1:], f[1:], strict=True)))) for _, f in rows)
        users = collect_texts(profiles, "user", ("text",), known_ids(interactions, "user"), log)
    return RawData(interactions, items, users, log.skipped)


def _atomic_interactions(path: str, fields: list[str | None], log: SkipLog) -> Iterator[Row]:
    present = [name for name in fields if name is not None]
    for line, values in _atomic_rows(path, present, log):
        by_field: dict[str | None, str] = dict(zip(present, values, strict=True))
        user, item, rating, timestamp, text = (by_field.get(name) for name in fields)
        yield line, user, item, rating, timestamp, text


def _atomic_rows(path: str, columns: list[str], log: SkipLog) -> Iterator[tuple[int, list[str]]]:
    """Line number and the chosen fields of each line below the header."""
    with open_binary(path) as file:
        first = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    header = [name.rpartition(":")[0] for name in first.split("\t")]
    if not all(header):
        raise DataError(
            f"{path} line 1", first, "is not a header of typed fields (user_id:token)", "Choose another format."
        )
    indexes = column_indexes(path, header, columns)
    rows = read_fields(path, "\t", len(header), log, "utf-8")
    return ((line, [values[index] for index in indexes]) for line, values in rows if line > 1)


def read_grouplens(source: GroupLensSource) -> RawData:
    """The three layouts that GroupLens has used."""
    log = SkipLog(source.on_bad_line)
    at = partial("{}/{}".format, source.folder.rstrip("/"))
    no_users = no_texts("user", ("text",))
    match source.edition:
        case "100k":
            interactions = _ratings(read_fields(at("u.data"), "\t", 4, log, "latin-1"), at("u.data"), log)
            movies = _movies_100k(at("u.item"), log)
            profiles = _profiles_100k(at("u.user"), log)
            users = collect_texts(profiles, "user", ("text",), known_ids(interactions, "user"), log)
        case "1m":
            interactions = _ratings(read_fields(at("ratings.dat"), "::", 4, log, "latin-1"), at("ratings.dat"), log)
            movies = _movies(read_fields(at("movies.dat"), "::", 3, log, "latin-1"))
            profiles = _profiles_1m(at("users.dat"), log)
            users = collect_texts(profiles, "user", ("text",), known_ids(interactions, "user"), log)
        case "csv":
            columns = ["userId", "movieId", "rating", "timestamp"]
            interactions = _ratings(read_csv(at("ratings.csv"), columns, log), at("ratings.csv"), log)
            movies, users = _movies(read_csv(at("movies.csv"), ["movieId", "title", "genres"], log)), no_users
    items = collect_texts(movies, "item", ("title", "description"), known_ids(interactions, "item"), log)
    return RawData(interactions, items, users, log.skipped)


def _ratings(rows: Iterator[tuple[int, list[str]]], path: str, log: SkipLog) -> pd.DataFrame:
    stream = ((line, user, item, rating, time, None) for line, (user, item, rating, time) in rows)
    return collect_interactions(stream, path, log, has_rating=True, has_text=False)


def _genres(names: list[str]) -> str:
    known = [name for name in names if name not in ("", "unknown", "(no genres listed)")]
    return f"genres: {', '.join(known)}" if known else ""


def _movies(rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, str, str]]:
    return ((item, clean_title(title), _genres(genres.split("|"))) for _, (item, title, genres) in rows)


def _movies_100k(path: str, log: SkipLog) -> Iterator[tuple[str, str, str]]:
    for _, fields in read_fields(path, "|", 5 + len(_GENRES), log, "latin-1"):
        genres = [name for name, flag in zip(_GENRES, fields[5:], strict=True) if flag == "1"]
        yield fields[0], clean_title(fields[1]), _genres(genres)


def _profiles_100k(path: str, log: SkipLog) -> Iterator[tuple[str, str]]:
    for _, (user, age, gender, occupation, _zip) in read_fields(path, "|", 5, log, "latin-1"):
        yield user, _sentence([("age", age), ("gender", gender), ("occupation", occupation)])


def _profiles_1m(path: str, log: SkipLog) -> Iterator[tuple[str, str]]:
    for line, (user, gender, age, occupation, _zip) in read_fields(path, "::", 5, log, "latin-1"):
        if not (occupation.isascii() and occupation.isdigit() and int(occupation) < len(_OCCUPATIONS)):
            log.bad_line(path, line, occupation, "is no occupation of MovieLens 1M")
            continue
        words = [_AGES.get(age, ""), _GENDERS.get(gender, ""), _OCCUPATIONS[int(occupation)]]
        yield user, clean_text(", ".join(word for word in words if word))
