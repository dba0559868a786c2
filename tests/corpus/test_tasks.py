"""Shards written by Ray tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm4rec_dist.corpus.prepare import prepare
from tests.corpus.samples import BlankTokenizer, recipe
from tests.corpus.test_shards import contents


@pytest.mark.integration
def test_any_number_of_tasks_writes_the_same_bytes(tmp_path: Path) -> None:
    config = recipe(examples_per_record=7, records_per_shard=2, max_text_tokens=9)
    for num_workers in (1, 3):
        out = str(tmp_path / f"{num_workers}")
        prepare(config, BlankTokenizer(), out, progress=False, num_workers=num_workers)
    alone, together = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert len([name for name in alone if name.startswith("content/")]) > 3
    assert alone == together
