"""Held-out interactions that an earlier run was trained on: refused, or reported with every metric."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import SEEN_FILE, Checkpoint
from cllm4rec_dist.checkpointing.increments import STATE_FILE
from cllm4rec_dist.checkpointing.leaks import find_leak
from cllm4rec_dist.checkpointing.lineage import Leak, SeenInteractions, TrainedOn, corpus_keys, new_user_keys
from cllm4rec_dist.checkpointing.run_folder import STEP
from cllm4rec_dist.checkpointing.store import COMMIT, Store
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation.comparison import compare
from cllm4rec_dist.evaluation.inference import evaluate_run
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks, with_messages, with_new_users
from tests.training import Made, make_config, refused, run

SWAPPED = 5


def split_again(catalog: Catalog, num_users: int = SWAPPED) -> Catalog:
    """Swap some users' last training item and their test item."""
    train, test = [list(row) for row in catalog.train], [list(row) for row in catalog.test]
    for user in range(len(train) - num_users, len(train)):
        train[user][-1], test[user][0] = test[user][0], train[user][-1]
    return dataclasses.replace(catalog, train=Ragged.from_lists(train), test=Ragged.from_lists(test))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Make `first`, `again` (split in another way) and `renamed` (`first` by another name), and a run on `first`."""
    folder = tmp_path_factory.mktemp("leaks")
    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    kinds = {"first": catalog, "again": split_again(catalog)}
    made = {name: (folder, make_corpus(folder / name, c, backbone), str(backbone)) for name, c in kinds.items()}
    made["renamed"] = folder, make_corpus(folder / "renamed", catalog, backbone, name="other"), str(backbone)
    run_ranks(2, run, make_config(made["first"], folder / "pretrained", max_steps=2))
    return made


def opened(run: Path) -> Checkpoint:
    """The newest checkpoint, which need not be the best one."""
    store, names = find(str(run), (STEP,))
    return Checkpoint.open(store, names[0])


def leak_of(run: Path) -> Leak | None:
    lineage = opened(run).metadata.lineage
    assert lineage is not None
    return lineage.leak


def tuned(made: Made, output: Path, init_from: Path, **changes: Any) -> RunConfig:
    return make_config(made, output, "finetune", init_from=str(init_from), max_steps=2, **changes)


@pytest.mark.slow
def test_a_leak_is_counted_exactly_and_an_example_is_given(corpora: dict[str, Made]) -> None:
    first, again = (Corpus.open(corpora[name][1]) for name in ("first", "again"))
    leak, example = find_leak(again, TrainedOn.of_corpus(first).seen)
    assert leak == Leak(num_interactions=SWAPPED, is_exact=True, num_held_out=46)
    catalog = make_catalog()
    row = catalog.num_users - SWAPPED
    user, item = catalog.user_ids[row], catalog.item_ids[int(catalog.train[row][-1])]
    assert (user in example, item in example) == (True, True)
    assert find_leak(first, TrainedOn.of_corpus(first).seen) == (None, "")


def test_a_leak_is_estimated_from_a_sample(corpora: dict[str, Made]) -> None:
    first, again = (Corpus.open(corpora[name][1]) for name in ("first", "again"))
    (keys,) = corpus_keys(first, "train")
    leak, _ = find_leak(again, SeenInteractions.of(keys, size=len(keys) // 2))
    assert leak is not None
    assert not leak.is_exact
    assert 1 <= leak.num_interactions <= 46


def test_an_interaction_in_two_splits_of_a_corpus_is_no_leak(tmp_path: Path) -> None:
    catalog = make_catalog()
    twice = dataclasses.replace(catalog, test=Ragged.from_lists([list(row)[:1] for row in catalog.train]))
    backbone = make_backbone(tmp_path / "backbone", catalog)
    corpus = Corpus.open(make_corpus(tmp_path / "corpus", twice, backbone))
    assert find_leak(corpus, TrainedOn.of_corpus(corpus).seen) == (None, "")


@pytest.mark.slow
def test_a_run_that_saw_what_the_corpus_holds_out_is_refused_before_training(
    corpora: dict[str, Made], tmp_path: Path
) -> None:
    source = corpora["first"][0] / "pretrained"
    for message in run_ranks(2, refused, tuned(corpora["again"], tmp_path / "leak", source)):
        assert f"was trained on {SWAPPED} of the 46 interactions" in message
        assert "user 'user-" in message
        assert "--allow-leak" in message
    assert not (tmp_path / "leak" / "checkpoints").exists()


@pytest.mark.slow
def test_the_same_split_in_another_corpus_is_no_leak(corpora: dict[str, Made], tmp_path: Path) -> None:
    source = corpora["first"][0] / "pretrained"
    config = tuned(corpora["renamed"], tmp_path / "run", source)
    (_, messages), _ = run_ranks(2, with_messages, run, config)
    assert not any("LEAK" in message or "ANOTHER CATALOG" in message for message in messages)
    assert any("the same users and items" in message for message in messages)
    assert leak_of(tmp_path / "run") is None


def evaluated(world: World, folder: str, output: str) -> None:
    evaluate_run(world, lambda metrics: None, folder, "test", ["recall@5"], 4, output)


@pytest.mark.slow
def test_an_allowed_leak_is_recorded_inherited_and_reported_with_every_metric(
    corpora: dict[str, Made], tmp_path: Path
) -> None:
    source = corpora["first"][0] / "pretrained"
    allowed = tuned(corpora["again"], tmp_path / "leaky", source, allow_leak=True)
    (_, messages), _ = run_ranks(2, with_messages, run, allowed)
    assert any(message.startswith("LEAK: ") for message in messages)
    note = f"trained on {SWAPPED} held-out interactions: the figures are not comparable"
    # A run on the same corpus in between, or resuming, does not clear it.
    assert (
        "was trained on 5 of" in run_ranks(1, refused, tuned(corpora["again"], tmp_path / "x", tmp_path / "leaky"))[0]
    )
    run_ranks(1, run, tuned(corpora["again"], tmp_path / "washed", tmp_path / "leaky", allow_leak=True))
    run_ranks(1, run, allowed.model_copy(update={"max_steps": 4, "allow_leak": False}))
    for folder in ("leaky", "washed"):
        assert leak_of(tmp_path / folder) == Leak(num_interactions=SWAPPED, is_exact=True, num_held_out=46)
        output = tmp_path / f"{folder}-evaluation"
        ((_, messages),) = run_ranks(1, with_messages, evaluated, str(tmp_path / folder), str(output))
        assert any(note in message for message in messages)
        assert json.loads((output / "evaluation.json").read_text())["leak"]["num_interactions"] == SWAPPED
        assert note in compare(output, ["recall@5"], baselines=(), seconds=1.0)
        assert json.loads((output / "results.json").read_text())["notes"] == [note]
        assert note in (output / "report.html").read_text()
        assert note in (output / "results.md").read_text()


@pytest.mark.slow
def test_a_leak_through_a_run_on_a_third_corpus_is_detected(corpora: dict[str, Made], tmp_path: Path) -> None:
    folder, _, backbone = corpora["first"]
    catalog = make_catalog()
    nothing = Ragged.from_lists([list(row)[:1] for row in catalog.valid])  # trains on the former validation items
    between = dataclasses.replace(catalog, train=nothing, valid=catalog.test, test=catalog.test)
    made = folder, make_corpus(tmp_path / "between", between, Path(backbone)), backbone
    run_ranks(1, run, tuned(made, tmp_path / "middle", folder / "pretrained"))
    message = run_ranks(1, refused, tuned(corpora["again"], tmp_path / "run", tmp_path / "middle"))[0]
    assert (
        f"was trained on {SWAPPED + 23} of the 46 interactions" in message
    )  # those of the middle run are held out too


def as_an_earlier_version_wrote_it(run: Path) -> None:
    """Remove the lineage from every checkpoint."""
    for folder in (run / "checkpoints").iterdir():
        tree = json.loads((folder / STATE_FILE).read_text())
        del tree["lineage"]
        store = Store(str(folder.parent))
        entries = dict(store.marker(folder.name).files)
        del entries[SEEN_FILE]
        entries[STATE_FILE] = store.write(folder.name, STATE_FILE, lambda p, t=tree: p.write_text(json.dumps(t)))
        (folder / SEEN_FILE).unlink()
        (folder / COMMIT).unlink()
        store.commit(folder.name, entries)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_gives_a_warning_that_leaks_cannot_be_checked(
    corpora: dict[str, Made], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    run_ranks(1, run, make_config(corpora["first"], old, max_steps=1))
    as_an_earlier_version_wrote_it(old)
    ((_, messages),) = run_ranks(1, with_messages, run, tuned(corpora["again"], tmp_path / "other", old))
    assert any("LEAKS CANNOT BE CHECKED" in message for message in messages)
    ((_, messages),) = run_ranks(1, with_messages, run, tuned(corpora["first"], tmp_path / "same", old))
    assert not any("LEAK" in message for message in messages)
    # It stays unknown through a run in between.
    config = tuned(corpora["first"], tmp_path / "next", tmp_path / "other", allow_leak=True)
    ((_, messages),) = run_ranks(1, with_messages, run, config)
    assert any("LEAKS CANNOT BE CHECKED" in message for message in messages)
    ((_, messages),) = run_ranks(1, with_messages, evaluated, str(tmp_path / "next"), str(tmp_path / "evaluation"))
    assert any("is not known" in message for message in messages)
    # A run of that version that resumes records its lineage from then on.
    run_ranks(1, run, make_config(corpora["first"], old, max_steps=2))
    assert opened(old).metadata.lineage is not None


@pytest.mark.slow
def test_a_checkpoint_that_lost_its_record_is_damaged(corpora: dict[str, Made], tmp_path: Path) -> None:
    run_ranks(1, run, make_config(corpora["first"], tmp_path / "run", max_steps=2))
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    (folder / SEEN_FILE).unlink()
    message = run_ranks(1, refused, tuned(corpora["again"], tmp_path / "x", tmp_path / "run"))[0]
    assert "has no valid checkpoint" in message


def test_all_interactions_of_a_held_out_user_are_held_out(tmp_path: Path) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog)
    corpus = Corpus.open(make_corpus(tmp_path / "corpus", with_new_users(catalog), backbone))
    new = with_new_users(catalog).new_users
    keys = new_user_keys(corpus)
    assert [len(part) for part in keys] == [len(getattr(new, name).values) for name in ("history", "valid", "test")]
    assert find_leak(corpus, TrainedOn.of_corpus(corpus).seen) == (None, "")
    user, item = new.history.rows[1], new.history.values[1]
    leak, example = find_leak(corpus, SeenInteractions.of(keys[0][1:2]))
    held_out = sum(len(part) for part in keys) + len(catalog.valid.values) + len(catalog.test.values)
    assert leak == Leak(num_interactions=1, is_exact=True, num_held_out=held_out)
    assert example == f"user {new.ids[int(user)]!r} with item {catalog.item_ids[int(item)]!r}"
