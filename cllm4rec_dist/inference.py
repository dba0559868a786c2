"""What is done with a trained model on all ranks: evaluate it, and write recommendations.

A checkpoint carries its configuration, so that a run folder is all that is needed; weights are read at any world size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec_dist import checkpoint, ranking
from cllm4rec_dist.checkpoint import Checkpoint
from cllm4rec_dist.corpus.heldout import KNOWN, NEW, HeldOutUsers
from cllm4rec_dist.errors import CheckpointError, DataError
from cllm4rec_dist.evaluation.files import (
    BASELINES_FILE,
    BASELINES_RECOMMENDED_FILE,
    EVALUATION_FILE,
    RECOMMENDED_FILE,
    USERS_FILE,
)
from cllm4rec_dist.evaluation.metrics import LIST_LENGTH
from cllm4rec_dist.log import ReportMetrics, progress_bar
from cllm4rec_dist.preflight import require_held_out
from cllm4rec_dist.ranking import Evaluation, Ranking
from cllm4rec_dist.recommendations import SCHEMA, make_folder, write_recommendations
from cllm4rec_dist.system import System, assemble, with_deepspeed_at_hand
from cllm4rec_dist.topology import World
from cllm4rec_dist.trained_run import log_choice, provenance, recorded_config

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 36
EXAMPLE_ITEMS = 10


def load(run: str, world: World, backbone: str | None = None, corpus: str | None = None) -> tuple[System, Checkpoint]:
    """The system of a run's best checkpoint (or of the checkpoint given), and that checkpoint. Collective.

    Args:
        backbone, corpus: where they are now, if not where the checkpoint says.

    Raises:
        CheckpointError: where none is whole, or its backbone, corpus or tokenizer has changed or is gone.
    """
    store, names = checkpoint.find(run)
    opened = checkpoint.first_good(store, names, world, lambda found: recorded_config(found, backbone, corpus))
    if opened is not None:
        system = assemble(with_deepspeed_at_hand(opened[1]), world)
        checkpoint.require_same(opened[0], system.fingerprints)
        found = checkpoint.first_good(store, names, world, lambda c: checkpoint.read(system, c, moments=False))
        if found is not None:
            checkpoint.restore_weights(system, found[1])
            if world.is_main:
                log_choice(store, names, found[0])
            return system, found[0]
    raise CheckpointError("checkpoint", run, "is damaged, and so is every other one there", "Use another run.")


def evaluate_run(
    world: World,
    report: ReportMetrics,
    run: str,
    split: str,
    metrics: Sequence[str],
    batch_users: int,
    output: str,
    backbone: str | None = None,
    corpus: str | None = None,
    baselines: bool = False,
    without_rows: bool = False,
) -> None:
    """Write the model's files of `evaluation/files.py` into `output`: means, values by user, and counts of items.

    Args:
        backbone, corpus: where they are now, if not where the checkpoint says.
        baselines: whether baselines are to be fitted beside it, which takes validation items.
        without_rows: rank known users as if they had no row, from their history alone.

    Raises:
        DataError: before anything is ranked, where the corpus holds out no items of the split, or none for baselines.
    """
    system, used = load(run, world, backbone, corpus)
    require_held_out(system.corpus.manifest, split, with_baselines=baselines)
    num_users = len(HeldOutUsers.of(system.corpus, split))
    bar = progress_bar(world, num_users, f"evaluate {split}", "user")
    found = ranking.evaluate(
        system, split, metrics, batch_users, bar.update, without_rows=without_rows, list_length=LIST_LENGTH
    )
    bar.close()
    result = found.result()
    examples = _examples(system, found.users, without_rows=without_rows)
    if world.is_main:
        lineage = used.about.lineage
        notes = [] if lineage is None else lineage.notes()
        for note in notes:
            logger.warning("%s: %s", used.path, note)
        if without_rows:
            notes.append("known users were ranked without their rows, from their histories alone")
        content = {
            "run": run, "checkpoint": used.path, "split": split, **vars(result), "groups": _groups(found),
            "notes": notes,
            "leak": lineage.leak.model_dump() if lineage is not None and lineage.leak is not None else None,
            "examples": examples, "provenance": provenance(system, used).model_dump(),
            "fingerprints": system.fingerprints, "config": system.config.model_dump(mode="json"),
        }  # fmt: skip
        target = Path(output)
        target.mkdir(parents=True, exist_ok=True)
        (target / EVALUATION_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        _write_tables(system, found, target)
    report(result.mean)


def _groups(found: Evaluation) -> dict[str, dict[str, Any]]:
    """Means of known and of new users, of those groups that have any."""
    is_new = found.users.is_new
    chosen = {KNOWN: ~is_new, NEW: is_new}
    return {group: vars(found.result(users)) for group, users in chosen.items() if users.any()}


def _write_tables(system: System, found: Evaluation, folder: Path) -> None:
    """Values by user, and how many lists each item is in; values of baselines of an earlier evaluation go."""
    users = found.users
    columns = {name: found.values[:, index] for index, name in enumerate(found.metrics)}
    table = {
        "user": pa.array(users.ids(system.corpus), pa.string()),
        "group": pa.array(users.groups, pa.string()),
        "history_length": users.histories.lengths,
    }
    pq.write_table(pa.table(table | columns), folder / USERS_FILE)
    items = pa.table({"item": system.corpus.items()["item"], "count": found.listed})
    pq.write_table(items.filter(found.listed > 0), folder / RECOMMENDED_FILE)
    for name in (BASELINES_FILE, BASELINES_RECOMMENDED_FILE):
        (folder / name).unlink(missing_ok=True)


def _examples(system: System, users: HeldOutUsers, *, without_rows: bool) -> list[dict[str, Any]]:
    """History and best items of a few users with a history of middling length, by title, on rank 0."""
    able = np.flatnonzero(users.histories.lengths >= np.median(users.histories.lengths))
    chosen = able[:: max(1, len(able) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    items = system.corpus.items()
    titles = [title or name for title, name in zip(items["title"].to_pylist(), items["item"].to_pylist(), strict=True)]
    names = users.ids(system.corpus)
    found = []
    # A block of one user a rank: rank 0 then has its own part only, which is enough to look at.
    chosen = np.repeat(chosen, system.world.size)
    shown = users.histories.take(chosen)
    rows = np.full(len(chosen), -1) if without_rows else users.rows[chosen]
    for block in ranking.rank_users(system, rows, shown, EXAMPLE_ITEMS, 1, seen=shown):
        for user, best in zip(chosen[block.index].tolist(), block.items.tolist(), strict=True):
            hits = set(users.held_out[user].tolist())
            found.append({
                "user": names[user], "history": [titles[i] for i in users.histories[user][:EXAMPLE_ITEMS].tolist()],
                "recommended": [{"title": titles[i], "hit": i in hits} for i in best],
            })  # fmt: skip
    return found


def recommend_users(
    world: World,
    report: ReportMetrics,
    run: str,
    users: Sequence[str] | None,
    num_best: int,
    batch_users: int,
    output: str,
    history: Literal["all", "train"] = "all",
    include_seen: bool = False,
    backbone: str | None = None,
    corpus: str | None = None,
) -> None:
    """Write the best items of users as Parquet, one file a rank, below `output` (see `recommendations.py`).

    A user with fewer than `num_best` items left gets fewer rows.

    Args:
        users: external ids, of which one that is named twice counts once; None for everyone, [] for nobody.
        history: what the prompt shows and the list leaves out: `all` that a user has, held-out items included, or the
            `train` items alone.
        include_seen: leave nothing out.
        backbone, corpus: where they are now, if not where the checkpoint says.

    Raises:
        DataError: for user ids that the corpus does not have.
    """
    system, _ = load(run, world, backbone, corpus)
    user_ids = np.array(system.corpus.users()["user"].to_pylist(), dtype=object)
    item_ids = np.array(system.corpus.items()["item"].to_pylist(), dtype=object)
    rows = np.arange(len(user_ids)) if users is None else _rows_of(users, user_ids)
    shown = (system.corpus.split("train") if history == "train" else system.corpus.history()).take(rows)
    folder = Path(output)
    make_folder(folder)
    bar = progress_bar(world, len(rows), "recommend", "user")
    rankings = ranking.rank_users(
        system, rows, shown, num_best, batch_users, bar.update, seen=None if include_seen else shown
    )
    write_recommendations(_tables(rankings, user_ids[rows], item_ids), folder, world)
    bar.close()
    if world.is_main:
        logger.info("recommendations for %d users: %s", len(rows), folder)
    report({"users": float(len(rows))})


def _tables(rankings: Iterator[Ranking], user_ids: np.ndarray, item_ids: np.ndarray) -> Iterator[pa.Table]:
    for ranked in rankings:
        place, order = np.nonzero(np.isfinite(ranked.scores))
        yield pa.table(
            [
                pa.array(user_ids[ranked.index[place]], pa.string()),
                pa.array(item_ids[ranked.items[place, order]], pa.string()),
                pa.array(order + 1, pa.int32()),
                pa.array(ranked.scores[place, order], pa.float32()),
            ],
            schema=SCHEMA,
        )


def _rows_of(users: Sequence[str], user_ids: np.ndarray) -> np.ndarray:
    row_of = {user: row for row, user in enumerate(user_ids.tolist())}
    unknown = [user for user in users if user not in row_of]
    if unknown:
        raise DataError("users", unknown[:5], f"are not in the corpus ({len(unknown)} in all)", "Leave them out.")
    return np.array([row_of[user] for user in dict.fromkeys(users)], dtype=np.int64)
