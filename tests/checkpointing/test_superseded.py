"""Which checkpoints are removed, and in which order, so that none is ever without its base."""

from __future__ import annotations

import random

from cllm4rec_dist.checkpointing.increments import superseded


def test_a_base_is_never_removed_before_what_needs_it() -> None:
    draw = random.Random(0)
    for _ in range(300):
        keep, bases, last = draw.randint(1, 4), dict[str, str | None](), None
        for step in range(draw.randint(1, 30)):
            name = f"step-{step:08d}"
            bases[name] = None if last is None or draw.random() < 0.3 else last
            last = name if bases[name] is None else last
            removed = superseded(bases, keep)
            for gone in removed:  # a run may be killed after any of them
                del bases[gone]
                assert all(base is None or base in bases for base in bases.values())
            assert len(bases) <= 2 * keep
            assert [*bases][-1] == name
            whole = sum(base is None for base in bases.values())
            assert whole <= keep


def test_all_whole_ones_are_removed_as_ever() -> None:
    steps = [f"step-{step:08d}" for step in range(5)]
    assert superseded(dict.fromkeys(steps), 2) == steps[2::-1]
    assert superseded(dict.fromkeys(steps), 9) == []
    increments = {"step-1": None, "step-2": "step-1", "step-3": None, "step-4": "step-3", "step-5": "step-3"}
    assert superseded(increments, 1) == ["step-4", "step-2", "step-1"]
    assert superseded(increments, 2) == ["step-2"]
