"""Warm start from a run on another catalog: rows follow their external ids, new rows are initialized like them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cllm4rec_dist import train as train_module
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.checkpointing.run_folder import store_url
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.checkpointing.warm_start import GROWTH_FILE
from cllm4rec_dist.config import BackboneConfig, RunConfig, load_config
from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.corpus.prepare import prepare
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.model import embedding_init
from cllm4rec_dist.model.build_backbone import build_backbone
from cllm4rec_dist.system import assemble, init_embeddings
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import Made, make_config, metrics, refused, run

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CLLM4REC_DATA") or ROOT.parent / "shared" / "data")
_KINDS = {"users": 29, "items": 21}


PROJECTING = {"projection": True}


def other_catalog() -> Catalog:
    """Without users 0 and 1 and items 0 to 2 of the old one, with eight and seven new ones, in another order."""
    catalog = make_catalog(29, 21, seed=3)
    return dataclasses.replace(
        catalog,
        user_ids=pl.Series([f"user-{u + 2:03d}" for u in range(29)]),
        item_ids=pl.Series([f"item-{i + 3:03d}" for i in reversed(range(21))]),
    )


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """The old run's corpus with its run in `old`, and the new corpus."""
    folder = tmp_path_factory.mktemp("growth")
    catalog, other = make_catalog(), other_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    made = folder, make_corpus(folder / "corpus", catalog, backbone), str(backbone)
    run_ranks(3, run, make_config(made, folder / "old", max_steps=5, head=PROJECTING))
    return made, (folder, make_corpus(folder / "other", other, backbone), str(backbone))


def tables(world: World, config: RunConfig, *, load: bool) -> dict[str, Tensor]:
    """Return this rank's rows as a run starts, with or without the weights of `init_from`."""
    system = assemble(config, world)
    if load:
        Path(config.output).mkdir(parents=True, exist_ok=True)
        train_module._resume_or_init(system, Store(store_url(config)), total_steps=100)
    else:
        init_embeddings(system)
    return {name: p.detach().clone() for name, p, _ in system.recommender.sharded_parameters()}


def loaded_projection(world: World, config: RunConfig) -> Tensor:
    """Return the head's projection as a run starts with the weights of `init_from`."""
    system = assemble(config, world)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    train_module._resume_or_init(system, Store(store_url(config)), total_steps=100)
    return dict(system.recommender.replicated_parameters())["head.projection"].detach()


def loaded_tables(world: World, config: RunConfig) -> dict[str, Tensor]:
    return tables(world, config, load=True)


def fresh(world: World, config: RunConfig) -> dict[str, Tensor]:
    return tables(world, config, load=False)


