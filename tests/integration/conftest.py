"""A small run that tests of several launchers are compared with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.integration.runs import BIN, losses, write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of six steps. `wanted` has its losses."""
    return _six_steps(tmp_path_factory) / "run.yaml"


@pytest.fixture(scope="session")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the six steps on two ranks of torchrun."""
    found: list[float] = json.loads((_six_steps(tmp_path_factory) / "losses.json").read_text())
    assert len(found) == 6
    return found


def _six_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of configuration and losses, which are made once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "six-steps"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "losses.json").exists():
            found = losses(write_config(folder), str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2")
            (folder / "losses.json").write_text(json.dumps(found))
    return folder
