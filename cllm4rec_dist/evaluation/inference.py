"""Evaluation of a trained model on all ranks.

A run folder is enough, because a checkpoint stores its configuration; weights are read at any world size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec_dist.checkpointing.run_folder import EVALUATION_FILE
from cllm4rec_dist.corpus.heldout import KNOWN, NEW, HeldOutUsers
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation import results, sharded_topk, topk
from cllm4rec_dist.evaluation.files import (
    BASELINES_FILE,
    BASELINES_RECOMMENDED_FILE,
    PARTS_FILE,
    RECOMMENDED_FILE,
    USERS_FILE,
)
from cllm4rec_dist.evaluation.item_groups import evaluate_groups
from cllm4rec_dist.evaluation.metrics import LIST_LENGTH
from cllm4rec_dist.evaluation.topk import Evaluation
from cllm4rec_dist.evaluation.trained_run import load, provenance
from cllm4rec_dist.log import ReportMetrics, progress_bar
from cllm4rec_dist.preflight import require_held_out
from cllm4rec_dist.system import InferenceSystem

logger = logging.getLogger(__name__)

PARTS = {results.LLM_ALONE: sharded_topk.LLM_ALONE, results.LINEAR_ALONE: sharded_topk.LINEAR_ALONE}
"""Weight of the linear memory by which each part of the model counts alone."""
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
    num_users: int | None = None,
    new_item_offset: float | None = None,
) -> None:
    """Write the model's files of `evaluation/files.py` into `output`: means, metrics by user, and item counts.

    Args:
        backbone, corpus: current paths; None for those in the checkpoint.
        baselines: True if baselines will be fitted, too, which needs validation items.
        without_rows: rank known users from their histories alone, as if they had no row.
        num_users: size of a sample of the users, see `HeldOutUsers.of`; None for all of them.
        new_item_offset: offset of the item biases of new items, instead of the run's.

    Raises:
        DataError: before anything is ranked, if the corpus holds out no items of the split, or none for baselines.
    """
    system, opened = load(run, world, backbone, corpus, new_item_offset)
    require_held_out(system.corpus.manifest, split, with_baselines=baselines)
    users = HeldOutUsers.of(system.corpus, split, num_users)
    bar = progress_bar(world, len(users), f"evaluate {split}", "user")
    evaluation, has_hit, parts = _evaluate(system, users, metrics, batch_users, bar.update, without_rows=without_rows)
    bar.close()
    result = evaluation.result()
    weights = [system.linear.weight, *(PARTS[name] for name in parts)]
    item_groups = evaluate_groups(system, split, users, metrics, batch_users, weights, without_rows=without_rows)
    items, ids = system.corpus.items(), users.ids(system.corpus)
    examples = _examples(system, users, ids, items, has_hit, without_rows=without_rows)
    share_of_new = _share_of_new_items(system, evaluation)
    if world.is_main:
        if share_of_new is not None:
            logger.info("new items take %.1f %% of the first %d places of the lists", 100 * share_of_new, LIST_LENGTH)
        lineage = opened.metadata.lineage
        notes = [] if lineage is None else lineage.notes()
        for note in notes:
            logger.warning("%s: %s", opened.path, note)
        if len(users) < users.num_all:
            notes.append(f"a sample of {len(users):,} of {users.num_all:,} users was ranked")
        if without_rows:
            notes.append("known users were ranked without their rows, from their histories alone")
        if parts and opened.metadata.run.linear_weight is None:
            notes.append("no validation has chosen the weight of the linear memory, so it is not used")
        content = {
            "run": run,
            "checkpoint": opened.path,
            "split": split,
            "without_rows": without_rows,
            "sample": num_users,
            **vars(result),
            "parts": {name: vars(part.result()) for name, part in parts.items()},
            "linear_weight": system.linear.weight if parts else None,
            "groups": _groups(evaluation, parts),
            "item_groups": {
                name: {**vars(whole), "parts": dict(zip(parts, map(vars, of_parts), strict=True))}
                for name, (whole, *of_parts) in item_groups.items()
            },
            "notes": notes,
            "leak": lineage.leak.model_dump() if lineage is not None and lineage.leak is not None else None,
            "examples": examples,
            "share_with_hit": float(has_hit.mean()),
            "share_of_new_items": share_of_new,
            "provenance": provenance(system, opened).model_dump(),
            "fingerprints": system.fingerprints,
            "config": system.config.model_dump(mode="json"),
        }
        target = Path(output)
        target.mkdir(parents=True, exist_ok=True)
        (target / EVALUATION_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        _write_tables(evaluation, parts, ids, items, target)
    report(result.mean)


def _evaluate(
    system: InferenceSystem,
    users: HeldOutUsers,
    metrics: Sequence[str],
    batch_users: int,
    progress: Callable[[int], object],
    *,
    without_rows: bool,
) -> tuple[Evaluation, np.ndarray, dict[str, Evaluation]]:
    """Evaluate the run, and the LLM and the linear memory alone, if it has one.

    Returns:
        the evaluation; bool [n], True for users whose list of `EXAMPLE_ITEMS` has a held-out item; and the parts.
    """
    example_recall = f"recall@{EXAMPLE_ITEMS}"
    weights = {} if system.linear.is_empty else PARTS
    evaluation, *parts = topk.evaluate_users(
        system,
        users,
        [*metrics, example_recall],
        batch_users,
        [system.linear.weight, *weights.values()],
        progress,
        without_rows=without_rows,
        list_length=LIST_LENGTH,
    )
    has_hit = evaluation.values[:, -1] > 0

    def without_example_recall(evaluated: Evaluation) -> Evaluation:
        return replace(evaluated, metrics=tuple(metrics), values=evaluated.values[:, :-1])

    by_name = {name: without_example_recall(part) for name, part in zip(weights, parts, strict=True)}
    return without_example_recall(evaluation), has_hit, by_name


def _share_of_new_items(system: InferenceSystem, evaluation: Evaluation) -> float | None:
    """Return the share of the lists' places that items without training interactions take; None without new items."""
    if not system.corpus.manifest.has_cold_items:
        return None
    is_new = system.corpus.training_counts() == 0
    return float(evaluation.listed[is_new].sum() / max(1, evaluation.listed.sum()))


