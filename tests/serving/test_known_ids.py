"""Ids of a run without torch, and items by their titles."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.errors import CheckpointError, DamagedCheckpointError, DataError
from cllm4rec_dist.serving.id_list import similar_ids
from cllm4rec_dist.serving.item_catalog import ItemCatalog
from cllm4rec_dist.serving.known_ids import (
    KnownIds,
    find_item,
    read_known_ids,
    require_joined_items,
    warn_of_alike_users,
)
from cllm4rec_dist.serving.new_items import NewItem
from tests.integration.runs import clean_environment

CATALOG = ItemCatalog(
    ["1", "2", "3", "lamp"], ["Red lamp", "Red lamp, large", "Blue chair", "Desk"], None, np.zeros(4, np.int64)
)


def test_ids_are_read_without_torch(runs: dict[str, Path]) -> None:
    code = (
        "import sys; from cllm4rec_dist.serving.known_ids import read_known_ids;"
        f"print(read_known_ids({str(runs['paper'])!r}).users[3], 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment()
    )
    assert result.stdout.split() == ["user-003", "False"]
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        read_known_ids(str(runs["paper"].parent))


def test_ids_are_read_although_the_best_checkpoint_is_damaged(runs: dict[str, Path], tmp_path: Path) -> None:
    """The ranks pass over it, too, and report it."""
    run = tmp_path / "run"
    shutil.copytree(runs["paper"], run, ignore=shutil.ignore_patterns("tensorboard"))
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "best-00000007", checkpoints / "step-00000007", dirs_exist_ok=True)
    store, names = find(str(run))
    assert names == ["best-00000007", "step-00000007"]
    for file in ("state.json", "COMMIT.json"):
        Path(store.path(names[0]), file).write_text("{}")
        assert read_known_ids(str(run)).users[3] == "user-003"
    for name in names[1:]:
        Path(store.path(name), "state.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match="is not what was committed"):
        read_known_ids(str(run))


@pytest.mark.parametrize(
    ("text", "expected"), [("1", "1"), ("lamp", "lamp"), ("blue", "3"), ("Chair blue", "3"), ("red LAMP", "1")]
)
def test_an_item_is_meant_by_its_id_or_by_words_of_its_title(text: str, expected: str) -> None:
    assert find_item("ITEM", text, CATALOG) == expected


def test_what_means_several_items_or_none_is_refused_with_candidates() -> None:
    with pytest.raises(DataError, match=r"is in the titles of 2 items. Give the id of one:\n  1  Red lamp\n  2  Red"):
        find_item("ITEM", "red", CATALOG)
    with pytest.raises(DataError, match=r"'blue cha' is not an item.*Did you mean 3 \(Blue chair\)\?"):
        find_item("ITEM", "blue cha", CATALOG)
    with pytest.raises(DataError, match=r"'lamb' is not an item of the run. Did you mean lamp\?"):
        find_item("ITEM", "lamb", CATALOG)
    alike = ItemCatalog(["SKU-0001", "SKU-0002"], ["Pan", "Pot"], None, np.zeros(2, np.int64))
    with pytest.raises(DataError, match=r"Did you mean SKU-0001\?$"):
        find_item("ITEM", "sku-0001", alike)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("101", ["000101"]),
        ("101.0", ["000101"]),
        (" abc-7", ["ABC-007"]),
        ("000110", ["000101"]),
        ("entirely other", []),
    ],
)
def test_ids_that_may_be_meant(name: str, expected: list[str]) -> None:
    assert similar_ids(name, ["000101", "ABC-007", "x"])[:1] == expected


def test_orders_that_do_not_meet_the_catalog_are_refused_and_half_of_them_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = ItemCatalog(["0071", "0072", "0073"], ["", "", ""], None, np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"--history: \['71', '72'\] are not items of the run. Did you mean 0071"):
        require_joined_items("--history", ["71", "72", "71"], items)
    require_joined_items("--history", ["0071", "72"], items)
    require_joined_items("--history", [], items)
    assert not caplog.records
    require_joined_items("--history", ["0071", "72", "73"], items)
    assert "2 of 3 ordered items are unknown to the run and left out, such as '72'" in caplog.text


def test_new_ids_that_look_like_misspelt_known_ones_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    known_ids = KnownIds([], ItemCatalog(["0071", "0072", "A-1"], ["", "", ""], None, np.zeros(3, np.int64)))
    known_ids.with_new([NewItem("0073", "Red lamp"), NewItem("B-1", "Blue lamp")])
    assert not caplog.messages
    known_ids.with_new([NewItem("0073", "Red lamp"), NewItem("71", "Lamp"), NewItem("72", "Chair")])
    assert (
        "2 item ids differ from ids of the run only in case, zeros or punctuation, such as '71' and '0071'"
        in caplog.text
    )


def test_customers_of_later_orders_that_look_like_misspelt_known_ones_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    users = ["00000329", "A-7", "12"]
    warn_of_alike_users("--history", ["00000329", "12", "99990001"], users)
    assert not caplog.messages
    warn_of_alike_users("--history", ["329", "12", "a7", "new"], users)
    assert "--history: 2 user ids differ from ids of the run only in case, zeros or punctuation" in caplog.text
    assert "such as '329' and '00000329': they count as people who came later" in caplog.text
    warn_of_alike_users("--history", ["329"], users)
    assert "--history: 1 user id differs from ids" in caplog.text
