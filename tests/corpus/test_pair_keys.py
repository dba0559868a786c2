"""Keys and digests of interactions do not depend on rows and files, and differ between interactions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cllm4rec_dist.corpus.manifest import SPLITS, Manifest
from cllm4rec_dist.corpus.pair_keys import digest, id_hashes, pair_keys, split_digests
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus, write_corpus
from tests.corpus.samples import BlankTokenizer, recipe
from tests.harness import make_catalog

USERS, ITEMS = ["ann", "bob", "çem"], ["x", "y", "z", "音楽"]
LISTS = [[0, 2], [3], [1, 0, 3]]


def keys(users: list[str], items: list[str], lists: list[list[int]]) -> np.ndarray:
    return pair_keys(id_hashes("user", users), id_hashes("item", items), Ragged.from_lists(lists))


def test_keys_are_of_external_ids_and_not_of_rows() -> None:
    by_pair = dict(zip([(u, i) for u, row in enumerate(LISTS) for i in row], keys(USERS, ITEMS, LISTS), strict=True))
    order = [2, 0, 3, 1]  # of the items, and one more user in front of the others
    renumbered = keys(
        ["aaa", *USERS], [ITEMS[i] for i in order], [[0], *([order.index(i) for i in row] for row in LISTS)]
    )
    assert renumbered[1:].tolist() == list(by_pair.values())
    assert len(set(renumbered.tolist())) == len(renumbered)


def test_keys_stay_the_same_from_version_to_version() -> None:
    # Checkpoints carry them: others would make every leak unseen.
    assert keys(["u1"], ["i1"], [[0]]).tolist() == [11969828529309367344]


def test_a_user_and_an_item_of_the_same_name_are_two_things() -> None:
    one, other = keys(["a"], ["b"], [[0]]), keys(["b"], ["a"], [[0]])
    assert one[0] != other[0]


def test_a_million_interactions_have_different_keys_that_spread_evenly() -> None:
    names = [str(index) for index in range(1000)]
    hashes = keys(names, names, [list(range(1000))] * 1000)
    assert len(np.unique(hashes)) == 1_000_000
    share = np.histogram((hashes >> np.uint64(60)).astype(int), bins=16)[0] / len(hashes)
    assert np.abs(share - 1 / 16).max() < 0.002


def test_a_digest_is_of_a_set() -> None:
    hashes = keys(USERS, ITEMS, LISTS)
    assert digest(hashes) == digest(hashes[::-1].copy())
    assert digest(hashes) != digest(hashes[1:])
    assert (
        len({*split_digests(ITEMS, (USERS, {"a": Ragged.from_lists(LISTS), "b": Ragged.from_lists([[], [], []])}))})
        == 2
    )


def test_a_manifest_has_a_digest_of_each_split_whatever_the_tokenizer(tmp_path: Path) -> None:
    digests = []
    for name, tokenizer in (("one", BlankTokenizer()), ("other", BlankTokenizer())):
        tokenizer.fingerprint = name
        write_corpus(make_catalog(), tokenizer, str(tmp_path / name), recipe(), progress=False)
        digests.append(Corpus.open(str(tmp_path / name)).manifest.split_digests)
    assert digests[0] == digests[1]
    assert digests[0].keys() == set(SPLITS)
    assert len(set(digests[0].values())) == 3


def test_a_corpus_of_an_earlier_version_has_none_and_opens(tmp_path: Path) -> None:
    write_corpus(make_catalog(), BlankTokenizer(), str(tmp_path / "corpus"), recipe(), progress=False)
    tree = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    del tree["split_digests"]
    assert Manifest.from_bytes(json.dumps(tree).encode(), "old").split_digests == {}
