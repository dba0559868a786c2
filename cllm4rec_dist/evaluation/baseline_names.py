"""Names of the baselines, for entry points that must not import the models."""

from __future__ import annotations

from typing import Literal

BaselineName = Literal["popularity", "ease", "title_ease", "sparse_ease", "ials"]
LABELS: dict[BaselineName, str] = {
    "popularity": "Popularity",
    "ease": "EASE",
    "title_ease": "EASE + titles",
    "sparse_ease": "Sparse EASE + titles",
    "ials": "iALS",
}
"""Names in tables."""
