"""Libraries are imported without garbage collection."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from cllm4rec_dist.launchers.imports import importing_libraries


@pytest.fixture
def _unfrozen() -> None:
    gc.unfreeze()


@pytest.mark.usefixtures("_unfrozen")
def test_what_an_import_makes_is_exempt_from_later_collections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library_of_a_test.py").write_text("import gc\nwas_enabled = gc.isenabled()\nmade = [[]]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with importing_libraries():
        import library_of_a_test
    try:
        assert not library_of_a_test.was_enabled
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        assert not any(found is library_of_a_test.made for found in gc.get_objects())
    finally:
        gc.unfreeze()
        del sys.modules["library_of_a_test"]


@pytest.mark.usefixtures("_unfrozen")
def test_without_an_import_nothing_is_exempt_and_an_error_turns_collection_on_again() -> None:
    with importing_libraries():
        import gc as again
    assert again.get_freeze_count() == 0
    with pytest.raises(ModuleNotFoundError), importing_libraries():
        import no_such_library  # noqa: F401
    assert gc.isenabled()


@pytest.mark.usefixtures("_unfrozen")
def test_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing_libraries():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
