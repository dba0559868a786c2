"""Who gets a list, and what counts as their history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from cllm4rec_dist.corpus.catalog import NewUsers
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.serving.known_ids import read_known_ids
from cllm4rec_dist.serving.people import gather_people
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender
from tests.harness import make_backbone, make_catalog, make_corpus, make_run


@pytest.fixture(scope="module")
def corpus(runs: dict[str, Path]) -> Corpus:
    return Corpus.open(str(runs["paper"].parent / "corpus"), verify=False)


def test_everyone_has_what_the_corpus_has(corpus: Corpus) -> None:
    for known, expected in (("all", corpus.history()), ("train", corpus.split("train"))):
        people = gather_people(corpus, None, None, known)  # type: ignore[arg-type]
        assert people.names == [f"user-{row:03d}" for row in range(23)]
        assert people.rows.tolist() == list(range(23))
        assert [row.tolist() for row in people.histories] == [row.tolist() for row in expected]


def test_later_orders_go_behind_and_new_people_have_no_row(corpus: Corpus) -> None:
    had = corpus.history()[4].tolist()
    again, fresh = f"item-{had[0]:03d}", next(row for row in range(17) if row not in had)
    orders = {"Zoe": ["item-003", "?", "item-001", "item-003"], "user-004": [again, f"item-{fresh:03d}", "!"], "Al": []}
    people = gather_people(corpus, None, orders)
    assert people.names == ["Zoe", "user-004", "Al"]
    assert people.rows.tolist() == [-1, 4, -1]
    assert [row.tolist() for row in people.histories] == [[3, 1], [*had, fresh], []]
    assert people.unknown_items == 2
    train = gather_people(corpus, None, {"user-004": [f"item-{fresh:03d}"]}, "train")
    assert train.histories[0].tolist() == [*corpus.split("train")[4].tolist(), fresh]


def test_named_users_are_listed_once_in_their_order(corpus: Corpus) -> None:
    people = gather_people(
        corpus, ["user-003", "Zoe", "user-001", "user-003"], {"Zoe": ["item-001"], "Al": ["item-002"]}
    )
    assert people.names == ["user-003", "Zoe", "user-001"]
    assert people.histories[1].tolist() == [1]
    assert gather_people(corpus, [], None).names == []


def test_people_of_whom_nothing_is_known_are_refused_or_counted(corpus: Corpus) -> None:
    with pytest.raises(DataError, match=r"users: \['user-3', 'Bo'\] are not users.*user-003 for.*--skip-unknown"):
        gather_people(corpus, ["user-001", "user-3", "Bo"], None)
    people = gather_people(corpus, ["user-001", "user-3", "Bo"], None, skip_unknown=True)
    assert people.names == ["user-001"]
    assert people.unknown_users == ["user-3", "Bo"]


def test_users_whom_the_split_holds_out_whole_have_items_and_no_row(tmp_path: Path) -> None:
    lists = [[[3, 1], [2]], [[5], []], [[4], [0]]]  # history, valid and test of two users
    new = NewUsers(pl.Series(["new-1", "new-2"]), *(Ragged.from_lists(each) for each in lists))
    catalog = replace(make_catalog(), new_users=new)
    backbone = make_backbone(tmp_path / "backbone", catalog)
    corpus = Corpus.open(make_corpus(tmp_path / "corpus", catalog, backbone), verify=False)
    everyone = gather_people(corpus, None, None)
    assert everyone.names[22:] == ["user-022", "new-1", "new-2"]
    assert everyone.rows.tolist() == [*range(23), -1, -1]
    assert [everyone.histories[row].tolist() for row in (23, 24)] == [[3, 1, 5, 4], [2, 0]]
    some = gather_people(corpus, ["new-2", "user-001"], {"new-2": ["item-009"]}, "train")
    assert some.rows.tolist() == [-1, 1]
    assert some.histories[0].tolist() == [2, 9]

    run = make_run(tmp_path / "run", corpus.url, backbone)
    recommender = Recommender.load(run, device="cpu")
    (named, basket) = recommender.answer([Query(user="new-1"), Query(("item-003", "item-001", "item-005", "item-004"))])
    assert named == basket
    assert not named.known_user
    assert len(recommender.users) == len(recommender.user_embeddings()) == 23
    assert read_known_ids(str(run)).users[-2:] == ["new-1", "new-2"]
