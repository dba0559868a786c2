"""The backbone that tests of several libraries use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import make_backbone, make_catalog
from tests.private_apis.backbone import NUM_LAYERS, WIDTH


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "llama"
    return make_backbone(folder, make_catalog(), family="llama", hidden_size=WIDTH, num_layers=NUM_LAYERS)
