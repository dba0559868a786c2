"""Raw files damaged at random: read without what cannot be read, or refused clearly."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.errors import CLLM4RecError
from tests.corpus.samples import source
from tests.corpus.test_sources import write
from tests.damage import DAMAGE

DAY = 86_400
ROWS = [(f"u{i % 7}", f"i{i % 5}-{i // 7}", 1 + i % 5, 1_500_000_000 + DAY * i, f"Très bon № {i}") for i in range(40)]
ITEMS = sorted({row[1] for row in ROWS})


def recbole(folder: Path) -> dict[str, Any]:
    lines = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t, _ in ROWS)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    items = "".join(f"{i}\tTitle {i}\t1995\tComedy\n" for i in ITEMS)
    return {
        "interactions": write(folder / "x.inter", header + lines),
        "items": write(
            folder / "x.item", "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + items
        ),
    }


def grouplens(folder: Path) -> dict[str, Any]:
    lines = "".join(f"{u},{i},{r},{t}\n" for u, i, r, t, _ in ROWS)
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n" + lines)
    write(folder / "movies.csv", "movieId,title,genres\n" + "".join(f'{i},"The, {i}",Drama|War\n' for i in ITEMS))
    return {"edition": "csv", "folder": str(folder)}


def amazon(folder: Path) -> dict[str, Any]:
    reviews = [
        {"reviewerID": u, "asin": i, "overall": r, "reviewText": text, "unixReviewTime": t} for u, i, r, t, text in ROWS
    ]
    metadata = [{"asin": i, "title": f"Title {i}", "description": ["one", i]} for i in ITEMS]
    return {
        "edition": "2018",
        "reviews": write(folder / "r.json.gz", reviews),
        "metadata": write(folder / "m.json", metadata),
    }


def yelp(folder: Path) -> dict[str, Any]:
    reviews = [
        {"user_id": u, "business_id": i, "stars": r, "text": text, "date": f"2018-07-07 22:09:{t % 60:02d}"}
        for u, i, r, t, text in ROWS
    ]
    places = [{"business_id": i, "name": f"Café {i}", "categories": None, "city": "Łódź"} for i in ITEMS]
    return {
        "reviews": write(folder / "review.json", reviews),
        "businesses": write(folder / "b.json", places),
        "users": write(folder / "u.json", [{"user_id": "u1", "yelping_since": "2009-01-01", "elite": ""}]),
    }


def sequences(folder: Path) -> dict[str, Any]:
    lines = "".join(f"{u} {' '.join(i for v, i, *_ in ROWS if v == u)}\n" for u in sorted({row[0] for row in ROWS}))
    titles = json.dumps({i: f"Title {i}" for i in ITEMS})
    return {"sequences": write(folder / "s.txt", lines), "titles": write(folder / "titles.json", titles)}


COLUMNS = {"user": "user", "item": "item", "rating": "rating", "timestamp": "time", "text": "review"}


def table(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / f"x.{kind}"
    frame = pd.DataFrame(ROWS, columns=["user", "item", "rating", "time", "review"])
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    return {"interactions": {"path": str(path), "kind": kind} | COLUMNS}


FORMATS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "recbole": ("recbole", recbole),
    "grouplens": ("grouplens", grouplens),
    "amazon": ("amazon", amazon),
    "yelp": ("yelp", yelp),
    "sequences": ("sequences", sequences),
    "csv": ("table", lambda f: table(f, "csv")),
    "jsonl": ("table", lambda f: table(f, "jsonl")),
    "parquet": ("table", lambda f: table(f, "parquet")),
}


@pytest.mark.slow
def test_damaged_raw_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes: Counter[str] = Counter()
    folder = tmp_path / "raw"
    for name, (kind, make) in FORMATS.items():
        folder.mkdir()
        settings = {"format": kind} | make(folder)
        assert len(read_source(source(**settings)).interactions) == len(ROWS), name
        for file in sorted(path.name for path in folder.iterdir()):
            for damage, (spoil, times) in DAMAGE.items():
                for number in range(times):
                    shutil.rmtree(folder)
                    folder.mkdir()
                    make(folder)
                    spoil(folder / file, random.Random(f"{file}{damage}{number}"))
                    try:
                        raw = read_source(source(**settings))
                    except CLLM4RecError:
                        outcomes["refused with a clear error"] += 1
                        continue
                    # A changed letter makes another id or number; what is no interaction any more is left out.
                    assert len(raw.interactions) <= len(ROWS) + 3, (name, file, damage)
                    assert (raw.user_ids.str.len_bytes() > 0).all()
                    lost = sum(raw.log.counts.values()) or len(raw.interactions) < len(ROWS)
                    outcomes["read, with lines left out and counted" if lost else "read"] += 1
        shutil.rmtree(folder)
    assert not (tmp_path / "exploded").exists()
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    with capsys.disabled():
        os.write(1, f"\ndamaged raw files: {sum(outcomes.values())} tried: {told}\n".encode())
    assert sum(outcomes.values()) >= 200
