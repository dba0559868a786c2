"""Every reader on small files, and what each does with bad input."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest

from cllm4rec_dist.config import load_config
from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.recipe import PrepareConfig, expand_path
from cllm4rec_dist.corpus.sources import RawData, read_source
from cllm4rec_dist.errors import ConfigError, DataError
from tests.corpus.samples import interactions, recipe, reviews, source

REPOSITORY = Path(__file__).parents[2]


def pairs(raw: RawData) -> list[tuple[str, str]]:
    table = interactions(raw)
    return list(zip(table["user"], table["item"], strict=True))


def texts(table: pl.DataFrame) -> dict[str, tuple[str | None, ...]]:
    return {row[0]: row[1:] for row in table.rows() if any(row[1:])}


def write(path: Path, content: str | bytes | list[dict[str, Any]]) -> str:
    if isinstance(content, list):
        content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in content)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.fixture
def recbole(tmp_path: Path) -> dict[str, str]:
    return {
        "format": "recbole",
        "interactions": write(
            tmp_path / "x.inter",
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n007\ta\t5\t30\n007\tb\t4\t10\n8\ta\t3\t20\n",
        ),
        "items": write(
            tmp_path / "x.item",
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "a\tToy Story\t1995\tComedy\nb\t\t\t\n",
        ),
        "users": write(
            tmp_path / "x.user",
            "user_id:token\tage:token\tgender:token\toccupation:token\tzip:token\n007\t24\tF\twriter\t1\n9\t1\tM\tx\t2\n",
        ),
    }


def test_recbole(recbole: dict[str, str]) -> None:
    raw = read_source(source(**recbole))
    assert pairs(raw) == [("007", "a"), ("007", "b"), ("8", "a")]
    assert interactions(raw)["rating"].tolist() == [5, 4, 3]
    assert interactions(raw)["timestamp"].tolist() == [30, 10, 20]
    assert interactions(raw)["position"].tolist() == [0, 1, 2]
    assert texts(raw.items) == {"a": ("Toy Story", "released in 1995, genres: Comedy")}
    assert texts(raw.users) == {"007": ("24 years old, female, writer",)}
    assert raw.log.counts == {"text about a user without interactions": 1}


def test_recbole_names_a_missing_field(recbole: dict[str, str]) -> None:
    with pytest.raises(
        DataError, match=r"x\.inter line 1: 'stars' is not among its columns.*Fix rating_field in the recipe"
    ):
        read_source(source(**recbole, rating_field="stars"))


def test_recbole_refuses_a_file_without_typed_header(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a header of typed fields"):
        read_source(source(format="recbole", interactions=write(tmp_path / "x.inter", "1\t2\t3\n")))


def test_grouplens_100k_is_latin_1(tmp_path: Path) -> None:
    write(tmp_path / "u.data", "1\t10\t5\t100\n2\t10\t3\t90\n")
    write(
        tmp_path / "u.item",
        f"10|Les Misérables (1995)|x||u|{'|'.join('0' * 8)}|1|{'|'.join('0' * 10)}\n".encode("latin-1"),
    )
    write(tmp_path / "u.user", "1|24|M|technician|85711\n2|53|F|other|94043\n")
    raw = read_source(source(format="grouplens", edition="100k", folder=str(tmp_path)))
    assert texts(raw.items) == {"10": ("Les Misérables (1995)", "genres: Drama")}
    assert texts(raw.users)["1"] == ("24 years old, male, technician",)


def test_grouplens_1m(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", "1::10::5::100\nbroken::line\n2::10::3::90\n")
    write(tmp_path / "movies.dat", "10::Toy Story (1995)::Animation|Comedy\n")
    write(tmp_path / "users.dat", "1::F::1::10::48067\n2::M::56::99::1\n")
    raw = read_source(source(format="grouplens", edition="1m", folder=str(tmp_path)))
    assert texts(raw.items) == {"10": ("Toy Story (1995)", "genres: Animation, Comedy")}
    assert texts(raw.users) == {"1": ("under 18 years old, female, K-12 student",)}
    assert raw.log.counts == {
        "row that has 2 fields instead of 4": 1,
        "row that has an occupation that MovieLens 1M does not have": 1,
    }


def test_grouplens_csv(tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.5,100\n1,11,2,101\n")
    write(tmp_path / "movies.csv", 'movieId,title,genres\n10,"American President, The (1995)",(no genres listed)\n')
    raw = read_source(source(format="grouplens", edition="csv", folder=str(tmp_path) + "/"))
    assert interactions(raw)["rating"].tolist() == [4.5, 2]
    assert texts(raw.items) == {"10": ("American President, The (1995)", None)}


def test_amazon_2014_reads_python_literals(tmp_path: Path) -> None:
    reviews = [
        {"reviewerID": "A", "asin": "00X", "overall": 5.0, "reviewText": "Tom &amp; Jerry", "unixReviewTime": 7},
        {"reviewerID": "B", "asin": "00X", "overall": 1.0, "reviewText": "", "summary": "Bad", "unixReviewTime": 8},
        {"reviewerID": "C", "asin": "00X", "reviewText": "no stars", "unixReviewTime": 9},
    ]
    metadata = (
        "{'asin': '00X', 'title': \"Rock'n\\nRoll\", 'description': 'It&#39;s loud'}\n{'asin': '00Y', 'title': 'x'}\n"
    )
    raw = read_source(
        source(
            format="amazon",
            edition="2014",
            reviews=write(tmp_path / "r.json.gz", reviews),
            metadata=write(tmp_path / "m.json.gz", metadata),
        )
    )
    assert interactions(raw)["text"].tolist() == ["Tom & Jerry", "Bad"]
    assert texts(raw.items) == {"00X": ("Rock'n Roll", "It's loud")}
    assert raw.log.counts == {"row that has no rating": 1, "text about an item without interactions": 1}


def test_amazon_2018_joins_lists(tmp_path: Path) -> None:
    reviews = [{"reviewerID": "A", "asin": "1", "overall": 5.0, "reviewText": "ok", "unixReviewTime": 7}]
    metadata = [{"asin": "1", "title": "T", "description": ["one", "", "two"]}]
    files = {"reviews": write(tmp_path / "r.json", reviews), "metadata": write(tmp_path / "m.json", metadata)}
    raw = read_source(source(format="amazon", edition="2018", **files))
    assert texts(raw.items) == {"1": ("T", "one two")}


def test_amazon_2023(tmp_path: Path) -> None:
    entries = [
        {"user_id": "U", "parent_asin": "P", "asin": "v1", "rating": 4, "title": "t", "text": "x", "timestamp": 9000},
        {"user_id": "U", "parent_asin": "P", "asin": "v2", "rating": 1, "title": "t", "text": "y", "timestamp": 8000},
        {"user_id": "U", "asin": "Q", "rating": 4, "title": "only a title", "text": "", "timestamp": 1},
    ]
    metadata = [{"parent_asin": "P", "title": "Parent", "description": []}]
    files = {"reviews": write(tmp_path / "r.jsonl", entries), "metadata": write(tmp_path / "m.jsonl", metadata)}
    raw = read_source(source(format="amazon", edition="2023", **files))
    assert pairs(raw) == [("U", "P"), ("U", "P"), ("U", "Q")]
    assert interactions(raw)["text"].tolist() == ["x", "y", "only a title"]
    catalog = build_catalog(raw, recipe())
    assert sorted(reviews(catalog)) == ["only a title", "y"], "the earliest of two reviews is kept"
    assert catalog.log.counts["repeated interaction of a user with an item"] == 1


def test_amazon_of_another_edition_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"user_id": "U", "parent_asin": "P", "rating": 4}])
    with pytest.raises(DataError, match="has no field reviewerID"):
        read_source(source(format="amazon", edition="2014", reviews=path))


def test_yelp(tmp_path: Path) -> None:
    raw = read_source(
        source(
            format="yelp",
            reviews=write(
                tmp_path / "review.json",
                [
                    {"user_id": "u", "business_id": "b", "stars": 4, "text": "Très bon", "date": "2018-07-07 22:09:11"},
                    {"user_id": "u", "business_id": "c", "stars": 4, "text": "…", "date": "yesterday"},
                ],
            ),
            businesses=write(
                tmp_path / "b.json", [{"business_id": "b", "name": "Café", "categories": None, "city": "Łódź"}]
            ),
            users=write(tmp_path / "u.json", [{"user_id": "u", "yelping_since": "2009-01-01", "elite": "2015,2016"}]),
        )
    )
    assert interactions(raw)["timestamp"].tolist() == [1531001351]
    assert texts(raw.items) == {"b": ("Café", "in Łódź")}
    assert texts(raw.users) == {"u": ("member since 2009, elite in 2015,2016",)}
    assert raw.log.counts == {"row that has a time that cannot be read": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [("titles.json", '{"a": "Cream &amp; Oil", "z": "unknown"}'), ("titles.txt", "a  Cream & Oil\nz unknown\n")],
)
def test_sequences(tmp_path: Path, name: str, content: str) -> None:
    sequences = write(tmp_path / "s.txt", "用户-1 a b\u3000c a\n\nlonely\nمستخدم b\r\n用户-1 d\n")
    raw = read_source(source(format="sequences", sequences=sequences, titles=write(tmp_path / name, content)))
    assert pairs(raw) == [("用户-1", "a"), ("用户-1", "b\u3000c"), ("用户-1", "a"), ("مستخدم", "b"), ("用户-1", "d")]
    assert interactions(raw)["rating"].isna().all()
    assert texts(raw.items) == {"a": ("Cream & Oil", None)}
    assert raw.log.counts == {"row that has a user without items": 1, "text about an item without interactions": 1}
    assert build_catalog(raw, recipe()).log.counts["repeated interaction of a user with an item"] == 1


def test_sequences_refuse_titles_that_are_no_json(tmp_path: Path) -> None:
    files = {"sequences": write(tmp_path / "s.txt", "u a\n"), "titles": write(tmp_path / "t.json", "{")}
    with pytest.raises(DataError, match="is not JSON"):
        read_source(source(format="sequences", **files))


COLUMNS = {"user": "who", "item": "what", "rating": "stars", "timestamp": "when", "text": "review"}
ENTRIES = [
    {"who": "0012", "what": "товар-7", "stars": 4, "when": "2020-01-02T00:00:00Z", "review": 'said "hi",\nleft'},
    {"who": "Ω", "what": "x", "stars": 5, "when": "2020-01-01", "review": ""},
]


def test_table_csv_without_header(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'товар-7,0012,"said ""hi"",\nleft",4,100,extra\nx,Ω,,5,,\n')
    table = {"path": path, "names": ["what", "who", "review", "stars", "when", "rest"], **COLUMNS}
    raw = read_source(source(format="table", interactions=table))
    assert pairs(raw) == [("0012", "товар-7"), ("Ω", "x")]
    assert interactions(raw)["text"].tolist() == ['said "hi",\nleft', ""]
    assert interactions(raw)["timestamp"].isna().tolist() == [False, True]
    assert build_catalog(raw, recipe()).log.counts["empty review"] == 1


def test_table_jsonl(tmp_path: Path) -> None:
    table = {"path": write(tmp_path / "x.jsonl.gz", ENTRIES), "kind": "jsonl", **COLUMNS}
    items = {"path": write(tmp_path / "i.csv", "\ufeffid;name;a;b\nx;Ex;one;two\n"), "delimiter": ";"}
    raw = read_source(
        source(
            format="table",
            interactions=table,
            items=items | {"item": "id", "title": "name", "description": ["a", "b"]},
            users={"path": write(tmp_path / "u.csv", "id,bio\nΩ,いいね\n"), "user": "id", "text": ["bio"]},
        )
    )
    assert pairs(raw) == [("0012", "товар-7"), ("Ω", "x")]
    assert interactions(raw)["timestamp"].diff().iloc[1] == -86400
    assert texts(raw.items) == {"x": ("Ex", "one two")}
    assert texts(raw.users) == {"Ω": ("いいね",)}


def test_a_category_is_a_column_of_its_own_and_only_where_the_recipe_names_one(tmp_path: Path) -> None:
    files = {
        "interactions": {"path": write(tmp_path / "i.csv", "u,i\n1,a\n1,b\n2,c\n"), "user": "u", "item": "i"},
        "items": {
            "path": write(tmp_path / "p.csv", "id,name,kind\na,Soap,Bath  &amp; Body\nb,Pan,\nd,Pot,Kitchen\n"),
            "item": "id",
            "title": "name",
            "description": ["kind"],
        },
    }
    plain = build_catalog(read_source(source(format="table", **files)), recipe())
    assert plain.item_categories is None
    named = source(format="table", **(files | {"items": files["items"] | {"category": "kind"}}))
    catalog = build_catalog(read_source(named), recipe())
    assert catalog.item_ids.to_list() == ["a", "b", "c", "d"], "d is new"
    assert catalog.item_categories is not None
    assert catalog.item_categories.to_list() == ["Bath & Body", "", "", "Kitchen"]
    assert catalog.item_descriptions.to_list() == plain.item_descriptions.to_list()
    assert catalog.item_titles.to_list() == ["Soap", "Pan", "", "Pot"]


def test_table_parquet_has_typed_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    moments = pd.to_datetime(["2020-01-02", "2020-01-01", None])
    pd.DataFrame({"who": [12, 7, 7], "what": ["a", "b", None], "stars": [1.5, 2.0, 3.0], "when": moments}).to_parquet(
        path
    )
    columns = {key: COLUMNS[key] for key in ("user", "item", "rating", "timestamp")}
    raw = read_source(source(format="table", interactions={"path": str(path), "kind": "parquet", **columns}))
    assert pairs(raw) == [("12", "a"), ("7", "b")]
    assert interactions(raw)["timestamp"].diff().iloc[1] == -86400
    assert raw.log.counts == {"row that has no item id": 1}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", "who,what\na,b\n", "'stars' is not among its columns"),
        ("jsonl", '{"who": "a", "what": "b"}\n', r"\['review', 'stars', 'when'\] is in no object"),
        ("parquet", "no parquet", "is not Parquet"),
    ],
)
def test_table_names_what_is_missing(tmp_path: Path, kind: str, content: str, message: str) -> None:
    table = {"path": write(tmp_path / "x", content), "kind": kind, **COLUMNS}
    with pytest.raises(DataError, match=message):
        read_source(source(format="table", interactions=table))


BAD_LINES = {
    "too few fields": "a,b\n",
    "too many fields": "a,b,4,5\n",
    "no number": "a,b,four\n",
    "infinite": "a,b,inf\n",
    "not utf-8": b"a,\xff\xfe,4\n" + "1,é,3\n2,é,3\n".encode(),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=list(BAD_LINES))
def test_bad_lines_are_counted_or_named(tmp_path: Path, line: str | bytes) -> None:
    data = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "x.csv", b"who,what,stars\n1,2,3\n" + data + b"5,6,1\n")
    table = {"path": path, "user": "who", "item": "what", "rating": "stars"}
    raw = read_source(source(format="table", interactions=table))
    assert [pair for pair in pairs(raw) if pair[1] != "é"] == [("1", "2"), ("5", "6")]
    assert sum(raw.log.counts.values()) == 1
    (skip,) = raw.log.skipped.values()
    assert (skip.file, skip.line, skip.total) == ("x.csv", 3, len(raw.interactions) + 1)
    with pytest.raises(DataError, match=r"x\.csv line 3: .*on_bad_line: skip"):
        read_source(source(format="table", interactions=table, on_bad_line="error"))


def test_missing_values_are_counted(tmp_path: Path) -> None:
    rows = ",b,4\n  ,b,4\na,,4\nnan,b,4\na,b,\na,c,NaN\na,d,4\n"
    table = {
        "path": write(tmp_path / "x.csv", "who,what,stars\n" + rows),
        "user": "who",
        "item": "what",
        "rating": "stars",
    }
    raw = read_source(source(format="table", interactions=table))
    assert pairs(raw) == [("a", "d")]
    assert raw.log.counts == {"row that has no user id": 3, "row that has no item id": 1, "row that has no rating": 2}


def test_json_values_of_wrong_types_are_bad_lines(tmp_path: Path) -> None:
    entries = [
        {"u": ["a"], "i": "b", "r": 1},
        {"u": "a", "i": True, "r": 1},
        {"u": "a", "i": "b", "r": {"x": 1}},
        {"u": "\ud800", "i": "b", "r": 1},
        {"u": None, "i": "b", "r": 1},
        {"u": 5, "i": "b", "r": 1},
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries) + "[1]\nnot json\n"
    table = {"path": write(tmp_path / "x.jsonl", lines), "kind": "jsonl", "user": "u", "item": "i", "rating": "r"}
    raw = read_source(source(format="table", interactions=table, max_lost=0.9))
    assert pairs(raw) == [("5", "b")]
    assert sum(raw.log.counts.values()) == 7
    assert raw.log.counts["row that is not a JSON object"] == 2
    assert raw.log.counts["row that has no user id"] == 1


def test_no_interaction_left(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "who,what\n,b\n")
    with pytest.raises(DataError, match=r"x\.csv: '1 x row that has no user id' leaves no interaction"):
        read_source(source(format="table", interactions={"path": path, "user": "who", "item": "what"}))


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row of an interaction"):
        read_source(source(format="sequences", sequences=write(tmp_path / "x.txt", "")))


@pytest.mark.parametrize("damage", ["missing", "truncated", "folder"])
def test_a_file_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.txt.gz"
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        content = gzip.compress(b"u a b\n" * 1000)
        path.write_bytes(content[:-12] if damage == "truncated" else b"plain text")
    with pytest.raises(DataError, match=r"x\.txt\.gz'? ?(does not exist|cannot be read|is a folder)|leaves no|no gzip"):
        read_source(source(format="sequences", sequences=str(path)))


def test_a_protocol_that_nobody_knows() -> None:
    with pytest.raises(DataError, match="nosuchprotocol"):
        read_source(source(format="sequences", sequences="nosuchprotocol://x"))


def test_paths_take_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    assert expand_path("${NO_SUCH_FOLDER:-../data}/x") == "../data/x"
    monkeypatch.setenv("NO_SUCH_FOLDER", "s3://bucket")
    assert expand_path("${NO_SUCH_FOLDER:-../data}/x") == "s3://bucket/x"
    monkeypatch.delenv("NO_SUCH_FOLDER")
    with pytest.raises(ConfigError, match="environment variable NO_SUCH_FOLDER is not set"):
        source(format="sequences", sequences="${NO_SUCH_FOLDER}/x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": {"format": "excel"}}, "excel"),
        ({"source": {"format": "sequences"}}, "sequences"),
        ({"min_user_item": 5}, "min_user_item"),
        ({"split": {"kind": "random", "valid": 0.5, "test": 0.5}}, "must be below 1"),
    ],
)
def test_recipes_refuse_what_they_do_not_know(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**settings)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "shards").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_recipes_load(path: Path) -> None:
    assert load_config(PrepareConfig, path).name


@pytest.mark.parametrize(
    ("name", "num_users", "num_items", "num_interactions"),
    [
        ("ml-100k", 943, 1682, 100_000),
        ("amazon-beauty", 22_363, 12_101, 198_502),
        ("musical-instruments", 1381, 392, 5050),
    ],
)
def test_real_data(
    name: str, num_users: int, num_items: int, num_interactions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.environ.get("CLLM4REC_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / name).is_dir():
        pytest.skip(f"needs the raw files of {name}: set CLLM4REC_DATA to the folder that holds {name}/")
    monkeypatch.setenv("CLLM4REC_DATA", str(folder))
    raw = read_source(load_config(PrepareConfig, REPOSITORY / "shards" / f"{name}.yaml").source)
    assert len(raw.user_ids) == num_users
    assert len(raw.item_ids) == num_items
    assert len(raw.interactions) == num_interactions


def test_an_encoding_of_the_whole_source_is_not_that_of_json(tmp_path: Path) -> None:
    orders = write(tmp_path / "orders.csv", "who,what\nJürgen,1\n".encode("cp1252"))
    items = write(tmp_path / "items.json", '[{"id": 1, "name": "Süßer Käse"}]')
    raw = read_source(
        source(
            format="table",
            encoding="cp1252",
            interactions={"path": orders, "user": "who", "item": "what"},
            items={"path": items, "item": "id", "title": "name"},
        )
    )
    assert raw.user_ids.to_list() == ["Jürgen"]
    assert texts(raw.items) == {"1": ("Süßer Käse", None)}
