"""Held-out interactions that a run would get to know by starting from another run.

A corpus that is split again, with another seed or after it has grown, may hold out what an earlier run was trained on.
A run that starts from that one (`init_from`), itself or by way of others, would then be evaluated on what it has seen.
Such a start is refused, or, where `allow_leak` is set, recorded in every checkpoint and reported beside every figure.
"""

from __future__ import annotations

import json
import logging

import numpy as np

from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.checkpoint import Checkpoint
from cllm4rec_dist.checkpointing.lineage import Leak, Lineage, SeenInteractions, TrainedOn, corpus_keys, new_user_keys
from cllm4rec_dist.corpus.shards import NEW_USER_SPLITS, Corpus
from cllm4rec_dist.distributed.collectives import broadcast_text
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.system import System

logger = logging.getLogger(__name__)

_HELD_OUT = ("valid", "test")


def of_new_run(system: System, init_from: str | None) -> TrainedOn | None:
    """What the model of a new run is trained on, by the run itself and by what it starts from. Collective.

    Args:
        init_from: the run or checkpoint that it starts from.

    Returns None on other ranks than the first.

    Raises:
        CheckpointError: where `init_from` was trained on what the corpus holds out and `allow_leak` is not set, where
            it is of another backbone or tokenizer, or where no checkpoint is whole.
    """
    world, corpus = system.world, system.corpus
    own = TrainedOn.of_corpus(corpus) if world.is_main else None
    if init_from is None:
        return own
    candidate, earlier = _earlier(system, init_from)
    joined = None if own is None else own | earlier
    leak, example = None, ""
    if joined is not None and own is not None and joined.lineage.train_digests != own.lineage.train_digests:
        leak, example = find_leak(corpus, joined.seen)
    leak, example = _on_every_rank(leak, example, world)
    if leak is not None and not system.config.allow_leak:
        raise _refusal(candidate, system.config.corpus, leak, example)
    if joined is None:
        return None
    _warn(candidate, system.config.corpus, joined.lineage, leak)
    return TrainedOn(joined.lineage.model_copy(update={"leak": leak}), joined.seen)


def _earlier(system: System, init_from: str) -> tuple[Checkpoint, TrainedOn]:
    """The checkpoint that a run starts from, and what that was trained on. Collective."""
    others = {name: value for name, value in system.fingerprints.items() if name != "corpus"}

    def read(candidate: Checkpoint) -> TrainedOn:
        checkpoint.require_same(candidate, others)
        known = candidate.trained_on()
        if known is not None:
            return known
        # A run of an earlier version does not say, but its corpus may be this one.
        same = candidate.about.fingerprints.get("corpus") == system.corpus.fingerprint
        lineage = Lineage(train_digests=(), unknown=() if same else (candidate.path,))
        return TrainedOn(lineage, SeenInteractions.of(np.empty(0, np.uint64)))

    found = checkpoint.load_first_valid(*checkpoint.find(init_from), system.world, read)
    if found is None:
        raise CheckpointError("init_from", init_from, "holds no whole checkpoint", "Use another one.")
    return found


def _on_every_rank(leak: Leak | None, example: str, world: World) -> tuple[Leak | None, str]:
    """What rank 0 found. Two small all-gathers."""
    found = json.dumps([None if leak is None else leak.model_dump(), example])
    tree, example = json.loads(broadcast_text(found, world, "leaked interactions"))
    return None if tree is None else Leak(**tree), example


def of_resumed(resumed: Checkpoint, corpus: Corpus) -> TrainedOn:
    """What a run that goes on from a checkpoint has been trained on, also where an earlier version wrote that."""
    known = resumed.trained_on()
    if known is not None:
        return known
    own = TrainedOn.of_corpus(corpus)
    started_from = resumed.about.config.get("init_from")
    unknown = () if started_from is None else (str(started_from),)
    return TrainedOn(own.lineage.model_copy(update={"unknown": unknown}), own.seen)


def find_leak(corpus: Corpus, seen: SeenInteractions) -> tuple[Leak | None, str]:
    """Held-out interactions of a corpus among those that were seen, and one of them for people.

    Everything that a user has who is held out whole counts as held out: the model must not know them.
    An interaction that the corpus has in its own training split as well is no leak.
    """
    train, *held_out = corpus_keys(corpus, "train", *_HELD_OUT)
    keys = np.concatenate([*held_out, *new_user_keys(corpus)])
    found = np.flatnonzero(seen.contains(keys))
    found = found[~np.isin(keys[found], train)]
    if not len(found):
        return None, ""
    number = min(max(seen.estimate(len(found)), len(found)), len(keys))
    leak = Leak(num_interactions=number, is_exact=seen.is_complete, num_held_out=len(keys))
    return leak, _describe(corpus, int(found[0]))


def _describe(corpus: Corpus, place: int) -> str:
    """The external ids of a held-out interaction, by its place in what `find_leak` puts together."""
    known = [(corpus.users()["user"], corpus.split(split)) for split in _HELD_OUT]
    new = [(corpus.new_users()["user"], corpus.new_user_split(split)) for split in NEW_USER_SPLITS]
    parts = iter(known + new)
    ids, lists = next(parts)
    while place >= len(lists.values):
        place -= len(lists.values)
        ids, lists = next(parts)
    user, item = int(lists.rows[place]), int(lists.values[place])
    return f"user {ids[user].as_py()!r} with item {corpus.items()['item'][item].as_py()!r}"


def _refusal(candidate: Checkpoint, corpus: str, leak: Leak, example: str) -> CheckpointError:
    return CheckpointError(
        "init_from",
        candidate.path,
        f"was trained on {leak.count} of the {leak.num_held_out:,} interactions that {corpus} holds out ({example}),"
        " itself or by way of the runs that it started from",
        "Start from a run on this split, or without init_from; --allow-leak (allow_leak=true) goes on, and every report"
        " then says so.",
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
            "LEAKS CANNOT BE CHECKED: an earlier version wrote %s, and whether that was trained on interactions that %s"
            " holds out is not known",
            ", ".join(lineage.unknown),
            corpus,
        )
