"""The commands `recommend` and `similar`, as a person types them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cllm4rec_dist.cli import app
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.serving.bulk import BulkRequest, recommend_users
from cllm4rec_dist.serving.new_items import NewItem
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender
from tests.harness import alone


def called(*arguments: str | Path) -> tuple[str, str]:
    """Return stdout and stderr of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def refused(*arguments: str | Path) -> str:
    with pytest.raises(CLLM4RecError) as caught:
        CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.fixture
def run(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "RAY_ADDRESS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return runs["paper"]


def test_a_basket_is_answered_in_the_terminal(run: Path, recommender: Recommender) -> None:
    expected = recommender.recommend(histories=[["item-003", "item-011"]], top=3)
    printed, warnings = called("recommend", run, "--basket", "item-003, item-011,item-0x3", "--top", "3")
    assert "'item-0x3' is not an item of the run and is left out; did you mean item-0" in warnings
    header, *lines = printed.splitlines()
    assert header.split() == ["rank", "item", "title", "score"]
    assert [line.split()[1] for line in lines] == expected["item"].tolist()
    assert [line.split()[-1] for line in lines] == [f"{score:.4f}" for score in expected["score"]]
    assert all(title in line for title, line in zip(expected["title"], lines, strict=True))

    printed, _ = called(
        "recommend", run, "--basket", "item-003", "--basket", "item-011", "-k", "3", "--format", "jsonl"
    )
    assert [json.loads(line)["item"] for line in printed.splitlines()] == expected["item"].tolist()
    printed, warnings = called("recommend", run, "--user", "user-003", "--format", "csv")
    assert printed.splitlines()[0] == "rank,item,title,score"
    assert len(printed.splitlines()) == 11
    both, _ = called("recommend", run, "--user", "user-003", "--basket", "item-003", "--format", "csv")
    assert both != printed


def test_a_small_table_comes_without_log_lines(run: Path) -> None:
    assert called("recommend", run, "--basket", "item-003", "--top", "2")[1] == ""
    assert called("similar", run, "item-003", "--top", "2")[1] == ""


def test_words_of_titles_in_a_basket_are_answered_with_the_items(run: Path, recommender: Recommender) -> None:
    word = recommender.items.titles[3].split()[0]
    message = refused("recommend", run, "--basket", word)
    titles = dict(zip(recommender.items.ids, recommender.items.titles, strict=True))
    meant = re.findall(r"(item-\d+) \(([^)]*)\)", message)
    assert meant
    assert all(titles[item] == title and word in title for item, title in meant)


def test_an_empty_basket_lists_popular_items_and_says_so(run: Path) -> None:
    printed, warnings = called("recommend", run, "--basket", "", "--top", "2", "--format", "jsonl")
    assert "popular items, without a score" in warnings
    assert [json.loads(line)["score"] for line in printed.splitlines()] == [None, None]


def test_neighbours_are_found_by_id_or_title(run: Path, recommender: Recommender) -> None:
    expected = recommender.similar("item-004", top=3)["item"].tolist()
    printed, _ = called("similar", run, "item-004", "--top", "3", "--format", "csv")
    assert [line.split(",")[1] for line in printed.splitlines()[1:]] == expected
    titles = recommender.items.titles
    (row,) = [row for row, title in enumerate(titles) if titles.count(title) == 1 and len(title.split()) > 3][:1]
    by_title, _ = called("similar", run, titles[row].upper(), "--format", "csv")
    assert by_title == called("similar", run, recommender.items.ids[row], "--format", "csv")[0]
    assert "is in the titles of" in refused("similar", run, "чай")
    assert "Did you mean item-004" in refused("similar", run, "ITEM-4")


def test_files_with_titles_a_category_and_without_what_is_sold_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sold-out.txt").write_text("item-000\nitem-001\nnothing\n")
    (tmp_path / "category.txt").write_text("\n".join(f"item-{row:03d}" for row in range(9)))
    (tmp_path / "orders.csv").write_text("customer;sku\nnew;item-016\nuser-008;item-016\nnew;?\n")
    options = ["--exclude-file", tmp_path / "sold-out.txt", "--items-file", tmp_path / "category.txt", "--titles"]
    more = ["--history", tmp_path / "orders.csv", "--top", "20", "--format", "csv"]
    _, warnings = called("recommend", run, tmp_path / "out", *options, *more)
    assert "--exclude-file: 1 item unknown to the run, such as 'nothing'" in warnings
    table = pd.read_csv(tmp_path / "out/recommendations-00000-of-00001.csv")
    assert table.columns.tolist() == ["user", "item", "title", "rank", "score"]
    assert table["user"].drop_duplicates().tolist() == ["new", "user-008"]
    assert set(table["item"]) <= {f"item-{row:03d}" for row in range(2, 9)}
    assert len(table[table["user"] == "new"]) == 7


WRONG = [
    (["out", "--history", "train"], "The option was renamed: --known-items train"),
    (["out", "--basket", "a"], "--basket: .* is printed"),
    (["B", "--basket", "A,"], r"ends at the blank after its comma, so 'B' is not in it. Write --basket A,B"),
    (["--basket", "A,", "B,", "C"], "so 'B,', 'C' is not in it"),
    (["out", "more"], r"OUTPUT: \['out', 'more'\] must be one folder"),
    (["--basket", "item-2", "--basket", "x"], r"are not items .* item-002 .*for 'item-2'. Give ids between commas"),
    (["--basket", "TITLE"], r"--basket: 'TITLE' is not an item of the run\. "),
    ([], "has no OUTPUT after it"),
    (["--user", "user-001", "--user", "user-002"], "has no OUTPUT after it"),
    (["--basket", "item-001", "--known-items", "train"], "--known-items: 'train' is for lists that are written"),
    (["--basket", "item-001", "--skip-unknown-users"], "--skip-unknown-users"),
    (["--basket", "item-001", "--format", "parquet"], "--format: 'parquet' cannot be printed"),
    (["out", "--format", "table"], "--format: 'table' is for the terminal"),
    (["--user", "user-8"], r"'user-8' is not a user of the run\. Did you mean user-008"),
    (["out", "--user", "user-8"], r"'user-8' is not a user of the run\. Did you mean user-008"),
    (["out", "--users-file", "nothing.txt"], "--users-file: .* cannot be read"),
    (["out", "--exclude-file", "nothing.txt"], "--exclude-file: .* cannot be read"),
    (["out", "--items-file", "wrong.txt"], r"--items-file: 'ITEM-1' is not an item of the run\. Did you mean item-001"),
    (["out", "--items-file", "blank.txt"], r"--items-file: 'blank.txt' has no ids\. Write one id per line"),
    (["--basket", "item-001", "--items-file", "blank.txt"], "--items-file: 'blank.txt' has no ids"),
    (["out", "--history", "nothing.csv"], "--history: 'nothing.csv' does not exist"),
    (["out", "--user-column", "x"], "is about --history"),
    (["out", "--encoding", "cp1252"], "--encoding: 'cp1252' is about --history"),
    (["--basket", "item-001", "--separator", ";"], "--separator: ';' is about --history"),
    (["--user", "user-001", "--time-format", "%d"], "--time-format: '%d' is about --history"),
    (["out", "--history", "orders.csv", "--encoding", "foo"], "--encoding: 'foo' is refused: 'foo' is not an encoding"),
    (["out", "--min-score", "nan"], "--min-score"),
    (["out", "--launcher", "mpi"], "--launcher"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_mistakes_are_reported_before_anything_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.txt").write_text("ITEM-1\n")
    Path("blank.txt").write_text("\n \n")
    Path("orders.csv").write_text("user,item\nuser-001,item-001\n")
    monkeypatch.setattr("cllm4rec_dist.cli.recommend.launch_short", lambda *a, **k: pytest.fail("started"))
    monkeypatch.setattr(Recommender, "load", lambda *a, **k: pytest.fail("loaded"))
    assert re.search(message, refused("recommend", run, *options))
    assert not Path("out").exists()
    assert "neither a checkpoint nor a run" in refused("recommend", tmp_path, "out")
    assert "neither a checkpoint nor a run" in refused("similar", tmp_path, "item-001")


@pytest.fixture
def new_items(tmp_path: Path) -> Path:
    path = tmp_path / "new.csv"
    path.write_text("item_id,title\nsku-1,quiet mountain trail\nsku-2,blue espresso\n")
    return path


def test_new_products_are_listed_and_may_be_in_a_basket(run: Path, recommender: Recommender, new_items: Path) -> None:
    grown = recommender.with_items({"sku-1": "quiet mountain trail", "sku-2": "blue espresso"})
    for basket in (["item-003"], ["sku-1", "item-003"], ["sku-1"]):
        printed, warnings = called(
            "recommend", run, "--basket", ",".join(basket), "-k", "17", "--new-items", new_items, "--format", "jsonl"
        )
        assert warnings == ""
        lines, expected = (
            [json.loads(line) for line in printed.splitlines()],
            grown.recommend(histories=[basket], top=17),
        )
        assert [line["item"] for line in lines] == expected["item"].tolist()
        assert [line["title"] for line in lines] == expected["title"].tolist()
        assert "sku-2" in expected["item"].tolist()
    printed, _ = called("similar", run, "sku-1", "-k", "3", "--new-items", new_items, "--format", "jsonl")
    assert [json.loads(line)["item"] for line in printed.splitlines()] == grown.similar("sku-1", 3)["item"].tolist()
    assert "sku-1" in called("similar", run, "blue espresso", "-k", "18", "--new-items", new_items)[0]


def test_files_of_lists_have_new_products(run: Path, recommender: Recommender, new_items: Path, tmp_path: Path) -> None:
    orders = tmp_path / "orders.csv"
    orders.write_text("user,item\nZoe,sku-1\nuser-003,item-000\nuser-003,sku-2\n")
    (tmp_path / "only.txt").write_text("sku-1\nsku-2\nitem-004\nitem-005\n")
    out = tmp_path / "out"
    called(
        "recommend",
        run,
        out,
        "--history",
        orders,
        "--new-items",
        new_items,
        "--items-file",
        tmp_path / "only.txt",
        "--titles",
        "--launcher",
        "process",
    )
    result = pd.concat(map(pd.read_parquet, sorted(out.iterdir())))
    grown = recommender.with_items({"sku-1": "quiet mountain trail", "sku-2": "blue espresso"})
    only = ["sku-1", "sku-2", "item-004", "item-005"]
    for name, history in (("Zoe", ["sku-1"]), ("user-003", ["item-000", "sku-2"])):
        user = name if name.startswith("user") else None
        (answer,) = grown.answer([Query(tuple(history), user, top=20, only=frozenset(only))])
        rows = result[result["user"] == name]
        assert rows["item"].tolist() == [entry.item for entry in answer.items]
        assert rows["title"].tolist() == [entry.title for entry in answer.items]
        np.testing.assert_allclose(rows["score"], [entry.score for entry in answer.items], atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item,title\nitem-004,blue\nitem-003,tea\n", "nor is any other of 2 (items of the run already: 2)"),
        ("item,title\nitem-004,blue\nsku-2,\n", "(items of the run already: 1; without a text: 1, such as 'sku-2')"),
        ("item,title\n,blue\n", "line 2: '' has no id"),
        ("item,price\nsku-1,3\n", "none with a usual name for titles or descriptions"),
    ],
)
def test_wrong_new_products_are_refused_before_the_model_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.setattr(Recommender, "load", lambda *args, **options: pytest.fail("read the model"))
    path = tmp_path / "new.csv"
    path.write_text(content)
    for command in (
        ["recommend", run, "--basket", "item-003"],
        ["recommend", run, tmp_path / "out"],
        ["similar", run, "item-003"],
    ):
        assert message in refused(*command, "--new-items", path)
    assert not (tmp_path / "out").exists()


def test_of_a_whole_feed_the_products_that_can_be_added_are_listed(
    run: Path, recommender: Recommender, tmp_path: Path
) -> None:
    path = tmp_path / "feed.csv"
    path.write_text(
        "item,title,price\nitem-003,tea,1\nsku-1,quiet mountain trail,2\nsku-2,,3\nsku-3,Zahnbürste,4\n"
        "item-004,blue,5\nsku-4,blue espresso,6\nsku-5,,7\n"
    )
    grown = recommender.with_items({"sku-1": "quiet mountain trail", "sku-4": "blue espresso"})
    printed, _ = called("similar", run, "sku-1", "-k", "17", "--new-items", path, "--format", "jsonl")
    assert [json.loads(line)["item"] for line in printed.splitlines()] == grown.similar("sku-1", 17)["item"].tolist()
    arguments = ["--new-items", path, "--launcher", "process", "--top", "30"]
    _, log = called("recommend", run, tmp_path / "out", *arguments)
    result = pd.concat(map(pd.read_parquet, sorted((tmp_path / "out").iterdir())))
    assert {item for item in result["item"] if item.startswith("sku")} == {"sku-1", "sku-4"}
    for expected in (
        "titles 'title', descriptions not given; not used: 'price'",
        "--new-items: left out 2 of 7 products: items of the run already",
        "--new-items: left out 2 of 7 products without a text, such as 'sku-2'",
    ):
        assert log.count(expected) == 1, expected


def test_the_ranks_leave_out_what_cannot_be_added(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    products = [NewItem("item-003", "tea"), NewItem("sku-2", ""), NewItem("sku-3", "Zahnbürste"), NewItem("n", "blue")]
    request = BulkRequest(top=30, users=["user-003"], new_items=tuple(products))
    logging.getLogger("cllm4rec_dist").propagate = True
    recommend_users(alone(), lambda metrics: None, str(run), request, str(tmp_path / "out"))
    result = pd.concat(map(pd.read_parquet, sorted((tmp_path / "out").iterdir())))
    assert [item for item in result["item"] if not item.startswith("item")] == ["n"]
    assert "left out 1 of 2 products without a word that a trained item's title or description has" in caplog.text


def test_a_text_of_unknown_words_is_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text("item,title\nsku-1,Zahnbürste\n")
    assert "has no word that a trained item's title or description has" in refused(
        "recommend", run, "--basket", "item-003", "--new-items", path
    )


def test_customers_of_later_orders_that_look_like_known_ones_are_warned_of(run: Path, tmp_path: Path) -> None:
    orders = tmp_path / "orders.csv"
    orders.write_text("user,item\nuser-3,item-000\nuser-004,item-000\nZoe,item-001\n")
    arguments = ["--history", orders, "--launcher", "process"]
    _, log = called("recommend", run, tmp_path / "out", *arguments)
    warning = (
        "--history: 1 user id differs from ids of the run only in case, zeros or punctuation, such as 'user-3' and"
    )
    assert log.count(f"{warning} 'user-003'") == 1
