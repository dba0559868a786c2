"""Checkpoints that hold changed rows: the same bits as whole ones, less to write, and no damage that goes unseen."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cllm4rec_dist.checkpointing.async_saver import AsyncSaver
from cllm4rec_dist.checkpointing.checkpoint import resume
from cllm4rec_dist.checkpointing.format import Checkpoint, RunState, changed_rows_name
from cllm4rec_dist.checkpointing.increments import STATE_FILE
from cllm4rec_dist.checkpointing.run_folder import STEP, CheckpointKind
from cllm4rec_dist.checkpointing.store import COMMIT, DAMAGED, Store
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import DamagedCheckpointError
from cllm4rec_dist.export.folder import export
from cllm4rec_dist.monitoring.status import read_statuses
from cllm4rec_dist.serving.recommender import Recommender
from cllm4rec_dist.system import assemble
from tests.checkpointing.test_checkpoint import SHARD, forge_marker, restate, retensor, same, state_of, void
from tests.checkpointing.test_warm_start import loaded_tables, other_catalog
from tests.damage import DAMAGE, Spoil
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks, with_messages
from tests.test_train import evaluated
from tests.test_train_faults import on_a_failing_store
from tests.training import Made, about, contents, make_config, metrics, names, run

BASE, NEWEST = "step-00000004", "step-00000006"
OPTIMIZER = {"lr": 1e-2, "embeddings_lr": 5e-3, "warmup_steps": 2}
SAMPLED = {"num_negatives": 5, "item_bias": True}
EMBEDDINGS = {"init": "spectral", "dropout": 0.3, "lambda_l": 0.01, "lambda_c": 0.1}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "two ranks": (2, "pretrain", {}),
    "three ranks, items sampled": (3, "finetune", {"head": SAMPLED}),
    "copies of the tables": (4, "finetune", {"embeddings": EMBEDDINGS | {"shard_group": 2}}),
    "moments on the host": (1, "pretrain", {"optimizer": OPTIMIZER | {"embeddings_state": "cpu"}, "head": SAMPLED}),
    "packed moments": (2, "pretrain", {"optimizer": OPTIMIZER | {"embeddings_state": "int8"}}),
}


def saving(full_every: int, every_steps: int = 1, keep: int = 20) -> dict[str, Any]:
    return {"checkpoint": {"every_steps": every_steps, "keep": keep, "full_every": full_every}}


def few_users(**changes: Any) -> dict[str, Any]:
    """Six steps of four users and two texts, so that a step leaves most rows alone."""
    return {"batch": {"users": 4, "texts": 2}, "max_steps": 6, **changes}


def opened(run: Path, name: str) -> Checkpoint:
    return Checkpoint.open(Store(f"{run}/checkpoints"), name)


def changed_rows(checkpoint: Checkpoint, table: str) -> Tensor:
    """The rows of a table that the files of a checkpoint hold."""
    about = checkpoint.metadata
    num_rows = about.num_user_rows if table.endswith("users") else about.num_items
    partition = about.partition(table, num_rows)
    found = []
    for rank in range(partition.world_size):
        tensors = load_file(checkpoint.file(f"shard-{rank:05d}-of-{about.world_size:05d}.safetensors"))
        local = tensors.get(changed_rows_name(table), torch.arange(partition.num_local(rank)))
        assert len(tensors[table]) == len(tensors[f"{table}.exp_avg"]) == len(local)
        found.append(local + partition.range(rank)[0])
    return torch.cat(found)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A backbone that is wide enough for moments in 8 bits."""
    folder, catalog = tmp_path_factory.mktemp("wide"), make_catalog()
    backbone = make_backbone(folder / "backbone", catalog, hidden_size=64)
    return folder, make_corpus(folder / "corpus", catalog, backbone), str(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_checkpoint_has_the_bits_of_a_whole_one(made: Made, wide: Made, tmp_path: Path, layout: str) -> None:
    size, stage, changes = LAYOUTS[layout]
    where = wide if layout == "packed moments" else made
    for full_every in (1, 3):
        config = make_config(where, tmp_path / str(full_every), stage, **few_users(**changes), **saving(full_every))
        run_ranks(size, run, config)
    assert metrics(tmp_path / "3") == metrics(tmp_path / "1")
    bases = [about(tmp_path / "3", name).base for name in names(tmp_path / "3")]
    assert [base and base.name for base in bases] == [
        None, "step-00000001", "step-00000001", None, "step-00000004", "step-00000004"
    ]  # fmt: skip
    tables = ["collaborative.users", *(["content.users", "content.items"] if stage == "pretrain" else [])]
    tables += ["collaborative.items", "head.bias"] if "head" in changes else []
    for name in names(tmp_path / "3"):
        whole, other = opened(tmp_path / "1", name), opened(tmp_path / "3", name)
        expected = contents(whole)
        assert same(contents(other), expected), name
        assert whole.external_ids("users") == other.external_ids("users")
        if other.base is None:
            continue
        assert {"users.parquet", "items.parquet"}.isdisjoint(other.marker.files)
        before = contents(other.base)
        for table in tables:
            differs = (expected[table] != before[table]).view(len(before[table]), -1).any(dim=1)
            stored = changed_rows(other, table)
            assert set(differs.nonzero().flatten().tolist()) <= set(stored.tolist()), (name, table)
            if table.endswith("users"):  # an update of a row that is only a negative may be too small to change it
                assert differs.nonzero().flatten().tolist() == stored.tolist(), (name, table)
                assert len(stored) < len(expected[table]), (name, table)


@pytest.fixture(scope="module")
def saved(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of two ranks twice: with whole checkpoints, and with whole ones at steps 1 and 4 only."""
    folder = tmp_path_factory.mktemp("saved")
    for name, full_every in (("whole", 1), ("changed", 3)):
        run_ranks(2, run, make_config(made, folder / name, **few_users(), **saving(full_every)))
    return {name: folder / name for name in ("whole", "changed")}


@pytest.mark.slow
def test_bytes_are_those_of_the_changed_rows(saved: dict[str, Path]) -> None:
    rest = set()
    for name in ("step-00000001", "step-00000002", "step-00000003"):
        checkpoint = opened(saved["changed"], name)
        num_bytes = 0
        for rank in range(2):
            path = checkpoint.file(f"shard-{rank:05d}-of-00002.safetensors")
            num_bytes += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")  # without its header
            for table in ("collaborative.users", "content.users", "content.items"):
                tensors = load_file(path)
                num_bytes -= len(tensors[table]) * 3 * 16 * 4  # rows of width 16 with two moments, in fp32
                num_bytes -= len(tensors.get(changed_rows_name(table), ())) * 4
        rest.add(num_bytes)
    assert len(rest) == 1, "adapters and the items, whose updates are dense, are in each of them"
    counts = [len(changed_rows(opened(saved["changed"], f"step-0000000{step}"), "content.users")) for step in (1, 2, 3)]
    assert counts[1] < counts[2] < counts[0]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_shards"), [(2, None), (1, None), (3, None), (4, 2)])
def test_a_run_goes_on_at_any_number_of_ranks_as_from_a_whole_one(
    made: Made, saved: dict[str, Path], tmp_path: Path, size: int, num_shards: int | None
) -> None:
    embeddings = {"embeddings": EMBEDDINGS | {"shard_group": num_shards}}
    for name, source in saved.items():
        shutil.copytree(source, tmp_path / name)
        changes = few_users(max_steps=9) | embeddings | saving(1 if name == "whole" else 3)
        run_ranks(size, run, make_config(made, tmp_path / name, **changes))
    assert metrics(tmp_path / "changed") == metrics(tmp_path / "whole")
    bases = {name: about(tmp_path / "changed", name).base for name in ("step-00000007", "step-00000008")}
    assert bases["step-00000007"] is None, "the first one after a resume is whole"
    assert bases["step-00000008"] is not None
    for name in ("step-00000007", "step-00000008", "step-00000009"):
        assert same(contents(opened(tmp_path / "changed", name)), contents(opened(tmp_path / "whole", name)))


def cases(clean: Path) -> Iterator[tuple[str, Callable[[Path], object], int]]:
    """Name and damage to a copy of the folder of checkpoints, and the step of the newest one that stays good."""

    def spoil(name: str, file: str, kind: str) -> Callable[[Path], object]:
        return lambda copy: DAMAGE[kind][0](copy / name / file, random.Random(f"{name}{file}{kind}"))

    def kill(num_files: int) -> Callable[[Path], object]:
        return lambda copy: [path.unlink() for path in sorted((copy / NEWEST).iterdir(), key=is_marker)[num_files:]]

    def is_marker(path: Path) -> tuple[bool, str]:
        return path.name == COMMIT, path.name

    def forge(file: str, change: Spoil) -> Callable[[Path], object]:
        return lambda copy: void(change(copy / NEWEST / file, random.Random(0)), forge_marker(copy / NEWEST))

    # A folder named COMMIT.json counts as a store that cannot be read, for which the whole run is refused.
    kinds = [(kind, "" if kind != "folder" else COMMIT) for kind in DAMAGE]
    for kind, left_out in kinds:
        for path in sorted({*(clean / NEWEST).iterdir()} - {clean / NEWEST / left_out}):
            yield f"{NEWEST}/{path.name} {kind}", spoil(NEWEST, path.name, kind), 5
        for path in sorted({*(clean / BASE).iterdir()} - {clean / BASE / left_out}):
            needed = path.name.startswith("shard") or path.name in (STATE_FILE, COMMIT)
            yield f"{BASE}/{path.name} {kind}", spoil(BASE, path.name, kind), 3 if needed else 6
    for num_files in range(len([*(clean / NEWEST).iterdir()])):
        yield f"killed after {num_files} files", kill(num_files), 5
    yield "no base", lambda copy: shutil.rmtree(copy / BASE), 3
    yield "base marked as damaged", lambda copy: (copy / BASE / COMMIT).rename(copy / BASE / DAMAGED), 3
    whole = clean.parents[1] / "whole" / "checkpoints" / BASE
    yield "another base", lambda copy: shutil.copytree(whole, copy / BASE, dirs_exist_ok=True), 4
    for index, (file, change) in enumerate(FORGED):
        yield f"{file} forged {index}", forge(file, change), 5


USERS, INDEX = "collaborative.users", "collaborative.users.changed_rows"
FORGED: list[tuple[str, Spoil]] = [
    *((SHARD, retensor(lambda t, n=n: t.pop(n))) for n in (USERS, INDEX, f"{USERS}.exp_avg", "content.items")),
    (SHARD, retensor(lambda t: t.update({INDEX: t[INDEX].flip(0)}))),
    (SHARD, retensor(lambda t: t.update({INDEX: t[INDEX].long()}))),
    (SHARD, retensor(lambda t: t.update({INDEX: t[INDEX] + 12}))),
    (SHARD, retensor(lambda t: t.update({INDEX: t[INDEX] - 12}))),
    (SHARD, retensor(lambda t: t.update({INDEX: t[INDEX][:, None]}))),
    (SHARD, retensor(lambda t: t.update({INDEX: t[INDEX][1:]}))),
    (SHARD, retensor(lambda t: t.update({USERS: t[USERS][:, 1:]}))),
    (SHARD, retensor(lambda t: t.update({USERS: t[USERS].double()}))),
    (STATE_FILE, restate(lambda s: s.update(base=None))),
    (STATE_FILE, restate(lambda s: s.update(base="step-00000004"))),
    *((STATE_FILE, restate(lambda s, n=n: s["base"].update(name=n))) for n in ("step-00000001", "../a", NEWEST, 4)),
    (STATE_FILE, restate(lambda s: s["base"]["marker"].update(num_bytes=1))),
    (STATE_FILE, restate(lambda s: s["base"]["marker"].update(sha256="0" * 64))),
]
"""Damage by somebody who then updated the marker."""


def try_all(world: World, config: RunConfig, saved: str, scratch: str) -> dict[int, int]:
    """Resume from every damaged copy; return how often from which step."""
    system, clean = assemble(config, world), Path(saved)
    os.chdir(scratch)
    expected, outcomes = {}, Counter[int]()
    for step in (3, 4, 5, 6):
        assert resume(system, Store(saved), [f"step-{step:08d}"], lambda c: None) is not None
        expected[step] = state_of(system)
    for index, (name, spoil, step) in enumerate(cases(clean)):
        copy = Path(scratch) / str(index)
        shutil.copytree(clean, copy)
        spoil(copy)
        store = Store(str(copy))
        resumed = resume(system, store, [*reversed(store.names(STEP))], lambda c: None)
        assert resumed is not None, name
        assert resumed.metadata.run.step == step, name
        assert same(state_of(system), expected[step]), name
        outcomes[step] += 1
        shutil.rmtree(copy)
    assert not Path("exploded").exists()
    return dict(outcomes)


@pytest.mark.slow
def test_damage_to_either_folder_is_noticed_and_the_newest_good_one_is_used(
    made: Made, saved: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(made, tmp_path / "run", **few_users())
    (outcomes,) = run_ranks(1, try_all, config, str(saved["changed"] / "checkpoints"), str(tmp_path))
    assert outcomes[4] == 1
    assert min(outcomes[3], outcomes[5], outcomes[6]) > 20


@pytest.mark.slow
def test_what_is_missing_is_named(made: Made, saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["changed"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints" / BASE)
    (damaged,) = (status.damaged for status in read_statuses(str(tmp_path / "run"), 0.0))
    assert damaged == [NEWEST, "step-00000005"]
    config = make_config(made, tmp_path / "run", **few_users(max_steps=7), **saving(3))
    ((_, messages),) = run_ranks(1, with_messages, run, config)
    told = next(message for message in messages if "DAMAGED CHECKPOINT" in message)
    assert f"{NEWEST}: base: '{BASE}' is damaged or not beside it" in told
    assert f"{BASE}/COMMIT.json: 'missing' is not there" in told
    assert told.endswith(f"Copy {BASE} beside it from where they were written, or use another checkpoint.")


@pytest.mark.slow
def test_pruning_keeps_bases_also_those_of_an_earlier_process(made: Made, tmp_path: Path) -> None:
    def left() -> list[int]:
        return [int(name.removeprefix(STEP)) for name in names(tmp_path)]

    expected = {5: [1, 4, 5], 6: [4, 5, 6], 8: [6, 7, 8]}
    for until, steps in expected.items():  # whole are 1, 4, and the first one of each later process: 6 and 7
        run_ranks(1, run, make_config(made, tmp_path, **few_users(max_steps=until), **saving(3, keep=2)))
        assert left() == steps, until
    for name in names(tmp_path):
        contents(opened(tmp_path, name))


@pytest.mark.slow
def test_a_whole_one_that_failed_is_no_base(made: Made, tmp_path: Path) -> None:
    """The next one is whole, because the changes since an earlier base are no longer known; a failed part is not."""
    config = make_config(made, tmp_path / "run", **few_users(), **saving(3))
    assert run_ranks(2, on_a_failing_store, config, ["step-00000002", "step-00000004"]) == ["", ""]
    bases = {name: about(tmp_path / "run", name).base for name in names(tmp_path / "run")}
    assert {int(name.removeprefix(STEP)): base and base.name for name, base in bases.items()} == {
        1: None,
        3: "step-00000001",
        5: None,
        6: "step-00000005",
    }
    run_ranks(2, run, make_config(made, tmp_path / "whole", **few_users()))
    assert same(contents(opened(tmp_path / "run", NEWEST)), contents(opened(tmp_path / "whole", NEWEST)))


def losing_its_base(world: World, config: RunConfig) -> None:
    """Train while somebody removes the first checkpoint before the third."""
    genuine = AsyncSaver.save

    def save(saver: AsyncSaver, state: RunState, kind: CheckpointKind) -> None:
        saver.wait()
        if state.step == 3 and world.is_main:
            shutil.rmtree(f"{config.output}/checkpoints/step-00000001")
        genuine(saver, state, kind)

    AsyncSaver.save = save  # type: ignore[method-assign]
    run(world, config)


@pytest.mark.slow
def test_a_base_that_disappears_is_followed_by_a_whole_one(made: Made, tmp_path: Path) -> None:
    run_ranks(2, losing_its_base, make_config(made, tmp_path, **few_users(max_steps=4), **saving(3)))
    store = Store(f"{tmp_path}/checkpoints")
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    assert opened(tmp_path, "step-00000003").base is None
    assert opened(tmp_path, "step-00000004").base is not None
    with pytest.raises(DamagedCheckpointError, match="base: 'step-00000001' is damaged or not beside it"):
        Checkpoint.open(store, "step-00000002")


@pytest.fixture(scope="module")
def tuned(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As `saved`, finetuned with sampled items, biases and a linear memory; the newest is the incremental step 6."""
    folder = tmp_path_factory.mktemp("tuned")
    changes = few_users(head=SAMPLED, linear={"neighbors": 4}, validation={"every_epochs": 0})
    for name, full_every in (("whole", 1), ("changed", 3)):
        run_ranks(2, run, make_config(made, folder / name, "finetune", **changes, **saving(full_every)))
    assert opened(folder / "changed", NEWEST).linear_memory(0, 17) is not None
    return {name: folder / name for name in ("whole", "changed")}


def means(folder: Path) -> Any:
    return json.loads((folder / "evaluation.json").read_text())["mean"]


@pytest.mark.slow
def test_whatever_opens_a_checkpoint_opens_both_folders(tuned: dict[str, Path], tmp_path: Path) -> None:
    lists = {}
    for name, folder in tuned.items():
        path = str(folder / "checkpoints" / NEWEST)
        run_ranks(3, evaluated, path, str(tmp_path / f"{name}-evaluated"))
        export(path, tmp_path / f"{name}-exported")
        lists[name] = Recommender.load(path, device="cpu").recommend(users=["user-003", "user-010"], top=5)
    assert means(tmp_path / "changed-evaluated") == means(tmp_path / "whole-evaluated")
    pd.testing.assert_frame_equal(lists["changed"], lists["whole"])
    for file in ("item_embeddings.parquet", "user_embeddings.parquet", "items.parquet", "users.parquet"):
        one, other = (pl.read_parquet(tmp_path / f"{name}-exported" / file) for name in ("changed", "whole"))
        assert one.equals(other), file


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["the same", "another catalog"])
def test_another_run_starts_from_an_incremental_one(
    made: Made, saved: dict[str, Path], tmp_path: Path, corpus: str
) -> None:
    other = made
    if corpus == "another catalog":
        other = tmp_path, make_corpus(tmp_path / "other", other_catalog(), Path(made[2])), made[2]
    tables = []
    for name, folder in saved.items():
        changes = {"init_from": str(folder / "checkpoints" / NEWEST), "allow_leak": True}
        tables.append(run_ranks(3, loaded_tables, make_config(other, tmp_path / name, **changes)))
    assert all(same(one, two) for one, two in zip(*tables, strict=True))


@pytest.mark.slow
def test_increments_live_on_any_file_system(made: Made, tmp_path: Path) -> None:
    changes = few_users(checkpoint={"dir": "memory://increments", "every_steps": 1, "keep": 1, "full_every": 3})
    assert run_ranks(1, in_memory, make_config(made, tmp_path / "run", **changes)) == [["step-00000004", NEWEST]]


def in_memory(world: World, config: RunConfig) -> list[str]:
    run(world, config)
    store = Store("memory://increments")
    assert Checkpoint.open(store, NEWEST).external_ids("users").length() == 23
    return store.names(STEP)
