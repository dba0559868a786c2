"""Operators and whole steps give the same on a GPU as on the CPU. Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.parity import OPERATORS, RUNS, compare_operator, compare_run, make_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("parity")
    make_data(made)
    return made


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_gives_the_same_on_both(name: str) -> None:
    operator, allowed = OPERATORS[name]
    differences, _ = compare_operator(operator)
    assert max(differences.values()) <= allowed, differences


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_the_same_on_both(folder: Path, name: str) -> None:
    """Losses and the first gradient norm; a run with deterministic algorithms also repeats bit for bit."""
    changes, allowed = RUNS[name]
    differences, more = compare_run(folder, name, changes)
    assert max(differences.values()) <= allowed, differences
    assert more["repeats bit for bit"] or not changes.get("deterministic"), more
