"""Evaluation of a trained model, on all ranks.

A checkpoint carries its configuration, so that a run folder is all that is needed; weights are read at any world size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec_dist.checkpointing.run_folder import EVALUATION_FILE
from cllm4rec_dist.corpus.heldout import KNOWN, NEW, HeldOutUsers
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation import topk
from cllm4rec_dist.evaluation.files import (
    BASELINES_FILE,
    BASELINES_RECOMMENDED_FILE,
    RECOMMENDED_FILE,
    USERS_FILE,
)
from cllm4rec_dist.evaluation.metrics import LIST_LENGTH
from cllm4rec_dist.evaluation.topk import Evaluation
from cllm4rec_dist.evaluation.trained_run import load, provenance
from cllm4rec_dist.log import ReportMetrics, progress_bar
from cllm4rec_dist.preflight import require_held_out
from cllm4rec_dist.system import InferenceSystem

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 36
EXAMPLE_ITEMS = 10


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
    found, has_hit = _evaluate(system, split, metrics, batch_users, bar.update, without_rows=without_rows)
    bar.close()
    result = found.result()
    examples = _examples(system, found.users, has_hit, without_rows=without_rows)
    if world.is_main:
        lineage = used.about.lineage
        notes = [] if lineage is None else lineage.notes()
        for note in notes:
            logger.warning("%s: %s", used.path, note)
        if without_rows:
            notes.append("known users were ranked without their rows, from their histories alone")
        content = {
            "run": run,
            "checkpoint": used.path,
            "split": split,
            "without_rows": without_rows,
            **vars(result),
            "groups": _groups(found),
            "notes": notes,
            "leak": lineage.leak.model_dump() if lineage is not None and lineage.leak is not None else None,
            "examples": examples,
            "share_with_hit": float(has_hit.mean()),
            "provenance": provenance(system, used).model_dump(),
            "fingerprints": system.fingerprints,
            "config": system.config.model_dump(mode="json"),
        }
        target = Path(output)
        target.mkdir(parents=True, exist_ok=True)
        (target / EVALUATION_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        _write_tables(system, found, target)
    report(result.mean)


def _evaluate(
    system: InferenceSystem,
    split: str,
    metrics: Sequence[str],
    batch_users: int,
    progress: Callable[[int], object],
    *,
    without_rows: bool,
) -> tuple[Evaluation, np.ndarray]:
    """The evaluation, and bool [n] for whom an example of a list would hold a held-out item."""
    shown = f"recall@{EXAMPLE_ITEMS}"
    found = topk.evaluate(
        system, split, [*metrics, shown], batch_users, progress, without_rows=without_rows, list_length=LIST_LENGTH
    )
    return replace(found, metrics=tuple(metrics), values=found.values[:, :-1]), found.values[:, -1] > 0


def _groups(found: Evaluation) -> dict[str, dict[str, Any]]:
    """Means of known and of new users, of those groups that have any."""
    is_new = found.users.is_new
    chosen = {KNOWN: ~is_new, NEW: is_new}
    return {group: vars(found.result(users)) for group, users in chosen.items() if users.any()}


def _write_tables(system: InferenceSystem, found: Evaluation, folder: Path) -> None:
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


def _examples(
    system: InferenceSystem, users: HeldOutUsers, has_hit: np.ndarray, *, without_rows: bool
) -> list[dict[str, Any]]:
    """History and best items of a few users with a history of middling length, by title, on rank 0."""
    chosen = _choose_examples(users.histories.lengths, has_hit)
    items = system.corpus.items()
    titles = [title or name for title, name in zip(items["title"].to_pylist(), items["item"].to_pylist(), strict=True)]
    names = users.ids(system.corpus)
    found = []
    # All of them on every rank: rank 0 then has its own part, which is enough to look at.
    chosen = np.tile(chosen, system.world.size)
    shown = users.histories.take(chosen)
    rows = np.full(len(chosen), -1) if without_rows else users.rows[chosen]
    for block in topk.rank_users(system, rows, shown, EXAMPLE_ITEMS, 1, seen=shown):
        for user, best in zip(chosen[block.index].tolist(), block.items.tolist(), strict=True):
            hits = set(users.held_out[user].tolist())
            found.append(
                {
                    "user": names[user],
                    "history": [titles[i] for i in users.histories[user][:EXAMPLE_ITEMS].tolist()],
                    "recommended": [{"title": titles[i], "hit": i in hits} for i in best],
                    "num_held_out": len(hits),
                }
            )
    return found


def _choose_examples(lengths: np.ndarray, has_hit: np.ndarray) -> np.ndarray:
    """Users with a history of at least median length, rising: as many with a hit as without one, as far as there are.

    Most users have few held-out items, so that of users drawn evenly hardly any would show what a hit is.
    """
    able = lengths >= np.median(lengths)
    kinds = [np.flatnonzero(able & has_hit), np.flatnonzero(able & ~has_hit)]
    num_hits = min(len(kinds[0]), max(NUM_EXAMPLES // 2, NUM_EXAMPLES - len(kinds[1])))
    counts = [num_hits, min(len(kinds[1]), NUM_EXAMPLES - num_hits)]
    spread = [kind[np.arange(count) * len(kind) // max(1, count)] for kind, count in zip(kinds, counts, strict=True)]
    return np.sort(np.concatenate(spread))