def trained(folder: Path) -> dict[str, Tensor]:
    store, names = find(str(folder))
    opened = Checkpoint.open(store, names[0])
    sizes = {"users": opened.metadata.num_users, "items": opened.metadata.num_items, "bias": opened.metadata.num_items}
    kinds = ("collaborative.users", "collaborative.items", "content.users", "content.items", "head.bias")
    saved = {
        name: opened.rows(name, sizes[name.rpartition(".")[2]], 0, sizes[name.rpartition(".")[2]]) for name in kinds
    }
    return {name: rows for name, rows in saved.items() if rows is not None}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_follow_their_external_ids_at_any_world_size(grown: tuple[Made, Made], tmp_path: Path, size: int) -> None:
    (folder, *_), other = grown
    config = make_config(other, tmp_path / "new", init_from=str(folder / "old"), allow_leak=True)
    parts = run_ranks(size, loaded_tables, config)
    loaded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    (fresh_tables,) = run_ranks(1, fresh, config)
    old = trained(folder / "old")

    users = torch.tensor([u + 2 if u + 2 < 23 else -1 for u in range(29)])
    items = torch.tensor([i + 3 if i + 3 < 17 else -1 for i in reversed(range(21))])
    rows = {"users": users, "items": items, "bias": items}
    assert loaded.keys() == old.keys()
    for name, table in loaded.items():
        ids = rows[name.rpartition(".")[2]]
        assert torch.equal(table[ids >= 0], old[name][ids[ids >= 0]]), name

    # A dense reference of the map for new items: ridge regression, then the length of the trained rows.
    inputs, targets = fresh_tables["collaborative.items"].double(), old["collaborative.items"].double()
    seen = inputs[items >= 0]
    ridge = 1e-2 * seen.square().sum() / seen.shape[1] * torch.eye(seen.shape[1])
    linear_map = torch.linalg.lstsq(
        torch.cat([seen, ridge.sqrt()]), torch.cat([targets[items[items >= 0]], torch.zeros_like(ridge)])
    ).solution
    expected = inputs @ linear_map * (targets[items[items >= 0]].norm() / (seen @ linear_map).norm())
    new = items < 0
    torch.testing.assert_close(loaded["collaborative.items"][new], expected[new].float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(loaded["collaborative.users"][users < 0], fresh_tables["collaborative.users"][users < 0])
    for kind, ids in (("users", users), ("items", items)):
        drawn = fresh_tables[f"content.{kind}"] - fresh_tables[f"collaborative.{kind}"]
        around = loaded[f"content.{kind}"] - loaded[f"collaborative.{kind}"]
        torch.testing.assert_close(around[ids < 0], drawn[ids < 0], rtol=1e-4, atol=1e-6)
    bias = old["head.bias"][items[~new]].mean()
    torch.testing.assert_close(loaded["head.bias"][new], bias.expand(int(new.sum()), 1))

    assert json.loads((tmp_path / "new" / GROWTH_FILE).read_text()) == {
        "users": {"matched": 21, "new": 8, "removed": ["user-000", "user-001"]},
        "items": {"matched": 14, "new": 7, "removed": ["item-000", "item-001", "item-002"]},
    }


@pytest.mark.slow
def test_the_projection_of_the_head_is_carried_over(grown: tuple[Made, Made], tmp_path: Path) -> None:
    (folder, *_), other = grown
    store, names = find(str(folder / "old"))
    saved = Checkpoint.open(store, names[0]).replicated()["head.projection"]
    assert saved.abs().max() > 0
    config = make_config(other, tmp_path / "new", init_from=str(folder / "old"), allow_leak=True, head=PROJECTING)
    for projection in run_ranks(2, loaded_projection, config):
        assert torch.equal(projection, saved)


def loaded_parameters(world: World, config: RunConfig) -> dict[str, Tensor]:
    """Return this rank's rows and the replicated parameters as a run starts with the weights of `init_from`."""
    system = assemble(config, world)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    train_module._resume_or_init(system, Store(store_url(config)), total_steps=100)
    sharded = {name: p.detach() for name, p, _ in system.recommender.sharded_parameters()}
    return sharded | {name: p.detach() for name, p in system.recommender.replicated_parameters()}


def refused_when_loaded(world: World, config: RunConfig) -> str:
    """Return the refusal of a run whose files are not looked at before it starts."""
    try:
        loaded_parameters(world, config)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_narrow_rows_and_their_projections_are_carried_over(grown: tuple[Made, Made], tmp_path: Path) -> None:
    made, other = grown
    narrow = {"init": "spectral", "dim": 6}
    run_ranks(2, run, make_config(made, tmp_path / "old", max_steps=3, embeddings=narrow))
    store, (name, *_) = find(str(tmp_path / "old"))
    saved, old = Checkpoint.open(store, name).replicated(), trained(tmp_path / "old")
    changes: dict[str, Any] = {"init_from": str(tmp_path / "old"), "allow_leak": True}

    parts = run_ranks(3, loaded_parameters, make_config(other, tmp_path / "new", embeddings=narrow, **changes))
    for part in parts:
        for whole in ("input_projection", "head.projection", "head.log_temperature"):
            assert torch.equal(part[whole], saved[whole]), whole
    items = torch.tensor([i + 3 if i + 3 < 17 else -1 for i in reversed(range(21))])
    for table, ids in (("collaborative.items", items), ("content.items", items)):
        loaded = torch.cat([part[table] for part in parts])
        assert loaded.shape == (21, 6)
        assert torch.equal(loaded[ids >= 0], old[table][ids[ids >= 0]])
        assert loaded[ids < 0].norm(dim=1).min() > 0

    # The same catalog goes on from everything; another width is refused by name, at once.
    same = {"init_from": str(tmp_path / "old")}
    (loaded,) = run_ranks(1, loaded_parameters, make_config(made, tmp_path / "same", embeddings=narrow, **same))
    assert all(
        torch.equal(loaded[name], rows) for name, rows in {**old, "input_projection": saved["input_projection"]}.items()
    )
    for corpus, embeddings in ((other, {"init": "spectral"}), (made, {"dim": 5})):
        config = make_config(corpus, tmp_path / "refused", embeddings=embeddings, **changes)
        width = embeddings.get("dim", 16)
        assert f"embeddings.dim: 6 is not this run's, {width}" in run_ranks(1, refused, config)[0]
        late = run_ranks(2, refused_when_loaded, config)
        assert all("Set embeddings.dim=6, or start without init_from" in message for message in late)


@pytest.mark.slow
def test_a_shared_user_row_moves_behind_the_new_users(grown: tuple[Made, Made], tmp_path: Path) -> None:
    made, other = grown
    method = {"max_history": 100, "shared_user_ratio": 0.4}
    run_ranks(2, run, make_config(made, tmp_path / "old", max_steps=3, method=method))
    store, (name, *_) = find(str(tmp_path / "old"))
    old = {
        table: Checkpoint.open(store, name).rows(table, 24, 0, 24) for table in ("collaborative.users", "content.users")
    }

    config = make_config(other, tmp_path / "new", init_from=str(tmp_path / "old"), allow_leak=True, method=method)
    parts = run_ranks(2, loaded_tables, config)
    for table, rows in old.items():
        loaded = torch.cat([part[table] for part in parts])
        assert loaded.shape == (30, 16)
        assert torch.equal(loaded[29], rows[23])
        assert torch.equal(loaded[:21], rows[2:23])
    counts = json.loads((tmp_path / "new" / GROWTH_FILE).read_text())
    assert counts["users"] == {"matched": 21, "new": 8, "removed": ["user-000", "user-001"]}

    # A run without a shared user loads the users' rows alone; one that starts from such a run draws the shared row.
    config = make_config(made, tmp_path / "plain", init_from=str(tmp_path / "old"))
    (loaded,) = run_ranks(1, loaded_tables, config)
    assert torch.equal(loaded["collaborative.users"], old["collaborative.users"][:23])
    config = make_config(made, tmp_path / "shared", init_from=str(made[0] / "old"), method=method)
    (loaded,), (fresh_tables,) = run_ranks(1, loaded_tables, config), run_ranks(1, fresh, config)
    assert torch.equal(loaded["collaborative.users"][23], fresh_tables["collaborative.users"][23])
    assert torch.equal(loaded["collaborative.users"][:23], trained(made[0] / "old")["collaborative.users"])


@pytest.mark.slow
def test_a_grown_run_trains_and_resumes_as_any_other(grown: tuple[Made, Made], tmp_path: Path) -> None:
    (folder, *_), other = grown
    for output, steps in (("whole", (8,)), ("parts", (4, 8))):
        for max_steps in steps:
            config = make_config(
                other,
                tmp_path / output,
                "finetune",
                init_from=str(folder / "old"),
                allow_leak=True,
                max_steps=max_steps,
                validation={"every_epochs": 0},
            )
            run_ranks(2, run, config)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert len(metrics(tmp_path / "whole")) == 8


@pytest.mark.slow
def test_new_rows_are_drawn_from_the_prior(grown: tuple[Made, Made], tmp_path: Path) -> None:
    (folder, *_), other = grown
    embeddings = {"init": "prior", "lambda_l": 0.01, "lambda_c": 0.1}
    config = make_config(other, tmp_path / "new", init_from=str(folder / "old"), allow_leak=True, embeddings=embeddings)
    (loaded,), (fresh_tables,) = run_ranks(1, loaded_tables, config), run_ranks(1, fresh, config)
    new = torch.arange(21) < 7
    assert torch.equal(loaded["collaborative.items"][new], fresh_tables["collaborative.items"][new])
    assert not torch.equal(loaded["collaborative.items"], fresh_tables["collaborative.items"])


@pytest.mark.slow
def test_new_content_rows_are_drawn_around_trained_collaborative_ones(grown: tuple[Made, Made], tmp_path: Path) -> None:
    made, other = grown
    run_ranks(2, run, make_config(made, tmp_path / "silent", max_steps=2, batch={"users": 9, "texts": 0}))
    config = make_config(other, tmp_path / "new", init_from=str(tmp_path / "silent"), allow_leak=True)
    (loaded,), (fresh_tables,) = run_ranks(1, loaded_tables, config), run_ranks(1, fresh, config)
    for kind in _KINDS:
        drawn = fresh_tables[f"content.{kind}"] - fresh_tables[f"collaborative.{kind}"]
        around = loaded[f"content.{kind}"] - loaded[f"collaborative.{kind}"]
        torch.testing.assert_close(around, drawn, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_matched_is_refused_or_skipped(grown: tuple[Made, Made], tmp_path: Path) -> None:
    made, other = grown
    strange = dataclasses.replace(make_catalog(), item_ids=pl.Series([f"thing-{i}" for i in range(17)]))
    corpus = make_corpus(tmp_path / "strange", strange, Path(made[2]))
    config = make_config((made[0], corpus, made[2]), tmp_path / "run", init_from=str(made[0] / "old"))
    assert "no row matches" in run_ranks(2, refused, config)[1]

    # Ids that do not fit the rows are damage, whatever the checksums say: the checkpoint before it is used.
    run_ranks(1, run, make_config(made, tmp_path / "old", max_steps=4))
    store = Store(f"{tmp_path}/old/checkpoints")
    before, newest = store.names("step-")
    entries = dict(store.marker(newest).files)
    shorter = pq.read_table(tmp_path / "old" / "checkpoints" / newest / "items.parquet").slice(1)
    entries["items.parquet"] = store.write(newest, "items.parquet", lambda path: pq.write_table(shorter, path))
    store.commit(newest, entries)
    config = make_config(other, tmp_path / "next", init_from=str(tmp_path / "old"), allow_leak=True)
    (loaded,) = run_ranks(1, loaded_tables, config)
    opened = Checkpoint.open(store, before)
    assert torch.equal(loaded["collaborative.items"][-1:], opened.rows("collaborative.items", 17, 3, 4))


@pytest.mark.slow
def test_only_rows_that_the_old_run_lacks_are_initialized(
    grown: tuple[Made, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = grown

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed factors")

    vectors = {"init": "spectral", "item_vectors": "backbone", "init_text_weight": 0.5}
    started = {"init_from": str(made[0] / "old"), "embeddings": vectors, "allow_leak": True}
    run_ranks(
        2, loaded_tables, make_config(other, tmp_path / "new", **started)
    )  # runs the backbone, then loads adapters

    monkeypatch.setattr(embedding_init, "spectral_item_factors", refuse)
    started["embeddings"] = {"init": "spectral", "init_text_weight": 0.6}  # which no cache has
    (loaded,) = run_ranks(1, loaded_tables, make_config(made, tmp_path / "same", **started))
    for name, table in trained(made[0] / "old").items():
        assert torch.equal(loaded[name], table)
    fewer = dataclasses.replace(make_catalog(), user_ids=pl.Series([f"user-{u + 3:03d}" for u in range(23)]))
    corpus = make_corpus(tmp_path / "fewer", fewer, Path(made[2]))
    (loaded,) = run_ranks(1, loaded_tables, make_config((made[0], corpus, made[2]), tmp_path / "users", **started))
    assert torch.equal(loaded["collaborative.items"], trained(made[0] / "old")["collaborative.items"])


CONFIG = {
    "adapter": {"kind": "full"},
    "embeddings": {"init": "spectral", "dropout": 0.5},
    "epochs": 4,
    "method": {"max_history": 400, "target": "all"},
    "batch": {"users": 64, "texts": 0, "gradient_accumulation_steps": 2},
    "optimizer": {"lr": 1e-3, "embeddings_lr": 2e-4, "warmup_steps": 10},
    "validation": {"metrics": ["recall@20"], "batch_users": 64},
    "checkpoint": {"every_steps": 1000},
    "linear": {"neighbors": 0},  # ranks the same items in both runs, whatever their rows
}


@pytest.mark.integration
@pytest.mark.skipif(not (DATA / "ml-100k").is_dir(), reason="the data set is not on this machine")
def test_movielens_continues_with_the_users_and_items_of_its_last_weeks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLLM4REC_DATA", str(DATA))
    late = load_config(PrepareConfig, ROOT / "shards" / "ml-100k.yaml", ["split={kind: last}", "name=late"])
    raw = pd.read_csv(DATA / "ml-100k" / "ml-100k.inter", sep="\t")
    (time,) = (name for name in raw.columns if name.startswith("timestamp"))
    raw[raw[time] <= raw[time].quantile(0.75)].to_csv(tmp_path / "early.inter", sep="\t", index=False)
    source = late.source.model_copy(update={"interactions": (str(tmp_path / "early.inter"),)})
    early = late.model_copy(update={"source": source, "name": "early"})

    titles = read_source(late.source).items["title"].drop_nulls().to_list()
    backbone = tmp_path / "backbone"
    build_backbone(
        BackboneConfig(hidden_size=64, num_layers=1, num_heads=2, vocab_size=1000, dropout=0.2), titles, backbone
    )
    tokenizer = WordTokenizer.load(backbone)
    sizes = {}
    for name, recipe in (("early", early), ("late", late)):
        manifest = prepare(recipe, tokenizer, str(tmp_path / name), progress=False)
        sizes[name] = manifest.num_users, manifest.num_items

    def config(corpus: str, output: str, **changes: Any) -> RunConfig:
        made = tmp_path, str(tmp_path / corpus), str(backbone)
        return make_config(made, tmp_path / output, "finetune", **(CONFIG | changes))

    run_ranks(2, run, config("early", "first"))
    run_ranks(2, run, config("late", "grown", init_from=str(tmp_path / "first"), epochs=1))
    run_ranks(2, run, config("late", "fresh", epochs=1))
    counts = json.loads((tmp_path / "grown" / GROWTH_FILE).read_text())
    for index, kind in enumerate(("users", "items")):
        assert counts[kind]["matched"] + counts[kind]["new"] == sizes["late"][index]
        assert counts[kind]["matched"] + len(counts[kind]["removed"]) == sizes["early"][index]
        assert counts[kind]["new"] > 0
    # The fresh run has the same spectral initialization, which already captures most of this data set.
    logs = {name: metrics(tmp_path / name) for name in ("grown", "fresh")}
    loss = {name: mean(line["loss"] for line in lines if "loss" in line) for name, lines in logs.items()}
    recall = {name: lines[-1]["valid/recall@20"] for name, lines in logs.items()}
    assert loss["grown"] < loss["fresh"] - 0.05
    # One item a user is held out, so that a recall has a standard error of 0.014: the loss tells the two apart, and by
    # recall it can only be seen that growth does no harm.
    assert recall["grown"] > recall["fresh"] - 0.03
