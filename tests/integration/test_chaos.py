"""The chaos command itself: what it claims is checked in it. `make chaos` kills more often and has more ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.runs import ROOT


@pytest.mark.integration
@pytest.mark.timeout(1800)  # six starts of two ranks, beside another test that starts some
def test_nothing_is_lost() -> None:
    options = ["--seed", "0", "--kills", "2", "--worlds", "2,1", "--full-every", "3", "--epochs", "20"]
    command = [sys.executable, "-m", "tests.integration.chaos", *options]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
