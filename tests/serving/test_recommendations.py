"""The folder of recommendations: one list at a time, whatever wrote it and however many ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from torch.multiprocessing.spawn import ProcessRaisedException

from cllm4rec_dist.cli.formats import Format
from cllm4rec_dist.cli.printed import show
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.serving.recommendations import FileFormat, list_schema, make_folder, write_recommendations
from tests.harness import alone, run_ranks


def table(user: str) -> pa.Table:
    return pa.Table.from_pylist([{"user": user, "item": "i", "rank": 1, "score": 0.5}], schema=list_schema())


def written(world: World, folder: str, name: str) -> None:
    write_recommendations([table(f"{name}-{world.rank}")], Path(folder), world)


def failing(world: World, folder: str) -> str:
    def tables() -> Iterator[pa.Table]:
        yield table("never")
        raise ValueError("no more")

    try:
        write_recommendations(tables(), Path(folder), world)
    except ValueError as error:
        return str(error)
    return ""


def failing_late(world: World, folder: str) -> None:
    def tables() -> Iterator[pa.Table]:
        yield table("never")
        if world.rank == 1:
            time.sleep(0.5)
            raise ValueError("no more")

    write_recommendations(tables(), Path(folder), world)


def users(folder: Path) -> list[str]:
    return sorted(pd.read_parquet(folder)["user"])


@pytest.mark.slow
def test_a_list_of_another_number_of_ranks_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    others = ["notes.txt", "recommendations.txt", "my-recommendations-00000-of-00002.parquet.bak"]
    for name in others:
        (tmp_path / name).write_text("kept")
    (tmp_path / ".recommendations-00004-of-00009.parquet.part").write_text("left by a run that was killed")
    for size, name in ((3, "first"), (1, "second"), (2, "third")):
        run_ranks(size, written, str(tmp_path), name)
        parts = {f"recommendations-{rank:05d}-of-{size:05d}.parquet" for rank in range(size)}
        assert {path.name for path in tmp_path.iterdir()} == parts | set(others)
        result = sorted(user for part in parts for user in pd.read_parquet(tmp_path / part)["user"])
        assert result == [f"{name}-{rank}" for rank in range(size)]


@pytest.mark.slow
def test_a_list_that_cannot_be_finished_leaves_the_earlier_one(tmp_path: Path) -> None:
    run_ranks(2, written, str(tmp_path), "first")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run_ranks(1, failing, str(tmp_path)) == ["no more"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(ProcessRaisedException, match="no more"):  # of one rank, while the other waits for it
        run_ranks(2, failing_late, str(tmp_path))
    assert users(tmp_path) == ["first-0", "first-1"]


def test_nobody_is_an_empty_list_that_can_be_read(tmp_path: Path) -> None:
    write_recommendations([], tmp_path, alone())
    result = pd.read_parquet(tmp_path)
    assert result.columns.tolist() == list_schema().names
    assert len(result) == 0


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be created as a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be created as a folder"):
        make_folder(tmp_path / "file" / "below")


ROWS = [
    {"user": "u,1", "item": "i", "title": 'a "b", c', "rank": 1, "score": 0.5},
    {"user": "ü", "item": "007", "title": "", "rank": 2, "score": None},
]


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_every_format_keeps_ids_titles_and_missing_scores(tmp_path: Path, file_format: FileFormat) -> None:
    for other in ("parquet", "csv"):
        write_recommendations([table("earlier")], tmp_path, alone(), other)  # type: ignore[arg-type]
    tables = [pa.Table.from_pylist([row], schema=list_schema(titles=True)) for row in ROWS]
    write_recommendations(tables, tmp_path, alone(), file_format, titles=True)
    (path,) = tmp_path.iterdir()
    assert path.name == f"recommendations-00000-of-00001.{file_format}"
    if file_format == "csv":
        result = pd.read_csv(path, dtype={"user": str, "item": str}, keep_default_na=False)
        result["score"] = pd.to_numeric(result["score"])
    elif file_format == "jsonl":
        result = pd.read_json(path, lines=True, dtype={"user": str, "item": str, "title": str})
    else:
        result = pd.read_parquet(path)
    assert result.columns.tolist() == ["user", "item", "title", "rank", "score"]
    assert result.drop(columns="score").to_dict("records") == [
        {key: value for key, value in row.items() if key != "score"} for row in ROWS
    ]
    assert result["score"][0] == 0.5
    assert pd.isna(result["score"][1])


TITLES = {
    '=HYPERLINK("http://a")': '\'=HYPERLINK("http://a")',
    "@SUM(A1)": "'@SUM(A1)",
    "+1": "'+1",
    "-1": "'-1",
    "\t=1": "'\t=1",
    "＝1": "'＝1",
    "a=1": "a=1",
    "'n Sync": "'n Sync",
}


def test_titles_of_a_csv_are_no_formulas_and_ids_stay(tmp_path: Path) -> None:
    rows = [{"user": "=u", "item": "-7", "title": title, "rank": 1, "score": -0.5} for title in TITLES]
    tables = [pa.Table.from_pylist(rows, schema=list_schema(titles=True))]
    for file_format, expected in (("csv", list(TITLES.values())), ("jsonl", list(TITLES)), ("parquet", list(TITLES))):
        write_recommendations(tables, tmp_path, alone(), file_format, titles=True)  # type: ignore[arg-type]
        (path,) = tmp_path.iterdir()
        read = {"csv": pd.read_csv, "jsonl": partial(pd.read_json, lines=True, dtype=False), "parquet": pd.read_parquet}
        result = read[file_format](path)
        assert result["title"].tolist() == expected
        assert set(result["user"]) == {"=u"}
        assert set(result["item"].astype(str)) == {"-7"}
        assert set(result["score"]) == {-0.5}


def test_printed_titles_are_no_formulas_either(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"rank": 1, "item": "-7", "title": list(TITLES), "score": 0.5}
    show(pd.DataFrame(columns), Format.CSV)
    result = pd.read_csv(StringIO(capsys.readouterr().out), dtype=str)
    assert result["title"].tolist() == list(TITLES.values())
    assert set(result["item"]) == {"-7"}
    show(pd.DataFrame(columns), Format.JSONL)
    assert '"title":"+1"' in capsys.readouterr().out


def test_nobody_is_an_empty_csv_with_a_header(tmp_path: Path) -> None:
    write_recommendations([], tmp_path, alone(), "csv")
    assert next(tmp_path.iterdir()).read_text().strip() == '"user","item","rank","score"'