def _groups(evaluation: Evaluation, parts: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Return the means of known and of new users, without empty groups."""
    is_new = evaluation.users.is_new
    masks = {KNOWN: ~is_new, NEW: is_new}
    return {
        group: vars(evaluation.result(mask))
        | {"parts": {name: vars(part.result(mask)) for name, part in parts.items()}}
        for group, mask in masks.items()
        if mask.any()
    }


def _write_tables(
    evaluation: Evaluation, parts: Mapping[str, Evaluation], ids: Sequence[str], items: pa.Table, folder: Path
) -> None:
    """Write metrics by user and list counts by item; remove baseline files of an earlier evaluation.

    Args:
        ids: external ids of the evaluated users.
        items: of the corpus.
    """
    users = evaluation.users
    user = {"user": pa.array(ids, pa.string()), "group": pa.array(users.groups, pa.string())}
    table = user | {"history_length": users.histories.lengths} | _columns(evaluation)
    pq.write_table(pa.table(table), folder / USERS_FILE)
    if parts:
        tables = [
            pa.table({"model": pa.array([name] * len(users), pa.string())} | user | _columns(part))
            for name, part in parts.items()
        ]
        pq.write_table(pa.concat_tables(tables), folder / PARTS_FILE)
    counts = pa.table({"item": items["item"], "count": evaluation.listed})
    pq.write_table(counts.filter(evaluation.listed > 0), folder / RECOMMENDED_FILE)
    for name in (BASELINES_FILE, BASELINES_RECOMMENDED_FILE, *([] if parts else [PARTS_FILE])):
        (folder / name).unlink(missing_ok=True)


def _columns(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Return the metrics of each user by name."""
    return {name: evaluation.values[:, index] for index, name in enumerate(evaluation.metrics)}


def _examples(
    system: InferenceSystem,
    users: HeldOutUsers,
    ids: Sequence[str],
    items: pa.Table,
    has_hit: np.ndarray,
    *,
    without_rows: bool,
) -> list[dict[str, Any]]:
    """Return, on rank 0, titles of the history and the best items of some users with at least median history length.

    Args:
        ids: external ids of the users.
        items: of the corpus.
    """
    chosen = _choose_examples(users.histories.lengths, has_hit)

    def title(item: int) -> str:
        name: str = items["title"][item].as_py() or items["item"][item].as_py()
        return name

    examples = []
    # Repeat the users once for each rank, so that rank 0's part has all of them.
    chosen = np.tile(chosen, system.world.size)
    histories = users.histories.take(chosen)
    rows = np.full(len(chosen), -1) if without_rows else users.rows[chosen]
    for block in topk.rank_users(system, rows, histories, EXAMPLE_ITEMS, 1, seen=histories):
        for user, best in zip(chosen[block.index].tolist(), block.items.tolist(), strict=True):
            hits = set(users.held_out[user].tolist())
            examples.append(
                {
                    "user": ids[user],
                    "history": [title(i) for i in users.histories[user][:EXAMPLE_ITEMS].tolist()],
                    "recommended": [{"title": title(i), "hit": i in hits} for i in best],
                    "num_held_out": len(hits),
                }
            )
    return examples


def _choose_examples(lengths: np.ndarray, has_hit: np.ndarray) -> np.ndarray:
    """Choose users with at least median history length, ascending: half of them with a hit, if there are enough.

    Most users have few held-out items, so that hardly any of evenly drawn users would have a hit.
    """
    is_eligible = lengths >= np.median(lengths)
    kinds = [np.flatnonzero(is_eligible & has_hit), np.flatnonzero(is_eligible & ~has_hit)]
    num_hits = min(len(kinds[0]), max(NUM_EXAMPLES // 2, NUM_EXAMPLES - len(kinds[1])))
    counts = [num_hits, min(len(kinds[1]), NUM_EXAMPLES - num_hits)]
    spread = [kind[np.arange(count) * len(kind) // max(1, count)] for kind, count in zip(kinds, counts, strict=True)]
    return np.sort(np.concatenate(spread))
