"""Samples of training interactions: complete while small, uniform beyond, merged without loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cllm4rec_dist.checkpointing.lineage import Leak, Lineage, SeenInteractions, TrainedOn

RANDOM = np.random.default_rng(0)
LARGEST = (1 << 64) - 1


def draw(count: int) -> np.ndarray:
    return RANDOM.integers(0, LARGEST, count, dtype=np.uint64, endpoint=True)


def test_a_small_sample_is_everything() -> None:
    keys = draw(1000)
    sample = SeenInteractions.of(np.concatenate([keys, keys[:5]]), size=1000)
    assert sample.is_complete
    assert sample.keys.tolist() == sorted(keys.tolist())
    assert sample.contains(keys).all()
    assert not sample.contains(draw(1000)).any()
    assert sample.estimate(7) == 7


def test_of_more_the_smallest_are_kept_and_counts_are_estimated() -> None:
    keys = draw(200_000)
    sample = SeenInteractions.of(keys, size=10_000)
    assert not sample.is_complete
    assert sample.keys.tolist() == sorted(keys.tolist())[:10_000]
    assert sample.bound == int(sample.keys[-1])
    held_out = np.concatenate([keys[:40_000], draw(60_000)])
    estimate = sample.estimate(int(sample.contains(held_out).sum()))
    assert estimate == pytest.approx(40_000, rel=0.08)  # 2,000 of them are in the sample: four standard errors


@pytest.mark.parametrize(("first", "second"), [(300, 500), (900, 5000), (20_000, 30_000), (0, 700)])
def test_samples_join_to_the_sample_of_both(first: int, second: int) -> None:
    one, other = draw(first), draw(second)
    other[: min(first, 100)] = one[: min(first, 100)]
    samples = SeenInteractions.of(one, size=1000), SeenInteractions.of(other, size=1000)
    joined = samples[0] | samples[1]
    assert joined.bound == min(sample.bound for sample in samples)
    assert joined.is_complete == (first <= 1000 and second <= 1000)
    both = np.unique(np.concatenate([one, other]))
    assert joined.keys.tolist() == both[both <= np.uint64(joined.bound)].tolist()
    # Cut to the size of a sample, it is that of everything at once.
    cut, expected = SeenInteractions.of(joined.keys, joined.bound, 1000), SeenInteractions.of(both, size=1000)
    assert (cut.keys.tolist(), cut.bound) == (expected.keys.tolist(), expected.bound)


def test_a_sample_comes_back_from_its_file(tmp_path: Path) -> None:
    for keys in (draw(0), draw(5), draw(50)):
        sample = SeenInteractions.of(keys, size=20)
        sample.save(tmp_path / "sample.safetensors")
        loaded = SeenInteractions.load(tmp_path / "sample.safetensors")
        assert (loaded.keys.tolist(), loaded.bound) == (sample.keys.tolist(), sample.bound)


GOOD = {"keys": np.array([1, 2, 9], np.uint64), "bound": np.array([9], np.uint64)}
BAD: list[dict[str, np.ndarray]] = [
    {"keys": GOOD["keys"]},
    {"bound": GOOD["bound"]},
    GOOD | {"keys": GOOD["keys"].astype(np.int64)},
    GOOD | {"keys": GOOD["keys"][None]},
    GOOD | {"keys": GOOD["keys"][::-1].copy()},
    GOOD | {"keys": np.array([1, 1, 9], np.uint64)},
    GOOD | {"bound": np.array([8], np.uint64)},
    GOOD | {"bound": np.array([9, 9], np.uint64)},
    GOOD | {"bound": np.array([], np.uint64)},
]


@pytest.mark.parametrize("content", BAD)
def test_a_file_that_is_no_sample_is_refused(tmp_path: Path, content: dict[str, np.ndarray]) -> None:
    save_file(content, tmp_path / "sample.safetensors")
    with pytest.raises(ValueError, match=r"sample|keys"):
        SeenInteractions.load(tmp_path / "sample.safetensors")
    (tmp_path / "sample.safetensors").write_bytes(b"\x80\x04no")
    with pytest.raises(ValueError, match="no sample"):
        SeenInteractions.load(tmp_path / "sample.safetensors")


def test_what_two_models_were_trained_on_is_joined_without_their_leaks() -> None:
    leak = Leak(num_interactions=3, is_exact=True, num_held_out=9)
    one = TrainedOn(Lineage(train_digests=("b",)), SeenInteractions.of(draw(3)))
    other = TrainedOn(Lineage(train_digests=("b", "a"), unknown=("old",), leak=leak), SeenInteractions.of(draw(4)))
    joined = one | other
    assert joined.lineage == Lineage(train_digests=("b", "a"), unknown=("old",))
    assert len(joined.seen.keys) == 7


def test_notes_say_what_a_reader_must_know() -> None:
    assert Lineage(train_digests=("a",)).notes() == []
    exact = Leak(num_interactions=1200, is_exact=True, num_held_out=5000)
    estimated = exact.model_copy(update={"is_exact": False})
    assert Lineage(train_digests=("a",), leak=exact).notes() == [
        "trained on 1,200 held-out interactions: the figures are not comparable"
    ]
    assert "trained on about 1,200" in Lineage(train_digests=("a",), leak=estimated).notes()[0]
    assert "runs/old" in Lineage(train_digests=("a",), unknown=("runs/old",)).notes()[0]
