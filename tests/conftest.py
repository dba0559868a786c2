"""What all tests share: logs that reach pytest, and one small corpus with two runs, for the tests of who uses a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from cllm4rec_dist.serving.recommender import Recommender
    from tests.training import Made

# Ray's workers run at nice 15 unless told otherwise: beside other tests they would hardly run at all.
os.environ |= {"RAY_worker_niceness": "0"}

PAPER: dict[str, Any] = {"adapter": {"kind": "lora", "rank": 4}}
"""Dot product, no bias, no linear memory; people without a row are the zero vector."""
COSINE: dict[str, Any] = {
    "linear_weight": 0.7,
    "adapter": {"kind": "full"},
    "head": {"similarity": "cosine", "item_bias": True, "pool_residual": True, "projection": True},
    "embeddings": {"dim": 6},
    "method": {"shared_user_ratio": 0.2, "max_history": 5},
}
STARTS_RAY = {"test_ray.py", "test_ray_launchers.py", "test_app.py"}
RUNS = {"paper": PAPER, "cosine": COSINE}


class FilesTogether(LoadScopeScheduling):
    """Keeps the tests of a file in one process, as they share fixtures, and starts one Ray at a time."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "Ray" if Path(file).name in STARTS_RAY else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether:
    """Replace `--dist loadgroup`: pytest-xdist 3.8 writes groups into an attribute that pytest 9.2 no longer reads."""
    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files whose tests take longest, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("integration", "slow")])


@pytest.fixture(autouse=True)
def logs_reach_pytest() -> Iterator[None]:
    """Undo what `setup_logging` did to the package's logger: pytest records twice what does not propagate at first."""
    _reset_logger()
    yield
    _reset_logger()


def _reset_logger() -> None:
    logger = logging.getLogger("cllm4rec_dist")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    from tests.harness import make_backbone, make_catalog, make_corpus

    folder, catalog = tmp_path_factory.mktemp("made"), make_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    return folder, make_corpus(folder / "corpus", catalog, backbone), str(backbone)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.harness import make_backbone, make_catalog, make_corpus, make_run  # imports torch, for these tests alone

    folder = tmp_path_factory.mktemp("serving")
    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    corpus = make_corpus(folder / "corpus", catalog, backbone)
    return {
        name: make_run(folder / name, corpus, backbone, **{"method": {"max_history": 100}} | settings)
        for name, settings in RUNS.items()
    }


@pytest.fixture(scope="session")
def recommenders(runs: dict[str, Path]) -> dict[str, Recommender]:
    from cllm4rec_dist.serving.recommender import Recommender

    return {name: Recommender.load(run, device="cpu") for name, run in runs.items()}


@pytest.fixture(scope="session")
def recommender(recommenders: dict[str, Recommender]) -> Recommender:
    return recommenders["paper"]
