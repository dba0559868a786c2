"""What is done with a trained model on all ranks: evaluate it, and write recommendations.

A checkpoint carries its configuration, so that a run folder is all that is needed; weights are read at any world size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec_dist import checkpoint, ranking
from cllm4rec_dist.checkpoint import Checkpoint
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.errors import CheckpointError, DataError
from cllm4rec_dist.log import Report, progress_bar
from cllm4rec_dist.ranking import Ranking
from cllm4rec_dist.system import System, assemble
from cllm4rec_dist.topology import World

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
NUM_EXAMPLES = 6
EXAMPLE_ITEMS = 10


def load(run: str, world: World) -> tuple[System, Checkpoint]:
    """The system of a run's best checkpoint (or of the checkpoint given), and that checkpoint. Collective.

    Raises:
        CheckpointError: where none is whole, or its backbone, corpus or tokenizer has changed.
    """
    store, names = checkpoint.find(run)
    opened = checkpoint.first_good(store, names, world, lambda found: found.about.config)
    if opened is not None:
        config = validate(RunConfig, opened[1], f"{opened[0].path}: configuration")
        system = assemble(config, world)
        checkpoint.require_same(opened[0], system.fingerprints)
        found = checkpoint.first_good(store, names, world, lambda c: checkpoint.read(system, c, moments=False))
        if found is not None:
            checkpoint.restore_weights(system, found[1])
            return system, found[0]
    raise CheckpointError("checkpoint", run, "is damaged, and so is every other one there", "Use another run.")


def evaluate_run(
    world: World, report: Report, run: str, split: str, metrics: Sequence[str], batch_users: int, output: str
) -> None:
    """Write `evaluation.json` into `output`: metrics with standard errors, and recommendations of a few users."""
    system, used = load(run, world)
    bar = progress_bar(world, int((system.corpus.split(split).lengths > 0).sum()), f"evaluate {split}", "user")
    result = ranking.evaluate(system, split, metrics, batch_users, bar.update)
    bar.close()
    examples = _examples(system, split)
    if world.is_main:
        content = {
            "checkpoint": used.path, "split": split, **vars(result), "examples": examples,
            "fingerprints": system.fingerprints, "config": system.config.model_dump(mode="json"),
        }  # fmt: skip
        target = Path(output)
        target.mkdir(parents=True, exist_ok=True)
        (target / EVALUATION_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    report(result.mean)


def _examples(system: System, split: str) -> list[dict[str, Any]]:
    """History and best items of a few users with a history of middling length, by title, on rank 0."""
    history, heldout = system.corpus.split("train"), system.corpus.split(split)
    able = np.flatnonzero((heldout.lengths > 0) & (history.lengths >= np.median(history.lengths)))
    users = able[:: max(1, len(able) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    items = system.corpus.items()
    titles = [title or name for title, name in zip(items["title"].to_pylist(), items["item"].to_pylist(), strict=True)]
    names = system.corpus.users()["user"]
    found = []
    # A block of one user a rank: rank 0 then has its own part only, which is enough to look at.
    for block in ranking.rank_users(system, np.repeat(users, system.world.size), EXAMPLE_ITEMS, 1):
        for user, best in zip(block.users.tolist(), block.items.tolist(), strict=True):
            hits = set(heldout[user].tolist())
            found.append({
                "user": names[user].as_py(), "history": [titles[i] for i in history[user][:EXAMPLE_ITEMS].tolist()],
                "recommended": [{"title": titles[i], "hit": i in hits} for i in best],
            })  # fmt: skip
    return found


def recommend_users(
    world: World, report: Report, run: str, users: Sequence[str] | None, num_best: int, batch_users: int, output: str
) -> None:
    """Write the best items of users (None: everyone) as Parquet, one file a rank, below `output`.

    Columns: user and item (external ids), rank from 1, score. Items of the training history are left out; a user with
    fewer items left gets fewer rows.

    Raises:
        DataError: for user ids that the corpus does not have.
    """
    system, _ = load(run, world)
    user_ids = np.array(system.corpus.users()["user"].to_pylist(), dtype=object)
    item_ids = np.array(system.corpus.items()["item"].to_pylist(), dtype=object)
    rows = np.arange(len(user_ids)) if users is None else _rows_of(users, user_ids)
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    bar = progress_bar(world, len(rows), "recommend", "user")
    path = target / f"recommendations-{world.rank:05d}-of-{world.size:05d}.parquet"
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        for table in _tables(ranking.rank_users(system, rows, num_best, batch_users, bar.update), user_ids, item_ids):
            writer.write_table(table)
    bar.close()
    report({"users": float(len(rows))})


_SCHEMA = pa.schema([("user", pa.string()), ("item", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])


def _tables(rankings: Iterator[Ranking], user_ids: np.ndarray, item_ids: np.ndarray) -> Iterator[pa.Table]:
    for ranked in rankings:
        place, order = np.nonzero(np.isfinite(ranked.scores))
        yield pa.table(
            [
                pa.array(user_ids[ranked.users[place]], pa.string()),
                pa.array(item_ids[ranked.items[place, order]], pa.string()),
                pa.array(order + 1, pa.int32()),
                pa.array(ranked.scores[place, order], pa.float32()),
            ],
            schema=_SCHEMA,
        )


def _rows_of(users: Sequence[str], user_ids: np.ndarray) -> np.ndarray:
    row_of = {user: row for row, user in enumerate(user_ids.tolist())}
    unknown = [user for user in users if user not in row_of]
    if unknown:
        raise DataError("users", unknown[:5], f"are not in the corpus ({len(unknown)} in all)", "Leave them out.")
    return np.array([row_of[user] for user in users], dtype=np.int64)
