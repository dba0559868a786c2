"""Checkpoints damaged in many ways: refused with a clear error or skipped for an older one, and never used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.format import REPLICATED_FILE, SEEN_FILE
from cllm4rec_dist.checkpointing.increments import STATE_FILE
from cllm4rec_dist.checkpointing.run_folder import STEP
from cllm4rec_dist.checkpointing.store import COMMIT, Store
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.system import System, assemble
from tests.damage import DAMAGE, Spoil
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import make_config, run

OLDER, NEWER = "step-00000003", "step-00000006"


def swap(path: Path, draw: random.Random) -> None:
    shutil.copy(path.parent.parent / OLDER / path.name, path)


def retensor(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(path: Path, draw: random.Random) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    return spoil


def restate(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(path: Path, draw: random.Random) -> None:
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return spoil


def lying_header(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[0:8] = draw.choice([0, 1, 7, 1 << 20, 1 << 62]).to_bytes(8, "little")
    path.write_bytes(bytes(content))


def key(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


SHARD, STATE = "shard-00000-of-00002.safetensors", STATE_FILE
PARTS = ("collaborative.items", "collaborative.users.exp_avg", "content.users", "lora_A", "lora_B", "bias.exp_avg_sq")
FORGED: list[tuple[str, Spoil]] = [
    *((SHARD, retensor(lambda t, p=p: t.pop(key(t, p)))) for p in PARTS),
    *((SHARD, retensor(lambda t, p=p: t.update({key(t, p): t[key(t, p)].double()}))) for p in PARTS),
    *((SHARD, retensor(lambda t, p=p: t.update({key(t, p): t[key(t, p)].to(torch.int32)}))) for p in PARTS),
    *((SHARD, retensor(lambda t, p=p: t.update({key(t, p): t[key(t, p)][:-1]}))) for p in PARTS),
    *((SHARD, retensor(lambda t, p=p: t.update({key(t, p): t[key(t, p)][..., None]}))) for p in PARTS),
    *((SHARD, retensor(lambda t, p=p: t.update({f"x.{p}": t.pop(key(t, p))}))) for p in PARTS),
    *((SHARD, lying_header) for _ in range(5)),
    *((file, DAMAGE["pickled"][0]) for file in (SHARD, STATE, REPLICATED_FILE)),
    (SEEN_FILE, DAMAGE["pickled"][0]),
    (SEEN_FILE, retensor(lambda t: t.pop("keys"))),
    (SEEN_FILE, retensor(lambda t: t.update(keys=t["keys"].to(torch.int64)))),
    (SEEN_FILE, retensor(lambda t: t.update(bound=t["keys"][:1].clone()))),
    (REPLICATED_FILE, retensor(lambda t: t.pop("head.log_temperature"))),
    (REPLICATED_FILE, retensor(lambda t: t.pop("head.projection"))),
    (REPLICATED_FILE, retensor(lambda t: t.pop("input_projection"))),
    (REPLICATED_FILE, retensor(lambda t: t.pop("head.projection.exp_avg"))),
    (REPLICATED_FILE, retensor(lambda t: t.update({"head.projection": t["head.projection"][1:]}))),
    (REPLICATED_FILE, retensor(lambda t: t.pop("collaborative.users.step"))),
    (REPLICATED_FILE, retensor(lambda t: t.update({"head.log_temperature": torch.ones(5)}))),
    *((STATE, restate(lambda s, k=k: s.pop(k))) for k in ("run", "world_size", "shapes", "fingerprints", "config")),
    *((STATE, restate(lambda s, v=v: s.update(world_size=v))) for v in (0, -1, 1, 3, 1 << 40, "two", None, 2.5, [2])),
    *((STATE, restate(lambda s, v=v: s.update(shapes=v))) for v in (None, {}, {"a": "b"}, {"a": [-1]}, [1])),
    *((STATE, restate(lambda s, v=v: s["run"].update(step=v))) for v in (-1, 1.5, "six", None, [6])),
    *((STATE, restate(lambda s, v=v: s.update(fingerprints=v))) for v in (None, {}, {"backbone": 1}, {"backbone": ""})),
    *((STATE, restate(lambda s, v=v: s.update(schema_version=v))) for v in (0, 1, 3, "2x", None)),
    *((STATE, restate(lambda s, v=v: s.update(steps_taken=v))) for v in (-1, "six", None)),
]
"""Damage by somebody who then updated the marker."""


def forge_marker(newer: Path) -> None:
    marker = json.loads((newer / COMMIT).read_text())
    for name in marker["files"]:
        content = (newer / name).read_bytes()
        marker["files"][name] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newer / COMMIT).write_text(json.dumps(marker))


def void(*results: object) -> None:
    """Discard the results of several calls in a lambda."""


def cases(clean: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    def damaged(file: str, spoil: Spoil, seed: str) -> Callable[[Path], None]:
        return lambda newer: void(spoil(newer / file, random.Random(seed)))

    def forged(file: str, spoil: Spoil, seed: int) -> Callable[[Path], None]:
        return lambda newer: void(spoil(newer / file, random.Random(seed)), forge_marker(newer))

    for path in sorted(clean.iterdir()):
        for kind, (spoil, times) in (DAMAGE | {"swapped": (swap, 1)}).items():
            for index in range(times):
                yield f"{path.name} {kind} {index}", damaged(path.name, spoil, f"{path.name}{kind}{index}")
    for index, (file, spoil) in enumerate(FORGED):
        yield f"{file} forged {index}", forged(file, spoil, index)


def state_of(system: System) -> dict[str, Tensor]:
    rows = {name: p.detach() for name, p, _ in system.recommender.sharded_parameters()}
    moments = {f"{n}.{k}": v for n, adam in system.engine.moments().items() for k, v in adam.items()}
    tables = {f"{n}.{k}": v for n, adam in system.embedding_optimizer.state().items() for k, v in adam.items()}
    whole = dict(system.recommender.replicated_parameters())
    return {n: v.detach().clone() for n, v in (rows | system.engine.weights() | moments | tables | whole).items()}


def try_all(world: World, config: RunConfig, saved: str, scratch: str) -> dict[str, int]:
    """Resume from every damaged copy. Return how often it was refused, skipped or harmless."""
    system = assemble(config, world)
    os.chdir(scratch)
    clean, expected = Path(saved), {}
    for step, name in ((3, OLDER), (6, NEWER)):
        resumed = checkpoint.resume(system, Store(str(clean)), [name], lambda c: None)
        assert resumed is not None
        assert resumed.metadata.run.step == step
        expected[step] = state_of(system)
    outcomes: Counter[str] = Counter()
    for index, (name, spoil) in enumerate(cases(clean / NEWER)):
        copy = Path(scratch) / str(index)
        shutil.copytree(clean, copy)
        spoil(copy / NEWER)
        before = state_of(system)
        try:
            store = Store(str(copy))
            resumed = checkpoint.resume(system, store, [*reversed(store.names(STEP))], lambda c: None)
        except CLLM4RecError:
            assert same(state_of(system), before), name
            outcomes["refused with a clear error"] += 1
        else:
            assert resumed is not None, name
            assert same(state_of(system), expected[resumed.metadata.run.step]), name
            outcomes["harmless" if resumed.metadata.run.step == 6 else "skipped for the one before"] += 1
        shutil.rmtree(copy)
    assert not Path("exploded").exists()
    return dict(outcomes)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_damaged_checkpoints_are_never_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog)
    made = tmp_path, make_corpus(tmp_path / "corpus", catalog, backbone), str(backbone)
    config = make_config(made, tmp_path / "run", max_steps=6, embeddings={"init": "spectral", "dim": 6})
    run_ranks(2, run, config)
    (tmp_path / "scratch").mkdir()
    (outcomes,) = run_ranks(1, try_all, config, str(tmp_path / "run" / "checkpoints"), str(tmp_path / "scratch"))
    with capsys.disabled():
        summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        os.write(1, f"\ndamaged checkpoints: {sum(outcomes.values())} tried: {summary}\n".encode())
    assert sum(outcomes.values()) >= 200
    assert outcomes["harmless"] < 60  # external ids are not read to resume; nothing else may be
