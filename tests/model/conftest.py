from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import make_backbone, make_catalog
from tests.model.backbones import FAMILIES, WIDTH


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small backbone of each family; not to be changed."""
    root, catalog = tmp_path_factory.mktemp("backbones"), make_catalog()
    return {family: make_backbone(root / family, catalog, family=family, hidden_size=WIDTH) for family in FAMILIES}
