"""Leaks: held-out interactions that the weights a run starts from were trained on.

A corpus that is split again, with another seed or after it has grown, may hold out interactions that an earlier run was
trained on. A run that starts from that one (`init_from`), directly or through others, would be evaluated on its own
training data. Such a start is refused or, if `allow_leak` is set, recorded in every checkpoint and reported with every
metric.
"""

from __future__ import annotations

import json
import logging

import numpy as np

from cllm4rec_dist.checkpointing.checkpoint import load_first_valid, require_same_fingerprints
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.checkpointing.lineage import Leak, Lineage, SeenInteractions, TrainedOn, corpus_keys, new_user_keys
from cllm4rec_dist.corpus.shards import NEW_USER_SPLITS, Corpus
from cllm4rec_dist.distributed.collectives import broadcast_text
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.system import System

logger = logging.getLogger(__name__)

_HELD_OUT = ("valid", "test")


def trained_on_by_new_run(system: System, init_from: str | None) -> TrainedOn | None:
    """Return what the model of a new run is trained on, by the run and by the weights it starts from. Collective.

    Args:
        init_from: the run or checkpoint that it starts from.

    Returns None on other ranks than the first.

    Raises:
        CheckpointError: if `init_from` was trained on held-out interactions of the corpus and `allow_leak` is not set,
            if it is of another backbone or tokenizer, or if no checkpoint is valid.
    """
    world, corpus = system.world, system.corpus
    current = TrainedOn.of_corpus(corpus) if world.is_main else None
    if init_from is None:
        return current
    candidate, earlier = _read_initial(system, init_from)
    merged = None if current is None else current | earlier
    leak, example = None, ""
    if merged is not None and current is not None and merged.lineage.train_digests != current.lineage.train_digests:
        leak, example = find_leak(corpus, merged.seen)
    leak, example = _broadcast_leak(leak, example, world)
    if leak is not None and not system.config.allow_leak:
        raise _refusal(candidate, system.config.corpus, leak, example)
    if merged is None:
        return None
    _warn(candidate, system.config.corpus, merged.lineage, leak)
    return TrainedOn(merged.lineage.model_copy(update={"leak": leak}), merged.seen)


def _read_initial(system: System, init_from: str) -> tuple[Checkpoint, TrainedOn]:
    """Return the checkpoint that a run starts from and what it was trained on. Collective."""
    fingerprints = {name: value for name, value in system.fingerprints.items() if name != "corpus"}

    def read(candidate: Checkpoint) -> TrainedOn:
        require_same_fingerprints(candidate, fingerprints)
        recorded = candidate.trained_on()
        if recorded is not None:
            return recorded
        # A run of an earlier version does not record it, but its corpus may be this one.
        same = candidate.metadata.fingerprints.get("corpus") == system.corpus.fingerprint
        lineage = Lineage(train_digests=(), unknown=() if same else (candidate.path,))
        return TrainedOn(lineage, SeenInteractions.of(np.empty(0, np.uint64)))

    initial = load_first_valid(*find(init_from), system.world, read)
    if initial is None:
        raise CheckpointError("init_from", init_from, "has no valid checkpoint", "Use another one.")
    return initial


def _broadcast_leak(leak: Leak | None, example: str, world: World) -> tuple[Leak | None, str]:
    """Return rank 0's values on every rank. Two small all-gathers."""
    text = json.dumps([None if leak is None else leak.model_dump(), example])
    tree, example = json.loads(broadcast_text(text, world, "leaked interactions"))
    return None if tree is None else Leak(**tree), example


def trained_on_by_resumed_run(resumed: Checkpoint, corpus: Corpus) -> TrainedOn:
    """Return what a resumed run was trained on, even if an earlier version wrote the checkpoint."""
    recorded = resumed.trained_on()
    if recorded is not None:
        return recorded
    current = TrainedOn.of_corpus(corpus)
    started_from = resumed.metadata.config.get("init_from")
    unknown = () if started_from is None else (str(started_from),)
    return TrainedOn(current.lineage.model_copy(update={"unknown": unknown}), current.seen)


def find_leak(corpus: Corpus, seen: SeenInteractions) -> tuple[Leak | None, str]:
    """Find held-out interactions of a corpus among those that were seen; also return one of them as an example.

    All interactions of users who are held out whole count as held out, because the model must not have seen these
    users. An interaction that is in the corpus's training split, too, is no leak.
    """
    train, *held_out = corpus_keys(corpus, "train", *_HELD_OUT)
    keys = np.concatenate([*held_out, *new_user_keys(corpus)])
    leaked = np.flatnonzero(seen.contains(keys))
    leaked = leaked[~np.isin(keys[leaked], train)]
    if not len(leaked):
        return None, ""
    count = min(max(seen.estimate(len(leaked)), len(leaked)), len(keys))
    leak = Leak(num_interactions=count, is_exact=seen.is_complete, num_held_out=len(keys))
    return leak, _describe(corpus, int(leaked[0]))


def _describe(corpus: Corpus, index: int) -> str:
    """Name user and item of the held-out interaction at an index of the keys that `find_leak` concatenates."""
    known = [(corpus.users()["user"], corpus.split(split)) for split in _HELD_OUT]
    new = [(corpus.new_users()["user"], corpus.new_user_split(split)) for split in NEW_USER_SPLITS]
    parts = iter(known + new)
    ids, lists = next(parts)
    while index >= len(lists.values):
        index -= len(lists.values)
        ids, lists = next(parts)
    user, item = int(lists.rows[index]), int(lists.values[index])
    return f"user {ids[user].as_py()!r} with item {corpus.items()['item'][item].as_py()!r}"


def _refusal(candidate: Checkpoint, corpus: str, leak: Leak, example: str) -> CheckpointError:
    return CheckpointError(
        "init_from",
        candidate.path,
        f"was trained on {leak.count} of the {leak.num_held_out:,} interactions that {corpus} holds out ({example}),"
        " directly or through the runs that it started from",
        "Start from a run on this split, or without init_from. --allow-leak (allow_leak=true) starts anyway; every"
        " report then says so.",
    )


def _warn(candidate: Checkpoint, corpus: str, lineage: Lineage, leak: Leak | None) -> None:
    if leak is not None:
        logger.warning(
            "LEAK: %s was trained on %s of the %d interactions that %s holds out; evaluations will say so",
            candidate.path,
            leak.count,
            leak.num_held_out,
            corpus,
        )
    if lineage.unknown:
        logger.warning(
            "LEAKS CANNOT BE CHECKED: an earlier version wrote %s without recording whether it was trained on"
            " interactions that %s holds out",
            ", ".join(lineage.unknown),
            corpus,
        )
