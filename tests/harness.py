"""Runs functions on gloo ranks of one machine, and makes catalogs, corpora, backbones and runs for tests."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import cllm4rec_dist.distributed.engine
import cllm4rec_dist.train
from cllm4rec_dist.checkpointing.async_saver import AsyncSaver
from cllm4rec_dist.checkpointing.format import RunState
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import BackboneConfig, RunConfig, validate
from cllm4rec_dist.corpus.catalog import Catalog, NewUsers, Reviews
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.reviews import ReviewStore
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.corpus.writer import write_corpus
from cllm4rec_dist.distributed.diagnosis import HANG_SECONDS
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model import backbone as backbone_module
from cllm4rec_dist.model.build_backbone import build_backbone
from cllm4rec_dist.model.linear_fit import LinearSettings
from cllm4rec_dist.system import assemble_for_inference

with backbone_module._without_bitsandbytes():  # once, and not in every forked rank that adapts a backbone
    import peft  # noqa: F401


def free_port() -> int:
    """Return a free port below those that the kernel gives to connections, and above those of Ray's workers.

    Another test could take one of these in the meantime.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _enter(
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    out: str,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # spares a second: DeepSpeed collects garbage when an engine starts
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    world = cllm4rec_dist.distributed.engine.start_world(timeout)
    with world.watch:
        torch.save(function(world, *arguments), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = HANG_SECONDS) -> list[Any]:
    """Run `function(world, *arguments)` on `size` ranks; return the results, tensors or plain values, by rank.

    Args:
        timeout: `faults.collective_timeout_seconds`.
    """
    with tempfile.TemporaryDirectory() as out:
        # Daemons, so that hanging ranks do not outlive a test that is stopped.
        enter = (size, free_port(), function, arguments, out, timeout)
        ranks = mp.start_processes(_enter, enter, nprocs=size, join=False, daemon=True, start_method="fork")
        try:
            while not ranks.join():
                pass
        finally:
            for process in ranks.processes:
                process.kill()
        return [torch.load(f"{out}/{rank}.pt") for rank in range(size)]


def alone() -> World:
    return World(0, 1, 0, torch.device("cpu"))


def make_catalog(num_users: int = 23, num_items: int = 17, seed: int = 0) -> Catalog:
    """A catalog of users with 1 to 9 training items in two tastes, with texts in several scripts."""
    random = np.random.default_rng(seed)
    train, valid, test = [], [], []
    for user in range(num_users):
        taste = np.arange(user % 2, num_items, 2)
        items = random.permutation(taste)[: 1 + user % len(taste)]
        rest = np.setdiff1d(np.arange(num_items), items)
        train.append(items)
        held = random.permutation(rest)[:2]
        valid.append(held[:1])
        test.append(held[1:])
    words = ["río", "mountain", "чай", "音楽", "blue", "espresso", "trail", "quiet"]

    def sentence() -> str:
        return " ".join(random.choice(words, random.integers(1, 6)))

    reviewed = [(u, int(items[0])) for u, items in enumerate(train) if u % 3]
    user_texts = [sentence() if u % 4 == 0 else "" for u in range(num_users)]
    titles = [sentence() for _ in range(num_items)]
    store = ReviewStore()
    store.append(np.arange(len(reviewed)), pl.Series([sentence() for _ in reviewed]))
    return Catalog(
        user_ids=pl.Series([f"user-{u:03d}" for u in range(num_users)]),
        item_ids=pl.Series([f"item-{i:03d}" for i in range(num_items)]),
        user_texts=pl.Series(user_texts),
        item_titles=pl.Series(titles),
        item_descriptions=pl.Series([""] * num_items),
        train=Ragged.from_lists(train),
        valid=Ragged.from_lists(valid),
        test=Ragged.from_lists(test),
        reviews=Reviews(
            np.array([u for u, _ in reviewed]), np.array([i for _, i in reviewed]), np.arange(len(reviewed)), store
        ),
        log=SkipLog(),
    )


def with_new_users(catalog: Catalog, num_users: int = 10, seed: int = 1) -> Catalog:
    """Add users that are held out entirely, half of them for validation and half for the test."""
    random = np.random.default_rng(seed)
    lists: dict[str, list[list[int]]] = {"history": [], "valid": [], "test": []}
    for user in range(num_users):
        items = random.permutation(np.arange(user % 2, catalog.num_items, 2))[: 3 + user % 4].tolist()
        held_out, other = ("valid", "test") if user < num_users // 2 else ("test", "valid")
        lists["history"].append(items[:-2])
        lists[held_out].append(items[-2:])
        lists[other].append([])
    ids = pl.Series([f"new-{user:03d}" for user in range(num_users)])
    new_users = NewUsers(ids, **{name: Ragged.from_lists(part) for name, part in lists.items()})
    return dataclasses.replace(catalog, new_users=new_users)


def make_backbone(folder: Path, catalog: Catalog, **settings: Any) -> Path:
    settings = {
        "family": "gpt2",
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 300,
        "max_positions": 512,
    } | settings
    texts = [*catalog.item_titles, *catalog.user_texts, *catalog.reviews.store]
    build_backbone(BackboneConfig(**settings), [text for text in texts if text], folder)
    return folder


def make_corpus(folder: Path | str, catalog: Catalog, backbone: Path, **settings: Any) -> str:
    recipe = PrepareConfig.model_validate(
        {"name": "test", "source": {"format": "synthetic"}, "examples_per_record": 4, "records_per_shard": 3} | settings
    )
    write_corpus(catalog, WordTokenizer.load(backbone), str(folder), recipe, progress=False)
    return str(folder)


def with_messages(world: World, function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """Call a function and return its result and the messages that the package logs, for `run_ranks`."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cllm4rec_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return function(world, *arguments), messages


def make_run(
    folder: Path,
    corpus: str,
    backbone: Path | str,
    seed: int = 0,
    step: int = 7,
    linear_weight: float | None = None,
    new_item_offset: float | None = None,
    **settings: Any,
) -> Path:
    """Make a finetuned run with a best checkpoint of random weights, without training.

    Args:
        linear_weight: weight of a random linear memory; None for none.
        new_item_offset: offset that a validation has chosen; None for none.
    """
    tree = {"stage": "finetune", "corpus": corpus, "backbone": str(backbone), "output": str(folder)} | settings
    config = validate(RunConfig, tree, "test")
    system = assemble_for_inference(config, alone())
    system.engine.steps_taken = lambda: 0.0  # type: ignore[attr-defined]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter, _ in system.recommender.sharded_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
        for name, parameter in system.recommender.replicated_parameters():
            if name != "head.log_temperature":
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    weights = {name: torch.randn(w.shape, generator=random) * 0.2 for name, w in system.engine.weights().items()}
    system.engine.set_weights(weights)
    if linear_weight is not None:
        shape = system.corpus.num_items, 3
        neighbors = torch.rand(shape[0], shape[0], generator=random).argsort(dim=1)[:, : shape[1]]
        system.linear.fill(neighbors.int(), torch.randn(shape, generator=random), LinearSettings())
    saver = AsyncSaver(Store(f"{folder}/checkpoints"), system, keep=2)  # type: ignore[arg-type]
    state = RunState(
        step=step,
        best=0.25,
        best_step=step,
        best_metric="recall@5",
        validated_step=step,
        linear_weight=linear_weight,
        new_item_offset=new_item_offset,
    )
    saver.save(state, "best-")
    saver.finish()
    return folder
