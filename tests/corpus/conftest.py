"""Fixtures of the readers' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm4rec_dist.errors import CLLM4RecError
from tests.corpus.reading import Content, Read, Refuse, read_files


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Read:
    """Reads {name: content} as a source."""
    monkeypatch.chdir(tmp_path)
    return lambda files, /, **source: read_files(tmp_path, files, caplog, **source)


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Refuse:
    """The one-line message with which a source of {name: content} is refused."""
    monkeypatch.chdir(tmp_path)

    def message(files: dict[str, Content], **source: Any) -> str:
        with pytest.raises(CLLM4RecError) as caught:
            read_files(tmp_path, files, caplog, **source)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message
